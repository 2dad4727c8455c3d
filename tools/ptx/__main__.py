"""Run every kernel on the machine, and write what was found.

    python -m tools.ptx --markdown docs/proof.md

Each case of `cases` runs on each architecture, at the sizes of `sizes`. Results are kept beside the cubins until a
source changes, so a run that was stopped goes on where it was. It exits with 1 if a result is not what it should be.
"""

import argparse
import sys
from pathlib import Path

from tools.ptx.page import cell, page
from tools.ptx.results import jobs, results
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.whole_file import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every kernel on the machine for PTX.")
    parser.add_argument("--markdown", type=Path, help="the page to write")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "ptx", help="where cubins are kept")
    options = parser.parse_args()
    asked, found = jobs(), []
    for result in results(asked, options.folder):
        found.append(result)
        job = result.job
        print(f"{len(found)}/{len(asked)} sm_{job.sm:<4}{job.dtype:9} {job.case:70} {cell(result)}", flush=True)
    if options.markdown:
        write_atomically(options.markdown, page(found).encode())
    sys.exit(any(result.wrong for result in found))


if __name__ == "__main__":
    main()
