"""The page of the results: one HTML file with everything in it. Parts that have not run are left out."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import median
from typing import Any

from tools.gpu_day.parts import PARTS, Part
from tools.gpu_day.patch import LEAST_GAIN, winners
from tools.gpu_day.results import Line, Results
from wanforge.runtime.measure.page import Plot, Series, document, heading, paragraph, plot, table
from wanforge.runtime.measure.tables import number

TITLE = "The first half hour on a GPU"
REHEARSAL = (
    "This is a rehearsal: TinyWan's sizes, and the machine for PTX on the CPU in place of a GPU. Every time, ratio and "
    "speed on this page is the simulator's and says nothing about a GPU; only what is right or wrong does."
)
SHOWN_VARIANTS = 6
"""How many variants of a case are listed."""


def page(results: Results) -> str:
    """The page, whatever parts there are."""
    facts = _first(results, "machine", "facts").get("facts", {})
    parts = [heading(TITLE, 1), *_head(facts), heading("Parts"), _states(results)]
    for part in PARTS:
        show = SECTIONS.get(part.function)
        shown = list(show(results, part)) if show else []
        failures = list(_failures(results, part))
        if shown or failures:
            parts += [heading(part.title), *shown, *failures]
    return document(TITLE, parts)


def _first(results: Results, part: str, kind: str) -> Line:
    return next(iter(results.of(part, kind)), {})


def _head(facts: dict[str, Any]) -> Iterable[str]:
    if not facts:
        return
    if not facts.get("gpu"):
        yield paragraph(REHEARSAL, "bad")
    names = ("gpu", "driver", "cuda", "torch", "triton", "python", "processors", "memory_gb", "commit")
    yield paragraph(", ".join(f"{name} {facts[name]}" for name in names if facts.get(name)), "soft")


def _states(results: Results) -> str:
    rows = []
    for part in PARTS:
        ends = results.of(part.name, "end")
        took = f"{ends[-1]['seconds']:.1f}" if ends else ""
        state = results.state(part.name) or "not run"
        said = {"passed": "passed", "failed": "FAILED"}.get(state, state)
        rows.append((part.title, said, took, str(part.seconds)))
    return table(("part", "state", "seconds", "limit"), rows, words=2, verdicts=True)


def _failures(results: Results, part: Part) -> Iterable[str]:
    for line in results.of(part.name, "failure"):
        yield paragraph(f"{line['name']}: {line['error']}", "bad")
    ends = results.of(part.name, "end")
    if ends and ends[-1]["tail"]:
        yield f"<details><summary>The end of what it said</summary>{_verbatim(ends[-1]['tail'])}</details>"


def _verbatim(text: str) -> str:
    return f'<div class="scroll"><pre>{escape(text)}</pre></div>'


def _machine(results: Results, part: Part) -> Iterable[str]:
    facts = _first(results, part.name, "facts").get("facts", {})
    if facts:
        yield table(("fact", "value"), [(name, str(value)) for name, value in facts.items() if value], words=2)
    for line in results.of(part.name, "ceiling"):
        speed = f"{line['gbs']:.0f} GB/s" if "gbs" in line else f"{line['tflops']:.3g} TFLOP/s"
        yield paragraph(f"{line['name']}: {speed}")


def _cubins(results: Results, part: Part) -> Iterable[str]:
    for line in results.of(part.name, "cubins"):
        yield paragraph(f"{line['wanted']} kernels: {line['found']} were there, {line['compiled']} were compiled.")
        for said in (*line["warnings"], *line["spills"]):
            yield paragraph(said, "bad")


def _tests(results: Results, part: Part) -> Iterable[str]:
    for line in results.of(part.name, "tests"):
        kind = "bad" if line["failed"] or line["exit"] else "good"
        yield paragraph(f"{line['passed']} passed, {line['failed']} failed, {line['skipped']} skipped.", kind)
    rows = [
        (line["name"].rpartition("::")[2], line["said"].partition("\n")[0][:160])
        for line in results.of(part.name, "failed test")
    ]
    if rows:
        yield table(("failed test", "what it says"), rows, words=2)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else ""


def _ops(results: Results, part: Part) -> Iterable[str]:
    checks = results.of(part.name, "check")
    wrong = [each for line in checks for each in line["verdicts"] if not each["passed"]]
    if checks:
        right = sum(len(line["verdicts"]) for line in checks) - len(wrong)
        yield paragraph(f"{right} results are as defined, {len(wrong)} are not.", "bad" if wrong else "good")
    if wrong:
        rows = [
            (
                *(each["op"], each["name"], str(each["tokens"])),
                *(f"{each['error'] or float('inf'):.1e}", f"{each['limit']:.1e}"),
            )
            for each in wrong
        ]
        yield table(("op", "result", "tokens", "error", "at most"), rows, words=2)
    cases = [line for line in results.of(part.name, "case") if "kernel" in line["times"]]
    if cases:
        yield _ratio_plot(cases)
        yield table(
            ("case", "baselines (times of the kernel)", "ms", "20 %", "80 %", "predicted", "ratio", "of roofline"),
            [_case(line) for line in cases],
            words=2,
        )


def _case(line: Line) -> tuple[str, ...]:
    times = line["times"]["kernel"]
    ms, roofline = times["median_ms"], line["roofline_ms"]
    others = [f"{name} {each['median_ms'] / ms:.2f}" for name, each in line["times"].items() if name != "kernel"]
    missing = [f"{name} is missing" for name in line["missing"]]
    return (
        line["name"] + (" (wrong)" if line["is_wrong"] else ""),
        ", ".join(others + missing),
        *(_ms(times[name]) for name in ("median_ms", "p20_ms", "p80_ms")),
        _ms(line["predicted_ms"]),
        _ratio(ms, line["predicted_ms"]),
        f"{roofline / ms:.0%}" if roofline else "",
    )


def _ratio_plot(cases: Sequence[Line]) -> str:
    known = [line for line in cases if line["predicted_ms"]]
    points = [
        (float(index), line["times"]["kernel"]["median_ms"] / line["predicted_ms"], line["name"])
        for index, line in enumerate(known)
    ]
    names = [str(index + 1) for index in range(len(known))]
    series = [Series("ratio", points, is_joined=False)]
    title = "Measured time divided by the predicted one, the cases in the order of the table"
    return plot(Plot(title, "case", "ratio", series, x_names=names, log_y=True))


def _requests(results: Results, part: Part) -> Iterable[str]:
    runs = results.of(part.name, "request")
    if not runs:
        return
    timed = runs[1:] or runs
    stages = _first(results, part.name, "stages").get("stages", {})
    rows = []
    for stage in timed[0]["seconds"]:
        seconds = [line["seconds"][stage] for line in timed]
        cost = stages.get(stage, {})
        rows.append(_stage(stage, runs[0]["seconds"][stage], seconds, cost))
    steps = [step for line in timed for step in line["steps"]]
    rows.append(_stage("a step", runs[0]["steps"][0], steps, stages.get("step", {})))
    head = ("stage", "first", "median", "least", "most", "predicted", "ratio", "roofline")
    yield paragraph("Milliseconds. The first request draws the weights; the others are the ones that count.")
    yield table(head, rows)
    last = timed[-1]
    for name, value in (
        ("of tensors", last["tensor_bytes"]),
        ("of the GPU", last["device_bytes"]),
        ("of the host", last["host_bytes"]),
    ):
        if value:
            yield paragraph(f"Peak memory {name}: {value / 1e9:.2f} GB")
    if last["joules"]:
        yield paragraph(f"Energy of a clip: {median(line['joules'] for line in timed):.0f} J")
    if not all(line["finite"] for line in runs):
        yield paragraph("The latents are not all finite.", "bad")


def _stage(name: str, first: float, seconds: Sequence[float], cost: dict[str, float]) -> tuple[str, ...]:
    middle, predicted, roofline = median(seconds), cost.get("predicted"), cost.get("roofline")
    shown = [first, middle, min(seconds), max(seconds), predicted]
    return (
        name,
        *("" if each is None else number(1000 * each) for each in shown),
        _ratio(middle, predicted),
        "" if roofline is None else number(1000 * roofline),
    )


def _profiles(results: Results, part: Part) -> Iterable[str]:
    for line in results.of(part.name, "profile"):
        yield heading(line["name"], 3)
        yield paragraph(
            f"{line['wall_ms']:.4g} ms, of which {line['busy_ms']:.4g} ms are in {line['launches']} operations."
        )
        if line["trace"]:
            yield paragraph(f"The trace is {line['trace']}.", "soft")
        rows = [(each["name"], str(each["count"]), _ms(each["ms"])) for each in line["top"]]
        yield table(("operation", "count", "ms"), rows)


def _sweeps(results: Results, part: Part) -> Iterable[str]:
    by_case: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in results.of(part.name, "variant"):
        by_case[line["kernel"], line["case"]].append(line)
    chosen = {line["name"]: line for line in results.of(part.name, "winner")}
    taken = {line["name"] for line in winners(results)}
    for name, line in chosen.items():
        if line["is_present"]:
            said = "The present tile is the fastest."
        else:
            gain = 1 - line["ms"] / line["present_ms"]
            said = f"{line['variant']} saves {gain:.1%}" + (", as the patch has it." if name in taken else ".")
            said += "" if line["passed"] else f" But it is wrong: {'; '.join(line['wrong'])}."
            said += "" if gain >= LEAST_GAIN else f" Less than {LEAST_GAIN:.0%} is taken for noise."
        yield paragraph(f"{name}: {said}")
    for (kernel, case), lines in by_case.items():
        yield heading(f"{kernel}: {case}", 3)
        ranked = sorted(lines, key=lambda line: line["ms"] or float("inf"))
        shown = [line for index, line in enumerate(ranked) if index < SHOWN_VARIANTS or line["is_present"]]
        present = next((line["ms"] for line in lines if line["is_present"]), None)
        rows = [
            (
                line["variant"],
                "present" if line["is_present"] else "" if line["ms"] else f"wrong by {line['error']}",
                _ms(line["ms"]),
                _ratio(line["ms"], present),
                str(line["spills"] or ""),
            )
            for line in shown
        ]
        yield table(("tile", "", "ms", "of the present", "spilled bytes"), rows, words=2)
        refused = sum(line["name"].startswith(f"{case}: ") for line in results.of(part.name, "refused"))
        yield paragraph(f"{len(lines)} tiles were timed or compared, {refused} do not compile.", "soft")


def _vae(results: Results, part: Part) -> Iterable[str]:
    lines = results.of(part.name, "vae")
    if lines:
        first = lines[0]["ms"]
        yield paragraph("One chunk of the decoder; the first row is what the backend does.")
        yield table(
            ("variant", "ms", "of the first"),
            [(each["name"], _ms(each["ms"]), _ratio(each["ms"], first)) for each in lines],
        )


def _parity(results: Results, part: Part) -> Iterable[str]:
    for line in results.of(part.name, "parity"):
        yield heading(line["name"], 3)
        yield paragraph("Passed." if line["passed"] else "FAILED.", "good" if line["passed"] else "bad")
        yield _verbatim(line["text"])


def _baselines(results: Results, part: Part) -> Iterable[str]:
    cases = [line for line in results.of(part.name, "case") if "kernel" in line["times"]]
    if cases:
        rows = [_case(line)[:3] for line in cases]
        yield table(("case", "baselines (times of the kernel)", "ms"), rows, words=2)


Section = Callable[[Results, Part], Iterable[str]]

SECTIONS: dict[str, Section] = {
    "tools.gpu_day.machine:run": _machine,
    "tools.gpu_day.kernels:run": _cubins,
    "tools.gpu_day.device_tests:run": _tests,
    "tools.gpu_day.ops:run": _ops,
    "tools.gpu_day.ops:run_baselines": _baselines,
    "tools.gpu_day.requests:run": _requests,
    "tools.gpu_day.requests:run_profile": _profiles,
    "tools.gpu_day.sweep:run": _sweeps,
    "tools.gpu_day.vae:run": _vae,
    "tools.gpu_day.parity:run": _parity,
}
"""What shows the results of each kind of part, by the function that finds them."""
