"""Traces on their way to a collector, and what happens without one."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.runtime.service.workers.rig import Rig, working
from wanforge.errors import ConfigError
from wanforge.runtime.service.tracing import opening

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A server that takes traces. Yields its address and what it was sent."""
    sent: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            sent.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_supervisor_sends_the_trace_of_a_video(
    tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, sent):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        with working(Rig(tmp_path, [tinywan])) as rig:
            made = rig.submit("a prompt", traceparent=PARENT)
            rig.completed(made)
            assert rig.failed(rig.submit("wrong")) == "invalid_request"
            rig.signal(signal.SIGTERM)
    assert {path for path, _ in sent} == {"/v1/traces"}
    groups = [group for _, request in sent for group in request.resource_spans]
    resource = {each.key: each.value.string_value for each in groups[0].resource.attributes}
    assert (resource["service.name"], resource["deployment.environment"]) == ("wanforge", "test")
    spans = [span for group in groups for scope in group.scope_spans for span in scope.spans]
    of_one = {span.name: span for span in spans if span.trace_id.hex() == PARENT.split("-")[1]}
    assert set(of_one) == {"video", "queue", "denoise", "store"}
    assert of_one["video"].parent_span_id.hex() == PARENT.split("-")[2]
    outcomes = {each.value.string_value for span in spans for each in span.attributes if each.key == "wanforge.outcome"}
    assert outcomes == {"completed", "invalid_request"}


@pytest.mark.slow
def test_videos_are_made_without_the_collector(tinywan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with working(Rig(tmp_path, [tinywan])) as rig:
        rig.completed(rig.submit("a prompt"))
        assert rig.signal(signal.SIGTERM) == 0


@pytest.mark.slow
def test_without_variables_nothing_is_traced_or_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (opening.EXPORTER, *opening.ENDPOINTS):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import sys, wanforge.runtime.service.workers.supervisor\n"
        "from wanforge.runtime.service.tracing.opening import open_tracer\n"
        "assert open_tracer() is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("variables", "is_wanted"),
    [
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://here", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://here", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_variables_say_whether(variables: dict[str, str], is_wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert opening.is_wanted() is is_wanted


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "export OTEL_TRACES_EXPORTER=otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://here")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        opening.is_wanted()


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://here")
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        opening.is_wanted()
