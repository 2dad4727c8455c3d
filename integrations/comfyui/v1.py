"""The nodes for versions of ComfyUI without the V3 API."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .definition import CATEGORY, Input, Node
from .host import EarlierHost
from .nodes import NODES

NAMES = {"dynamic_prompts": "dynamicPrompts"}
"""The options that V1 calls otherwise."""


def node_class(node: Node) -> type:
    """The class that ComfyUI knows a node as."""

    def inputs(cls: type) -> dict[str, dict[str, Any]]:
        given: dict[str, dict[str, Any]] = {"required": {}}
        for each in node.inputs:
            given.setdefault("optional" if each.optional else "required", {})[each.id] = input_of(each)
        return given

    def run(self: Any, **inputs: Any) -> tuple[Any, ...]:
        outputs: tuple[Any, ...] = waited_for(node.run, EarlierHost(), **inputs)
        return outputs

    members: dict[str, Any] = {
        "CATEGORY": CATEGORY,
        "DESCRIPTION": node.description,
        "FUNCTION": "run",
        "RETURN_TYPES": tuple(each.kind for each in node.outputs),
        "RETURN_NAMES": tuple(each.name for each in node.outputs),
        "OUTPUT_TOOLTIPS": tuple(each.tooltip for each in node.outputs),
        "INPUT_TYPES": classmethod(inputs),
        "run": run,
    }
    if (fingerprint := node.fingerprint) is not None:
        members["IS_CHANGED"] = classmethod(lambda cls, **inputs: waited_for(fingerprint, **inputs))
    return type(node.id, (), members)


def input_of(one: Input) -> tuple[str, dict[str, Any]]:
    """An input as V1 has it."""
    return one.kind, {"tooltip": one.tooltip, **{NAMES.get(name, name): value for name, value in one.options.items()}}


def waited_for(function: Callable[..., Awaitable[Any]], *arguments: Any, **inputs: Any) -> Any:
    """What a coroutine returns. It runs in a thread, because there may be an event loop in this one, and in this one's
    context, by which ComfyUI knows whose progress it is."""

    async def called() -> Any:
        return await function(*arguments, **inputs)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, asyncio.run, called()).result()


NODE_CLASS_MAPPINGS = {node.id: node_class(node) for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.id: node.title for node in NODES}
