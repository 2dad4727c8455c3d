"""Start the first half hour on a machine without a network, from the folder that ``make gpu-pack`` makes.

    python3 gpu-pack/start.py --out OUT

It needs nothing but Python, and hands its arguments to ``python -m tools.gpu_day``.
"""

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path


def unpacked(wheels: Path) -> Path:
    """A folder with what is in some wheels. Wheels without scripts need nothing else to be installed."""
    found = sorted(wheels.glob("*.whl"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]
    site = Path(tempfile.gettempdir()) / f"wanforge-site-{digest}"
    for path in found:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(site)
    return site


def main() -> None:
    here = Path(__file__).resolve().parent
    tree = here / "tree" if (here / "tree").is_dir() else here.parent
    paths = [unpacked(here / "wheels"), tree / "src", tree]
    before = os.environ.get("PYTHONPATH", "")
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([before] if before else [])]),
        "WANFORGE_KERNELS": str(here / "kernels"),
    }
    os.execve(sys.executable, [sys.executable, "-m", "tools.gpu_day", *sys.argv[1:]], variables)


if __name__ == "__main__":
    main()
