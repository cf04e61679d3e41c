"""Checks of one broker, step by step: host name, port, TLS, own certificate, login, rights, delay.

Each check takes the broker's configuration key, `broker` or `edge.upstream`. The checks do not disturb a running part:
they use another client id, and publish only empty lists or on topics to which nobody subscribes.
"""

import secrets
import socket
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Final, NamedTuple

import msgspec

from fedhlm.bus.backoff import YIELD_BASE_S
from fedhlm.bus.broker_url import BrokerUrl
from fedhlm.bus.identity import client_id
from fedhlm.bus.party import Stamp
from fedhlm.errors import BusError
from fedhlm.process.run import DEFAULT_URL
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import AnyMessage, UncertainTokens, Verdict, VerdictBatch, VerifiedTokens
from fedhlm.settings import Broker
from fedhlm_fleet.doctor import tls
from fedhlm_fleet.doctor.finding import Remark, Subject, fail, ok, skip, warn
from fedhlm_fleet.doctor.probe import HeardMessage, LostError, Probe, RefusedError

STEP_S: Final = 2.5
ECHO_S: Final = 1.5
SESSION: Final = 0
BURST: Final = 3
BURSTS: Final = 7
# Linux delays acknowledgements by 40 ms. Medians of several bursts stay below this limit even on a link with jitter, and
# a busy machine delays both alike.
HELD_MS: Final = 25.0
UPSTREAM: Final = "edge.upstream"
STRANGER: Final = "doctor-"  # prefix of names that no part has

_LOGIN_ADVICE: Final = {
    133: "shorten the part's name",
    134: "correct {key}.username and the password",
    135: "correct {key}.username and the password, or let the broker admit this name",
    138: "the broker's operator has banned this name",
}


def section_of(subject: Subject, key: str) -> Broker:
    """Return the section `broker` or `edge.upstream`."""
    return {"broker": subject.config.broker, UPSTREAM: subject.config.edge.upstream}[key]


def address_of(subject: Subject, key: str) -> BrokerUrl:
    """Return the address of a broker. Without a URL, an edge uses its own broker, and other parts one on this machine.

    Raises:
        ConfigError: the URL or a file cannot be used.
    """
    section = section_of(subject, key)
    if section.url:
        return section.address(key=f"{key}.url")
    url = DEFAULT_URL
    if subject.traits.relays:
        url = f"mqtt://{subject.config.edge.embedded_host}:{subject.config.edge.embedded_port}"
    return msgspec.structs.replace(section, url=url).address(key=f"{key}.url")


def host_name(subject: Subject, key: str) -> Remark:
    """Check that the name service knows the broker's host."""
    address = address_of(subject, key)
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        return fail(
            f"{address.host} is unknown: {exc.strerror or exc}",
            f"correct {key}.url, or the name service (resolvectl query {address.host})",
        )
    numbers = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    shown = ", ".join(numbers[:3])
    return ok(shown if address.host in numbers else f"{address.host} is {shown}")


def port(subject: Subject, key: str) -> Remark:
    """Check that the broker's port accepts connections."""
    address = address_of(subject, key)
    own = subject.traits.relays and not section_of(subject, key).url
    begun_s = perf_counter()
    try:
        with socket.create_connection((address.host, address.port), STEP_S):
            pass
    except TimeoutError:
        return fail(
            f"{address} does not answer within {STEP_S:g} s",
            "look for a firewall, a wrong address, or a network that is down",
        )
    except OSError as exc:
        if own:
            return skip(f"{address} is free for this edge's own broker, which starts with the edge")
        if isinstance(exc, ConnectionRefusedError):
            return fail(
                f"nobody listens on {address}",
                f"start the broker there (systemctl status mosquitto), or correct {key}.url",
            )
        return fail(f"{address}: {exc.strerror or exc}", "look at the network: ip addr, ip route")
    return ok(f"{address} answers in {(perf_counter() - begun_s) * 1e3:.0f} ms")


def certificate(subject: Subject, key: str) -> Remark:
    """Check the broker's certificate."""
    return tls.broker_certificate(address_of(subject, key), key, timeout_s=STEP_S, now_s=subject.wall_s())


def own_certificate(subject: Subject, key: str) -> Remark:
    """Check the part's own certificate."""
    return tls.own_certificate(address_of(subject, key), key, now_s=subject.wall_s())


def login(subject: Subject, key: str) -> Remark:
    """Check that the broker accepts a login; the session stays open for later checks."""
    address, section = address_of(subject, key), section_of(subject, key)
    name = client_id("doctor", subject.name, secrets.token_hex(8), root=section.root)
    probe = Probe(address, name, key=f"{key}.url", wait_s=STEP_S, wall_s=subject.wall_s)
    begun_s = perf_counter()
    try:
        if section.protocol == "auto":
            probe.open()
        else:
            probe.open((section.protocol,))
    except RefusedError as exc:
        probe.close()
        advice = _LOGIN_ADVICE.get(exc.code, "look at the broker's log")
        return fail(f"{address} refuses us: {exc}", advice.format(key=key))
    except BusError as exc:
        probe.close()
        return fail(
            f"{address}: {exc}",
            "look at the broker's log; is it an MQTT broker, and do its certificates belong to our authority?",
        )
    subject.probes[key] = probe
    took_ms = (perf_counter() - begun_s) * 1e3
    who = (
        address.username or "the name in our certificate"
        if address.files.cert or address.username
        else "nobody in particular"
    )
    return ok(f"MQTT {probe.version} as {who}, {took_ms:.0f} ms")


class Trial(NamedTuple):
    """Two harmless messages: one on a topic where the part may publish, one where it may not.

    `echo`: the part receives the first one itself.
    """

    ours: str
    message: AnyMessage
    foreign: str
    foreign_message: AnyMessage
    echo: bool


