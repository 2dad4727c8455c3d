"""The tables and plots of docs/streaming_speed.md. ``python -m tools.pages.streaming_speed docs/streaming_speed.md``
rewrites them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec

from tools.pages.kernels import with_tables
from wanforge.configs.causal import PolicyName, policy
from wanforge.configs.model import ModelConfig, load_model
from wanforge.configs.recipe import load_recipe
from wanforge.configs.targets import Target, load_targets
from wanforge.runtime.causal.lengths import chunks_of_seconds
from wanforge.runtime.measure.cost.decoder import decoder_chunk
from wanforge.runtime.measure.cost.launches import BF16, LaunchCost, all_launches
from wanforge.runtime.measure.cost.prediction import profile_of
from wanforge.runtime.measure.cost.unfused import head
from wanforge.runtime.measure.machine_code.rates import gpu_of, machine_of
from wanforge.runtime.measure.page import Plot, Series, picture_of
from wanforge.runtime.measure.tables import markdown_table, number
from wanforge.runtime.pace.launches import chunk_attention, chunk_block, chunk_stem, library_attention
from wanforge.runtime.pace.memory import StreamMemory, stream_memory
from wanforge.runtime.pace.remembering import Remembering, Seen, at_last
from wanforge.runtime.pace.report import sizes_of
from wanforge.runtime.pace.stream import ChunkTime, Load, PacedStream, load_of, pass_load
from wanforge.runtime.pace.workload import ChunkWorkload
from wanforge.runtime.reference.causal.kv_codes import KVFormat

GPUS = ("rtx4090", "rtx5090", "h100", "h200", "b200")
BOTH = ("rtx5090", "h200")
RECIPES = ("bf16", "w8a8", "fp8-row", "nvfp4")
POLICIES: tuple[PolicyName, ...] = ("sliding_window", "infinity_rope", "rolling_sink")
BY_FRAME, BY_CHUNK = "causal-rcm-wan2.1-t2v-1.3b-480p-c1-step2", "causal-rcm-wan2.1-t2v-1.3b-480p-c3-step4"
LARGE = "rcm-wan2.1-t2v-14b-480p"
FORMS: tuple[KVFormat, ...] = ("native", "int8")
STEPS = {1: (0.9993753903810119,), 2: (0.9993753903810119, 0.8333333333333334)}
"""The times of one and of two steps."""
LENGTHS = (1, 2, 5, 10, 20, 30, 60)
"""Seconds of video."""
REAL_TIME = 16
TIME_PLOT, MEMORY_PLOT = "streaming-time.svg", "streaming-memory.svg"


@cache
def model(size: str = "1.3B", frames: int = 1, steps: int = 2) -> ModelConfig:
    """A causal model that makes so many latent frames at once. No 14B model of few steps is published, so that one has
    the shape of the dense model."""
    found = load_model(BY_FRAME if frames == 1 else BY_CHUNK)
    assert found.causal
    causal = msgspec.structs.replace(found.causal, times=STEPS[steps])
    dit = load_model(LARGE).dit if size == "14B" else found.dit
    return msgspec.structs.replace(found, name=f"{size} c{frames}", causal=causal, dit=dit)


@cache
def stream(
    of: ModelConfig, recipe: str, kept: PolicyName = "infinity_rope", form: KVFormat = "native", blocks: int = 6
) -> PacedStream:
    return PacedStream(of, load_recipe(recipe), of.video.size_wh, Remembering(policy(kept, blocks), form))


def there(of: PacedStream, seconds: float = 60) -> Seen:
    """What there is when the last chunk of a video of some seconds is begun."""
    return at_last(of.remembering.policy, of.causal, chunks_of_seconds(of.causal, seconds, REAL_TIME))


@cache
def last(of: PacedStream, gpu: str, seconds: float = 60) -> ChunkTime:
    return of.later(load_targets()[gpu], there(of, seconds).seen)


def can(recipe: str, gpu: str) -> bool:
    return load_recipe(recipe).first_sm <= load_targets()[gpu].sm


def gpu_titles(names: tuple[str, ...] = GPUS) -> list[str]:
    return [load_targets()[name].title for name in names]


def ms(seconds: float) -> str:
    return number(1e3 * seconds)


def fps(chunk: ChunkTime, seconds: float) -> str:
    return f"{chunk.fps(seconds):.1f}"


def goal_table() -> str:
    """Frames per second of the 1.3B model, frame by frame in two steps, by GPU and recipe."""
    rows = []
    for gpu in GPUS:
        cells = []
        for recipe in RECIPES:
            if not can(recipe, gpu):
                cells.append("-")
                continue
            chunk = last(stream(model(), recipe), gpu)
            cells.append(" / ".join(fps(chunk, each) for each in (chunk.serial, chunk.overlapped, chunk.apart)))
        rows.append([load_targets()[gpu].title, *cells])
    return markdown_table(["fps: one after the other / overlapped at most / two GPUs", *RECIPES], rows)


def rates_table() -> str:
    """Frames per second of all models, chunkings and numbers of steps, with keys and values as computed and in int8."""
    rows = []
    for size in ("1.3B", "14B"):
        for frames in (1, 3):
            for steps in (1, 2):
                cells = []
                for gpu in BOTH:
                    for recipe in (each for each in RECIPES if can(each, gpu)):
                        found = (last(stream(model(size, frames, steps), recipe, form=form), gpu) for form in FORMS)
                        cells.append(" / ".join(fps(chunk, chunk.serial) for chunk in found))
                rows.append([f"{size}, c{frames}, {steps} step{'s' * (steps > 1)}", *cells])
    heads = [f"{load_targets()[gpu].title}: {recipe}" for gpu in BOTH for recipe in RECIPES if can(recipe, gpu)]
    return markdown_table(["fps: native / int8", *heads], rows)


PARTS = {
    "linears, with what is fused to them": ("q, k, v", "o", "feed-forward", "cross-attention"),
    "attention": ("attention",),
    "norms, RoPE": ("norm 1", "RMS norm, RoPE"),
}


def parts_table() -> str:
    """Where the time of a chunk goes."""
    columns: list[dict[str, float]] = []
    heads = []
    for gpu in BOTH:
        target = load_targets()[gpu]
        for recipe in ("bf16", "w8a8"):
            heads.append(f"{target.title}: {recipe}")
            columns.append(parts(stream(model(), recipe), target))
    rows = [[part, *(ms(column[part]) for column in columns)] for part in columns[0]]
    rows.append(["**chunk**", *(ms(sum(column.values())) for column in columns)])
    counts = (last(stream(model(), recipe), gpu) for gpu in BOTH for recipe in ("bf16", "w8a8"))
    rows.append(["launches", *(f"{(chunk.denoising + chunk.decoding).launches:,}" for chunk in counts)])
    kept = keeping(stream(model(), "w8a8"), load_targets()["h200"]).launches
    rows.append(["of them to keep keys and values", *[f"{kept:,}"] * len(heads)])
    return markdown_table(["ms of a chunk, 1.3B, c1, two steps", *heads], rows)


def parts(of: PacedStream, target: Target) -> dict[str, float]:
    """The seconds of each part of a chunk, of which there are three passes: two steps, and the one that remembers."""
    w = of.workload(target, past=there(of).seen)
    block, layers, passes = chunk_block(w), w.model.dit.num_layers, of.steps[1] + 1
    found = {
        part: passes * layers * sum(load_of(block[name], target).seconds for name in names)
        for part, names in PARTS.items()
    }
    return found | {
        "stem, head": passes * load_of([*chunk_stem(w), *head(w)], target).seconds,
        **remembering(of, target),
        "decoding": load_of(decoder_chunk(w.model, w.shape, is_first=False), target).seconds * w.frames,
    }


def waves_table() -> str:
    """How many thread blocks the launches of a layer have, and what share of the SMs' time they fill."""
    rows = []
    blocks = [
        all_launches(chunk_block(stream(model(frames=frames), "w8a8").chunk.seeing(6 * frames))) for frames in (1, 3)
    ]
    for launches in zip(*blocks, strict=True):
        runs = [launch.run for launch in launches]
        if any(run is None for run in runs):
            continue
        cells = [f"{run.programs:,}" for run in runs if run]
        rows.append([launches[0].name, *cells, *(filled(launch, gpu) for gpu in BOTH for launch in launches)])
    heads = [f"{load_targets()[gpu].title}: c{frames}" for gpu in BOTH for frames in (1, 3)]
    return markdown_table(["1.3B, w8a8", "thread blocks: c1", "c3", *heads], rows)


