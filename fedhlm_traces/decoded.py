"""Decode a record: its row of the topic table, its message, and a one-line summary.

The functions are pure. A payload that does not decode is not an error here: `Seen.error` holds the reason.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

from fedhlm.bus.interface import ProtocolVersion, publish_wire_bytes
from fedhlm.errors import ProtocolError
from fedhlm.protocol import messages, packing, topics
from fedhlm.protocol.messages import AnyMessage, Escalation, Fingerprint, RoutedEscalation, Verdict
from fedhlm.protocol.messages import RoutedVerdict as AnsweredItem
from fedhlm.protocol.topics import Topic
from fedhlm_traces.file import Header, Record

GIST_CHARS: Final = 160
ROSTER_SHOWN: Final = 4
_PATIENCE_S: Final = 1.0  # the length of the expiry does not change its size


class Seen(NamedTuple):
    """A decoded record.

    `topic` is None when the topic is not in our table. `message` is None when the payload was refused; `error` says
    why.
    """

    record: Record
    topic: Topic | None
    levels: dict[str, str]
    message: AnyMessage | None
    error: str

    @property
    def kind(self) -> str:
        """The message's type, or "foreign" or "refused" without a message."""
        if self.message is not None:
            return type(self.message).__name__
        return "foreign" if self.topic is None else "refused"

    @property
    def cluster(self) -> str:
        """The cluster in the topic, or ""."""
        return self.levels.get("cluster", "")

    @property
    def agent(self) -> str:
        """The agent in the topic, or ""."""
        return self.levels.get("agent", "")

    @property
    def agents(self) -> frozenset[str]:
        """All agents that sent the message, receive it, or appear in it."""
        found = {self.agent, self.message.sender if self.message is not None else ""}
        if isinstance(self.message, messages.EscalationBatch | messages.VerdictBatch):
            found |= {item.agent for item in self.message.items}
        return frozenset(found - {""})


@lru_cache(maxsize=4_096)
def _lookup(name: str, root: str) -> tuple[Topic, dict[str, str]] | None:
    return topics.lookup(name, root)


def look(record: Record, root: str) -> Seen:
    """Decode a record as a part would: check its topic, its payload and, on an agent's topic, the sender."""
    found = _lookup(record.topic, root)
    if found is None:
        return Seen(record, None, {}, None, f"not a topic of {root}")
    topic, levels = found
    try:
        message = topics.decode_for(topic, record.payload)
        topics.check_sender(record.topic, topic, levels, message)
    except ProtocolError as exc:
        return Seen(record, topic, levels, None, str(exc))
    return Seen(record, topic, levels, message, "")


def wire_bytes(seen: Seen, protocol: ProtocolVersion = "5") -> int:
    """Size in bytes of the PUBLISH packet as its sender sent it.

    Topics of our table have the QoS of their row, whatever QoS the recorder subscribed with. Of our messages only
    escalations carry an expiry.
    """
    record, ours = seen.record, seen.topic is not None
    qos = seen.topic.qos if seen.topic is not None else record.qos
    expiry_s = record.properties.get("expiry_s")
    if ours and expiry_s is None and seen.topic is topics.ESCALATE:
        expiry_s = _PATIENCE_S
    content_type = record.properties.get("content_type")
    return publish_wire_bytes(
        record.topic,
        len(record.payload),
        qos=qos,
        protocol=protocol,
        expiry_s=expiry_s,
        content_type=content_type if isinstance(content_type, str) else None,
    )


def protocol_of(records: Iterable[Record], header: Header) -> ProtocolVersion:
    """Return the MQTT version of a recording: the header's fact "protocol", or what its first escalation shows.

    Under MQTT 5 an escalation carries an expiry. Only recordings of a broker (the source is a URL) keep such
    properties.
    """
    known = header.facts.get("protocol")
    if known in ("5", "3.1.1"):
        return cast(ProtocolVersion, known)
    if "://" in header.source:
        for record in records:
            found = _lookup(record.topic, header.root)
            if found is not None and found[0] is topics.ESCALATE:
                return "5" if "expiry_s" in record.properties else "3.1.1"
    return "5"


class Vocabularies:
    """Vocabulary sizes by agent, learnt from the header's fingerprints and from later messages."""

    def __init__(self, header: Header) -> None:
        self.fingerprints: dict[str, Fingerprint] = dict(header.fingerprints)

    def learn(self, seen: Seen) -> None:
        """Remember the fingerprints that a message carries."""
        match seen.message:
            case messages.Presence(sender=sender, fingerprint=Fingerprint() as fingerprint):
                self.fingerprints[sender] = fingerprint
            case Escalation(prime=messages.Prime() as prime) if seen.agent:
                self.fingerprints[seen.agent] = prime.fingerprint
            case messages.EscalationBatch(items=items):
                for item in items:
                    if item.escalation.prime is not None:
                        self.fingerprints[item.agent] = item.escalation.prime.fingerprint

    def of(self, agent: str) -> int | None:
        """An agent's vocabulary size, or None while it is unknown."""
        fingerprint = self.fingerprints.get(agent)
        if fingerprint is None and len({f.vocab_size for f in self.fingerprints.values()}) == 1:
            fingerprint = next(iter(self.fingerprints.values()))  # all agents share one vocabulary
        return None if fingerprint is None else fingerprint.vocab_size


def unpacked_ids(data: bytes, vocab_size: int | None) -> list[int] | None:
    """Unpack the token ids of a message; None if the vocabulary is unknown or does not fit."""
    if vocab_size is None:
        return None
    try:
        return packing.unpack_ids(data, vocab_size)
    except ProtocolError:
        return None


