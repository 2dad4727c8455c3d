"""TinyWan's files, which come with the package in the folder ``tinywan``."""

from pathlib import Path

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import components
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources

EMBEDDED = "tinywan"
FOLDER = Path(__file__).parent / EMBEDDED


def embedded(model: ModelConfig) -> Sources:
    """The files of a model that come with the package.

    Raises:
        CheckpointError: The package has no files of this model.
    """
    if model.name != EMBEDDED:
        raise CheckpointError(
            f"{model.name} does not come with the package; give the files of its denoiser, VAE, text encoder and "
            "tokenizer (--dit, --vae, --text-encoder, --tokenizer)"
        )
    return sources_in(FOLDER, model)


def sources_in(folder: Path, model: ModelConfig) -> Sources:
    """The files in a folder, each named after its component. That of a preview decoder may be missing."""
    weights = {component: folder / f"{component}.safetensors" for component in components(model)}
    preview = folder / "preview.safetensors"
    weights |= {"preview": preview} if preview.is_file() else {}
    return Sources(weights, folder / "tokenizer.json")
