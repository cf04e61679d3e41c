"""Cut a part out of a recording, and merge several recordings in order of time.

The functions are pure over streams of records, except `save`, which writes a new file or none. A cut keeps the times
of its records, so the cuts of one recording merge to it again.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from fedhlm.bus.interface import check_filter, share_of, topic_matches
from fedhlm.errors import TraceError
from fedhlm.version import __version__
from fedhlm_traces.decoded import look
from fedhlm_traces.file import Header, Record, Trace, Writer, part_path, read

_EVER: Final = float("inf")


class Selection(NamedTuple):
    """Selects records by time, topic and agent.

    `from_s` is included and `until_s` excluded, in seconds of the recording. A record must match one of the filters.
    `agent` must have sent the message, receive it, or appear in it. Empty filters and an empty agent select
    everything.
    """

    from_s: float = 0.0
    until_s: float = _EVER
    filters: tuple[str, ...] = ()
    agent: str = ""

    def checked(self) -> "Selection":
        """Return the selection itself if it is valid.

        Raises:
            TraceError: a malformed filter, or no time between the ends.
        """
        if self.until_s <= self.from_s:
            raise TraceError(f"--until must be later than --from {self.from_s:g} (got {self.until_s:g})")
        for pattern in self.filters:
            try:
                check_filter(pattern)
            except ValueError as exc:
                raise TraceError(f"--topics: {exc}") from exc
        return self

    def of(self, records: Iterable[Record], root: str) -> Iterator[Record]:
        """Yield the selected records. A filter may omit the root: `c/#` for `fedhlm/1/c/#`."""
        plain = [share_of(pattern)[1] for pattern in self.filters]
        levels = [levels.split("/") for pattern in plain for levels in (pattern, f"{root}/{pattern}")]
        for record in records:
            if not self.from_s <= record.at_s < self.until_s:
                continue
            if levels and not any(topic_matches(wanted, record.topic) for wanted in levels):
                continue
            if self.agent and self.agent not in look(record, root).agents:
                continue
            yield record


def merged_header(headers: Sequence[Header]) -> Header:
    """Join headers: the earliest time, and all filters, sources and fingerprints.

    A fact that differs keeps all its values.

    Raises:
        TraceError: formats, schemas or roots differ, or there is no header.
    """
    if not headers:
        raise TraceError("recordings to merge must be at least 1 (got none)")
    first = headers[0]
    for name in ("format", "schema", "root"):
        values = list(dict.fromkeys(getattr(header, name) for header in headers))
        if len(values) > 1:
            raise TraceError(f"{name} must be the same in all recordings (got {values[0]!r} and {values[1]!r})")
    facts: list[dict[str, Any]] = []
    for header in headers:
        if header.facts not in facts:
            facts.append(header.facts)
    return replace(
        first,
        software=f"fedhlm {__version__}",
        created_ms=min(header.created_ms for header in headers),
        source=", ".join(dict.fromkeys(header.source for header in headers)),
        filters=tuple(dict.fromkeys(pattern for header in headers for pattern in header.filters)),
        fingerprints={name: print_ for header in reversed(headers) for name, print_ in header.fingerprints.items()},
        facts=facts[0] if len(facts) == 1 else {"merged": facts},
        part=0,
    )


def merged(recordings: Sequence[tuple[Header, Iterable[Record]]]) -> Iterator[Record]:
    """Merge records in order of wall time, which is a recording's start plus the time of its record.

    Records of the same moment keep the order of the recordings. Each recording must be ordered by time.
    """
    created_ms = min((header.created_ms for header, _ in recordings), default=0)

    def shifted(header: Header, records: Iterable[Record]) -> Iterator[Record]:
        later_s = (header.created_ms - created_ms) / 1000.0
        return (replace(record, at_s=record.at_s + later_s) for record in records)

    return heapq.merge(*(shifted(header, records) for header, records in recordings), key=lambda record: record.at_s)


def save(path: Path, header: Header, records: Iterable[Record]) -> int:
    """Write a new recording and return its number of records.

    After an error no file is left.

    Raises:
        TraceError: the file exists or cannot be written, or what `records` raises.
    """
    count = 0
    with Writer(path, replace(header, part=0), flush_s=_EVER, sync_s=_EVER) as writer:
        try:
            for record in records:
                writer.write(record)
                count += 1
        except BaseException:
            part_path(path, 0).unlink(missing_ok=True)
            raise
    return count


def cut(trace: Trace, out: Path, selection: Selection) -> int:
    """Write the selected records and return their number.

    Raises:
        TraceError: a selection that cannot be, or a file that cannot be written.
    """
    return save(out, trace.header, selection.checked().of(trace, trace.header.root))


def merge(paths: Sequence[Path], out: Path) -> tuple[int, list[Trace]]:
    """Write several recordings as one; return the number of records and the recordings read.

    Raises:
        TraceError: recordings that do not go together, or a file that cannot be read or written.
    """
    recordings = [read(path) for path in paths]
    header = merged_header([trace.header for trace in recordings])
    count = save(out, header, merged([(trace.header, trace) for trace in recordings]))
    return count, recordings
