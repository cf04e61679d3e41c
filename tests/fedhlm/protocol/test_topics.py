"""The topic table: names and rows belong to one another, hostile names to no row."""

import string
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.interface import check_filter, check_topic, topic_matches
from fedhlm.errors import ProtocolError
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import (
    SCHEMA_VERSION,
    AnyMessage,
    Assignment,
    Forget,
    Learned,
    MetricsReport,
    Presence,
    Prompt,
    Roster,
    UncertainTokens,
    VerifiedTokens,
)
from fedhlm.protocol.topics import AGENT_STATUS, DEFAULT_ROOT, PROMPT, TABLE, Topic, decode_for, lookup

FIRST = string.ascii_letters + string.digits
names = st.builds(str.__add__, st.sampled_from(FIRST), st.text(FIRST + "._-", max_size=63))
roots = st.sampled_from([DEFAULT_ROOT, "x", "a/b/c", "c", "cloud"])


def levels_of(topic: Topic, cluster: str, agent: str) -> dict[str, str]:
    known = {"cluster": cluster, "agent": agent, "client": agent, "member": agent}
    return {key: value for key, value in known.items() if f"{{{key}}}" in topic.pattern}


@given(names, names, roots)
def test_every_rows_name_parses_back_to_itself_and_to_no_other_row(cluster: str, agent: str, root: str) -> None:
    for topic in TABLE:
        levels = levels_of(topic, cluster, agent)
        name = topic.name(root, **levels)
        check_topic(name)
        assert [row for row in TABLE if row.parse(name, root) is not None] == [topic]
        assert lookup(name, root) == (topic, levels)


@given(names, names)
def test_a_rows_filter_covers_its_names_and_no_other_rows(cluster: str, agent: str) -> None:
    for topic in TABLE:
        pattern = topic.name(**levels_of(topic, "+", "+"))
        check_filter(pattern)
        covered = [
            row for row in TABLE if topic_matches(pattern.split("/"), row.name(**levels_of(row, cluster, agent)))
        ]
        assert covered == [topic]


@pytest.mark.parametrize(
    "level", ["", "..", ".", "+", "#", "a/b", "a\n", "a\0", " ", "é", "-rf", "$x", "a" * 65, "{cluster}", "%2e"]
)
def test_a_hostile_level_belongs_to_no_row(level: str) -> None:
    for topic in TABLE:
        if "{cluster}" in topic.pattern:
            assert lookup(topic.name(**levels_of(topic, level, "agent"))) is None
        if "{agent}" in topic.pattern:
            assert lookup(topic.name(**levels_of(topic, "cluster", level))) is None


@given(st.text(max_size=60))
def test_any_text_is_looked_up_without_an_error(name: str) -> None:
    for candidate in (name, f"{DEFAULT_ROOT}/{name}", f"{DEFAULT_ROOT}/c/{name}"):
        found = lookup(candidate)
        assert found is None or found[0].name(**found[1]) == candidate


@pytest.mark.parametrize(
    "name",
    [
        "fedhlm/1",
        "fedhlm/1/",
        "fedhlm/2/cloud/status",
        "FEDHLM/1/cloud/status",
        "/fedhlm/1/cloud/status",
        "fedhlm/1/cloud/status/",
        "fedhlm/1//cloud/status",
        "fedhlm/1/cloud/status\n",
        "xfedhlm/1/cloud/status",
        "fedhlm/1/c/x/a/y/status/more",
    ],
)
def test_a_near_miss_belongs_to_no_row(name: str) -> None:
    assert lookup(name) is None


def test_the_table_is_sound() -> None:
    assert len({topic.pattern for topic in TABLE}) == len(TABLE)
    assert {topic.payload for topic in TABLE} == set(get_args(AnyMessage))
    for topic in TABLE:
        assert topic.publishers
        assert topic.subscribers
        # Only state is kept by the broker; a kept request would be answered again after every restart.
        assert topic.retain == (topic.payload in (Presence, Learned, Assignment, Forget, Roster))
        # A lost metric costs nothing, what is lost of the peers' traffic costs a hit, all else a token, a state or an answer.
        assert topic.qos == (0 if topic.payload in (UncertainTokens, VerifiedTokens, MetricsReport) else 1)
        if "agent" in topic.publishers:
            # An agent's own name is in every topic it writes, which is what its access rule is made of.
            assert "{agent}" in topic.pattern


def test_a_message_of_another_row_is_refused() -> None:
    prompt = Prompt(version=SCHEMA_VERSION, sender="client", sequence=0, sent_ms=0, request="r", text="hello")
    assert decode_for(PROMPT, encode(prompt)) == prompt
    with pytest.raises(ProtocolError, match="carries Presence, not Prompt"):
        decode_for(AGENT_STATUS, encode(prompt))
    with pytest.raises(ProtocolError, match="not a message"):
        decode_for(PROMPT, b"\xc1")
