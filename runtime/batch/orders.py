"""What a batch is to make: the lines of a prompt file, checked, and the name of the clip of each.

Nothing here imports PyTorch.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from wanforge.configs.clip import ClipShape
from wanforge.configs.loading import Record
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.engines.bundle.tensorfile import sha256_of
from wanforge.errors import RequestError, WanforgeError
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.inputs.prompts import BadLine, PromptLine, placed
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.request import check_request, check_seed
from wanforge.runtime.service.catalogue import Asked, fingerprint

DIGITS = 32
"""Hexadecimal digits of a key; with 128 bits, no two of a batch's clips get the same by chance."""
VIDEO = ".mp4"


class ClipOrder(Record, frozen=True, kw_only=True):
    """A clip that a batch makes.

    Attributes:
        key: A hash of the bundle's fingerprint and of all that the request asks for, with the contents of its files.
        request: What a maker reads, see `catalogue.Asked`.
        image: The file of the first frame.
    """

    key: str
    request: dict[str, Any]
    image: str | None = None

    @property
    def name(self) -> str:
        """The name of the clip's file."""
        return f"{self.key}{VIDEO}"


@dataclass(frozen=True)
class PlacedOrder:
    """An order with the line that asks for it.

    Attributes:
        line: The number of the line.
        out: What the line calls the video; the manifest repeats it.
        loras: The line's LoRAs.
    """

    order: ClipOrder
    line: int
    out: str | None = None
    loras: tuple[str, ...] = ()


@dataclass
class Defaults:
    """What lines that do not say it are given.

    Attributes:
        shape: Size and length of every clip.
        samples: How many clips each line asks for; each takes the next seed.
    """

    shape: ClipShape
    steps: int | None = None
    topk: float | None = None
    seed: int = 0
    samples: int = 1
    backend: str | None = None
    loras: tuple[LoraChoice, ...] = ()


@dataclass
class Ordering:
    """Turns the lines of a prompt file into orders.

    Attributes:
        loras: The names of sets of LoRAs, which messages to a maker use, and what they stand for.
    """

    bundle: Bundle
    defaults: Defaults
    loras: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _tokenizer: Tokenizer | None = None
    _hashes: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.bundle)

    def read(
        self, lines: Sequence[PromptLine | BadLine], made: Collection[str]
    ) -> tuple[list[PlacedOrder], list[BadLine]]:
        """The orders of all lines that are right, and the lines that are not.

        Args:
            made: Names of clips that are there already, whose requests need no check.
        """
        orders: list[PlacedOrder] = []
        bad: list[BadLine] = []
        for line in lines:
            if isinstance(line, BadLine):
                bad.append(line)
                continue
            try:
                with placed(line.place):
                    orders += self._orders(line, made)
            except WanforgeError as error:
                bad.append(BadLine(line.number, error))
        return orders, bad

    def _orders(self, line: PromptLine, made: Collection[str]) -> Iterator[PlacedOrder]:
        defaults = self.defaults
        if line.last_image is not None:
            raise RequestError("wanforge batch makes no clips with a last_image; wanforge generate does")
        first = defaults.seed if line.seed is None else line.seed
        check_seed(first)
        check_seed(first + defaults.samples - 1)
        choices = defaults.loras if line.loras is None else line.loras
        texts = tuple(str(LoraChoice(each.path.resolve(), each.strength, each.expert)) for each in choices)
        for seed in range(first, first + defaults.samples):
            order = self._order(line, seed, choices, texts)
            if seed == first and order.name not in made:
                self._check(order, choices)
            yield PlacedOrder(order, line.number, None if line.out is None else str(line.out), texts)

    def _order(self, line: PromptLine, seed: int, choices: tuple[LoraChoice, ...], texts: tuple[str, ...]) -> ClipOrder:
        defaults, model, recipe = self.defaults, self.bundle.model, self.bundle.recipe
        asked = Asked(
            model=model.name,
            recipe=recipe.name,
            prompt=line.prompt,
            width_px=defaults.shape.width_px,
            height_px=defaults.shape.height_px,
            frames=defaults.shape.frames,
            fps=model.video.fps,
            seed=seed,
            steps=model.sampler.steps if defaults.steps is None else defaults.steps,
            topk=defaults.topk,
            backend=defaults.backend,
            lora=self._named(texts),
        )
        image = None if line.image is None else line.image.resolve()
        return ClipOrder(
            key=self._key(asked, image, choices),
            request=msgspec.to_builtins(asked),
            image=None if image is None else str(image),
        )

    def _named(self, texts: tuple[str, ...]) -> str | None:
        """The name of a set of LoRAs."""
        if not texts:
            return None
        for name, known in self.loras.items():
            if known == texts:
                return name
        name = f"set {len(self.loras) + 1}"
        self.loras[name] = texts
        return name

    def _key(self, asked: Asked, image: Path | None, choices: tuple[LoraChoice, ...]) -> str:
        """What names a clip: the same for the same request of the same weights, wherever the files are."""
        told = {name: value for name, value in msgspec.to_builtins(asked).items() if value is not None}
        told.pop("lora", None)
        pictured = None if image is None else self._hash(image)
        loras = [(self._hash(each.path), each.strength, each.expert) for each in choices]
        whole = msgspec.json.encode([self.fingerprint, told, pictured, loras], order="deterministic")
        return hashlib.sha256(whole).hexdigest()[:DIGITS]

    def _hash(self, path: Path) -> str:
        """The hash of a file, computed once.

        Raises:
            RequestError: It cannot be read.
        """
        if path not in self._hashes:
            try:
                self._hashes[path] = sha256_of(path)
            except OSError as error:
                raise RequestError(f"{path}: {error.strerror}; check the name, and that it may be read") from None
        return self._hashes[path]

    def _check(self, order: ClipOrder, choices: tuple[LoraChoice, ...]) -> None:
        """Check a request with the model's own rules.

        Raises:
            RequestError, ConfigError: The model cannot do this.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.bundle.path(TOKENIZER))
        asked = msgspec.convert(order.request, Asked)
        request = asked.request(None if order.image is None else Path(order.image), choices)
        check_request(request, self.bundle.model, self.bundle.recipe, self._tokenizer)
