"""Measures the import of a denoiser that another project has quantised, of any size, with zeros in sparse files.

    python -m tools.foreign_imports FOLDER LAYOUT [MODEL]

The arithmetic and what is written are those of real weights; reading zeros from a sparse file is faster than reading a
disk. Text encoder, VAE and tokenizer are tiny ones, so that time and memory are the denoiser's. The bundle is deleted
in the end.
"""

import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from msgspec.structs import replace

from wanforge.configs.model import ModelConfig, load_model
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.importer import import_checkpoint
from wanforge.exporter.checkpoint.record import conversions
from wanforge.exporter.checkpoint.synth import file_names, write_checkpoint
from wanforge.exporter.checkpoint.synthetic.quantised_files import quantised_paths, write_sparse
from wanforge.progress import silent


def model_of(name: str) -> ModelConfig:
    """A model with its own denoiser and all else tiny."""
    model, tiny = load_model(name), load_model("tiny-t2v")
    dit = replace(model.dit, text_dim=tiny.dit.text_dim)
    return replace(model, dit=dit, vae=tiny.vae, text_encoder=tiny.text_encoder)


def main(folder: Path, layout: str, name: str) -> None:
    """Write the files, import them, and print what that took."""
    model = model_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = quantised_paths(model, layout, folder)
    write_sparse(model, layout, paths, silent)
    others = {"vae", "text_encoder", "tokenizer"}
    write_checkpoint(model, folder, parts=others, replace=True)
    files = {part: folder / path for part, path in file_names(model).items() if part in others}
    sources = Sources({**paths, "vae": files["vae"], "text_encoder": files["text_encoder"]}, files["tokenizer"])
    start = time.perf_counter()
    bundle = import_checkpoint(model, sources, folder / "bundle", replace=True)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    written = sum(record.bytes for record in bundle.manifest.files.values())
    print(
        f"{name}, {layout}: {seconds:.0f} s ({used.ru_utime + used.ru_stime:.0f} s of processor time, "
        f"{torch.get_num_threads()} threads), at most {used.ru_maxrss / 1e3:.0f} MB of memory; recipe "
        f"{bundle.recipe.name}, {written / 1e9:.2f} GB; {'; '.join(conversions(bundle.root).values())}",
        flush=True,
    )
    shutil.rmtree(bundle.root)


if __name__ == "__main__":
    folder, layout, name = (*sys.argv[1:], "turbowan2.1-t2v-1.3b-480p")[:3]
    main(Path(folder), layout, name)
