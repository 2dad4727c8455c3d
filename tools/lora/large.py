"""Measures the merge of a LoRA into a denoiser of any size, whose weights are zeros in sparse files.

    python -m tools.lora.large FOLDER [MODEL] [RANK]

The arithmetic and what is written are those of real weights; reading zeros from a sparse file is faster than reading a
disk. The folder is filled with the merged weights, 14.3 GB for a model of 14 billion weights, and can be deleted.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle, unquantised, weights_name
from wanforge.engines.bundle.manifest import FORMAT, FileRecord, Manifest
from wanforge.engines.bundle.tensorfile import TensorSpec, TensorWriter
from wanforge.exporter.checkpoint.layout import Layout, layout
from wanforge.exporter.checkpoint.synthetic.tensor_file import write_tensor_file
from wanforge.progress import silent
from wanforge.runtime.lora.files import open_lora
from wanforge.runtime.lora.merged_sets import MergedSets
from wanforge.runtime.lora.merging import Addition, MergedWeights
from wanforge.runtime.lora.records import read_records
from wanforge.runtime.lora.targets import targets_of

LAYERS = tuple(f"{attention}_attn.{part}" for attention in ("self", "cross") for part in "qkvo")
LAYERS += ("ffn.0", "ffn.2")


def sparse(path: Path, tensors: Layout) -> FileRecord:
    """Write a file of zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensor_file(path, tensors, None, lambda size: None)
    return FileRecord("0" * 64, path.stat().st_size)


def bundle_of_zeros(root: Path, name: str) -> Bundle:
    """A bundle with only a denoiser, in w8a8 and unquantised."""
    model, recipe = load_model(name), load_recipe("w8a8")
    plain = layout("dit", model, load_recipe("bf16-sla"))
    kept = {key: spec for key, spec in plain.items() if key.removesuffix(".weight").endswith(LAYERS)}
    files = {
        weights_name("dit"): sparse(root / weights_name("dit"), layout("dit", model, recipe)),
        weights_name(unquantised("dit")): sparse(root / weights_name(unquantised("dit")), kept),
    }
    return Bundle(root, Manifest(FORMAT, "tools.lora.large", model, recipe, files))


def lora_of(path: Path, bundle: Bundle, rank: int) -> None:
    """Write a random LoRA for the ten linears of each block."""
    header = bundle.header(weights_name(unquantised("dit"))).tensors
    specs, generator = {}, torch.Generator().manual_seed(0)
    for name, spec in header.items():
        module = f"diffusion_model.{name.removesuffix('.weight')}"
        specs[f"{module}.lora_down.weight"] = TensorSpec("BF16", (rank, spec.shape[1]))
        specs[f"{module}.lora_up.weight"] = TensorSpec("BF16", (spec.shape[0], rank))
    with TensorWriter(path, specs) as writer:
        for name, spec in specs.items():
            values = 0.02 * torch.randn(spec.shape, generator=generator)
            writer.write(name, [values.bfloat16().flatten().view(torch.uint8).numpy().data])
        writer.finish()


def main(folder: Path, name: str, rank: int) -> None:
    """Merge a random LoRA, and print what that took."""
    bundle = bundle_of_zeros(folder, name)
    lora_of(folder / "lora.safetensors", bundle, rank)
    bundle.verify = lambda names, *_, **__: None  # type: ignore[method-assign]
    start = time.perf_counter()
    file = open_lora(folder / "lora.safetensors")
    records = read_records(file, targets_of(bundle.model, bundle.recipe))
    merged = MergedWeights(bundle, "dit", {each.target: [Addition(each, 1.0)] for each in records})
    checked = time.perf_counter()
    record, _ = MergedSets(bundle).open(merged, [(file, 1.0)], silent)
    written = time.perf_counter()
    MergedSets(bundle).open(merged, [(file, 1.0)], silent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{name}, rank {rank}, {torch.get_num_threads()} threads: {len(records)} records checked in "
        f"{checked - start:.1f} s, {record.bytes / 1e9:.2f} GB merged in {written - checked:.1f} s and opened again in "
        f"{time.perf_counter() - written:.2f} s; at most {peak / 1e9:.2f} GB of memory"
    )


if __name__ == "__main__":
    folder, name, rank = (*sys.argv[1:], *("turbowan2.1-t2v-14b-480p", "64")[len(sys.argv) - 2 :])
    main(Path(folder), name, int(rank))
