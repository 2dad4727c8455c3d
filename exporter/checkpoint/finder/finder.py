"""Find the files of a model in folders, and the model itself.

Names decide before contents do: first the published names of files, then the folders of published repositories, and
only for a part that neither shows, what the other files hold. A file is opened only if its contents are needed, and
then only its table of contents is read.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from wanforge.configs.loading import named
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import Recipe, load_recipe
from wanforge.engines.bundle.bundle import dit_component
from wanforge.errors import CheckpointError, join_names
from wanforge.exporter.checkpoint.checks import (
    KINDS,
    NEEDS_CLIP,
    Sources,
    check_kind,
    check_part,
    fits_model,
    fitting_models,
    named_after,
    settle_recipe,
)
from wanforge.exporter.checkpoint.finder.file_names import (
    BY_FOLDER,
    BY_NAME,
    DENOISER,
    NEAREST,
    PREVIEW,
    PREVIEWS,
    PublishedNames,
    kind_by_name,
    model_by_name,
    published_names,
    stem_of,
)
from wanforge.exporter.checkpoint.finder.listing import list_folders
from wanforge.exporter.checkpoint.formats.opening import holds_quantised, layout_name, open_weights
from wanforge.exporter.checkpoint.preview.preview_file import open_component, read_preview
from wanforge.exporter.checkpoint.reader import Contents
from wanforge.exporter.checkpoint.synth import TEXT_ENCODER_FILE, TOKENIZER_FILE, VAE_FILE
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.names import has_image_branch, looks_like

log = logging.getLogger(__name__)

OPTIONS = {
    **{"dit": "--dit", "dit.high": "--dit", "dit.low": "--dit-low"},
    **{"vae": "--vae", "text_encoder": "--text-encoder", "tokenizer": "--tokenizer", "preview": "--preview"},
}
"""The option that gives each part of a model."""
PUBLISHED = {"vae": VAE_FILE, "text_encoder": TEXT_ENCODER_FILE, "tokenizer": TOKENIZER_FILE}
"""The published files of the parts that all models share."""
TOKENIZER_FOLDERS = ("umt5-xxl", "tokenizer")
"""The folders of the tokenizer in the repositories of Wan and of diffusers."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the user said.

    Attributes:
        out: The folder of the new bundle.
        folders: Folders to look in.
        files: Files by the option that names them, such as ``--vae``.
    """

    out: Path
    folders: Sequence[Path] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    model: ModelConfig | None = None
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Taken:
    """A file, and what shows that it is the right one."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Candidate(Taken):
    """A denoiser that was found.

    Attributes:
        expert: The expert that its name says it is, where a model has two.
        models: The models that it may belong to.
    """

    expert: str | None
    is_quantised: bool
    models: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """What an import takes, and why.

    Attributes:
        parts: The file of each component, and of the tokenizer.
        unused: Files that look like checkpoints and are not taken.
    """

    model: ModelConfig
    recipe: Recipe
    parts: Mapping[str, Taken]
    reasons: Mapping[str, str]
    unused: Sequence[Path]

    @property
    def sources(self) -> Sources:
        weights = {part: taken.path for part, taken in self.parts.items() if part != "tokenizer"}
        return Sources(weights, self.parts["tokenizer"].path)

    def lines(self) -> list[str]:
        """A line for the model, for the recipe and for each part, and one for the files that are not used."""
        lines = [
            f"model: {self.model.name} ({self.reasons['model']})",
            f"recipe: {self.recipe.name} ({self.reasons['recipe']})",
            *lines_of(self.parts),
        ]
        return [*lines, *([f"not used: {join_names([str(p) for p in self.unused])}"] if self.unused else [])]


def lines_of(parts: Mapping[str, Taken]) -> list[str]:
    """A line for each part: its file, and why it is this one."""
    return [f"{part}: {taken.path} ({taken.reason})" for part, taken in parts.items()]


def find(wanted: Wanted) -> Findings:
    """Find every part of a model that was not named, and the model and its recipe.

    Raises:
        CheckpointError: A part is missing, or several files may be meant; the message lists them and the options that
            decide.
        BundleError: A folder is a bundle.
    """
    return Finder(wanted).find()


