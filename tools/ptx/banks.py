"""How often accesses to shared memory go to the same bank at once.

    python -m tools.ptx.banks

It runs every kernel of the recipes w8a8 and nvfp4 on the machine for PTX, counts the wavefronts of each warp's
accesses, and writes how many times the fewest possible they are to runtime/measure/machine_code/conflicts.json, by
architecture and kernel. A wavefront serves each of the 32 banks, which are four bytes wide, with one word. Accesses of
8 and 16 bytes take the lanes of a warp in halves and quarters; the rows of a matrix that `ldmatrix` loads are such
accesses, too.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from tools.ptx.bench import Bench
from tools.ptx.cases import cases
from tools.ptx.memory import SharedMemory
from tools.ptx.proof import copies
from tools.ptx.sizes import RAGGED
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.runtime.measure.machine_code.rates import CONFLICTS
from wanforge.whole_file import write_atomically

COUNTED = re.compile(
    "attention sage_fp(8|16), quantised, .*|linear by tiles with GELU, quantised, .*|"
    "linear by tiles, 128x128x256, 1 weights|quantiser by tiles, 128x256|"
    "modulated layer norm( of known moments)?, quantised, 37x1536|RMS norm and rotation of two, 37x1536|"
    "attention of normalised queries to all keys, 200 tokens, .*|"
    "linear in 4 bits(, 128x128x256, 1 weights| with GELU, quantised, .*)|quantiser to 4 bits, 128x256|"
    "modulated layer norm, quantised to 4 bits, 37x1536"
)
"""The cases that launch each kernel of the recipes w8a8 and nvfp4. Addresses do not depend on the number of tokens."""
SMS = (80, 86, 89, 90, 120)
BANKS, WORD, LANES = 32, 4, 32
WARPS_COUNTED = 8
"""Warps of one access that are counted, so that many blocks at once do not take long."""


def wavefronts(addresses: NDArray[Any], size: int, lanes: NDArray[Any]) -> tuple[int, int]:
    """The wavefronts that the warps of an access take, and the fewest that could move as many words.

    Args:
        addresses: The address of each thread that takes part.
        size: Bytes that each accesses.
        lanes: The number of each thread.
    """
    together = LANES * WORD // max(size, WORD)
    taken = least = 0
    groups = lanes // together
    for group in np.unique(groups):
        first = addresses[groups == group].astype(np.int64) // WORD
        words = np.unique(first[:, None] + np.arange(max(1, size // WORD)))
        taken += int(np.bincount(words % BANKS).max())
        least += -(-len(words) // BANKS)
    return taken, least


class Conflicts:
    """Counts wavefronts by kernel.

    Attributes:
        counts: For each kernel the wavefronts that were taken, and the fewest possible.
    """

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self.kernel = ""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the accesses of everything that runs."""
        places, launch = SharedMemory.places, Bench.launch

        def counted(memory: SharedMemory, addresses: Any, size: int, lanes: Any, report: Any) -> Any:
            some = lanes < lanes[0] // LANES * LANES + WARPS_COUNTED * LANES if len(lanes) else lanes
            taken, least = wavefronts(addresses[some], size, lanes[some]) if len(lanes) else (0, 0)
            both = self.counts.setdefault(self.kernel, [0, 0])
            both[0], both[1] = both[0] + taken, both[1] + least
            return places(memory, addresses, size, lanes, report)

        def named(bench: Bench, one: Launch) -> None:
            self.kernel = one.kernel.name
            launch(bench, one)

        with mock.patch.object(SharedMemory, "places", counted), mock.patch.object(Bench, "launch", named):
            yield

    @property
    def factors(self) -> dict[str, float]:
        """The wavefronts that each kernel takes for one that it needs."""
        return {kernel: round(taken / least, 2) for kernel, (taken, least) in sorted(self.counts.items()) if least}


def factors(sm: int, folder: Path) -> dict[str, float]:
    """The factor of every kernel of those recipes on an architecture, in bfloat16."""
    conflicts = Conflicts()
    with conflicts.counting():
        for case in cases(sm, torch.bfloat16, RAGGED):
            if not COUNTED.fullmatch(case.name):
                continue
            Bench(sm, folder)(case.run, *copies(case.inputs()))
    return conflicts.factors


def main() -> None:
    parser = argparse.ArgumentParser(description="Count conflicts between banks of shared memory.")
    parser.add_argument("--folder", type=Path, default=cache_folder().parent / "ptx", help="where cubins are kept")
    options = parser.parse_args()
    found = {str(sm): factors(sm, options.folder) for sm in SMS}
    write_atomically(CONFLICTS, msgspec.json.format(msgspec.json.encode(found), indent=1))


if __name__ == "__main__":
    main()
