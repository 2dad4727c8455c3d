"""One request from prompt to frames: text, condition, denoising, decoding, each timed.

prompt ─ tokens ─ embedding ─┐
image ── condition ──────────┼─ steps of the denoiser ── latents ── frames
seed ─── noise ──────────────┘
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor

from wanforge.configs.clip import ClipShape
from wanforge.configs.model import ModelConfig
from wanforge.engines.bundle.bundle import TOKENIZER, Bundle, weights_name
from wanforge.engines.graph_key import check_current
from wanforge.keywords import with_settings
from wanforge.progress import Progress, silent
from wanforge.runtime.backends import AUTO, create_backend
from wanforge.runtime.backends.base import Backend
from wanforge.runtime.backends.choice import resolve_backend
from wanforge.runtime.causal.chunk_denoiser import Alive, ChunkDenoiser, go
from wanforge.runtime.causal.kept import KeptApart
from wanforge.runtime.causal.making import MadeChunk, make_chunks, show_chunks
from wanforge.runtime.causal.schedule import PREFIXES
from wanforge.runtime.causal.stream import (
    CheckedStream,
    Scene,
    Streamed,
    StreamSettings,
    check_stream,
    check_streams,
)
from wanforge.runtime.denoiser import Denoiser, Watch
from wanforge.runtime.frames.decoding import FrameDecoder, chunks
from wanforge.runtime.graphs import graphs
from wanforge.runtime.inputs.embeddings import EmbeddingKey, Embeddings
from wanforge.runtime.inputs.noise import load_noise, write_noise
from wanforge.runtime.inputs.text import Tokenizer
from wanforge.runtime.lora.fitting import Fitting
from wanforge.runtime.memory.estimate import check_memory
from wanforge.runtime.memory.weights import check_tensors
from wanforge.runtime.output.clip import Clip
from wanforge.runtime.output.video import FrameSink, video_writer
from wanforge.runtime.reference.ranks.strips import Strip
from wanforge.runtime.reference.sampler import gaussian, sample
from wanforge.runtime.reference.text_encoder import pad_rows, position_buckets
from wanforge.runtime.request import (
    CheckedRequest,
    Request,
    Settings,
    Timings,
    check_request,
    concerning,
    latent_shape,
    request_for,
)
from wanforge.runtime.schedule import text_schedule, vae_schedule

if TYPE_CHECKING:
    from PIL.Image import Image


class Pipeline:
    """A model that is ready to serve requests, one after the other.

    Attributes:
        embeddings: Keeps the embeddings of prompts, if it is set; the stage ``text`` is left out for prompts in it.
        watch: Is shown what each step of the denoiser predicts, if it is set.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        self.model: ModelConfig = bundle.model
        self.recipe = bundle.recipe
        self.graphs = graphs(bundle.model, bundle.recipe)
        self.tokenizer = Tokenizer(bundle.path(TOKENIZER))
        self.embeddings: Embeddings | None = None
        self.loras = Fitting(bundle, backend)
        self.watch: Watch | None = None

    @with_settings(Settings)
    def generate(
        self,
        prompt: str,
        image: "str | Path | Image | None" = None,
        *,
        last_image: "str | Path | Image | None" = None,
        on_progress: Progress = silent,
        **settings: Unpack[Settings],
    ) -> Clip:
        """Make a clip.

        Args:
            prompt: What the clip shows, in English for these models.
            image: The first frame, for image-to-video models: a file or a picture.
            last_image: The last frame, likewise, in addition. Published models were distilled with a first one alone.
            on_progress: Called with the stage, the number of its parts that are done, and the number of all its parts.
            settings: See `Settings`.

        Raises:
            RequestError, ConfigError: The request does not make sense for this model.
            ResourceError: This machine's memory is too small for it.
            BundleError: The bundle lacks what the backend needs for it.
        """
        request = request_for(self.model, prompt, image, settings)
        last = Path(last_image) if isinstance(last_image, str) else last_image
        return self.make(replace(request, last_image=last), on_progress)

    @with_settings(StreamSettings)
    def stream(
        self,
        prompt: str,
        image: "str | Path | Image | None" = None,
        *,
        on_progress: Progress = silent,
        **settings: Unpack[StreamSettings],
    ) -> Iterator[Streamed]:
        """Make a video chunk by chunk with a causal model, and yield each chunk as soon as its frames are decoded. What
        comes after a chunk is not begun before it is asked for.

        Args:
            prompt: What the video shows. It may have parts that hold one after the other, and then decides how long the
                video is: ``a man in a park[5s] | a man jumps[10s#]``, where ``#`` begins a new scene.
            image: The first frame, or None: a file or a picture.
            on_progress: Called with ``chunk``, the number of chunks that are done, and the number of all of them, at
                the end of each chunk and before each layer.
            settings: See `StreamSettings`.

        Raises:
            RequestError, ConfigError: The request does not make sense for this model, or the backend cannot serve it.
            ResourceError: This machine's memory is too small for it.
        """
        causal = check_streams(self.model)
        request = request_for(self.model, prompt, image, settings)
        stream = check_stream(request, self.model, causal, self.tokenizer, settings)
        self.check_live(stream)
        timings = Timings()
        made = self.rollout(stream, stream.scenes, timings, on_progress)
        return show_chunks(made, lambda latents: self.decode(latents, stream.shape, timings))

    def check(self, request: Request) -> CheckedRequest:
        """Check a request and prepare the backend for it, before anything is computed.

        Raises:
            RequestError, ConfigError: The request does not make sense for this model.
            ResourceError: This machine's memory is too small for it.
            BundleError: The bundle lacks what the backend needs for it.
            CheckpointError: A LoRA is damaged, or does not fit the model.
        """
        if self.model.causal:
            self.resolve(request)  # a whole clip is asked for more strictly than a stream
            return self.check_live(self._as_stream(request))
        return self._check(request, request.shape)

    def check_live(self, stream: CheckedStream) -> CheckedRequest:
        """Check the request for a video that is made chunk by chunk against this machine, and prepare the backend for
        it; see `check`."""
        return self._check(stream.request, stream.live_shape, stream.kept)

    def _check(self, request: Request, live: ClipShape, kept: KeptApart | None = None) -> CheckedRequest:
        """Check a request of which this much takes memory at the same time, with what a stream keeps."""
        checked = self.resolve(request)
        self.loras.fit(live)
        with concerning("loras"):
            self.loras.check(request.loras)
        if self.backend.device.type == "cpu":
            check_memory(self.model, self.recipe, live, self.backend.dtype.itemsize, kept)
        self.loras.make_way(request.loras)
        self.backend.prepare(live, kept)
        return checked

    def _as_stream(self, request: Request) -> CheckedStream:
        """A request for a whole video as one for its chunks."""
        return check_stream(request, self.model, check_streams(self.model), self.tokenizer, {})

    def resolve(self, request: Request) -> CheckedRequest:
        """Check a request without regard to this machine's memory; see `request.check_request`."""
        return check_request(request, self.model, self.recipe, self.tokenizer)

    def make(self, request: Request, progress: Progress = silent) -> Clip:
        """Serve a whole request and return its latents and frames. Raises the same errors as `check`."""
        timings = Timings()
        latents = self.latents(self.check(request), timings, progress)
        frames = torch.stack(list(self.frames(latents, request.shape, timings, progress)))
        return Clip(request, frames.numpy(), latents, self.model.video.fps, timings, self.backend.name)

    def write_video(
        self, checked: CheckedRequest, path: Path, progress: Progress = silent, watch: FrameSink | None = None
    ) -> Timings:
        """Serve a request into a video file, frame by frame; the file appears under its name when it is complete.

        Frames are encoded while the next ones are decoded. The stage ``write`` is the time that the request waits for
        the encoder: for its start, for room in its queue, and after the last frame.

        Args:
            progress: It may raise an exception, which ends the request. The pipeline can then serve the next one.
            watch: Is given every frame as well.

        Raises:
            ResourceError: The encoder failed, for example on a full disk.
        """
        timings = Timings()
        latents = self.latents(checked, timings, progress)
        self.write_frames(latents, checked.request.shape, path, timings, progress, watch)
        return timings

    def write_frames(
        self,
        latents: Tensor,
        shape: ClipShape,
        path: Path,
        timings: Timings,
        progress: Progress = silent,
        watch: FrameSink | None = None,
    ) -> None:
        """The second half of `write_video`: decode latents ``[1, C, F, H, W]`` into a video file."""
        with (
            timings.stage("write"),
            video_writer(path, shape.width_px, shape.height_px, self.model.video.fps) as write,
        ):
            for frame in self.frames(latents, shape, timings, progress):
                write(frame)
                if watch is not None:
                    watch(frame)
        # What is left without the decoder's time is the time of waiting for the encoder.
        timings.stages["write"] -= timings.stages["decode"] + timings.stages["transfer"]

    def latents(self, checked: CheckedRequest, timings: Timings, progress: Progress = silent) -> Tensor:
        """Serve a request up to its clean latents, float64 ``[1, C, F, H, W]`` on the CPU."""
        if self.model.causal:
            stream = self._as_stream(checked.request)
            return torch.cat([made.latents for made in self.rollout(stream, stream.scenes, timings, progress)], 2)
        denoiser = self.denoiser(checked, timings, progress)
        with timings.stage("denoise"):
            denoiser.watch = self.watch
            noise = (each.to(self.backend.device) for each in self.noise(checked))
            latents = sample(denoiser, checked.trajectory, noise).cpu()
        timings.stages["denoise"] -= timings.stages.get("preview", 0.0)
        return latents

    def rollout(
        self, stream: CheckedStream, scenes: Iterable[Scene], timings: Timings, progress: Progress, alive: Alive = go
    ) -> Iterator[MadeChunk]:
        """Yield the chunks of a stream, each of which shows the next scene; see `ChunkDenoiser.alive`."""
        request, first = stream.request, None
        self.backend.join()
        self.loras.put_on(request.loras, progress)
        self.backend.prepare(stream.live_shape, stream.kept)
        if request.image is not None:
            with timings.stage("condition"):
                first = self.encode_first(request.image, stream.shape)
        embed = partial(self.text, timings=timings, progress=progress)
        denoiser = ChunkDenoiser(self.backend, self.bundle, stream, timings, embed, alive)
        for made in make_chunks(denoiser, scenes, first, progress):
            yield made
            # Other requests may have come between two chunks, and programs are bound when they first run.
            self.loras.put_on(request.loras, progress)

    def save_noise(self, checked: CheckedRequest, path: Path) -> None:
        """Write the noise that is drawn from a request's seed."""
        write_noise(path, latent_shape(self.model, checked.request.shape), checked.request.seed, len(checked.steps))

    def denoiser(self, checked: CheckedRequest, timings: Timings, progress: Progress = silent) -> Denoiser:
        """Put the request's LoRAs in place, embed the prompt, encode the image, and compute whatever the steps share.
        Putting LoRAs in place is loading and counts for no stage.

        Raises:
            ConfigError: The model makes a video chunk by chunk, and no step is one of a whole clip.
        """
        self.loras.fit(checked.request.shape)
        self.loras.put_on(checked.request.loras, progress)
        self.backend.prepare(checked.request.shape)
        text = self.text(checked.ids, timings, progress)
        channels = None
        if checked.request.image is not None:
            with timings.stage("condition"):
                channels = self.encode_images(checked.request, progress)
        with timings.stage("prepare"):
            return Denoiser(self.backend, self.bundle, checked, text, channels, timings, progress)

    def text(self, ids: list[int], timings: Timings, progress: Progress = silent) -> Tensor:
        """The embedding of a prompt as `embed` returns it, computed or remembered."""
        kept = self.embeddings
        if kept is not None and (rows := kept.find(self._embedding_key(ids))) is not None:
            return pad_rows(rows, self.model.dit.text_rows)[None]
        with timings.stage("text"):
            text = self.embed(ids, progress)
            self.backend.synchronise()
        if kept is not None:
            kept.keep(self._embedding_key(ids), text[0, : len(ids)])
        return text

    def _embedding_key(self, ids: list[int]) -> EmbeddingKey:
        weights = self.bundle.manifest.files[weights_name("text_encoder")].sha256
        return EmbeddingKey(weights, self.backend.name, self.backend.dtype, tuple(ids))

    def embed(self, ids: list[int], progress: Progress = silent) -> Tensor:
        """Embed a prompt as ``[1, T, E]`` in the compute type, padded with rows of zeros."""
        schedule = text_schedule(self.model, self.graphs, len(ids))
        session = self.backend.part(PREFIXES["text"], schedule) or self.backend.session(schedule)
        session["ids"].copy_(torch.tensor([ids]))
        session["buckets"].copy_(position_buckets(len(ids), self.model.text_encoder))
        session.run("text", "text", progress)
        return pad_rows(session["embedding"][0], self.model.dit.text_rows)[None]

    def encode_images(self, request: Request, progress: Progress = silent) -> Tensor:
        """The 20 channels that an image-to-video denoiser is conditioned on, in the compute type."""
        from wanforge.runtime.inputs.condition import condition, pixels_of

        shape, has_last = request.shape, request.last_image is not None
        strip = Strip(self.backend.exchange, shape.latent_height)
        session = self.backend.session(vae_schedule(self.graphs, shape, "encode", strip.rows))
        session["first_pixels"].copy_(strip.of_pixels(pixels_of(request.image, shape)[:, :, None]))
        session["pixels"].zero_()
        latents = []
        for index, program, output in islice(chunks("latent"), shape.latent_frames):
            if has_last and index == shape.latent_frames - 1:
                session["pixels"][:, :, -1:].copy_(strip.of_pixels(pixels_of(request.last_image, shape)[:, :, None]))
            session.run(program)
            latents.append(strip.all(session[output]).to("cpu", copy=True))
            progress("condition", index + 1, shape.latent_frames)
        return condition(torch.cat(latents, 2), has_last=has_last)

    def encode_first(self, image: "Path | Image", shape: ClipShape) -> Tensor:
        """The latents of an image that is the first frame of a video, ``[1, C, 1, H, W]`` in the compute type."""
        from wanforge.runtime.inputs.condition import pixels_of

        session = self.backend.session(vae_schedule(self.graphs, shape, "encode"))
        session["first_pixels"].copy_(pixels_of(image, shape)[:, :, None])
        session.run("first")
        return session["first_latent"].to("cpu", copy=True)

    def noise(self, checked: CheckedRequest) -> Iterator[Tensor]:
        """The request's noise: from its seed, or from its file."""
        shape = latent_shape(self.model, checked.request.shape)
        if checked.request.noise is None:
            return gaussian(shape, checked.request.seed)
        return load_noise(checked.request.noise, shape, checked.noise_names)

    def frames(
        self, latents: Tensor, shape: ClipShape, timings: Timings, progress: Progress = silent
    ) -> Iterator[Tensor]:
        """Decode latents and yield each frame as uint8 ``[H, W, 3]`` as soon as its chunk is decoded."""
        return self.decode(latents.split(1, 2), shape, timings, progress)

    def decode(
        self, latents: Iterable[Tensor], shape: ClipShape, timings: Timings, progress: Progress = silent
    ) -> Iterator[Tensor]:
        """Decode latent frames ``[1, C, 1, H, W]``, each when its frames are asked for; see `frames`. If GPUs share
        this, the latents of the first rank are decoded, and it alone gets whole frames."""
        return FrameDecoder(self.backend, self.graphs, shape).frames(latents, timings, progress)


