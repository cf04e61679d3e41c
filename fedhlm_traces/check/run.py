"""Check a recording part by part: print what differs, and write the updated recording on request."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from cloud_verifier.wiring import LargeModel
from edge_agent.journal import AgentStart, unpack
from fedhlm.errors import ProtocolError, TraceError
from fedhlm.protocol.codec import decode, encode
from fedhlm.protocol.fields import MAX_CONTEXT, MAX_NOTES
from fedhlm.protocol.messages import Journal, Note
from fedhlm.protocol.roles import PARTS, ROLES, PartRole
from fedhlm_traces.check.agent import check_agent
from fedhlm_traces.check.cloud import born_of, check_cloud, from_bus
from fedhlm_traces.check.divergence import CheckOutcome, plain
from fedhlm_traces.check.edge import check_edge
from fedhlm_traces.check.journals import PartJournal, lives
from fedhlm_traces.check.models import large_model
from fedhlm_traces.file import Record, Writer, read
from fedhlm_traces.spelling import speller

SHOWN: Final = 3

Which = Literal[PartRole, "all"]


def _agent(life: PartJournal, _large: LargeModel | None) -> CheckOutcome:
    if not life.notes or life.notes[0].kind != "state":
        return check_agent(life)
    return check_agent(life, speller(unpack(life.notes[0].data, AgentStart).fingerprint.tokenizer))


def _edge(life: PartJournal, large: LargeModel | None) -> CheckOutcome:
    return check_edge(life) if large is None else check_edge(life, speller(large.fingerprint.tokenizer))


def _cloud(life: PartJournal, large: LargeModel | None) -> CheckOutcome:
    if large is None or life.number or not life.notes or life.notes[0].kind != "state":
        return check_cloud(life, None)
    born = born_of(life)
    if born.fingerprint != large.fingerprint:
        outcome = check_cloud(life, None)
        words = (
            f"its verdicts: they are of {born.fingerprint.model}, {large.fingerprint.model} is at hand (--cloud.model)"
        )
        outcome.skipped.append(words)
        return outcome
    return check_cloud(life, large.engine, speller(born.fingerprint.tokenizer))


CHECKS: Final[dict[str, Callable[[PartJournal, LargeModel | None], CheckOutcome]]] = {
    "agent": _agent,
    "edge": _edge,
    "cloud": _cloud,
}


def check_file(file: Path, which: Which = "all", update: Path | None = None, model: Path | None = None) -> int:
    """Replay a recording's journals and print what differs; return 1 if anything does.

    With `update` the recording is written again with today's decisions. `model` is the large model's folder; without
    it the shipped model is used if it is the recorded one.

    Raises:
        TraceError: no journal of that part in the recording, or a file that cannot be read or written.
    """
    trace = read(file)
    parts = PARTS if which == "all" else (which,)
    found = [life for life in lives(trace, trace.header.root) if life.part in parts]
    if trace.lost_bytes:
        print(f"{file}: the last {trace.lost_bytes} bytes were lost by an unclean end", file=sys.stderr)
    if not found and all(ROLES[part].verifies for part in parts):
        # Verdicts depend on the blocks alone, in any order of the sessions.
        large = large_model(model)
        eos_ids, context = (frozenset[int](), MAX_CONTEXT) if large is None else (large.eos_ids, large.context)
        found = [from_bus(read(file), parts[0], trace.header.root, eos_ids=eos_ids, context_max=context)]
    if not found:
        part = "any part" if which == "all" else f"a part of kind {which}"
        raise TraceError(f"{file} has no journal of {part}: record parts that run with telemetry.journal true")
    large = large_model(model) if any(not ROLES[life.part].drafts for life in found) else None
    outcomes = [(life, CHECKS[life.part](life, large)) for life in found]
    for life, outcome in outcomes:
        _tell(life, outcome)
    if update is not None:
        _rewrite(file, update, {(life.name, life.life): outcome.notes for life, outcome in outcomes})
    decisions = sum(o.decisions for _, o in outcomes)
    different = sum(bool(o.divergences) for _, o in outcomes)
    print(
        f"{decisions} decisions of {len(found)} parts: "
        + (f"{different} parts decide otherwise" if different else "all the same")
    )
    return 1 if different else 0


def _tell(life: PartJournal, outcome: CheckOutcome) -> None:
    result = "not all the same" if outcome.divergences else "all the same"
    print(f"{life.name}: {outcome.decisions} decisions, {result}")
    for words in outcome.skipped:
        print(f"  not compared: {words}")
    shown, more = outcome.divergences[:SHOWN], len(outcome.divergences) - SHOWN
    if shown:
        print(plain(shown))
    if more > 0:
        print(f"  and {more} more, which may follow from these")


def _rewrite(file: Path, out: Path, journals: dict[tuple[str, int], list[Note]]) -> None:
    """Write the recording with other journals, each spread over the messages that held it."""
    places = Counter((j.sender, j.life) for _, j in _with_journals(read(file)) if j is not None)
    done = Counter[tuple[str, int]]()
    trace = read(file)
    with Writer(out, trace.header) as writer:
        for record, journal in _with_journals(trace):
            key = ("", 0) if journal is None else (journal.sender, journal.life)
            if journal is None or key not in journals:
                writer.write(record)
                continue
            notes, start = journals[key], done[key]
            done[key] += 1
            first, end = (len(notes) * i // places[key] for i in (start, start + 1))
            for at in range(first, end, MAX_NOTES):
                part = msgspec.structs.replace(journal, number=at, notes=tuple(notes[at : min(end, at + MAX_NOTES)]))
                writer.write(msgspec.structs.replace(record, payload=encode(part)))


def _with_journals(records: Iterable[Record]) -> Iterator[tuple[Record, Journal | None]]:
    for record in records:
        journal = None
        if record.topic.endswith("/journal"):
            try:
                message = decode(record.payload)
            except ProtocolError:
                message = None
            journal = message if isinstance(message, Journal) else None
        yield record, journal
