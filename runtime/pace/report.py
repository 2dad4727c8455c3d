"""The predicted pace of a stream as text and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wanforge.configs.clip import ClipShape, frames_of
from wanforge.configs.targets import Target
from wanforge.errors import ConfigError
from wanforge.runtime.causal.lengths import frames_of_chunks
from wanforge.runtime.measure.tables import indented, number, text_table
from wanforge.runtime.pace.memory import StreamMemory, stream_memory
from wanforge.runtime.pace.remembering import Seen, at_last
from wanforge.runtime.pace.stream import ChunkTime, PacedStream


@dataclass(frozen=True)
class GpuPace:
    """The last chunk of a video on one GPU.

    Attributes:
        chunk: What it takes; None if the GPU cannot run the recipe.
        first_frame: Seconds from the prompt to the first frame.
        refusal: Why the GPU cannot run the recipe.
    """

    target: Target
    chunk: ChunkTime | None = None
    first_frame: float = 0.0
    refusal: str = ""


@dataclass(frozen=True)
class PaceReport:
    """The last chunk of a video.

    Attributes:
        chunks: How many the video has.
        there: What there is when the last one is begun.
        memory: What is used while it is made.
    """

    stream: PacedStream
    chunks: int
    there: Seen
    memory: StreamMemory
    gpus: Mapping[str, GpuPace]


def pace_report(stream: PacedStream, chunks: int, targets: Mapping[str, Target]) -> PaceReport:
    """Predict the last chunk of a video on some GPUs.

    Raises:
        ConfigError: The launches of the recipe are not counted, or the model cannot make a video of this size or
            length.
    """
    if stream.remembering.policy.last_time is None:
        ClipShape(*stream.size_wh, frames_of(frames_of_chunks(stream.causal, chunks)))  # refuses one that is too long
    there = at_last(stream.remembering.policy, stream.causal, chunks)
    memory = stream_memory(stream.chunk.seeing(there.seen), stream.remembering)
    return PaceReport(stream, chunks, there, memory, {name: _on(stream, there, gpu) for name, gpu in targets.items()})


def _on(stream: PacedStream, there: Seen, target: Target) -> GpuPace:
    try:
        return GpuPace(target, stream.later(target, there.seen), stream.first_frame(target))
    except ConfigError as error:
        return GpuPace(target, refusal=str(error))


def as_json(report: PaceReport) -> dict[str, Any]:
    """The prediction as plain values, in bytes and seconds."""
    stream, memory = report.stream, report.memory
    return {
        "model": stream.model.name,
        "recipe": stream.recipe.name,
        "width_px": stream.size_wh[0],
        "height_px": stream.size_wh[1],
        "kv": stream.remembering.form,
        "chunks": report.chunks,
        "steps": stream.steps[1],
        "seen_frames": report.there.seen,
        "held_frames": report.there.held,
        "memory_bytes": {
            "weights": dict(memory.weights),
            "keys_values": memory.keys_values,
            "buffers": memory.buffers,
            "temporaries": memory.temporaries,
            "total": memory.total,
        },
        "gpus": {name: _gpu_facts(gpu, memory, stream.model.video.fps) for name, gpu in report.gpus.items()},
    }


def _gpu_facts(gpu: GpuPace, memory: StreamMemory, fps: int) -> dict[str, Any]:
    if gpu.chunk is None:
        return {"refusal": gpu.refusal}
    chunk = gpu.chunk
    return {
        "fit": memory.fit(gpu.target),
        "steps_seconds": chunk.steps.seconds,
        "remembering_seconds": chunk.remembering.seconds,
        "decoding_seconds": chunk.decoding.seconds,
        "launches": (chunk.denoising + chunk.decoding).launches,
        "fps": chunk.fps(chunk.serial),
        "fps_overlapped": chunk.fps(chunk.overlapped),
        "fps_apart": chunk.fps(chunk.apart),
        "first_frame_seconds": gpu.first_frame,
        "is_real_time": chunk.fps(chunk.serial) >= fps,
    }


def text(report: PaceReport) -> str:
    """The prediction as text for a terminal."""
    stream, there, memory = report.stream, report.there, report.memory
    width, height = stream.size_wh
    frames, steps = stream.causal.chunk_frames, stream.steps[1]
    remembered = "its last step" if stream.causal.noisy_from is not None else "a pass of its own"
    sizes = sizes_of(memory)
    return "\n".join(
        [
            "predicted, not measured",
            f"{stream.model.name}, {stream.recipe.name}, {width}x{height}: chunk {report.chunks} of {report.chunks}, "
            f"{frames} latent frames in {steps} steps, remembered by {remembered}; it sees {there.seen} latent frames, "
            f"and {there.held} are kept",
            indented(text_table(*_speeds(report.gpus, memory, stream.model.video.fps))),
            "memory in GB",
            indented(text_table([*sizes], [[number(size / 1e9) for size in sizes.values()]], words=0)),
            *(f"{name}: {gpu.refusal}" for name, gpu in report.gpus.items() if gpu.refusal),
        ]
    )


def sizes_of(memory: StreamMemory) -> dict[str, int]:
    """What a stream's memory is made of, with the total."""
    return {
        **memory.weights,
        "keys, values": memory.keys_values,
        "buffers": memory.buffers,
        "temporary": memory.temporaries,
        "total": memory.total,
    }


def _speeds(
    gpus: Mapping[str, GpuPace], memory: StreamMemory, fps: int
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    header = [
        "",
        "fits",
        "steps, ms",
        "remember, ms",
        "decode, ms",
        f"fps (of {fps})",
        "overlapped",
        "apart",
        "first, s",
    ]
    rows = []
    for name, gpu in gpus.items():
        if (chunk := gpu.chunk) is None:
            continue
        parts = (chunk.steps, chunk.remembering, chunk.decoding)
        speeds = (chunk.serial, chunk.overlapped, chunk.apart)
        cells = [*(number(1e3 * part.seconds) for part in parts), *(number(chunk.fps(each)) for each in speeds)]
        rows.append([name, memory.fit(gpu.target), *cells, number(gpu.first_frame)])
    return header, rows
