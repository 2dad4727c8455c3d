"""Simulate clusters of 1 to 64 workers and draw what they do: ``python -m tools.machines [--page docs/machines.md]``.

Without a page, the tables are printed. With one, they replace those between its marks, and the plot is drawn beside it.
Nothing here is measured: clips take the rooflines of docs/scaling.md, and the store's transactions what is given here.
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tools.machines.simulation import KINDS, MEAN_SECONDS, Leasing, Outcome, Plan, Routing
from wanforge.runtime.measure.page import Plot, Series, picture_of

WORKERS = (1, 2, 4, 8, 16, 32, 64)
WORKER_LIFE, ROUTER_LIFE = 600.0, 1800.0
"""Seconds after which machines die on average: far sooner than real ones, so that something is seen of it."""
BEGIN, END = "<!-- simulation -->", "<!-- end of simulation -->"
PLOT = "machines.svg"


@dataclass(frozen=True)
class Disk:
    """A database's disk: seconds of a transaction that is synced, and of a heartbeat."""

    name: str
    write_seconds: float
    note_seconds: float


DISKS = (
    Disk("1 ms", 0.001, 0.001),
    Disk("20 ms", 0.020, 0.002),
    Disk("20 ms, all", 0.020, 0.020),
)
"""A disk that syncs in a millisecond, one that takes twenty, and the same if heartbeats were synced as well."""


def leased(plan: Plan) -> Outcome:
    """What becomes of a plan with leases."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return Leasing(plan, Path(folder)).run()


def busy(workers: int, disk: Disk) -> Outcome:
    """A cluster that always has more to do than it can."""
    jobs = max(600, 40 * workers)
    return leased(Plan(workers, jobs, 3.0, write_seconds=disk.write_seconds, note_seconds=disk.note_seconds))


def throughput_table(found: dict[str, list[Outcome]]) -> str:
    """The share of the time of all workers in which they make clips, and that in which the store works."""
    lines = [f"| workers | {' | '.join(found)} |", f"|--:|{'--:|' * len(found)}"]
    for place, workers in enumerate(WORKERS):
        cells = []
        for outcomes in found.values():
            outcome = outcomes[place]
            share = outcome.worked() / workers
            cells.append(f"{100 * share:.0f} % (store {100 * outcome.store_share:.0f} %)")
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def throughput_plot(found: dict[str, list[Outcome]]) -> str:
    """The same as a picture."""
    series = []
    for name, outcomes in found.items():
        points = []
        for workers, outcome in zip(WORKERS, outcomes, strict=True):
            rate = 60 * outcome.worked() / MEAN_SECONDS
            points.append((float(workers), rate, f"{workers} workers, {name}: {rate:.0f} clips a minute"))
        series.append(Series(name, points))
    return picture_of(Plot("clips a minute", "workers; simulated", "clips a minute", series, log_x=True, log_y=True))


def failures_table(seed: int) -> str:
    """How long clips wait, and what is lost, where machines die."""
    lines = [
        "| workers | design | median wait, s | 95 %, s | 99 %, s | attempts in vain | clips lost |",
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    for workers in (4, 16, 64):
        quiet = Plan(workers, jobs=max(3000, 150 * workers), seed=seed)
        deadly = replace(quiet, worker_life=WORKER_LIFE, router_life=ROUTER_LIFE)
        for name, outcome in {
            "leases, nothing dies": leased(quiet),
            "leases": leased(deadly),
            "router": Routing(deadly).run(),
        }.items():
            waits = " | ".join(f"{outcome.wait(share):.1f}" for share in (0.5, 0.95, 0.99))
            lines.append(f"| {workers} | {name} | {waits} | {outcome.again} | {outcome.lost} of {quiet.jobs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = {disk.name: [busy(workers, disk) for workers in WORKERS] for disk in DISKS}
    kinds = ", ".join(f"{share:.0%} {name} ({seconds:.2f} s)" for name, (share, seconds) in KINDS.items())
    text = f"Clips: {kinds}.\n\n{throughput_table(found)}\n\n{failures_table(options.seed)}"
    if options.page is None:
        print(text)
        return
    before, rest = options.page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    options.page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    (options.page.parent / PLOT).write_text(throughput_plot(found))


if __name__ == "__main__":
    main()
