"""Compile TurboDiffusion's distilled Wan video models and run them.

The names in `__all__` are imported when they are first used, so `import wanforge` itself loads no PyTorch.
"""

import logging
from typing import TYPE_CHECKING, Any

from wanforge.errors import WanforgeError
from wanforge.version import __version__

if TYPE_CHECKING:
    from wanforge.api import Bundle, Clip, Pipeline, build, export, import_checkpoint, load, parity
    from wanforge.library.wan_pipeline import WanforgePipeline

__all__ = [
    "Bundle",
    "Clip",
    "Pipeline",
    "WanforgeError",
    "WanforgePipeline",
    "__version__",
    "build",
    "export",
    "import_checkpoint",
    "load",
    "parity",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # whoever imports wanforge decides what is shown


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wanforge' has no attribute {name!r}")
    if name == "WanforgePipeline":
        from wanforge.library import wan_pipeline

        return getattr(wan_pipeline, name)
    from wanforge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
