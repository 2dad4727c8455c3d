"""Wanforge in programs of Ray.

The names in `__all__` are imported when they are first used, so `import wanforge.ray` itself loads neither PyTorch nor
Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanforge.ray.generate import Generate

__all__ = ["Generate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wanforge.ray' has no attribute {name!r}")
    from wanforge.ray import generate

    return getattr(generate, name)
