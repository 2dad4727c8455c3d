"""What goes wrong: a function for each kind of fault, which returns when it is over."""

import json
import os
import resource
import signal
import socket
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from shutil import disk_usage

import httpx2
import psutil

from tests.usage.serving.clips import LARGE, POISONED, USUAL, digests
from tests.usage.serving.server import children_of, kill
from tests.usage.serving.trial import Kind, Stage

ROOM = 8 << 20
"""Bytes of memory that a child may still take when it is about to run out."""
DISK_BYTES = 1_100_000_000
"""The size of a small disk, of which 1 GB has to stay free."""
BLOCK = 1 << 20
"""What is left to be filled bit by bit, since the server writes, too."""
STREAMS = 8
BACK_S = (60.0, 3600.0, 86_400.0)
"""By how much a clock is moved back."""


def kill_child(stage: Stage) -> None:
    """Kill one of the processes that make clips."""
    kill([stage.random.choice(children_of(stage.server))])


def kill_supervisor(stage: Stage) -> None:
    """Kill the process that runs the workers."""
    status = stage.server.status
    assert status is not None
    kill([psutil.Process(status.supervisor)])


def kill_everything(stage: Stage) -> None:
    """Kill all processes, or the one that the others end with, and start the server again."""
    server = stage.server
    assert server.process is not None
    kill([psutil.Process(server.process.pid)] if stage.random.random() < 0.5 else server.processes())
    server.process.wait()
    try:
        server.wait_until(lambda: not server.processes(), "processes are left", 10.0)
    except TimeoutError as error:
        stage.faults.append(str(error))
    server.start()


def take_memory(stage: Stage) -> None:
    """Leave the child that makes the large clip hardly any memory."""
    job = next(job for job, clip in stage.accepted.items() if clip == LARGE)
    status = stage.server.status
    pids = [] if status is None else [each.child for each in status.workers if each.job == job and each.child]
    for pid in pids:
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            most = psutil.Process(pid).memory_info().vms + ROOM
            resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    stage.server.connection.wait(job)
    for pid in pids:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def stop_child(stage: Stage) -> None:
    """Stop one of the processes that make clips, as if a call never returned."""
    stage.random.choice(children_of(stage.server)).send_signal(signal.SIGSTOP)


