"""The command that shows what a bundle holds."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click

from wanforge.configs.targets import Target, parse_targets
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.files import built_clips
from wanforge.engines.inspection import describe, inspect_bundle
from wanforge.errors import WanforgeError
from wanforge.exporter.checkpoint.record import conversions
from wanforge.runtime.commands.options import ANY_PATH, JSON, refuse_unused, takes
from wanforge.runtime.lora.inspection import describe_lora, describe_merged, inspect_lora, merged_as_json, way_of
from wanforge.runtime.measure.cost.memory import MemoryReport, memory_report, table
from wanforge.runtime.progress import Bars


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The options of `wanforge inspect`."""

    bundle: Path
    verify: bool
    plan: tuple[str, ...]
    as_json: bool


@click.command()
@click.argument("bundle", type=ANY_PATH, metavar="BUNDLE | LORA")
@click.option("--verify", is_flag=True, help="Read every file and compare its SHA-256.")
@click.option(
    "--plan",
    multiple=True,
    metavar="GPUS",
    help="Show how much memory each clip that has engines takes on these GPUs.",
)
@JSON
@takes(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Show what a bundle holds, and what is missing, stale or damaged, and why; or what the file of a LoRA holds, and
    which models it fits.

    The command exits with 1 if it finds a problem.

    \b
    Examples:
      wanforge inspect turbo-1.3b --verify
      wanforge inspect style.safetensors
    """
    if options.bundle.is_file():
        refuse_unused(["verify", "plan"], "with the file of a LoRA")
        lora = inspect_lora(options.bundle)
        click.echo(json.dumps(lora) if options.as_json else describe_lora(lora))
        return
    gpus = parse_targets(options.plan).gpus if options.plan else {}
    bundle = Bundle.open(options.bundle)
    with Bars() as bars:
        found = inspect_bundle(bundle, verify=options.verify, progress=bars)
    plans, failures = plans_of(bundle, gpus)
    made = conversions(bundle.root)
    if options.as_json:
        told = {**found.as_json(), "conversions": made, "loras": way_of(bundle), "merged": merged_as_json(bundle)}
        told |= {"plans": [plan.as_json() for plan in plans], "failures": failures}
        click.echo(json.dumps(told))
    else:
        said = [f"  {component}: {conversion}" for component, conversion in made.items()]
        planned = [table(plans)] if plans else []
        click.echo("\n".join([describe(found), *said, *describe_merged(bundle), *planned, *failures]))
    if found.problems or failures:
        click.get_current_context().exit(1)


def plans_of(bundle: Bundle, gpus: Mapping[str, Target]) -> tuple[list[MemoryReport], list[str]]:
    """The memory that each clip with engines takes on each GPU, and the reasons why some could not be planned."""
    plans, failures = [], []
    for clip, (name, gpu) in product(built_clips(bundle), gpus.items()):
        try:
            plans.append(memory_report(bundle, clip, name, gpu))
        except WanforgeError as error:
            failures.append(f"no memory plan for {name}: {error}")
    if gpus and not plans and not failures:
        build = f"wanforge build {shlex.quote(str(bundle.root))} --target {','.join(gpus)}"
        failures.append(f"no memory plan: there are no engines; run: {build}")
    return plans, failures
