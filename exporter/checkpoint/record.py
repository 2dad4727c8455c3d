"""What a bundle was imported from, and how far its import has come: the file ``import.json`` in the bundle."""

import os
from pathlib import Path
from typing import Literal, Self

import msgspec

from wanforge.configs.loading import Record
from wanforge.configs.model import ModelConfig
from wanforge.configs.recipe import Recipe
from wanforge.engines.bundle.bundle import components
from wanforge.engines.bundle.folder import UNREADABLE, check_names, read_unlinked
from wanforge.engines.bundle.manifest import IMPORT
from wanforge.errors import BundleError, join_names
from wanforge.exporter.checkpoint.checks import Sources
from wanforge.exporter.checkpoint.preview.preview_file import read_preview
from wanforge.whole_file import write_atomically


class Arguments(Record, frozen=True):
    """What an import was asked for."""

    model: ModelConfig
    weights: dict[str, str]
    """The absolute path of each component's file."""
    tokenizer: str
    recipe: Recipe | None
    """None if it was to follow from the files."""
    link: bool
    keep_unquantised: bool = False
    """Whether the weights that the recipe quantises are kept as they are, too."""

    def __post_init__(self) -> None:
        if unknown := self.weights.keys() - set(components(self.model)):
            raise ValueError(f"{self.model.name} has no {join_names(sorted(unknown))}")

    @classmethod
    def of(
        cls, model: ModelConfig, sources: Sources, recipe: Recipe | None, link: bool, *, keep_unquantised: bool = False
    ) -> Self:
        weights = {component: os.path.abspath(path) for component, path in sources.weights.items()}
        if "preview" in sources.weights:
            model = msgspec.structs.replace(model, preview=read_preview(sources.weights["preview"]).config)
        return cls(model, weights, os.path.abspath(sources.tokenizer), recipe, link, keep_unquantised)

    @property
    def sources(self) -> Sources:
        return Sources({name: Path(path) for name, path in self.weights.items()}, Path(self.tokenizer))


class Finished(Record, frozen=True):
    """A component that is complete."""

    made_from: str
    """Its files with their sizes and times, and the layout of its tensors."""
    sha256: str
    conversion: str = ""
    """What became of its weights, if another project had quantised them."""


class ImportRecord(Record, frozen=True):
    """An import, which is going on, was interrupted or is complete."""

    format: Literal[1]
    arguments: Arguments
    finished: dict[str, Finished] = msgspec.field(default_factory=dict)
    """The components that are complete."""
    replaced: list[str] = msgspec.field(default_factory=list)
    """Files of a bundle that is being replaced, which go when the import is complete."""

    def __post_init__(self) -> None:
        check_names(self.replaced)


def write_record(root: Path, record: ImportRecord) -> None:
    """Keep the record of an import in its bundle."""
    ordered = msgspec.structs.replace(record, finished=dict(sorted(record.finished.items())))
    write_atomically(root / IMPORT, msgspec.json.format(msgspec.json.encode(ordered), indent=1))


def conversions(root: Path) -> dict[str, str]:
    """What became of weights that another project had quantised, by component."""
    record = read_record(root)
    every = {} if record is None else record.finished
    return {component: finished.conversion for component, finished in every.items() if finished.conversion}


def read_record(root: Path) -> ImportRecord | None:
    """The record of the import that made a bundle, or began to make it; None if there is none, or it is damaged."""
    try:
        return msgspec.json.decode(read_unlinked(root / IMPORT), type=ImportRecord)
    except (OSError, BundleError, *UNREADABLE):
        return None
