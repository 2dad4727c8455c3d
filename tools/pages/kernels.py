"""The tables of docs/kernels.md. ``python -m tools.pages.kernels docs/kernels.md`` rewrites them."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanforge.configs.model import load_model
from wanforge.configs.targets import Target, load_targets
from wanforge.plugins.denoiser_block.fused import recipe_for
from wanforge.runtime.measure.cost.decoder import decoder_chunk, decoder_clip, reference_chunk
from wanforge.runtime.measure.cost.fused import fused_block, fused_request, fused_step
from wanforge.runtime.measure.cost.launches import (
    USUAL_TEXT_ROWS,
    LaunchCost,
    Workload,
    all_launches,
    published_workload,
    seconds,
)
from wanforge.runtime.measure.cost.prediction import predicted, predicted_seconds, profile_of
from wanforge.runtime.measure.cost.unfused import unfused_block, unfused_step
from wanforge.runtime.measure.machine_code.rates import gpu_of
from wanforge.runtime.measure.tables import markdown_table, number

GPUS = ("rtx5090", "rtx4090", "h100", "h200")
OTHERS = ("rtx3090", "a100", "b200")
"""GPUs of which only predicted times are shown."""
SMALL, LARGE = "turbowan2.1-t2v-1.3b-480p", "turbowan2.1-t2v-14b-720p"
MEDIUM = "turbowan2.1-t2v-14b-480p"
TITLES = {SMALL: "1.3B 480p", MEDIUM: "14B 480p", LARGE: "14B 720p"}


@dataclass(frozen=True)
class Published:
    """A time that another project states for the denoiser, without the text encoder and the VAE."""

    who: str
    model: str
    gpu: str
    steps: int
    seconds: float


PUBLISHED = (
    Published("TurboDiffusion", SMALL, "rtx5090", 3, 1.9),
    Published("TurboDiffusion", MEDIUM, "rtx5090", 3, 9.9),
    Published("TurboDiffusion", LARGE, "rtx5090", 3, 24.0),
    Published("SGLang", SMALL, "h200", 4, 0.93),
)
"""TurboDiffusion's README (docs/sources.md), with the number of steps inferred, and SGLang's pull request 38182."""


FIRST = {
    SMALL: (359, 456, 1021, 566, 243, 237, 252),
    MEDIUM: (2356, 3188, 7118, 3895, 1584, 1560, 1652),
    LARGE: (6403, 8350, 19210, 10310, 4297, 4239, 4681),
}
"""A step in ms as predicted when all kernels were in Triton (commit 242c706), on the GPUs of `ALL`."""
ALL = ("rtx5090", "rtx4090", "rtx3090", "a100", "h100", "h200", "b200")


def unfused(name: str) -> Workload:
    return published_workload(name, text_rows=load_model(name).dit.text_rows)


def fused(name: str) -> Workload:
    return published_workload(name, text_rows=USUAL_TEXT_ROWS)


def fused_on(name: str, gpu: Target) -> Workload:
    """The workload in the formats that a GPU has."""
    w = fused(name)
    return replace(w, recipe=recipe_for(w.recipe, gpu.sm))


def gpus(names: Sequence[str] = GPUS) -> list[Target]:
    targets = load_targets()
    return [targets[name] for name in names]


def launch_table(name: str) -> str:
    """Each launch of a fused block, with its roofline in italics where bytes set it."""

    def row(launch: LaunchCost) -> list[str]:
        return [launch.name, work(launch), number(launch.total_bytes / 1e6), *(roofline(launch, gpu) for gpu in gpus())]

    def work(launch: LaunchCost) -> str:
        return " + ".join(f"{form} {number(flops / 1e9)}" for form, flops in launch.flops.items()) or "-"

    def roofline(launch: LaunchCost, gpu: Target) -> str:
        text = number(launch.roofline(gpu) * 1e6)
        return f"*{text}*" if launch.is_bound_by_bytes(gpu) else text

    launches = all_launches(fused_block(fused(name)))
    rows = [[str(i), *row(launch)] for i, launch in enumerate(launches, 1)]
    gflop, megabytes = (
        sum(x) for x in zip(*((c.total_flops / 1e9, c.total_bytes / 1e6) for c in launches), strict=True)
    )
    rooflines = (number(seconds(launches, gpu) * 1e6) for gpu in gpus())
    rows.append(["", "**block**", number(gflop), number(megabytes), *rooflines])
    return markdown_table(["", "launch", "GFLOP", "MB", *(gpu.title for gpu in gpus())], rows, words=3)


def times_table(name: str, names: Sequence[str] = GPUS) -> str:
    """What each launch of a fused block is predicted to take, the share of its roofline, and what bounds it."""
    columns, totals = [], []
    for gpu in gpus(names):
        launches = all_launches(fused_block(fused_on(name, gpu)))
        times = predicted(launches, gpu)
        columns.append(
            [
                f"{number(1e6 * time.seconds)} ({launch.roofline(gpu) / time.seconds:.0%}, {time.bound})"
                for launch, time in zip(launches, times, strict=True)
            ]
        )
        total = sum(time.seconds for time in times)
        totals.append(f"{number(1e6 * total)} ({seconds(launches, gpu) / total:.0%})")
    named = [launch.name for launch in all_launches(fused_block(fused(name)))]
    rows = [[str(i), *row] for i, row in enumerate(zip(named, *columns, strict=True), 1)]
    rows.append(["", "**block**", *totals])
    return markdown_table(["", "launch", *(gpu.title for gpu in gpus(names))], rows, words=6)


def progress_table() -> str:
    """A predicted step when all kernels were in Triton, and now."""
    rows = []
    for name, first in FIRST.items():
        now = [1e3 * predicted_seconds(fused_step(fused_on(name, gpu)), gpu) for gpu in gpus(ALL)]
        rows.append([TITLES[name], *(f"{number(x)} → {number(y)}" for x, y in zip(first, now, strict=True))])
    return markdown_table(["step, ms", *(gpu.title for gpu in gpus(ALL))], rows)


def parts_table(name: str) -> str:
    """The launches, bytes and roofline of each part of a block in both launch plans."""
    gpu = gpus()[0]

    def cells(launches: Sequence[LaunchCost]) -> list[str]:
        moved, roofline = sum(launch.total_bytes for launch in launches), seconds(launches, gpu)
        return [str(len(launches)), number(moved / 1e6), number(roofline * 1e6)]

    before, after = unfused_block(unfused(name)), fused_block(fused(name))
    rows = [[part, *cells(before[part]), *cells(after[part])] for part in before]
    rows.append(["**block**", *cells(all_launches(before)), *cells(all_launches(after))])
    plan = ["launches", "MB", "roofline, µs"]
    return markdown_table(["part", *(f"unfused: {x}" for x in plan), *(f"fused: {x}" for x in plan)], rows)


def steps_table() -> str:
    """The roofline of a whole step in both launch plans, and the predicted time."""
    plans: list[tuple[str, Callable[[Workload], list[LaunchCost]], Callable[[str], Workload]]] = [
        ("unfused", unfused_step, unfused),
        ("fused", fused_step, fused),
    ]
    rows = []
    for name in (SMALL, MEDIUM, LARGE):
        for plan, step, workload in plans:
            launches = step(workload(name))
            times = ([1e3 * time(launches, gpu) for time in (seconds, predicted_seconds)] for gpu in gpus())
            rows.append(
                [
                    f"{TITLES[name]}, {plan}",
                    f"{len(launches):,}",
                    number(sum(launch.total_flops for launch in launches) / 1e12),
                    number(sum(launch.total_bytes for launch in launches) / 1e9),
                    *(f"{number(roofline)} → {number(predicted)}" for roofline, predicted in times),
                ]
            )
    return markdown_table(["step", "launches", "TFLOP", "GB", *(gpu.title for gpu in gpus())], rows)


def requests_table() -> str:
    """The denoiser's time in a request of four steps, with the fused launch plan."""
    rows = []
    for name in (SMALL, MEDIUM, LARGE):
        launches = fused_request(fused(name), 4)
        times = ([time(launches, gpu) for time in (seconds, predicted_seconds)] for gpu in gpus())
        rows.append([TITLES[name], *(f"{roofline:.2f} → {predicted:.2f}" for roofline, predicted in times)])
    return markdown_table(["4 steps and the prompt", *(gpu.title for gpu in gpus())], rows)


