"""Where models are published on the Hugging Face Hub: repositories, and the names, sizes and hashes of their files.

Bundles do not carry this: a model's own configuration says nothing of where its files come from.
"""

from functools import cache
from typing import Annotated

from msgspec import Meta, field

from wanforge.configs.loading import CONFIGS, Positive, Record, load, named
from wanforge.configs.recipe import Recipe
from wanforge.errors import ConfigError, unknown_name

MAIN = "main"
"""The revision of a repository of which no commit is known."""


class HubFile(Record, frozen=True):
    """A file of a repository."""

    path: Annotated[str, Meta(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
    """Its path in the repository."""
    bytes: Annotated[int, Meta(ge=1)]
    """Its size if its hash is known, and otherwise the size of its tensors, which is a little less."""
    sha256: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""


class HubRepository(Record, frozen=True):
    """Some files of a repository.

    Attributes:
        name: Owner and name, as in ``Wan-AI/Wan2.1-T2V-1.3B``.
        revision: The commit that the files are taken from, or a branch.
    """

    name: Annotated[str, Meta(pattern=r"^\w[\w.-]*/\w[\w.-]*$")]
    files: list[HubFile]
    revision: str = MAIN


class HubModel(Record, frozen=True):
    """Where the denoisers of a model are published, and under which terms.

    Attributes:
        recipe: The recipe that an import chooses by itself.
        least_gib: The memory of the smallest GPU on which its default clip fits, with layers that are streamed; None if
            there are no engines to tell by.
        ample_gib: The memory of the smallest GPU on which all of its weights stay.
        repository: Where the files are; empty if nobody says where, so that they cannot be pulled.
        quantised: A file per expert, quantised as TurboDiffusion does it; none if there are none.
        unquantised: Likewise.
    """

    licence: str
    recipe: str
    least_gib: Positive | None = None
    ample_gib: Positive | None = None
    repository: str = ""
    revision: str = MAIN
    quantised: list[HubFile] = field(default_factory=list)
    unquantised: list[HubFile] = field(default_factory=list)

    def denoisers(self, recipe: Recipe | None = None) -> HubRepository:
        """The denoisers that an import with this recipe takes: the quantised ones, unless the recipe needs others."""
        prefers_quantised = recipe is None or recipe.is_published
        first, second = self.quantised, self.unquantised
        files = (first or second) if prefers_quantised else (second or first)
        return HubRepository(self.repository, files, self.revision)


class _Hub(Record, frozen=True):
    shared: HubRepository
    models: dict[str, HubModel]
    preview: HubRepository | None = None


@cache
def _hub() -> _Hub:
    return load(CONFIGS / "hub.toml", _Hub)


def hub_model(model: str) -> HubModel | None:
    """Where a model is published; None for a model that is not."""
    return _hub().models.get(model)


def repositories(model: str, recipe: Recipe | None = None) -> list[HubRepository]:
    """The repositories and files that an import of a model with a recipe takes: its denoisers, and the VAE, the text
    encoder and the tokenizer, which all models share.

    Raises:
        ConfigError: There is no such model, it is not published, or its repository is not known.
    """
    if (known := hub_model(model)) is None:
        if model in named("models"):
            raise ConfigError(f"{model} is not published; models that are: {', '.join(_hub().models)}")
        raise ConfigError(unknown_name("model", model, list(_hub().models)))
    if not known.repository:
        names = ", ".join(file.path for file in known.denoisers(recipe).files)
        raise ConfigError(
            f"no repository is known that holds the files of {model}; give the folder with {names} to `wanforge import`"
        )
    return [known.denoisers(recipe), _hub().shared]


def preview_repository() -> HubRepository | None:
    """The repository and the file of the preview decoder that suits every published model; None if none is known."""
    return _hub().preview