def open_pipeline(
    bundle: Bundle,
    backend: str = AUTO,
    budget: float | None = None,
    clips: Sequence[ClipShape] = (),
    progress: Progress = silent,
) -> Pipeline:
    """Verify the files of a bundle that the backend opens, and make the bundle ready to serve requests.

    Args:
        backend: The name of a backend, or ``auto`` for the fastest that can run here.
        budget: The most bytes of memory to use; weights that do not fit are streamed.
        clips: Sizes and lengths of the requests to come. ``auto`` chooses TensorRT only if there are engines for all
            of them.

    Raises:
        BundleError: A file is missing or damaged.
        ConfigError: There is no such backend, or it cannot keep to a budget.
    """
    name = resolve_backend(backend, bundle, clips)
    created = create_backend(name, bundle, budget=budget)
    claim(bundle, created.files(), progress)
    return Pipeline(bundle, created)


def verify_files(bundle: Bundle, backends: Iterable[str], progress: Progress = silent) -> None:
    """Verify the files that some backends open against the manifest, each file once.

    Raises:
        BundleError: A file is missing or damaged.
    """
    opened = [name for backend in backends for name in create_backend(backend, bundle).files()]
    claim(bundle, opened, progress)


def claim(bundle: Bundle, names: Iterable[str], progress: Progress) -> None:
    """Make sure that files of a bundle are current and undamaged, and that no other process replaces or deletes any
    while this one uses the bundle.

    Raises:
        BundleError: A file is missing, damaged or stale, or does not fit the bundle's model.
    """
    bundle.hold()
    needed = list(dict.fromkeys([TOKENIZER, *names]))
    check_current(bundle, needed)
    bundle.verify(needed, progress)
    check_tensors(bundle, needed)
