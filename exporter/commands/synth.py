"""The command that writes checkpoint files with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click
import msgspec

from wanforge.configs.model import Form, ModelConfig, load_model
from wanforge.errors import ConfigError
from wanforge.exporter.checkpoint.synth import check_disk, check_free, file_names, write_checkpoint
from wanforge.exporter.checkpoint.synthetic.quantised_files import (
    NAMES,
    check_name,
    planned_file,
    quantised_paths,
    write_quantised,
    write_sparse,
)
from wanforge.progress import Progress
from wanforge.runtime.commands.options import FOLDER, MODELS, takes
from wanforge.runtime.progress import Bars


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """The options of `wanforge synth`."""

    model: str
    out: Path
    parts: tuple[str, ...]
    form: Form | None
    layout: str | None
    sparse: bool
    seed: int
    replace: bool


@click.command()
@click.option("--model", required=True, help=f"Model to write files for: {MODELS}.")
@click.option("--out", required=True, type=FOLDER, help="Folder to write into.")
@click.option(
    "--part",
    "parts",
    multiple=True,
    metavar="NAME",
    help="Write only this file: dit, dit-quant, vae, text_encoder or tokenizer; repeatable.  [default: all]",
)
@click.option("--form", type=click.Choice(get_args(Form)), help="Form of the denoiser's file.  [default: the model's]")
@click.option(
    "--layout",
    metavar="NAME",
    help="Write the denoisers as another project quantises them, instead of the published files, and without the "
    f"projections of sparse-linear attention: {', '.join(NAMES)}. Those that end in _k need --sparse, because the "
    "package gguf does not write them.",
)
@click.option("--sparse", is_flag=True, help="Write full-size files of zeros that take no disk space.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random weights.")
@click.option("--replace", is_flag=True, help="Write over files that are there already.")
@takes(SynthOptions)
def synth(options: SynthOptions) -> None:
    """Write checkpoint files in the formats that upstream publishes, with random weights.

    The files have the published names. A -quant file, which TurboDiffusion's form has, holds the weights of the file
    without -quant, quantised. With --layout, the name of the layout is added to the name of a denoiser.

    \b
    Examples:
      wanforge synth --model tiny-t2v --out checkpoint
      wanforge synth --model tiny-t2v --layout gguf-q8_0 --out checkpoint
    """
    if options.layout is not None and options.form is not None:
        raise ConfigError("give --form or --layout: a layout of another project has a form of its own")
    model = load_model(options.model)
    model = msgspec.structs.replace(model, form=options.form or model.form)
    wanted = parts_of(model, options.parts)
    with Bars() as bars:
        written = []
        if options.layout is not None:
            written = write_in_layout(model, options.layout, options, bars) if "dit" in map(plain, wanted) else []
            wanted = {part for part in wanted if not part.startswith("dit")}
        written += write_checkpoint(
            model,
            options.out,
            parts=wanted,
            sparse=options.sparse,
            seed=options.seed,
            replace=options.replace,
            progress=bars,
        )
    for path in written:
        click.echo(path)


def write_in_layout(model: ModelConfig, name: str, options: SynthOptions, progress: Progress) -> list[Path]:
    """Write the denoisers in the layout of another project.

    Raises:
        ConfigError: The layout is not known, or cannot be written with values.
        CheckpointError: There are such files already, and they are not to be replaced.
        ResourceError: The disk is too small.
    """
    check_name(name, sparse=options.sparse)
    paths = quantised_paths(model, name, options.out)
    check_free(options.out, list(paths.values()), options.replace)
    if options.sparse:
        write_sparse(model, name, paths, progress)
    else:
        check_disk(options.out, planned_file(model, name).nbytes * len(paths))
        write_quantised(model, name, paths, options.seed, progress)
    return list(paths.values())


def parts_of(model: ModelConfig, asked: tuple[str, ...]) -> set[str]:
    """The parts of a model's checkpoint that were asked for; all of them if none was.

    Raises:
        ConfigError: The model has no such part.
    """
    names = file_names(model)
    if unknown := [part for part in asked if part not in names and part not in map(family, names)]:
        raise ConfigError(f"{model.name} has no part {', '.join(unknown)}; known: {', '.join(names)}")
    return {name for name in names if not asked or name in asked or family(name) in asked}


def plain(part: str) -> str:
    """A part without its expert, and not quantised: ``dit`` of ``dit.low-quant``."""
    return family(part).removesuffix("-quant")


def family(part: str) -> str:
    """A part without its expert: ``dit`` of ``dit.high``, ``dit-quant`` of ``dit.low-quant``."""
    return part.replace(".high", "").replace(".low", "")
