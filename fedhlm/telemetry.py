"""Logs, counters and gauges of a part.

A log record is one line. It names the party that wrote it and contains no known secret. Counters and gauges have fixed,
documented names, and counters only rise. If a port is configured, they are exported to Prometheus; its library is
loaded only then.
"""

import logging
import math
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO

from fedhlm.errors import ConfigError

MASK: Final = "***"
WARNED_MAX: Final = 4_096
KEY_MAX: Final = 256  # most characters of a warning's key that are stored
MESSAGE_MAX: Final = 4_096  # most characters of one record; the name of a topic alone may have 65,535

COUNTERS: Final[dict[str, str]] = {
    "refused_messages": "payloads that were not a valid message of their topic, or came from the wrong sender",
    "dropped_messages": "messages dropped because an incoming or outgoing queue was full",
    "unsent_messages": "messages not sent: queue full, expired in the queue, rejected by the broker, or lost at QoS 0",
    "limited_messages": "messages beyond their sender's rate: blocks among them are refused, others dropped",
    "too_large_messages": "messages or items dropped because they are larger than the broker accepts",
    "expired_messages": "blocks dropped because their deadline had passed",
    "stale_verdicts": "verdicts of an epoch that a rollback had ended",
    "late_verdicts": "verdicts for tokens that were committed already at their deadline",
    "duplicate_messages": "messages that had been handled before",
    "escalations": "blocks sent upwards",
    "verdicts": "verdicts received or given",
    "retries": "escalations sent again",
    "stale_escalations": "blocks of an epoch that a rollback had ended",
    "rollbacks": "drafts taken back after a verdict",
    "reprimes": "sessions whose context had to be sent again",
    "evictions": "sessions dropped from a full cache",
    "evicted_caches": "KV caches dropped to make room for others, and computed again when needed",
    "fingerprint_mismatches": "requests rejected because both ends have different tokenizers, vocabularies or noise",
    "batches": "batches sent or computed",
    "reconnects": "connections to the broker after the first",
    "sent_messages": "messages sent to brokers",
    "sent_bytes": "bytes sent to brokers in PUBLISH packets",
    "received_messages": "messages received from brokers",
    "received_bytes": "bytes received from brokers in PUBLISH packets",
    "uplink_messages": "messages sent towards the cloud",
    "uplink_bytes": "bytes sent towards the cloud, MQTT headers included",
    "downlink_messages": "messages received from the cloud's side",
    "downlink_bytes": "bytes received from the cloud's side, MQTT headers included",
    "drafted_tokens": "tokens drafted by the small model",
    "discarded_tokens": "drafts discarded without being committed",
    "escalated_tokens": "drafts sent upwards",
    "audits": "tails that the target scored for the certificate",
    "lost_audits": "audits without an answer; their tokens count as wrong",
    "audit_messages": "messages sent for audits only, because no escalation carried them in time",
    "contributions": "federated contributions taken, from agents at an edge or from clusters at the cloud",
    "refused_contributions": "federated contributions with impossible sums or thresholds",
    "cut_contributions": "contributions that claimed more tokens, or less harm, than the edge saw in verdicts",
    "cut_evidence": "contributions whose certificate promised much more than what the edge saw in verdicts allows",
    "forgotten_members": "operators' orders to forget a member that were obeyed",
    "rounds": "federated rounds completed",
    "verified_tokens": "tokens that the cloud settled in doubtful contexts, remembered at the edge",
    "peer_answers": "blocks that the edge settled from its own cluster's verified tokens",
    "neighbour_answers": "blocks that the edge settled with a neighbour cluster's verified tokens",
    "refused_keys": "context keys of another length than this edge's",
    "assignments": "assignments of agents to another cluster, made by the cloud or relayed by an edge",
    "broker_connections": "connections to the edge's own broker",
    "broker_takeovers": "connections to it that ended because another client connected with the same id",
    "broker_silences": "connections to it that ended because the client was silent",
    "broker_refusals": "connections that it rejected",
    "broker_received": "messages that it received",
    "broker_sent": "messages that it sent",
    "broker_dropped": "messages that it dropped: too large, or for a client that reads too slowly",
    "tokens_by_source": "committed tokens, labelled by source",
    "always_verified": "drafts that were verified whatever their doubt, labelled by rule",
    "generations": "finished generations, labelled by finish reason",
}
LABELS: Final = {"tokens_by_source": "source", "always_verified": "rule", "generations": "finish"}

GAUGES: Final[dict[str, str]] = {
    "risk": "estimated harm per token of kept tokens (R-hat), after the newest generation that could be audited",
    "risk_limit": "upper confidence limit of the harm per token",
    "fleet_risk": "estimated harm per token of all devices' kept tokens, for the present large model",
    "fleet_risk_limit": "upper confidence limit of the fleet's harm per token",
    "fleet_risk_tokens": "tokens that the fleet's estimate covers",
    "risk_generations": "generations that the estimate covers",
    "tau": "threshold on the doubt in the newest generation; below 0 every token was verified",
    "similarity": "cosine from which peers settled tokens, in the newest generation in which they could",
}


