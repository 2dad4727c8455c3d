"""One request from prompt to frames: text, condition, denoising, decoding, each timed.

prompt ─ tokens ─ embedding ─┐
image ── condition ──────────┼─ steps of the denoiser ── latents ── frames
seed ─── noise ──────────────┘
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.configs.topk import selected_blocks
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle
from wanforge.errors import RequestError, ResourceError
from wanforge.runtime.backends.base import Backend, Session
from wanforge.runtime.graphs import graphs
from wanforge.runtime.image import condition, open_image, to_pixels
from wanforge.runtime.memory.host import available_bytes, needed_bytes
from wanforge.runtime.reference.dit import attention_blocks, patchify, rope_tables, sinusoid, unpatchify
from wanforge.runtime.reference.sampler import Step, gaussian, sample, schedule
from wanforge.runtime.reference.text_encoder import pad_rows, position_buckets
from wanforge.runtime.schedule import context_rows, denoise_schedule, text_schedule, vae_schedule
from wanforge.runtime.text import Tokenizer
from wanforge.whole_file import write_atomically

SEEDS = 1 << 64
"""Seeds that the generator tells apart: 0 up to this."""

Progress = Callable[[str, int, int], None]
"""Told the stage, how many of its parts are done, and how many there are."""


@dataclass(frozen=True)
class Request:
    """What a user asks for. What is None follows from the model.

    Attributes:
        prompt: text, in English for these models.
        shape: size and length of the clip.
        image: first frame, for image-to-video models.
        seed: of the noise.
        steps: 1 to 4.
        topk: share of key blocks that attention sees.
        ode: follow the flow without fresh noise.
        noise: file to take the noise from, instead of the seed.
    """

    prompt: str
    shape: ClipShape
    image: Path | None = None
    seed: int = 0
    steps: int | None = None
    sigma_max: float | None = None
    topk: float | None = None
    ode: bool = False
    noise: Path | None = None


@dataclass
class Timings:
    """Seconds per stage, and per step of the denoiser."""

    stages: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """A request that has been checked against the model and found possible."""

    request: Request
    ids: list[int]
    steps: list[Step]
    slots: int

    @property
    def noise_names(self) -> list[str]:
        """What its noise is called in a file, in the order of use."""
        return ["initial"] if self.request.ode else noise_names(len(self.steps))


class Pipeline:
    """A model ready to serve requests, one after the other."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.model: ModelConfig = bundle.model
        self.recipe = bundle.recipe
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.tokenizer = Tokenizer(bundle.path(TOKENIZER))

    def check(self, request: Request) -> Job:
        """Everything that can be wrong with a request, its files included, before anything is computed.

        Raises:
            RequestError, ConfigError: the request does not make sense for this model.
            ResourceError: this machine's memory is too small for it.
        """
        job = self.job(request)
        if self.backend.device.type == "cpu":
            self._check_memory(request.shape)
        self.backend.prepare(request.shape)
        return job

    def job(self, request: Request) -> Job:
        """What a request comes to, on a machine that is large enough.

        Raises:
            RequestError, ConfigError: the request does not make sense for this model.
        """
        model = self.model
        if (request.image is None) == (model.task == "i2v"):
            need = "needs an image; give one with --image" if request.image is None else "takes no image"
            raise RequestError(f"{model.name} {need}")
        if request.image is not None:
            open_image(request.image)
        if not 0 <= request.seed < SEEDS:
            raise RequestError(f"seed {request.seed} is out of range; use 0 to {SEEDS - 1}")
        ids = self.tokenizer.encode(request.prompt, model.dit.text_rows)
        blocks = attention_blocks(self.recipe)
        if blocks is None and request.topk is not None:
            raise RequestError(
                f"recipe {self.recipe.name!r} attends to every key, so top-k means nothing; leave it out"
            )
        slots = 1
        if blocks is not None:
            topk = model.topk if request.topk is None else request.topk
            if not 0 < topk <= 1:
                raise RequestError(f"top-k {topk} is not a share of the key blocks; use more than 0 and at most 1")
            slots = selected_blocks(topk, blocks.num_keys(request.shape.tokens))
        sampler = model.sampler
        num_steps = sampler.steps if request.steps is None else request.steps
        sigma_max = sampler.sigma_max if request.sigma_max is None else request.sigma_max
        job = Job(request, ids, schedule(num_steps, sigma_max, sampler.boundary), slots)
        if request.noise is not None:
            check_noise(request.noise, self.latent_shape(request.shape), job.noise_names)
        return job

    def _check_memory(self, shape: ClipShape) -> None:
        needed = needed_bytes(self.model, self.recipe, shape, self.backend.dtype.itemsize)
        available = available_bytes()
        if needed > available:
            raise ResourceError(
                f"{shape.width_px}x{shape.height_px} with {shape.frames} frames needs about {needed / 1e9:.1f} GB of "
                f"memory on this backend and {available / 1e9:.1f} GB are free; make the clip smaller or shorter"
            )

    def make(self, request: Request) -> tuple[Tensor, Tensor]:
        """A whole request: latents, float64 ``[1, 16, F, H, W]``, and frames, uint8 ``[T, H, W, 3]``."""
        latents = self.latents(self.check(request), Timings())
        return latents, torch.stack(list(self.frames(latents, request.shape, Timings())))

    def latents(self, job: Job, timings: Timings, progress: Progress = lambda *_: None) -> Tensor:
        """Run a request up to its clean latents, float64 ``[1, 16, F, H, W]``."""
        denoiser = self.denoiser(job, timings, progress)
        with timings.stage("denoise"):
            noise = (each.to(self.backend.device) for each in self.noise(job))
            return sample(denoiser, job.steps, noise, ode=job.request.ode).cpu()

    def denoiser(self, job: Job, timings: Timings, progress: Progress = lambda *_: None) -> "Denoiser":
        """Embed the prompt, encode the image, and compute whatever the steps share."""
        self.backend.prepare(job.request.shape)
        with timings.stage("text"):
            text = self.embed(job.ids, progress)
            self.backend.synchronise()
        channels = None
        if job.request.image is not None:
            with timings.stage("condition"):
                channels = self.encode_image(job.request.image, job.request.shape, progress)
        with timings.stage("prepare"):
            return Denoiser(self, job, text, channels, timings, progress)

    def embed(self, ids: list[int], progress: Progress = lambda *_: None) -> Tensor:
        """An embedded prompt ``[1, 512, E]``, zeros after its own rows."""
        session = self.backend.session(text_schedule(self.model, self.graphs, len(ids)))
        session["ids"].copy_(torch.tensor([ids]))
        session["buckets"].copy_(position_buckets(len(ids), self.model.text_encoder))
        run(session, "text", "text", progress)
        return pad_rows(session["embedding"][0], self.model.dit.text_rows)[None]

    def encode_image(self, path: Path, shape: ClipShape, progress: Progress = lambda *_: None) -> Tensor:
        """The 20 channels that an image-to-video denoiser is conditioned on, in the compute type."""
        session = self.backend.session(vae_schedule(self.graphs, shape, "encode"))
        first = to_pixels(open_image(path), shape.width_px, shape.height_px)
        session["first_pixels"].copy_(first[:, :, None])
        session["pixels"].zero_()
        latents = []
        for index, program, output in chunks(shape.latent_frames, "latent"):
            session.run(program)
            latents.append(session[output].to("cpu", copy=True))
            progress("condition", index + 1, shape.latent_frames)
        return condition(torch.cat(latents, 2))

    def noise(self, job: Job) -> Iterator[Tensor]:
        """The request's noise: from its seed, or from its file."""
        shape = self.latent_shape(job.request.shape)
        if job.request.noise is None:
            return gaussian(shape, job.request.seed)
        return load_noise(job.request.noise, shape, job.noise_names)

    def latent_shape(self, shape: ClipShape) -> tuple[int, ...]:
        channels = self.model.dit.out_channels
        return (1, channels, shape.latent_frames, shape.latent_height, shape.latent_width)

    def frames(
        self, latents: Tensor, shape: ClipShape, timings: Timings, progress: Progress = lambda *_: None
    ) -> Iterator[Tensor]:
        """Decode latents frame by frame: uint8 ``[H, W, 3]``, as they come."""
        self.backend.prepare(shape)
        session = self.backend.session(vae_schedule(self.graphs, shape, "decode"))
        for index, program, output in chunks(shape.latent_frames, "pixels"):
            with timings.stage("decode"):
                source = session["first_latent" if index == 0 else "latent"]
                source.copy_(latents[:, :, index : index + 1])
                session.run(program)
                pixels = session[output][0].float().clamp(-1, 1)
                # Halves go up: what upstream's writer does.
                images = ((pixels + 1) / 2 * 255 + 0.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
                self.backend.synchronise()
            with timings.stage("transfer"):
                images = images.cpu()
            progress("decode", index + 1, shape.latent_frames)
            yield from images


class Denoiser:
    """The denoiser of one request: what depends on the prompt, the steps and the shape alone is computed here, once."""

    def __init__(
        self,
        pipeline: Pipeline,
        job: Job,
        text: Tensor,
        channels: Tensor | None,
        timings: Timings,
        progress: Progress,
    ) -> None:
        self.backend, self.shape, self.timings, self.progress = pipeline.backend, job.request.shape, timings, progress
        self.channels = None if channels is None else channels.to(self.backend.device)
        model = pipeline.model
        tile = pipeline.recipe.rows_per_scale
        kept, counts = context_rows(len(job.ids), model.dit.text_rows, tile, pipeline.backend.text_rows_multiple)
        experts = [step.expert for step in job.steps]
        self.session = session = pipeline.backend.session(
            denoise_schedule(model, pipeline.graphs, self.shape, experts, context_rows=len(kept), slots=job.slots),
        )
        session["text"].copy_(text)
        session["kept_rows"].copy_(torch.tensor(kept))
        session["key_bias"].copy_(torch.tensor(counts).log())
        for name, table in zip(("cos", "sin"), rope_tables(self.shape.grid), strict=True):
            session[name].copy_(table)
        session["slots"].zero_()
        for step in job.steps:
            timestep = torch.tensor([step.timestep])
            session[f"sinusoid.{step.index}"].copy_(sinusoid(timestep, model.dit.frequency_dim))
        run(session, "prompt", "prepare", progress)
        run(session, "times", "prepare", progress)
        self.backend.synchronise()

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        start = time.perf_counter()
        session = self.session
        x = latents.to(self.backend.device, self.backend.dtype)
        x = x if self.channels is None else torch.cat((x, self.channels), 1)
        session["patches"].copy_(patchify(x))
        run(session, f"step.{step.index}", f"step {step.index + 1}", self.progress)
        velocity = unpatchify(session["velocity"], self.shape.grid).to(latents.device)
        self.backend.synchronise()
        self.timings.steps.append(time.perf_counter() - start)
        return velocity


def run(session: Session, program: str, stage: str, progress: Progress) -> None:
    """Run a program launch by launch, saying so."""
    launches = session.bound(program)
    for index, launch in enumerate(launches):
        launch()
        progress(stage, index + 1, len(launches))


def chunks(latent_frames: int, output: str) -> Iterator[tuple[int, str, str]]:
    """Index, program and output buffer of each chunk of a clip on its way through the VAE."""
    yield 0, "first", f"first_{output}"
    for index in range(1, latent_frames):
        yield index, f"next.{(index - 1) % 2}", output


def noise_names(num_steps: int) -> list[str]:
    """The tensors of a noise file: one to start from, and one per step."""
    return ["initial", *(f"step.{index}" for index in range(num_steps))]


def write_noise(path: Path, shape: tuple[int, ...], seed: int, num_steps: int) -> None:
    """Write the noise that a seed stands for, whole or not at all."""
    source = gaussian(shape, seed)
    write_atomically(path, save({name: next(source) for name in noise_names(num_steps)}))


def check_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> None:
    """Look at a noise file without reading its data.

    Raises:
        RequestError: the file is missing or damaged, or its noise is of another shape or for fewer steps.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise RequestError(f"{path}: no such noise file") from None
    except SafetensorError as error:
        raise RequestError(f"{path}: not a noise file ({error})") from None
    for name in names:
        if found.get(name) != shape:
            what = list(found[name]) if name in found else "missing"
            raise RequestError(f"{path}: {name} is {what}, this request needs {list(shape)}")


def load_noise(path: Path, shape: tuple[int, ...], names: Sequence[str]) -> Iterator[Tensor]:
    """Noise from a file that `write_noise`, or anything else, wrote; refused as by `check_noise`."""
    check_noise(path, shape, names)
    found = load_file(path)
    return iter([found[name].float() for name in names])
