"""The accounts add up: topics, clusters and agents sum to the totals, and tokens and uplink bytes are the agents' own."""

import random

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm.bus.interface import ProtocolVersion, publish_wire_bytes
from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Output, Verdict
from fedhlm_traces.decoded import look, protocol_of
from fedhlm_traces.file import Header, Record
from fedhlm_traces.stats import FOREIGN, Accounting, Latencies, Row, Statistics, statistics
from fedhlm_traces.stats_text import lines_of
from tests.fedhlm_traces.told import AGENTS, DELAY_S, Told, told

HEADER = Header(created_ms=0, source="simulator")


@pytest.fixture(scope="module")
def run() -> Told:
    return told("budget", seed=1)


def counted(records: list[Record], protocol: ProtocolVersion = "5") -> Statistics:
    return statistics(records, HEADER, protocol=protocol)


def retained(record: Record) -> bool:
    row = look(record, HEADER.root).topic
    return row is not None and row.retain


def test_topics_sum_to_the_totals(run: Told) -> None:
    found = counted(run.records)
    for name in Row.__struct_fields__:
        assert sum(getattr(row, name) for row in found.topics.values()) == getattr(found.total, name)
    assert found.total.messages == len(run.records)
    assert found.total.payload_bytes == sum(len(r.payload) for r in run.records)


def test_agents_sum_to_clusters_and_those_to_the_totals(run: Told) -> None:
    found = counted(run.records)
    for name in ("tokens", "escalations", "uplink_bytes", "verdicts"):
        assert sum(getattr(p, name) for p in found.clusters.values()) == getattr(found.total, name) > 0
        for cluster, party in found.clusters.items():
            agents = [found.agents[agent] for home, agent in AGENTS if home == cluster]
            assert sum(getattr(a, name) for a in agents) == getattr(party, name)


def test_tokens_sources_and_uplink_bytes_are_those_of_the_agents(run: Told) -> None:
    found = counted(run.records)
    facts = [fact for deed in run.deeds.values() for fact in deed.facts]
    assert found.requests == len(run.deeds)
    assert found.total.tokens == len(facts)
    sources = [fact.token.source for fact in facts]
    assert found.total.tokens_by_source == {source: sources.count(source) for source in set(sources)}
    assert found.total.uplink_bytes == found.uplink_bytes_reported > 0
    assert found.uplink_bytes_per_token == found.total.uplink_bytes / len(facts)
    assert found.uplink_messages_per_token == found.total.escalations / len(facts)


def test_bytes_are_those_of_the_senders_packets_whatever_the_recorder_asked_for(run: Told) -> None:
    asked = [msgspec.structs.replace(r, qos=0) for r in run.records]
    assert counted(asked) == counted(run.records)
    block = next(r for r in run.records if isinstance(look(r, HEADER.root).message, Escalation))
    expected = publish_wire_bytes(block.topic, len(block.payload), qos=1, expiry_s=30.0)
    assert counted([block]).total.uplink_bytes == expected
    older = publish_wire_bytes(block.topic, len(block.payload), qos=1, protocol="3.1.1")
    assert counted([block], "3.1.1").total.uplink_bytes == older < expected


def test_the_mqtt_version_shows_in_the_first_escalation(run: Told) -> None:
    recorded = msgspec.structs.replace(HEADER, source="mqtt://broker:1883")
    expiring = [msgspec.structs.replace(r, properties={"expiry_s": 20}) for r in run.records]
    assert protocol_of(expiring, recorded) == "5"
    assert protocol_of(run.records, recorded) == "3.1.1"
    assert protocol_of(run.records, HEADER) == "5", "a simulated bus has no properties, and speaks MQTT 5"
    assert protocol_of(expiring, msgspec.structs.replace(recorded, facts={"protocol": "3.1.1"})) == "3.1.1"
    assert protocol_of([], recorded) == "5"


def test_what_came_twice_is_traffic_twice_but_no_second_token(run: Told) -> None:
    rng = random.Random(1)
    twice = [r for r in run.records if not retained(r) and rng.random() < 0.3]
    doubled = sorted([*run.records, *twice], key=lambda r: r.at_s)
    once, both = counted(run.records), counted(doubled)
    assert once.total.duplicates == 0
    assert both.total.duplicates == len(twice)
    assert both.total.messages == once.total.messages + len(twice)
    for name in ("tokens", "tokens_by_source", "escalations", "uplink_bytes", "verdicts"):
        assert getattr(both.total, name) == getattr(once.total, name)
    assert both.uplink_bytes_reported == once.uplink_bytes_reported


