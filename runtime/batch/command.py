"""The command that makes the clips of a whole file of prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from wanforge.engines.bundle.bundle import Bundle
from wanforge.runtime.backends import AUTO
from wanforge.runtime.batch.actors import actor_hands, connected
from wanforge.runtime.batch.orders import Defaults, Ordering
from wanforge.runtime.batch.places import opened, sole_run
from wanforge.runtime.batch.processes import Pools, process_hands
from wanforge.runtime.batch.report import told
from wanforge.runtime.batch.run import BatchRun
from wanforge.runtime.batch.team import Team
from wanforge.runtime.commands.options import (
    BACKEND,
    CLIP,
    FILE,
    FOLDER,
    MOST_GIGABYTES,
    ClipOptions,
    FiniteRange,
    takes,
)
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.inputs.prompts import scan_prompts
from wanforge.runtime.lora.option import LORA
from wanforge.runtime.service.child.messages import BundlePlace
from wanforge.runtime.service.results.base import ObjectStorage

INCOMPLETE = 3
"""The exit code of a batch that has ended with clips set apart."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions(ClipOptions):
    """The options of `wanforge batch`."""

    prompts: Path
    bundle: Path
    out: str
    seed: int
    samples: int
    loras: tuple[LoraChoice, ...]
    backend: str
    workers: int
    split_vae: int
    ray: str | None
    retries: int
    skip_bad: bool
    price_per_hour: float | None
    as_json: bool


@click.command()
@click.argument("prompts", type=FILE)
@click.option("--bundle", type=FOLDER, required=True, help="Folder of the bundle that makes the clips.")
@click.option("--out", required=True, help="Folder for the clips and the manifest, or s3://bucket/prefix.")
@CLIP
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first sample of lines that name none."
)
@click.option(
    "--samples",
    type=click.IntRange(1, 10_000),
    default=1,
    show_default=True,
    help="Number of clips per line; each takes the next seed.",
)
@LORA
@BACKEND
@click.option(
    "--workers",
    type=click.IntRange(0, 1024),
    default=0,
    help="Number of processes that make clips.  [default: one for each GPU, or one for each machine without any]",
)
@click.option(
    "--split-vae",
    type=click.IntRange(0, 1024),
    default=0,
    is_flag=False,
    flag_value=1,
    metavar="[N]",
    help="Decode in N more processes, or 1, so that the others only denoise.  [default: each process does both]",
)
@click.option(
    "--ray",
    metavar="local|auto|ADDRESS",
    help="Make the clips in actors of Ray: started here, of the cluster that is found, or of that at an address. Its "
    "machines must see the bundle, the images and the folder under the same paths.",
)
@click.option(
    "--retries",
    type=click.IntRange(0, 1000),
    default=3,
    show_default=True,
    help="How often a clip is tried again whose process died or failed.",
)
@click.option(
    "--skip-bad", is_flag=True, help="Set lines apart that are no request, and make the others, instead of none."
)
@click.option(
    "--price-per-hour",
    type=FiniteRange(0, MOST_GIGABYTES),
    help="What all the machines cost in an hour, from which the cost of a clip follows.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@takes(BatchOptions)
def batch(options: BatchOptions) -> None:
    """Make the clips of a file of prompts, and only those that are not there yet.

    PROMPTS has a request on each line, as `wanforge generate --prompt-file` takes them: a prompt, or a JSON object such
    as {"prompt": …, "seed": …}. A clip's file is named after a hash of its request and the bundle, so the same command
    goes on where an earlier run ended, whatever ended it. manifest.jsonl in the same place says which clip belongs to
    which line, and which could not be made.

    The exit code is 0 if every clip is there, 3 if some were set apart, and 1 if nothing could be done.

    \b
    Examples:
      wanforge batch prompts.jsonl --bundle turbo-1.3b --out clips
      wanforge batch prompts.jsonl --bundle turbo-1.3b --out s3://videos/tonight --samples 4 --price-per-hour 2.5
    """
    bundle = Bundle.open(options.bundle)
    ordering = Ordering(bundle, defaults_of(options, bundle))
    lines = scan_prompts(options.prompts)
    with opened(options.out) as storage, sole_run(options.out, storage):
        run = BatchRun(ordering, storage, options.out)
        missing = run.read(lines, skip_bad=options.skip_bad)
        effort = run.make(missing, lambda count: hired(options, ordering, storage, count), options.price_per_hour)
        report = run.report(missing, effort)
    click.echo(msgspec.json.encode(report).decode() if options.as_json else told(report))
    if report.failed:
        click.get_current_context().exit(INCOMPLETE)


@contextmanager
def hired(options: BatchOptions, ordering: Ordering, storage: ObjectStorage, count: int) -> Iterator[Team]:
    """What makes some clips."""
    place = BundlePlace(ordering.fingerprint, str(ordering.bundle.root.resolve()), ordering.loras)
    pools = Pools(options.workers, options.split_vae)
    if options.ray is None:
        yield Team(process_hands(place, options.backend, storage, pools, count), options.retries)
        return
    with connected(options.ray, pools):
        yield Team(actor_hands(place, options.backend, options.out, pools, count), options.retries)


def defaults_of(options: BatchOptions, bundle: Bundle) -> Defaults:
    """What the options say of every line."""
    return Defaults(
        options.shape(bundle.model),
        options.steps,
        options.topk,
        options.seed,
        options.samples,
        None if options.backend == AUTO else options.backend,
        options.loras,
    )
