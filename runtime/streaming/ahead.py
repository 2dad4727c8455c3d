"""An iterator that a thread runs ahead of whoever asks for what it yields."""

from collections.abc import Iterable, Iterator
from threading import Condition, Thread
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Takes the next item from a source in a thread, before it is asked for. Only one is taken ahead: the one after it
    is begun when it has been handed over.

    The thread begins with the first item that is asked for. It is a daemon, so that whoever forgets to call `close`
    can still end the process.

    Args:
        source: Is iterated in the thread alone. Its error reaches whoever asks for the next item.
        name: What the thread is called.
    """

    def __init__(self, source: Iterable[Item], name: str) -> None:
        self._source = source
        self._ready: list[Item] = []
        self._changed = Condition()
        self._error: Exception | None = None
        self._is_begun = self._is_closed = self._is_over = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        with self._changed:
            if not self._is_begun and not self._is_closed:
                self._is_begun = True
                self._thread.start()
            self._changed.wait_for(lambda: self._ready or self._is_over or self._is_closed)
            if self._is_closed:
                raise StopIteration
            if self._ready:
                self._changed.notify_all()
                return self._ready.pop()
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        """End the thread, once the source has yielded what it is at; nothing is yielded any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._is_begun:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._hand_over(item):
                    break
        except Exception as error:
            self._error = error
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _hand_over(self, item: Item) -> bool:
        """Wait until an item has been taken; whether another one is wanted."""
        with self._changed:
            self._ready.append(item)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._ready or self._is_closed)
            return not self._is_closed
