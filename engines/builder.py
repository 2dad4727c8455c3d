"""Compiling an ONNX graph into an engine. TensorRT-RTX serves several architectures and needs no GPU."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanforge.engines.files import FLAGS
from wanforge.engines.sizes import ShapeRange
from wanforge.errors import ResourceError, WanforgeError
from wanforge.plugins.tensorrt.library import RTX, Library
from wanforge.plugins.tensorrt.plugin import Account, PluginOp, registered
from wanforge.progress import Progress, silent

if TYPE_CHECKING:
    from wanforge.plugins.launching.launch import Launch

Shape = tuple[int, ...]
OVERHEAD = 500_000_000
"""Bytes that every build takes for the library, its kernels' sources, and PyTorch, which plans plugins."""
PER_CONSTANT = 3.1
"""Bytes that a build takes per byte of constants, measured with 3 GB of them."""


@dataclass(frozen=True)
class BuildJob:
    """One engine to build.

    Attributes:
        ranges: The shapes of the inputs that have dynamic dimensions in the ONNX file. If all three shapes are equal,
            the engine is made for that one.
        constant_bytes: Bytes of the weights that the file points at.
    """

    onnx: Path
    ranges: Mapping[str, ShapeRange]
    constant_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """An estimate of the memory that building takes."""
        return OVERHEAD + int(PER_CONSTANT * self.constant_bytes)


PRODUCTS = {"gemm", "fully_connected", "correlation", "runtime_fusion"}
"""Kinds of layers that multiply matrices or convolve; ``runtime_fusion`` also contains the ops that follow."""


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine, as the builder lists it.

    Attributes:
        kind: ``kgen`` is generated code, ``custom_layer`` a plugin, and others are kernels of the library.
        inputs, outputs: Element types: ``BFloat16``, ``Float``, ``Int8``, ``FP4E2M1``.
        constants: Element types of the constants that are built in.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def is_plugin(self) -> bool:
        return self.kind == "custom_layer"

    @property
    def is_attention(self) -> bool:
        return "mha" in self.tactic

    @property
    def is_fp4_product(self) -> bool:
        """Whether it multiplies 4-bit floats by 4-bit floats."""
        return self.is_product and self.inputs.count("FP4E2M1") == 2

    @property
    def is_product(self) -> bool:
        """Whether it is a product, a convolution or an attention of the library, and should run on tensor cores."""
        return self.kind in PRODUCTS or self.is_attention


@dataclass(frozen=True)
class Built:
    """The result of compiling one graph.

    Attributes:
        engine_bytes: The engine, as it is kept on disk.
        layers: The layers into which the builder fused the graph.
        activation_bytes: Bytes of its intermediate tensors, including plugins' workspaces, as the builder reports them.
        plugin_nodes: How many nodes of the graph became plugins.
    """

    engine_bytes: bytes
    layers: tuple[Layer, ...]
    activation_bytes: int
    plugin_nodes: int
    calls: tuple[tuple[PluginOp, tuple[tuple[Shape, str], ...]], ...] = ()
    """The distinct plugins among them, with the largest inputs that each will have."""

    def launches(self, sms: Sequence[int]) -> list["Launch"]:
        """The launches of the plugins on some architectures, for the ahead-of-time compiler."""
        return [planned.launch for op, inputs in self.calls for sm in sms for planned in op.plan(inputs, sm).launches]


