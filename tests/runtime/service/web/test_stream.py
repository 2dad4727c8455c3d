"""Events of a job: live, in order, and taken up again where a stream broke off."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2

from tests.runtime.service.served import Rig


def events_of(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, with their ids and kinds."""
    found: dict[str, Any] = {}
    for line in response.iter_lines():
        name, colon, value = line.partition(": ")
        if not line:
            if "data" in found:
                yield found
            found = {}
        elif colon and name:
            found[name] = json.loads(value) if name == "data" else value


def test_events_come_as_they_happen_and_end_with_the_job(rig: Rig) -> None:
    video = rig.submit()
    kinds = []
    begun = threading.Event()

    def make() -> None:
        begun.wait(10)
        rig.make()

    worker = threading.Thread(target=make)
    worker.start()
    with rig.client.stream("GET", f"/v1/videos/{video['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for event in events_of(response):
            kinds.append(event["event"])
            begun.set()
    worker.join()
    assert kinds == ["queued", "started", "progress", "completed"]


def test_a_stream_is_taken_up_after_the_last_event(rig: Rig) -> None:
    video = rig.submit()
    rig.make()
    path = f"/v1/videos/{video['id']}/events"
    with rig.client.stream("GET", path) as response:
        every = list(events_of(response))
    with rig.client.stream("GET", path, headers={"Last-Event-ID": every[1]["id"]}) as response:
        assert list(events_of(response)) == every[2:]


def test_a_client_that_leaves_gives_its_place_back(rig: Rig) -> None:
    video = rig.submit()
    for _ in range(3):
        with rig.client.stream("GET", f"/v1/videos/{video['id']}/events") as response:
            next(events_of(response))
    done = rig.client.post(f"/v1/videos/{video['id']}/cancel").json()
    assert done["status"] == "cancelled"
    for _ in range(200):
        if not rig.service.streams[""]:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{rig.service.streams['']} streams are still counted")


def test_a_client_that_claims_to_know_coming_events_takes_them_from_nobody(rig: Rig) -> None:
    path = f"/v1/videos/{rig.submit()['id']}/events"
    with (
        rig.client.stream("GET", path, headers={"Last-Event-ID": "999"}) as bogus,
        rig.client.stream("GET", path) as honest,
    ):
        told, also_told = events_of(honest), events_of(bogus)
        assert next(told)["event"] == "queued"
        rig.make()
        assert [event["event"] for event in told] == ["started", "progress", "completed"]
        assert [event["event"] for event in also_told] == ["started", "progress", "completed"]
