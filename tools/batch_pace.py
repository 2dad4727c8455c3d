"""How fast a batch is with one process, with two, and with Ray, and whether it survives processes that are killed again
and again: every run has to make the same bytes.

python -m tools.batch_pace BUNDLE --prompts 200

Run it from the top of a checkout.
"""

import argparse
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "ring")
WAYS = ("moving right", "moving left", "moving up", "moving down", "moving right slowly", "moving left quickly")
RUNS = {
    "one process": ("--workers", "1"),
    "two processes": ("--workers", "2"),
    "Ray, two actors": ("--workers", "2", "--ray", "local"),
    "one process, VAE apart": ("--workers", "1", "--split-vae", "1"),
    "two processes, killed": ("--workers", "2", "--retries", "30"),
}
KILLED = "killed"


def prompts(count: int) -> list[str]:
    """Some prompts of the model that comes with the package, all different."""
    every = itertools.product(("", "small ", "large "), COLOURS, SHAPES, WAYS)
    return [f"a {size}{colour} {shape} {way}" for size, colour, shape, way in itertools.islice(every, count)]


def run(words: list[str], kill_seconds: float) -> tuple[dict[str, Any], float]:
    """Run a batch. Returns its report and the seconds from its start to its end.

    Args:
        kill_seconds: Seconds after which one of its processes is killed, each time another; 0 for never.
    """
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "wanforge", "batch", *words, "--json"], stdout=subprocess.PIPE
    ) as done:
        turns = itertools.count()
        while kill_seconds and done.poll() is None:
            time.sleep(kill_seconds)
            if children := psutil.Process(done.pid).children():
                children[next(turns) % len(children)].kill()
        said, _ = done.communicate()
    if done.returncode:
        raise SystemExit(f"a batch ended with {done.returncode}")
    return json.loads(said), time.monotonic() - begun


def contents(folder: Path) -> dict[str, str]:
    """The hashes of all clips."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.mp4")}


def main() -> None:
    """Run each kind of batch once, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--kill-seconds", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-pace-") as name:
        folder = Path(name)
        file = folder / "prompts.txt"
        file.write_text("\n".join(prompts(options.prompts)))
        expected: dict[str, str] = {}
        for number, kind in enumerate(options.runs):
            out = folder / f"clips-{number}"
            words = [str(file), "--bundle", str(options.bundle), "--out", str(out), *RUNS[kind]]
            report, seconds = run(words, options.kill_seconds if KILLED in kind else 0)
            found = contents(out)
            expected = expected or found
            print(
                f"{kind:26} {seconds:8.1f} s, {report['made'] / seconds:6.3f} clips a second, used "
                f"{report['utilisation']:4.0%}, {report['deaths']:3} deaths, "
                f"{'equal' if found == expected else 'DIFFERENT'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
