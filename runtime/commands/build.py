"""The command that compiles a bundle's graphs into engines."""

import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import click
import torch

from wanforge.configs.clip import ClipShape
from wanforge.configs.targets import load_targets, targets_called
from wanforge.engines.build import Engine, build_engines
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ConfigError, ResourceError, WanforgeError
from wanforge.plugins.tensorrt.library import RTX, TENSORRT, Flavour, flavour_for, open_library
from wanforge.runtime.commands.generate import clip_shape, shape_options
from wanforge.runtime.graphs import graphs
from wanforge.runtime.measure.cost.memory import gpus_of, report, table
from wanforge.runtime.progress import Bars

FIRST_BF16_SM = 80


@click.command()
@click.argument("bundle", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target",
    "targets",
    required=True,
    help="GPUs by name or architecture, with commas between: rtx5090,rtx4090,sm_86. One engine serves all of "
    "TensorRT-RTX's.",
)
@shape_options
@click.option("--smaller", is_flag=True, help="Serve smaller and shorter clips with the same engines, if less well.")
@click.option("--graph", "only", multiple=True, help="Only this graph, as inspect names it; repeatable.")
@click.option("--no-plugins", is_flag=True, help="Compile the ops' ONNX bodies instead, for comparison: far slower.")
@click.option("--kernels", is_flag=True, help="Compile what the plugins launch, too, into the cache of kernels.")
@click.option("--plan", "show_plan", is_flag=True, help="Then show what a clip takes of each GPU's memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    bundle: Path,
    targets: str,
    resolution: str | None,
    aspect: str | None,
    frames: int | None,
    smaller: bool,
    only: tuple[str, ...],
    no_plugins: bool,
    kernels: bool,
    show_plan: bool,
    as_json: bool,
) -> None:
    """Compile a bundle's bf16 graphs into engines, for GPUs that need not be here.

    An engine is made for one size and length of clip, or with --smaller for those up to it, and for every prompt and
    top-k. What is built already is taken as it is, unless something it was made from has changed. Data-centre GPUs
    from sm_90 on take TensorRT and a GPU of that kind; where that is missing everything else is still built, and the
    exit code is 1.

    \b
    Example:
      wanforge build turbo-1.3b --target rtx5090,rtx4090
    """
    sms = sms_of(targets)
    gpus = gpus_of(targets) if show_plan else {}
    opened = Bundle.open(bundle)
    known = list(graphs(opened.model, opened.recipe))
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no graph is called {unknown[0]!r}; known: {', '.join(known)}")
    clip = clip_shape(opened.model, resolution, aspect, frames)
    engines: list[Engine] = []
    failures: list[str] = []
    start = perf_counter()
    for flavour, group in groups(sms):
        try:
            build_group(
                engines,
                opened,
                clip,
                flavour,
                group,
                only,
                smaller,
                plugins=not no_plugins,
                kernels=kernels,
                show=not as_json,
            )
        except WanforgeError as error:
            failures.append(f"{', '.join(f'sm_{sm}' for sm in group)}: {error}")
    plans = []
    for name, gpu in gpus.items():
        try:
            plans.append(report(opened, clip, name, gpu))
        except WanforgeError as error:
            failures.append(f"no plan for {name}: {error}")
    if as_json:
        made = {"engines": [asdict(engine) for engine in engines], "plans": [plan.as_json() for plan in plans]}
        click.echo(json.dumps({**made, "failures": failures, "seconds": perf_counter() - start}))
    elif engines:
        size, built = sum(engine.bytes for engine in engines), sum(not engine.is_cached for engine in engines)
        click.echo(
            f"{bundle}: {built} built, {len(engines) - built} up to date, {size / 1e6:.2f} MB, "
            f"{perf_counter() - start:.1f} s"
        )
    if plans and not as_json:
        click.echo(table(plans))
    for engine in engines:
        for fault in engine.faults:
            click.echo(f"WARNING: {engine.name}: {fault}", err=True)
    if failures:
        raise click.ClickException("\n".join(failures))


def build_group(
    engines: list[Engine],
    bundle: Bundle,
    clip: ClipShape,
    flavour: Flavour,
    sms: tuple[int, ...],
    only: tuple[str, ...],
    smaller: bool,
    *,
    plugins: bool,
    kernels: bool,
    show: bool,
) -> None:
    """Build for architectures that one engine can serve, with a line for each graph.

    Args:
        engines: takes each as soon as it is there.
    """
    library = open_library(flavour)
    if flavour is TENSORRT:
        check_gpu(sms)
    with Bars(quiet=not show) as bars:

        def show_line(engine: Engine) -> None:
            engines.append(engine)
            bars.close()
            if show:
                click.echo(line(engine))

        build_engines(
            bundle,
            clip,
            library,
            sms,
            only=only,
            plugins=plugins,
            kernels=kernels,
            smaller=smaller,
            progress=bars,
            done=show_line,
        )


def line(engine: Engine) -> str:
    """One engine as a line of a table."""
    if engine.is_cached:
        return f"  {engine.graph:18} up to date"
    fused = f"{engine.layers} layers" + (f", {engine.plugins} plugins" if engine.plugins else "")
    fused += f", {engine.kernels} kernels" if engine.kernels else ""
    return (
        f"  {engine.graph:18} {engine.seconds:5.2f} s  {engine.bytes / 1e6:6.2f} MB  "
        f"{engine.activation_bytes / 1e6:8.1f} MB activations  {fused}"
    )


def sms_of(targets: str) -> list[int]:
    """Architectures of a list of targets, each once, ascending.

    Raises:
        ConfigError: a target is unknown, or has no bfloat16.
    """
    gpus = load_targets()
    made_for = sorted({*RTX.sms, *(gpu.sm for gpu in gpus.values())})
    known = {name: gpu.sm for name, gpu in gpus.items()} | {f"sm_{sm}": sm for sm in made_for}
    wanted = targets_called(map(str.strip, targets.split(",")), known)
    if old := [name for name, sm in wanted.items() if sm < FIRST_BF16_SM]:
        raise ConfigError(
            f"{old[0]} has no bfloat16, in which engines compute; sm_{FIRST_BF16_SM} is the first that has"
        )
    return sorted(set(wanted.values()))


def groups(sms: list[int]) -> list[tuple[Flavour, tuple[int, ...]]]:
    """What is built at once: all of TensorRT-RTX's architectures, and each of TensorRT's by itself."""
    portable = tuple(sm for sm in sms if flavour_for(sm) is RTX)
    return [*([(RTX, portable)] if portable else []), *((TENSORRT, (sm,)) for sm in sms if sm not in portable)]


def check_gpu(sms: tuple[int, ...]) -> None:
    """TensorRT builds for the GPU that is here only.

    Raises:
        ResourceError: it is another, or there is none.
    """
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if here is None or (10 * here[0] + here[1],) != sms:
        found = "no GPU" if here is None else f"one of sm_{10 * here[0] + here[1]}"
        raise ResourceError(f"TensorRT builds on a GPU of the architecture itself, and here is {found}; build there")
