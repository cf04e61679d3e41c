"""Rights: the generated file allows exactly what the topic table says, for every row, role, cluster and agent."""

from datetime import UTC, datetime
from itertools import product
from typing import cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhlm.errors import ConfigError
from fedhlm.protocol.open_topics import (
    A2A_CARD,
    A2A_REPLY,
    A2A_REQUEST,
    HOME_ANSWER,
    HOME_ASK,
    OPEN_TABLE,
    OpenTopic,
    device_of,
)
from fedhlm.protocol.topics import CANCEL_FROM, DEFAULT_ROOT, OUTPUT, PROMPT_FROM, TABLE, Topic
from fedhlm_fleet.pki.acl import BrokerPlace, acl
from fedhlm_fleet.pki.registry import Entry, Issued
from fedhlm_fleet.pki.roles import CertificateRole
from tests.fedhlm_fleet.pki.evaluator import Access, Who, allows, expected, matches

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
CLUSTERS = ("home", "barn", "c.3")
AGENTS = ("porch", "attic", "home", "a-1")

clusters_of = st.lists(st.sampled_from(CLUSTERS), min_size=1, max_size=2, unique=True).map(tuple)


@st.composite
def parties(draw: st.DrawFn) -> list[Who]:
    agents = [Who("agent", name, draw(clusters_of)) for name in draw(st.sets(st.sampled_from(AGENTS)))]
    edges = [Who("edge", f"edge-{c}", (c,)) for c in draw(st.sets(st.sampled_from(CLUSTERS)))]
    others = [Who("cloud", "cloud"), Who("client", "desk"), Who("client", "guest", draw(clusters_of))]
    others += [Who("operator", "chief"), Who("operator", "warden", draw(clusters_of))]
    return [*agents, *edges, *others, Who("observer", "eye"), Who("broker", "mqtt", draw(clusters_of)[:1])]


places = st.one_of(
    st.sampled_from(CLUSTERS).map(lambda cluster: BrokerPlace("cluster", cluster)),
    st.sampled_from([BrokerPlace("cloud"), BrokerPlace("shared")]),
)


def entry_of(who: Who) -> Entry:
    issued = Issued(serial="1", not_before=MOMENT, not_after=MOMENT)
    hosts = ("localhost",) if who.role == "broker" else ()
    role = cast(CertificateRole, who.role)
    return Entry(name=who.name, role=role, clusters=who.clusters, hosts=hosts, certificates=(issued,))


@settings(max_examples=25)
@given(parties(), places, st.sampled_from([DEFAULT_ROOT, "x", "my/own/root"]))
def test_every_row_role_cluster_and_agent_is_as_the_table_says(them: list[Who], place: BrokerPlace, root: str) -> None:
    text = acl(map(entry_of, them), place, root)
    stranger = Who("agent", "nobody", CLUSTERS)
    accesses: tuple[Access, ...] = ("read", "write")
    rows: tuple[Topic | OpenTopic, ...] = (*TABLE, *OPEN_TABLE)
    for who, topic, access in product([*them, stranger], rows, accesses):
        for cluster, agent, client in product(CLUSTERS, (*AGENTS, "nobody"), (who.name, "somebody")):
            levels = {
                k: v
                for k, v in (
                    ("cluster", cluster),
                    ("agent", agent),
                    ("client", client),
                    ("member", agent),
                    ("device", device_of(client)),
                    ("org", "some.org"),
                    ("suffix", "s-1"),
                )
                if f"{{{k}}}" in topic.pattern
            }
            name = topic.name(root, **levels)
            wanted = who is not stranger and expected(who, access, topic, levels, place.kind, place.cluster)
            assert allows(text, who.name, access, name) == wanted, (who, access, name, place)


@given(parties(), places)
def test_nobody_reaches_outside_the_root(them: list[Who], place: BrokerPlace) -> None:
    text = acl(map(entry_of, them), place)
    for who in them:
        for name in (
            "fedhlm/2/c/home/fl",
            "$SYS/broker/uptime",
            "fedhlm/1/c/home",
            "fedhlm/1/c/home/a/porch/x",
            "homeassistant/status",
            "homeassistant/device/fedhlm-nobody/state",
            "$a2a/v1/event/o/home/porch",
            "$a2a/v1/request/o/home/pool/all",
            "#",
            "+",
        ):
            assert not allows(text, who.name, "write", name)
            assert not allows(text, who.name, "read", name) or who.role == "observer"


def test_no_client_reads_what_another_one_asks_or_is_told() -> None:
    """Not by the table alone, which could say so for a topic without the client in it."""
    text = acl([entry_of(Who("client", name, ("home",))) for name in ("homeassistant", "other")], BrokerPlace("shared"))
    levels = {"cluster": "home", "agent": "porch", "client": "homeassistant"}
    for topic in (PROMPT_FROM, OUTPUT, CANCEL_FROM, HOME_ASK, HOME_ANSWER):
        name = topic.name(**levels)
        assert allows(text, "homeassistant", "read", name) or allows(text, "homeassistant", "write", name)
        assert not allows(text, "other", "read", name)
        assert not allows(text, "other", "write", name)


def test_an_agent_answers_over_a2a_on_reply_topics_only_and_nobody_reads_those_of_others() -> None:
    who = [Who("agent", "porch", ("home",)), Who("client", "desk", ("home",)), Who("client", "other", ("home",))]
    text = acl(map(entry_of, who), BrokerPlace("shared"))
    levels = {"org": "o", "cluster": "home", "agent": "porch", "client": "desk", "suffix": "1"}
    reply, request, card = (topic.name(**levels) for topic in (A2A_REPLY, A2A_REQUEST, A2A_CARD))
    assert allows(text, "porch", "write", reply)
    assert allows(text, "desk", "read", reply)
    assert not allows(text, "other", "read", reply)
    assert not any(allows(text, client, "write", reply) for client in ("desk", "other"))
    assert not any(allows(text, client, "read", request) for client in ("desk", "other"))
    assert not allows(text, "porch", "write", request)
    assert not allows(text, "porch", "write", A2A_CARD.name(**(levels | {"agent": "attic"})))
    assert not allows(text, "porch", "write", A2A_REPLY.name(**(levels | {"cluster": "barn"})))
    assert allows(text, "porch", "write", card)
    assert not allows(text, "desk", "write", card)


def test_a_revoked_party_has_no_block() -> None:
    good = entry_of(Who("agent", "porch", ("home",)))
    lost = msgspec.structs.replace(good, certificates=(msgspec.structs.replace(good.newest, revoked=MOMENT),))
    place = BrokerPlace("cluster", "home")
    assert "user porch" in acl([good], place)
    assert "user porch" not in acl([lost], place)


@pytest.mark.parametrize("root", ["", "a/#", "+", "a b", "a/", "/a", "$SYS", "a\nuser porch\ntopic write #"])
def test_a_root_cannot_smuggle_rights_in(root: str) -> None:
    with pytest.raises(ConfigError, match="--root"):
        acl([], BrokerPlace("shared"), root)


def test_the_evaluator_itself_knows_filters() -> None:
    assert matches("a/+/c", "a/b/c")
    assert matches("a/#", "a")
    assert matches("a/#", "a/b/c")
    assert not matches("a/+", "a")
    assert not matches("a/+", "a/b/c")
    assert not matches("a/b", "a/bc")
