"""OpenTelemetry as a part uses it: off by default, and by the standard variables where it is on."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedhlm.collector import CollectorExporter
from fedhlm.errors import ConfigError
from fedhlm.opentelemetry import OtelTracer, traced
from fedhlm.spans import PASSING
from tests.fedhlm.test_spans import ABOVE, OTHER


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def test_without_the_setting_nothing_of_it_is_imported() -> None:
    script = (
        "import sys\n"
        "import edge_agent.__main__, edge_broker.__main__, cloud_verifier.__main__\n"
        "from fedhlm.opentelemetry import traced\n"
        "with traced('porch', enabled=False) as tracer: tracer.begin('request', 'server').end()\n"
        "sys.exit([name for name in sys.modules if name.startswith('opentelemetry')] != [])"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    with traced("porch", enabled=False) as tracer:
        assert tracer is PASSING


@pytest.mark.parametrize("missing", ["opentelemetry.sdk", "opentelemetry.exporter"])
def test_without_the_extra_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith((missing, "fedhlm.collector"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    wanted = r"telemetry\.opentelemetry must be false \(got True: .*pip install 'fedhlm\[otel\]'\)"
    with pytest.raises(ConfigError, match=wanted), traced("porch", enabled=True):
        pass


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("OTEL_TRACES_EXPORTER", "oltp", r"otlp, console, none, or several of them with commas \(got 'oltp'\)"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", r"http/protobuf \(got 'grpc'\)"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318", r"a URL such as http://localhost:4318 \(got"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector", r"a URL such as http://localhost:4318 \(got"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    name: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name} must be {wanted}"), traced("porch", enabled=True):
        pass


def test_a_collector_is_sent_the_spans_and_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=barn")
        with traced("edge-home", enabled=True) as tracer:
            tracer.begin("settle", "server", ABOVE, base=5).end()
        server.shutdown()
    (whole,) = got
    (of_part,) = whole.resource_spans
    told = {pair.key: pair.value.string_value for pair in of_part.resource.attributes}
    assert (told["service.name"], told["service.instance.id"]) == ("fedhlm-edge", "edge-home")
    assert told["deployment.environment"] == "barn"
    (span,) = of_part.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("settle", ABOVE[3:35], ABOVE[36:52])


def test_a_collector_that_is_away_is_said_once_and_its_return_as_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [401, 401, 200, 200, 401]

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    caplog.set_level("INFO")
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(CollectorExporter()))
        while answers:
            OtelTracer(provider).begin("request", "server").end()
        provider.shutdown()
        server.shutdown()
    told = [(record.levelname, record.getMessage().partition(":")[0]) for record in caplog.records]
    lost = "WARNING", "the collector takes no spans"
    assert told == [lost, ("INFO", "the collector takes spans again"), lost]
    assert "401" in caplog.text


def test_the_service_has_the_name_that_the_environment_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "barn-fleet")
    with traced("porch", enabled=True) as tracer:
        tracer.begin("request", "server", request="r1").end()
    told = capsys.readouterr().out
    assert '"service.name": "barn-fleet"' in told
    assert '"fedhlm.request": "r1"' in told


def test_a_span_continues_the_trace_above_it_and_keeps_its_choice_to_be_sampled() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = OtelTracer(provider)
    unsampled = tracer.begin("request", "server", OTHER)
    assert (unsampled.context[:35], unsampled.context[-2:]) == (OTHER[:35], "00")
    unsampled.end()
    assert kept.get_finished_spans() == ()
    tracer.begin("request", "server", "nonsense").end("busy")
    (root,) = kept.get_finished_spans()
    assert root.parent is None
    assert root.status.description == "busy"
    provider.shutdown()
