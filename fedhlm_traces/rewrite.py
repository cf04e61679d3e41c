"""Rewrite a record before replay: rename clusters and agents, and update the sending time.

The functions are pure. Only topics and messages of our table change; anything that does not decode stays as it is.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from fedhlm.errors import ProtocolError, TraceError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.fields import Name
from fedhlm.protocol.messages import AnyMessage, Assignment, EscalationBatch, Message, Profile, Roster, VerdictBatch
from fedhlm.protocol.roles import EDGE_PREFIX, cluster_of, edge_name, traits_of
from fedhlm.protocol.topics import Topic
from fedhlm_traces.file import Record

_EXPECTED: Final = "cluster=OLD:NEW or agent=OLD:NEW"
MAX_NAME: Final = 64
_M = TypeVar("_M", bound=Message)


class Renames(NamedTuple):
    """New names by old names, applied at once, so two parties can swap names."""

    cluster: Mapping[str, str] = {}
    agent: Mapping[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self.cluster or self.agent)


def parse_renames(words: tuple[str, ...]) -> Renames:
    """Parse `cluster=home:barn`, `agent=porch:attic` and so on.

    Raises:
        TraceError: another form, what is no name, an old name twice, or two parties that would become one.
    """
    renames = Renames({}, {})
    for word in words:
        level, _, pair = word.partition("=")
        old, _, new = pair.partition(":")
        if level not in Renames._fields:
            raise TraceError(f"rename must be {_EXPECTED} (got {word!r})")
        for name in (old, new):
            try:
                msgspec.convert(name, Name)
            except msgspec.ValidationError as exc:
                wanted = "1..64 letters, digits, '.', '_' or '-', first a letter or digit"
                raise TraceError(f"name in rename {word!r} must be {wanted} (got {name!r})") from exc
        table: Any = getattr(renames, level)
        if level == "cluster" and len(f"{EDGE_PREFIX}{new}") > MAX_NAME:
            raise TraceError(
                f"rename {word!r}: {new!r} is too long: its edge's name would have more than {MAX_NAME} characters"
            )
        if old in table:
            raise TraceError(f"rename {word!r}: {level} {old!r} has a new name already, {table[old]!r}")
        if new in table.values():
            raise TraceError(f"rename {word!r}: {new!r} is another {level}'s new name already")
        table[old] = new
    return renames


def renamed(record: Record, renames: Renames, *, root: str = topics.DEFAULT_ROOT) -> Record:
    """Rename a record's parties in its topic and in payloads that carry names.

    A sender is renamed if the topic or the message shows its role. Notes inside journals keep the old names.
    """
    found = topics.lookup(record.topic, root)
    if found is None:
        return record
    row, levels = found
    tables = renames._asdict()  # none for clients, which keep their names
    new = {
        level: _of_member(name, renames) if level == "member" else tables.get(level, {}).get(name, name)
        for level, name in levels.items()
    }
    topic = row.name(root, **new)
    try:
        message = topics.decode_for(row, record.payload)
    except ProtocolError:
        return replace(record, topic=topic)
    changed = _rename_inside(_rename_sender(message, row, levels, renames), row, renames)
    # An unchanged message keeps its exact bytes.
    return replace(record, topic=topic, payload=record.payload if changed == message else encode(changed))


def rebased(record: Record, now_ms: int, *, root: str = topics.DEFAULT_ROOT) -> Record:
    """Set `sent_ms` to `now_ms`; messages in a batch keep their distance to it.

    Deadlines are durations (`patience_ms`, MQTT's expiry), so they start again without any change.
    """
    found = topics.lookup(record.topic, root)
    if found is None:
        return record
    try:
        message = topics.decode_for(found[0], record.payload)
    except ProtocolError:
        return record
    return replace(record, payload=encode(_shift(message, now_ms - message.sent_ms)))


def _rename_sender(message: AnyMessage, row: Topic, levels: Mapping[str, str], renames: Renames) -> AnyMessage:
    publishers = traits_of(row.publishers)
    if any(role.drafts for role in publishers) and message.sender == levels.get("agent"):
        return replace(message, sender=renames.agent.get(message.sender, message.sender))
    cluster = levels.get("cluster", "")
    new = renames.cluster.get(cluster)
    of_edge = any(role.relays for role in publishers) and message.sender in (cluster, f"{EDGE_PREFIX}{cluster}")
    if new is None or not of_edge:
        return message
    return replace(message, sender=message.sender.removesuffix(cluster) + new)


def _of_member(name: str, renames: Renames) -> str:
    """Rename an agent, or an edge with its cluster."""
    cluster = cluster_of(name)
    if cluster is not None and cluster in renames.cluster:
        return edge_name(renames.cluster[cluster])
    return renames.agent.get(name, name)


def _rename_inside(message: AnyMessage, row: Topic, renames: Renames) -> AnyMessage:
    match message:
        case EscalationBatch(items=items):
            return replace(message, items=tuple(_rename_item(item, "escalation", renames) for item in items))
        case VerdictBatch(items=items):
            return replace(message, items=tuple(_rename_item(item, "verdict", renames) for item in items))
        case Profile(agent=agent):
            new = renames.agent.get(agent, agent)
            return replace(message, agent=new, sender=new if message.sender == agent else message.sender)
        case Roster(members=members):
            table = renames.agent if row is topics.ROSTER else renames.cluster
            return replace(message, members=tuple(replace(m, name=table.get(m.name, m.name)) for m in members))
        case Assignment(cluster=cluster):
            return replace(message, cluster=renames.cluster.get(cluster, cluster))
        case _:
            return message


def _rename_item(item: Any, field: str, renames: Renames) -> Any:
    """Rename an item of a batch, and its message's sender if that is the agent."""
    new = renames.agent.get(item.agent, item.agent)
    inner = getattr(item, field)
    if inner.sender == item.agent:
        inner = replace(inner, sender=new)
    return replace(item, agent=new, **{field: inner})


def _shift(message: _M, by_ms: int) -> _M:
    changes: dict[str, Any] = {"sent_ms": _clamped(message.sent_ms + by_ms)}
    match message:
        case EscalationBatch(items=items):
            changes["items"] = tuple(replace(item, escalation=_shift(item.escalation, by_ms)) for item in items)
        case VerdictBatch(items=items):
            changes["items"] = tuple(replace(item, verdict=_shift(item.verdict, by_ms)) for item in items)
        case _:
            pass
    return replace(message, **changes)


def _clamped(ms: int) -> int:
    return min(max(0, ms), 2**53 - 1)
