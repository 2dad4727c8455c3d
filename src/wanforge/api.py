"""The five public functions, which lead from checkpoint files to a clip; the `wanforge` package re-exports them.

They take folders as strings or paths and print nothing. Errors that depend on files, requests or the machine are raised
as a `WanforgeError`; a keyword that does not exist, or a value of a wrong type, is a TypeError.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from wanforge.configs.hub import hub_model
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.configs.targets import parse_targets
from wanforge.engines.build import EngineOptions, EngineResult, build_engines
from wanforge.engines.bundle.bundle import Bundle, components
from wanforge.errors import CheckpointError, ConfigError, unknown_name
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.embedded import EMBEDDED, embedded
from wanforge.exporter.checkpoint.finder import finder
from wanforge.exporter.checkpoint.finder.file_names import published_names
from wanforge.exporter.checkpoint.finder.finder import Wanted, find
from wanforge.exporter.checkpoint.importer import run_import
from wanforge.exporter.checkpoint.record import Arguments
from wanforge.exporter.export import ExportResult
from wanforge.exporter.export import export as export_bundle
from wanforge.exporter.hub.pulled import pulled_folders
from wanforge.keywords import with_settings
from wanforge.plugins.tensorrt.library import group_by_flavour, open_library
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import AUTO
from wanforge.runtime.backends.choice import resolve_backend
from wanforge.runtime.measure.parity.comparison import DEPTHS, Contender, Parity, compare
from wanforge.runtime.output.clip import Clip
from wanforge.runtime.pipeline import Pipeline
from wanforge.runtime.ranks.opening import open_on_gpus
from wanforge.runtime.request import Settings, request_for

Files = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
"""A folder of checkpoint files, several folders, or a file for each part of a model."""

__all__ = ["Bundle", "Clip", "Pipeline", "build", "export", "import_checkpoint", "load", "parity"]


def load(bundle: str | Path | Bundle, backend: str = AUTO, memory: float | None = None, gpus: int = 1) -> Pipeline:
    """Make a bundle ready to generate clips.

    Args:
        bundle: The bundle's folder, or the bundle as `Bundle.open` returns it: ``Bundle.open(folder, stale_ok=True)``
            runs stale graphs, too. The other functions take the same.
        backend: ``torch``, ``ort``, ``cuda``, ``trt``, or ``auto`` for the fastest that can run here.
        memory: Memory budget in gigabytes, which is kept by streaming the weights that do not fit.
        gpus: Number of GPUs that share each request, with the backend ``cuda``; each keeps to the memory budget.

    Returns:
        A pipeline; see `Pipeline.generate`.

    Raises:
        BundleError: The folder is not a bundle, or a file of it is missing or damaged.
        ConfigError: There is no such backend, memory is no number above 0, or GPUs cannot share this model.
        ResourceError: There are fewer GPUs than that.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"memory must be a finite number of gigabytes above 0, not {memory:g}")
    return open_on_gpus(gpus, opened(bundle), backend, None if memory is None else memory * 1e9)


def opened(bundle: str | Path | Bundle) -> Bundle:
    """A bundle by its folder, unless it is open already."""
    return bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))


class ImportSettings(TypedDict, total=False):
    """The settings of `import_checkpoint`, besides the files.

    Attributes:
        recipe: Name of a recipe, or a TOML file; by default the recipe follows from the files.
        link: Link to canonical safetensors files instead of copying them.
        keep_unquantised: Keep the weights that the recipe quantises as they are, too, so that LoRAs can be merged into
            them, instead of acting beside the quantised ones.
        replace: Overwrite an existing bundle.
    """

    recipe: str
    link: bool
    keep_unquantised: bool
    replace: bool


@with_settings(ImportSettings)
def import_checkpoint(
    out: str | Path,
    model: str | None = None,
    files: Files | None = None,
    *,
    on_progress: Progress = silent,
    **settings: Unpack[ImportSettings],
) -> Bundle:
    """Turn published checkpoint files into a bundle.

    Args:
        out: The folder of the bundle.
        model: Name of a model, or a TOML file; by default the model that the denoiser fits.
        files: A folder with the files, or several, in which every part of the model is looked for; or a mapping that
            names a file for each component (``dit``, or ``dit.high`` and ``dit.low``; ``vae``; ``text_encoder``), the
            ``tokenizer`` and, if there is one, the ``preview`` decoder. Without files the bundle is made of those that
            ``wanforge pull`` has fetched of `model`, and without a model of TinyWan's, which come with the package. The
            manifest of the bundle says which files were taken.
        on_progress: Called with a component, the number of its bytes written so far, and their total.
        settings: See `ImportSettings`.

    Raises:
        CheckpointError: A file is missing, damaged, or belongs to another model.
        BundleError: The folder is a bundle already.
        ResourceError: The disk has too little space.
    """
    chosen = settings.get("recipe")
    wanted = Wanted(
        out=Path(out),
        model=None if model is None else load_model(model),
        recipe=None if chosen is None else load_recipe(chosen),
    )
    config, recipe, sources = sources_of(wanted, files)
    link, keep = settings.get("link", False), settings.get("keep_unquantised", False)
    arguments = Arguments.of(config, sources, recipe, link, keep_unquantised=keep)
    return run_import(arguments, wanted.out, replace=settings.get("replace", False), progress=on_progress)


