"""The bundles that are served, and what their models allow: every request is checked here, before it is a job.

Nothing here imports PyTorch.
"""

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from wanforge.configs.causal import CausalConfig, policy
from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.loading import Record
from wanforge.configs.sampler import Update
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.errors import ConfigError, RequestError, unknown_name
from wanforge.runtime.causal.lengths import check_length
from wanforge.runtime.inputs.lora import LoraChoice
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.reference.causal.prompts import check_untimed
from wanforge.runtime.request import CheckedRequest, Request, check_request, concerning
from wanforge.runtime.service.job import Job, Submission
from wanforge.runtime.service.live.terms import LIVE, LiveTerms


class Asked(Record, frozen=True, kw_only=True):
    """The checked request of a job, as the job store keeps it and a worker reads it.

    Attributes:
        model: The name under which the bundle is served.
        image: Name of the object that holds the first frame.
        backend: The backend that was asked for; None if any will do.
        topk: None for the model's own.
        times: Times of the steps, and how one leads to the next; None for the model's own, too.
        lora: The name under which LoRAs are served with the bundle; None for the model as it is.
        traceparent: The trace that the request belongs to, as W3C's Trace Context writes it.
        is_causal: Whether the model makes the video chunk by chunk, at times of its own, which `steps` only counts.
        continues: Name of the object that holds the video from whose last frame it goes on. `frames` is what it adds,
            with that frame.
        live: How it is watched while it is made, if it is. Then `frames` is the most that it may have.
    """

    model: str
    recipe: str
    prompt: str
    width_px: int
    height_px: int
    frames: int
    fps: int
    seed: int
    steps: int
    topk: float | None = None
    times: tuple[float, ...] | None = None
    update: Update | None = None
    lora: str | None = None
    image: str | None = None
    backend: str | None = None
    traceparent: str | None = None
    is_causal: bool = False
    continues: str | None = None
    live: LiveTerms | None = None

    @classmethod
    def of(cls, job: Job) -> "Asked":
        """The request of a job, as it is to be made.

        Raises:
            msgspec.ValidationError: Another version has written it, and it asks for something that this one cannot do.
        """
        return msgspec.convert(job.request, cls)

    @classmethod
    def known_of(cls, job: Job) -> "Asked":
        """What this version knows of the request of a job, to tell of it."""
        known = {name: value for name, value in job.request.items() if name in cls.__struct_fields__}
        return msgspec.convert(known, cls)

    def request(self, image: Path | None, loras: tuple[LoraChoice, ...] = ()) -> Request:
        """The request for a pipeline.

        Args:
            image: The file of the first frame.
            loras: What the name of the LoRAs stands for.
        """
        # The length of a live stream is given in chunks, and may be more than that of any clip.
        shape = ClipShape(self.width_px, self.height_px, 1 if self.live else self.frames)
        return Request(
            self.prompt,
            shape,
            image,
            self.seed,
            None if self.is_causal else self.steps,
            topk=self.topk,
            times=self.times,
            update=self.update,
            loras=loras,
        )