def trial_of(subject: Subject, key: str, stranger: str) -> Trial:
    """Return the messages with which this part can test its rights; `stranger` is a name that no part has."""
    cluster, root = subject.config.cluster.name, section_of(subject, key).root
    ours, theirs = Stamp(subject.name), Stamp(stranger)
    space = subject.model.space if subject.model else ""
    if subject.traits.drafts:
        return Trial(
            topics.PEER.name(root, cluster=cluster, agent=subject.name),
            UncertainTokens(**ours(), session=SESSION, space=space, items=()),
            topics.PEER.name(root, cluster=cluster, agent=stranger),
            UncertainTokens(**theirs(), session=SESSION, space=space, items=()),
            echo=True,
        )
    if subject.traits.verifies:
        # A cloud may answer any cluster, but only an edge may publish to an agent.
        return Trial(
            topics.CLOUD_VERDICT.name(root, cluster=stranger),
            VerdictBatch(**ours(), items=()),
            topics.VERDICT.name(root, cluster=stranger, agent=stranger),
            _verdict(theirs),
            echo=False,
        )
    if key == UPSTREAM:
        return Trial(
            topics.NEIGHBOUR.name(root, cluster=cluster),
            VerifiedTokens(**ours(), space="", items=()),
            topics.NEIGHBOUR.name(root, cluster=stranger),
            VerifiedTokens(**theirs(), space="", items=()),
            echo=True,
        )
    return Trial(
        topics.VERDICT.name(root, cluster=cluster, agent=stranger),
        _verdict(ours),
        topics.VERDICT.name(root, cluster=stranger, agent=stranger),
        _verdict(theirs),
        echo=False,
    )


def _verdict(stamp: Stamp) -> Verdict:
    return Verdict(**stamp(), session=SESSION, epoch=0, base=0, status="unprimed")


def filters_of(subject: Subject, key: str) -> list[str]:
    """Return the subscriptions of this part on that broker, from the topic table."""
    cluster, root = subject.config.cluster.name, section_of(subject, key).root
    traits = subject.traits
    both = not traits.relays or not subject.config.edge.upstream.url
    found = []
    for topic in topics.TABLE:
        to_cloud = not topic.pattern.startswith("c/")
        side = both or to_cloud == (key == UPSTREAM)
        if subject.role in topic.subscribers and side:
            agent = subject.name if traits.drafts and topic is not topics.PEER else "+"
            many = traits.verifies or topic is topics.NEIGHBOUR
            found.append(topic.filter(root, cluster="+" if many else cluster, agent=agent))
    return found


def rights(subject: Subject, key: str) -> Remark:
    """Check the access rules: the part can subscribe to its topics, and publish under its own name only."""
    try:
        return _rights(subject, key)
    except LostError:
        return skip(
            "the broker ended our session. Where it gives each certificate one connection (mosquitto's "
            f"use_username_as_clientid), a running part takes its place back after {YIELD_BASE_S:g} s at most: look again, or "
            "stop the part first"
        )


def _rights(subject: Subject, key: str) -> Remark:
    probe = subject.probes[key]
    filters = filters_of(subject, key)
    refused = probe.subscribe(*filters)
    if refused:
        pattern, reason = next(iter(refused.items()))
        return fail(
            f"{len(refused)} of {len(filters)} subscriptions are refused, such as {pattern}: {reason}", _ACL_ADVICE
        )
    trial = trial_of(subject, key, f"{STRANGER}{secrets.token_hex(6)}")
    payload = encode(trial.message)
    begun_s = perf_counter()
    denied = probe.publish(trial.ours, payload)
    if denied is not None:
        return fail(f"we may not publish on {trial.ours}: {denied}", _ACL_ADVICE)
    found = f"{len(filters)} subscriptions"
    if trial.echo:
        if probe.wait_for(_is(trial.ours, payload), ECHO_S) is None:
            return fail(f"what we publish on {trial.ours} does not come back", _ACL_ADVICE)
        found += f", our own message comes back in {(perf_counter() - begun_s) * 1e3:.0f} ms"
    if probe.version != "5":
        return ok(f"{found}; MQTT {probe.version} does not say whether publishing is refused")
    if probe.publish(trial.foreign, encode(trial.foreign_message)) is None:
        return warn(
            f"{found}; but we may publish under another's name, on {trial.foreign}",
            "give the broker access rules (fedhlm pki mosquitto), unless everybody on this network is trusted",
        )
    return ok(f"{found}; publishing under another's name is refused")


def delay(subject: Subject, key: str) -> Remark:
    """Check that the broker sends small packets at once: several answers take hardly longer than one."""
    probe = subject.probes[key]
    try:
        pairs = [(probe.burst_s(1), probe.burst_s(BURST)) for _ in range(BURSTS)]
    except LostError:
        return skip("the broker ended our session")
    one_s, several_s = map(median, zip(*pairs, strict=True))
    held_ms = (several_s - one_s) * 1e3
    if held_ms < HELD_MS:
        return ok(f"a request is answered in {one_s * 1e3:.1f} ms, {BURST} at once in {several_s * 1e3:.1f} ms")
    return warn(
        f"the broker holds small packets back for {held_ms:.0f} ms (Nagle's algorithm)",
        "set 'set_tcp_nodelay true' in mosquitto.conf; parts of fedhlm on Linux do not wait for it, other clients do",
    )


_ACL_ADVICE: Final = (
    "write the broker's access rules again (fedhlm pki mosquitto), and check that its user name for us is our name"
)


def _is(topic: str, payload: bytes) -> Callable[[HeardMessage], bool]:
    return lambda heard: (heard.topic, heard.payload) == (topic, payload)
