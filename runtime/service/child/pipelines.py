"""Makes clips with the pipelines of several bundles, which stay loaded as far as there is memory for them."""

import gc
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from PIL import Image

from wanforge.configs.clip import ClipShape
from wanforge.engines.bundle.bundle import Bundle
from wanforge.errors import BundleError, RequestError, WanforgeError, message_of
from wanforge.host.capacity import available_bytes
from wanforge.progress import Overall
from wanforge.runtime.inputs.embeddings import Embeddings
from wanforge.runtime.inputs.lora import LoraChoice, read_choices
from wanforge.runtime.measure.cost.shares import stage_shares
from wanforge.runtime.measure.requests.meters import Nvml
from wanforge.runtime.pipeline import Pipeline, open_pipeline
from wanforge.runtime.request import CheckedRequest, Request, Timings
from wanforge.runtime.service.catalogue import Asked, fingerprint, name_of
from wanforge.runtime.service.child.extending import continuing, write_extended
from wanforge.runtime.service.child.live.streamed_clip import streamed
from wanforge.runtime.service.child.loras import told_loras
from wanforge.runtime.service.child.maker import Maker, Report
from wanforge.runtime.service.child.messages import BundlePlace, ChildUsage, ClipMade, MakeClip, SetUp
from wanforge.runtime.service.child.pictures import Pictures
from wanforge.runtime.service.child.stills import Pace, Stills

log = logging.getLogger(__name__)

SHARE = 0.8
"""The share of the memory that is free at the start which the loaded bundles of all its children may take, if nothing
else is set."""
Loaded = tuple[str, str]
"""Fingerprint of a bundle, and the backend that was asked for."""


