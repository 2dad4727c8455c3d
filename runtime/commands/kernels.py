"""The command that compiles kernels ahead of time and lists the resources they take."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import parse_targets
from wanforge.plugins.launching.compiler import compile_kernels, outdated
from wanforge.plugins.launching.cubins import MANIFEST, Cubin, cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.occupancy import faults
from wanforge.runtime.backends.cuda import launches
from wanforge.runtime.commands.options import (
    FOLDER,
    JSON,
    MODELS,
    RECIPES,
    SHAPE,
    TARGET_SYNTAX,
    ShapeOptions,
    takes,
    target_option,
)
from wanforge.runtime.measure.kernels.launch_times import LaunchTime, block_times, times_table
from wanforge.runtime.measure.kernels.resources import as_dict, summary, table
from wanforge.runtime.progress import Bars
from wanforge.whole_file import check_writable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KernelsOptions(ShapeOptions):
    """The options of `wanforge kernels`."""

    targets: tuple[str, ...]
    models: tuple[str, ...] = ()
    recipe: str = "w8a8"
    out: Path | None = None
    jobs: int | None = None
    as_json: bool = False
    as_markdown: bool = False
    times: bool = False

    def launches(self) -> list[Launch]:
        """Every launch of the models' denoisers and decoders on the targets."""
        recipe = load_recipe(self.recipe)
        models = [load_model(name) for name in self.models or named("models")]
        pairs = [(model, self.shape(model)) for model in models]
        sms = parse_targets(self.targets).sms
        return [launch for sm in sms for model, shape in pairs for launch in launches(model, recipe, sm, shape)]

    def block_times(self, folder: Path, cubins: Iterable[Cubin]) -> list[LaunchTime]:
        """What each launch of a block of the models is predicted to take on each GPU."""
        models = [load_model(name) for name in self.models or named("models")]
        blocks = [(model, self.shape(model)) for model in models]
        return block_times(blocks, load_recipe(self.recipe), parse_targets(self.targets).gpus.values(), folder, cubins)


@click.command()
@target_option(required=True, help=f"{TARGET_SYNTAX}.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help=f"Model whose tensor shapes to compile for; repeatable: {MODELS}.  [default: all]",
)
@click.option("--recipe", default="w8a8", show_default=True, help=f"Recipe, which sets the number formats: {RECIPES}.")
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for the compiled kernels (cubins) and their manifest.  "
    "[default: the cache, which is searched at run time]",
)
@SHAPE
@click.option(
    "--jobs", type=click.IntRange(1), help="Number of compilers to run at a time.  [default: one per processor]"
)
@click.option("--times", is_flag=True, help="Also predict how long each launch of a block takes on each GPU.")
@JSON
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the result as two short Markdown tables.")
@takes(KernelsOptions)
def kernels(options: KernelsOptions) -> None:
    """Compile the kernels of a model's denoiser and decoder, for GPUs that need not be in this machine.

    A kernel that is already compiled is kept unless its source or Triton has changed. On the machine that runs the
    kernels, set WANFORGE_KERNELS to the folder that --out wrote. Clips with half or twice as many tokens need kernels
    of their own; give --resolution and --frames to compile them.

    \b
    Example:
      wanforge kernels --target rtx5090,h100 --model turbowan2.1-t2v-1.3b-480p --out kernels
    """
    if options.as_json and options.as_markdown:
        raise click.UsageError("give either --json or --markdown")
    folder, wanted = options.out or cache_folder(), options.launches()
    missing = len(outdated(wanted, folder))
    if missing:
        check_writable(folder / MANIFEST)
    with Bars() as bars:
        cubins = compile_kernels(wanted, folder, options.jobs, bars)
    times = options.block_times(folder, cubins) if options.times else []
    if options.as_json:
        report = {"folder": str(folder), "compiled": missing, "cubins": [as_dict(cubin) for cubin in cubins]}
        click.echo(json.dumps(report | ({"launches": [time.as_json() for time in times]} if options.times else {})))
    elif options.as_markdown:
        click.echo(summary(cubins))
    else:
        click.echo(table(cubins))
        if times:
            click.echo(times_table(times))
        click.echo(f"{missing} compiled, {len(cubins) - missing} from the cache, {folder}")
    for cubin in cubins:
        for fault in faults(cubin):
            log.warning(
                "%s for sm_%s %s", cubin.kernel, cubin.sm, fault, extra={"kernel": cubin.kernel, "sm": cubin.sm}
            )
