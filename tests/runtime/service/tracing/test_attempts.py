"""Attempts as spans: what belongs to what, when it was, and what it tells."""

import time
from itertools import pairwise

import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from wanforge.runtime.service.catalogue import Asked
from wanforge.runtime.service.child.messages import ClipMade
from wanforge.runtime.service.job import Job, State
from wanforge.runtime.service.tracing.attempts import TracedAttempt, Tracer

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{CALLER}-01"
STAGES = {"text": 1.0, "denoise": 4.0, "write": 0.5, "decode": 2.0, "transfer": 0.25}
PROMPT = "something private"


def attempt(traceparent: str | None = PARENT, number: int = 1, outcome: str = "completed") -> TracedAttempt:
    """An attempt that began 10 s ago, 3 s after its job was submitted, and made a clip unless it failed."""
    sizes = {"width_px": 832, "height_px": 480, "frames": 81, "fps": 16, "seed": 3, "steps": 2}
    asked = Asked(model="turbo", recipe="w8a8", prompt=PROMPT, traceparent=traceparent, **sizes)
    now = time.time()
    job = Job(
        id="video_1",
        owner="ann",
        bundle="b",
        shape="832x480x81",
        steps=2,
        request=msgspec.to_builtins(asked),
        priority=0,
        objects=(),
        state=State.IN_PROGRESS,
        created_at=now - 13,
        attempt=number,
        worker="gpu 0",
    )
    made = ClipMade("video_1/1", {}, "cuda", STAGES, {"step_seconds": [2.5, 1.5]})
    is_made = outcome == "completed"
    return TracedAttempt(job, now - 10, made if is_made else None, now - 1, outcome)


def spans_of(traced: TracedAttempt) -> dict[str, ReadableSpan]:
    """The spans of an attempt by name."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracer(provider).tell(traced)
    spans = exporter.get_finished_spans()
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_stages_belong_to_the_video_and_steps_to_denoising() -> None:
    spans = spans_of(attempt())
    parents = {name: span.parent.span_id for name, span in spans.items() if span.parent is not None}
    video, denoise = (spans[name].context.span_id for name in ("video", "denoise"))
    assert parents.pop("video") == int(CALLER, 16)
    assert {parents.pop("step 1"), parents.pop("step 2")} == {denoise}
    assert parents == dict.fromkeys(("queue", "text", "denoise", "decode", "transfer", "write", "store"), video)
    assert {span.context.trace_id for span in spans.values()} == {int(TRACE, 16)}


def test_stages_follow_each_other_in_time() -> None:
    spans = spans_of(attempt())
    row = [spans[name] for name in ("text", "denoise", "decode", "transfer", "write", "store")]
    for before, after in pairwise(row):
        assert after.start_time == pytest.approx(before.end_time, abs=2000)
    assert {name: round(seconds(span), 3) for name, span in spans.items() if name in STAGES} == STAGES
    assert seconds(spans["step 1"]) == pytest.approx(2.5)
    assert spans["step 2"].end_time == pytest.approx(spans["denoise"].end_time, abs=2000)
    assert seconds(spans["queue"]) == pytest.approx(3.0)
    assert seconds(spans["video"]) == pytest.approx(13.0, abs=0.5)
    assert all(span.start_time >= spans["video"].start_time for span in row)  # type: ignore[operator]


def test_a_span_tells_what_was_made_but_not_what_it_shows() -> None:
    spans = spans_of(attempt())
    assert dict(spans["video"].attributes or {}) == {
        "wanforge.job.id": "video_1",
        "wanforge.attempt": 1,
        "wanforge.outcome": "completed",
        "wanforge.worker": "gpu 0",
        "wanforge.model": "turbo",
        "wanforge.recipe": "w8a8",
        "wanforge.size": "832x480",
        "wanforge.frames": 81,
        "wanforge.steps": 2,
        "wanforge.backend": "cuda",
    }
    assert not any(PROMPT in span.to_json() for span in spans.values())


def test_a_failure_is_an_error_and_a_later_attempt_has_no_queue() -> None:
    failed = spans_of(attempt(outcome="out_of_memory"))
    assert set(failed) == {"video", "queue"}
    status = failed["video"].status
    assert (status.status_code, status.description) == (StatusCode.ERROR, "out_of_memory")
    again = spans_of(attempt(number=2))
    assert "queue" not in again
    assert seconds(again["video"]) == pytest.approx(10.0, abs=0.5)
    assert again["video"].status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("traceparent", [None, "00-zz-1-01", "x" * 500])
def test_without_a_trace_of_the_caller_there_is_one_of_our_own(traceparent: str | None) -> None:
    video = spans_of(attempt(traceparent))["video"]
    assert video.parent is None


def test_what_the_caller_does_not_sample_is_not_told() -> None:
    assert spans_of(attempt(f"00-{TRACE}-{CALLER}-00")) == {}