def filled(launch: LaunchCost, gpu: str) -> str:
    """The share of the places for thread blocks that are taken, on average over the waves of a launch."""
    target = load_targets()[gpu]
    assert launch.run is not None
    profile = profile_of(launch, launch.run, gpu_of(target))
    run, places = launch.run.of(profile.kernel, target.sm), profile.programs * machine_of(target).multiprocessors
    return f"{run.programs / (-(-run.programs // places) * places):.0%}"


def law_table() -> str:
    """What a chunk takes that sees nothing, what each latent frame that it sees adds, and how many it can see in real
    time."""
    rows = []
    for size, frames, recipe in [(s, f, r) for s in ("1.3B", "14B") for f in (1, 3) for r in ("bf16", "w8a8")]:
        cells = []
        for gpu in BOTH:
            constant, slope = line_of(stream(model(size, frames), recipe, "sliding_window"), load_targets()[gpu])
            room = 4 * frames / REAL_TIME - constant
            cells += [ms(constant), ms(slope), str(seen_within(room, slope, frames)) if room > 0 else "never"]
        rows.append([f"{size}, c{frames}, {recipe}", *cells])
    heads = [f"{load_targets()[gpu].title}: {what}" for gpu in BOTH for what in ("a, ms", "b, ms", "in real time")]
    return markdown_table(["a + b x latent frames seen", *heads], rows)


