"""Random weights of realistic scale for every tensor of a component, drawn by several threads."""

import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from wanforge.engines.bundle.tensorfile import TensorSpec
from wanforge.exporter.checkpoint.layout import Layout
from wanforge.plugins.quantiser import TILE
from wanforge.plugins.quantiser.reference import quantise_tiles
from wanforge.runtime.dtypes import STORED

PIECE = 1 << 20
"""About how many random elements are drawn at a time. They fit into a processor's cache."""

Result = TypeVar("Result")


@contextmanager
def random_tensors(component: str, specs: Layout, seed: int) -> Iterator[Callable[[str], Iterator[Tensor]]]:
    """Within the ``with`` block, random values of realistic scale for each tensor, by name, in the order of the file.
    The file's other tensors do not affect them.

    An 8-bit weight and its scales are quantised from the same draw, which happens when the weight is asked for.
    """
    scales: dict[str, list[Tensor]] = {}

    def kept(name: str, drawn: tuple[Tensor, Tensor | None]) -> Tensor:
        values, scale = drawn
        if scale is not None:
            scales.setdefault(f"{name.rpartition('.')[0]}.scale", []).append(scale)
        return values

    def values(name: str) -> Iterator[Tensor]:
        if name in scales:
            return iter(scales.pop(name))
        return (kept(name, next(drawn)) for _ in bands(specs[name].shape))

    wanted = [name for name in specs if not is_scale(name, specs)]
    jobs = (job for name in wanted for job in draws(component, name, specs[name], seed))
    with in_parallel(jobs) as drawn:
        yield values


def is_scale(name: str, specs: Layout) -> bool:
    """Whether a tensor holds the scales of an 8-bit weight."""
    stem, _, leaf = name.rpartition(".")
    return leaf == "scale" and f"{stem}.int8_weight" in specs


@contextmanager
def in_parallel(jobs: Iterator[Callable[[], Result]]) -> Iterator[Iterator[Result]]:
    """Within the ``with`` block, the results of some jobs in their order, computed by as many threads as there are
    processors. They are ahead of what is taken, but not far, so that memory stays small."""
    threads = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of PyTorch's own in each of these
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="draw") as pool:
            waiting = deque(pool.submit(job) for job in islice(jobs, 2 * threads))

            def results() -> Iterator[Result]:
                while waiting:
                    done = waiting.popleft().result()
                    waiting.extend(pool.submit(job) for job in islice(jobs, 1))
                    yield done

            try:
                yield results()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(before)


def bands(shape: tuple[int, ...]) -> list[int]:
    """How many rows of a tensor are drawn at a time: whole bands of tiles."""
    rows = max(1, PIECE // math.prod(shape[1:]) // TILE) * TILE
    return [min(rows, shape[0] - start) for start in range(0, shape[0], rows)]


def draws(
    component: str, name: str, spec: TensorSpec, seed: int
) -> Iterator[Callable[[], tuple[Tensor, Tensor | None]]]:
    """The draws of one tensor, in flat pieces, each with the scales if the tensor is an 8-bit weight, from a normal
    distribution that suits its role. Each piece has a generator of its own."""
    stem, _, leaf = name.rpartition(".")
    is_quantised = leaf == "int8_weight"
    plain = f"{stem}.weight" if is_quantised else name
    first = zlib.crc32(f"{seed}/{component}/{plain}".encode())
    mean, deviation = scale_of(plain, spec.shape)
    columns = math.prod(spec.shape[1:])

    def draw(rows: int, seed: int) -> tuple[Tensor, Tensor | None]:
        values = torch.randn(rows * columns, generator=torch.Generator().manual_seed(seed)).mul_(deviation).add_(mean)
        if is_quantised:
            return quantise_tiles(values.to(torch.bfloat16).unflatten(0, (rows, columns)))
        return values.to(STORED[spec.dtype]), None

    return (partial(draw, rows, first + index) for index, rows in enumerate(bands(spec.shape)))


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """The mean and standard deviation of a tensor: unit gain through each layer, norms near one, small biases."""
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or ("norm" in name.split(".")[-2] and leaf == "weight"):
        return 1.0, 0.1
    if leaf == "bias":
        return 0.0, 0.02
    if leaf == "modulation":
        return 0.0, 0.3
    if name.startswith("token_embedding"):
        return 0.0, 1.0
    if ".pos_embedding." in name:
        return 0.0, 0.5
    if name.startswith("decoder.head.2"):
        # Pixels lie in [-1, 1]; four levels of upsampling would otherwise leave that range.
        return 0.0, math.prod(shape[1:]) ** -0.5 * 0.3
    if ".attn.q." in name:
        # umT5 does not scale its logits: the scale is in the query weights.
        return 0.0, shape[1] ** -0.5 * 0.25
    return 0.0, math.prod(shape[1:]) ** -0.5
