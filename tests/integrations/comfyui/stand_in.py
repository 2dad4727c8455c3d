"""A stand-in for ComfyUI: the names that the nodes use, and an executor of workflows in the API's form.

It follows what ComfyUI's documentation says of them; ``test_comfyui.py`` runs workflows in ComfyUI itself.
"""

import asyncio
import importlib.util
import io as bytes_io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.processes import ROOT
from tests.video_reader import read_video

PACKAGE = ROOT / "integrations/comfyui"
WIDGET = {"default", "socketless", "force_input"}
OPTIONS = {
    "INT": {*WIDGET, "min", "max", "step", "control_after_generate", "display_mode"},
    "FLOAT": {*WIDGET, "min", "max", "step", "round", "display_mode"},
    "STRING": {*WIDGET, "multiline", "placeholder", "dynamic_prompts"},
    "BOOLEAN": {*WIDGET, "label_on", "label_off"},
}
"""What the V3 API lets each widget be told, besides what every input has."""


executing: ContextVar[str] = ContextVar("executing", default="")
"""The node that runs, by which ComfyUI knows whose progress it is."""


class InterruptProcessingException(Exception):  # noqa: N818, ComfyUI's name
    """The user has interrupted the workflow."""


@dataclass
class Port:
    """An input or an output."""

    kind: str
    id: str | None
    told: dict[str, Any]


def io_type(kind: str) -> Any:
    """A type of the V3 API."""
    allowed = {"display_name", "optional", "tooltip", "lazy", "extra_dict", *OPTIONS.get(kind, ())}

    def made_input(id: str, **told: Any) -> Port:
        assert not told.keys() - allowed, (kind, told)
        return Port(kind, id, told)

    def made_output(id: str | None = None, **told: Any) -> Port:
        assert not told.keys() - {"display_name", "tooltip", "is_output_list"}, told
        return Port(kind, id, told)

    return SimpleNamespace(Input=made_input, Output=made_output, io_type=kind)


@dataclass
class Schema:
    """What a node is. Ids have to be unlike each other, those of outputs as well, if they have any."""

    node_id: str
    display_name: str
    category: str
    description: str
    inputs: list[Port]
    outputs: list[Port]

    def __post_init__(self) -> None:
        ids = [each.id for each in [*self.inputs, *self.outputs] if each.id is not None]
        assert len(ids) == len(set(ids)), ids


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args


class VideoFromFile:
    """A VIDEO in memory."""

    def __init__(self, file: bytes_io.BytesIO) -> None:
        self.data = file.getvalue()

    def get_components(self) -> Any:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            path.write_bytes(self.data)
            properties, frames = read_video(path)
        return SimpleNamespace(images=frames.float() / 255, frame_rate=properties["fps"])


