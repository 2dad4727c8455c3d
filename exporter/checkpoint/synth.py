"""Checkpoint files in the published formats with random weights, for any model at any size.

A file is laid out first, without data, and its tensors are then filled in one by one, so a 28 GB checkpoint needs
little memory. Several threads draw, and one writes. A sparse file is left without data and takes almost no disk space.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import dit_component
from wanforge.errors import CheckpointError, ResourceError, join_names
from wanforge.exporter.checkpoint.layout import Layout, layout, published_recipe
from wanforge.exporter.checkpoint.synthetic.forms import FORMS, FileForm, file_name
from wanforge.exporter.checkpoint.synthetic.tensor_file import write_tensor_file
from wanforge.exporter.checkpoint.synthetic.tokenizer import train_tokenizer
from wanforge.exporter.checkpoint.synthetic.torch_file import write_torch_file
from wanforge.exporter.checkpoint.synthetic.weights import random_tensors
from wanforge.host.capacity import free_disk_bytes
from wanforge.progress import ByteCount, Progress, silent
from wanforge.whole_file import write_atomically

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"


def file_names(model: ModelConfig) -> dict[str, str]:
    """The names of the published files, by part: ``dit``, ``dit-quant`` (per expert), ``vae`` and so on."""
    names = {}
    for expert in model.experts:
        names[dit_component(expert)] = file_name(model, expert)
        if FORMS[model.form].has_quantised:
            names[dit_component(expert) + "-quant"] = f"{model.stem(expert)}-quant{FORMS[model.form].ending}"
    return names | {"vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE, "tokenizer": TOKENIZER_FILE}


def write_checkpoint(
    model: ModelConfig,
    out: Path,
    *,
    parts: set[str] | None = None,
    sparse: bool = False,
    seed: int = 0,
    replace: bool = False,
    progress: Progress = silent,
) -> list[Path]:
    """Write a model's files; the same seed gives the same bytes.

    Args:
        parts: The parts to write, as in `file_names`; None writes all. Quantised denoisers hold the same weights as the
            unquantised ones, quantised.
        sparse: Write full-size files of zeros that take no disk space.
        replace: Write over files that are there already.

    Returns:
        The files written.

    Raises:
        CheckpointError: There are such files, and `replace` is not set. Nothing was written.
        ResourceError: The disk is too small. Nothing was written.
    """
    files = {part: out / name for part, name in file_names(model).items() if parts is None or part in parts}
    layouts = {part: published_layout(model, part) for part in files if part != "tokenizer"}
    check_free(out, list(files.values()), replace)
    if not sparse:
        check_disk(out, sum(spec.nbytes for specs in layouts.values() for spec in specs.values()))
    for part, path in files.items():
        if part == "tokenizer":
            write_atomically(path, train_tokenizer(model.text_encoder.vocab_size).to_str().encode())
            continue
        count = ByteCount(progress, path.name, sum(spec.nbytes for spec in layouts[part].values()))
        write_part = write_tensor_file if path.suffix == ".safetensors" else write_torch_file
        if sparse:
            write_part(path, layouts[part], None, count)
            continue
        with random_part(model, part, seed) as values:
            write_part(path, layouts[part], values, count)
    return list(files.values())


@contextmanager
def random_part(model: ModelConfig, part: str, seed: int) -> Iterator[Callable[[str], Iterator[Tensor]]]:
    """Within the ``with`` block, random values of each tensor of a part by its name in the file. Counters of training
    have none."""
    form, canonical = form_of(model, part), canonical_layout(model, part)
    known = {in_file: name for name, in_file in form.named(canonical).items() if name in canonical}
    specs = {name: spec for name, spec in form.stored(canonical).items() if name in canonical}
    with random_tensors(part.removesuffix("-quant"), specs, seed) as values:
        yield lambda in_file: values(known[in_file]) if in_file in known else iter(())


def published_layout(model: ModelConfig, part: str) -> Layout:
    """The tensors of a part, as in `file_names`, as its file names and stores them."""
    form, canonical = form_of(model, part), canonical_layout(model, part)
    names = form.named(canonical)
    return {names[name]: spec for name, spec in form.stored(canonical).items()}


def canonical_layout(model: ModelConfig, part: str) -> Layout:
    """The tensors of a part in canonical naming."""
    recipe = published_recipe(part.endswith("-quant"), has_sla=model.dit.sparse)
    return layout(part.removesuffix("-quant"), model, recipe)


def form_of(model: ModelConfig, part: str) -> FileForm:
    """The form of a part's file: the networks that all models share have TurboDiffusion's."""
    return FORMS[model.form if part.startswith("dit") else "turbodiffusion"]


def check_free(out: Path, files: list[Path], replace: bool) -> None:
    """Refuse to write over files unless it is asked for.

    Raises:
        CheckpointError: Some of the files are there already.
    """
    there = [str(path.relative_to(out)) for path in files if path.exists() or path.is_symlink()]
    if there and not replace:
        raise CheckpointError(
            f"{out}: already holds {join_names(there)}; choose another folder, or replace them (--replace)"
        )


def check_disk(out: Path, needed: int) -> None:
    """Refuse to begin if the disk cannot hold the files.

    Raises:
        ResourceError: It cannot.
    """
    if needed > (free := free_disk_bytes(out)):
        raise ResourceError(
            f"{out}: {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; make room, choose another "
            "folder, or write files of zeros that take no space (--sparse)"
        )
