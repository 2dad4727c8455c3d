"""The reference as a backend: every graph runs as the piece of the reference network that it was traced from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle, dit_component
from wanforge.engines.bundle.manifest import HOST_GRAPHS
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.host import on_host
from wanforge.runtime.backends.taps import ATTENTION, Taps, tapped
from wanforge.runtime.graphs import Graph, graphs
from wanforge.runtime.memory.arena import Runnable, Unbounded
from wanforge.runtime.memory.device_weights import DeviceWeights, fitting
from wanforge.runtime.memory.estimate import needed_device_bytes
from wanforge.runtime.memory.plan import RESERVE
from wanforge.runtime.memory.weights import Weights
from wanforge.runtime.schedule import GraphRun

Runner = Callable[[Mapping[str, Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


CPU = torch.device("cpu")


def gpu_or_cpu() -> torch.device:
    """A GPU if PyTorch sees one, otherwise the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else CPU


class TorchBackend(Backend):
    """PyTorch in eager mode, by default on the CPU."""

    name = "torch"
    rounds_at: Collection[str] = (ATTENTION,)

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None, device: torch.device = CPU) -> None:
        self.device = device
        self.dtype = dtype or (torch.float32 if device == CPU else torch.bfloat16)
        self.weights = Weights(bundle)
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.memory = Unbounded(self.device, self.dtype, self.weight)
        self.on_device = DeviceWeights(self.upload)
        self._clip: ClipShape | None = None

    def files(self) -> list[str]:
        return self.weights.files()

    def prepare(self, clip: ClipShape) -> None:
        """Decide which weights stay on the GPU between the stages of a request and from one request to the next."""
        if self.device == CPU or clip == self._clip:
            return
        model, recipe = self.weights.bundle.model, self.weights.bundle.recipe
        needed = RESERVE + needed_device_bytes(model, recipe, clip, self.dtype.itemsize)
        stages = {"text": ["text_encoder"], "denoise": list(map(dit_component, model.experts)), "decode": ["vae"]}
        sizes = {stage: sum(map(self.device_bytes, used)) for stage, used in stages.items()}
        self.on_device.keep(
            component for stage in fitting(sizes, self.free_bytes() - needed) for component in stages[stage]
        )
        self._clip = clip

    def device_bytes(self, component: str) -> int:
        """The bytes that a component's weights take on the GPU."""
        on_host = {name for graph in HOST_GRAPHS for name in self.graphs[graph].weights}
        tensors = self.weights.component(component)
        return sum(tensor.nbytes for name, tensor in tensors.items() if name not in on_host)

    def free_bytes(self) -> int:
        """The bytes of the GPU's memory that are free, or hold weights of this backend."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached + self.on_device.bytes()

    def upload(self, stored: Tensor) -> Tensor:
        """Copy a tensor to the GPU."""
        return stored.to(self.device)

    def weight(self, graph_run: GraphRun, name: str) -> Tensor:
        """A weight of a graph run, on the device that computes with it."""
        stored = self.weights.of(graph_run, name)
        if self.device == CPU:
            return stored
        return self.on_device.get(graph_run.component, graph_run.prefix + name, stored)

    def state(self, graph_run: GraphRun) -> dict[str, Tensor]:
        """The weights of a graph run, named as in its graph."""
        return self.memory.weights(graph_run, self.graphs[graph_run.graph].weights)

    def runner(self, graph: Graph) -> Runner:
        """The function that computes a graph from its weights and inputs."""
        return graph.run

    def bind(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        graph = self.graphs[graph_run.graph]
        if self.device != CPU and graph.name in HOST_GRAPHS:
            return on_host(graph, partial(self.weights.of, graph_run), inputs, outputs)
        compute, state = self.runner(graph), self.state(graph_run)

        def run() -> None:
            with torch.inference_mode():
                for buffer, result in zip(outputs, compute(state, inputs), strict=True):
                    buffer.copy_(result)

        return run

    def synchronise(self) -> None:
        if self.device != CPU:
            torch.cuda.synchronize(self.device)

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        graph = self.graphs[graph_run.graph]
        with torch.inference_mode(), tapped(graph.owner, forced or {}) as found:
            (found[graph.outputs[0].name],) = graph.run(self.state(graph_run), inputs)
        return found
