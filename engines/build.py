"""Which engines a clip needs, for which shapes, and what each must have been fused into."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from wanforge.configs.clip import PATCH, ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.builder import Built, Job, Range, build
from wanforge.engines.bundle.bundle import Bundle, graph_name, weights_name
from wanforge.engines.files import engine_key, engine_name, find_engine, is_current, size_text, write_engine
from wanforge.engines.plugin_check import check_plugins
from wanforge.errors import ResourceError
from wanforge.plugins.launching.compiler import compile_kernels
from wanforge.plugins.launching.cubins import cache_folder
from wanforge.plugins.launching.launch import Launch
from wanforge.plugins.tensorrt.library import Library
from wanforge.runtime.graphs import Graph, Port, Size, graphs
from wanforge.runtime.memory.host import available_bytes
from wanforge.runtime.memory.residency import HOST_GRAPHS
from wanforge.runtime.reference.dit import attention_blocks

LEAST_CLIP = {"tokens": 1, "latent_height": PATCH, "latent_width": PATCH}
"""Sizes that follow from a clip, and their least. An engine has one of each, unless it is for smaller clips, too."""
USUAL_PROMPT = 128
"""Tokens of text that engines are made best for."""

SINGLE_PRECISION = {"time", "head"}
"""Graphs that the reference computes in float32."""

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Sizes:
    """The least, usual and most that a named size can be."""

    least: int
    usual: int
    most: int

    def __str__(self) -> str:
        return size_text(self.least, self.most)


@dataclass(frozen=True)
class Engine:
    """What came of one engine.

    Attributes:
        seconds: that building took; nothing where it was there already.
        faults: where it is not fused as it should be.
        kernels: how many its plugins launch, over all architectures; known where they were asked for.
    """

    name: str
    graph: str
    sms: tuple[int, ...]
    bytes: int
    seconds: float = 0.0
    layers: int = 0
    plugins: int = 0
    activation_bytes: int = 0
    is_cached: bool = False
    faults: list[str] = field(default_factory=list)
    kernels: int = 0


def sizes(model: ModelConfig, recipe: Recipe, clip: ClipShape, *, smaller: bool = False) -> dict[str, Sizes]:
    """Every named size: the clip's own, and ranges for what a request decides.

    Args:
        smaller: whether the clip is only the largest of those that are meant.
    """
    rows, blocks = model.dit.text_rows, attention_blocks(recipe)
    keys = 1 if blocks is None else blocks.num_keys(clip.tokens)
    fixed = {"tokens": clip.tokens, "latent_height": clip.latent_height, "latent_width": clip.latent_width}
    return {
        **{name: Sizes(LEAST_CLIP[name] if smaller else n, n, n) for name, n in fixed.items()},
        "prompt_tokens": Sizes(1, min(USUAL_PROMPT, rows), rows),
        "context_rows": Sizes(1, min(USUAL_PROMPT, rows), rows),
        "slots": Sizes(1, max(1, int(model.topk * keys)), keys),
    }


def names_in(ports: Iterable[Port]) -> set[str]:
    """The named sizes of some ports."""
    return {name for port in ports for dim in port.shape if isinstance(dim, Size) for name in dim.names}


def profile(graph: Graph, known: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """The sizes that a graph's inputs depend on."""
    return {name: known[name] for name in sorted(names_in(graph.inputs))}


def ranges(graph: Graph, known: Mapping[str, Sizes]) -> dict[str, Range]:
    """The shapes of a graph's dynamic inputs."""
    least, usual, most = ({name: getattr(n, part) for name, n in known.items()} for part in ("least", "usual", "most"))
    return {
        port.name: Range(port.concrete(least), port.concrete(usual), port.concrete(most))
        for port in graph.inputs
        if names_in([port])
    }


def expected_plugins(graph: str, recipe: Recipe) -> int:
    """How many nodes of a graph are ops of this project's."""
    is_quantised, is_sparse = recipe.linear != "bf16", recipe.attention != "dense"
    return {"block": 8 * is_quantised + is_sparse, "cross_kv": 2 * is_quantised}.get(graph, 0)


def expected_attentions(graph: str, recipe: Recipe) -> int:
    """How many attentions of a graph the library has a fused kernel for."""
    return {"block": 1 + (recipe.attention == "dense"), "text_block": 1}.get(graph, 0)


def faults(built: Built, graph: str, recipe: Recipe, *, plugins: bool = True) -> list[str]:
    """Where an engine is not fused as it should be: it would run, and slowly.

    Args:
        plugins: whether it was built with them.
    """
    found = []
    ops = expected_plugins(graph, recipe)
    wanted = ops if plugins else 0
    compiled = sum(layer.is_plugin for layer in built.layers)
    if not built.plugin_nodes == compiled == wanted:
        found.append(f"{wanted} ops should be plugins; {built.plugin_nodes} were taken and {compiled} compiled")
    attentions = sum(layer.is_attention for layer in built.layers)
    if attentions != expected_attentions(graph, recipe):
        found.append(f"{attentions} fused attentions, of {expected_attentions(graph, recipe)}")
    single = [layer.name for layer in built.layers if layer.is_product and set(layer.inputs) == {"Float"}]
    if single and graph not in SINGLE_PRECISION and (plugins or not ops):
        found.append(f"{len(single)} products in float32: {single[0]}")
    return found


