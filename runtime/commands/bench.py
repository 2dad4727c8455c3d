"""The commands that time whole requests and the kernels of one op."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from wanforge.configs.model import load_model
from wanforge.configs.targets import Target, load_targets, parse_targets
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import AUTO, create_backend
from wanforge.runtime.backends.choice import resolve_backend
from wanforge.runtime.commands.options import (
    BUNDLE,
    CLIP,
    FILE,
    IMAGE,
    JSON,
    MODELS,
    SEED,
    SHAPE,
    STALE_OK,
    TARGET_SYNTAX,
    TOPK,
    RequestOptions,
    ShapeOptions,
    backend_option,
    refuse_unused,
    takes,
    target_option,
)
from wanforge.runtime.measure.baselines import BASELINES, missing_baselines
from wanforge.runtime.measure.cost.stages import StageCost, costs_on
from wanforge.runtime.measure.kernels.bench import bench_ops, timer_for, workload
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.report import table
from wanforge.runtime.measure.machine import Facts, device_here, fingerprint, target_name
from wanforge.runtime.measure.requests import history
from wanforge.runtime.measure.requests.report import RequestReport, page, text
from wanforge.runtime.measure.requests.sweep import PARAMETERS, PlannedSweep, Setting, Sweep, parse
from wanforge.runtime.measure.requests.timing import Row, bench_request
from wanforge.runtime.pipeline import Pipeline, verify_files
from wanforge.runtime.progress import Bars
from wanforge.runtime.request import Request
from wanforge.whole_file import check_appendable, check_writable, write_atomically

NOT_COMPARABLE = 3
"""Exit code when no number could be compared."""


class BenchGroup(click.Group):
    """A group whose command `request` need not be named: `wanforge bench BUNDLE` is `wanforge bench request BUNDLE`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        named = args if args[0] in self.commands else ["request", *args]
        return super().resolve_command(ctx, named)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Options before the bundle belong to `request`.
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["request", *args]
        return super().parse_args(ctx, args)


@click.group(cls=BenchGroup)
def bench() -> None:
    """Time whole requests, or the kernels of one op, on this machine.

    \b
    wanforge bench BUNDLE      time whole requests (short for wanforge bench request BUNDLE)
    wanforge bench op NAME     time the kernels of one op, or of all ops

    `wanforge bench request --help` lists the options for timing requests. If your bundle is called op or request,
    write ./op or ./request.
    """


@dataclass(frozen=True, kw_only=True)
class OpOptions(ShapeOptions):
    """The options of `wanforge bench op`."""

    name: str
    model: str
    topk: float | None
    repeats: int
    as_json: bool


@bench.command("op", short_help="Time the kernels of one op, or of all ops, on this machine's GPU.")
@click.argument("name", metavar="NAME", type=click.Choice([*OPS, "all"]))
@click.option(
    "--model",
    default="turbowan2.1-t2v-1.3b-480p",
    show_default=True,
    help=f"Model that gives the tensor sizes: {MODELS}.",
)
@SHAPE
@TOPK
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Number of timed runs of each implementation.",
)
@JSON
@takes(OpOptions)
def bench_op(options: OpOptions) -> None:
    """Time the kernels of one op against other implementations of it, in turns, on this machine's GPU.

    NAME is w8a8_linear, layer_norm, rms_norm_rope, gated_residual, dense_attention, recall (keys and values that a
    stream keeps), channel_norm (between the convolutions of the VAE), int8_convolution (of recipes with vae = "int8"),
    sparse_linear_attention, block (a whole layer) or all. The kernels are first compared with their definition, at a
    small size and at the size that is timed. An op with wrong results is not timed, and the command exits with 1.
    Without a GPU, nothing is timed, and only the small size is compared.

    \b
    Example:
      wanforge bench op sparse_linear_attention --model turbowan2.1-t2v-14b-720p
    """
    model, device = load_model(options.model), device_here()
    sizes = workload(model, options.shape(model), options.topk, device)
    names = list(OPS) if options.name == "all" else [options.name]
    with Bars() as bars:
        report = bench_ops(names, sizes, device, timer_for(device), options.repeats, bars)
    click.echo(json.dumps(report.as_json()) if options.as_json else table(report))
    if not report.passed:
        click.get_current_context().exit(1)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RequestOptions):
    """The options of `wanforge bench request`."""

    bundle: Path
    backends: tuple[str, ...]
    baselines: tuple[str, ...]
    repeats: int
    warm_up: int
    targets: tuple[str, ...]
    sweeps: tuple[str, ...]
    rates: int | None
    history: Path | None
    against: Path | None
    html: Path | None
    stale_ok: bool
    as_json: bool

    def check_places(self) -> None:
        """Check that every file that is to be written can be."""
        if self.history is not None:
            check_appendable(self.history)
        if self.html is not None:
            check_writable(self.html)


