"""Access rules of the brokers: both topic tables, applied to the parties of a registry.

Each party gets its own `user` block, and a name without a block has no rights. mosquitto's `pattern` lines would hold
for every certificate of the CA, so that an agent of one cluster could publish under its name in another.
"""

import re
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from fedhlm.errors import ConfigError
from fedhlm.protocol.open_topics import OPEN_TABLE, OpenTopic, device_of
from fedhlm.protocol.roles import traits_of
from fedhlm.protocol.topics import DEFAULT_ROOT, TABLE, Topic
from fedhlm_fleet.pki.registry import Entry
from fedhlm_fleet.pki.roles import CERTIFICATES

_ROOT: Final = re.compile(r"[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*")
_CLUSTER_TOPICS: Final = "c/{cluster}/"
Row = Topic | OpenTopic


Kind = Literal["cluster", "cloud", "shared"]


class KindTraits(NamedTuple):
    """Properties of a place: in words, and whether topics of clusters and topics of the cloud are there."""

    words: str
    near: bool
    far: bool


KINDS: Final[dict[Kind, KindTraits]] = {
    "cluster": KindTraits("the broker of cluster {cluster}", near=True, far=False),
    "cloud": KindTraits("the cloud's broker", near=False, far=True),
    "shared": KindTraits("one broker for all", near=True, far=True),
}


class BrokerPlace(NamedTuple):
    """The place of a broker: in one cluster, between edges and cloud, or shared by all."""

    kind: Kind
    cluster: str = ""


class Right(NamedTuple):
    """One line of an access control list."""

    access: Literal["read", "write"]
    filter: str


def rights(entry: Entry, place: BrokerPlace, root: str = DEFAULT_ROOT) -> list[Right]:
    """Return the rights of a party on a broker; the list is empty if the party does not use this broker."""
    traits, kind = CERTIFICATES[entry.role], KINDS[place.kind]
    if traits.reads_all:
        return [Right("read", f"{root}/#")]
    if not ((traits.near and kind.near) or (traits.far and kind.far)):
        return []
    found = [
        right
        for topic in (*TABLE, *OPEN_TABLE)
        if _travels(topic, kind)
        for right in _of_row(topic, entry, place, root)
    ]
    return sorted(set(found), key=found.index)


def acl(entries: Iterable[Entry], place: BrokerPlace, root: str = DEFAULT_ROOT) -> str:
    """Return the access control list of a broker, without parties whose newest certificate is revoked.

    Raises:
        ConfigError: the root contains other characters than those of plain levels.
    """
    if not _ROOT.fullmatch(root):
        raise ConfigError("--root", root, "levels of letters, digits, '.', '_', '~' or '-'")
    blocks = [f"# Made from the topic table by `fedhlm pki mosquitto`, for {described(place)}. All else is denied."]
    for entry in entries:
        lines = rights(entry, place, root)
        if lines and entry.newest.revoked is None:
            head = f"# {entry.role}{' of ' + ', '.join(entry.clusters) if entry.clusters else ''}\nuser {entry.name}"
            blocks.append("\n".join([head, *(f"topic {right.access} {right.filter}" for right in lines)]))
    return "\n\n".join(blocks) + "\n"


def described(place: BrokerPlace) -> str:
    """Describe a broker in words."""
    return KINDS[place.kind].words.format(cluster=place.cluster)


def _relayed(topic: Row) -> bool:
    # The edge forwards a topic that both cloud and edge publish from the cloud's broker to its cluster's broker.
    publishers = traits_of(topic.publishers)
    return any(role.verifies for role in publishers) and any(role.relays for role in publishers)


def _of_cluster(topic: Row) -> bool:
    if isinstance(topic, OpenTopic):
        return "{cluster}" in topic.pattern
    return topic.pattern.startswith(_CLUSTER_TOPICS)


def _travels(topic: Row, kind: KindTraits) -> bool:
    if isinstance(topic, OpenTopic):
        return kind.near
    of_cluster = _of_cluster(topic)
    # A client connects to the broker of the cluster that it asks, and has a last will wherever it connects.
    of_client = all(role.asks for role in traits_of(topic.publishers))
    return (kind.near and (of_cluster or of_client or _relayed(topic))) or (kind.far and not of_cluster)


def _of_row(topic: Row, entry: Entry, place: BrokerPlace, root: str) -> list[Right]:
    found: list[Right] = []
    relay_only = CERTIFICATES[entry.role].party.relays and _relayed(topic) and KINDS[place.kind].far
    if entry.role in topic.publishers and not (relay_only or topic.open_only):
        found += [Right("write", name) for name in _names(topic, entry, place, root, everybody=False)]
    if entry.role in topic.subscribers:
        # On a topic between parties of one role, each party reads the messages of all others.
        among = entry.role in topic.publishers
        found += [Right("read", name) for name in _names(topic, entry, place, root, everybody=among)]
    return found


def _names(topic: Row, entry: Entry, place: BrokerPlace, root: str, *, everybody: bool) -> list[str]:
    """Return a row's topic filters for this party; with `everybody`, also those for other parties of its role."""
    of_cluster, party = _of_cluster(topic), CERTIFICATES[entry.role].party
    clusters = entry.clusters or ("+",)
    if place.cluster:
        if not {"+", place.cluster} & set(clusters):
            return []
        clusters = (place.cluster,)
    elif party.relays and everybody and not of_cluster:
        clusters = ("+",)
    device = device_of(entry.name) if party.drafts or party.relays else "+"
    levels = {"agent": "+", "client": "+", "member": "+", "device": device, "org": "+", "suffix": "+"}
    if party.level and not (everybody and of_cluster):
        levels[party.level] = entry.name
    return list(dict.fromkeys(topic.name(root, cluster=cluster, **levels) for cluster in clusters))
