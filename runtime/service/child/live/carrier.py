"""The way of a live stream's bytes from the encoder into a file and to whoever watches."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Self

from wanforge.runtime.service.live.wire import PIECE_BYTES


class Carrier:
    """Reads what the encoder writes, in a thread of its own. While the receiver takes nothing, neither does it, and
    then the encoder waits. The file gets everything, also once the receiver has gone.

    ``with Carrier(…) as carrier`` waits until all of it is carried.

    Args:
        file: What the bytes are kept in.
        send: Takes the next bytes; it raises an OSError if there is nobody who wants them any more.

    Attributes:
        writes: The descriptor that the encoder writes to, within the block.
        count: How many bytes the file has.
        is_sending: Whether the receiver is being waited for.
        error: Why the file cannot be written, if it cannot.
    """

    def __init__(self, file: Path, send: Callable[[bytes], object]) -> None:
        self.file, self._send = file, send
        self._reads = self.writes = -1
        self.count, self.is_sending = 0, False
        self.error: OSError | None = None
        self._is_wanted = True
        self._thread = Thread(target=self._run, name="carrier", daemon=True)

    def __enter__(self) -> Self:
        self._reads, self.writes = os.pipe()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.writes)
        self._thread.join()

    def _run(self) -> None:
        try:
            with self.file.open("wb", buffering=0) as kept:
                while data := os.read(self._reads, PIECE_BYTES):
                    kept.write(data)
                    self.count += len(data)
                    self._hand_on(data)
        except OSError as error:
            self.error = error
        finally:
            os.close(self._reads)  # without which the encoder would wait for ever

    def _hand_on(self, data: bytes) -> None:
        if not self._is_wanted:
            return
        self.is_sending = True
        try:
            self._send(data)
        except OSError:
            self._is_wanted = False
        self.is_sending = False
