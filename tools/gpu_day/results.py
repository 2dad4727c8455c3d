"""What the parts find, as JSON lines that are appended as they come, so that whatever ends a run loses nothing."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Line = dict[str, Any]

PASSED, FAILED, LATE, CUT = "passed", "failed", "over its limit", "cut short"
"""How a part ends: by itself, with an error, stopped at its own limit, or because the time of the call was over."""


@dataclass(frozen=True)
class Results:
    """A file of results. Several processes may append to it.

    Every line is an object with the names ``part``, ``kind`` and ``time``. The kinds ``begin`` and ``end`` are written
    by what runs the parts, all others by the parts.
    """

    path: Path

    def add(self, part: str, kind: str, **values: Any) -> None:
        """Append a line."""
        line = {"part": part, "kind": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}
        data = json.dumps(line, default=str).encode() + b"\n"
        with self.path.open("ab+") as file:
            if file.tell() and not self._ends_a_line(file.fileno()):
                data = b"\n" + data  # what was being written when a run ended stays a line of its own
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def _ends_a_line(descriptor: int) -> bool:
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, 1, size - 1) == b"\n"

    def lines(self) -> Iterator[Line]:
        """All lines in order, without those that are incomplete."""
        if not self.path.exists():
            return
        for text in self.path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "part" in line and "kind" in line:
                yield line

    def of(self, part: str, kind: str) -> list[Line]:
        """The lines of one kind of a part."""
        return [line for line in self.lines() if (line["part"], line["kind"]) == (part, kind)]

    def state(self, part: str) -> str | None:
        """How a part ended last; None if it has not run. One whose end is not recorded was cut short."""
        states = [line.get("state", CUT) for line in self.lines() if line["part"] == part and line["kind"] in ENDS]
        return states[-1] if states else None


ENDS = ("begin", "end")