def sources_of(wanted: Wanted, files: Files | None) -> tuple[ModelConfig, Recipe | None, Sources]:
    """The model, its recipe if that is settled, and its files.

    Raises:
        CheckpointError: A part of the model is missing, or several files may be meant.
    """
    if files is None and wanted.model is not None and hub_model(wanted.model.name) is not None:
        files = pulled_folders(wanted.model.name, wanted.recipe)
    if files is None:
        model = wanted.model or load_model(EMBEDDED)
        return model, wanted.recipe, embedded(model)
    if not isinstance(files, Mapping):
        folders = [files] if isinstance(files, str | Path) else files
        found = find(replace(wanted, folders=[Path(folder) for folder in folders]))
        return found.model, found.recipe, found.sources
    return (model := wanted.model or model_of(files)), wanted.recipe, sources_named(model, files)


def model_of(files: Mapping[str, str | Path]) -> ModelConfig:
    """The model that the denoiser among the files fits."""
    denoiser = files.get("dit", files.get("dit.high"))
    if denoiser is None:
        raise CheckpointError("the files lack a denoiser: give dit, or dit.high and dit.low; or say which model it is")
    return load_model(finder.model_of(Path(denoiser), published_names(None))[0])


def sources_named(model: ModelConfig, files: Mapping[str, str | Path]) -> Sources:
    """The files of a model by component, and its tokenizer.

    Raises:
        CheckpointError: The model has no such component, or there is no tokenizer among the files.
    """
    known = list(dict.fromkeys([*components(model), "preview", "tokenizer"]))
    for name in files:
        if name not in known:
            raise CheckpointError(unknown_name(f"component of {model.name}", name, known))
    weights = {name: Path(path) for name, path in files.items() if name != "tokenizer"}
    if "tokenizer" not in files:
        raise CheckpointError("the files lack a tokenizer: give tokenizer.json of google/umt5-xxl, or its folder")
    return Sources(weights, Path(files["tokenizer"]))


def export(
    bundle: str | Path | Bundle, dtypes: Sequence[str] = ("fp32", "fp16", "bf16"), on_progress: Progress = silent
) -> ExportResult:
    """Write a bundle's ONNX graphs.

    Args:
        dtypes: Compute types of the graphs.

    Raises:
        BundleError: The folder is not a bundle.
        ConfigError: There is no such compute type, or graphs cannot be made for the bundle's recipe.
    """
    return export_bundle(opened(bundle), dtypes, on_progress)


class BuildSettings(TypedDict, total=False):
    """The settings of `build`, besides the targets; the model provides those that are left out.

    Attributes:
        size: Width and height in pixels, or a name from the table of resolutions (``480p``, at 16:9).
        frames: Number of frames.
        smaller: Whether the engines also serve smaller and shorter clips.
    """

    size: tuple[int, int] | str
    frames: int
    smaller: bool


@with_settings(BuildSettings)
def build(
    bundle: str | Path | Bundle,
    targets: str | Sequence[str],
    *,
    on_progress: Progress = silent,
    **settings: Unpack[BuildSettings],
) -> list[EngineResult]:
    """Compile a bundle's graphs into engines for GPUs; those that TensorRT-RTX supports need not be in this machine.

    Args:
        targets: GPUs by name or architecture: ``["rtx5090", "sm_89"]``, ``rtx5090,sm_89`` or ``all``.
        settings: See `BuildSettings`.

    Raises:
        ConfigError: There is no such GPU.
        ResourceError: A library is not installed, TensorRT lacks the GPU, or there is too little memory.
        WanforgeError: A graph does not compile.
    """
    found = opened(bundle)
    clip = found.model.video.shape(settings.get("size"), settings.get("frames"))
    wanted = [targets] if isinstance(targets, str) else targets
    results = []
    for flavour, sms in group_by_flavour(parse_targets(wanted).sms):
        options = EngineOptions(clip, sms, smaller=settings.get("smaller", False))
        results += build_engines(found, open_library(flavour), options, progress=on_progress)
    return results


@with_settings(Settings)
def parity(
    bundle: str | Path | Bundle,
    prompt: str | None = None,
    image: str | Path | None = None,
    *,
    backend: str = AUTO,
    depths: Collection[str] = DEPTHS,
    on_progress: Progress = silent,
    **settings: Unpack[Settings],
) -> Parity:
    """Compare a backend with the reference.

    Args:
        prompt: The prompt of the clip that is compared; the model's example by default.
        image: Its first frame, for image-to-video models.
        backend: The backend that is compared.
        depths: Any of ``op``, ``block``, ``step`` and ``clip``.
        settings: See `runtime.request.Settings`.

    Returns:
        All comparisons; `Parity.passed` says whether every limit is met.

    Raises:
        RequestError, ConfigError, BundleError: The request or the backend does not fit this bundle, or only the
            reference itself can run here.
    """
    found = opened(bundle)
    asked = found.model.example_prompt if prompt is None else prompt
    request = request_for(found.model, asked, image, settings)
    name = resolve_backend(backend, found, [request.shape])
    return compare(found, Contender(name), request, depths=depths, progress=on_progress)
