"""Whether and where traces go, by OpenTelemetry's environment variables. Without them nothing is traced or imported."""

import os
from importlib.util import find_spec

from wanforge.errors import ConfigError
from wanforge.requirements import install_extra
from wanforge.runtime.service.tracing.attempts import Tracer
from wanforge.version import __version__

EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
SDK, OTLP = "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"


def is_wanted() -> bool:
    """Whether the environment asks for traces.

    Raises:
        ConfigError: It asks for them in a way that cannot be, or OpenTelemetry is not installed.
    """
    exporter = os.environ.get(EXPORTER, "").strip().lower()
    if os.environ.get(DISABLED, "").strip().lower() == "true" or exporter == "none":
        return False
    if not exporter and not any(os.environ.get(name) for name in ENDPOINTS):
        return False
    if exporter not in ("", "otlp"):
        raise ConfigError(f"{EXPORTER} is {exporter!r}; wanforge exports traces as otlp only: export {EXPORTER}=otlp")
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), PROTOCOL)
    if protocol != PROTOCOL:
        raise ConfigError(
            f"the protocol of OTLP is {protocol!r}; only {PROTOCOL} is known: export {PROTOCOLS[0]}={PROTOCOL}"
        )
    if not _is_installed():
        raise ConfigError(f"traces are wanted, but OpenTelemetry is not installed; run: {install_extra('otel')}")
    return True


def open_tracer() -> Tracer | None:
    """What tells of attempts, if the environment asks for it.

    Raises:
        ConfigError: See `is_wanted`.
    """
    if not is_wanted():
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource({SERVICE_NAME: "wanforge", SERVICE_VERSION: __version__})
    # What the environment says of the service comes before what we do.
    resource = Resource.create({}).merge(ours).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


def _is_installed() -> bool:
    try:
        return all(find_spec(name) is not None for name in (SDK, OTLP))
    except ModuleNotFoundError:  # a package around it is missing
        return False
