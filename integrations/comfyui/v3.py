"""The nodes for ComfyUI's V3 API."""

from typing import Any

from comfy_api.v0_0_2 import ComfyExtension, io

from .definition import CATEGORY, Input, Node, Output
from .host import ModernHost
from .nodes import NODES

TYPES = {
    "INT": io.Int,
    "FLOAT": io.Float,
    "STRING": io.String,
    "BOOLEAN": io.Boolean,
    "IMAGE": io.Image,
    "VIDEO": io.Video,
}


class WanforgeExtension(ComfyExtension):
    """All nodes of this package."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node_class(node) for node in NODES]


async def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI when it starts."""
    return WanforgeExtension()


def node_class(node: Node) -> type[io.ComfyNode]:
    """The class that ComfyUI knows a node as."""

    class Made(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(node)

        @classmethod
        async def execute(cls, **inputs: Any) -> io.NodeOutput:
            return io.NodeOutput(*await node.run(ModernHost(), **inputs))

    class Watched(Made):
        @classmethod
        async def fingerprint_inputs(cls, **inputs: Any) -> str:
            assert node.fingerprint is not None
            return await node.fingerprint(**inputs)

    found = Made if node.fingerprint is None else Watched
    found.__name__ = found.__qualname__ = node.id
    return found


def schema(node: Node) -> io.Schema:
    """What ComfyUI is told of a node."""
    return io.Schema(
        node_id=node.id,
        display_name=node.title,
        category=CATEGORY,
        description=node.description,
        inputs=[input_of(each) for each in node.inputs],
        outputs=[output_of(each) for each in node.outputs],
    )


def input_of(one: Input) -> Any:
    return type_of(one.kind).Input(one.id, optional=one.optional, tooltip=one.tooltip, **one.options)


def output_of(one: Output) -> Any:
    # The API wants ids that are unlike those of the inputs, and makes such ids by itself.
    return type_of(one.kind).Output(display_name=one.name, tooltip=one.tooltip)


def type_of(kind: str) -> Any:
    return TYPES[kind] if kind in TYPES else io.Custom(kind)