def seen_within(room: float, slope: float, frames: int) -> int:
    """The latent frames of whole chunks that can be seen in `room` seconds, of which each takes `slope`."""
    return frames * int(room / (slope * frames))


def line_of(of: PacedStream, target: Target) -> tuple[float, float]:
    """The seconds of a chunk that sees nothing, and how many each latent frame adds."""
    few, many = (of.later(target, past).serial for past in (20, 60))
    slope = (many - few) / 40
    return few - 20 * slope, slope


def policies_table() -> str:
    """What each policy keeps and takes, far into a video."""
    rows = []
    for kept, frames in [(kept, frames) for kept in POLICIES for frames in (1, 3)]:
        now = there(stream(model(frames=frames), "w8a8", kept))
        cells = [str(now.seen), str(now.held)]
        for size in ("1.3B", "14B"):
            found = [stream(model(size, frames), "w8a8", kept, form) for form in FORMS]
            cells.append(" / ".join(number(remembered(of) / 1e9) for of in found))
        for gpu in BOTH:
            streams = (stream(model(frames=frames), "w8a8", kept, form) for form in FORMS)
            cells.append(" / ".join(ms(sum(remembering(of, load_targets()[gpu]).values())) for of in streams))
        rows.append([f"{kept}, c{frames}", *cells])
    sizes = [f"{size}, GB: native / int8" for size in ("1.3B", "14B")]
    times = [f"{title}, ms a chunk: native / int8" for title in gpu_titles(BOTH)]
    return markdown_table(["", "frames seen", "kept", *sizes, *times], rows)


def keeping(of: PacedStream, target: Target) -> Load:
    """What keeping keys and values takes in a chunk."""
    begin, end = of.keeping(of.workload(target, past=there(of).seen), target)
    return begin + end


def remembering(of: PacedStream, target: Target) -> dict[str, float]:
    """The seconds of keeping keys and values, and of reading them in the passes of a chunk."""
    w, passes = of.workload(target, past=there(of).seen), of.steps[1] + 1
    read = load_of(chunk_block(w)["keys and values"], target) * (w.model.dit.num_layers * passes)
    return {"keeping keys and values": keeping(of, target).seconds, "reading them": read.seconds}


def memory_of(of: PacedStream, seconds: float = 60) -> StreamMemory:
    return stream_memory(of.chunk.seeing(there(of, seconds).seen), of.remembering)


def remembered(of: PacedStream, seconds: float = 60) -> int:
    """Bytes of the keys and values of earlier chunks, with those of one layer that attention reads where that is not
    where they are kept."""
    own = 2 * BF16 * of.chunk.stream * of.model.dit.num_layers
    return memory_of(of, seconds).keys_values - own


def growth_table() -> str:
    """What the last chunk of a video takes if nothing is forgotten."""
    rows = []
    for seconds in LENGTHS:
        cells = []
        for size in ("1.3B", "14B"):
            found = (stream(model(size), "w8a8", "none", form) for form in FORMS)
            cells.append(" / ".join(number(remembered(of, seconds) / 1e9) for of in found))
        for gpu in BOTH:
            for recipe in ("bf16", "w8a8"):
                chunk = last(stream(model(), recipe, "none"), gpu, seconds)
                cells.append(f"{ms(chunk.serial)} ({fps(chunk, chunk.serial)})")
        rows.append([str(seconds), str(there(stream(model(), "w8a8", "none"), seconds).seen), *cells])
    heads = [f"{title}, 1.3B {recipe}: ms (fps)" for title in gpu_titles(BOTH) for recipe in ("bf16", "w8a8")]
    sizes = [f"{size}, GB: native / int8" for size in ("1.3B", "14B")]
    return markdown_table(["seconds", "frames seen", *sizes, *heads], rows)


