"""What the processes of the service log: records as lines on stderr, as text or as JSON."""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Literal

from wanforge.logs import ROOT, Console, as_json, own_fields

Style = Literal["text", "json"]

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that end lines or move a terminal's cursor, with which a client could forge records."""


def begin(style: Style) -> None:
    """Log information, warnings and errors from now on, in place of the command line's log."""
    for logger in (ROOT, logging.root):
        for handler in list(logger.handlers):
            if isinstance(handler, Console) or isinstance(handler.formatter, Lines):
                logger.removeHandler(handler)
    lines = logging.StreamHandler()
    lines.setFormatter(Lines(style))
    logging.root.addHandler(lines)
    ROOT.setLevel(logging.INFO)


class Lines(logging.Formatter):
    """Writes a record as one line. As text, the lines of a traceback follow it, indented."""

    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.style == "json":
            if trace:
                record.exception = trace  # which makes it one of the record's own fields
            return as_json(record)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = own_fields(record)
        more = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in fields.items())
        line = f"{time} {record.levelname.lower()} {record.getMessage()}{more}"
        return "\n    ".join(CONTROL.sub(escaped, each) for each in [line, *trace.splitlines()])


def escaped(found: re.Match[str]) -> str:
    """A character as Python writes it in a string."""
    return repr(found[0])[1:-1]
