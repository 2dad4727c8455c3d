"""The factors of what LoRAs add beside a denoiser's quantised linears, in the form in which backends multiply by them.

The factors of several LoRAs lie side by side, filled up with zeros to one rank for all layers. Scales and strengths are
multiplied into the upper factor, which is rounded to bfloat16 after that.

Letters: N outputs, K inputs, R the rank.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from wanforge.errors import RequestError
from wanforge.plugins.low_rank import DOWN, UP
from wanforge.runtime.lora.merging import Addition


class SidePath:
    """What LoRAs add beside the linears of a denoiser.

    Args:
        additions: Their products, by canonical name of the unquantised weight.
    """

    def __init__(self, additions: Mapping[str, Sequence[Addition]]) -> None:
        self.additions = additions
        self._kept: dict[int, dict[str, Tensor]] = {}

    @cached_property
    def rank(self) -> int:
        """The least rank that holds all of them; 0 if there are none."""
        ranks = [sum(each.record.rank or 0 for each in added) for added in self.additions.values()]
        return max(ranks, default=0)

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """Both factors of every layer, filled up to a rank, by canonical name. They are read once and kept.

        Raises:
            RequestError: With their strengths, values are no finite numbers in bfloat16.
            CheckpointError: A file was truncated.
        """
        if rank not in self._kept:
            self._kept[rank] = {
                f"{target.removesuffix('.weight')}.{part}": factor
                for target, added in self.additions.items()
                for part, factor in zip((DOWN, UP), _factors(target, added, rank), strict=True)
            }
        return self._kept[rank]


def _factors(target: str, added: Sequence[Addition], rank: int) -> tuple[Tensor, Tensor]:
    """``[R, K]`` and ``[N, R]`` of a layer, in bfloat16."""
    found = [(each, each.record.a_RK) for each in added]
    columns, rows = next(a_RK.shape[1] for _, a_RK in found if a_RK is not None), added[0].record.b_NR.shape[0]
    down_RK, up_NR = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((rank, columns), (rows, rank)))
    start = 0
    for each, a_RK in found:
        assert a_RK is not None
        stop, factor = start + a_RK.shape[0], each.strength * each.record.scale
        down_RK[start:stop] = a_RK.stored_rows()
        b_NR = each.record.b_NR.stored_rows()
        up_NR[:, start:stop] = b_NR if factor == 1 else factor * b_NR.float()
        start = stop
    down_RK[start:], up_NR[:, start:] = 0, 0
    if not (_is_finite(down_RK) and _is_finite(up_NR)):
        raise RequestError(
            f"with these LoRAs factors of {target} have values that are no finite numbers in bfloat16; make their "
            "strengths smaller"
        )
    return down_RK, up_NR


def _is_finite(x: Tensor) -> bool:
    """Whether all values are finite numbers. The largest and the smallest one tell, in a single pass without copies."""
    return bool(torch.isfinite(torch.stack(x.aminmax())).all())
