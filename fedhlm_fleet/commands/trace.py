"""`fedhlm trace`: show, count, cut, merge, export and import recordings."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, Literal

from cyclopts import App, Parameter

from fedhlm.errors import TraceError
from fedhlm_fleet.commands.common import Positive, Seconds
from fedhlm_fleet.commands.traces import Flag, Many, Moment

if TYPE_CHECKING:
    from fedhlm_traces.edit import Selection
    from fedhlm_traces.file import Header, Record, Trace

app = App(name="trace", help="Show, count, cut, merge, export and import recordings.")

From = Annotated[Moment, Parameter(name="--from", show_default=False)]
Hyphen = Annotated[Path, Parameter(allow_leading_hyphen=True)]

STDIN: Final = "-"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PartFlags:
    """The flags that choose a part of a recording."""

    topics: Many = ()
    """Subscription filters, with or without the root; by default all topics."""

    from_: From = 0.0
    """Second of the recording at which to begin."""

    until: Seconds | None = None
    """Second of the recording before which to end."""

    agent: str = ""
    """Only messages that this agent sent or received, or that mention it."""

    def checked(self) -> "Selection":
        """Return what is to be selected.

        Raises:
            TraceError: a filter is malformed, or the part ends before it begins.
        """
        from fedhlm_traces.edit import Selection

        until_s = float("inf") if self.until is None else self.until
        return Selection(self.from_, until_s, self.topics, self.agent).checked()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReadFlags(PartFlags):
    """The flags that choose a part of a recording and the topics' first levels."""

    root: str | None = None
    """First levels of the topics, if they differ from those that the recording names."""


WHOLE: Final = PartFlags()
AS_RECORDED: Final = ReadFlags()


@app.command
def show(
    file: Path,
    *,
    part: ReadFlags = AS_RECORDED,
    request: str = "",
    story: Flag = False,
    tokenizer: Path | None = None,
    limit: Positive | None = None,
) -> int:
    """Print a line for each message or, with --story, for each generated token.

    Parameters
    ----------
    file
        Recording; the further files of a rotated one are found automatically.
    request
        Only messages that belong to this request.
    story
        For each token, print who drafted it, its doubt, who settled it and after what time.
    tokenizer
        Folder with the tokenizer.json of the recorded models; by default the shipped one, if the models use it.
    limit
        Maximum number of messages, or with --story of requests, to print.
    """
    from fedhlm_fleet.commands.trace_show import belonging, messages_told, stories_told

    trace, header, records = _selected(file, part)
    told = (
        stories_told(records, header, part.agent, request, tokenizer)
        if story
        else messages_told(records, header, belonging(trace, header, request))
    )
    for lines in itertools.islice(told, limit):
        for line in lines:
            _say(line)
    _note_lost(trace)
    return 0


@app.command
def stats(
    file: Path,
    *,
    part: ReadFlags = AS_RECORDED,
    json: Flag = False,
) -> int:
    """Count messages and bytes by topic, cluster and agent, and print the cost of a generated token.

    Parameters
    ----------
    file
        Recording; the further files of a rotated one are found automatically.
    json
        Print one JSON object instead of text.
    """
    import msgspec

    from fedhlm_traces.decoded import protocol_of
    from fedhlm_traces.stats import statistics
    from fedhlm_traces.stats_text import lines_of

    trace, header, records = _selected(file, part)
    found = statistics(records, header, protocol=protocol_of(trace, header))
    found.lost_bytes = trace.lost_bytes
    if json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        for line in lines_of(found):
            _say(line)
    _note_lost(trace)
    return 0


@app.command
def cut(
    file: Path,
    out: Path,
    *,
    part: PartFlags = WHOLE,
) -> int:
    """Write a part of a recording to a new file; the times stay as they are.

    Parameters
    ----------
    file
        Recording.
    out
        File to write; it must not exist yet.
    """
    from fedhlm_traces import edit
    from fedhlm_traces.file import read

    trace = read(file)
    count = edit.cut(trace, out, part.checked())
    print(f"{out}: {count:,} messages")
    _note_lost(trace)
    return 0


