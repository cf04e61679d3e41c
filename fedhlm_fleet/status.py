"""The parts that have announced themselves on a broker: their software, their models, and the links between them."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from fedhlm import settings
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import FingerprintMismatch
from fedhlm.learning.evidence import certificates_of
from fedhlm.process.run import bus_of
from fedhlm.protocol import topics
from fedhlm.protocol.fingerprint import check_agreement
from fedhlm.protocol.messages import Evidence, Learned, Presence
from fedhlm.protocol.roles import ROLES, Role
from fedhlm.telemetry import Counters
from fedhlm_fleet import remedies

# Retained messages arrive right after a subscription; each of them restarts this wait.
QUIET_S: Final = 1.0
_ROWS: Final = (topics.CLOUD_STATUS, topics.EDGE_STATUS, topics.AGENT_STATUS)
_STATES: Final = (topics.CLOUD_FL_STATE, topics.FL_STATE)


class Heard(NamedTuple):
    """A part's presence, with its name and the cluster of its topic (empty for the cloud)."""

    cluster: str
    name: str
    presence: Presence


class FleetError(msgspec.Struct, frozen=True, kw_only=True):
    """The certificate of a fleet, or of a cluster whose broker knows no cloud, for one pair of models.

    With the probability `confidence`, at most `limit` of its tokens are wrong; `estimate` is R-hat.
    """

    pair: str
    limit: float
    estimate: float
    tokens: float
    confidence: float
    since_s: float


class PartStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One part. `wrong` describes its problem, and `remedy` says what to do; both are empty if there is none.

    `since_s` is how long the part has been online, by its own clock. It is None for an offline part, because a last
    will does not know when it was sent.
    """

    cluster: str
    name: str
    role: Role
    online: bool
    software: str
    model: str
    since_s: float | None
    link: str
    wrong: str
    remedy: str


async def listen(broker: settings.Broker, *, client_id: str) -> tuple[list[Heard], Evidence | None]:
    """Return all retained presences of the broker, each with the names in its topic, and the fleet's evidence.

    Raises:
        BusError: the broker cannot be reached.
    """
    bus = bus_of(broker, client_id=client_id, connect_timeout_s=broker.connect_timeout_s)
    party = Party(bus=bus, stamp=Stamp(client_id), counters=Counters(), root=broker.root)
    found: dict[tuple[str, str], Heard] = {}
    told: dict[str, Evidence] = {}
    async with bus:
        await bus.subscribe(*(row.name(broker.root, cluster="+", agent="+") for row in (*_ROWS, *_STATES)))
        messages = aiter(party.received())
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    received = await anext(messages)
            except (TimeoutError, StopAsyncIteration):
                # The cloud's comes first, then that of any cluster: an edge tells the fleet's where it knows it.
                return list(found.values()), next((told[cluster] for cluster in sorted(told)), None)
            if isinstance(received.message, Presence):
                place = received.levels.get("cluster", ""), received.levels.get("agent", received.message.role)
                found[place] = Heard(*place, received.message)
            elif isinstance(received.message, Learned) and received.message.evidence is not None:
                told[received.levels.get("cluster", "")] = received.message.evidence


def errors_of_fleet(evidence: Evidence | None, *, confidence: float, now_s: float | None = None) -> list[FleetError]:
    """Return the certificate of each pair of models, the one with the most tokens first.

    Raises:
        ProtocolError: the evidence is impossible.
    """
    if evidence is None:
        return []
    since_s = max(0.0, (time.time() if now_s is None else now_s) - evidence.began_ms / 1000.0)
    found = sorted(certificates_of(evidence).items(), key=lambda item: -item[1].tokens)
    return [
        FleetError(
            pair=pair,
            limit=known.limit(confidence),
            estimate=known.estimate,
            tokens=known.tokens,
            confidence=confidence,
            since_s=since_s,
        )
        for pair, known in found
    ]


def rows(heard: Iterable[Heard], *, now_s: float | None = None) -> list[PartStatus]:
    """Return the status of each part: the cloud first, then for each cluster its edge and its agents."""
    now_s = time.time() if now_s is None else now_s
    parts = sorted(heard, key=lambda h: (h.cluster, ROLES[h.presence.role].order, h.name))
    edges = {h.cluster: h.presence for h in parts if ROLES[h.presence.role].relays}
    wrongs = [_wrong(part, edges) for part in parts]
    return [
        PartStatus(
            cluster=part.cluster,
            name=part.name,
            role=part.presence.role,
            online=part.presence.online,
            software=part.presence.software,
            model="" if part.presence.fingerprint is None else part.presence.fingerprint.model,
            since_s=max(0.0, now_s - part.presence.sent_ms / 1000.0) if part.presence.online else None,
            link=_link(part, edges),
            wrong=wrong.words,
            remedy=wrong.remedy,
        )
        for part, wrong in zip(parts, wrongs, strict=True)
    ]


def missing(found: Iterable[PartStatus]) -> list[str]:
    """Return the problems of the whole fleet: no part at all, clusters without an edge, several software versions."""
    found = list(found)
    if not found:
        return ["no part has announced itself on this broker"]
    lines = []
    online = [row for row in found if row.online]
    clusters = sorted({row.cluster for row in found if ROLES[row.role].drafts})
    edged = {row.cluster for row in found if ROLES[row.role].relays}
    lines += [f"no edge has announced itself in cluster {cluster}" for cluster in clusters if cluster not in edged]
    if len(versions := sorted({row.software for row in online})) > 1:
        lines.append(f"several versions are running: {', '.join(versions)}")
    return lines


def _link(part: Heard, edges: Mapping[str, Presence]) -> str:
    if not part.presence.online:
        return ""
    if ROLES[part.presence.role].relays:
        return "the cloud" if part.presence.upstream is not None else "no cloud"
    if ROLES[part.presence.role].drafts:
        edge = edges.get(part.cluster)
        return "its edge" if edge is not None and edge.online else "no edge"
    return ""


class Wrong(NamedTuple):
    """A problem in words, and what to do about it."""

    words: str = ""
    remedy: str = ""


def _wrong(part: Heard, edges: Mapping[str, Presence]) -> Wrong:
    presence = part.presence
    if not presence.online:
        return Wrong("offline", remedies.offline(presence.role))
    if ROLES[presence.role].relays and presence.upstream is None:
        told = "sees no cloud: what its cluster does not know stays unverified"
        return Wrong(told, remedies.cut_off(presence.role))
    if ROLES[presence.role].drafts:
        edge = edges.get(part.cluster)
        if edge is None or not edge.online:
            told = "its edge is not there: what needs the cloud stays unverified"
            return Wrong(told, remedies.no_edge(part.cluster) if edge is None else remedies.offline(edge.role))
        if presence.fingerprint is not None and edge.upstream is not None:
            try:
                check_agreement(presence.fingerprint, edge.upstream)
            except FingerprintMismatch as exc:
                return Wrong(f"its model does not fit the cloud: {exc}", remedies.UNLIKE)
    return Wrong()