@dataclass
class ComfyUI:
    """A ComfyUI with the nodes in it.

    Attributes:
        nodes: The classes of the nodes, by id.
        shown: What the nodes have shown: how far they are, and a picture or None.
        ran: The ids of the nodes of the workflow that ran, as opposed to those that were remembered.
        on_show: Called after something was shown.
    """

    is_modern: bool
    has_execution: bool = True
    nodes: dict[str, Any] = field(default_factory=dict)
    shown: list[tuple[float, Any]] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    remembered: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    interrupted: threading.Event = field(default_factory=threading.Event)
    on_show: Any = None
    package: Any = None

    def show(self, value: float, picture: Any) -> None:
        assert executing.get(), "ComfyUI would not know whose progress this is"
        self.shown.append((value, picture))
        if self.on_show is not None:
            self.on_show()

    def check(self) -> None:
        if self.interrupted.is_set():
            self.interrupted.clear()
            raise InterruptProcessingException

    def run(self, workflow: dict[str, Any], node: str) -> tuple[Any, ...]:
        """The outputs of a node of a workflow, for which those that it needs run unless they are remembered."""
        self.ran = []
        return self._run(workflow, node)[1]

    def _run(self, workflow: dict[str, Any], node: str) -> tuple[str, tuple[Any, ...]]:
        asked = workflow[node]
        kind, inputs, seen = self.nodes[asked["class_type"]], {}, {}
        for name, value in asked["inputs"].items():
            if isinstance(value, list):
                signature, outputs = self._run(workflow, value[0])
                inputs[name], seen[name] = outputs[value[1]], [signature, value[1]]
            else:
                inputs[name] = seen[name] = value
        constants = {name: None if isinstance(asked["inputs"][name], list) else value for name, value in inputs.items()}
        signature = json.dumps([asked["class_type"], seen, self._fingerprint(kind, constants)], sort_keys=True)
        if signature not in self.remembered:
            self.ran.append(node)
            self.remembered[signature] = self.execute(asked["class_type"], inputs)
        return signature, self.remembered[signature]

    def _fingerprint(self, kind: Any, inputs: dict[str, Any]) -> Any:
        if not self.is_modern:
            return kind.IS_CHANGED(**inputs) if hasattr(kind, "IS_CHANGED") else None
        return asyncio.run(kind.fingerprint_inputs(**inputs)) if hasattr(kind, "fingerprint_inputs") else None

    def execute(self, name: str, inputs: dict[str, Any]) -> tuple[Any, ...]:
        """The outputs of a node."""
        kind = self.nodes[name]
        token = executing.set(name)
        try:
            return self._executed(kind, inputs)
        finally:
            executing.reset(token)

    def _executed(self, kind: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
        if self.is_modern:
            outputs = asyncio.run(kind.execute(**inputs)).args
        else:

            async def in_a_loop() -> Any:
                return getattr(kind(), kind.FUNCTION)(**inputs)

            outputs = asyncio.run(in_a_loop())  # a node of V1 may be called where a loop runs
        assert isinstance(outputs, tuple)
        return outputs

    def modules(self) -> dict[str, ModuleType]:
        """The modules that the nodes import."""
        api = {"set_progress": lambda value, max_value, preview_image=None: self.show(value, preview_image)}
        sync = SimpleNamespace(**({"execution": SimpleNamespace(**api)} if self.has_execution else {}))
        kinds = {name.title(): io_type(name) for name in ("INT", "FLOAT", "STRING", "BOOLEAN", "IMAGE", "VIDEO")}
        node = type("ComfyNode", (), {})
        told = {"Schema": Schema, "ComfyNode": node, "NodeOutput": NodeOutput, "Custom": io_type, **kinds}
        bar = lambda total: SimpleNamespace(  # noqa: E731
            update_absolute=lambda value, total, preview: self.show(value, preview and preview[1])
        )
        implementations = SimpleNamespace(VideoFromFile=VideoFromFile)
        contents: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.utils": {"ProgressBar": bar},
            "comfy.model_management": {"throw_exception_if_processing_interrupted": self.check},
            "comfy_api": {},
            "comfy_api.input_impl": {"VideoFromFile": VideoFromFile},
        }
        if self.is_modern:
            contents["comfy_api.v0_0_2"] = {
                "ComfyExtension": object,
                "ComfyAPISync": lambda: sync,
                "InputImpl": implementations,
                "io": SimpleNamespace(**told),
            }
        return {name: module(name, members) for name, members in contents.items()}


def module(name: str, members: dict[str, Any]) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package="." not in name)
    made.__path__ = []  # type: ignore[attr-defined]
    vars(made).update(members)
    return made


@contextmanager
def started(*, is_modern: bool = True, has_execution: bool = True) -> Iterator[ComfyUI]:
    """A ComfyUI that has imported the nodes in the way that it imports custom nodes."""
    found = ComfyUI(is_modern, has_execution)
    before = dict(sys.modules)
    name = "/home/ann/ComfyUI/custom_nodes/wanforge"
    sys.modules.update(found.modules())
    try:
        spec = importlib.util.spec_from_file_location(name, PACKAGE / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        found.package = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found.package)
        found.nodes = nodes_of(found.package)
        yield found
    finally:
        for added in sys.modules.keys() - before.keys():
            if added.startswith((name, "comfy")):
                del sys.modules[added]


def nodes_of(package: Any) -> dict[str, Any]:
    """The classes of the nodes, from what ComfyUI looks for first."""
    if hasattr(package, "NODE_CLASS_MAPPINGS"):
        assert package.NODE_CLASS_MAPPINGS.keys() == package.NODE_DISPLAY_NAME_MAPPINGS.keys()
        return dict(package.NODE_CLASS_MAPPINGS)

    async def listed() -> list[Any]:
        return list(await (await package.comfy_entrypoint()).get_node_list())

    return {each.define_schema().node_id: each for each in asyncio.run(listed())}


def image(width: int, height: int) -> torch.Tensor:
    """An IMAGE whose pixels are unlike one another, float32 ``[1, H, W, 3]``."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack([rows, columns, 1 - rows], -1)[None]
