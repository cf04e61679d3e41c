"""The judge accepts what MQTT may do to a true answer, and finds every way of tampering with one."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fedhlm.protocol.messages import SCHEMA_VERSION, Output, Sampling
from fedhlm_fleet.chaos.invariants import (
    Disturbances,
    GrowthLimits,
    RequestStory,
    fresh,
    log_violations,
    memory_violations,
    unanswered,
)

HEALTHY = frozenset({"cloud"})
WORDS = [f" w{i}" for i in range(10)]


def story(tokens: int, **options: Any) -> RequestStory:
    return RequestStory(
        request="r0", agent="porch", prompt="p", sampling=Sampling(1), max_tokens=tokens, asked_s=0.0, **options
    )


def answer(sizes: list[int], source: str = "cloud") -> list[Output]:
    """An agent's messages for one request, `sizes` tokens in each, and the end."""
    starts = [0, *accumulate(sizes)]
    ids = [n % 10 for n in range(starts[-1])]
    told = {f"tokens_{source}": float(len(ids)), "wall_s": 1.0} if ids else {"wall_s": 1.0}
    sources: Any = (source,)
    common: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "porch", "sent_ms": 0, "request": "r0"}
    parts = [
        Output(
            **common,
            sequence=n,
            position=start,
            ids=tuple(ids[start : start + size]),
            sources=sources * size,
            text="".join(WORDS[i] for i in ids[start : start + size]),
        )
        for n, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    end = Output(
        **common,
        sequence=len(sizes),
        position=starts[-1],
        ids=(),
        sources=(),
        text="",
        finish="length",
        statistics=told,
    )
    return [*parts, end]


def heard(outputs: list[Output], tokens: int, *, may_miss: bool = False) -> RequestStory:
    told = story(tokens)
    for number, output in enumerate(outputs):
        told.take(output, float(number), may_miss=may_miss)
    return told


def rules(told: RequestStory) -> set[str]:
    return {violation.rule for violation in told.violations}


sizes = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@given(sizes=sizes, data=st.data())
def test_a_true_answer_with_duplicates_is_accepted_and_read_whole(sizes: list[int], data: st.DataObject) -> None:
    outputs = answer(sizes)
    sent: list[Output] = []
    for number, output in enumerate(outputs):
        sent.append(output)
        # A link that broke sends what was under way again, from some message on.
        sent += outputs[data.draw(st.integers(0, number + 1)) : number + 1]
    told = heard(sent, sum(sizes))
    assert told.violations == []
    assert [told.tokens[p].token for p in range(sum(sizes))] == [n % 10 for n in range(sum(sizes))]
    assert told.text == "".join(o.text for o in outputs)
    assert told.duplicates == len(sent) - len(outputs)
    assert told.finish == "length"


def _without(outputs: list[Output], number: int) -> list[Output]:
    return outputs[:number] + outputs[number + 1 :]


def _swapped(outputs: list[Output], number: int) -> list[Output]:
    return [*outputs[:number], outputs[number + 1], outputs[number], *outputs[number + 2 :]]


def _altered(outputs: list[Output], number: int, **fields: Any) -> list[Output]:
    return [*outputs[: number + 1], replace(outputs[number], **fields), *outputs[number + 1 :]]


# All have messages of 2 tokens; number 1 is in the middle, 3 is the end.
TAMPERED: dict[str, tuple[Callable[[list[Output]], list[Output]], set[str]]] = {
    "a lost message": (lambda o: _without(o, 1), {"gap", "statistics"}),
    "a lost first message": (lambda o: _without(o, 0), {"gap", "statistics"}),
    "two messages out of order": (lambda o: _swapped(o, 0), {"gap", "repeated", "changed"}),
    "another id under the same number": (lambda o: _altered(o, 1, ids=(7, 7)), {"changed"}),
    "another source under the same number": (lambda o: _altered(o, 1, sources=("local", "cloud")), {"changed"}),
    "another text under the same number": (lambda o: _altered(o, 1, text="lies"), {"changed"}),
    "another end under the same number": (lambda o: _altered(o, 1, finish="stop"), {"changed"}),
    "the same tokens twice": (lambda o: _altered(o, 1, sequence=99), {"repeated"}),
    "another id in a message of its own": (lambda o: _altered(o, 1, sequence=99, ids=(7, 7)), {"changed"}),
    "another source in a message of its own": (
        lambda o: _altered(o, 1, sequence=99, sources=("local", "local")),
        {"changed"},
    ),
    "a token put between": (
        lambda o: _altered(o, 1, sequence=99, position=4, ids=(7,), sources=("cloud",), text="x"),
        {"changed", "repeated"},
    ),
    "fewer sources than ids": (lambda o: [replace(o[0], sources=("cloud",)), *o[1:]], {"malformed"}),
    "an early end": (lambda o: [*o[:2], replace(o[3], position=4), o[2]], {"length", "statistics", "after the end"}),
    "a token after the end": (
        lambda o: [*o, replace(o[0], sequence=99, position=6)],
        {"after the end"},
    ),
    "a second end": (lambda o: [*o, replace(o[3], sequence=99)], {"after the end"}),
    "an error": (lambda o: [*o[:3], replace(o[3], finish="error", error="no")], {"failed"}),
    "too many tokens": (
        lambda o: [*o[:3], replace(o[0], sequence=99, position=6), replace(o[3], position=8)],
        {"length", "statistics"},
    ),
    "other statistics": (lambda o: [*o[:3], replace(o[3], statistics={"tokens_cloud": 5.0})], {"statistics"}),
    "a source that is not counted": (
        lambda o: [*o[:3], replace(o[3], statistics={"tokens_cloud": 6.0, "tokens_local": 1.0})],
        {"statistics"},
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found(name: str) -> None:
    tamper, possible = TAMPERED[name]
    found = rules(heard(tamper(answer([2, 2, 2])), 6))
    assert found
    assert found <= possible | {"gap"}


def test_the_cases_of_tampering_cover_every_rule_of_a_story() -> None:
    found = set().union(*(rules(heard(tamper(answer([2, 2, 2])), 6)) for tamper, _ in TAMPERED.values()))
    assert found == {
        "gap", "changed", "repeated", "malformed", "after the end", "failed", "length", "statistics"
    }  # fmt: skip


@given(sizes=sizes, data=st.data())
def test_holes_are_excused_only_where_the_broker_died(sizes: list[int], data: st.DataObject) -> None:
    outputs = answer(sizes)
    lost = data.draw(st.sets(st.integers(0, len(sizes) - 1)))
    kept = [o for n, o in enumerate(outputs) if n not in lost]
    excused, strict = (heard(kept, sum(sizes), may_miss=may) for may in (True, False))
    lost_tokens = any(sizes[n] for n in lost)
    assert excused.violations == []
    assert excused.torn == lost_tokens
    assert ("gap" in rules(strict)) == lost_tokens


def test_what_comes_for_a_killed_agents_request_is_another_lifes_business() -> None:
    told = heard(answer([2, 2])[:1], 4)
    told.agent_killed, told.given_up = True, "its agent was killed"
    for output in answer([1, 3]):
        assert told.take(replace(output, sequence=50 + output.sequence), 9.0, may_miss=False) == []
    assert told.violations == []
    assert not told.open


def test_a_story_given_up_is_still_judged() -> None:
    told = heard(answer([2, 2])[:1], 4)
    told.given_up = "a fault may have lost it"
    told.take(replace(answer([2, 2])[1], position=3), 9.0, may_miss=False)
    assert rules(told) == {"gap"}


def test_only_from_looks_at_what_was_lost_as_well() -> None:
    outputs = answer([2, 2, 2])
    assert heard(outputs, 6).only_from(HEALTHY)
    assert not heard(answer([2, 2, 2], "local"), 6).only_from(HEALTHY)
    torn = heard(_without(outputs, 1), 6, may_miss=True)
    assert torn.only_from(HEALTHY)
    doubtful = [
        *outputs[:1],
        outputs[2],
        replace(outputs[3], statistics={"tokens_cloud": 4.0, "tokens_unverified": 2.0}),
    ]
    assert not heard(doubtful, 6, may_miss=True).only_from(HEALTHY)
    assert not heard(_without(outputs, 1)[:2], 6, may_miss=True).only_from(HEALTHY)


def test_open_stories_are_unanswered() -> None:
    ended, gone, waiting = heard(answer([1]), 1), story(1, given_up="why"), story(1)
    assert [v.rule for v in unanswered([ended, gone, waiting])] == ["unanswered"]


def test_fresh_requests_are_whole_and_from_the_cloud() -> None:
    assert fresh([heard(answer([2, 2]), 4)], HEALTHY) == []
    assert {v.rule for v in fresh([heard(answer([2, 2])[:1], 4)], HEALTHY)} == {"unanswered"}
    assert {v.rule for v in fresh([heard(answer([2, 2], "unverified"), 4)], HEALTHY)} == {"not recovered"}
    assert {v.rule for v in fresh([heard(_without(answer([2, 2]), 0), 4, may_miss=True)], HEALTHY)} == {"not recovered"}


def test_an_excuse_lasts_from_the_fault_until_the_agent_is_heard_after_it() -> None:
    d = Disturbances()
    assert not d.since("a", 0.0)
    d.begin(["a"], 10.0)
    d.heard("a", 11.0)  # still being disturbed
    assert d.since("a", 9.0)
    d.heal(["a"], 12.0)
    assert d.since("a", 13.0), "not heard since"
    d.heard("a", 14.0)
    assert d.since("a", 13.0)
    assert not d.since("a", 14.5)
    assert not d.since("b", 0.0)
    d.begin(["a"], 20.0)
    d.heal(["a"], 21.0)
    d.begin(["a"], 22.0)  # the next fault before it was heard
    d.heard("a", 23.0)
    assert d.since("a", 24.0)


@pytest.mark.parametrize(
    "line",
    [
        "Traceback (most recent call last):",
        "2026-01-01T00:00:00.000 ERROR   cloud cloud_verifier.service: the model failed",
        "Task exception was never retrieved",
        "sys:1: RuntimeWarning: coroutine 'x' was never awaited",
        "Exception ignored in: <function f>",
        "Fatal Python error: Segmentation fault",
    ],
)
def test_a_log_that_tells_of_an_unhandled_error_is_a_violation(line: str) -> None:
    assert [v.rule for v in log_violations("cloud", f"before\n{line}\n  after\n")] == ["log"]


def test_what_a_healthy_part_may_log_is_none() -> None:
    text = (
        "2026-01-01T00:00:00.000 WARNING agent fedhlm.bus.mqtt: MqttBus: no link, trying again: timed out\n"
        "2026-01-01T00:00:00.000 INFO    agent fedhlm.bus.mqtt: errors are counted\n"
    )
    assert log_violations("agent", text) == []


def test_memory_is_bounded_and_settles() -> None:
    limits = GrowthLimits(ceiling=1_000, growth=100, settle_s=10.0)
    settled = [(float(t), min(500, 50 * t)) for t in range(100)]
    assert memory_violations("x", settled, limits) == []
    assert memory_violations("x", settled[:5], limits) == []
    assert memory_violations("x", [], limits) == []
    peak = [(t, 1_001 if t == 50 else size) for t, size in settled]
    assert [v.text.partition(" must")[0] for v in memory_violations("x", peak, limits)] == ["resident memory"]
    leak = [(float(t), 500 + 2 * t) for t in range(100)]
    assert ["growth from" in v.text for v in memory_violations("x", leak, limits)] == [True]
    spike_at_the_end = [*settled[:-1], (99.0, 900)]
    assert memory_violations("x", spike_at_the_end, limits) == []