def published_table() -> str:
    """Times that others state, per step, with their ratios to the roofline and the prediction of both launch plans."""
    targets, rows = load_targets(), []
    for entry in PUBLISHED:
        gpu, stated = targets[entry.gpu], 1e3 * entry.seconds / entry.steps
        before, after = unfused_step(unfused(entry.model)), fused_step(fused(entry.model))
        times = [1e3 * time(launches, gpu) for launches in (before, after) for time in (seconds, predicted_seconds)]
        ratios = (f"{number(t)} ({stated / t:.2f} x)" for t in times)
        who = f"{entry.who}, {TITLES[entry.model]}, {gpu.title}"
        rows.append([who, f"{entry.seconds:g} s / {entry.steps}", number(stated), *ratios])
    plans = ["unfused: roofline", "unfused: predicted", "fused: roofline", "fused: predicted"]
    header = ["who, what, where", "stated", "step, ms", *plans]
    return markdown_table(header, rows)


def decoder_table(name: str) -> str:
    """The launches that decode one latent frame after the first, those of the same kind together, with their roofline
    and their predicted time."""
    model, targets = load_model(name), gpus()
    chunk = decoder_chunk(model, model.video.clip, is_first=False)
    kinds = {each.name: [other for other in chunk if other.name == each.name] for each in chunk}
    rows = []
    for kind, launches in {**kinds, "**latent frame**": list(chunk)}.items():
        times = ([1e3 * time(launches, gpu) for time in (seconds, predicted_seconds)] for gpu in targets)
        flops, moved = (sum(count(launch) for launch in launches) for count in (flops_of, bytes_of))
        rows.append(
            [
                kind,
                f"{len(launches)}",
                number(flops / 1e9) if flops else "-",
                number(moved / 1e6),
                *(f"{number(roofline)} → {number(predicted)}" for roofline, predicted in times),
            ]
        )
    return markdown_table(["launch", "times", "GFLOP", "MB", *(f"{gpu.title}, ms" for gpu in targets)], rows)


