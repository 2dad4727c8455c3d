"""Copies weights into the slots of an arena while a device computes.

Copies are started by a thread of the device's own, because pinning and packing the weights of a layer, or staging them
from a mapped file, takes the host much longer than launching the layer does.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from wanforge.host.capacity import available_bytes
from wanforge.runtime.memory.device import Device, Event
from wanforge.runtime.memory.residency import Group, GroupName

KEPT_FREE = 4_000_000_000
"""Bytes of the machine's memory that are never pinned."""


class CopyingMover:
    """Has a device copy groups into slots.

    Groups that are copied more than once are kept packed in pinned memory as long as there is enough of it.

    Args:
        slots: The memory of each slot.
        source: Returns a tensor of a component by its name.
        returning: Groups that will be copied more than once.
        packed: Where those groups are kept packed.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[Tensor],
        source: Callable[[str, str], Tensor],
        returning: frozenset[GroupName],
        packed: dict[GroupName, Tensor],
    ) -> None:
        self.device, self.slots, self.source, self.returning, self.packed = device, slots, source, returning, packed
        self._ready: dict[int, Future[Event]] = {}
        # Work that used this memory before the slots existed must also finish before a slot is written.
        self._released: dict[int, Event] = dict.fromkeys(range(len(slots)), device.mark())

    def fetch(self, slot: int, group: Group) -> None:
        self._ready[slot] = self.device.prepare(partial(self._copy, slot, group, self._released[slot]))

    @torch.inference_mode()
    def _copy(self, slot: int, group: Group, after: Event) -> Event:
        return self.device.copy(self._pairs(slot, group), after)

    def _pairs(self, slot: int, group: Group) -> list[tuple[Tensor, Tensor]]:
        memory = self.slots[slot]
        if group.name in self.returning and group.name not in self.packed:
            self._pack(group)
        if group.name in self.packed:
            return [(memory[: group.bytes], self.packed[group.name])]
        return self._tensors(group, memory)

    def _pack(self, group: Group) -> None:
        """Keep a copy of a group in pinned memory if there is enough of it."""
        if available_bytes() <= group.bytes + KEPT_FREE or (packed := self.device.pinned(group.bytes)) is None:
            return
        for view, tensor in self._tensors(group, packed):
            view.copy_(tensor)
        self.packed[group.name] = packed

    def _tensors(self, group: Group, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of a group, after its place in some memory."""
        return [(view, self.source(group.name.component, name)) for name, view in group.views(memory).items()]

    def wait(self, slot: int) -> None:
        if slot in self._ready:
            self.device.wait(self._ready.pop(slot).result())

    def release(self, slots: Iterable[int]) -> None:
        self._released |= dict.fromkeys(slots, self.device.mark())
