"""The bundle that a folder or the name of a model stands for."""

from pathlib import Path

from wanforge.api import ImportSettings, export, import_checkpoint
from wanforge.configs.loading import named
from wanforge.configs.model import load_model
from wanforge.configs.recipe import load_recipe
from wanforge.engines.bundle.bundle import Bundle
from wanforge.engines.bundle.manifest import MANIFEST
from wanforge.errors import BundleError, unknown_name
from wanforge.exporter.checkpoint.embedded import EVERY
from wanforge.plugins.launching.cubins import cache_folder

RECIPE = "w8a8"
"""The recipe of models that come with wanforge, if none is asked for."""


def bundle_of(place: str | Path, recipe: str | None = None) -> Bundle:
    """A bundle by its folder; or by the name of a model that comes with wanforge or was pulled, whose bundle is kept in
    the cache and is made when it is first asked for.

    Args:
        recipe: The recipe of a model; by default w8a8, or what the pulled files are.

    Raises:
        BundleError: It is neither, or a recipe is given for a folder.
        CheckpointError: The model was not pulled; the message has the command that fetches it.
    """
    folder, name = Path(place), str(place)
    if (folder / MANIFEST).exists() or (folder.is_dir() and name not in named("models")):
        if recipe is not None:
            raise BundleError(f"{folder}: is a bundle, whose recipe is settled; leave out recipe, or name a model")
        return Bundle.open(folder)
    if name not in named("models"):
        raise BundleError(f"{name} is no bundle; {unknown_name('model', name, named('models'))}")
    return cached_bundle(name, recipe or (RECIPE if name in EVERY else None))


def cached_bundle(model: str, recipe: str | None) -> Bundle:
    """The bundle of a model in the cache, imported and exported if it is not there."""
    config, wanted = load_model(model), None if recipe is None else load_recipe(recipe)
    folder = cache_folder().parent / "bundles" / (config.name if wanted is None else f"{config.name}-{wanted.name}")
    if not (folder / MANIFEST).exists():
        settings: ImportSettings = {} if recipe is None else {"recipe": recipe}
        import_checkpoint(folder, model, **settings)
    bundle = Bundle.open(folder)
    if not any(record.graph is not None for record in bundle.manifest.files.values()):
        export(bundle)
    return Bundle.open(folder)