def model_of(
    path: Path, published: PublishedNames, contents_of: Callable[[Path], Contents] = open_weights
) -> tuple[str, str]:
    """The model of a denoiser that was named, and what shows that it is this one.

    Args:
        contents_of: Opens the file, if its name does not tell.

    Raises:
        CheckpointError: The file is no denoiser, or belongs to no known model or to several.
    """
    if (name := published.get(stem_of(path))) is not None:
        return name.model, f"the denoiser, {BY_NAME}"
    contents = contents_of(path)
    check_kind("dit", path, contents)
    every = fitting_models(contents)
    fitting = model_by_name(path, every)
    if len(fitting) != 1:
        found = f"may be {' or '.join(fitting)}" if fitting else "fits no known model"
        raise CheckpointError(
            f"{path}: {found}; give its model with --model ({', '.join(fitting or named('models'))}, or a .toml file)"
        )
    return fitting[0], "the denoiser, by its contents" + (" and its name" if len(every) > 1 else "")


class Finder:
    """One search: what is wanted, the files in the folders, and what has been read of them."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.listing = list_folders(wanted.folders, wanted.out)
        self.published = published_names(wanted.model)
        self.opened: dict[Path, Contents] = {}
        self.refused: dict[Path, CheckpointError] = {}

    def find(self) -> Findings:
        model, reason, found = self.model_and_denoisers()
        parts: dict[str, Taken] = dict(self.choose_denoisers(model, found))
        for part in ("vae", "text_encoder", "tokenizer"):
            if (given := self.wanted.files.get(OPTIONS[part])) is not None:
                parts[part] = Taken(given, OPTIONS[part])
            elif (taken := self.tokenizer(model) if part == "tokenizer" else self.network(part, model)) is not None:
                parts[part] = taken
        needed = [*map(dit_component, model.experts), "vae", "text_encoder", "tokenizer"]
        if missing := [part for part in needed if part not in parts]:
            raise CheckpointError(self.missing(model, missing, parts))
        if (preview := self.preview(model)) is not None:  # the only part that may be missing
            parts["preview"] = preview
            needed.append("preview")
        recipe, reasons = self.recipe(model, parts), {"model": reason, "recipe": "by the contents of the denoiser"}
        if self.wanted.recipe is not None:
            reasons["recipe"] = "--recipe"
        used = {taken.path.resolve() for taken in parts.values()}
        unused = [path for path in (*self.listing.checkpoints, *self.listing.unread) if path.resolve() not in used]
        return Findings(model, recipe, {part: parts[part] for part in needed}, reasons, unused)

    def contents(self, path: Path) -> Contents:
        """The table of contents of a file, which is read once.

        Raises:
            CheckpointError: It cannot be read.
        """
        if path not in self.opened:
            self.opened[path] = open_weights(path)
        return self.opened[path]

    def readable(self, path: Path) -> bool:
        """Whether a file can be opened; why not is kept for the message that may follow."""
        try:
            self.contents(path)
        except CheckpointError as error:
            self.refused[path] = error
        return path not in self.refused

    def candidates(self, kind: str) -> Iterator[list[Taken]]:
        """The files of a kind in the folders: by their published names, by their folders, and by their contents."""
        by_name = {path: kind_by_name(path, self.published) for path in self.listing.checkpoints}
        for way in (BY_NAME, BY_FOLDER):
            yield [Taken(path, way) for path, told in by_name.items() if told == (kind, way)]
        unnamed = [path for path, (told, _) in by_name.items() if told is None]
        yield [
            Taken(path, "by its contents")
            for path in unnamed
            if self.readable(path) and looks_like(self.contents(path)) == kind
        ]

    def model_and_denoisers(self) -> tuple[ModelConfig, str, list[Candidate]]:
        """The model, what shows that it is this one, and the denoisers in the folders that may belong to it.

        Raises:
            CheckpointError: There is no denoiser, or it may belong to several models.
        """
        files, model = self.wanted.files, self.wanted.model
        given = files.get("--dit", files.get("--dit-low"))
        if model is not None:
            return model, "--model", self.denoisers(model)
        if given is not None:
            name, reason = model_of(given, self.published, self.contents)
            return load_model(name), reason, self.denoisers(load_model(name))
        found = self.denoisers(None)
        if not found:
            raise CheckpointError(self.missing(None, ["dit"], {}))
        names = sorted({name for denoiser in found for name in denoiser.models})
        if len(names) > 1:
            lines = [f"  {denoiser.path}: {' or '.join(denoiser.models)}" for denoiser in found]
            or_file = ", or its denoiser with --dit" if len(found) > 1 else ""
            raise CheckpointError(
                f"{self.place}: the model may be {' or '.join(names)}; choose it with --model{or_file}\n"
                + "\n".join(lines)
            )
        return load_model(names[0]), model_of(found[0].path, self.published, self.contents)[1], found

    def denoisers(self, model: ModelConfig | None) -> list[Candidate]:
        """The denoisers in the folders that may belong to `model`, or to any if it is None."""
        for taken in self.candidates(DENOISER):
            if found := [denoiser for each in taken if (denoiser := self.denoiser(each, model)) and denoiser.models]:
                return found
        return []

    def denoiser(self, taken: Taken, model: ModelConfig | None) -> Candidate | None:
        """What is known of a denoiser in the folders; None if it cannot be read."""
        path, reason = taken.path, taken.reason
        if (name := self.published.get(stem_of(path))) is not None:
            models = [name.model] if model is None or model.name == name.model else []
            return Candidate(path, reason, name.expert, name.is_quantised, models)
        if not self.readable(path):
            return None
        contents = self.contents(path)
        models = model_by_name(path, fitting_models(contents))
        if model is not None:
            models = [model.name] if fits_model("dit", contents, model) else []
        if layout := layout_name(contents):
            reason = f"{reason}, {layout}"
        return Candidate(path, reason, named_after(path, NEAREST), holds_quantised(contents), models)

    def choose_denoisers(self, model: ModelConfig, found: Sequence[Candidate]) -> dict[str, Taken]:
        """The file of each expert: those that were named, and of those that were found all of the same kind.

        Raises:
            CheckpointError: Several files may be meant, or it cannot be told which expert a file is.
        """
        files = self.wanted.files
        if "--dit-low" in files and len(model.experts) == 1:
            raise CheckpointError(f"{model.name} has one denoiser; leave out --dit-low")
        options = {expert: OPTIONS[dit_component(expert)] for expert in model.experts}
        given = {dit_component(e): Taken(files[o], o) for e, o in options.items() if o in files}
        groups = {
            expert: [each for each in found if expert in ("", each.expert)]
            for expert, option in options.items()
            if option not in files
        }
        if not all(groups.values()) and (unclear := [str(each.path) for each in found if each.expert is None]):
            raise CheckpointError(
                f"{join_names(unclear)}: no name says which expert of {model.name} this is; give the high-noise one "
                "with --dit and the low-noise one with --dit-low"
            )
        wants_quantised, why = self.wanted_kind(given)
        for kind in (wants_quantised, not wants_quantised):
            if all(any(each.is_quantised == kind for each in group) for group in groups.values()):
                reason = why if kind == wants_quantised else "which every expert has"
                groups = {expert: self.of_kind(group, kind, reason) for expert, group in groups.items()}
                break
        fits = partial(self.fits, "dit", model)
        chosen = {dit_component(expert): group for expert, group in groups.items() if group}
        return {**given, **{part: self.only(part, group, fits) for part, group in chosen.items()}}

    def wanted_kind(self, given: Mapping[str, Taken]) -> tuple[bool, str]:
        """Whether quantised denoisers are preferred to others, and what says so."""
        for taken in given.values():
            return holds_quantised(self.contents(taken.path)), f"like {taken.path.name}"
        if (recipe := self.wanted.recipe) is None:
            return True, "unless --recipe asks for bf16"
        return recipe.is_published, f"for recipe {recipe.name}"

    @staticmethod
    def of_kind(group: Sequence[Candidate], kind: bool, why: str) -> list[Candidate]:
        """The quantised denoisers of a group, or the others; if there are both, their reasons mention it."""
        of_kind = [each for each in group if each.is_quantised == kind]
        if len(of_kind) == len(group):
            return of_kind
        word = "quantised" if kind else "unquantised"
        return [replace(each, reason=f"{each.reason}; of two kinds the {word} one, {why}") for each in of_kind]

    def network(self, component: str, model: ModelConfig) -> Taken | None:
        """The VAE or the text encoder in the folders."""
        for found in self.candidates(KINDS[component]):
            if found:
                return self.only(component, found, partial(self.fits, component, model))
        return None

    def preview(self, model: ModelConfig) -> Taken | None:
        """The preview decoder that was named, or the best one in the folders that has a published name and can be
        imported. Contents alone do not tell for which latents a decoder is."""
        if (given := self.wanted.files.get("--preview")) is not None:
            return Taken(given, "--preview")
        by_name = [each for each in next(self.candidates(PREVIEW)) if each.path.suffix != ".gguf"]
        for taken in sorted(by_name, key=lambda each: PREVIEWS.index(stem_of(each.path))):
            try:
                fitted = msgspec.structs.replace(model, preview=read_preview(taken.path).config)
                contents = open_component("preview", taken.path)
                check_part("preview", taken.path, contents, fitted, load_recipe("bf16"))
            except CheckpointError as error:
                log.warning("%s", error)
                continue
            return taken
        return None

    def tokenizer(self, model: ModelConfig) -> Taken | None:
        """The tokenizer in the folders: in a published folder, or else the only one that has umT5's special tokens."""

        def fits(path: Path) -> bool:
            try:
                tokenizer = Tokenizer(path)
            except CheckpointError:
                return False
            return tokenizer.end == 1 and len(tokenizer) <= model.text_encoder.vocab_size

        paths = self.listing.tokenizers
        for folder in TOKENIZER_FOLDERS:
            if found := [Taken(p, BY_FOLDER) for p in paths if p.absolute().parent.name == folder]:
                return self.only("tokenizer", found, fits)
        found = [Taken(path, "by its contents") for path in paths if fits(path)]
        return self.only("tokenizer", found, fits) if found else None

    def fits(self, component: str, model: ModelConfig, path: Path) -> bool:
        """Whether a file can be read and has exactly the tensors of a model's component."""
        return self.readable(path) and fits_model(component, self.contents(path), model)

    def only(self, part: str, found: Sequence[Taken], fits: Callable[[Path], bool]) -> Taken:
        """The only file that was found, or the only one of several whose contents fit.

        Raises:
            CheckpointError: Several fit, or none of several.
        """
        first = {taken.path.resolve(): taken for taken in reversed(found)}
        distinct = [taken for taken in found if first[taken.path.resolve()] is taken]
        if len(distinct) > 1:
            distinct = [taken for taken in distinct if fits(taken.path)] or distinct
        if len(distinct) > 1:
            raise CheckpointError(
                f"{self.place}: several files may be the {part}; choose one with {OPTIONS[part]}\n"
                + "\n".join(f"  {taken.path} ({taken.reason})" for taken in distinct)
            )
        return distinct[0]

    def recipe(self, model: ModelConfig, parts: Mapping[str, Taken]) -> Recipe:
        """The recipe of the bundle, see `checks.settle_recipe`."""
        paths = {component: parts[component].path for component in map(dit_component, model.experts)}
        opened = {component: self.contents(path) for component, path in paths.items()}
        for component, path in paths.items():
            check_kind(component, path, opened[component])
        return settle_recipe(model, paths, opened, self.wanted.recipe)

    @property
    def place(self) -> str:
        """The folders that are searched, for messages."""
        return join_names([str(folder) for folder in self.wanted.folders])

    def missing(self, model: ModelConfig | None, parts: Sequence[str], found: Mapping[str, Taken]) -> str:
        """Say what is missing, how to give it, what was found, and what else is in the folders."""
        options = join_names([OPTIONS[part] for part in parts])
        if not self.wanted.folders:
            if model is None:
                return f"a denoiser is needed as well; give it with {options}, or give the folder that holds it"
            return f"{model.name} needs {options} as well"
        names = [f"{part} ({PUBLISHED[part]})" if part in PUBLISHED else part for part in parts]
        of = f" of {model.name}" if model else " of a known model"
        lines = [f"{self.place}: no {join_names(names)}{of} here; give {options}, or one more folder to look in"]
        lines += [f"  found {line}" for line in lines_of(found)]
        taken = {each.path for each in found.values()}
        others = [path for path in (*self.listing.checkpoints, *self.listing.unread) if path not in taken]
        return "\n".join([*lines, *(f"  not used: {path}{self.why_not(path)}" for path in others[:6])])

    def why_not(self, path: Path) -> str:
        """What is known of a file that was not taken."""
        if path in self.refused:
            return f" ({str(self.refused[path]).removeprefix(f'{path}: ')})"
        if (name := self.published.get(stem_of(path))) is not None:
            return f" (the denoiser of {name.model}, by its name)"
        if path in self.opened and has_image_branch(self.opened[path]):
            return f" ({NEEDS_CLIP})"
        if path in self.opened and looks_like(self.opened[path]) == DENOISER:
            return f" (a denoiser of {' or '.join(fitting_models(self.opened[path])) or 'no known model'})"
        return ""
