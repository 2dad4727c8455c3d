"""The compiler's process, to which the kernels of this folder are those of an op."""

import sys
from importlib import import_module

from wanforge.plugins.launching.worker import main

for name in ("bulk_copies", "bulk_copies.kernel"):
    sys.modules[f"wanforge.plugins.{name}"] = import_module(f"tests.plugins.{name}")

if __name__ == "__main__":
    main()