class Pipelines(Maker):
    """The pipelines that were used last.

    Attributes:
        warms_up: Whether clips are made beforehand on a GPU, so that the first one that is asked for takes no longer
            than others.
    """

    warms_up = True

    def __init__(self, setup: SetUp) -> None:
        torch.set_num_threads(setup.threads)
        self.setup, self.embeddings = setup, Embeddings()
        self.memory_bytes = setup.memory_bytes or SHARE * free_bytes() / setup.sharers
        self.meter = GpuMeter()
        self.places: dict[str, BundlePlace] = {}
        self._kept: OrderedDict[Loaded, Pipeline] = OrderedDict()
        self._warm: dict[str, str] = {}
        self._pace = Pace()

    def load(self, bundles: Sequence[BundlePlace], report: Report) -> dict[str, str]:
        self._kept.clear()
        self._warm.clear()
        reclaim()
        self.places = {place.fingerprint: place for place in bundles}
        refused = {}
        for place in bundles:
            try:
                if self._kept and not self._fits(place):
                    continue
                pipeline = self._pipeline(place.fingerprint, self.setup.backend, report)
                if self.warms_up and pipeline.backend.device.type != "cpu":
                    self._warm[place.fingerprint] = name_of(warm_up(pipeline, report))
            except (WanforgeError, OSError) as error:
                refused[place.fingerprint] = message_of(error)
        return refused

    def loaded(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(found for found, _ in self._kept))

    def warm(self) -> dict[str, str]:
        return self._warm

    def usage(self) -> ChildUsage:
        kept = self.embeddings
        return ChildUsage(
            gpu_memory_bytes=self.meter.used_bytes(),
            joules=self.meter.joules(),
            text_hits=kept.hits,
            text_misses=kept.misses,
        )

    def make(self, order: MakeClip, report: Report) -> ClipMade:
        asked, folder = msgspec.convert(order.request, Asked), Path(order.folder)
        pipeline = self._pipeline(order.bundle, asked.backend or self.setup.backend, report)
        loras = self._loras(order.bundle, asked.lora)
        request = asked.request(None if order.image is None else Path(order.image), loras)
        if asked.live is not None:
            return streamed(pipeline, request, asked, order, report)
        before, frames = None if order.before is None else Path(order.before), asked.frames
        if before is not None:
            request, count = continuing(pipeline, request, before, report)
            frames += count - 1
        checked = pipeline.check(request)
        pictures, percent = Pictures(folder, frames), Percent(pipeline, checked, report)
        pipeline.watch = Stills(folder, percent, self._pace) if pipeline.model.preview else None
        try:
            video = folder / "video.mp4"
            if before is None:
                timings = pipeline.write_video(checked, video, percent, pictures)
            else:
                timings = write_extended(pipeline, checked, before, video, percent, pictures)
            files = {"video": "video.mp4", **pictures.finish()}
        except BaseException:
            pictures.close()
            raise
        return ClipMade(
            order.ticket,
            files,
            pipeline.backend.name,
            timings.stages,
            {
                **details(asked, timings, pictures),
                "frames": frames,
                "loras": told_loras(pipeline, loras),
            },
        )

    def _loras(self, bundle: str, name: str | None) -> tuple[LoraChoice, ...]:
        """What the name of LoRAs stands for; only the settings name their files."""
        known = self.places[bundle].loras
        if name is not None and name not in known:
            raise RequestError(f"the LoRA {name!r} is not served any more; submit the request without it")
        return () if name is None else read_choices(known[name])

    def _pipeline(self, bundle: str, backend: str, report: Report) -> Pipeline:
        """The pipeline of a bundle, opened if necessary."""
        key = bundle, backend
        if key not in self._kept:
            place = self.places.get(bundle)
            if place is None:
                raise BundleError(f"the bundle {bundle} is not served any more; submit the request again")
            while self._kept and not self._fits(place):
                self._kept.popitem(last=False)
                reclaim()
            self._kept[key] = self._open(place, backend, report)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _open(self, place: BundlePlace, backend: str, report: Report) -> Pipeline:
        bundle = Bundle.open(Path(place.root))
        if fingerprint(bundle) != place.fingerprint:
            raise BundleError(f"{place.root}: was imported again in the meantime; reload the service, with SIGHUP")
        opened = open_pipeline(
            bundle, backend, progress=lambda stage, done, total, unit="": report("load", 100 * done // max(1, total))
        )
        opened.embeddings = self.embeddings
        for name, texts in place.loras.items():
            try:
                opened.loras.check(read_choices(texts))
            except (WanforgeError, OSError) as error:  # requests that name it fail, and all others are served
                log.error("%s: the LoRA %r cannot be used: %s", place.root, name, message_of(error))
        return opened

    def _fits(self, place: BundlePlace) -> bool:
        """Whether there is memory for one more bundle."""
        taken = sum(weights_bytes(pipeline.bundle) for pipeline in self._kept.values())
        return taken + weights_bytes(Bundle.open(Path(place.root))) <= self.memory_bytes


class GpuMeter:
    """The memory of the GPU that is in use, and the energy that it has taken since this was made."""

    def __init__(self) -> None:
        self.nvml = Nvml.open()
        self.before = None if self.nvml is None else self.nvml.joules()

    def used_bytes(self) -> int | None:
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info()
        return total - free

    def joules(self) -> float | None:
        now = None if self.nvml is None else self.nvml.joules()
        return None if now is None or self.before is None else now - self.before


class Percent:
    """The progress of a request as a percentage of all its stages."""

    def __init__(self, pipeline: Pipeline, checked: CheckedRequest, report: Report) -> None:
        self.overall = Overall(stage_shares(pipeline.model, pipeline.recipe, checked))
        self.report = report

    def __call__(self, stage: str, done: int, total: int, unit: str = "", /) -> None:
        self.overall.report(stage, done, total)
        self.report(stage, min(99, int(100 * self.overall.share)))


def details(asked: Asked, timings: Timings, pictures: Pictures) -> dict[str, object]:
    """What the API tells of a clip besides its files."""
    return {
        "timings": timings.stages,
        "step_seconds": timings.steps,
        "total_seconds": timings.total,
        "seed": asked.seed,
        "recipe": asked.recipe,
        "spritesheet": pictures.layout,
    }


def warm_up(pipeline: Pipeline, report: Report) -> ClipShape:
    """Make two clips of the model's usual shape, which is returned, so that no request has to load kernels and weights,
    or to record programs, which happens when they run for the second time."""
    model = pipeline.model
    shape = model.video.shape(None, None)
    image = Image.new("RGB", (shape.width_px, shape.height_px)) if model.task == "i2v" else None
    # The prompts differ, since the embedding of one is remembered. Each expert makes a step, or all that have times.
    steps = None if model.sampler.times else len(model.experts)
    for prompt in (model.example_prompt, f"{model.example_prompt} again"):
        checked = pipeline.check(Request(prompt, shape, image, steps=steps))
        progress = Percent(pipeline, checked, lambda stage, percent: report(f"warm-up: {stage}", percent))
        timings = Timings()
        latents = pipeline.latents(checked, timings, progress)
        for _ in pipeline.frames(latents, shape, timings, progress):
            pass
    return shape


def reclaim() -> None:
    """Give back the memory of what was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weights_bytes(bundle: Bundle) -> int:
    """The bytes of a bundle's weights, about what it takes in memory."""
    return sum(record.bytes for name, record in bundle.manifest.files.items() if name.startswith("weights/"))


def free_bytes() -> float:
    """The memory that is free: the GPU's, or this machine's where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else available_bytes()


def create(setup: SetUp) -> Maker:
    """Make clips with PyTorch and whatever backends are installed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return Pipelines(setup)
