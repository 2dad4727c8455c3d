"""The code that decides what plugins do, by which engines are recognised that were built with other code."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from wanforge.plugins.tensorrt.plugin import BLOCK, OPS
from wanforge.version import PACKAGE

IN_GLUON = (
    *("tensor_memory_attention", "tensor_memory_linear", "warp_attention", "warp_linear"),
    *("warpgroup_attention", "warpgroup_linear"),
)
"""Folders of kernels that take the place of those of other folders on some architectures."""
OF_ALL = (
    *("block_quantiser", "launching", "nvfp4_linear", "quantiser", "row_moments", "tensor_map", "tensorrt"),
    *("warp_moments", "workspace"),
)
"""Folders that every plugin works with."""
IN_BLOCK = "dense_attention", "gated_residual", "layer_norm", "low_rank", "rms_norm_rope"
"""Folders of kernels that only the plugin of a whole block launches."""


def plugin_sources(plugins: Sequence[str] = OPS) -> list[Path]:
    """The files that decide what the plugins of these folders do, sorted."""
    in_block = IN_BLOCK if BLOCK in plugins else ()
    folders = [PACKAGE / "plugins" / name for name in (*OF_ALL, *IN_GLUON, *in_block, *plugins)]
    files = [*(PACKAGE / "plugins").glob("*.py"), PACKAGE / "configs" / "tiles.toml"]
    return sorted([*files, *(file for folder in folders for file in folder.glob("*.py"))])


@cache
def plugin_digest(plugins: tuple[str, ...] = OPS) -> str:
    """Digest of the code that decides what plugins do: an engine stores their attributes and their workspace sizes."""
    digest = hashlib.sha256()
    for path in plugin_sources(plugins):
        digest.update(f"{path.relative_to(PACKAGE)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