@dataclass(frozen=True)
class Served:
    """A bundle that is served.

    Attributes:
        name: What clients call it.
        fingerprint: Tells it from every other bundle, and from itself with other weights.
        loras: The names of the LoRAs that clients may ask for.
    """

    name: str
    fingerprint: str
    bundle: Bundle
    tokenizer: Tokenizer
    loras: tuple[str, ...] = ()

    @classmethod
    def open(cls, root: Path, name: str = "") -> "Served":
        """Open a bundle.

        Raises:
            BundleError: The folder is no bundle, or its tokenizer is missing or damaged.
        """
        bundle = Bundle.open(root)
        return cls(name or bundle.model.name, fingerprint(bundle), bundle, Tokenizer(bundle.path(TOKENIZER)))

    def frames(self, seconds: float | None, frames: int | None) -> int:
        """The number of frames of a clip.

        Args:
            seconds: Its length, from which follows the nearest number of frames that the model can make.

        Raises:
            RequestError: Both are given.
        """
        video = self.bundle.model.video
        if seconds is None:
            return video.frames if frames is None else frames
        if frames is not None:
            raise RequestError("give seconds or frames, not both")
        return 1 + 4 * max(0, round(seconds * video.fps / 4))

    def check(self, asked: Asked, image: Path | None) -> CheckedRequest:
        """Check a request with the model's own rules.

        Raises:
            RequestError, ConfigError: The model cannot do this; the error's `field` says which part of it.
        """
        with concerning("lora"):
            if asked.lora is not None and asked.lora not in self.loras:
                raise RequestError(unknown_name(f"LoRA of {self.name}", asked.lora, self.loras or ("none",)))
        request, model = asked.request(image), self.bundle.model
        if asked.live is not None:
            self.check_scene(asked.prompt)
            causal = causal_of(self).beginning(with_image=image is not None)
            with concerning("seconds"):
                check_length(policy(asked.live.cache), causal, asked.fps, asked.live.chunks)
            shape = msgspec.structs.replace(request.shape, frames=frames_of(causal.first_frames))
            request = replace(request, shape=shape)
        return check_request(request, model, self.bundle.recipe, self.tokenizer)

    def check_scene(self, prompt: str) -> None:
        """Check what a live stream is to show.

        Raises:
            RequestError: The prompt is empty or too long, or says how long it holds.
        """
        with concerning("prompt"):
            check_untimed(prompt)
            self.tokenizer.encode(prompt, self.bundle.model.dit.text_rows)

    def submission(self, owner: str, asked: Asked, **more: Any) -> Submission:
        """The job for a checked request.

        Args:
            more: Other fields of the submission.
        """
        return Submission(
            owner=owner,
            bundle=self.fingerprint,
            shape=LIVE if asked.live else name_of(ClipShape(asked.width_px, asked.height_px, asked.frames)),
            steps=asked.steps,
            request=msgspec.to_builtins(asked),
            objects=tuple(name for name in (asked.image, asked.continues) if name is not None),
            **more,
        )


class Catalogue:
    """All bundles that are served, the first of which is the default.

    Raises:
        ConfigError: Two bundles have the same name.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self.served = list(served)
        names = [each.name for each in self.served]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"two bundles would be served as {name!r}; give one of them another name in [[bundles]]"
                )

    @classmethod
    def open(cls, places: Sequence[tuple[str, Path]], loras: Mapping[Path, Iterable[str]] | None = None) -> "Catalogue":
        """Open bundles, each given by its name and its folder.

        Where a name is empty, the model's name is used, with the recipe's behind it if several bundles have that model.

        Args:
            loras: The names of LoRAs, by folder.
        """
        found = [(name, Served.open(root)) for name, root in places]
        models = [served.bundle.model.name for _, served in found]
        named = []
        for name, served in found:
            model, recipe = served.bundle.model.name, served.bundle.recipe.name
            usual = model if models.count(model) == 1 else f"{model}-{recipe}"
            names = tuple((loras or {}).get(served.bundle.root, ()))
            named.append(replace(served, name=name or usual, loras=names))
        return cls(named)

    def find(self, name: str | None, recipe: str | None) -> Served:
        """The bundle that a client means by a name, or a model's name, and a recipe.

        Raises:
            RequestError: There is none.
        """
        if name is None and recipe is None:
            return self.served[0]
        with concerning("model"):
            known = [each for each in self.served if name in (None, each.name, each.bundle.model.name)]
            if not known:
                raise RequestError(unknown_name("model", name or "", [each.name for each in self.served]))
        with concerning("recipe"):
            for each in known:
                if recipe in (None, each.bundle.recipe.name):
                    return each
            recipes = sorted({each.bundle.recipe.name for each in known})
            raise RequestError(unknown_name("recipe of this model", recipe or "", recipes))


def causal_of(served: Served) -> CausalConfig:
    """How the model of a bundle makes a video chunk by chunk.

    Raises:
        RequestError: It makes whole clips.
    """
    model = served.bundle.model
    if not model.causal:
        with concerning("model"):
            raise RequestError(f"{served.name} makes whole clips, which cannot be watched while they are made")
    return model.causal


def fingerprint(bundle: Bundle) -> str:
    """A hash of a bundle's model, recipe and weights. Graphs and engines do not count, so building more of them leaves
    queued jobs as they are."""
    files = {
        n: record.sha256 for n, record in bundle.manifest.files.items() if n.startswith(("weights/", "tokenizer/"))
    }
    whole = msgspec.json.encode([bundle.model, bundle.recipe, files], order="deterministic")
    return hashlib.sha256(whole).hexdigest()[:16]


def name_of(shape: ClipShape) -> str:
    """What jobs call a shape."""
    return f"{shape.width_px}x{shape.height_px}x{shape.frames}"


def drawn_seed() -> int:
    """A seed for a request that names none. It is short enough for JavaScript's numbers."""
    return secrets.randbelow(1 << 32)
