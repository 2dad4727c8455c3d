"""How ranks give one another tensors: not at all if there is one, and with torch.distributed between processes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed


class Exchange(Protocol):
    """What a rank needs of the others. All ranks call it in the same order.

    Attributes:
        rank: The number of this rank, from 0 on.
        ranks: How many there are.
    """

    rank: int
    ranks: int

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Give each rank a piece, and get one from each.

        Args:
            pieces: What each rank is given, all of one type.
            shapes: The shape of what each rank gives to this one.

        Returns:
            What each rank gave, in the type of `pieces`.
        """
        ...


class Alone:
    """The exchange of a process that computes everything itself."""

    rank, ranks = 0, 1

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return list(pieces)


class ProcessGroup:
    """The exchange of a process in the default group of torch.distributed, which is made before the first exchange: of
    NCCL for tensors on GPUs, of gloo for those on the host. On the meta device nothing is exchanged but shapes."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        wanted = [torch.empty(shape, dtype=pieces[0].dtype, device=pieces[0].device) for shape in shapes]
        if pieces[0].device.type == "meta":
            return wanted
        # As bytes, tensors of any type can be exchanged by any library.
        given = [piece.contiguous().view(torch.uint8).flatten() for piece in pieces]
        sizes = [each.nbytes for each in wanted]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=pieces[0].device)
        distributed.all_to_all_single(received, torch.cat(given), sizes, [len(each) for each in given])
        return [
            part.view(like.dtype).view(like.shape) for part, like in zip(received.split(sizes), wanted, strict=True)
        ]
