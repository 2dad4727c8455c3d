"""An attempt as spans: the wait in the queue, each stage and step, and storing the result.

All spans are made when the attempt has ended, with the times that it noted. Nothing here imports OpenTelemetry until a
`Tracer` is made.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wanforge.runtime.service.child.messages import ClipMade
from wanforge.runtime.service.job import Job

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

ORDER = ("text", "condition", "prepare", "denoise", "decode", "transfer", "write")
"""The stages as they follow each other. The last three take turns, and are drawn one after the other."""
STEPS = "denoise"
WELL = ("completed", "cancelled", "requeued")
"""How an attempt ends that is no failure."""


@dataclass
class TracedAttempt:
    """What an attempt notes for its spans.

    Attributes:
        began_at: When it began, and `made_at`, when its files were made; in seconds since 1970.
        made: What its child told of its files, if it made any.
        outcome: How it ended: one of `WELL` or a failure's code; empty if its end is not known.
    """

    job: Job
    began_at: float = field(default_factory=time.time)
    made: ClipMade | None = None
    made_at: float = 0.0
    outcome: str = ""

    def note_made(self, made: ClipMade) -> None:
        """Note that the files are made, and remain to be stored."""
        self.made, self.made_at = made, time.time()


Tell = Callable[[TracedAttempt], object]
"""Called with every attempt that has ended."""


def untraced(attempt: TracedAttempt) -> None:
    """Tell nobody of an attempt."""


class Tracer:
    """Tells of attempts as spans.

    Args:
        provider: Where the spans go.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = provider
        self._tracer = provider.get_tracer("wanforge")
        self._propagator = TraceContextTextMapPropagator()

    def tell(self, attempt: TracedAttempt) -> None:
        """Tell of an attempt that has just ended. Its spans are children of the one that its request came with."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        job, ends = attempt.job, time.time()
        is_first = job.attempt <= 1
        begins = min(job.created_at, attempt.began_at) if is_first else attempt.began_at
        root = self._tracer.start_span(
            "video",
            self._propagator.extract({"traceparent": str(job.request.get("traceparent") or "")}),
            SpanKind.CONSUMER,
            attributes_of(attempt),
            start_time=nanoseconds(begins),
        )
        inside = set_span_in_context(root)
        if is_first:
            self._span("queue", inside, begins, attempt.began_at)
        if attempt.made is not None:
            self._tell_stages(attempt.made, inside, attempt.made_at)
            self._span("store", inside, attempt.made_at, ends)
        if attempt.outcome not in WELL:
            root.set_status(StatusCode.ERROR, attempt.outcome)
        root.end(nanoseconds(ends))

    def _tell_stages(self, made: ClipMade, inside: "Context", ends: float) -> None:
        """Tell of the stages of a clip, one after the other, so that they end when it was made."""
        places = {stage: place for place, stage in enumerate(ORDER)}
        stages = sorted(made.stages.items(), key=lambda item: places.get(item[0], len(ORDER)))
        begins = ends - sum(made.stages.values())
        for stage, seconds in stages:
            within = self._span(stage, inside, begins, begins + seconds)
            if stage == STEPS:
                self._tell_steps(made.details.get("step_seconds", ()), within, begins)
            begins += seconds

    def _tell_steps(self, steps: Any, inside: "Context", begins: float) -> None:
        for number, seconds in enumerate(steps, 1):
            self._span(f"step {number}", inside, begins, begins + seconds)
            begins += seconds

    def _span(self, name: str, inside: "Context", begins: float, ends: float) -> "Context":
        """Tell of something. Returns the context of what happens within it."""
        from opentelemetry.trace import set_span_in_context

        span = self._tracer.start_span(name, inside, start_time=nanoseconds(begins))
        span.end(nanoseconds(max(begins, ends)))
        return set_span_in_context(span)

    def close(self) -> None:
        """Hand over what is left."""
        self.provider.shutdown()


def attributes_of(attempt: TracedAttempt) -> dict[str, Any]:
    """What the span of an attempt tells: nothing of what the clip shows."""
    job = attempt.job
    width_height, _, frames = job.shape.rpartition("x")
    found: dict[str, Any] = {
        "wanforge.job.id": job.id,
        "wanforge.attempt": job.attempt,
        "wanforge.outcome": attempt.outcome or "unknown",
        "wanforge.worker": job.worker or "",
        "wanforge.size": width_height,
        "wanforge.frames": int(frames) if frames.isdigit() else 0,
        "wanforge.steps": job.steps,
    }
    for name in ("model", "recipe"):
        if isinstance(job.request.get(name), str):
            found[f"wanforge.{name}"] = job.request[name]
    if attempt.made is not None:
        found["wanforge.backend"] = attempt.made.backend
    return found


def nanoseconds(seconds: float) -> int:
    """A time as OpenTelemetry counts it."""
    return int(seconds * 1e9)
