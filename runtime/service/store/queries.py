"""What clients and operators read."""

from collections import Counter
from collections.abc import Sequence

from wanforge.runtime.service.job import Batch, JobEvent, State
from wanforge.runtime.service.store.base import Census, DurationKey, JobFilter, JobPage, TurnedAwayError
from wanforge.runtime.service.store.databases.database import Transaction, listed
from wanforge.runtime.service.store.rows import MOST_NAMES, QUEUED, RUNNING, event_of, job_of


def jobs(transaction: Transaction, which: JobFilter) -> JobPage:
    """A page of jobs."""
    conditions, values = ["1 = 1"], {}
    for column in ("owner", "batch"):
        if (value := getattr(which, column)) is not None:
            conditions.append(f"{column} = :{column}")
            values[column] = value
    if which.states:
        names, states = listed(which.states)
        conditions.append(f"state IN {names}")
        values |= states
    if which.after:
        conditions.append(f"number {'>' if which.order == 'asc' else '<'} :after")
        values["after"] = _number(transaction, which.after)
    rows = transaction.rows(
        f"SELECT * FROM jobs WHERE {' AND '.join(conditions)} ORDER BY number {which.order} LIMIT :most",
        most=which.limit + 1,
        **values,
    )
    return JobPage([job_of(row) for row in rows[: which.limit]], len(rows) > which.limit)


def _number(transaction: Transaction, job: str) -> int:
    row = transaction.row("SELECT number FROM jobs WHERE id = :job", job=job)
    if row is None:
        raise TurnedAwayError("unknown_job", f"there is no job {job} after which to continue; list from the start")
    return int(row["number"])


def batch_of(transaction: Transaction, batch: str) -> Batch | None:
    """A batch with the states of its jobs."""
    row = transaction.row("SELECT owner, created_at FROM batches WHERE id = :batch", batch=batch)
    if row is None:
        return None
    counts = transaction.rows("SELECT state, count(*) AS n FROM jobs WHERE batch = :batch GROUP BY state", batch=batch)
    return Batch(batch, row["owner"], row["created_at"], {State(each["state"]): each["n"] for each in counts})


def position(transaction: Transaction, job: str) -> int | None:
    """The place of a queued job if owners take turns, so that each other one starts a job more than are ahead."""
    row = transaction.row(f"SELECT owner, place, number FROM jobs WHERE id = :job AND {QUEUED}", job=job)
    if row is None:
        return None
    ahead = transaction.number(
        f"SELECT count(*) AS n FROM jobs WHERE owner = :owner AND {QUEUED} AND "
        "(place < :place OR (place = :place AND number < :number))",
        **dict(row),
    )
    others = transaction.rows(
        f"SELECT count(*) AS n FROM jobs WHERE {QUEUED} AND owner <> :owner GROUP BY owner", owner=row["owner"]
    )
    return ahead + sum(min(each["n"], ahead + 1) for each in others)


def positions(transaction: Transaction) -> dict[str, int]:
    """The place of every queued job, as `position` counts it."""
    rows = transaction.rows(f"SELECT id, owner FROM jobs WHERE {QUEUED} ORDER BY owner, place, number")
    counts = Counter(row["owner"] for row in rows)
    lengths = Counter(counts.values())
    starts, longer = [0], len(counts)  # how many jobs start in the first turns, in which each owner starts one
    for turn in range(1, max(lengths, default=0) + 1):
        starts.append(starts[-1] + longer)
        longer -= lengths[turn]
    found, owner, ahead = {}, None, 0
    for row in rows:
        ahead = ahead + 1 if row["owner"] == owner else 0
        owner = row["owner"]
        found[row["id"]] = starts[ahead + 1] - 1
    return found


def latest(transaction: Transaction, jobs: Sequence[str]) -> dict[str, int]:
    """The sequence of the latest event of some jobs."""
    found: dict[str, int] = {}
    for start in range(0, len(jobs), MOST_NAMES):
        names, values = listed(jobs[start : start + MOST_NAMES])
        rows = transaction.rows(f"SELECT id, events FROM jobs WHERE id IN {names}", **values)
        found |= {row["id"]: row["events"] for row in rows}
    return found


def events(transaction: Transaction, job: str, after: int, limit: int) -> list[JobEvent]:
    """The events of a job after one of them."""
    rows = transaction.rows(
        "SELECT * FROM events WHERE job = :job AND sequence > :after ORDER BY sequence LIMIT :most",
        job=job,
        after=after,
        most=limit,
    )
    return [event_of(row) for row in rows]


def census(transaction: Transaction) -> Census:
    """How many jobs there are."""
    states = transaction.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
    owners: dict[str, tuple[int, int]] = {}
    for place, condition in enumerate((QUEUED, RUNNING)):
        for row in transaction.rows(f"SELECT owner, count(*) AS n FROM jobs WHERE {condition} GROUP BY owner"):
            counts = list(owners.get(row["owner"], (0, 0)))
            counts[place] = row["n"]
            owners[row["owner"]] = (counts[0], counts[1])
    oldest = transaction.row(
        f"SELECT min(queued) AS queued, (SELECT running FROM clock) AS now FROM jobs WHERE {QUEUED}"
    )
    assert oldest is not None
    waited = 0.0 if oldest["queued"] is None else oldest["now"] - oldest["queued"]
    return Census({State(row["state"]): row["n"] for row in states}, owners, waited)


def durations(transaction: Transaction, key: DurationKey, limit: int) -> list[float]:
    """How long the latest jobs of a kind took."""
    rows = transaction.rows(
        "SELECT seconds FROM durations WHERE bundle = :bundle AND shape = :shape AND steps = :steps "
        "ORDER BY ended DESC LIMIT :most",
        bundle=key.bundle,
        shape=key.shape,
        steps=key.steps,
        most=limit,
    )
    return [row["seconds"] for row in rows]
