"""Ask a real server whatever its OpenAPI document allows and forbids, and compare each answer with the document.

    python -m tests.runtime.service.contract.trial --examples 600 --seed 1

Schemathesis makes the cases: for every operation the edges of its parameters, unknown methods, missing headers, and
then random requests, half of them wrong. Sequences of requests follow, in which one takes ids from the answers of
others. Meanwhile, the jobs that are submitted are made, so that videos in every state are asked for. It exits with 1 if
an answer was not as the document says, or if the server failed.
"""

import argparse
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import schemathesis
from schemathesis.core.transport import Response
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from tests.runtime.service.served import Rig, running
from wanforge.api import import_checkpoint
from wanforge.runtime.service.job import Failure
from wanforge.runtime.service.settings import ClientLimits, ServeSettings
from wanforge.runtime.service.store.base import Policy

ROUTES = "/openapi.json"
UNBOUNDED = ClientLimits(requests_per_second=1e6, burst=1_000_000)
"""Limits at which no request of a trial comes too soon."""


ACCEPTANCE = "positive_data_acceptance"
"""The check that what the document allows is accepted."""
MODELS = {"model", "size", "aspect", "seconds", "frames", "topk", "recipe", "backend", "input_reference", "prompt"}
MODELS |= {"steps", "times", "guidance_scale", "lora"}
"""Fields of a video for which each model has rules of its own, which no document can tell."""


def is_beyond_the_document(response: Response | None) -> bool:
    """Whether a request was refused by a model's rules, or since all lines of a batch are empty."""
    if response is None or response.status_code != 400:
        return False
    error = response.json()["error"]
    return error["param"] in MODELS or error["code"] == "batch_empty"


@dataclass
class Findings:
    """What a trial has found.

    Attributes:
        cases: How many requests each operation got.
        statuses: How often each status came.
        faults: What was wrong with an answer, and the request that shows it.
    """

    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def take(self, recorder: ScenarioRecorder) -> None:
        """Add what one scenario has shown."""
        for name, node in recorder.cases.items():
            self.cases[node.value.operation.label] += 1
            interaction = recorder.interactions.get(name)
            if interaction is not None and interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
        for name, checks in recorder.checks.items():
            interaction = recorder.interactions.get(name)
            response = None if interaction is None else interaction.response
            for check in checks:
                if check.failure_info is None or (check.name == ACCEPTANCE and is_beyond_the_document(response)):
                    continue
                failure = check.failure_info.failure
                said = "" if response is None else f"{response.status_code} {response.text[:500]}"
                self.faults.append(
                    f"{recorder.label}: {check.name}: {failure}\n{check.failure_info.code_sample}\n{said}"
                )

    def __str__(self) -> str:
        said = [f"{count:6} {name}" for name, count in sorted(self.cases.items())]
        said.append(f"{self.cases.total():6} cases; statuses: {dict(sorted(self.statuses.items()))}")
        return "\n".join([*said, *self.faults, f"{len(self.faults)} faults"])


def trial(rig: Rig, examples: int, seed: int) -> Findings:
    """Ask a server.

    Args:
        examples: How many random requests each operation gets, at most.
    """
    generation = {"max-examples": examples, "no-shrink": True, "database": "none"}
    _, key = rig.store.add_key("trial", ["admin"])
    rig.service.reload_keys()
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            "generation": generation,
            "auth": {"openapi": {"HTTPBearer": {"bearer": key}}},
            "operations": [
                {
                    "include-path": "/readyz",
                    "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", 503]}},
                }
            ],
            "max-stream-events": 100,
            "request-timeout": 20,
            "continue-on-failure": True,
        }
    )
    schema = schemathesis.openapi.from_url(f"{rig.url}{ROUTES}", config=config)
    found = Findings()
    with made(rig):
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                found.take(event.recorder)
            elif isinstance(event, events.NonFatalError):
                found.faults.append(f"{event.label}: {event.value!r}")
            elif isinstance(event, events.FatalError):
                raise event.exception
    return found


@contextmanager
def made(rig: Rig) -> Iterator[None]:
    """Make the jobs of a server while the ``with`` block runs; every third fails, and some stay queued for a while."""
    ended = threading.Event()

    def work() -> None:
        count = 0
        while not ended.wait(0.02):
            job = rig.store.claim(rig.offer)
            if job is None:
                continue
            count += 1
            if count % 3:
                rig.complete(job)
            else:
                rig.store.fail(job.lease, Failure("out_of_memory", "memory ran out"))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        ended.set()
        worker.join()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=600, help="random requests for each operation")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_checkpoint(folder / "tinywan", recipe="w8a8")
        settings = ServeSettings(data=name, limits=UNBOUNDED, policy=Policy(most_queued=1_000_000))
        with running(settings, [("", folder / "tinywan")], folder) as rig:
            found = trial(rig, options.examples, options.seed)
    print(found)
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
