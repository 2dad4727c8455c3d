"""Where pulled models are, and which of their folders an import looks into."""

import shlex
from pathlib import Path

from wanforge.configs.hub import HubRepository, hub_model, preview_repository, repositories
from wanforge.configs.loading import named
from wanforge.configs.recipe import Recipe
from wanforge.errors import CheckpointError, join_names
from wanforge.exporter.hub.pull import folder_of
from wanforge.plugins.launching.cubins import cache_folder


def default_folder() -> Path:
    """The folder that models are pulled into unless a command names another.

    Raises:
        ResourceError: This user has no home folder.
    """
    return cache_folder().parent / "models"


def named_model(folder: Path) -> str | None:
    """The model that an argument names where a folder could stand; None if it is a folder, or names none."""
    return str(folder) if str(folder) in named("models") and not folder.exists() else None


def pulled_folders(model: str, recipe: Recipe | None = None) -> list[Path]:
    """The folders with a pulled model's files, in the default folder, and that of the preview decoder if it is there.

    Args:
        recipe: The recipe that the import was asked for. Without one, quantised denoisers will do as well as others.

    Raises:
        ConfigError: The model is not published.
        CheckpointError: A file is not there; the message has the command that fetches it.
    """
    wanted, to = repositories(model, recipe), default_folder()
    if recipe is None and (known := hub_model(model)) is not None and _missing(to, wanted[0]):
        others = HubRepository(known.repository, known.unquantised, known.revision)
        wanted = [others, *wanted[1:]] if known.unquantised and not _missing(to, others) else wanted
    if missing := [name for repository in wanted for name in _missing(to, repository)]:
        option = f" --recipe {shlex.quote(recipe.name)}" if recipe is not None else ""
        raise CheckpointError(
            f"{to}: lacks {join_names(missing)} of {model}; fetch them with: wanforge pull {model}{option}, or give "
            "the folders that hold them"
        )
    preview = preview_repository()
    if preview is not None and not _missing(to, preview):
        wanted = [*wanted, preview]
    return [folder_of(to, repository.name) for repository in wanted]


def _missing(to: Path, repository: HubRepository) -> list[str]:
    return [file.path for file in repository.files if not (folder_of(to, repository.name) / file.path).is_file()]