def decoding_table() -> str:
    """What decoding moves per latent frame, in the reference and with the kernels, and the seconds of a whole clip."""
    rows = []
    for name in (SMALL, LARGE):
        model = load_model(name)
        clip = model.video.clip
        before, after = reference_chunk(model, clip), decoder_chunk(model, clip, is_first=False)
        launches = decoder_clip(model, clip)
        moved = (
            sum(map(bytes_of, before)),
            sum(map(bytes_of, after)),
            sum(bytes_of(launch) for launch in after if launch.run),
        )
        times = ([time(launches, gpu) for time in (seconds, predicted_seconds)] for gpu in load_targets().values())
        rows.append(
            [
                f"{clip.height_px}p",
                *(number(each / 1e9) for each in moved),
                *(f"{roofline:.2f} → {predicted:.2f}" for roofline, predicted in times),
            ]
        )
    head = ["81 frames", "PyTorch's operations, GB", "kernels and convolutions, GB", "kernels alone, GB"]
    return markdown_table([*head, *(f"{gpu.title}, s" for gpu in load_targets().values())], rows)


def flops_of(launch: LaunchCost) -> int:
    return launch.total_flops


def bytes_of(launch: LaunchCost) -> int:
    return launch.total_bytes


KINDS = {"gemm": "W8A8 linears", "attention": "sparse attention", "cross": "cross-attention"}
"""Kinds of launches of a fused block by the first word of their names; the rest are plain passes over memory."""


def kind(launch: LaunchCost) -> str:
    return KINDS.get(launch.name.split()[0], "the rest")