def fill_disk(stage: Stage) -> None:
    """Fill the disk, to the last byte or until less is free than has to stay free, and free it again."""
    ballast = stage.server.data / "ballast"
    is_whole = stage.random.random() < 0.5
    with ballast.open("wb", buffering=0) as file:
        os.posix_fallocate(
            file.fileno(), 0, disk_usage(stage.server.data).free - (BLOCK if is_whole else DISK_BYTES // 2)
        )
        file.seek(0, os.SEEK_END)
        with suppress(OSError):
            while is_whole and file.write(bytes(4096)):
                pass
    time.sleep(stage.random.uniform(0.5, 4.0))
    ballast.unlink()
    stage.strike()


def lock_database(stage: Stage) -> None:
    """Hold the lock by which writers take turns, now and then for longer than they wait for it."""
    connection = sqlite3.connect(stage.server.data / "jobs.sqlite", isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    end = time.monotonic() + stage.random.choice((1.0, 3.0, 3.0, 12.0))
    slowest = 0.0
    while time.monotonic() < end:
        asked = time.monotonic()
        stage.server.connection.http.get("/livez")
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.1)
    connection.execute("ROLLBACK")
    connection.close()
    stage.strike()
    if slowest > 1.0:
        stage.faults.append(f"/livez took {slowest:.1f} s while the database was locked")


def leave_uploads(stage: Stage) -> None:
    """Leave in the middle of a form and of a batch, and after a request whose answer is not read."""
    line = json.dumps(USUAL[0].fields).encode() + b"\n"
    with left(stage) as client:
        client.sendall(head(stage, "POST /v1/batches", "application/jsonl", 200 * len(line)) + 100 * line)
    part = b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a.png"\r\n\r\n'
    with left(stage) as client:
        kind = "multipart/form-data; boundary=x"
        client.sendall(head(stage, "POST /v1/videos", kind, 8_000_000) + part + 4_000_000 * b"a")
    key = {"Idempotency-Key": f"{stage.server.mark}{stage.random.random()}"}
    body = json.dumps(USUAL[0].fields).encode()
    with left(stage) as client:
        client.sendall(head(stage, "POST /v1/videos", "application/json", len(body), key) + body)
    headers = key | {"Content-Type": "application/json"}
    again = stage.server.connection.http.post("/v1/videos", content=body, headers=headers)
    stage.accepted[again.json()["id"]] = USUAL[0]


def leave_downloads(stage: Stage) -> None:
    """Leave in the middle of downloads, and take one up again."""
    connection, job = stage.server.connection, next(iter(stage.accepted))
    connection.wait(job)
    for _ in range(STREAMS):
        with left(stage) as client:
            client.sendall(head(stage, f"GET /v1/videos/{job}/content", "", 0))
            client.recv(300)
    whole = connection.http.get(f"/v1/videos/{job}/content").content
    begun = stage.random.randrange(1, len(whole))
    rest = connection.http.get(f"/v1/videos/{job}/content", headers={"Range": f"bytes={begun}-"})
    if rest.status_code != 206 or rest.content != whole[begun:]:
        stage.faults.append(f"the rest of a download is wrong ({rest.status_code})")
    if len(digests(connection, job)) != 3:
        stage.faults.append("a download is missing")


def leave_streams(stage: Stage) -> None:
    """Leave event streams, and take one up again."""
    job = next(reversed(stage.accepted))
    path = f"/v1/videos/{job}/events"
    for _ in range(STREAMS):
        with left(stage) as client:
            client.sendall(head(stage, f"GET {path}", "", 0))
            said = client.recv(300)
            if b" 200 " not in said:
                stage.faults.append(f"a stream is refused: {said!r}")
    http = stage.server.connection.http
    numbers: list[int] = []
    for _ in range(3):
        with http.stream("GET", path, headers={"Last-Event-ID": str(numbers[-1] if numbers else 0)}) as response:
            for number in numbers_of(response):
                numbers.append(number)
                if stage.random.random() < 0.3:
                    break
    with http.stream("GET", path, headers={"Last-Event-ID": str(numbers[-1] if numbers else 0)}) as response:
        numbers += numbers_of(response)
    if numbers != list(range(1, len(numbers) + 1)):
        stage.faults.append(f"a stream that was taken up again has the events {numbers}")


def numbers_of(response: httpx2.Response) -> Iterator[int]:
    """The numbers of the events of a stream."""
    for line in response.iter_lines():
        if line.startswith("id: "):
            yield int(line[4:])


def move_clock_back(stage: Stage) -> None:
    """Move the wall clock of the front and of the supervisor back."""
    file = stage.server.folder / "clock"
    before = float(file.read_text()) if file.exists() else 0.0
    new = file.with_suffix(".new")
    new.write_text(str(before - stage.random.choice(BACK_S)))
    new.replace(file)


def do_nothing(stage: Stage) -> None:
    """Let a job do it that kills whoever makes it."""


@contextmanager
def left(stage: Stage) -> Iterator[socket.socket]:
    """A connection with a small buffer, which is left without a word or broken off."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(10)
    client.connect(("127.0.0.1", stage.server.port))
    try:
        yield client
    finally:
        if stage.random.random() < 0.5:  # broken off: what was not read yet is thrown away
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


def head(stage: Stage, what: str, kind: str, size: int, more: dict[str, str] | None = None) -> bytes:
    """The head of a request."""
    fields = {"Host": f"127.0.0.1:{stage.server.port}", "Content-Type": kind, "Content-Length": str(size)}
    lines = [f"{what} HTTP/1.1", *(f"{name}: {value}" for name, value in (fields | (more or {})).items() if value)]
    return "\r\n".join([*lines, "", ""]).encode()


FULL = frozenset({"disk_full"})
KINDS = [
    Kind("a child is killed", kill_child),
    Kind("the supervisor is killed", kill_supervisor, trials_per_server=4),
    Kind("everything is killed and started again", kill_everything),
    Kind("a child runs out of memory", take_memory, codes=frozenset({"out_of_memory"}), first=(LARGE,)),
    Kind("a child hangs", stop_child),
    Kind("the disk is full", fill_disk, codes=FULL, trials_per_server=20, is_small=True),
    Kind("the database is locked", lock_database, attempts=1),
    Kind("clients leave during uploads", leave_uploads, attempts=1),
    Kind("clients leave during downloads", leave_downloads, attempts=1),
    Kind("clients leave event streams", leave_streams, attempts=1),
    Kind("the clock is moved back", move_clock_back, attempts=1),
    Kind("a job kills its workers", do_nothing, codes=frozenset({"worker_died"}), first=(POISONED,)),
]
