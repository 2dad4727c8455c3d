"""Engines on disk: their names, what each was made from, and reading them if they are current and undamaged."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.folder import inside
from wanforge.engines.bundle.manifest import HOST_GRAPHS, FileRecord, GraphRecord
from wanforge.engines.bundle.remedies import BODIES, ENGINE_NAME, ENGINES, UP_TO, build_command, remedy
from wanforge.engines.bundle.shapes import Shape, names_in, read_shape
from wanforge.engines.graph_key import check_current
from wanforge.engines.sizes import SIZES, covers, is_profile, named_sizes, profile
from wanforge.errors import BundleError, join_names
from wanforge.plugins.low_rank import LORA_RANK, SIDE_PATH
from wanforge.plugins.tensorrt.library import FLAVOURS, installed_version
from wanforge.plugins.tensorrt.plugin import ALL_OPS, OPS
from wanforge.plugins.tensorrt.sources import plugin_digest
from wanforge.whole_file import temporary_file

FLAGS = ("REQUIRE_USER_ALLOCATION",)
"""Set for TensorRT-RTX: memory allocated at run time is in no memory plan, and cannot be captured into a CUDA graph."""

NO_PLUGINS = "none"
"""What an engine's key says of the plugins if it has none."""


def engine_name(
    graph: str, sms: Sequence[int], clip: ClipShape | None, *, smaller: bool = False, bodies: bool = False
) -> str:
    """Path in a bundle of a graph's engine: ``engines/sm_89+sm_120/832x480x81/block.bf16.engine``.

    Args:
        graph: The graph's name, followed by the rank of its side path if it has one: ``block_lora64``.
        clip: The shape that the engine is for; None if it serves every shape.
        smaller: Whether it also serves smaller and shorter clips.
        bodies: Whether its ops are compiled from their ONNX bodies, although there are plugins for them.
    """
    folder = "+".join(f"sm_{sm}" for sm in sorted(sms))
    up_to = UP_TO if smaller else ""
    shape = "" if clip is None else f"{up_to}{clip.width_px}x{clip.height_px}x{clip.frames}/"
    return f"{ENGINES}{folder}/{shape}{graph}{BODIES if bodies else ''}.bf16.engine"


def engine_key(
    bundle: Bundle,
    *,
    library: str,
    sms: Sequence[int],
    onnx: str,
    weights: str,
    plugins: tuple[str, ...],
    profile: str,
) -> dict[str, str]:
    """Everything that an engine depends on, in a form that people can read.

    Args:
        library: Flavour and version.
        onnx: Path in the bundle of the graph.
        weights: Path in the bundle of the file that the graph points at; empty if it points at none.
        plugins: The folders of the ops that run as plugins.
        profile: The range of each named size; see `sizes.profile`.
    """
    files = bundle.manifest.files
    return {
        "library": library,
        "architectures": " ".join(map(str, sorted(sms))),
        "onnx": onnx,
        "graph": files[onnx].sha256[:16],
        "constants": f"{weights} {files[weights].sha256[:16]}" if weights else "",
        "plugins": plugin_digest(plugins) if plugins else NO_PLUGINS,
        "flags": " ".join(FLAGS),
        "recipe": bundle.recipe.name,
        "profile": profile,
    }