@bench.command("request", short_help="Time a whole request on each backend.")
@BUNDLE
@click.option("--prompt", help="Prompt of the clip to time.  [default: the model's example]")
@IMAGE
@SEED
@CLIP
@backend_option(
    "--backend",
    "backends",
    multiple=True,
    default=[AUTO],
    help="Backend to time; repeatable. auto is the fastest that can run here, torch the reference in eager mode.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(list(BASELINES)),
    help="Baseline to compare with; repeatable. compile: the reference with its layers compiled by PyTorch, if a "
    "compiler is available. diffusers: Hugging Face's transformer and VAE with the bundle's weights, if diffusers is "
    "installed.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of timed runs on each backend and baseline.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of untimed runs on each backend and baseline before the timed ones.",
)
@target_option(
    help="Also report the roofline and the predicted time for these GPUs, which need not be in this machine. "
    f"{TARGET_SYNTAX}."
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="NAME=VALUE,…",
    help="Instead of comparing backends, measure quality and cost at each value of one parameter, on the last "
    f"--backend; repeatable. The parameter is one of {', '.join(PARAMETERS)}.",
)
@click.option(
    "--rates",
    type=click.IntRange(1),
    help="With --sweep, count on this number of prompts how often TinyWan shows what is asked for.",
)
@click.option("--history", type=FILE, help="Append the result to this JSON Lines file.")
@click.option(
    "--against",
    type=FILE,
    help="Compare the result with earlier results of the same kind in this file, which --history wrote.",
)
@click.option("--html", type=FILE, help="Write the report, with plots, to this HTML file.")
@STALE_OK
@JSON
@takes(BenchOptions)
def bench_requests(options: BenchOptions) -> None:
    """Time a whole request on each backend: text, steps, VAE, transfer and video file.

    By default that is the backend that `wanforge generate` would use. Several backends take turns. Loading and the
    first run are listed separately. The report also has the peak memory, the energy where NVML reports it, and for
    GPUs the roofline, which is the least time that their peak speeds allow.

    With --against, the command exits with 1 on a regression and with 3 if nothing could be compared. Each number is
    compared with the median of the last ten comparable results, and may be worse by 5 %, by 50 microseconds or by
    three times the noise, whichever is most.

    \b
    Examples:
      wanforge bench turbo-1.3b --frames 5 --steps 1 --target h200 --html bench.html
      wanforge bench turbo-1.3b --sweep topk=0.05,0.1,0.2 --sweep steps=1,2,3,4 --backend ort
    """
    if options.sweeps:
        refuse_unused(("baselines", "warm_up"), "with --sweep, which times one backend")
    else:
        refuse_unused(("rates",), "without --sweep")
    bundle = Bundle.open(options.bundle, stale_ok=options.stale_ok)
    request, machine = options.request(bundle.model), fingerprint()
    here = target_name(str(machine["gpu"]))
    gpus = targets_of(options.targets, here)
    past = [] if options.against is None else history.read(options.against)
    asked = [parse(each) for each in options.sweeps]
    missing = missing_baselines(options.baselines)
    options.check_places()
    backends = list(dict.fromkeys(resolve_backend(name, bundle, [request.shape]) for name in options.backends))
    contenders = [*backends, *(name for name in options.baselines if name not in missing)]
    with Bars() as bars:
        verify_files(bundle, backends, bars)
        plans = [PlannedSweep(bundle, request, backends[-1], *each) for each in asked]
        sweeps = [plan.run(options.repeats, options.rates or 0, bars) for plan in plans]
        rows = [] if asked else bench_request(bundle, request, contenders, options.repeats, options.warm_up, bars)
    entries = entries_of(bundle, request, machine, rows) | sweep_entries(bundle, machine, plans, sweeps)
    compared = {title: history.compare(each, past) for title, each in entries.items() if options.against is not None}
    costs = rooflines(bundle, request, gpus)
    report = RequestReport(bundle, request, machine, rows, costs, here, missing, sweeps, compared)
    click.echo(json.dumps(report.as_json()) if options.as_json else text(report))
    if options.history is not None:
        history.append(options.history, [*entries.values()])
    if options.html is not None:
        write_atomically(options.html, page(report).encode())
    if options.against is not None:
        exit_by([each.verdict for trends in compared.values() for each in trends])