class Counters:
    """Counters by the names of COUNTERS, with a label for the names in LABELS; and gauges by the names of GAUGES.

    A count is raised by `add`, or read from an object that counts by itself (`follow`). Any thread may add, set and
    read.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._followed: list[tuple[str, object, str]] = []
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1, *, label: str = "") -> None:
        """Raise a count.

        Raises:
            KeyError: `name` is not in COUNTERS.
            ValueError: the amount is negative, a label is given for a name without labels, or it is missing.
        """
        if name not in COUNTERS:
            raise KeyError(name)
        if amount < 0:
            raise ValueError(f"counter {name} must be raised by 0 or more, since counters never fall (got {amount})")
        if bool(label) != (name in LABELS):
            raise ValueError(
                f"counter {name} must be raised {'with' if name in LABELS else 'without'} a label (got {label!r})"
            )
        with self._lock:
            self._counts[name, label] += amount

    def add_all(self, **amounts: int) -> None:
        """Raise several counts without labels."""
        for name, amount in amounts.items():
            self.add(name, amount)

    def follow(self, source: object, **attributes: str) -> None:
        """Add attributes of `source` to counts from now on; `attributes` maps names of COUNTERS to attributes.

        Several sources of a count are summed. The same source counts once.

        Raises:
            KeyError: a name is not in COUNTERS, or has labels.
            AttributeError: `source` has no such attribute.
        """
        for name, attribute in attributes.items():
            if name not in COUNTERS or name in LABELS:
                raise KeyError(name)
            getattr(source, attribute)
            if not any(held is source and (known, kept) == (name, attribute) for known, held, kept in self._followed):
                self._followed.append((name, source, attribute))

    def set(self, name: str, value: float) -> None:
        """Set a gauge.

        Raises:
            KeyError: `name` is not in GAUGES.
            ValueError: the value is not finite.
        """
        if name not in GAUGES:
            raise KeyError(name)
        if not math.isfinite(value):
            raise ValueError(f"gauge {name} must be a finite number (got {value!r})")
        with self._lock:
            self._values[name] = float(value)

    def set_all(self, **values: float | None) -> None:
        """Set several gauges. None keeps the current value."""
        for name, value in values.items():
            if value is not None:
                self.set(name, value)

    def gauges(self) -> dict[str, float]:
        """Return the value of each gauge that was set, in a fixed order."""
        with self._lock:
            return {name: self._values[name] for name in GAUGES if name in self._values}

    def __getitem__(self, name: str) -> int:
        """Return the count of a name, summed over its labels; 0 before the first `add`."""
        if name not in COUNTERS:
            raise KeyError(name)
        return sum(count for (known, _), count in self.items() if known == name)

    def by_label(self, name: str) -> dict[str, int]:
        """Return the counts of a labelled name by label."""
        return {label: count for (known, label), count in self.items() if known == name}

    def items(self) -> list[tuple[tuple[str, str], int]]:
        """Return ((name, label), count) of all counts so far, in a fixed order."""
        with self._lock:
            counts = self._counts.copy()
        for name, source, attribute in self._followed:
            if amount := getattr(source, attribute):
                counts[name, ""] += amount
        return sorted(counts.items())

    def snapshot(self) -> dict[str, float]:
        """Return all counts, with a labelled one as `name.label`, and the gauges that were set."""
        counts = {f"{name}.{label}" if label else name: count for (name, label), count in self.items()}
        return {**counts, **self.gauges()}


@contextmanager
def silenced() -> Iterator[None]:
    """Write no log record below CRITICAL inside the block, in which parts run for another purpose than to serve."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def exported(counters: Counters, *, party: str, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve counters and gauges to Prometheus over HTTP while the block runs. Yields the port; 0 serves nothing.

    A counter is exported as `fedhlm_<name>_total{party=...}`, and a gauge that was set as `fedhlm_<name>{party=...}`.

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
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for name, meaning in COUNTERS.items():
            label = LABELS.get(name)
            family = CounterMetricFamily(f"fedhlm_{name}", meaning, labels=["party", label] if label else ["party"])
            if label:
                for value, count in self._counters.by_label(name).items():
                    family.add_metric([self._party, value], count)
            else:
                family.add_metric([self._party], self._counters[name])
            yield family
        for name, newest in self._counters.gauges().items():
            gauge = GaugeMetricFamily(f"fedhlm_{name}", GAUGES[name], labels=["party"])
            gauge.add_metric([self._party], newest)
            yield gauge


class OneLine(logging.Formatter):
    """Formats `time level party logger: message`, with line breaks escaped and secrets masked. A traceback follows."""

    def __init__(self, party: str, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(party)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
        self._party = party
        self._secrets = tuple(secret for secret in secrets if secret)

    def format(self, record: logging.LogRecord) -> str:
        record.party = self._party
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is the standard library's
        # Text from the bus may be part of a message. A line break in it must not look like another record, and a few
        # messages must not fill the disk.
        text = super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")
        return text if len(text) <= MESSAGE_MAX else f"{text[:MESSAGE_MAX]}... ({len(text)} characters)"


def configure_logging(
    level: str, party: str, *, secrets: Iterable[str] = (), stream: TextIO | None = None
) -> logging.Handler:
    """Send all records of `level` and above to `stream` (default: stderr). Replaces other handlers; returns its own."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(OneLine(party, secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    return handler


_warned: Final[set[tuple[str, str]]] = set()


def warn_once(logger: logging.Logger, key: str, message: str, *args: object) -> None:
    """Log at WARNING the first time for this logger and `key`, and at DEBUG afterwards.

    Keys may contain text from strangers, so only the first WARNED_MAX are stored. New keys after that log at DEBUG.
    """
    key = key[:KEY_MAX]
    known = (logger.name, key) in _warned
    if known or len(_warned) >= WARNED_MAX:
        logger.debug(message, *args)
    else:
        _warned.add((logger.name, key))
        logger.warning(message, *args)


def forget_warnings() -> None:
    """Make every `warn_once` warn again."""
    _warned.clear()
