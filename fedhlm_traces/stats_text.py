"""Statistics of a recording as text: totals, then tables by topic, by cluster and by agent."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from fedhlm_traces.stats import PartyTraffic, Row, Statistics

_NONE: Final = "-"


def lines_of(found: Statistics) -> Iterator[str]:
    """All lines, for a terminal."""
    total = found.total
    yield from _facts(found)
    yield ""
    yield from _aligned(
        ("topic", "messages", "bytes", "payload", "share", "bytes/token"),
        [
            *(_topic(name, row, total) for name, row in found.topics.items()),
            _topic("total", total, total),
        ],
    )
    for title, parties in (("cluster", found.clusters), ("agent", found.agents)):
        if parties:
            yield ""
            yield from _parties(title, parties)


def _facts(found: Statistics) -> Iterator[str]:
    total = found.total
    by = ", ".join(f"{source} {count:,}" for source, count in sorted(total.tokens_by_source.items()))
    rate = "" if found.messages_per_s is None else f", {found.messages_per_s:,.1f} messages/s"
    facts = {
        "duration": f"{found.duration_s:,.2f} s{rate}",
        "requests ended": f"{found.requests:,}",
        "tokens generated": f"{total.tokens:,}{f' ({by})' if by else ''}",
        "escalations": f"{total.escalations:,}, {_number(found.uplink_messages_per_token, 3)} a token",
        "uplink bytes": f"{total.uplink_bytes:,}, {_number(found.uplink_bytes_per_token, 1)} a token"
        f" (the agents' own figure: {found.uplink_bytes_reported:,})",
        "all bytes": f"{total.wire_bytes:,}, {_number(found.bytes_per_token, 1)} a token",
        "verdict latency": f"p50 {_number(total.verdict_p50_ms, 1)} ms, p99 {_number(total.verdict_p99_ms, 1)} ms"
        f" of {total.verdicts:,}",
        "refused payloads": f"{total.refused:,}",
        "duplicates": f"{total.duplicates:,}",
    }
    width = max(map(len, facts))
    return (f"{label:<{width}}  {fact}" for label, fact in facts.items())


def _topic(name: str, row: Row, total: Row) -> list[str]:
    tokens = total.tokens if isinstance(total, PartyTraffic) else 0
    share = row.wire_bytes / total.wire_bytes if total.wire_bytes else 0.0
    return [
        name,
        f"{row.messages:,}",
        f"{row.wire_bytes:,}",
        f"{row.payload_bytes:,}",
        f"{share:.1%}",
        _number(row.wire_bytes / tokens if tokens else None, 1),
    ]


def _parties(title: str, parties: Mapping[str, PartyTraffic]) -> Iterator[str]:
    return _aligned(
        (title, "messages", "bytes", "tokens", "escalations", "uplink bytes/token", "verdict p50 ms", "p99 ms"),
        [
            [
                name,
                f"{party.messages:,}",
                f"{party.wire_bytes:,}",
                f"{party.tokens:,}",
                f"{party.escalations:,}",
                _number(party.uplink_bytes_per_token, 1),
                _number(party.verdict_p50_ms, 1),
                _number(party.verdict_p99_ms, 1),
            ]
            for name, party in parties.items()
        ],
    )


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns two spaces apart, the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
