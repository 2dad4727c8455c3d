"""The command that compiles a bundle's graphs into engines."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import click

from wanforge.configs.clip import ClipShape
from wanforge.configs.targets import TargetList, architecture_name, parse_targets
from wanforge.engines.build import EngineOptions, EngineResult, build_engines, graphs_to_build
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, WanforgeError
from wanforge.plugins.tensorrt.library import group_by_flavour, open_library
from wanforge.progress import Overall
from wanforge.runtime.commands.options import (
    BUNDLE,
    DRY_RUN,
    JSON,
    SHAPE,
    STALE_OK,
    TARGET_SYNTAX,
    ShapeOptions,
    refuse_unused,
    takes,
    target_option,
)
from wanforge.runtime.lora.option import LORA_RANK
from wanforge.runtime.measure.cost.memory import MemoryReport, memory_report, table
from wanforge.runtime.measure.dry_run import build_work, estimate_build
from wanforge.runtime.measure.durations import remember
from wanforge.runtime.measure.estimates import show
from wanforge.runtime.progress import Bars

log = logging.getLogger(__name__)

FIRST_BF16_SM = 80


@dataclass(frozen=True, kw_only=True)
class BuildOptions(ShapeOptions):
    """The options of `wanforge build`."""

    bundle: Path
    targets: tuple[str, ...]
    smaller: bool
    only: tuple[str, ...]
    no_plugins: bool
    block_plugin: bool
    kernels: bool
    lora_rank: int | None
    plan: bool
    dry_run: bool
    stale_ok: bool
    as_json: bool

    def engines(self, clip: ClipShape, sms: tuple[int, ...]) -> EngineOptions:
        """The options for building engines that each serve all of some architectures."""
        settings = not self.no_plugins, self.kernels, self.smaller, self.lora_rank, self.block_plugin
        return EngineOptions(clip, sms, self.only, *settings)


@dataclass
class Outcome:
    """The result of a build.

    Attributes:
        failures: What could not be built or planned, and why.
    """

    engines: list[EngineResult] = field(default_factory=list)
    plans: list[MemoryReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@click.command()
@BUNDLE
@target_option(required=True, help=f"{TARGET_SYNTAX}. One engine serves all targets that TensorRT-RTX can compile for.")
@SHAPE
@click.option(
    "--smaller", is_flag=True, help="Make engines that also serve smaller and shorter clips, at some cost in speed."
)
@click.option(
    "--graph",
    "only",
    multiple=True,
    metavar="NAME",
    help="Build only this graph; repeatable. `wanforge inspect` lists the names.",
)
@click.option(
    "--no-plugins",
    is_flag=True,
    help="Compile the ONNX bodies of the ops instead of using plugins, for comparison. Such engines are far slower.",
)
@click.option("--block-plugin", is_flag=True, help="Make a whole block one plugin, with the launches of backend cuda.")
@click.option(
    "--kernels", is_flag=True, help="Also compile the kernels that the plugins launch, and put them into the cache."
)
@LORA_RANK
@click.option("--plan", is_flag=True, help="Afterwards, show how much memory a clip takes on each GPU.")
@STALE_OK
@DRY_RUN
@JSON
@takes(BuildOptions)
def build(options: BuildOptions) -> None:
    """Compile a bundle's bf16 graphs into engines, for GPUs that need not be in this machine.

    An engine is made for one size and length of clip (with --smaller, for all clips up to that size and length) and
    serves every prompt and top-k. An existing engine is kept unless something that it was made from has changed.
    Engines for data-centre GPUs from sm_90 on need TensorRT and a GPU of that kind; if either is missing, everything
    else is still built, and the exit code is 1.

    \b
    Example:
      wanforge build turbo-1.3b --target rtx5090,rtx4090
    """
    if options.dry_run:
        refuse_unused(["plan"], "with --dry-run")
    if options.no_plugins:
        refuse_unused(["block_plugin"], "with --no-plugins")
    targets = check_bf16(parse_targets(options.targets))
    bundle, start = Bundle.open(options.bundle, stale_ok=options.stale_ok), perf_counter()
    onnx = graphs_to_build(bundle, options.only, options.lora_rank, block_plugin=options.block_plugin)
    clip, outcome = options.shape(bundle.model), Outcome()
    groups = [(flavour, options.engines(clip, sms)) for flavour, sms in group_by_flavour(targets.sms)]
    if options.dry_run:
        show(estimate_build(bundle, groups), as_json=options.as_json)
        return
    overall = Overall({graph.name: bundle.manifest.files[name].bytes for name, graph in onnx.items()}, len(groups))

    def done(engine: EngineResult) -> None:
        outcome.engines.append(engine)
        show_engine(engine, bars, overall, as_line=not options.as_json)

    with Bars(overall) as bars:
        for flavour, wanted in groups:
            try:
                engines = build_engines(bundle, open_library(flavour), wanted, progress=bars, done=done)
                if built := [engine.seconds for engine in engines if not engine.is_cached]:
                    remember(build_work(bundle, flavour, wanted, len(built)), sum(built))
            except WanforgeError as error:
                outcome.failures.append(f"{', '.join(map(architecture_name, wanted.sms))}: {error}")
            overall.end_round()
    if options.plan:
        add_plans(outcome, bundle, clip, targets)
    outcome.seconds = perf_counter() - start
    click.echo(json.dumps(as_json(outcome)) if options.as_json else text(outcome, bundle))
    for engine in outcome.engines:
        for fault in engine.faults:
            log.warning("%s: %s", engine.name, fault, extra={"engine": engine.name})
    if outcome.failures:
        raise WanforgeError("\n".join(outcome.failures))


def check_bf16(targets: TargetList) -> TargetList:
    """Refuse GPUs that cannot compute in bfloat16, as engines do.

    Raises:
        ConfigError: One of the GPUs cannot.
    """
    if old := [sm for sm in targets.sms if sm < FIRST_BF16_SM]:
        raise ConfigError(
            f"{architecture_name(old[0])} has no bfloat16, in which engines compute; "
            f"{architecture_name(FIRST_BF16_SM)} is the first architecture that has it"
        )
    return targets


def show_engine(engine: EngineResult, bars: Bars, overall: Overall, *, as_line: bool) -> None:
    """Print a line for an engine, unless JSON is wanted."""
    bars.close()
    if engine.is_cached:
        overall.skip(engine.graph)
    if as_line:
        click.echo(line(engine))


def add_plans(outcome: Outcome, bundle: Bundle, clip: ClipShape, targets: TargetList) -> None:
    """Plan the memory of a clip on each GPU that has engines."""
    built = {sm for engine in outcome.engines for sm in engine.sms}
    for name, gpu in ((name, gpu) for name, gpu in targets.gpus.items() if gpu.sm in built):
        try:
            outcome.plans.append(memory_report(bundle, clip, name, gpu))
        except WanforgeError as error:
            outcome.failures.append(f"no memory plan for {name}: {error}")


def as_json(outcome: Outcome) -> dict[str, object]:
    """The result as JSON values, in bytes and seconds."""
    return {
        "engines": [asdict(engine) for engine in outcome.engines],
        "plans": [plan.as_json() for plan in outcome.plans],
        "failures": outcome.failures,
        "seconds": outcome.seconds,
    }


def text(outcome: Outcome, bundle: Bundle) -> str:
    """The text that is printed after the lines of the engines."""
    engines = outcome.engines
    size, built = sum(engine.bytes for engine in engines), sum(not engine.is_cached for engine in engines)
    summary = (
        f"{bundle.root}: {built} built, {len(engines) - built} up to date, {size / 1e6:.2f} MB, {outcome.seconds:.1f} s"
    )
    return "\n".join([summary, *([table(outcome.plans)] if outcome.plans else [])])


def line(engine: EngineResult) -> str:
    """One engine as a line of a table."""
    if engine.is_cached:
        return f"  {engine.graph:18} up to date"
    fused = f"{engine.layers} layers" + (f", {engine.plugins} plugins" if engine.plugins else "")
    fused += f", {engine.kernels} kernels" if engine.kernels else ""
    return (
        f"  {engine.graph:18} {engine.seconds:5.2f} s  {engine.bytes / 1e6:6.2f} MB  "
        f"{engine.activation_bytes / 1e6:8.1f} MB activations  {fused}"
    )
