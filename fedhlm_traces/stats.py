"""Count a recording's messages and bytes, by topic, cluster and agent, and per generated token.

The module is pure and its memory bounded. Bytes are those of PUBLISH packets as sent. A duplicate adds to the
traffic, but its tokens, escalations and uplink bytes count once, as in the agents' own figures.
"""

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Final

import msgspec

from fedhlm.bus.interface import ProtocolVersion
from fedhlm.protocol.messages import Escalation, Output, Verdict
from fedhlm_traces.decoded import Seen, look, wire_bytes
from fedhlm_traces.file import Header, Record

FOREIGN: Final = "(other topics)"
REMEMBERED: Final = 65_536
_GROWTH: Final = 1.01


class Row(msgspec.Struct, kw_only=True):
    """Traffic of one kind: `wire_bytes` include MQTT framing, `payload_bytes` do not."""

    messages: int = 0
    wire_bytes: int = 0
    payload_bytes: int = 0
    refused: int = 0
    duplicates: int = 0

    def count(self, wire: int, payload: int, *, refused: bool, duplicate: bool) -> None:
        """Count one message."""
        self.messages += 1
        self.wire_bytes += wire
        self.payload_bytes += payload
        self.refused += refused
        self.duplicates += duplicate


class Latencies:
    """Quantiles of positive times, exact to one percent, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets: Counter[int] = Counter()

    def see(self, seconds: float) -> None:
        """Add a time. Recordings resolve no less than a microsecond."""
        self.count += 1
        self._buckets[round(math.log(max(seconds, 1e-6), _GROWTH))] += 1

    def quantile_ms(self, share: float) -> float | None:
        """The smallest time such that at least this share of the times is not larger; None without any."""
        left = max(1, math.ceil(share * self.count))
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return 1000.0 * _GROWTH**bucket
        return None


class PartyTraffic(Row, kw_only=True):
    """Traffic of a cluster or an agent: `uplink_bytes` of its escalations, `tokens` of its outputs.

    `verdicts` counts the answers to recorded escalations, with p50 and p99; both are None without any.
    """

    tokens: int = 0
    tokens_by_source: dict[str, int] = {}
    escalations: int = 0
    uplink_bytes: int = 0
    verdicts: int = 0
    verdict_p50_ms: float | None = None
    verdict_p99_ms: float | None = None

    @property
    def uplink_bytes_per_token(self) -> float | None:
        """None if no token was generated."""
        return self.uplink_bytes / self.tokens if self.tokens else None


class Statistics(msgspec.Struct, kw_only=True):
    """All figures. `total` sums the topics, and `requests` counts the ended ones.

    `uplink_bytes_reported` is the agents' own figure, from their last outputs. `bytes_per_token` covers all traffic,
    `uplink_*` escalations only. Figures per token are None if no token was generated.
    """

    duration_s: float
    messages_per_s: float | None
    total: PartyTraffic
    topics: dict[str, Row]
    clusters: dict[str, PartyTraffic]
    agents: dict[str, PartyTraffic]
    requests: int
    bytes_per_token: float | None
    uplink_bytes_per_token: float | None
    uplink_messages_per_token: float | None
    uplink_bytes_reported: int
    lost_bytes: int = 0


class _Recent:
    """The last REMEMBERED keys."""

    def __init__(self) -> None:
        self._known: set[Hashable] = set()
        self._order: deque[Hashable] = deque()

    def again(self, key: Hashable) -> bool:
        """Whether the key was seen lately; remember it."""
        if key in self._known:
            return True
        self._known.add(key)
        self._order.append(key)
        if len(self._order) > REMEMBERED:
            self._known.discard(self._order.popleft())
        return False


class Accounting:
    """Feed records in order to `add`; call `result` at any time. `protocol` is the MQTT version."""

    def __init__(self, root: str, protocol: ProtocolVersion = "5") -> None:
        self._root, self._protocol = root, protocol
        self._topics: dict[str, Row] = {}
        self._total = PartyTraffic(tokens_by_source={})
        self._clusters: dict[str, PartyTraffic] = {}
        self._agents: dict[str, PartyTraffic] = {}
        self._latencies: dict[int, Latencies] = {}
        self._recent = _Recent()
        self._asked: OrderedDict[tuple[str, int, int, int], float] = OrderedDict()
        self._requests = self._reported = 0
        self._first_s: float | None = None
        self._last_s = 0.0

    def add(self, record: Record) -> None:
        """Count one record."""
        self._first_s = record.at_s if self._first_s is None else self._first_s
        self._last_s = max(self._last_s, record.at_s)
        seen = look(record, self._root)
        wire = wire_bytes(seen, self._protocol)
        refused, duplicate = bool(seen.topic is not None and seen.error), self._duplicate(seen)
        pattern = FOREIGN if seen.topic is None else seen.topic.pattern
        parties = self._parties(seen)
        for row in (self._topics.setdefault(pattern, Row()), *parties):
            row.count(wire, len(record.payload), refused=refused, duplicate=duplicate)
        if not duplicate:
            self._count(seen, wire, parties)

    def _duplicate(self, seen: Seen) -> bool:
        """Whether the message is a duplicate; retained state is exempt, as every connection brings it again."""
        message, record = seen.message, seen.record
        if message is None or seen.topic is None or seen.topic.retain:
            return False
        return self._recent.again((record.topic, message.sender, message.sequence, message.sent_ms))

    def _parties(self, seen: Seen) -> list[PartyTraffic]:
        found = [self._total]
        for name, parties in ((seen.cluster, self._clusters), (seen.agent, self._agents)):
            if name:
                found.append(parties.setdefault(name, PartyTraffic(tokens_by_source={})))
        return found

    def _count(self, seen: Seen, wire: int, parties: list[PartyTraffic]) -> None:
        match seen.message:
            case Output() as output:
                self._requests += output.finish is not None
                reported = output.statistics.get("uplink_bytes", 0.0)
                self._reported += round(reported) if math.isfinite(reported) else 0
                for party in parties:
                    party.tokens += len(output.ids)
                    for source in output.sources:
                        party.tokens_by_source[source] = party.tokens_by_source.get(source, 0) + 1
            case Escalation() as block:
                self._asked.setdefault((seen.agent, block.session, block.epoch, block.base), seen.record.at_s)
                if len(self._asked) > REMEMBERED:
                    self._asked.popitem(last=False)
                for party in parties:
                    party.escalations += 1
                    party.uplink_bytes += wire
            case Verdict() as verdict if verdict.status != "working":
                asked_s = self._asked.pop((seen.agent, verdict.session, verdict.epoch, verdict.base), None)
                if asked_s is not None:
                    for party in parties:
                        party.verdicts += 1
                        self._latencies.setdefault(id(party), Latencies()).see(seen.record.at_s - asked_s)

    def result(self) -> Statistics:
        """The figures so far."""
        for party in (self._total, *self._clusters.values(), *self._agents.values()):
            latencies = self._latencies.get(id(party))
            if latencies is not None:
                party.verdict_p50_ms, party.verdict_p99_ms = latencies.quantile_ms(0.5), latencies.quantile_ms(0.99)
        total, duration_s = self._total, self._last_s - (self._first_s or 0.0)
        return Statistics(
            duration_s=duration_s,
            messages_per_s=total.messages / duration_s if duration_s else None,
            total=total,
            topics=dict(sorted(self._topics.items(), key=lambda item: -item[1].wire_bytes)),
            clusters=dict(sorted(self._clusters.items())),
            agents=dict(sorted(self._agents.items())),
            requests=self._requests,
            bytes_per_token=total.wire_bytes / total.tokens if total.tokens else None,
            uplink_bytes_per_token=total.uplink_bytes_per_token,
            uplink_messages_per_token=total.escalations / total.tokens if total.tokens else None,
            uplink_bytes_reported=self._reported,
        )


def statistics(records: Iterable[Record], header: Header, *, protocol: ProtocolVersion = "5") -> Statistics:
    """Count a recording; see `fedhlm_traces.decoded.protocol_of` for `protocol`."""
    accounting = Accounting(header.root, protocol)
    for record in records:
        accounting.add(record)
    return accounting.result()
