"""Many clients in one event loop, which speak as much HTTP as they need, so that they take little time themselves."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

ACTIVE = ("queued", "in_progress")
ARRIVAL_SECONDS = 5.0
"""The time in which many clients arrive."""


@dataclass
class Seen:
    """What clients have seen.

    Attributes:
        seconds: How long each answer took.
        wrong: Answers that are no status.
        events: The number of events that came.
        late: By how much this process itself went on too late after a pause, which only the machine is to blame for.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    events: int = 0
    late: list[float] = field(default_factory=list)

    def add(self, other: "Seen") -> None:
        """Take what others have seen as well."""
        self.seconds += other.seconds
        self.wrong += other.wrong
        self.events += other.events
        self.late += other.late


def share(seconds: list[float], part: float) -> float:
    """What this part of some times is at most."""
    return sorted(seconds)[int(part * (len(seconds) - 1))] if seconds else float("inf")


async def status(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], job: str) -> tuple[int, float, Any]:
    """Ask for the status of a job. Returns the HTTP status, in how many seconds to ask again, and the video."""
    reader, writer = connection
    writer.write(f"GET /v1/videos/{job} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
    body = await reader.readexactly(int(fields["content-length"]))
    return int(head.split()[1]), float(fields.get("openai-poll-after-ms", 1000)) / 1000, json.loads(body)


async def poll(port: int, jobs: list[str], seen: Seen, until: float, *, rests: bool) -> None:
    """Look at one job after the other, as often as the server asks for, or as fast as it answers."""
    connection = await asyncio.open_connection("127.0.0.1", port)
    while jobs and time.monotonic() < until:
        job = jobs.pop(0)
        while time.monotonic() < until:
            begun = time.monotonic()
            code, pause, video = await status(connection, job)
            seen.seconds.append(time.monotonic() - begun)
            if code != 200:
                seen.wrong.append(f"{code}: {video}")
            if code != 200 or video["status"] not in ACTIVE:
                break
            if rests:
                await asyncio.sleep(max(0.0, min(pause, until - time.monotonic())))
    connection[1].close()


async def follow(port: int, job: str, seen: Seen) -> None:
    """Read the events of a job until it has ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /v1/videos/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    try:
        while text := await reader.readline():
            seen.events += text.startswith(b"event:")
    finally:
        writer.close()


async def keep_time(seen: Seen, until: float) -> None:
    """Note how late this process goes on after pauses."""
    while time.monotonic() < until:
        due = time.monotonic() + 0.1
        await asyncio.sleep(0.1)
        seen.late.append(time.monotonic() - due)


async def crowd(port: int, jobs: Sequence[str], followed: Sequence[str], pollers: int, seconds: float) -> Seen:
    """Let pollers look at jobs, each at jobs of its own, while others follow events, and stop after some time. They
    come one after the other, in `ARRIVAL_SECONDS`."""
    seen, until = Seen(), time.monotonic() + seconds
    following, streams = list[asyncio.Task[None]](), list(followed)
    async with asyncio.TaskGroup() as group:
        group.create_task(keep_time(seen, until))
        for place in range(pollers):
            group.create_task(poll(port, list(jobs[place::pollers]), seen, until, rests=True))
            if place * len(followed) >= len(following) * pollers and streams:
                following.append(asyncio.create_task(follow(port, streams.pop(0), seen)))
            await asyncio.sleep(ARRIVAL_SECONDS / pollers)
    for each in following:
        each.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    return seen


async def hammer(port: int, jobs: Sequence[str], clients: int, seconds: float) -> Seen:
    """Let clients look at queued jobs as fast as the server answers."""
    seen, until = Seen(), time.monotonic() + seconds
    with suppress(asyncio.IncompleteReadError):
        async with asyncio.TaskGroup() as group:
            for place in range(clients):
                group.create_task(poll(port, list(jobs[place::clients]), seen, until, rests=False))
    return seen