def memory_table() -> str:
    """The memory of a stream, and how long a video may be that forgets nothing."""
    fitting, rows = ("rtx4090", "rtx5090", "h200"), []
    for size, recipe in [(size, recipe) for size in ("1.3B", "14B") for recipe in RECIPES]:
        memory = memory_of(stream(model(size), recipe))
        fits = [memory.fit(load_targets()[gpu]) if can(recipe, gpu) else "-" for gpu in fitting]
        lengths = [str(int(longest(size, recipe, gpu))) if can(recipe, gpu) else "-" for gpu in BOTH]
        rows.append([f"{size}, {recipe}", *(number(each / 1e9) for each in sizes_of(memory).values()), *fits, *lengths])
    heads = [f"fits {title}" for title in gpu_titles(fitting)]
    heads += [f"none, {title}: seconds" for title in gpu_titles(BOTH)]
    return markdown_table(["GB, c1, infinity_rope", *sizes_of(memory_of(stream(model(), "bf16"))), *heads], rows)


def longest(size: str, recipe: str, gpu: str) -> float:
    """The seconds of video that a GPU can remember as a whole, with the text encoder's weights streamed."""
    of = stream(model(size), recipe, "none")
    few, many = (stream_memory(of.chunk.seeing(past), of.remembering) for past in (1, 2))
    room = load_targets()[gpu].vram_gib * 2**30 - (few.total - few.weights["text_encoder"])
    return max(0.0, 1 + room / (many.total - few.total)) * 4 / REAL_TIME


def latency_table() -> str:
    """How long a viewer waits."""
    rows = []
    for frames in (1, 3):
        for gpu in GPUS:
            target = load_targets()[gpu]
            cells = []
            for recipe in ("bf16", "w8a8"):
                of = stream(model(frames=frames), recipe)
                chunk = last(of, gpu)
                first = chunk.steps.seconds + chunk.decoding.seconds / frames
                cells += [ms(of.first_frame(target)), ms(first), ms(chunk.serial)]
            rows.append([f"c{frames}, {target.title}", *cells])
    what = ("prompt to first frame", "chunk to its first frame", "chunk")
    return markdown_table(["ms, 1.3B", *(f"{recipe}: {each}" for recipe in ("bf16", "w8a8") for each in what)], rows)


def levers(recipe: str, target: Target) -> dict[str, ChunkTime]:
    """What a chunk would take if something were changed, frame by frame in two steps."""
    of = stream(model(), recipe)
    past = there(of).seen
    w, now = of.workload(target, past=past), of.later(target, past)
    one, fewer = pass_load(w, target), stream(model(), recipe, blocks=3)
    begin, keep = of.keeping(w, target)

    def of_passes(each: Load) -> ChunkTime:
        return replace(now, steps=begin + each * 2, remembering=each + keep)

    return {
        "as it is": now,
        "the last step's keys are remembered (other weights)": replace(now, remembering=keep),
        "the remembering pass ends with the last layer's keys": replace(now, remembering=unfinished(w, target) + keep),
        "the remembering pass and the next first step are one pass": replace(
            now, steps=begin + one, remembering=joint(w, target) + keep
        ),
        "attention by a library": of_passes(pass_load(replace(w, has_library_attention=True), target)),
        "attention in 8 bits": of_passes(with_attention(w, eight_bit_attention(w), target)),
        "3 frames are seen instead of 6": fewer.later(target, there(fewer).seen),
        "the decoder's convolutions in int8": replace(now, decoding=decoding_in_int8(w, target)),
    }


def with_attention(w: ChunkWorkload, attention: LaunchCost, target: Target) -> Load:
    """A pass with another attention."""
    block = chunk_block(w) | {"attention": [attention]}
    return load_of([*chunk_stem(w), *head(w)], target) + load_of(all_launches(block), target) * w.model.dit.num_layers


def eight_bit_attention(w: ChunkWorkload) -> LaunchCost:
    """Attention with queries and keys in int8 and probabilities and values in fp8, as fast as SageAttention2."""
    flops = library_attention(w).total_flops // 2
    moved = 2 * w.stream + 2 * (w.P + w.L) * w.D
    return LaunchCost("sparse attention", {"int8": flops, "fp8, fp16 sums": flops}, moved, 2 * w.stream)