@app.command
def merge(*files: Path) -> int:
    """Merge recordings that have the same root into one, in order of time: A B ... OUT.

    Parameters
    ----------
    files
        Recordings and, last, the file to write, which must not exist yet.
    """
    from fedhlm_traces import edit

    if len(files) < 2:
        raise TraceError(
            f"files of trace merge must be at least one recording and the file to write (got {len(files)})"
        )
    count, recordings = edit.merge(files[:-1], files[-1])
    print(f"{files[-1]}: {count:,} messages of {len(recordings)} recordings")
    for trace in recordings:
        _note_lost(trace)
    return 0


@app.command
def export(
    file: Path,
    *,
    format: Literal["jsonl", "csv"] = "jsonl",  # noqa: A002 - the flag's name
    out: Path | None = None,
    part: ReadFlags = AS_RECORDED,
) -> int:
    """Export a recording as JSON lines with all fields of all messages, or as CSV with one row per message.

    Parameters
    ----------
    file
        Recording.
    format
        jsonl keeps everything; csv has the fields that fit in a table.
    out
        File to write; it must not exist yet. By default standard output.
    """
    from fedhlm_traces.decoded import protocol_of
    from fedhlm_traces.export import FORMATS

    trace, header, records = _selected(file, part)
    lines = FORMATS[format](records, header, protocol_of(trace, header))
    if out is None:
        sys.stdout.writelines(lines)
    else:
        try:
            with out.open("x", encoding="utf-8", newline="") as written:
                written.writelines(lines)
        except FileExistsError as exc:
            raise TraceError(f"{out} must be a new file (it exists already)") from exc
        except OSError as exc:
            raise TraceError(f"{out} must be a writable file (got {exc.strerror})") from exc
    _note_lost(trace)
    return 0


@app.command(name="import")
def import_(plain: Hyphen, out: Path, *, root: str | None = None, lossy: Flag = False) -> int:
    """Import the output of mosquitto_sub -F '%j' or %J, or the lossless format of docs/traces.md, as a recording.

    Parameters
    ----------
    plain
        File with one line of JSON per message; - for standard input.
    out
        File to write; it must not exist yet.
    root
        First levels of the topics; by default derived from the messages.
    lossy
        Keep the remains of payloads that mosquitto_sub cut or rewrote.
    """
    from fedhlm_traces.edit import save
    from fedhlm_traces.mosquitto import LineTally, lines_of, recording, records

    tally = LineTally()
    with _opened(plain) as file:
        header, found = recording(records(lines_of(file), tally, lossy=lossy), root)
        count = save(out, header, found)
    print(f"{out}: {count:,} messages, root {header.root}")
    if tally.lost:
        print(f"fedhlm: {tally}", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _opened(plain: Path) -> Iterator[BinaryIO]:
    if str(plain) == STDIN:
        yield sys.stdin.buffer
        return
    try:
        file = plain.open("rb")
    except OSError as exc:
        raise TraceError(f"{plain} must be a readable file ({exc.strerror})") from exc
    with file:
        yield file


def _selected(file: Path, part: ReadFlags) -> "tuple[Trace, Header, Iterator[Record]]":
    from msgspec.structs import replace

    from fedhlm.config import load
    from fedhlm_traces.file import read

    if part.root is not None:
        load(environ={}, flags={"broker.root": part.root})  # with its rules
    trace = read(file)
    header = trace.header if part.root is None else replace(trace.header, root=part.root)
    return trace, header, part.checked().of(trace, header.root)


def _note_lost(trace: "Trace") -> None:
    """Print how much of a recording was lost because it did not end cleanly."""
    if trace.lost_bytes:
        what = f"{trace.paths[0]}: {trace.lost_bytes:,} bytes hold no whole frame, their messages are lost"
        print(f"fedhlm: {what}", file=sys.stderr)


def _say(line: str) -> None:
    """Print a line without control characters, so that names and texts from others cannot control the terminal."""
    print("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line))
