"""Serves counters, gauges and histograms to Prometheus over HTTP. Its library is loaded only if a port is configured.

A part also exports the figures of parts that are not scraped: an edge those of its agents, which report them over the
bus (`MetricsReport`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from fedhlm.errors import ConfigError
from fedhlm.metrics import BY_NAME, METRICS, Metric
from fedhlm.protocol.fields import MAX_BLOCK
from fedhlm.protocol.roles import ROLES, cluster_of
from fedhlm.telemetry import Counters

SUM: Final = "sum"
LABEL_MAX: Final = 32  # characters of a label that another part reports
LABELS_MAX: Final = MAX_BLOCK  # labels of one name that another part reports


def role_of(party: str) -> str:
    """The role of a part, which its name tells."""
    if party == ROLES["cloud"].proper:
        return "cloud"
    return "edge" if cluster_of(party) is not None else "agent"


def accepted(values: Mapping[str, float]) -> dict[str, float]:
    """Return those of another part's figures that this version knows and that are possible.

    The keys are those of `Counters.snapshot`. A part of another version may report others, and a hostile one anything.
    """
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for key, value in values.items():
        name, dot, label = key.partition(".")
        metric = BY_NAME.get(name)
        if metric is None or not math.isfinite(value) or bool(dot) != (bool(metric.label) or bool(metric.buckets)):
            continue
        if (metric.kind != "gauge" and value < 0) or not _possible(metric, label):
            continue
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= LABELS_MAX:
            found[key] = float(value)
    return found


def _possible(metric: Metric, label: str) -> bool:
    if metric.buckets:
        return label == SUM or (label.isdecimal() and label.isascii() and int(label) <= len(metric.buckets))
    return len(label) <= LABEL_MAX and all(c.isascii() and (c.isalnum() or c in "-_") for c in label)


@contextmanager
def exported(counters: Counters, *, party: str, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve the metrics of `fedhlm.metrics` over HTTP while the block runs. Yields the port; 0 serves nothing.

    Every sample is labelled with the part that it is of, and that part's role.

    Raises:
        ConfigError: the port cannot be opened on this host.
    """
    if port == 0:
        yield 0
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(counters, party))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as exc:
        raise ConfigError(
            "telemetry.metrics_port", port, f"a port that is free on {host}", why=exc.strerror or str(exc)
        ) from exc
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Collector:
    def __init__(self, counters: Counters, party: str) -> None:
        self._counters = counters
        self._party = party

    def collect(self) -> Iterator[Any]:
        # An unlabelled counter that was never raised is 0, so that a rate sees its first rise.
        zeros = {m.name: 0.0 for m in METRICS if m.kind == "counter" and not m.label}
        shown = {self._party: zeros | self._counters.snapshot()} | self._counters.relayed.copy()
        by_name: dict[str, list[tuple[str, str, float]]] = {}
        for party, values in shown.items():
            for key, value in values.items():
                name, _, label = key.partition(".")
                by_name.setdefault(name, []).append((party, label, value))
        for metric in METRICS:
            if samples := by_name.get(metric.name):
                yield _family(metric, samples)


def _family(metric: Metric, samples: Iterable[tuple[str, str, float]]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    names = ["party", "role", *([metric.label] if metric.label else [])]
    exported_as = metric.exported.removesuffix("_total")
    if metric.kind == "histogram":
        family = HistogramMetricFamily(exported_as, metric.meaning, labels=names)
        found: dict[str, dict[str, float]] = {}
        for party, label, value in samples:
            found.setdefault(party, {})[label] = value
        for party, values in found.items():
            family.add_metric([party, role_of(party)], list(_cumulative(metric, values)), values.get(SUM, 0.0))
        return family
    plain: Any = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = plain(exported_as, metric.meaning, labels=names)
    for party, label, value in samples:
        family.add_metric([party, role_of(party), *([label] if metric.label else [])], value)
    return family


def _cumulative(metric: Metric, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    count = 0.0
    for place, bound in enumerate((*metric.buckets, math.inf)):
        count += values.get(str(place), 0.0)
        yield ("+Inf" if math.isinf(bound) else repr(bound)), count
