"""The processes of the ranks other than the first, as the first one starts, watches and ends them."""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread

import msgspec
import torch
from torch import distributed
from torch.distributed import FileStore  # type: ignore[attr-defined]

from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.child_process import kill_group, start_module
from wanforge.runtime.ranks.peer import MEETING, meet, name_of
from wanforge.runtime.ranks.task import Answer, Decoding, Opening, put, task_of
from wanforge.runtime.request import Request

MOST_SAID = 2000
"""The most bytes of a peer's last words that are read."""
LATE_NEWS = 5.0
"""Seconds to wait for a peer to tell of its failure, after this rank has lost the connection to it."""


def check_gpus(ranks: int) -> None:
    """Refuse more ranks than there are GPUs. Without any GPU, ranks are processes on the CPU, which tests use.

    Raises:
        ResourceError: There are too few.
    """
    found = torch.cuda.device_count()
    if 0 < found < ranks:
        raise ResourceError(f"{ranks} GPUs were asked for, and PyTorch sees {found}; ask for {found} at most")


def variables_of(rank: int) -> dict[str, str]:
    """The environment variables by which a peer sees one GPU, which is not that of this process."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(gpu) for gpu in range(count)]
    del gpus[torch.cuda.current_device()]
    return {"CUDA_VISIBLE_DEVICES": gpus[rank - 1]}


class Peer:
    """One such process.

    Attributes:
        failure: Its answer that it has failed, once it has. If it has ended without an answer, this process gives one,
            whose time is 0.
    """

    def __init__(self, opening: Opening, folder: Path) -> None:
        self.rank, self.log = opening.rank, folder / f"{opening.rank}.log"
        self.failure: Answer | None = None
        with self.log.open("wb") as errors:
            self.process = start_module(
                "wanforge.runtime.ranks.peer", str(os.getpid()), errors=errors, variables=variables_of(self.rank)
            )
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()
        self.tell(opening)

    def tell(self, message: msgspec.Struct) -> None:
        """Send it a message. If it has ended, `wait` says so."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            put(self.process.stdin, message)

    def wait(self) -> None:
        """Wait for its answer.

        Raises:
            ResourceError: It has failed.
        """
        if self.answers.get().error is not None:
            raise ResourceError(self.told())

    def told(self) -> str:
        """What went wrong in it."""
        error = self.failure.error if self.failure else None
        return f"rank {self.rank}, one of the processes that share the request, failed: {error}"

    def end(self) -> None:
        """End it, whatever it is doing."""
        kill_group(self.process)
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while self.failure is None:
            line = self.process.stdout.readline()
            answer = msgspec.json.decode(line, type=Answer) if line else Answer(self._last_words())
            if answer.error is not None:
                self.failure = answer
                abort()
            self.answers.put(answer)

    def _last_words(self) -> str:
        code, said = self.process.wait(), self.log.read_bytes()[-MOST_SAID:].decode(errors="replace").strip()
        return f"it ended with {code}" + (f", and its last words were: {said}" if said else "")


def abort() -> None:
    """Let this rank wait no longer for the others. Only NCCL has to be told; gloo notices that a process has ended."""
    if torch.cuda.is_available() and (group := distributed.group.WORLD) is not None:
        group.abort()


class Peers:
    """All of them, and the process group that they make with this process, which is the first rank.

    Args:
        ranks: The number of ranks, this one included.
        budget: The most bytes of memory that each may use.

    Raises:
        ResourceError: A peer cannot open the bundle, or ended.
    """

    def __init__(self, bundle: Bundle, ranks: int, budget: float | None) -> None:
        self.folder = TemporaryDirectory(prefix="wanforge-ranks-")
        place, root = Path(self.folder.name), str(bundle.root.absolute())
        self.meeting, self.ranks = str(place / "meeting"), ranks
        self.all: list[Peer] = []
        atexit.register(self.end)
        try:
            for rank in range(1, ranks):
                self.all.append(Peer(Opening(root, bundle.stale_ok, budget, self.meeting, rank, ranks), place))
            for peer in self.all:
                peer.wait()
        except BaseException:
            self.end()
            raise

    @contextmanager
    def sharing(self, work: Request | Decoding) -> Iterator[None]:
        """Let them work at a request or its frames while this rank does its share within the ``with`` block. After an
        error, here or in a peer, they have all ended.

        Raises:
            ResourceError: A peer has failed.
        """
        try:
            task = work if isinstance(work, Decoding) else task_of(work, Path(self.folder.name))
            for peer in self.all:
                peer.tell(task)
            if not distributed.is_initialized():
                self._meet()
            yield
            for peer in self.all:
                peer.wait()
        except BaseException as error:
            cause = self._cause(error)
            self.end()
            if cause is None:
                raise
            raise ResourceError(cause.told()) from error

    def _meet(self) -> None:
        """Go to the meeting once every peer has come, because the group would wait for minutes for one that has ended.

        Raises:
            ResourceError: A peer has failed, or has not come after `MEETING`.
        """
        meeting, end = FileStore(self.meeting, self.ranks), time.monotonic() + MEETING.total_seconds()
        while missing := [peer for peer in self.all if not meeting.check([name_of(peer.rank)])]:
            for peer in self.all:
                if peer.failure is not None:
                    raise ResourceError(peer.told())
            if time.monotonic() > end:
                names = " and ".join(name_of(peer.rank) for peer in missing)
                raise ResourceError(
                    f"{names} of the processes that share the request did not come within {MEETING}, and they have all "
                    "ended; ask again, or use fewer GPUs"
                )
            time.sleep(0.01)
        meet(meeting, 0, self.ranks)

    def _cause(self, error: BaseException) -> Peer | None:
        """The peer whose failure made this rank fail; None if this rank failed by itself. Where a process has ended,
        those that it was connected to fail as well, but later, and they can tell."""
        patience = LATE_NEWS if isinstance(error, RuntimeError) and not isinstance(error, WanforgeError) else 0.0
        end = time.monotonic() + patience
        while not (failed := [peer for peer in self.all if peer.failure]) and time.monotonic() < end:
            time.sleep(0.01)
        return min(failed, key=lambda peer: peer.failure.seconds if peer.failure else 0.0, default=None)

    def end(self) -> None:
        """End them, whatever they are doing, and the process group."""
        atexit.unregister(self.end)
        ended, self.all = self.all, []
        for peer in ended:
            peer.end()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        self.folder.cleanup()
