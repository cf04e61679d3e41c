"""Exports spans by OpenTelemetry, whose SDK is loaded only where `telemetry.opentelemetry` is on.

Exporter, sampler and batches follow the standard environment variables (OTEL_...).
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from fedhlm.errors import ConfigError
from fedhlm.exposition import role_of
from fedhlm.spans import PASSING, TRACEPARENT, Attribute, OpenSpan, SpanKind, Tracer
from fedhlm.version import __version__

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

KEY: Final = "telemetry.opentelemetry"
EXPORTER: Final = "OTEL_TRACES_EXPORTER"
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL: Final = "http/protobuf"
SERVICE: Final = "service.name"


@contextmanager
def traced(party: str, *, enabled: bool) -> Iterator[Tracer]:
    """Yield the tracer of a part, and export what is left at the end. Not `enabled`: it hands contexts on.

    Raises:
        ConfigError: the SDK is not installed, or a variable has a value that cannot be used.
    """
    if not enabled:
        yield PASSING
        return
    try:
        provider = _provider(party)
    except ModuleNotFoundError as exc:
        raise ConfigError(KEY, True, "false", why=f"{exc.name} is not installed: pip install 'fedhlm[otel]'") from exc
    try:
        yield OtelTracer(provider)
    finally:
        provider.shutdown()


class OtelTracer:
    """Begins spans of an SDK's provider. See `fedhlm.spans.Tracer`."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("fedhlm", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, name: str, kind: SpanKind, parent: str = "", **attributes: Attribute) -> OpenSpan:
        """See `fedhlm.spans.Tracer`."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        above = self._propagator.extract({TRACEPARENT: parent} if parent else {}, Context())
        span = self._tracer.start_span(name, above, kind=trace.SpanKind[kind.upper()], attributes=_named(attributes))
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span, Context()))
        return OtelSpan(span, carrier.get(TRACEPARENT, ""))


class OtelSpan:
    """A span of the SDK. See `fedhlm.spans.OpenSpan`."""

    def __init__(self, span: "trace.Span", context: str) -> None:
        self.context = context
        self._span = span

    def note(self, **attributes: Attribute) -> None:
        """See `fedhlm.spans.OpenSpan`."""
        self._span.set_attributes(_named(attributes))

    def end(self, error: str = "") -> None:
        """See `fedhlm.spans.OpenSpan`."""
        from opentelemetry.trace import StatusCode

        if error:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def _named(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    return {f"fedhlm.{name}": value for name, value in attributes.items()}


def _provider(party: str) -> "TracerProvider":
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=_resource(party))
    for exporter in _exporters():
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _resource(party: str) -> Any:
    from opentelemetry.sdk.resources import Resource

    given = Resource.create({"service.instance.id": party, "service.version": __version__})
    if not str(given.attributes.get(SERVICE, "")).startswith("unknown_service"):
        return given
    return given.merge(Resource({SERVICE: f"fedhlm-{role_of(party)}"}))


def _exporters() -> Iterator["SpanExporter"]:
    """The exporters that the environment names.

    Raises:
        ConfigError: a variable has a value that cannot be used.
    """
    named = os.environ.get(EXPORTER) or "otlp"
    for name in named.split(","):
        if name.strip() not in EXPORTERS:
            raise ConfigError(EXPORTER, named, f"{', '.join(EXPORTERS)}, or several of them with commas")
        yield from EXPORTERS[name.strip()]()


def _otlp() -> Iterator["SpanExporter"]:
    _check_otlp()
    from fedhlm.collector import CollectorExporter

    yield CollectorExporter()


def _console() -> Iterator["SpanExporter"]:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    yield ConsoleSpanExporter(out=sys.stdout)


EXPORTERS: Final[dict[str, Callable[[], Iterable["SpanExporter"]]]] = {
    "otlp": _otlp,
    "console": _console,
    "none": tuple,
}
"""The values of OTEL_TRACES_EXPORTER."""


def _check_otlp() -> None:
    for key in PROTOCOLS:
        if (value := os.environ.get(key) or PROTOCOL) != PROTOCOL:
            raise ConfigError(key, value, PROTOCOL)
    for key in ENDPOINTS:
        value = os.environ.get(key) or "http://"
        if not value.startswith(("http://", "https://")):
            raise ConfigError(key, value, "a URL such as http://localhost:4318")
