"""A process that makes clips, one after the other.

It is started by the supervisor as ``python -m wanforge.runtime.service.child.child PID``, gets its orders on stdin
and answers on stdout. It ends with the supervisor, whose process id is its argument, however that ends. It knows
nothing of the job store.
"""

import logging
import os
import signal
import sys
import time
from importlib import import_module
from queue import SimpleQueue
from threading import Thread

from msgspec.structs import replace

from wanforge.errors import BundleError, CheckpointError, ResourceError, message_of
from wanforge.plugins.child_process import end_with
from wanforge.runtime.service import journal
from wanforge.runtime.service.child.failures import failure_of
from wanforge.runtime.service.child.maker import Maker, StoppedError
from wanforge.runtime.service.child.messages import (
    Advance,
    Channel,
    ChildReady,
    ChildUsage,
    ClipBegun,
    ClipFailed,
    ClipStopped,
    MakeClip,
    ReloadBundles,
    SetUp,
    ShutDown,
    StopClip,
    ToChild,
)

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.25
"""How often progress within a stage is told: more often than it is noted in the job store."""
NICENESS = 5
"""How much later than the processes that answer clients this one gets a processor where there are too few."""
LAST_EXIT = 70
"""The exit status after an error after which the process cannot go on."""
UNEXPECTED = ("internal_error", "gpu_failed")
"""Failures of which the log shows where they happened."""
LOADING = ""
"""The ticket of what is not done for a clip."""


class Child:
    """Takes orders, and makes clips in the thread that calls `serve`."""

    def __init__(self, channel: Channel[ToChild]) -> None:
        self.channel = channel
        self._orders: SimpleQueue[ToChild] = SimpleQueue()
        self._stopped = ""
        self._told_stage, self._told_at = "", 0.0

    def listen(self) -> None:
        """Take messages until the supervisor ends, and then end at once."""
        try:
            while True:
                message = self.channel.receive()
                if isinstance(message, StopClip):
                    self._stopped = message.ticket
                else:
                    self._orders.put(message)
        except (EOFError, OSError):
            os._exit(1)

    def serve(self) -> None:
        """Do what is asked for until a `ShutDown`."""
        Thread(target=self.listen, name="orders", daemon=True).start()
        setup = self._orders.get()
        assert isinstance(setup, SetUp)
        journal.begin(setup.logs)
        maker: Maker = import_module(setup.maker).create(setup)
        self._load(maker, ReloadBundles(setup.bundles))
        while not isinstance(order := self._orders.get(), ShutDown):
            if isinstance(order, ReloadBundles):
                self._load(maker, order)
            elif isinstance(order, MakeClip):
                self._make(maker, order)

    def _load(self, maker: Maker, order: ReloadBundles) -> None:
        refused = maker.load(order.bundles, lambda stage, percent: self._report(LOADING, stage, percent))
        self.channel.send(ChildReady(maker.loaded(), refused, usage_of(maker), maker.warm()))

    def _make(self, maker: Maker, order: MakeClip) -> None:
        self._told_stage = ""
        self.channel.send(ClipBegun(order.ticket))
        try:
            made = maker.make(order, lambda stage, percent: self._report(order.ticket, stage, percent))
            self.channel.send(replace(made, loaded=maker.loaded(), usage=usage_of(maker)))
        except StoppedError:
            self.channel.send(ClipStopped(order.ticket))
        except Exception as error:
            failure, is_last = failure_of(error)
            trace = error if failure.code in UNEXPECTED else None
            job = order.ticket.rpartition("/")[0]
            reason = (
                f": {message_of(error)}" if isinstance(error, BundleError | CheckpointError | ResourceError) else ""
            )
            log.error("An attempt failed (%s)%s.", failure.code, reason, exc_info=trace, extra={"job": job})
            self.channel.send(ClipFailed(order.ticket, failure, is_last))
            if is_last:
                os._exit(LAST_EXIT)  # at once, because libraries may hang when they clean up

    def _report(self, ticket: str, stage: str, percent: int) -> None:
        """Tell of progress, and stop where that was asked for."""
        if ticket and ticket == self._stopped:
            raise StoppedError
        now = time.monotonic()
        if stage != self._told_stage or now - self._told_at >= REPORT_SECONDS:
            self._told_stage, self._told_at = stage, now
            self.channel.send(Advance(ticket, stage, percent))


def usage_of(maker: Maker) -> ChildUsage:
    """What this process and its maker have used."""
    import psutil

    return replace(maker.usage(), memory_bytes=psutil.Process().memory_info().rss)


def main() -> None:
    """Serve the supervisor."""
    end_with(int(sys.argv[1]))
    os.nice(NICENESS)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides, also where a signal reaches all processes
    channel: Channel[ToChild] = Channel(sys.stdin.fileno(), sys.stdout.fileno(), ToChild)
    # Whatever libraries print must not get mixed with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    Child(channel).serve()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