def test_retained_state_that_comes_again_is_no_duplicate(run: Told) -> None:
    again = [r for r in run.records if retained(r)]
    assert again
    assert counted([*run.records, *again]).total.duplicates == 0


def test_refused_payloads_are_counted_where_they_came(run: Told) -> None:
    output = topics.OUTPUT.name(cluster="c0", agent="ann", client="client")
    forged = next(
        r.payload for r in run.records if r.topic == topics.OUTPUT.name(cluster="c1", agent="cid", client="client")
    )
    bad = [Record(1.0, 0, output, b"\xc1"), Record(1.0, 0, output, forged), Record(1.0, 0, "else/where", b"\xc1")]
    found = counted([*run.records, *bad])
    assert found.total.refused == found.topics[topics.OUTPUT.pattern].refused == found.agents["ann"].refused == 2
    assert found.topics[FOREIGN].messages == 1
    assert found.total.tokens == counted(run.records).total.tokens


def test_a_verdicts_latency_is_from_the_first_sending_of_its_block() -> None:
    stamp = {"version": SCHEMA_VERSION, "sender": "ann", "sent_ms": 0}
    block = Escalation(**stamp, sequence=1, session=1, epoch=0, base=3, ids=b"", patience_ms=1)  # type: ignore[arg-type]
    again = msgspec.structs.replace(block, sequence=2)
    verdict = Verdict(**stamp, sequence=3, session=1, epoch=0, base=3, status="settled")  # type: ignore[arg-type]
    up, down = topics.ESCALATE.name(cluster="c0", agent="ann"), topics.VERDICT.name(cluster="c0", agent="ann")
    records = [
        Record(1.0, 0, up, encode(block)),
        Record(1.5, 0, up, encode(again)),
        Record(2.0, 0, down, encode(verdict)),
        Record(9.0, 0, down, encode(msgspec.structs.replace(verdict, sequence=4))),
    ]
    total = counted(records).total
    assert (total.escalations, total.verdicts) == (2, 1)
    assert total.verdict_p50_ms == pytest.approx(1000.0, rel=0.01)


def test_latencies_of_a_calm_fleet_are_at_least_those_of_its_links(run: Told) -> None:
    total = counted(run.records).total
    assert total.verdict_p50_ms is not None
    assert total.verdict_p99_ms is not None
    assert 2 * DELAY_S * 1000.0 * 0.99 <= total.verdict_p50_ms <= total.verdict_p99_ms


@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_quantiles_are_right_to_one_percent(times: list[float], share: float) -> None:
    latencies = Latencies()
    for time in times:
        latencies.see(time)
    found = latencies.quantile_ms(share)
    expected = 1000.0 * float(np.quantile(times, share, method="inverted_cdf"))
    assert found == pytest.approx(expected, rel=0.0101)


def test_an_empty_recording_has_nothing_to_divide_by() -> None:
    found = counted([])
    assert (found.total.messages, found.duration_s, found.messages_per_s) == (0, 0.0, None)
    assert (found.bytes_per_token, found.uplink_bytes_per_token, found.total.verdict_p99_ms) == (None, None, None)
    assert any("verdict latency" in line for line in lines_of(found))


def test_memory_does_not_grow_with_blocks_that_nobody_answers() -> None:
    accounting = Accounting(HEADER.root)
    topic = topics.ESCALATE.name(cluster="c0", agent="ann")
    block = Escalation(
        version=SCHEMA_VERSION, sender="ann", sequence=0, sent_ms=0, session=1, epoch=0, base=3, ids=b"", patience_ms=1
    )
    for number in range(70_000):
        payload = encode(msgspec.structs.replace(block, sequence=number, session=number))
        accounting.add(Record(float(number), 0, topic, payload))
    assert len(accounting._asked) <= 65_536
    assert len(accounting._recent._known) <= 65_536
    assert accounting.result().total.escalations == 70_000


def test_the_table_shows_every_topic_cluster_and_agent(run: Told) -> None:
    found = counted(run.records)
    text = "\n".join(lines_of(found))
    for name in (*found.topics, *found.clusters, *found.agents, "total"):
        assert f"\n{name} " in text
    assert f"{found.total.uplink_bytes:,}" in text
    outputs = [m for r in run.records if isinstance(m := look(r, HEADER.root).message, Output)]
    assert f"{sum(len(m.ids) for m in outputs):,}" in text
