"""Find out on a GPU whatever only a GPU can show, part by part, within the time of one call.

    python -m tools.gpu_day --out OUT
    python -m tools.gpu_day --rehearse

A later call goes on with the parts that have not come to an end. It exits with 1 if a part failed or is missing.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tools.gpu_day.page import page
from tools.gpu_day.parts import PARTS, rehearsed
from tools.gpu_day.patch import tiles_patch
from tools.gpu_day.results import PASSED, Results
from tools.gpu_day.run import Call, run_parts
from wanforge.whole_file import write_atomically

RESULTS, PAGE, PATCH = "results.jsonl", "page.html", "tiles.patch"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder of the results (gpu-day)")
    parser.add_argument("--resume", type=Path, help="results of an earlier call, to go on from if --out has none")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that this call may take (9)")
    parser.add_argument("--part", action="append", choices=[part.name for part in PARTS], help="only these; repeatable")
    parser.add_argument("--scratch", type=Path, help="folder of everything that need not come back")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every part at a small size on the CPU, in place of a GPU"
    )
    return parser.parse_args()


def main() -> None:
    start, given = time.monotonic(), options()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; without one, rehearse: python -m tools.gpu_day --rehearse")
    kind = "rehearsal" if given.rehearse else "gpu-day"
    scratch = (given.scratch or Path(tempfile.gettempdir()) / f"wanforge-{kind}").resolve()
    out = given.out.resolve()
    for folder in (scratch, out):
        folder.mkdir(parents=True, exist_ok=True)
    results = Results(out / RESULTS)
    if given.resume is not None and not results.path.exists():
        shutil.copyfile(given.resume, results.path)
    offered = rehearsed() if given.rehearse else PARTS
    parts = [part for part in offered if given.part is None or part.name in given.part]
    call = Call(results, out, scratch, given.rehearse, start + 60 * given.minutes)
    try:
        run_parts(call, parts)
    finally:
        write_reports(results, out)
    states = [results.state(part.name) for part in parts]
    print(f"{states.count(PASSED)} of {len(parts)} parts passed; {out / PAGE}")
    sys.exit(states.count(PASSED) < len(parts))


def write_reports(results: Results, out: Path) -> None:
    """Write the page, and the patch if there is anything to change."""
    write_atomically(out / PAGE, page(results).encode())
    if patch := tiles_patch(results):
        write_atomically(out / PATCH, patch.encode())


if __name__ == "__main__":
    main()
