"""Measures switching between LoRAs on a denoiser of any size, whose weights are zeros in sparse files.

    python -m tools.lora.switching FOLDER [MODEL] [RANK] [COUNT]

Each LoRA is put on twice: beside 8-bit weights, and merged, from sets that are on the disk already. The sets and LoRAs
are sparse files, too, so that ten sets of a model of 14 billion weights fit on any disk; reading them is faster than
reading a disk. What is told as bytes is what a GPU would have to be sent. The folder can be deleted.
"""

import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.lora.large import bundle_of_zeros, sparse
from wanforge.engines.bundle.bundle import Bundle, unquantised, weights_name
from wanforge.engines.bundle.tensorfile import TensorSpec, read_header
from wanforge.progress import Progress
from wanforge.runtime.backends.torch import TorchBackend
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.lora.files import LoraFile
from wanforge.runtime.lora.fitting import Fitting
from wanforge.runtime.lora.merged_sets import MergedSets
from wanforge.runtime.lora.merging import MergedWeights


class SparseSets(MergedSets):
    """Merged sets of zeros that take no room on the disk."""

    def _write(self, path: Path, merged: MergedWeights, files: Sequence[LoraFile], progress: Progress) -> str:
        return sparse(path, merged.specs).sha256


def lora_of(path: Path, bundle: Bundle, rank: int, number: int) -> Path:
    """Write a LoRA for the ten linears of each block: zeros, but for one value of each upper factor."""
    specs = {}
    for name, spec in bundle.header(weights_name(unquantised("dit"))).tensors.items():
        module = f"diffusion_model.{name.removesuffix('.weight')}"
        specs[f"{module}.lora_down.weight"] = TensorSpec("BF16", (rank, spec.shape[1]))
        specs[f"{module}.lora_up.weight"] = TensorSpec("BF16", (spec.shape[0], rank))
    sparse(path, specs)
    offsets = read_header(path).offsets
    with path.open("r+b") as file:
        for name in specs:
            if name.endswith("lora_up.weight"):
                file.seek(offsets[name])
                file.write(bytes([number + 1, 0x3C]))  # a small number in bfloat16
    return path


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(bundle: Bundle, choices: Sequence[LoraChoice]) -> str:
    """Put on each LoRA twice, and tell what the first and the second time took."""
    backend = TorchBackend(bundle, torch.bfloat16)
    fitting = Fitting(bundle, backend)
    fitting.sets = SparseSets(bundle)
    rounds: list[list[float]] = []
    for _ in range(2):
        rounds.append([])
        for choice in choices:
            start = time.perf_counter()
            fitting.check([choice])
            fitting.put_on([choice])
            rounds[-1].append(time.perf_counter() - start)
    (ways,) = {str(fitting.described([choice])[0]["ways"]) for choice in choices}
    changed = sum(x.nbytes for x in backend.weights.in_place["dit"].values())
    first, again = (statistics.median(each) for each in rounds)
    return (
        f"{ways}: {first:.2f} s for the first time and {again:.2f} s again (medians of {len(choices)}), "
        f"{changed / 1e9:.2f} GB to send, {anonymous_bytes() / 1e9:.2f} GB of memory"
    )


def main(folder: Path, name: str, rank: int, count: int) -> None:
    """Switch between LoRAs, and print what that took."""
    with_base = bundle_of_zeros(folder, name)
    manifest = with_base.manifest
    files = [lora_of(folder / f"lora{n}.safetensors", with_base, rank, n) for n in range(count)]
    print(f"{name}, rank {rank}, {files[0].stat().st_size / 1e6:.1f} MB each, {torch.get_num_threads()} threads")
    choices = [LoraChoice(path) for path in files]
    del manifest.files[weights_name(unquantised("dit"))]
    print(measure(Bundle(folder, manifest), choices), flush=True)
    print(measure(bundle_of_zeros(folder, name), choices), flush=True)


if __name__ == "__main__":
    folder, name, rank, count = (*sys.argv[1:], *("turbowan2.1-t2v-14b-480p", "64", "10")[len(sys.argv) - 2 :])
    main(Path(folder), name, int(rank), int(count))
