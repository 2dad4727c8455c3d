"""The process of one part: ``python -m tools.gpu_day.child ORDER``, where the order is a JSON object."""

import os
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import msgspec

from tools.gpu_day.day import FULL, SMALL, Day, Paths
from tools.gpu_day.device import open_device
from tools.gpu_day.parts import Part
from tools.gpu_day.results import Results


class Order(msgspec.Struct, frozen=True):
    """What a child is to do.

    Attributes:
        out, scratch, results: The folders and the file to write to.
    """

    part: Part
    rehearses: bool
    out: Path
    scratch: Path
    results: Path


def watch_parent(parent: int) -> None:
    """End this process and its children with the process that started it, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(order: Order) -> None:
    part, results = order.part, Results(order.results)
    before = len(results.of(part.name, "failure"))
    device = open_device(order.rehearses, order.scratch / "kernels")
    paths, scale = Paths(order.out, order.scratch), SMALL if order.rehearses else FULL
    day = Day(part.name, part.options, device, scale, results, paths)
    module, _, function = part.function.partition(":")
    with device.entered():
        getattr(import_module(module), function)(day)
    failures = results.of(part.name, "failure")[before:]
    for failure in failures:
        print(f"{failure['name']}: {failure['error']}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    given = msgspec.json.decode(sys.argv[1], type=Order, dec_hook=lambda kind, value: kind(value))
    watch_parent(os.getppid())
    main(given)
