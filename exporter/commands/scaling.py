"""The command that predicts how time and memory grow."""

import json
from pathlib import Path

import click

from wanforge.configs.clip import ClipShape, size_of
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.targets import load_targets, targets_called
from wanforge.exporter.studies.scaling import predict
from wanforge.exporter.studies.scaling_report import MEMORY_PLOT, TIME_PLOT, memory_plot, page, text, time_plot
from wanforge.exporter.studies.scaling_report import as_json as plain
from wanforge.runtime.commands.generate import FILE, JSON
from wanforge.runtime.progress import Bars
from wanforge.whole_file import write_atomically


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"],
    show_default=True,
    help=f"{', '.join(named('models'))}, or a .toml file; repeatable, as are the options below.",
)
@click.option(
    "--resolution",
    "resolutions",
    multiple=True,
    default=["480p", "720p", "1920x1088"],
    show_default=True,
    help="At 16:9, or in pixels.",
)
@click.option(
    "--frames",
    multiple=True,
    type=int,
    default=[81, 161, 321, 481, 961],
    show_default=True,
    help="4n+1; 16 a second.",
)
@click.option(
    "--topk",
    "topks",
    multiple=True,
    type=float,
    default=[0.1, 0.05, 0.2, 1.0],
    show_default=True,
    help="Shares of key blocks. The tables are of the first, the others stand beside it.",
)
@click.option("--target", "targets", multiple=True, help="GPUs; all that are known by default.")
@click.option("--markdown", type=FILE, help="Write the page docs/scaling.md, and its plots beside it.")
@JSON
def scaling(
    models: tuple[str, ...],
    resolutions: tuple[str, ...],
    frames: tuple[int, ...],
    topks: tuple[float, ...],
    targets: tuple[str, ...],
    markdown: Path | None,
    as_json: bool,
) -> None:
    """Predict time and memory of clips of any length and size, on GPUs that need not be here. Nothing runs.

    Times are floors, from operations and bytes at the vendors' peaks; memory is what TensorRT-RTX's builder says of
    the engines, which are built in a temporary folder, and needs that package. Takes some minutes.

    \b
    Example:
      wanforge scaling --model turbowan2.1-t2v-14b-720p --resolution 720p --frames 81 --frames 161 --target rtx5090
    """
    known = load_targets()
    wanted = targets_called(targets or known, known)
    clips = [ClipShape(*size_of(resolution, "16:9"), count) for resolution in resolutions for count in frames]
    with Bars() as bars:
        found = predict([load_model(name) for name in models], clips, topks, wanted, bars)
    if markdown is not None:
        write_atomically(markdown.with_name(TIME_PLOT), time_plot(found).encode())
        if found.rooms:
            write_atomically(markdown.with_name(MEMORY_PLOT), memory_plot(found).encode())
        write_atomically(markdown, page(found).encode())
    click.echo(json.dumps(plain(found)) if as_json else text(found))
