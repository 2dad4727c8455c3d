"""How long-running work reports its progress."""

from typing import Protocol


class Progress(Protocol):
    """Called with a stage, the amount done and the total amount; `unit` is ``"B"`` if bytes are counted."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> object: ...


def silent(stage: str, done: int, total: int, unit: str = "", /) -> None:
    """Show nothing."""


class ByteCount:
    """Counts the bytes of one stage and reports them as progress."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self.progress, self.stage, self.total, self.done = progress, stage, total, 0

    def __call__(self, amount: int) -> None:
        """Count `amount` more bytes."""
        self.done += amount
        self.progress(self.stage, self.done, self.total, "B")
