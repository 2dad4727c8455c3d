"""The weights in a GPU's memory, for backends that have no memory plan."""

from collections.abc import Callable, Iterable, Mapping
from weakref import WeakValueDictionary

from torch import Tensor


class DeviceWeights:
    """Weights on a device, each copied there once for all graph runs that are bound to it.

    Those of the components that stay are held from then on. The others leave the device with the last graph run that is
    bound to them, which is at the end of their stage.

    Args:
        upload: Copies a tensor to the device.
    """

    def __init__(self, upload: Callable[[Tensor], Tensor]) -> None:
        self.upload = upload
        self.staying: frozenset[str] = frozenset()
        self._present: WeakValueDictionary[tuple[str, str], Tensor] = WeakValueDictionary()
        self._held: dict[tuple[str, str], Tensor] = {}

    def keep(self, components: Iterable[str]) -> None:
        """Let these components stay from now on, and no others."""
        self.staying = frozenset(components)
        self._held = {place: tensor for place, tensor in self._present.items() if place[0] in self.staying}

    def get(self, component: str, name: str, stored: Tensor) -> Tensor:
        """A weight on the device.

        Args:
            stored: The weight on the host.
        """
        place = component, name
        found = self._present.get(place)
        if found is None:
            found = self._present[place] = self.upload(stored)
            if component in self.staying:
                self._held[place] = found
        return found

    def bytes(self) -> int:
        """The bytes that the weights take on the device now."""
        return sum(tensor.nbytes for tensor in self._present.values())


def fitting(sizes: Mapping[str, int], available: float) -> list[str]:
    """The stages whose weights can stay on a device, the largest first, while those of any other stage fit beside them.

    Args:
        sizes: Bytes of the weights of each stage.
        available: Bytes for weights, without what the stages need besides them.
    """
    chosen: list[str] = []
    for stage in sorted(sizes, key=lambda stage: -sizes[stage]):
        asked = [*chosen, stage]
        passing = max((size for other, size in sizes.items() if other not in asked), default=0)
        if sum(sizes[each] for each in asked) + passing <= available:
            chosen = asked
    return chosen
