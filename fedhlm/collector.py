"""Sends spans to a collector, and logs once that it does not take them. Imported only where spans are exported."""

import logging
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import __name__ as exporter_name
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)


class CollectorExporter(SpanExporter):
    """Exports by OTLP over HTTP. The exporter's own lines, some for each try of each batch, are logged at DEBUG.

    One warning says that the collector takes no spans, and why. One line says that it takes them again.
    """

    def __init__(self) -> None:
        self._inner = OTLPSpanExporter()
        self._lines = _FirstLine()
        self._takes = True
        logging.getLogger(exporter_name).addFilter(self._lines)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See `SpanExporter`."""
        self._lines.words = ""
        found = self._inner.export(spans)
        takes = found is SpanExportResult.SUCCESS
        if takes != self._takes:
            if takes:
                log.info("the collector takes spans again")
            else:
                log.warning("the collector takes no spans: they are lost until it does. %s", self._lines.words)
        self._takes = takes
        return found

    def shutdown(self) -> None:
        """See `SpanExporter`."""
        self._inner.shutdown()  # type: ignore[no-untyped-call]
        logging.getLogger(exporter_name).removeFilter(self._lines)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `SpanExporter`."""
        return self._inner.force_flush(timeout_millis)


class _FirstLine(logging.Filter):
    """Keeps what a logger says first about a batch, which names the reason; the later lines tell of further tries."""

    words = ""

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        self.words = self.words or said
        log.debug("%s", said)
        return False
