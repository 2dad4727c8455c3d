"""What the command line shows of the log: every record is a line of text on stderr, or a line of JSON.

The code logs to loggers whose names begin with ``wanforge``. Programs that import wanforge configure them as they like.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

ROOT = logging.getLogger("wanforge")
PROGRESS = logging.getLogger("wanforge.progress")
"""The logger of the lines that replace progress bars where there is no terminal. Its information is always shown."""

STANDARD = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName"}
"""The attributes of every record; others are fields of its own."""


class Console(logging.Handler):
    """Shows warnings and progress, and with `show` everything, while it is entered.

    Attributes:
        is_verbose: Whether information and details are shown.
        is_json: Whether each record is a line of JSON.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_verbose = self.is_json = self.is_entered = False

    def show(self, *, verbose: bool = False, as_json: bool = False) -> None:
        """Show more, or show it as JSON, from now on."""
        self.is_verbose |= verbose
        self.is_json |= as_json
        if self.is_entered:
            self._set_levels()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        line = as_json(record) if self.is_json else as_text(record, self.is_verbose)
        tqdm.write(line, file=sys.stderr)  # which removes a bar from the screen and draws it again

    def _set_levels(self) -> None:
        ROOT.setLevel(logging.DEBUG if self.is_verbose else logging.WARNING)
        PROGRESS.setLevel(logging.NOTSET if self.is_verbose else logging.INFO)

    def __enter__(self) -> Self:
        self.is_entered = True
        ROOT.addHandler(self)
        self._set_levels()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_entered = False
        ROOT.removeHandler(self)
        for logger in (ROOT, PROGRESS):
            logger.setLevel(logging.NOTSET)


def is_json() -> bool:
    """Whether stderr takes lines of JSON, so that bars would disturb them."""
    return any(isinstance(handler, Console) and handler.is_json for handler in ROOT.handlers)


def as_text(record: logging.LogRecord, with_time: bool) -> str:
    """A record as people read it."""
    message = record.getMessage()
    if record.levelno >= logging.WARNING:
        return f"{'Error' if record.levelno >= logging.ERROR else 'WARNING'}: {message}"
    return f"[{record.relativeCreated / 1000:8.2f} s] {message}" if with_time else message


def own_fields(record: logging.LogRecord) -> dict[str, Any]:
    """The fields that a record was given where it was made. The names of those that a library adds, such as Ray, begin
    with an underscore."""
    return {name: value for name, value in record.__dict__.items() if name not in STANDARD and not name.startswith("_")}


def as_json(record: logging.LogRecord) -> str:
    """A record as a line of JSON: time, level, message, and the record's own fields."""
    fields = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "message": record.getMessage(),
        **own_fields(record),
    }
    return json.dumps(fields, default=str)