def shares_table() -> str:
    """The share of a fused block's roofline that each kind of launch takes."""
    rows = []
    for name in (SMALL, LARGE):
        launches = all_launches(fused_block(fused(name)))
        for group in [*KINDS.values(), "the rest"]:
            mine = [launch for launch in launches if kind(launch) == group]
            shares = (f"{seconds(mine, gpu) / seconds(launches, gpu):.0%}" for gpu in gpus())
            rows.append([f"{TITLES[name]}: {group}", *shares])
    return markdown_table(["share of a block's roofline", *(gpu.title for gpu in gpus())], rows)


def cache_table() -> str:
    """The bytes that launches with shared operands fetch from the L2 cache, in total and per second at the roofline."""
    rows = []
    for name in (SMALL, LARGE):
        launches = {launch.name: launch for launch in all_launches(fused_block(fused(name)))}
        for launch in (launches["gemm q, k, v"], launches["attention + quantise"]):
            assert launch.run is not None
            kernels = (profile_of(launch, launch.run, gpu_of(gpu)).kernel for gpu in gpus())
            fetched = {gpu: launch.run.of(kernel, gpu.sm).fetched for gpu, kernel in zip(gpus(), kernels, strict=True)}
            cells = (f"{number(n / 1e9)}, {n / launch.roofline(gpu) / 1e12:.1f}" for gpu, n in fetched.items())
            rows.append([f"{TITLES[name]}: {launch.name}", *cells])
    return markdown_table(["launch", *(f"{gpu.title}: GB, TB/s" for gpu in gpus())], rows)


def levers(w: Workload) -> dict[str, tuple[list[LaunchCost], list[LaunchCost]]]:
    """What could still be merged or changed in the fused launch plan: launches, and those that would replace them."""
    of = {launch.name: launch for launch in all_launches(fused_block(w))}
    attention = of["attention + quantise"]
    halves = {("fp8, fp16 sums" if form == "fp8" else form): flops for form, flops in attention.flops.items()}
    return {
        "P·V with fp16 sums": ([attention], [replace(attention, flops=halves)]),
    }


def levers_table() -> str:
    """The share of a block's roofline that each of `levers` would save."""
    rows = []
    for name in (SMALL, LARGE):
        whole = all_launches(fused_block(fused(name)))
        for lever, (before, after) in levers(fused(name)).items():
            shares = ((seconds(before, gpu) - seconds(after, gpu)) / seconds(whole, gpu) for gpu in gpus())
            rows.append([f"{TITLES[name]}: {lever}", *(f"{share:.1%}" for share in shares)])
    return markdown_table(["share of a block's roofline saved", *(gpu.title for gpu in gpus())], rows)


TABLES: dict[str, Callable[[], str]] = {
    "launches-1.3b-480p": lambda: launch_table(SMALL),
    "launches-14b-720p": lambda: launch_table(LARGE),
    "times-1.3b-480p": lambda: times_table(SMALL),
    "times-14b-720p": lambda: times_table(LARGE),
    "times-1.3b-480p-others": lambda: times_table(SMALL, OTHERS),
    "times-14b-720p-others": lambda: times_table(LARGE, OTHERS),
    "progress": progress_table,
    "parts-1.3b-480p": lambda: parts_table(SMALL),
    "parts-14b-720p": lambda: parts_table(LARGE),
    "steps": steps_table,
    "requests": requests_table,
    "decoder-480p": lambda: decoder_table(SMALL),
    "decoding": decoding_table,
    "published": published_table,
    "shares": shares_table,
    "cache": cache_table,
    "levers": levers_table,
}


def with_tables(page: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Return a page with the table after every line ``<!-- table: NAME -->`` rewritten, if it is one of these."""

    def table(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{tables[mark[2]]()}\n{mark[3]}"

    return re.sub(rf"(<!-- table: ({'|'.join(tables)}) -->)\n(?:\|.*\n)*(\n|\Z)", table, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_tables(path.read_text()))
