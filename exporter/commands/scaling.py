"""The command that predicts how time and memory grow with the clip."""

import json
from dataclasses import dataclass
from pathlib import Path

import click

from wanforge.configs.clip import ClipShape, size_of
from wanforge.configs.model import load_model
from wanforge.configs.targets import EVERY, parse_targets
from wanforge.errors import RequestError
from wanforge.exporter.studies import scaling_report as report
from wanforge.exporter.studies.scaling import predict
from wanforge.runtime.commands.options import FILE, JSON, MODELS, TARGET_SYNTAX, Finite, takes, target_option
from wanforge.runtime.measure.page import COLOURS
from wanforge.runtime.progress import Bars
from wanforge.whole_file import check_writable, write_atomically

MOST_CLIPS = 100
"""The most clips of a report. Engines are built for each of them: for the usual fifteen and two models, this takes 17
minutes."""

MOST_LINES = COLOURS
"""The most lines of a plot, one of which is the decoder's, and the most columns that compare top-k."""


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """The options of `wanforge scaling`."""

    models: tuple[str, ...]
    resolutions: tuple[str, ...]
    frames: tuple[int, ...]
    topks: tuple[float, ...]
    targets: tuple[str, ...]
    markdown: Path | None
    as_json: bool

    def clips(self) -> list[ClipShape]:
        """The clips of every size and length, each once.

        Raises:
            RequestError: There are more clips, models or shares than a report can show.
            ConfigError: A size does not exist, or no clip can have one of the lengths.
        """
        clips = [ClipShape(*size_of(size, "16:9"), count) for size in self.resolutions for count in self.frames]
        found = list(dict.fromkeys(clips))
        for count, most, what in (
            (len(found), MOST_CLIPS, "clips (sizes times lengths)"),
            (len(self.models), MOST_LINES - 1, "models"),
            (len(self.topks), MOST_LINES, "values of top-k"),
        ):
            if count > most:
                raise RequestError(f"{count} {what} are more than one report can show; give at most {most}")
        return found


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"],
    show_default=True,
    help=f"Model to predict for: {MODELS}. Repeatable, as are the options below.",
)
@click.option(
    "--resolution",
    "resolutions",
    multiple=True,
    default=["480p", "720p", "1920x1088"],
    show_default=True,
    help="Size of the clip: a resolution such as 720p, at 16:9, or pixels such as 1920x1088.",
)
@click.option(
    "--frames",
    multiple=True,
    type=int,
    default=[81, 161, 321, 481, 961],
    show_default=True,
    help="Number of frames, 4n+1, at 16 frames per second.",
)
@click.option(
    "--topk",
    "topks",
    multiple=True,
    type=Finite(),
    default=[0.1, 0.05, 0.2, 1.0],
    show_default=True,
    help="Share of the key blocks that attention sees. Tables show the first value and compare the others with it.",
)
@target_option(default=[EVERY], show_default=True, help=f"{TARGET_SYNTAX}.")
@click.option("--markdown", type=FILE, help="Write the page (docs/scaling.md) to this file, and its plots beside it.")
@JSON
@takes(ScalingOptions)
def scaling(options: ScalingOptions) -> None:
    """Predict time and memory of clips of any length and size, on GPUs that need not be present. Nothing is run.

    Times are rooflines: the least time that the operations and bytes take at the vendors' peak speeds. Memory is what
    TensorRT-RTX's builder reports for the engines, which are built in a temporary folder; this needs the package
    tensorrt-rtx. The command takes several minutes.

    \b
    Example:
      wanforge scaling --model turbowan2.1-t2v-14b-720p --resolution 720p --frames 81 --frames 161 --target rtx5090
    """
    gpus = parse_targets(options.targets).gpus
    models = {model.name: model for model in map(load_model, options.models)}
    clips = options.clips()
    if options.markdown is not None:
        for place in (options.markdown, *map(options.markdown.with_name, (report.TIME_PLOT, report.MEMORY_PLOT))):
            check_writable(place)
    with Bars() as bars:
        found = predict(models.values(), clips, list(dict.fromkeys(options.topks)), gpus, bars)
    click.echo(json.dumps(report.as_json(found)) if options.as_json else report.text(found))
    if options.markdown is not None:
        write_atomically(options.markdown.with_name(report.TIME_PLOT), report.time_plot(found).encode())
        if found.memories:
            write_atomically(options.markdown.with_name(report.MEMORY_PLOT), report.memory_plot(found).encode())
        write_atomically(options.markdown, report.page(found).encode())
