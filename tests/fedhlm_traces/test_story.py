"""Stories of simulated fleets equal what the machines really did, with and without journals, and say what they do not know."""

import random
from collections.abc import Iterable

import msgspec
import pytest

from fedhlm.protocol import topics
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Journal, Output, Prompt, Verdict
from fedhlm_traces.decoded import look
from fedhlm_traces.file import Record
from fedhlm_traces.request import Step, Story
from fedhlm_traces.story import belongs, stories
from fedhlm_traces.story_text import lines
from fedhlm_traces.story_text import told as told_step
from tests.fedhlm_traces.told import DELAY_S, Deed, Told, told

PRESETS = ("exact", "budget", "fedhlm", "hlm", "speculative", "slm-only", "llm-only")


def stories_of(run: Told, records: Iterable[Record] | None = None) -> list[Story]:
    return list(stories(run.records if records is None else records, run.header))


def assert_true(story: Story, deed: Deed) -> None:
    """Ids, sources and latencies are those of the machine."""
    assert [(s.token, s.source) for s in story.steps] == [(f.token.token, f.token.source) for f in deed.facts]
    assert [s.index for s in story.steps] == list(range(len(deed.facts)))
    for step, fact in zip(story.steps, deed.facts, strict=True):
        if fact.answered_s is None or fact.asked_s is None:
            assert step.latency_s is None
        else:  # the recorder sits on the broker: one way later for the block, one way earlier for the verdict
            assert step.latency_s == pytest.approx(fact.answered_s - fact.asked_s - 2 * DELAY_S, abs=1e-6)


def assert_noted(story: Story, deed: Deed) -> None:
    """Drafts, doubts and the gate's decisions are those of the machine."""
    assert story.tau == deed.tau
    for step, fact in zip(story.steps, deed.facts, strict=True):
        judged = fact.judged
        if judged is None:
            assert (step.draft, step.uncertainty, step.escalate) == (None, None, None)
        else:
            assert (step.draft, step.escalate, step.score) == (judged.own, judged.escalate, judged.score)
            assert step.uncertainty == pytest.approx(judged.uncertainty)
            assert step.standing == (None if judged.token == judged.own else judged.token)