def build(
    library: Library,
    job: BuildJob,
    sms: Sequence[int],
    *,
    plugins: bool = True,
    progress: Progress = silent,
) -> Built:
    """Compile one graph.

    Args:
        library: TensorRT-RTX, which compiles for every architecture in `sms`, or TensorRT, for the GPU in this machine.
        plugins: Whether ops run as kernels; otherwise their ONNX bodies are compiled.

    Raises:
        WanforgeError: The library refuses the graph; the message is the library's, or the plugin's if one refused.
    """
    trt = library.trt
    log = logger(trt)
    with ExitStack() as stack:
        account = stack.enter_context(registered(library)) if plugins else Account()
        builder = trt.Builder(log)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(job.onnx)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise refusal(library, job, "cannot read", [*account.refusals, *errors])
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if library.flavour is RTX:
            for flag in FLAGS:
                config.set_flag(getattr(trt.BuilderFlag, flag))
            config.num_compute_capabilities = len(sms)
            for place, sm in enumerate(sms):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), place)
        set_shapes(trt, builder, network, config, job)
        config.progress_monitor = monitor = monitor_of(trt, progress)
        taken = layer_types(network).count(trt.LayerType.PLUGIN_V3)
        engine = builder.build_serialized_network(network, config)
        del monitor
        if engine is None or account.refusals:  # the library goes on without the workspace of a refusing plugin
            raise refusal(library, job, "cannot compile", [*account.refusals, *log.errors])
        return Built(bytes(engine), tuple(layers(log.table)), log.activation_bytes, taken, tuple(account.calls))


def layer_types(network: Any) -> list[Any]:
    """The type of every layer of a network."""
    return [network.get_layer(i).type for i in range(network.num_layers)]


def set_shapes(trt: Any, builder: Any, network: Any, config: Any, job: BuildJob) -> None:
    """Give every input its shape: the only one, or a range of them.

    A graph that quantises to 4-bit floats keeps its dynamic dimensions even where they have one value: TensorRT-RTX
    1.7.1 settles the kind of scales when it reads the graph, and refuses it if their shapes change afterwards.

    Raises:
        WanforgeError: The job lacks an input, or contradicts the file.
    """
    profile, is_dynamic = builder.create_optimization_profile(), False
    stays_dynamic = any(layer == trt.LayerType.DYNAMIC_QUANTIZE for layer in layer_types(network))
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        declared = tuple(tensor.shape)
        wanted = job.ranges.get(tensor.name)
        if wanted is None:
            if -1 in declared:
                raise WanforgeError(f"{job.onnx}: no shape is given for {tensor.name} {declared}")
            continue
        for shape in (wanted.least, wanted.usual, wanted.most):
            if len(shape) != len(declared) or any(d not in (-1, n) for d, n in zip(declared, shape, strict=True)):
                raise WanforgeError(f"{job.onnx}: {tensor.name} is {declared}, which cannot be {shape}")
        if wanted.least == wanted.most and not stays_dynamic:
            tensor.shape = wanted.usual
        else:
            profile.set_shape(tensor.name, wanted.least, wanted.usual, wanted.most)
            is_dynamic = True
    if is_dynamic:
        config.add_optimization_profile(profile)


def refusal(library: Library, job: BuildJob, what: str, reasons: Sequence[str]) -> WanforgeError:
    """The error for a graph that does not compile."""
    reasons = list(dict.fromkeys(reasons)) or ["it gives no reason"]
    error = ResourceError if any("memory" in reason.lower() for reason in reasons) else WanforgeError
    return error(f"{library} {what} {job.onnx.name}: {reasons[0].strip()}")


TYPE = re.compile(r"Datatype: (\w+)")
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+)")


def layers(table: str) -> Iterator[Layer]:
    """The layers in the table that the builder prints after fusing."""
    for line in table.splitlines():
        if line.startswith("Name: ") and "LayerType: " in line:
            name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
            kind = rest.partition(",")[0]
            before, _, after = rest.partition("Outputs: [")
            given, _, constants = before.partition("Constants: [")
            tactic = after.partition("TacticName: ")[2].partition(",")[0]
            yield Layer(name, kind, tactic, *(tuple(TYPE.findall(part)) for part in (given, after, constants)))


def logger(trt: Any) -> Any:
    """A logger that keeps what a build is judged by: errors, the table of layers, and the size of the activations."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.table = ""
            self.activation_bytes = 0

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.table += message
            elif found := ACTIVATIONS.search(message):
                self.activation_bytes = int(found[1])

    return Log()


def monitor_of(trt: Any, progress: Progress) -> Any:
    """A monitor that passes on the builder's progress."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.totals:
                progress(phase, step + 1, self.totals[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()
