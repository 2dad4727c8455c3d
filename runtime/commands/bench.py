"""The commands that time: requests, and the kernels of one op."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.targets import load_targets, targets_called
from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import BACKENDS, BASELINES, create_backend, missing_baselines
from wanforge.runtime.commands.generate import (
    BUNDLE,
    FILE,
    IMAGE,
    JSON,
    PROMPT,
    SEED,
    TOPK,
    clip_options,
    clip_shape,
    request_of,
    shape_options,
    verify,
)
from wanforge.runtime.measure.cost.stages import bounds
from wanforge.runtime.measure.kernels.bench import bench_ops, device_here, timer_for, workload
from wanforge.runtime.measure.kernels.cases import OPS
from wanforge.runtime.measure.kernels.machine import target_name
from wanforge.runtime.measure.kernels.report import table as op_table
from wanforge.runtime.measure.machine import Facts, fingerprint
from wanforge.runtime.measure.requests import history
from wanforge.runtime.measure.requests.report import Report, page, text
from wanforge.runtime.measure.requests.sweep import PARAMETERS, Plan, Setting, parse
from wanforge.runtime.measure.requests.timing import bench_request
from wanforge.runtime.pipeline import Pipeline, Request
from wanforge.runtime.progress import Bars
from wanforge.whole_file import write_atomically

NOT_COMPARABLE = 3
"""Exit code where no number could be compared."""


@click.command("op")
@click.argument("name", metavar="NAME", type=click.Choice([*OPS, "all"]))
@click.option(
    "--model",
    "model_name",
    default="turbowan2.1-t2v-1.3b-480p",
    show_default=True,
    help=f"Whose sizes: {', '.join(named('models'))}, or a .toml file.",
)
@shape_options
@TOPK
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Timed runs of each contender.",
)
@JSON
def bench_op(
    name: str,
    model_name: str,
    resolution: str | None,
    aspect: str | None,
    frames: int | None,
    topk: float | None,
    repeats: int,
    as_json: bool,
) -> None:
    """Time the kernels of one op beside what else could do its work, in turns, on this machine's GPU.

    NAME is w8a8_linear, layer_norm, rms_norm_rope, gated_residual, sparse_linear_attention, block (a whole layer) or
    all. First the kernels are held against their definition, at a small size: an op that is wrong gets no number, and
    the command exits with 1. Without a GPU that is all.
    """
    model, device = load_model(model_name), device_here()
    sizes = workload(model, clip_shape(model, resolution, aspect, frames), topk, device)
    with Bars() as bars:
        report = bench_ops(list(OPS) if name == "all" else [name], sizes, device, timer_for(device), repeats, bars)
    click.echo(json.dumps(report.as_json()) if as_json else op_table(report))
    if not report.passed:
        click.get_current_context().exit(1)


class BundleOrOp(click.Command):
    """A command that takes a bundle, unless its first word is ``op``: then it is `bench_op`."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == [bench_op.name]:
            return bench_op.make_context(f"{info_name} {bench_op.name}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_usage(ctx, formatter)
        formatter.write_usage(ctx.command_path, f"{bench_op.name} [OPTIONS] NAME", prefix="   or: ")


@click.command(cls=BundleOrOp)
@BUNDLE
@click.option("--prompt", default=PROMPT, help="Of the clip to time.")
@IMAGE
@SEED
@clip_options
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(list(BACKENDS)),
    default=["torch", "ort"],
    show_default=True,
    help="Side by side; torch is the reference in eager mode.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(list(BASELINES)),
    help="Beside them. compile: the reference with its layers compiled by PyTorch, where there is a compiler. "
    "diffusers: HuggingFace's transformer and VAE with these weights, where they are installed.",
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each.")
@click.option("--warm-up", type=click.IntRange(1), default=1, show_default=True, help="Runs of each before those.")
@click.option(
    "--target", "targets", multiple=True, help="A GPU to give floors and predictions for; it need not be here."
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    help=f"NAME=VALUE,VALUE with {', '.join(PARAMETERS)}: quality and cost of each value, on the last --backend; "
    "repeatable. Takes the place of timing side by side.",
)
@click.option(
    "--rates", type=click.IntRange(1), help="With --sweep: prompts on which to count what TinyWan gets right."
)
@click.option("--history", "kept", type=FILE, help="Append the result to this file of JSON lines.")
@click.option("--against", type=FILE, help="Compare with such a file, like with like.")
@click.option("--html", type=FILE, help="Write the report as one page, with plots.")
@JSON
def bench(
    bundle: Path,
    prompt: str,
    image: Path | None,
    seed: int,
    backends: tuple[str, ...],
    baselines: tuple[str, ...],
    repeats: int,
    warm_up: int,
    targets: tuple[str, ...],
    sweeps: tuple[str, ...],
    rates: int | None,
    kept: Path | None,
    against: Path | None,
    html: Path | None,
    as_json: bool,
    **clip: Any,
) -> None:
    """Time a whole request on each backend, in turns: text, steps, VAE, transfer, video file.

    Loading and the first run are apart. Beside the times: peak memory, energy where NVML has it, and for GPUs the
    floor that their peaks set. `bench op` times the kernels of one op instead, see `bench op --help`; a bundle of that
    name is ./op.

    With --against: exits with 1 on a regression, with 3 where nothing could be compared. A number is compared with the
    median of the last ten like it, and may be worse by 5 % or three times the noise.

    \b
    Examples:
      wanforge bench turbo-1.3b --frames 5 --steps 1 --target h200 --html bench.html
      wanforge bench turbo-1.3b --sweep topk=0.05,0.1,0.2 --sweep steps=1,2,3,4 --backend ort
    """
    opened = Bundle.open(bundle)
    request = request_of(opened.model, prompt, image, seed, **clip)
    past = [] if against is None else history.read(against)
    asked = [parse(each) for each in sweeps]
    missing = missing_baselines(baselines)
    contenders = [*backends, *(name for name in baselines if name not in missing)]
    with Bars() as bars:
        verify(opened, backends, bars)
        plans = [Plan(opened, request, backends[-1], *each) for each in asked]
        found = [plan.run(repeats, rates or 0, bars) for plan in plans]
        rows = [] if asked else bench_request(opened, request, contenders, repeats, warm_up, bars)
    machine = fingerprint()
    here = target_name(str(machine["gpu"]))
    setting = request, opened.recipe
    entries = {row.contender: entry_of("request", opened, setting, machine, row.contender, row.runs) for row in rows}
    for plan, sweep in zip(plans, found, strict=True):
        for point in sweep.points:
            title, setting = f"{sweep.backend}, {sweep.parameter} {point.value}", plan.values[point.value]
            entries[title] = entry_of("sweep", opened, setting, machine, sweep.backend, point.runs)
    compared = {title: history.compare(each, past) for title, each in entries.items() if against is not None}
    limits = bounds_of(opened, request, here, targets)
    report = Report(opened, request, machine, rows, limits, here, missing, found, compared)
    if kept is not None:
        history.append(kept, [*entries.values()])
    if html is not None:
        write_atomically(html, page(report).encode())
    click.echo(json.dumps(report.as_json()) if as_json else text(report))
    if against is not None:
        exit_by([each.verdict for verdicts in compared.values() for each in verdicts])


def bounds_of(bundle: Bundle, request: Request, here: str | None, targets: Sequence[str]) -> dict[str, Any]:
    """Floors and predictions for the GPU that is here and those that are asked for.

    Raises:
        ConfigError: there is no such GPU.
    """
    gpus = targets_called([*([here] if here else []), *targets], load_targets())
    job = Pipeline(bundle, create_backend("torch", bundle)).job(request)
    return {name: bounds(bundle, job, gpu) for name, gpu in gpus.items()}


def entry_of(
    what: str,
    bundle: Bundle,
    setting: Setting,
    machine: Facts,
    contender: str,
    runs: Sequence[Mapping[str, float]],
) -> history.Entry:
    """Timed requests as the history keeps them: like others that were timed for the same purpose, at the same setting.

    Args:
        what: the purpose, ``request`` or ``sweep``.
    """
    request, recipe = setting
    subject = {
        "what": what,
        "model": bundle.model.name,
        "recipe": history.digest(recipe),
        "clip": [request.shape.width_px, request.shape.height_px, request.shape.frames],
        "steps": request.steps,
        "topk": request.topk,
        "prompt": history.digest(request.prompt),
        "contender": contender,
    }
    if request.sigma_max is not None:
        subject["sigma_max"] = request.sigma_max
    return history.entry(machine, subject, {stage: [run[stage] for run in runs] for stage in runs[0]})


def exit_by(verdicts: Sequence[str]) -> None:
    """1 on a regression, 3 where nothing could be compared."""
    if "regression" in verdicts:
        click.get_current_context().exit(1)
    if all(verdict == "not comparable" for verdict in verdicts):
        click.get_current_context().exit(NOT_COMPARABLE)
