"""The command that exports a bundle for Triton Inference Server."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import click

from wanforge.engines.bundle.bundle import Bundle
from wanforge.exporter.inference_server.configuration import ModelSetup, Placement
from wanforge.exporter.inference_server.repository import VERSION, write_repository
from wanforge.runtime.commands.options import BACKEND, BUNDLE, FOLDER, JSON, MEMORY, takes
from wanforge.runtime.inference_server.clip_model import ClipModel
from wanforge.runtime.inference_server.front_model import FrontModel
from wanforge.runtime.inference_server.stage_models import DenoiserModel, TextModel, VaeModel
from wanforge.runtime.inference_server.tensors import clip_tensors, stage_tensors
from wanforge.runtime.progress import Bars
from wanforge.version import __version__

STAGES = {"text": TextModel, "denoiser": DenoiserModel, "vae": VaeModel}
UNDER_WAY = 4
"""The number of requests that are under way at once where stages are apart: one for each, and one that waits."""


@dataclass(frozen=True, kw_only=True)
class ExportTritonOptions:
    """The options of `wanforge export-triton`."""

    bundle: Path
    out: Path
    name: str | None
    devices: str
    link: bool
    stages: str
    backend: str
    memory: float | None
    as_json: bool


@click.command()
@BUNDLE
@click.option("--out", type=FOLDER, required=True, help="Folder of the model repository to write.")
@click.option("--name", help="Name of the model.  [default: wanforge_t2v or wanforge_i2v]")
@click.option(
    "--devices",
    default="auto",
    show_default=True,
    help="Where the model runs, one instance on each: gpu for every GPU of the server, numbers of GPUs such as 0,1, "
    "cpu, or auto for every GPU if there is one.",
)
@click.option(
    "--link",
    is_flag=True,
    help="Leave the bundle where it is, and write its absolute path, instead of putting it into the repository.",
)
@click.option(
    "--stages",
    type=click.Choice(["together", "apart"]),
    default="together",
    show_default=True,
    help="Make a clip in one process; or apart, with a model each for the text encoder, the denoiser and the VAE, and "
    "one in front that asks them, so that each can have GPUs of its own.",
)
@BACKEND
@MEMORY
@JSON
@takes(ExportTritonOptions)
def export_triton(options: ExportTritonOptions) -> None:
    """Write a model repository with which Triton Inference Server serves a bundle.

    Triton's Python backend makes the clips with wanforge, which must be installed in the image of the server. Files of
    the bundle get a second name in the repository if both are on the same disk, and are copied otherwise, so that the
    repository can be moved. An older export in the same folder is replaced, unless it was edited.

    \b
    Example:
      wanforge export-triton turbo-1.3b --out repository
    """
    bundle = Bundle.open(options.bundle)
    models = [whole_model(options, bundle)] if options.stages == "together" else models_of_stages(options, bundle)
    with Bars() as bars:
        write_repository(options.out, models, None if options.link else bundle, bars)
    names = [model.name for model in models]
    if options.as_json:
        click.echo(json.dumps({"out": str(options.out), "models": names}))
        return
    click.echo(
        f"{options.out}: {', '.join(names)}; next, where Triton and wanforge are installed: "
        f"tritonserver --model-repository {shlex.quote(str(options.out.absolute()))}"
    )


def whole_model(options: ExportTritonOptions, bundle: Bundle) -> ModelSetup:
    """The model that makes whole clips."""
    return ModelSetup(
        options.name or f"wanforge_{bundle.model.task}",
        ClipModel,
        clip_tensors(bundle.model),
        Placement.parse(options.devices),
        parameters_for(options, "bundle"),
    )


def models_of_stages(options: ExportTritonOptions, bundle: Bundle) -> list[ModelSetup]:
    """The model in front, and those of the stages, which use its bundle."""
    whole = whole_model(options, bundle)
    front = replace(
        whole,
        code=FrontModel,
        placement=Placement("KIND_CPU", count=UNDER_WAY),
        parameters={**whole.parameters, "stages": whole.name},
    )
    stages = [
        replace(
            whole,
            name=f"{whole.name}_{stage}",
            code=code,
            tensors=stage_tensors(bundle.model, stage),
            parameters=parameters_for(options, f"../../{whole.name}/{VERSION}/bundle"),
        )
        for stage, code in STAGES.items()
    ]
    return [front, *stages]


def parameters_for(options: ExportTritonOptions, place: str) -> dict[str, str]:
    """The parameters of a model that opens the bundle.

    Args:
        place: Where the bundle is, relative to the folder with ``model.py``, if it is in the repository.
    """
    found = {"bundle": str(options.bundle.resolve()) if options.link else place, "backend": options.backend}
    if options.memory is not None:
        found["memory_gb"] = f"{options.memory:g}"
    return {**found, "wanforge": __version__}