def stale_engines(bundle: Bundle) -> dict[str, str]:
    """Engines that would be built differently now, and the reasons."""
    engines = {name: record for name, record in bundle.manifest.files.items() if name.startswith(ENGINES)}
    reasons = {name: why_stale(bundle, record) for name, record in engines.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def why_stale(bundle: Bundle, record: FileRecord) -> str:
    """Why an engine would be built differently now; empty if it would not."""
    versions = {f"{flavour.name} {installed_version(flavour)}" for flavour in FLAVOURS if installed_version(flavour)}
    names = {version.partition(" ")[0] for version in versions}
    key, reasons = record.key, []
    library = key.get("library", "an unknown library")
    if library not in versions and library.partition(" ")[0] in names:
        installed = next(v for v in versions if v.partition(" ")[0] == library.partition(" ")[0])
        reasons.append(f"made by {library}, but {installed} is installed")
    graph = bundle.manifest.files.get(key.get("onnx", ""))
    if graph is None or graph.sha256[:16] != key.get("graph"):
        reasons.append(f"{key.get('onnx')} changed")
    constants, _, digest = key.get("constants", "").partition(" ")
    weights = bundle.manifest.files.get(constants)
    if constants and (weights is None or weights.sha256[:16] != digest):
        reasons.append(f"{constants} changed")
    if key.get("plugins") not in (NO_PLUGINS, plugin_digest(OPS), plugin_digest(ALL_OPS)):
        reasons.append("the plugins changed")
    if key.get("flags") != " ".join(FLAGS):
        reasons.append("the builder's flags changed")
    if key.get("recipe") != bundle.recipe.name:
        reasons.append("the recipe changed")
    if not is_complete(record):
        reasons.append("its record is not complete")
    return " and ".join(reasons)


def is_complete(record: FileRecord) -> bool:
    """Whether the record of an engine has all that its users read."""
    return (
        {"onnx", "architectures", "profile"} <= record.key.keys()
        and {"layers", "plugins", "activation_bytes"} <= record.facts.keys()
        and is_profile(record.key["profile"])
    )


def write_engine(bundle: Bundle, name: str, engine_bytes: bytes, key: dict[str, str], facts: Mapping[str, int]) -> None:
    """Put an engine into a bundle."""
    digest = hashlib.sha256(engine_bytes).hexdigest()
    record = FileRecord(digest, len(engine_bytes), source="wanforge build", key=key, facts=dict(facts))
    with temporary_file(inside(bundle.root, name)) as temporary:
        temporary.write_bytes(engine_bytes)
        bundle.add({name: record}, placing={name: temporary})


def built_clips(bundle: Bundle) -> list[ClipShape]:
    """The clip sizes and lengths that a bundle has engines for."""
    found = [match for name in bundle.manifest.files if (match := ENGINE_NAME.fullmatch(name)) and match["width"]]
    shapes = {tuple(int(match[part]) for part in ("width", "height", "frames")) for match in found}
    return [ClipShape(*shape) for shape in sorted(shapes)]


def inputs_of(graph: GraphRecord) -> dict[str, Shape]:
    """Shape of each input of a graph, except the weights.

    Raises:
        BundleError: A shape has sizes that no clip has.
    """
    shapes = {name: read_shape(spelling) for name, spelling in graph.inputs.items()}
    if unknown := names_in(shapes.values()) - SIZES:
        raise BundleError(
            f"the graph {graph.name} has inputs of unknown sizes ({join_names(sorted(unknown))}); it was exported by "
            "another version of wanforge, export the bundle again"
        )
    return shapes


def engines_of(
    bundle: Bundle, clip: ClipShape, sm: int, dtype: object = "bfloat16", *, side_rank: int = 0
) -> dict[str, str]:
    """Paths in the bundle of the engines that a clip needs on an architecture, by the graph's place in a request.
    Graphs that run on the host have none. A block as one plugin is preferred, unless its engines are stale and there is
    one of single ops.

    Args:
        side_rank: The rank of the products beside quantised linears; 0 for none.

    Raises:
        BundleError: An engine is missing or stale, or the graph that it was built from is stale.
    """
    wanted = {graph.name: (onnx, graph) for onnx, graph in bundle.graphs(dtype).items()}
    sizes = named_sizes(bundle.model, bundle.recipe, clip, side_rank=side_rank)
    if side_rank:
        beside = bundle.graphs(dtype, side_path=True).items()
        wanted |= {graph.name.removesuffix(SIDE_PATH): (onnx, graph) for onnx, graph in beside}
    for onnx, graph in bundle.graphs(dtype, one_op=True).items() if not side_rank else ():
        as_one, as_many = (
            fitting_engines(bundle, each, sm, profile(inputs_of(record), sizes))
            for each, record in ((onnx, graph), wanted["block"])
        )
        if as_one and ("" in as_one.values() or not as_many):
            wanted["block"] = (onnx, graph)
    check_current(bundle, [onnx for onnx, _ in wanted.values()])
    return {
        place: find_engine(bundle, onnx, sm, profile(inputs_of(graph), sizes), clip)
        for place, (onnx, graph) in wanted.items()
        if graph.name not in HOST_GRAPHS
    }


def side_ranks(bundle: Bundle, sm: int) -> list[int]:
    """The ranks of the side paths that a bundle has engines for on an architecture, smallest first."""
    found = set()
    for name, record in bundle.manifest.files.items():
        engine = ENGINE_NAME.fullmatch(name)
        if engine and engine["rank"] and str(sm) in record.key.get("architectures", "").split():
            found.add(int(engine["rank"]))
    return sorted(found)


def fitting_engines(bundle: Bundle, onnx: str, sm: int, wanted: str) -> dict[str, str]:
    """Paths in the bundle of a graph's engines that serve an architecture and a profile, with the reason why each is
    stale, or nothing; one that was made for exactly these sizes comes before one that serves others as well."""
    keys = {name: record.key for name, record in bundle.manifest.files.items() if is_engine_of(onnx, name, record)}
    best_first = sorted(keys.items(), key=lambda engine: (BODIES in engine[0], engine[1]["profile"] != wanted))
    return {
        name: why_stale(bundle, bundle.manifest.files[name])
        for name, key in best_first
        if str(sm) in key["architectures"].split() and covers(key["profile"], wanted)
    }


def is_engine_of(onnx: str, name: str, record: FileRecord) -> bool:
    """Whether a file is an engine of a graph."""
    return name.startswith(ENGINES) and record.key.get("onnx") == onnx and is_complete(record)


def find_engine(bundle: Bundle, onnx: str, sm: int, wanted: str, clip: ClipShape) -> str:
    """Path in the bundle of a graph's engine for an architecture and a profile.

    Args:
        clip: The clip that it is for, for the advice where there is none.

    Raises:
        BundleError: There is none, or it is stale.
    """
    files = bundle.manifest.files
    stale = fitting_engines(bundle, onnx, sm, wanted)
    if current := [name for name, reason in stale.items() if not reason]:
        return current[0]
    for name, reason in stale.items():
        raise BundleError(f"{bundle.root}: {name} is stale, {reason}; {remedy(name, bundle.root)}")
    rank = re.search(rf"{LORA_RANK}=(\d+)", wanted)
    name = engine_name(f"{SIDE_PATH}{rank[1]}" if rank else "", (sm,), clip)
    keys = [record.key for name, record in files.items() if is_engine_of(onnx, name, record)]
    there = {f"sm_{key['architectures'].replace(' ', '+')} {key['profile']}".strip() for key in keys}
    raise BundleError(
        f"{bundle.root}: no engine of {onnx} for sm_{sm} and {wanted or 'any size'}; there is "
        f"{'; '.join(sorted(there)) or 'none at all'}; run: {build_command(name, bundle.root)}"
    )


def is_current(bundle: Bundle, name: str, key: Mapping[str, str]) -> bool:
    """Whether an engine exists, is undamaged, and was made from exactly this."""
    record = bundle.manifest.files.get(name)
    if record is None or record.key != key:
        return False
    try:
        return bool(read_engine(bundle, name))
    except BundleError:
        return False


def read_engine(bundle: Bundle, name: str) -> bytes:
    """The bytes of an engine.

    Raises:
        BundleError: It is missing, stale, or not the one that was written. An engine is code, so one that does not
            match must not be loaded.
    """
    path, record = bundle.path(name), bundle.manifest.files[name]
    if reason := why_stale(bundle, record):
        raise BundleError(f"{path}: stale, {reason}; {remedy(name, bundle.root)}")
    engine_bytes = path.read_bytes()
    if (found := hashlib.sha256(engine_bytes).hexdigest()) != record.sha256:
        raise BundleError(
            f"{path}: damaged, or not built here; its SHA-256 is {found[:12]}…, but {record.sha256[:12]}… was "
            f"recorded; {remedy(name, bundle.root)}"
        )
    return engine_bytes
