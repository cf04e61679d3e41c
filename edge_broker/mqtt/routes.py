"""The subscriptions of all clients, and the retained messages; no I/O."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from edge_broker.mqtt.packets import Asked, BrokerMessage
from fedhlm.bus.interface import check_filter, share_of, topic_matches

RETAINED_MAX: Final = 65_536
RETAINED_BYTES: Final = 64 * 1024 * 1024
_CACHED_TOPICS: Final = 4_096


class Receiver(NamedTuple):
    """One copy of a message for one client.

    `qos` is the QoS that the client asked for, and `as_published` says whether the retain flag is kept. `no_local`
    excludes the client's own messages. `tags` are its subscription identifiers.
    """

    client: str
    qos: int
    as_published: bool
    no_local: bool
    tags: tuple[int, ...]


@dataclass(slots=True)
class _Node:
    children: "dict[str, _Node]" = field(default_factory=dict)
    plain: dict[str, Asked] = field(default_factory=dict)
    shared: "dict[str, _Group]" = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.children or self.plain or self.shared)


@dataclass(slots=True)
class _Group:
    members: dict[str, Asked] = field(default_factory=dict)
    turn: int = 0


class _Matched(NamedTuple):
    plain: tuple[Receiver, ...]
    groups: tuple[_Group, ...]


class Routes:
    """Subscriptions by topic filter.

    A client with several filters that match a topic gets one copy, at the highest QoS of these filters.
    """

    def __init__(self) -> None:
        self._top = _Node()
        self._of: dict[str, set[str]] = {}
        self._cache: dict[str, _Matched] = {}

    def subscribe(self, client: str, asked: Asked) -> bool:
        """Add or replace a subscription. Return whether it is new.

        Raises:
            ValueError: the filter is malformed.
        """
        check_filter(asked.pattern)
        group, plain = share_of(asked.pattern)
        node = self._top
        for level in plain.split("/"):
            node = node.children.setdefault(level, _Node())
        members = node.plain if group is None else node.shared.setdefault(group, _Group()).members
        new = client not in members
        members[client] = asked
        self._of.setdefault(client, set()).add(asked.pattern)
        self._cache.clear()
        return new

    def unsubscribe(self, client: str, pattern: str) -> bool:
        """End a subscription. Return whether it existed."""
        if pattern not in self._of.get(client, ()):
            return False
        self._of[client].discard(pattern)
        group, plain = share_of(pattern)
        path = [self._top]
        levels = plain.split("/")
        for level in levels:
            path.append(path[-1].children[level])
        node = path[-1]
        if group is None:
            del node.plain[client]
        else:
            del node.shared[group].members[client]
            if not node.shared[group].members:
                del node.shared[group]
        for parent, level in zip(reversed(path[:-1]), reversed(levels), strict=True):
            if parent.children[level].empty:
                del parent.children[level]
        self._cache.clear()
        return True

    def forget(self, client: str) -> None:
        """End all subscriptions of a client."""
        for pattern in list(self._of.get(client, ())):
            self.unsubscribe(client, pattern)
        self._of.pop(client, None)

    def receivers(self, topic: str, publisher: str) -> Iterator[Receiver]:
        """The receivers of a message from `publisher`. Each shared group gets one copy; its members take turns."""
        matched = self._cache.get(topic)
        if matched is None:
            if len(self._cache) >= _CACHED_TOPICS:
                self._cache.clear()
            matched = self._cache[topic] = self._match(topic)
        for receiver in matched.plain:
            if not (receiver.no_local and receiver.client == publisher):
                yield receiver
        for group in matched.groups:
            group.turn = (group.turn + 1) % len(group.members)
            client = list(group.members)[group.turn]
            asked = group.members[client]
            yield Receiver(client, asked.qos, asked.as_published, False, _tags(asked))

    def _match(self, topic: str) -> _Matched:
        found: dict[str, Receiver] = {}
        groups: list[_Group] = []
        for node in self._nodes(topic.split("/"), hidden=topic.startswith("$")):
            groups += node.shared.values()
            for client, asked in node.plain.items():
                old = found.get(client)
                found[client] = Receiver(
                    client,
                    max(asked.qos, old.qos if old else 0),
                    asked.as_published or (old is not None and old.as_published),
                    asked.no_local and (old is None or old.no_local),
                    (old.tags if old else ()) + _tags(asked),
                )
        return _Matched(tuple(found.values()), tuple(groups))

    def _nodes(self, names: list[str], *, hidden: bool) -> Iterator[_Node]:
        at = [self._top]
        for depth, name in enumerate(names):
            wild = not (hidden and depth == 0)
            below: list[_Node] = []
            for node in at:
                if wild and (rest := node.children.get("#")) is not None:
                    yield rest
                levels = (name, "+") if wild else (name,)
                below += (node.children[level] for level in levels if level in node.children)
            at = below
        for node in at:
            yield node
            if (rest := node.children.get("#")) is not None:
                yield rest


def _tags(asked: Asked) -> tuple[int, ...]:
    return () if asked.number is None else (asked.number,)


class RetainedMessages:
    """The last retained message of each topic, bounded in number and bytes."""

    def __init__(self, *, messages_max: int = RETAINED_MAX, bytes_max: int = RETAINED_BYTES) -> None:
        self._messages: dict[str, BrokerMessage] = {}
        self._bytes = 0
        self._messages_max, self._bytes_max = messages_max, bytes_max

    def keep(self, message: BrokerMessage) -> bool:
        """Retain a message. An empty one deletes that of its topic. Return False if there is no room."""
        old = self._messages.pop(message.topic, None)
        if old is not None:
            self._bytes -= _bytes(old)
        if not message.payload:
            return True
        size = _bytes(message)
        if len(self._messages) >= self._messages_max or self._bytes + size > self._bytes_max:
            return False
        self._messages[message.topic] = message
        self._bytes += size
        return True

    def of(self, pattern: str, now_s: float) -> list[BrokerMessage]:
        """The retained messages that match a filter and have not expired.

        `now_s` is in seconds on the broker's clock.
        """
        if "+" in pattern or "#" in pattern:
            levels = pattern.split("/")
            found = [message for topic, message in self._messages.items() if topic_matches(levels, topic)]
        else:
            found = [self._messages[pattern]] if pattern in self._messages else []
        gone = [m for m in found if m.expires_s is not None and m.expires_s <= now_s]
        for message in gone:
            self.keep(message._replace(payload=b""))
        return [message for message in found if message not in gone] if gone else found


def _bytes(message: BrokerMessage) -> int:
    return len(message.topic) + len(message.payload) + len(message.extras)