def unfinished(w: ChunkWorkload, target: Target) -> Load:
    """A pass of which the last layer ends with its keys and values."""
    block = chunk_block(w)
    needed = [launch for part in ("norm 1", "q, k, v", "RMS norm, RoPE") for launch in block[part]]
    layers = w.model.dit.num_layers
    return (
        load_of(chunk_stem(w), target) + load_of(all_launches(block), target) * (layers - 1) + load_of(needed, target)
    )


def joint(w: ChunkWorkload, target: Target) -> Load:
    """A pass of two chunks, each of which sees what it would see alone."""
    both = replace(w, frames=2 * w.frames)
    block = chunk_block(both) | {"attention": [*chunk_attention(w), *chunk_attention(w)]}
    return (
        load_of([*chunk_stem(both), *head(both)], target)
        + load_of(all_launches(block), target) * w.model.dit.num_layers
    )


def decoding_in_int8(w: ChunkWorkload, target: Target) -> Load:
    """Decoding, if a library multiplied int8 as fast as linears; what is moved is unchanged."""
    chunk = decoder_chunk(w.model, w.shape, is_first=False)
    found = [replace(each, flops={"int8": each.total_flops}) if each.flops else each for each in chunk]
    return load_of(found, target) * w.frames


def levers_table() -> str:
    """What would be gained by each change alone."""
    columns = [levers(recipe, load_targets()[gpu]) for gpu in ("rtx4090", *BOTH) for recipe in ("bf16", "w8a8")]
    rows = [
        [name, *(f"{ms(column[name].serial)} ({fps(column[name], column[name].serial)})" for column in columns)]
        for name in columns[0]
    ]
    heads = [f"{title}: {recipe}" for title in gpu_titles(("rtx4090", *BOTH)) for recipe in ("bf16", "w8a8")]
    return markdown_table(["ms of a chunk (fps), 1.3B, c1, two steps", *heads], rows)


TABLES: dict[str, Callable[[], str]] = {
    "goal": goal_table,
    "rates": rates_table,
    "parts": parts_table,
    "waves": waves_table,
    "law": law_table,
    "policies": policies_table,
    "growth": growth_table,
    "memory": memory_table,
    "latency": latency_table,
    "levers": levers_table,
}


def time_plot() -> str:
    """What the last chunk takes over the length of a video, if nothing is forgotten and with a window of six chunks."""
    policies: dict[str, PolicyName] = {"none": "none", "window": "infinity_rope"}
    series = []
    for word, kept in policies.items():
        for gpu in BOTH:
            chunks = [last(stream(model(), "w8a8", kept), gpu, seconds) for seconds in LENGTHS]
            series.append(line(f"{word} {gpu.removeprefix('rtx')}", [1e3 * chunk.serial for chunk in chunks], "ms"))
    series.append(line("real time", [4e3 / REAL_TIME for _ in LENGTHS], "ms"))
    title = "time of the last chunk over the length of a video, 1.3B, frame by frame in two steps, w8a8"
    return picture_of(Plot(title, "seconds of video; predicted", "ms", series, log_x=True, log_y=True))


def memory_plot() -> str:
    """The memory of keys and values over the length of a video, by policy and format."""
    kinds: dict[str, tuple[PolicyName, KVFormat]] = {
        "none": ("none", "native"),
        "none int8": ("none", "int8"),
        "window": ("infinity_rope", "native"),
        "window int8": ("infinity_rope", "int8"),
    }
    series = []
    for size in ("1.3B", "14B"):
        for word, (kept, form) in kinds.items():
            of = stream(model(size), "w8a8", kept, form)
            counted = [remembered(of, seconds) / 1e9 for seconds in LENGTHS]
            series.append(line(f"{size} {word}", counted, "GB"))
    title = "memory of keys and values over the length of a video, frame by frame"
    return picture_of(Plot(title, "seconds of video; predicted", "GB", series, log_x=True, log_y=True))


def line(name: str, values: Sequence[float], unit: str) -> Series:
    """A line over the length of a video."""
    points = zip(LENGTHS, values, strict=True)
    return Series(name, [(x, y, f"{name}, {x} s: {number(y)} {unit}") for x, y in points])


PLOTS: dict[str, Callable[[], str]] = {TIME_PLOT: time_plot, MEMORY_PLOT: memory_plot}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n\n".join(make() for make in TABLES.values()))
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text(), TABLES))
        for name, make in PLOTS.items():
            path.with_name(name).write_text(make())