def gist(seen: Seen, vocab_size: int | None = None) -> str:
    """Summarise a message on one line of at most GIST_CHARS characters, without raw bytes."""
    if seen.message is None:
        return _short(seen.error)
    say = GISTS.get(type(seen.message))
    return seen.kind if say is None else _short(say(seen.message, vocab_size))


def _short(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= GIST_CHARS else line[: GIST_CHARS - 1] + "…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ids(data: bytes, vocab_size: int | None) -> str:
    ids = unpacked_ids(data, vocab_size)
    return _count(len(data), "byte") + " of ids" if ids is None else _count(len(ids), "id")


def _presence(m: messages.Presence, _: int | None) -> str:
    model = "" if m.fingerprint is None else f", model {m.fingerprint.model}"
    above = "" if m.upstream is None else f", cloud has {m.upstream.model}"
    return f"{m.role} {m.sender} {'online' if m.online else 'offline'}, {m.software}{model}{above}"


def _prompt(m: messages.Prompt, _: int | None) -> str:
    asked = "" if m.preset is None else f", preset {m.preset}"
    return f"request {m.request}: at most {_count(m.max_tokens, 'token')}{asked}, text {m.text[:60]!r}"


def _output(m: messages.Output, _: int | None) -> str:
    sources = {s: m.sources.count(s) for s in dict.fromkeys(m.sources)}
    by = ", ".join(f"{n} {s}" for s, n in sources.items())
    ended = "" if m.finish is None else f", ended: {m.finish}{f' ({m.error})' if m.error else ''}"
    settled = f" ({by})" if by else ""
    return f"request {m.request} from {m.position}: {_count(len(m.ids), 'id')}{settled} {m.text[:60]!r}{ended}"


def _escalation(m: Escalation, vocab_size: int | None) -> str:
    extras = [
        f"{m.fixed} fixed" if m.fixed else "",
        f"extend {m.extend}" if m.extend else "",
        "" if m.prime is None else f"prime of {_ids(m.prime.context, vocab_size)}",
        f"laws {len(m.laws)} B" if m.laws else "",
        "branches" if m.branches else "",
        f"{m.drafts} drafts of the cloud's own" if m.drafts else "",
    ]
    block = f"session {m.session} epoch {m.epoch} base {m.base}"
    return ", ".join([f"{block}: {_ids(m.ids, vocab_size)}", *filter(None, extras)])


def _verdict(m: Verdict, vocab_size: int | None) -> str:
    block = f"session {m.session} epoch {m.epoch} base {m.base}"
    if m.status == "working":
        return f"{block}: working, {m.fed} ids of the prime read"
    if m.status != "settled":
        return f"{block}: {m.status}{f', {m.reason}' if m.reason else ''}"
    return f"{block}: {m.accepted} accepted, then {_ids(m.ids, vocab_size)}, by {m.source}"


def _items(items: tuple[RoutedEscalation, ...] | tuple[AnsweredItem, ...], noun: str) -> str:
    agents = ", ".join(dict.fromkeys(item.agent for item in items))
    return f"{_count(len(items), noun)} of {agents}" if items else f"no {noun}"


def _doubts(m: messages.UncertainTokens, _: int | None) -> str:
    doubts = ", ".join(f"{i.position}: u={number(i.uncertainty)}" for i in m.items)
    return f"session {m.session}, {_count(len(m.items), 'doubt')}: {doubts}"


def _contribution(m: messages.Contribution | messages.Learned, _: int | None) -> str:
    threshold = "".join(
        f", tau {number(t.threshold)} of {t.count} tokens for pair {pair}" for pair, t in sorted(m.thresholds.items())
    )
    curves = "" if not m.curves else f", curves of {', '.join(sorted(m.curves))}"
    return f"round {m.round} of {_count(m.members, 'member')}{threshold}{curves}"


def _roster(m: messages.Roster, _: int | None) -> str:
    shown = ", ".join(f"{row.name} of {row.weight:.0f} tokens" for row in m.members[:ROSTER_SHOWN])
    return f"{_count(len(m.members) + m.left_out, 'member')}{': ' if shown else ''}{shown}"


def _journal(m: messages.Journal, _: int | None) -> str:
    kinds: dict[str, int] = {}
    for note in m.notes:
        kinds[note.kind] = kinds.get(note.kind, 0) + 1
    told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return f"life {m.life}, {_count(len(m.notes), 'note')} from number {m.number}: {told}"


GISTS: Final[dict[type[Any], Callable[[Any, int | None], str]]] = {
    messages.Presence: _presence,
    messages.Prompt: _prompt,
    messages.Output: _output,
    Escalation: _escalation,
    Verdict: _verdict,
    messages.EscalationBatch: lambda m, _: _items(m.items, "escalation"),
    messages.VerdictBatch: lambda m, _: _items(m.items, "verdict"),
    messages.UncertainTokens: _doubts,
    messages.VerifiedTokens: lambda m, _: _count(len(m.items), "verified token"),
    messages.Contribution: _contribution,
    messages.Learned: _contribution,
    messages.Profile: lambda m, _: f"of {m.agent}: {_count(len(m.uncertainties), 'key')} of {m.dims} bytes",
    messages.Assignment: lambda m, _: f"to cluster {m.cluster}",
    messages.Journal: _journal,
    messages.Cancel: lambda m, _: f"request {m.request} of {m.sender} is cancelled",
    messages.Forget: lambda m, _: f"order {m.order} of {m.sender}",
    messages.Roster: _roster,
    messages.MetricsReport: lambda m, _: f"metrics of {m.sender}: {_count(len(m.values), 'figure')}",
}


def number(value: float) -> str:
    """Format a number in 0..1 for a sentence: .41, 1, 0."""
    text = f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return text[1:] if text.startswith("0.") else text