@pytest.mark.parametrize("journal", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_story_is_what_the_machine_did(preset: str, journal: bool) -> None:
    run = told(preset, seed=1, journal=journal)
    found = stories_of(run)
    assert len(found) == len(run.deeds) == 9
    assert sum(deed.rollbacks for deed in run.deeds.values()) > 0 or preset in ("slm-only", "llm-only")
    for story in found:
        assert story.prompt is not None
        deed = run.deeds[story.prompt]
        assert story.journal is journal
        assert story.finish in ("length", "stop")
        assert not story.notes
        assert_true(story, deed)


@pytest.mark.parametrize("preset", PRESETS)
def test_with_a_journal_every_token_has_its_doubt_and_the_gates_decision(preset: str) -> None:
    run = told(preset, seed=2, journal=True)
    for story in stories_of(run):
        assert story.prompt is not None
        assert_noted(story, run.deeds[story.prompt])


@pytest.mark.parametrize("preset", ["exact", "budget", "fedhlm", "hlm"])
def test_without_a_journal_drafts_that_went_up_are_those_of_the_machine(preset: str) -> None:
    run = told(preset, seed=3)
    sent = 0
    for story in stories_of(run):
        assert story.prompt is not None
        for step, fact in zip(story.steps, run.deeds[story.prompt].facts, strict=True):
            if step.sent:
                sent += 1
                assert fact.judged is not None
                assert step.draft == fact.judged.token
            if step.uncertainty is not None:
                assert fact.judged is not None
                assert step.uncertainty == pytest.approx(fact.judged.uncertainty)
                assert fact.judged.escalate
    assert sent > 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("journal", [False, True])
def test_over_bad_links_a_story_tells_nothing_that_did_not_happen(seed: int, journal: bool) -> None:
    run = told(
        "exact", seed, journal=journal, faults={"loss": 0.15, "duplicate": 0.3, "reorder": 0.3, "jitter_s": 0.05}
    )
    steps = 0
    for story in stories_of(run):
        if story.prompt is None:
            continue
        facts = run.deeds[story.prompt].facts
        for step in story.steps:
            assert (step.token, step.source) == (facts[step.index].token.token, facts[step.index].token.source)
            assert step.latency_s is None or step.latency_s >= 0.0
            steps += 1
        assert len(story.steps) == len(facts) or story.notes
    assert steps > 100


def test_duplicates_and_retained_repeats_change_no_story() -> None:
    run = told("budget", seed=4)
    rng = random.Random(4)
    doubled = [record for record in run.records for _ in range(rng.choice((1, 2)))]
    assert len(doubled) > len(run.records)
    assert stories_of(run, doubled) == stories_of(run)


def test_a_recording_that_begins_in_the_middle_says_so() -> None:
    run = told("exact", seed=5, prompts=1)
    outputs = [i for i, r in enumerate(run.records) if isinstance(look(r, run.header.root).message, Output)]
    found = stories_of(run, run.records[outputs[len(outputs) // 2] :])
    assert found
    assert any("not in the recording" in note for story in found for note in story.notes)
    for story in found:
        for step in story.steps:
            known = [d.facts[step.index].token.token for d in run.deeds.values() if len(d.facts) > step.index]
            assert step.token in known


def test_a_recording_that_ends_in_the_middle_says_so() -> None:
    run = told("exact", seed=5, prompts=1)
    last = next(
        i for i, r in enumerate(run.records) if isinstance(m := look(r, run.header.root).message, Output) and m.finish
    )
    found = stories_of(run, run.records[:last])
    assert found
    assert all(story.finish is None for story in found)
    assert all("the recording ends before the request does" in story.notes for story in found)


def test_a_lost_piece_of_the_journal_costs_its_sessions_only() -> None:
    run = told("budget", seed=6, journal=True)
    pieces = [i for i, r in enumerate(run.records) if isinstance(look(r, run.header.root).message, Journal)]
    gone = pieces[len(pieces) // 2]
    kept = [r for i, r in enumerate(run.records) if i != gone]
    found = stories_of(run, kept)
    assert {s.journal for s in found} == {True, False}
    for story in found:
        assert story.prompt is not None
        assert_true(story, run.deeds[story.prompt])
        if story.journal:
            assert_noted(story, run.deeds[story.prompt])


def test_a_cloud_that_forgets_sessions_changes_no_story() -> None:
    run = told("exact", seed=11, sessions_max=1)
    primes = [
        r for r in run.records if isinstance(m := look(r, run.header.root).message, Escalation) and m.epoch and m.prime
    ]
    assert primes
    for story in stories_of(run):
        assert story.prompt is not None
        assert_true(story, run.deeds[story.prompt])


def test_a_request_refused_while_another_is_served_is_a_story_of_its_own() -> None:
    run = told("exact", seed=7, prompts=1)
    topic = topics.OUTPUT.name(cluster="c0", agent="ann", client="client")
    at = next(i for i, r in enumerate(run.records) if r.topic == topics.VERDICT.name(cluster="c0", agent="ann"))
    stamp = {"version": SCHEMA_VERSION, "sender": "ann", "sequence": 9_999, "sent_ms": 1}
    refusal = Output(**stamp, request="later", position=0, ids=(), sources=(), text="", finish="error", error="busy")  # type: ignore[arg-type]
    before = run.records[at]
    record = msgspec.structs.replace(before, topic=topic, payload=encode(refusal))
    found = stories_of(run, [*run.records[:at], record, *run.records[at:]])
    by_request = {story.request: story for story in found}
    assert (by_request["later"].finish, by_request["later"].error, by_request["later"].steps) == ("error", "busy", [])
    assert [s for s in found if s.request != "later"] == stories_of(run)


def test_what_belongs_to_a_story_is_what_its_session_and_request_say() -> None:
    run = told("budget", seed=8)
    story = next(s for s in stories_of(run) if s.agent == "bob" and s.session is not None)
    seen = [s for s in (look(r, run.header.root) for r in run.records) if belongs(s, story)]
    assert {s.message.request for s in seen if isinstance(s.message, Prompt | Output)} == {story.request}
    assert {s.message.session for s in seen if isinstance(s.message, Verdict)} == {story.session}
    assert {s.agent for s in seen if s.agent} == {"bob"}


def test_foreign_and_broken_messages_do_not_disturb() -> None:
    run = told("exact", seed=9, prompts=1)
    foreign = topics.OUTPUT.name(cluster="c0", agent="ann", client="client")
    noise = [
        Record(0.0, 0, "else/where", b"\xff"),
        Record(0.0, 0, topics.VERDICT.name(cluster="c0", agent="ann"), b"\xc1"),
        Record(0.0, 0, foreign, encode(look(run.records[0], "fedhlm/1").message)),  # type: ignore[arg-type]
    ]
    mixed = [
        r for record in run.records for r in (record, *(msgspec.structs.replace(n, at_s=record.at_s) for n in noise))
    ]
    assert stories_of(run, mixed) == stories_of(run)


TEXTS = {17: " oil", 18: " crude"}
SPOKEN = [
    (
        Step(
            index=17,
            token=18,
            source="cloud",
            at_s=0,
            draft=17,
            uncertainty=0.41,
            escalate=True,
            sent=True,
            latency_s=0.084,
        ),
        "token 17 ' oil' drafted u=.41, escalated, replaced by ' crude' by cloud, 84 ms",
    ),
    (
        Step(index=3, token=17, source="local", at_s=0, draft=17, uncertainty=0.1, escalate=False),
        "token 3 ' oil' drafted u=.1, kept",
    ),
    (Step(index=0, token=17, source="local", at_s=0), "token 0 ' oil', kept"),
    (
        Step(index=3, token=17, source="local", at_s=0, draft=17, target_prob=0.25, missed=True),
        "token 3 ' oil' drafted, kept, scored later: cloud would have written another, p=.25",
    ),
    (
        Step(
            index=4,
            token=17,
            source="cloud",
            at_s=0,
            draft=17,
            uncertainty=0.1,
            escalate=False,
            sent=True,
            latency_s=0.02,
        ),
        "token 4 ' oil' drafted u=.1, sent along, accepted by cloud, 20 ms",
    ),
    (
        Step(index=4, token=17, source="cloud", at_s=0, draft=17, sent=True, latency_s=0.02),
        "token 4 ' oil' drafted, sent up, accepted by cloud, 20 ms",
    ),
    (Step(index=5, token=18, source="cloud", at_s=0, latency_s=1.5), "token 5 ' crude', written by cloud, 1500 ms"),
    (
        Step(
            index=6, token=18, source="peer", at_s=0, draft=17, standing=18, uncertainty=0.5, escalate=False, score=0.03
        ),
        "token 6 ' oil' drafted u=.5, ' crude' proposed by peers at similarity .97, adopted",
    ),
    (
        Step(index=7, token=17, source="unverified", at_s=0, draft=17, uncertainty=1.0, escalate=True),
        "token 7 ' oil' drafted u=1, doubted, committed unverified: no answer in time",
    ),
    (
        Step(index=8, token=99, source="neighbour", at_s=0, latency_s=0.01),
        "token 8 99, written by a neighbour cluster, 10 ms",
    ),
]


@pytest.mark.parametrize(("step", "words"), SPOKEN)
def test_a_step_in_words(step: Step, words: str) -> None:
    assert told_step(step, TEXTS.get) == words


def test_a_story_in_words_has_a_line_for_each_token_and_note() -> None:
    run = told("budget", seed=10, prompts=1)
    for story in stories_of(run):
        spoken = list(lines(story))
        assert len(spoken) == 1 + len(story.notes) + len(story.steps)
        assert story.request in spoken[0]
