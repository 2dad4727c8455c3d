"""ONNX Runtime: runs the exported graphs on the CPU, with the weights bound directly from the mapped bundle."""

from collections.abc import Collection, Mapping, Sequence

import onnxruntime as ort
import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle, graph_name
from wanforge.engines.bundle.remedies import export_command, remedy
from wanforge.errors import BundleError
from wanforge.host.library_errors import OUT_OF_MEMORY
from wanforge.plugins.low_rank import filled_rank
from wanforge.runtime.backends.arena_backend import ArenaBackend
from wanforge.runtime.backends.onnx_taps import FORCED, Opened, open_at_taps
from wanforge.runtime.backends.taps import ATTENTION, Taps
from wanforge.runtime.dtypes import ONNX_NUMBERS
from wanforge.runtime.memory.arena import Runnable
from wanforge.runtime.memory.device import Host
from wanforge.runtime.schedule import GraphRun

FATAL = 4


class OrtBackend(ArenaBackend):
    """ONNX Runtime's CPU provider. It has no bfloat16 arithmetic, so graphs are float32 or float16.

    Args:
        budget: The most bytes that weights and buffers may use; without it, all weights stay in the mapped bundle. The
            memory that ONNX Runtime allocates for intermediate tensors is not included.
    """

    name = "ort"
    rounds_at: Collection[str] = (ATTENTION,)

    def __init__(self, bundle: Bundle, dtype: torch.dtype | None, budget: float | None = None) -> None:
        if dtype == torch.bfloat16:
            raise BundleError("ONNX Runtime computes in float32 or float16 on a CPU, not in bfloat16")
        super().__init__(bundle, Host(), dtype or torch.float32, budget)
        self._graph_sessions: dict[str, ort.InferenceSession] = {}
        self._opened: dict[str, tuple[Opened, ort.InferenceSession]] = {}

    def files(self) -> list[str]:
        side_path = self.bundle.graphs(self.dtype, side_path=True)
        return [*self.weights.files(), *map(self.file, self.graphs), *side_path]

    def side_rank(self, needed: int, clip: ClipShape | None = None) -> int:
        return filled_rank(needed) if self.bundle.graphs(self.dtype, side_path=True) else 0

    def file(self, name: str) -> str:
        """A graph's path in the bundle.

        Raises:
            BundleError: Another version of wanforge exported it, with other inputs.
        """
        graph = self.graphs[name]
        path = graph_name(graph.name, self.dtype, graph.has_constants)
        record = self.bundle.manifest.files.get(path)
        expected = {port.name for port in graph.inputs} | graph.factors.keys()
        if record is not None and (record.graph is None or record.graph.inputs.keys() != expected):
            raise BundleError(
                f"{self.bundle.root}: {path} was exported by another version of wanforge, with other inputs; "
                f"run: {export_command(self.bundle.root)}"
            )
        return path

    def graph_session(self, name: str) -> ort.InferenceSession:
        """The session of a graph, created on first use."""
        own = self.graphs[name].name
        if own not in self._graph_sessions:
            self._graph_sessions[own] = self._open(name, str(self.bundle.path(self.file(name))))
        return self._graph_sessions[own]

    def _open(self, name: str, model: str | bytes) -> ort.InferenceSession:
        """Create the session of a graph, given its path or its contents.

        Raises:
            BundleError: ONNX Runtime refuses the graph, for instance because its data lies outside of the bundle.
        """
        try:
            return new_session(model)
        except Exception as error:  # those of ONNX Runtime have no class in common
            if not type(error).__module__.startswith("onnxruntime") or OUT_OF_MEMORY.search(str(error)):
                raise
            path, root = self.file(name), self.bundle.root
            reason = str(error).rpartition("[ONNXRuntimeError]")[2].split(" : ", 3)[-1].splitlines()[0]
            raise BundleError(f"{root}: ONNX Runtime refuses {path} ({reason}); {remedy(path, root)}") from None

    def bind_graph(self, graph_run: GraphRun, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Runnable:
        session = self.graph_session(graph_run.graph)
        binding = self.bound_inputs(session, graph_run, inputs)
        for port, buffer in zip(self.graphs[graph_run.graph].outputs, outputs, strict=True):
            bind(binding.bind_output, port.name, buffer)
        return lambda: session.run_with_iobinding(binding)

    def bound_inputs(
        self, session: ort.InferenceSession, graph_run: GraphRun, inputs: Sequence[Tensor]
    ) -> ort.IOBinding:
        """A binding of the inputs and weights of a graph run."""
        graph, binding = self.graphs[graph_run.graph], session.io_binding()
        for port, buffer in zip(graph.inputs, inputs, strict=True):
            bind(binding.bind_input, port.name, buffer)
        if not graph.has_constants:
            for name, weight in self.memory.weights(graph_run, graph.weights).items():
                bind(binding.bind_input, name, weight)
        return binding

    def taps(self, graph_run: GraphRun, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None) -> Taps:
        assert forced is not None, "an opened graph reads every one of its taps"
        graph, (opened, session) = self.graphs[graph_run.graph], self.opened(graph_run.graph)
        binding = self.bound_inputs(session, graph_run, inputs)
        given = {value: forced[tap].to(self.dtype).contiguous() for tap, value in opened.taps.items()}
        for value, tensor in given.items():
            bind(binding.bind_input, value + FORCED, tensor)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, map(torch.from_numpy, binding.copy_outputs_to_cpu()), strict=True))
        return {tap: found[value] for tap, value in [*opened.taps.items(), *((p.name, p.name) for p in graph.outputs)]}

    def opened(self, name: str) -> tuple[Opened, ort.InferenceSession]:
        """A graph opened at its taps, and its session."""
        graph = self.graphs[name]
        if graph.name not in self._opened:
            opened = open_at_taps(self.bundle.path(self.file(name)), graph.weights)
            self._opened[graph.name] = opened, self._open(name, opened.model)
        return self._opened[graph.name]


def new_session(model: str | bytes) -> ort.InferenceSession:
    """Create a session for an ONNX file, given its path or its contents."""
    options = ort.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = torch.get_num_threads()  # one number for both, which whoever shares a machine sets
    # The sessions take turns, so threads that spin while they wait would only slow each other down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bind(bind_port: "type[ort.IOBinding.bind_input]", name: str, buffer: Tensor) -> None:
    """Bind a tensor's memory to a port without copying it."""
    bind_port(name, "cpu", 0, ONNX_NUMBERS[buffer.dtype], list(buffer.shape), buffer.data_ptr())