def targets_of(asked: Sequence[str], here: str | None) -> dict[str, Target]:
    """The GPU of this machine, if it is a known one, and the GPUs that are asked for.

    Raises:
        ConfigError: A GPU that is asked for is not known.
    """
    known = {} if here is None else {here: load_targets()[here]}
    return {**known, **(parse_targets(asked).gpus if asked else {})}


def rooflines(bundle: Bundle, request: Request, gpus: Mapping[str, Target]) -> dict[str, dict[str, StageCost]]:
    """The roofline and the predicted time of each stage of a request on some GPUs."""
    if not gpus:
        return {}
    checked = Pipeline(bundle, create_backend("torch", bundle)).resolve(request)
    return {name: costs_on(bundle, checked, gpu) for name, gpu in gpus.items()}


def entries_of(bundle: Bundle, request: Request, machine: Facts, rows: Sequence[Row]) -> dict[str, history.Entry]:
    """The history entries of timed requests, by contender."""
    setting = request, bundle.recipe
    return {
        row.contender: history.entry(machine, subject("request", bundle, setting, row.contender), by_stage(row.runs))
        for row in rows
    }


def sweep_entries(
    bundle: Bundle, machine: Facts, plans: Sequence[PlannedSweep], sweeps: Sequence[Sweep]
) -> dict[str, history.Entry]:
    """The history entries of every value of some sweeps, by title."""
    entries = {}
    for plan, sweep in zip(plans, sweeps, strict=True):
        for point in sweep.points:
            title, setting = f"{sweep.backend}, {sweep.parameter} {point.value}", plan.values[point.value]
            about = subject("sweep", bundle, setting, sweep.backend)
            entries[title] = history.entry(machine, about, by_stage(point.runs))
    return entries


def by_stage(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The seconds of every run, by stage."""
    return {stage: [run[stage] for run in runs] for stage in runs[0]}


def subject(purpose: str, bundle: Bundle, setting: Setting, contender: str) -> dict[str, object]:
    """A description of what was timed, so that the history compares it only with the same thing.

    Args:
        purpose: ``request`` or ``sweep``.
    """
    request, recipe = setting
    found: dict[str, object] = {
        "what": purpose,
        "model": bundle.model.name,
        "recipe": history.digest(recipe),
        "clip": [request.shape.width_px, request.shape.height_px, request.shape.frames],
        "steps": request.steps,
        "topk": request.topk,
        "prompt": history.digest(request.prompt),
        "contender": contender,
    }
    return found if request.sigma_max is None else {**found, "sigma_max": request.sigma_max}


def exit_by(verdicts: Sequence[str]) -> None:
    """Exit with 1 on a regression, and with 3 if nothing could be compared."""
    if "regression" in verdicts:
        click.get_current_context().exit(1)
    if all(verdict == "not comparable" for verdict in verdicts):
        click.get_current_context().exit(NOT_COMPARABLE)