def build_engines(
    bundle: Bundle,
    clip: ClipShape,
    library: Library,
    sms: Sequence[int],
    *,
    only: Sequence[str] = (),
    plugins: bool = True,
    kernels: bool = False,
    smaller: bool = False,
    progress: Callable[[str, int, int], object] = lambda title, done, total: None,
    done: Callable[[Engine], object] = lambda engine: None,
) -> list[Engine]:
    """Build the engines of a bundle that are missing or stale. Each is kept as soon as it is made.

    Args:
        only: names of graphs; all by default.
        smaller: make engines that serve smaller and shorter clips as well.
        kernels: compile the kernels that plugins launch, into the cache of this machine. A graph
            with plugins is then built again to learn of them.
        progress: told the graph and the builder's phase, how many of its steps are done, and of how many.
        done: told of each engine, built or found.

    Raises:
        WanforgeError: a graph is missing, or does not compile.
        ResourceError: there is too little memory.
    """
    known, made = sizes(bundle.model, bundle.recipe, clip, smaller=smaller), []
    wanted = [graph for graph in graphs(bundle.model, bundle.recipe).values() if not only or graph.name in only]
    for index, graph in enumerate(wanted, 1):
        job, key, name = plan(bundle, graph, clip, known, library, sms, plugins, smaller)
        launches: list[Launch] = []
        has_plugins = plugins and expected_plugins(graph.name, bundle.recipe) > 0
        has_kernels = kernels and has_plugins
        if not has_kernels and is_current(bundle, name, key):
            record = bundle.manifest.files[name]
            engine = Engine(name, graph.name, tuple(sms), record.bytes, 0.0, *facts_of(record.facts), is_cached=True)
        else:
            check_memory(graph.name, job)
            if has_plugins:
                check_plugins(library.flavour, job.onnx)
            title, start = f"{graph.name} ({index} of {len(wanted)})", perf_counter()
            built = build(library, job, sms, plugins=plugins, progress=phases(progress, title))
            facts = {
                "layers": len(built.layers),
                "plugins": built.plugin_nodes,
                "activation_bytes": built.activation_bytes,
            }
            write_engine(bundle, name, built.plan, key, facts)
            seconds = perf_counter() - start
            if has_kernels:
                launches = built.launches(sms)
                compile_kernels(launches, cache_folder(), progress=progress)
            engine = Engine(
                name,
                graph.name,
                tuple(sms),
                len(built.plan),
                seconds,
                *facts_of(facts),
                faults=faults(built, graph.name, bundle.recipe, plugins=plugins),
                kernels=len({launch.specialisation for launch in launches}),
            )
        made.append(engine)
        done(engine)
    return made


def facts_of(facts: Mapping[str, int]) -> tuple[int, int, int]:
    """Layers, plugins and bytes of intermediate tensors of an engine, as `Engine` has them."""
    return facts["layers"], facts["plugins"], facts["activation_bytes"]


def phases(progress: Callable[[str, int, int], object], title: str) -> Callable[[str, int, int], object]:
    """The builder's phases under a graph's title."""
    return lambda phase, done, total: progress(title, done, total)


def plan(
    bundle: Bundle,
    graph: Graph,
    clip: ClipShape,
    known: Mapping[str, Sizes],
    library: Library,
    sms: Sequence[int],
    plugins: bool,
    smaller: bool = False,
) -> tuple[Job, dict[str, str], str]:
    """What to build for a graph, what it depends on, and where it goes."""
    onnx = graph_name(graph.name, DTYPE, graph.has_constants)
    bundle.verify([onnx])
    weights = weights_name("vae") if graph.has_constants else ""
    used, has_ops = names_in(graph.inputs), expected_plugins(graph.name, bundle.recipe) > 0
    key = engine_key(
        bundle,
        library=str(library),
        sms=sms,
        onnx=onnx,
        weights=weights,
        has_plugins=plugins and has_ops,
        profile=profile(graph, known),
    )
    constant_bytes = bundle.manifest.files[weights].bytes if weights else 0
    job = Job(bundle.path(onnx), ranges(graph, known), constant_bytes)
    of_clip = clip if used & {*LEAST_CLIP, "slots"} else None
    return job, key, engine_name(graph.name, sms, of_clip, smaller=smaller, bodies=has_ops and not plugins)


def engines_of(bundle: Bundle, clip: ClipShape, sm: int, dtype: object = DTYPE) -> dict[str, str]:
    """The engine of every graph that a clip takes on an architecture, by its path in the bundle; graphs that run on the
    host have none.

    Raises:
        BundleError: one is missing or stale.
    """
    known = sizes(bundle.model, bundle.recipe, clip)
    return {
        graph.name: find_engine(bundle, graph_name(graph.name, dtype, graph.has_constants), sm, profile(graph, known))
        for graph in graphs(bundle.model, bundle.recipe).values()
        if graph.name not in HOST_GRAPHS
    }


def check_memory(graph: str, job: Job) -> None:
    """Refuse a build that will not fit.

    Raises:
        ResourceError: it will not.
    """
    if job.needed_bytes > (free := available_bytes()):
        raise ResourceError(
            f"building {graph} takes about {job.needed_bytes / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )
