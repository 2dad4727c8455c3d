"""What a node is, apart from how a version of ComfyUI wants to be told."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

CATEGORY = "wanforge"
MODEL, SETTINGS = "WANFORGE_MODEL", "WANFORGE_SETTINGS"
"""The types of what goes from a node of this package to another."""

Run = Callable[..., Awaitable[tuple[Any, ...]]]
"""Takes a `host.Host` and the inputs by name, and returns the outputs in order."""


@dataclass(frozen=True)
class Input:
    """An input of a node: a socket, or a widget with its default and its limits.

    Attributes:
        kind: ComfyUI's name of its type, such as ``INT``.
        options: What the widget is told; the names are those of ComfyUI's V3 API.
    """

    id: str
    kind: str
    tooltip: str
    optional: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """An output of a node."""

    name: str
    kind: str
    tooltip: str


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        id: How workflows name it; it never changes.
        title: What people see.
        run: What it does.
        fingerprint: Makes, of its inputs, something that changes if the outputs would, although no input does.
    """

    id: str
    title: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    run: Run
    fingerprint: Callable[..., Awaitable[str]] | None = None
