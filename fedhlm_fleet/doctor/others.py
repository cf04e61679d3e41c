"""Checks of the other parts on the bus: edge and cloud are online, models fit together, clocks agree."""

from typing import Final

from fedhlm.errors import FingerprintMismatch, ProtocolError
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.fingerprint import check_agreement
from fedhlm.protocol.messages import Fingerprint, Presence
from fedhlm_fleet import remedies
from fedhlm_fleet.doctor.broker import STRANGER, UPSTREAM, section_of
from fedhlm_fleet.doctor.finding import Remark, Subject, fail, ok, skip, warn
from fedhlm_fleet.doctor.probe import HeardMessage

RETAINED_S: Final = 1.5
SKEW_WARN_S: Final = 30.0


def _presences(subject: Subject, key: str, topic: topics.Topic, *, wait_s: float = RETAINED_S) -> dict[str, Presence]:
    """Return the last presence on each topic of this row; wait only until there is one."""
    probe, root = subject.probes[key], section_of(subject, key).root

    def is_one(heard: HeardMessage) -> bool:
        return topic.parse(heard.topic, root) is not None

    probe.wait_for(is_one, wait_s)
    found = {}
    for heard in list(probe.heard):
        if is_one(heard):
            try:
                message = decode(heard.payload)
            except ProtocolError:
                continue
            if isinstance(message, Presence):
                found[heard.topic] = message
    return found


def edge(subject: Subject) -> Remark:
    """Check, for an agent, that its cluster's edge is online and sees the cloud."""
    cluster = subject.config.cluster.name
    found = list(_presences(subject, "broker", topics.EDGE_STATUS).values())
    if not found:
        return fail(f"no edge of cluster {cluster} was ever seen on this broker", remedies.no_edge(cluster))
    if not found[-1].online:
        return fail(f"the edge of cluster {cluster} is offline", remedies.offline("edge"))
    if found[-1].upstream is None:
        return fail(
            f"the edge of cluster {cluster} is online ({found[-1].software}), but sees no cloud",
            remedies.cut_off("edge"),
        )
    return ok(f"the edge of cluster {cluster} is online ({found[-1].software}) and sees the cloud")


def cloud(subject: Subject) -> Remark:
    """Check, for an edge, that the cloud is online."""
    found = list(_presences(subject, _up(subject), topics.CLOUD_STATUS).values())
    if not found:
        return fail(
            "no cloud was ever seen on this broker", "start it (fedhlm cloud), or correct the address of its broker"
        )
    if not found[-1].online:
        return fail("the cloud is offline", remedies.offline("cloud"))
    return ok(f"the cloud is online ({found[-1].software})")


def _up(subject: Subject) -> str:
    return UPSTREAM if subject.config.edge.upstream.url else "broker"


def agreement_of_agent(subject: Subject) -> Remark:
    """Compare this agent's tokenizer, vocabulary and noise with those of the cloud, which its edge announces."""
    theirs = [p.upstream for p in _presences(subject, "broker", topics.EDGE_STATUS).values()]
    if subject.model is None or not theirs or theirs[-1] is None:
        return skip("the edge does not announce the cloud's fingerprint")
    return _compared(subject.model.fingerprint, theirs[-1], "the cloud")


def agreement_of_edge(subject: Subject) -> Remark:
    """Compare the cloud's fingerprint with those of the cluster's agents."""
    clouds = [p.fingerprint for p in _presences(subject, _up(subject), topics.CLOUD_STATUS).values()]
    if not clouds or clouds[-1] is None:
        return skip("the cloud does not announce a fingerprint")
    agents = {
        name: presence.fingerprint
        for name, presence in _presences(subject, "broker", topics.AGENT_STATUS).items()
        if presence.online and presence.fingerprint is not None
    }
    if not agents:
        return warn("no agent of this cluster is online", "start one: fedhlm agent")
    for name, fingerprint in agents.items():
        if (said := _compared(fingerprint, clouds[-1], "the cloud")).level == "fail":
            return said._replace(found=f"{name.split('/')[-2]}: {said.found}")
    return ok(f"{len(agents)} agents online, all with the cloud's tokenizer ({clouds[-1].model})")


def agreement_of_cloud(subject: Subject) -> Remark:
    """Compare this model with a running cloud's, whose presence a broker with access rules hides from the cloud."""
    subject.probes["broker"].subscribe(topics.CLOUD_STATUS.name(subject.config.broker.root))
    found = [p.fingerprint for p in _presences(subject, "broker", topics.CLOUD_STATUS).values() if p.online]
    if not found or found[-1] is None or subject.model is None:
        return skip("no running cloud can be seen from here; `fedhlm doctor edge` compares agents with it")
    return _compared(subject.model.fingerprint, found[-1], "the running cloud")


def _compared(ours: Fingerprint, theirs: Fingerprint, whose: str) -> Remark:
    try:
        check_agreement(ours, theirs)
    except FingerprintMismatch as exc:
        return fail(f"{exc.field} differs: {exc.ours!r} here, {exc.theirs!r} at {whose}", remedies.UNLIKE)
    return ok(f"tokenizer {ours.tokenizer}, {ours.vocab_size} tokens, as at {whose} ({theirs.model})")


def clocks(subject: Subject) -> Remark:
    """Compare the clocks of other parties with this one, by the sending times of their messages.

    A fresh message bounds the difference on both sides, up to its travel time. A retained message bounds it on one side
    only: it cannot come from the future.
    """
    fresh: list[float] = []
    ahead = 0.0
    for probe in subject.probes.values():
        for heard in list(probe.heard):
            try:
                message = decode(heard.payload)
            except ProtocolError:
                continue
            if message.sender == subject.name or message.sender.startswith(STRANGER):
                continue
            offset_s = message.sent_ms / 1e3 - heard.wall_s
            ahead = max(ahead, offset_s)
            if not heard.retain:
                fresh.append(offset_s)
    worst = max([ahead, *(abs(offset_s) for offset_s in fresh)])
    if worst > SKEW_WARN_S:
        found = f"another party's clock and ours are {worst:.0f} s apart"
        return warn(
            found,
            "synchronise both clocks (timedatectl set-ntp true); certificates and logs need them, verdicts do not",
        )
    if fresh:
        return ok(f"{len(fresh)} new messages, {worst:.1f} s apart at most (including the network's delay)")
    return ok("no new message while the doctor listened; no retained one is dated in the future")
