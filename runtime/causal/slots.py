"""What a stream remembers, where attention reads it: a slot of memory for each frame."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from wanforge.configs.causal import CachePolicy
from wanforge.plugins.rms_norm_rope.reference import rotate
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.reference.causal.chunks import Span
from wanforge.runtime.reference.causal.network import KeysValues
from wanforge.runtime.reference.causal.window import View, Window
from wanforge.runtime.reference.dit import rope_tables


class KVSlots:
    """The keys and values of a stream in buffers at fixed addresses, if frames keep their times; what chunks see is
    what `KVCache` has them see.

    The order of keys means nothing to attention, so a frame stays in its slot for as long as it is seen, and its slot
    goes to another frame after that. What is not seen is masked by the caller. Keys are rotated once, when the chunk
    is remembered.

    Attributes:
        count: The slots.
        area: The tokens of a frame.

    Args:
        grid: Rows and columns of a frame's tokens.
        past: Each layer's keys and values, ``[1, slots * rows * columns, H, K]``, zeros at first.
        backend: Whose memory that is.
    """

    def __init__(
        self, policy: CachePolicy, grid: tuple[int, int], past: Sequence[KeysValues], backend: Backend
    ) -> None:
        assert not policy.moves
        self.window, self.grid, self.past, self.backend = Window(policy), grid, past, backend
        self._check = backend.lease()
        self.area = grid[0] * grid[1]
        self.count = past[0].keys.shape[1] // self.area
        self.slots: dict[int, int] = {}

    def view(self, chunk: Span, *, cut: bool = False) -> View:
        """What a chunk sees; see `Window.view`."""
        return self.window.view(chunk, cut=cut)

    def seen(self, view: View) -> list[int]:
        """The slots of what a chunk sees."""
        return sorted(self.slots[frame] for frame in view.frames)

    def read(self, view: View) -> Iterable[KeysValues]:
        """Nothing is yielded and nothing done, because the network reads what a chunk sees where it is kept.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        with self.backend.turn():
            self._check()
        return ()

    def append(self, chunk: Span, own: Sequence[KeysValues], *, cut: bool = False) -> None:
        """Remember a chunk by its own keys, not rotated, and values, and forget what the policy does not keep.

        Raises:
            ResourceError: Another request has taken the memory.
        """
        times = self.view(chunk, cut=cut).own
        with self.backend.turn():
            self._check()
            self.window.append(chunk, cut=cut)
            self._release(self.window.frames)
            self._take(chunk.frames)
            tables = rope_tables((len(times), *self.grid), self.past[0].keys.device, times)
            for past, each in zip(self.past, own, strict=True):
                self._write(past.values, chunk.frames, each.values)
                self._write(past.keys, chunk.frames, rotate(each.keys, *tables))

    def _release(self, frames: Iterable[int]) -> None:
        """Give up the slots of all other frames."""
        kept = set(frames)
        self.slots = {frame: slot for frame, slot in self.slots.items() if frame in kept}

    def _take(self, frames: Iterable[int]) -> None:
        """Give each frame the first slot that is free, so that the last slots stay empty for as long as they can."""
        free = iter(sorted(set(range(self.count)) - set(self.slots.values())))
        self.slots |= {frame: next(free) for frame in frames}

    def _write(self, slots_BPHK: Tensor, frames: Iterable[int], x_BLHK: Tensor) -> None:
        """Put frames into their slots."""
        for frame, of_frame in zip(frames, x_BLHK.split(self.area, 1), strict=True):
            start = self.slots[frame] * self.area
            slots_BPHK[:, start : start + self.area].copy_(of_frame)
