"""Run every kernel on the machine, and write what was found.

    python -m tools.ptx --markdown docs/proof.md

Each case of `cases` runs on each architecture, at the sizes of `sizes`. Results are kept beside the cubins until a
source changes, so a run that was stopped goes on where it was. With `--minutes`, no case is begun after that time, and
the page says of which cases there are no results. It exits with 1 if a result is not what it should be.
"""

import argparse
import sys
from math import inf
from pathlib import Path

from tools.ptx.page import cell, page
from tools.ptx.results import jobs, results
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.whole_file import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description="Run every kernel on the machine for PTX.")
    parser.add_argument("--markdown", type=Path, help="the page to write")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "ptx", help="where cubins are kept")
    parser.add_argument("--minutes", type=float, default=inf, help="after how long no further case is begun")
    options = parser.parse_args()
    asked, found = jobs(), []
    for result in results(asked, options.folder, 60 * options.minutes):
        found.append(result)
        job = result.job
        print(f"{len(found)}/{len(asked)} sm_{job.sm:<4}{job.dtype:9} {job.case:70} {cell(result)}", flush=True)
    if options.markdown:
        write_atomically(options.markdown, page(asked, found).encode())
    if len(found) < len(asked):
        print(f"{len(asked) - len(found)} cases are left; run it again to go on with them")
    sys.exit(any(result.wrong for result in found))


if __name__ == "__main__":
    main()
