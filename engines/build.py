"""Building the engines of a bundle from its files alone: which are missing, what each needs, how well it is fused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from wanforge.configs.clip import ClipShape
from wanforge.configs.recipe import Recipe
from wanforge.configs.targets import architecture, architecture_name
from wanforge.engines.build_process import build_apart
from wanforge.engines.builder import BuildJob, Built
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import HOST_GRAPHS, GraphRecord
from wanforge.engines.bundle.remedies import export_command
from wanforge.engines.files import engine_key, engine_name, inputs_of, is_current, write_engine
from wanforge.engines.graph_key import check_current
from wanforge.engines.sizes import depends_on_clip, named_sizes, profile, shape_ranges
from wanforge.errors import BundleError, ConfigError, ResourceError, WanforgeError
from wanforge.host.capacity import available_bytes
from wanforge.plugins.denoiser_block.op import has_plugin
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.plugins.tensorrt.library import TENSORRT, Flavour, Library
from wanforge.plugins.tensorrt.plugin import ALL_OPS, OPS
from wanforge.progress import Progress, silent

DTYPE = "bfloat16"
"""The type that engines compute in."""


@dataclass(frozen=True)
class EngineOptions:
    """Which engines to build.

    Attributes:
        clip: The clip size and length that they are for.
        sms: Architectures that one engine serves.
        only: Names of graphs; empty for all of them.
        plugins: Whether ops run as kernels; otherwise their ONNX bodies are compiled.
        kernels: Whether to also compile the kernels that plugins launch, into this machine's cache. Graphs with plugins
            are then always built again, to find out which kernels those are.
        smaller: Whether engines also serve smaller and shorter clips.
        side_rank: The rank of products beside quantised linears, for LoRAs; None builds no engines with them.
        block_plugin: Whether the graph ``block`` is taken as one op, whose plugin makes all launches.
    """

    clip: ClipShape
    sms: tuple[int, ...]
    only: tuple[str, ...] = ()
    plugins: bool = True
    kernels: bool = False
    smaller: bool = False
    side_rank: int | None = None
    block_plugin: bool = False


@dataclass(frozen=True)
class PendingEngine:
    """An engine as it would be built now.

    Attributes:
        name: Its path in the bundle.
        key: Everything that it depends on.
        plugins: The folders of the ops that may run as plugins.
    """

    graph: GraphRecord
    name: str
    key: dict[str, str]
    job: BuildJob
    plugins: tuple[str, ...]


@dataclass(frozen=True)
class EngineResult:
    """The result of building one engine, or of finding it in the bundle.

    Attributes:
        seconds: Time that building took; zero if it existed already.
        faults: The ways in which it is not fused as it should be.
        kernels: How many kernels its plugins launch, over all architectures; zero if they were not asked for.
    """

    name: str
    graph: str
    sms: tuple[int, ...]
    bytes: int
    layers: int
    plugins: int
    activation_bytes: int
    seconds: float = 0.0
    is_cached: bool = False
    faults: list[str] = field(default_factory=list)
    kernels: int = 0


def build_engines(
    bundle: Bundle,
    library: Library,
    options: EngineOptions,
    *,
    progress: Progress = silent,
    done: Callable[[EngineResult], object] = lambda engine: None,
) -> list[EngineResult]:
    """Build the engines of a bundle that are missing or stale. Each is saved as soon as it is built.

    Args:
        progress: Called with the graph, the number of steps done in the builder's phase, and their total.
        done: Called with each engine, whether it was built or found.

    Raises:
        WanforgeError: A graph is missing, or does not compile.
        ConfigError: An architecture lacks the recipe's number format.
        ResourceError: There is too little memory.
    """
    check_gpu(library.flavour, options.sms)
    check_formats(bundle.recipe, options.sms)
    results = []
    wanted = graphs_to_build(bundle, options.only, options.side_rank, block_plugin=options.block_plugin)
    for index, (onnx, graph) in enumerate(wanted.items(), 1):
        pending = pending_engine(bundle, library, options, onnx, graph)
        if is_needed(bundle, options, pending):
            title = f"{graph.name} ({index} of {len(wanted)})"
            result = build_engine(bundle, library, options, pending, retitled(progress, title))
        else:
            result = found_engine(bundle, pending, options.sms)
        results.append(result)
        done(result)
    return results


def is_needed(bundle: Bundle, options: EngineOptions, pending: PendingEngine) -> bool:
    """Whether an engine has to be built: it is missing or stale, or its kernels, which building names, are wanted."""
    return (options.kernels and bool(pending.plugins)) or not is_current(bundle, pending.name, pending.key)


def check_gpu(flavour: Flavour, sms: tuple[int, ...]) -> None:
    """Refuse to build with TensorRT for any GPU other than the one in this machine. TensorRT-RTX builds for every GPU.

    Raises:
        ResourceError: The GPU here has another architecture, or there is none.
    """
    if flavour is not TENSORRT:
        return
    import torch

    here = architecture(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    if (here,) != sms:
        found = "no GPU" if here is None else f"one with {architecture_name(here)}"
        raise ResourceError(
            f"TensorRT builds only on a GPU of the target architecture, and this machine has {found}; "
            "build on such a GPU"
        )


def check_formats(recipe: Recipe, sms: tuple[int, ...]) -> None:
    """Refuse a recipe whose number format TensorRT does not multiply, and architectures whose tensor cores lack it.

    Raises:
        ConfigError: TensorRT does not, or one of them does.
    """
    if recipe.vae == "int8":
        raise ConfigError(
            f"TensorRT cannot run the decoder of recipe {recipe.name!r}, whose convolutions are in int8. Run the "
            "bundle with --backend cuda, or import the checkpoint with a recipe whose decoder is in bfloat16, such as "
            "w8a8"
        )
    if not recipe.has_engines:
        raise ConfigError(
            f"TensorRT multiplies the 8-bit floats of recipe {recipe.name!r} in bfloat16, so engines would gain "
            "nothing. Run the bundle with --backend cuda, or import the checkpoint with --recipe w8a8"
        )
    if old := [sm for sm in sms if sm < recipe.first_sm]:
        raise ConfigError(
            f"{architecture_name(old[0])} cannot multiply {recipe.linear}, the format of recipe {recipe.name!r}; "
            f"{architecture_name(recipe.first_sm)} is the first architecture that can. Import the checkpoint with "
            "--recipe w8a8 for this GPU"
        )


def retitled(progress: Progress, title: str) -> Progress:
    """Progress that reports every stage under one title."""
    return lambda stage, done, total, unit="": progress(title, done, total, unit)


def graphs_to_build(
    bundle: Bundle, only: Sequence[str] = (), side_rank: int | None = None, *, block_plugin: bool = False
) -> dict[str, GraphRecord]:
    """The graphs that engines are built from, by path in the bundle.

    Args:
        side_rank: The rank of products beside quantised linears; None leaves out the graphs that have them.
        block_plugin: Whether the graph ``block`` is taken as one op.

    Raises:
        BundleError: The bundle has no such graphs.
        ConfigError: A name is not that of a graph, or that of one that has no engine, or a block is not one op.
    """
    graphs = bundle.graphs(DTYPE)
    if not graphs:
        raise BundleError(
            f"{bundle.root}: has no bf16 graphs to build engines from, or they were exported by another version of "
            f"wanforge; run: {export_command(bundle.root)}"
        )
    if side_rank:
        graphs |= bundle.graphs(DTYPE, side_path=True)
    if on_host := HOST_GRAPHS.intersection(only):
        raise ConfigError(f"the graph {on_host.pop()} runs on the host and has no engine; leave it out")
    graphs = {onnx: graph for onnx, graph in graphs.items() if graph.name not in HOST_GRAPHS}
    known = [graph.name for graph in graphs.values()]
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(f"no graph is called {unknown[0]!r}; known: {', '.join(known)}")
    found = {onnx: graph for onnx, graph in graphs.items() if not only or graph.name in only}
    if not block_plugin:
        return found
    if not any(graph.name == "block" for graph in found.values()):
        raise ConfigError("the graph block is not among those to build, so leave out --block-plugin")
    whole = bundle.graphs(DTYPE, one_op=True)
    if not whole and has_plugin(bundle.recipe) and not bundle.model.causal:
        raise BundleError(f"{bundle.root}: has no graph of a block as one op; run: {export_command(bundle.root)}")
    if not whole:
        raise ConfigError(
            f"a block of {bundle.model.name} with recipe {bundle.recipe.name!r} cannot be one plugin. That takes "
            "sparse attention, the recipe w8a8 or w8a8-row, and whole clips; leave out --block-plugin"
        )
    (one_op,) = whole.items()
    return dict(one_op if graph.name == "block" else (onnx, graph) for onnx, graph in found.items())


def pending_engine(
    bundle: Bundle, library: Library, options: EngineOptions, onnx: str, graph: GraphRecord
) -> PendingEngine:
    """What to build for a graph, what it depends on, and where it goes."""
    check_current(bundle, [onnx])
    bundle.verify([onnx, *([graph.weights] if graph.weights else [])])
    sizes = named_sizes(
        bundle.model, bundle.recipe, options.clip, smaller=options.smaller, side_rank=options.side_rank or 0
    )
    inputs, has_plugins = inputs_of(graph), options.plugins and graph.plugin_ops > 0
    plugins = (ALL_OPS if graph.is_one_op else OPS) if has_plugins else ()
    key = engine_key(
        bundle,
        library=str(library),
        sms=options.sms,
        onnx=onnx,
        weights=graph.weights,
        plugins=plugins,
        profile=profile(inputs, sizes),
    )
    name = engine_name(
        graph.name + (str(options.side_rank) if graph.has_side_path else ""),
        options.sms,
        options.clip if depends_on_clip(inputs) else None,
        smaller=options.smaller,
        bodies=graph.plugin_ops > 0 and not options.plugins,
    )
    constant_bytes = bundle.manifest.files[graph.weights].bytes if graph.weights else 0
    job = BuildJob(bundle.path(onnx), shape_ranges(inputs, sizes), constant_bytes)
    return PendingEngine(graph, name, key, job, plugins)


def found_engine(bundle: Bundle, pending: PendingEngine, sms: tuple[int, ...]) -> EngineResult:
    """The result for an engine that exists already."""
    record = bundle.manifest.files[pending.name]
    return EngineResult(pending.name, pending.graph.name, sms, record.bytes, *facts_in(record.facts), is_cached=True)


def facts_in(facts: Mapping[str, int]) -> tuple[int, int, int]:
    """The numbers of layers, plugins and activation bytes of an engine, in the order of `EngineResult`."""
    return facts["layers"], facts["plugins"], facts["activation_bytes"]


def build_engine(
    bundle: Bundle, library: Library, options: EngineOptions, pending: PendingEngine, progress: Progress
) -> EngineResult:
    """Build one engine and save it.

    Raises:
        WanforgeError: The graph does not compile.
        BundleError: The bundle was imported again in the meantime.
        ResourceError: There is too little memory.
    """
    check_memory(pending)
    start = perf_counter()
    try:
        built = build_apart(library, pending.job, options.sms, plugins=options.plugins, progress=progress)
    except WanforgeError:
        bundle.refresh()  # which tells if the graph is gone because the bundle was imported again
        raise
    facts = {
        "layers": len(built.layers),
        "plugins": built.plugin_nodes,
        "activation_bytes": built.activation_bytes,
    }
    write_engine(bundle, pending.name, built.engine_bytes, pending.key, facts)
    seconds = perf_counter() - start
    launches = built.launches(options.sms) if options.kernels and pending.plugins else []
    if launches:
        from wanforge.plugins.launching.compiler import compile_kernels

        compile_kernels(launches, cache_folder(), progress=progress)
    return EngineResult(
        pending.name,
        pending.graph.name,
        options.sms,
        len(built.engine_bytes),
        *facts_in(facts),
        seconds=seconds,
        faults=faults(built, pending.graph, plugins=options.plugins),
        kernels=len({launch.specialisation for launch in launches}),
    )


def faults(built: Built, graph: GraphRecord, *, plugins: bool = True) -> list[str]:
    """The ways in which an engine is not fused as it should be, so that it would run, but slowly.

    Args:
        plugins: Whether it was built with plugins.
    """
    found = []
    wanted = graph.plugin_ops if plugins else 0
    compiled = sum(layer.is_plugin for layer in built.layers)
    if not built.plugin_nodes == compiled == wanted:
        found.append(f"{wanted} ops should be plugins; {built.plugin_nodes} were taken and {compiled} compiled")
    attentions = sum(layer.is_attention for layer in built.layers)
    if attentions != graph.attentions:
        found.append(f"{attentions} of {graph.attentions} attentions are fused")
    products = sum(layer.is_fp4_product for layer in built.layers)
    if products != graph.fp4_products:
        found.append(f"{products} of {graph.fp4_products} linears are products of 4-bit floats")
    single = [layer.name for layer in built.layers if layer.is_product and set(layer.inputs) == {"Float"}]
    if single and not graph.float32_products and (plugins or not graph.plugin_ops):
        found.append(f"{len(single)} products in float32: {single[0]}")
    return found


def check_memory(pending: PendingEngine) -> None:
    """Refuse a build that will not fit in memory.

    Raises:
        ResourceError: It needs more memory than is free.
    """
    needed, free = pending.job.needed_bytes, available_bytes()
    if needed > free:
        raise ResourceError(
            f"building {pending.graph.name} takes about {needed / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} GB are free"
        )
