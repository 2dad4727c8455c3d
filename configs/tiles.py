"""How each kernel is cut on each architecture: the table in ``tiles.toml``."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from wanforge.configs.loading import CONFIGS, Record, load


class Tile(Record, frozen=True):
    """How a kernel is cut on some architectures."""

    sms: Annotated[list[int], Meta(min_length=1)]
    num_warps: Literal[1, 2, 4, 8, 16]
    num_stages: Annotated[int, Meta(ge=1, le=8)]
    reason: str
    blocks: dict[str, int] = msgspec.field(default_factory=dict)
    """Constants of the kernel that set the sizes of its tile."""


class _Tiles(Record, frozen=True):
    tiles: dict[str, dict[str, list[Tile]]]


def load_tiles() -> dict[str, list[Tile]]:
    """The tile table: the rows of each kernel, by its name ``<op>.<function>``."""
    table = load(CONFIGS / "tiles.toml", _Tiles).tiles
    return {f"{op}.{function}": rows for op, functions in table.items() for function, rows in functions.items()}


def tiled_architectures() -> list[int]:
    """Every architecture for which the table has a row, in ascending order."""
    return sorted({sm for rows in load_tiles().values() for row in rows for sm in row.sms})
