"""The files that come with the package: TinyWan's in the folder ``tinywan``, the two experts of its image-to-video
model in ``tinywan-i2v``, and the denoiser of its causal model in ``tinywan-causal``. All have TinyWan's VAE, text
encoder and tokenizer."""

from pathlib import Path

from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import components
from wanforge.errors import CheckpointError
from wanforge.exporter.checkpoint.checks import Sources

EMBEDDED = "tinywan"
"""The model that is imported where none is named."""
EVERY = (EMBEDDED, "tinywan-i2v", "tinywan-causal")
"""The models whose files come with the package."""
FOLDER = Path(__file__).parent / EMBEDDED


def embedded(model: ModelConfig) -> Sources:
    """The files of a model that come with the package.

    Raises:
        CheckpointError: The package has no files of this model.
    """
    if model.name not in EVERY:
        raise CheckpointError(
            f"{model.name} does not come with the package; give the files of its denoiser, VAE, text encoder and "
            "tokenizer (--dit, --vae, --text-encoder, --tokenizer)"
        )
    return sources_in(FOLDER.parent / model.name, model)


def sources_in(folder: Path, model: ModelConfig) -> Sources:
    """The files in a folder, each named after its component; TinyWan's files take the place of those that are not
    there. That of a preview decoder may be missing."""
    own = {component: folder / f"{component}.safetensors" for component in (*components(model), "preview")}
    weights = {c: path if path.exists() else FOLDER / path.name for c, path in own.items()}
    tokenizer = folder / "tokenizer.json"
    return Sources(
        {c: path for c, path in weights.items() if c != "preview" or path.exists()},
        tokenizer if tokenizer.exists() else FOLDER / tokenizer.name,
    )
