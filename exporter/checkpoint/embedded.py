"""TinyWan's files, which come with the package and lie beside its configuration."""

from pathlib import Path

from wanforge.configs.schema import CONFIGS, ModelConfig
from wanforge.engines.bundle import components
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.importer import Sources

EMBEDDED = "tinywan"


def embedded(model: ModelConfig) -> Sources:
    """The files of a model that come with the package.

    Raises:
        CheckpointError: there are none.
    """
    folder = CONFIGS / "models" / model.name
    if not folder.is_dir():
        raise CheckpointError(
            f"{model.name} does not come with the package; give its files with --dit, --vae, --text-encoder and "
            "--tokenizer"
        )
    return sources_in(folder, model)


def sources_in(folder: Path, model: ModelConfig) -> Sources:
    """A folder's files, each named after its component."""
    weights = {component: folder / f"{component}.safetensors" for component in components(model)}
    return Sources(weights, folder / "tokenizer.json")
