"""Audits ride in messages that go up anyway, are scored as the truth has it, and end even where nobody answers."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from edge_agent.accounts import OpenText
from edge_agent.audits import ANSWER_S, FULL, OPEN_MAX, RIDERS_BYTES, TRIES, WAIT_S, Audit, Audits
from edge_agent.core import AgentCore
from edge_agent.events import Answered, Tail, Token
from edge_agent.measures import Measures
from edge_agent.result import GenerationResult, Job
from fedhlm.config import load
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.protocol.messages import Escalation, Hints, Rider, Sampling
from fedhlm.protocol.packing import pack_ids
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet
from fedhlm_lab.studies.compare import nobody
from fedhlm_lab.studies.coverage import errors_of

CONFIG = load(preset="budget", environ={}, flags={"generation.audit": "1.0", "generation.threshold": "fixed"}).config
KEEPS_ALL = {"generation.audit": "1.0", "generation.threshold": "fixed", "generation.tau": "1.0"}
KEEPS_MOST = {**KEEPS_ALL, "generation.tau": "0.9"}
KEEPS_NONE = {"generation.audit": "0.0", "generation.threshold": "fixed", "generation.tau": "0.0"}


def audit(session: int, *tokens: int, due_s: float = WAIT_S, primed: bool = True) -> Audit:
    tail = Tail(2, (5, 6, 7), primed, tuple(Token(t, 0.5, 0.1, b"", False, 0.0, b"", t) for t in tokens))
    text = OpenText("m", 10, [], len(tokens), 1.0)
    sampling = Sampling(1)
    return Audit(
        session, tail, text, CONFIG.generation, Measures("m", "p"), sampling, None, COUPLINGS["gumbel"].harm, due_s
    )


def answer(*probs: float, base: int = 3, accepted: int | None = None, missed: tuple[bool, ...] = ()) -> Answered:
    return Answered(2, base, len(probs) if accepted is None else accepted, [], list(probs), "cloud", list(missed))


def test_an_audit_goes_up_once_with_the_next_message_and_ends_with_its_verdict() -> None:
    audits = Audits(toy.FINGERPRINT)
    audits.wait(audit(1, 8, 9))
    assert audits.wake_s() == WAIT_S
    (sent,) = audits.riders(10.0)
    rider = sent.rider(toy.FINGERPRINT)
    assert (rider.session, rider.epoch, rider.base, rider.fixed) == (1, 2, 3, 2)
    assert isinstance(rider.before, int)
    assert audits.riders(11.0) == []
    assert audits.answered(2, answer(0.5, 0.5)) is None
    ended = audits.answered(1, answer(0.5, 0.5, missed=(False, True)))
    assert ended is sent
    assert [ended.scores[i].committed_harm for i in (0, 1)] == [0.0, 1.0]
    assert all(ended.scores[i].audit and ended.scores[i].skipped for i in (0, 1))
    assert len(audits) == 0


def test_a_verdict_on_a_part_of_the_tail_is_kept_until_the_rest_is_scored() -> None:
    audits = Audits(toy.FINGERPRINT)
    audits.wait(audit(1, 8, 9, 10))
    assert audits.answered(1, answer(0.9, 0.5, 0.5, base=2)) is None  # one token before the tail, two of it
    assert audits.answered(1, answer(0.1, base=5, missed=(True,))) is not None


def test_what_peers_say_is_no_audit() -> None:
    audits = Audits(toy.FINGERPRINT)
    audits.wait(audit(1, 8))
    assert audits.answered(1, answer(0.5)._replace(source="peer")) is None
    assert len(audits) == 1


def test_a_cloud_that_lost_the_session_gets_the_whole_context() -> None:
    audits = Audits(toy.FINGERPRINT)
    audits.wait(audit(1, 8))
    audits.riders(0.0)
    audits.unprimed(1)
    (again,) = audits.riders(1.0)
    assert not isinstance(again.rider(toy.FINGERPRINT).before, int)


def test_what_nothing_carries_goes_up_alone_and_is_given_up_after_a_few_tries() -> None:
    audits, now, alone = Audits(toy.FINGERPRINT), 0.0, 0
    audits.wait(audit(1, 8))
    for _ in range(100):
        now = audits.wake_s()
        due, given_up = audits.overdue(now)
        if given_up:
            break
        assert due
        alone += 1
        assert [a.session for a in audits.riders(now)] == [1]
    assert alone == TRIES
    assert now == pytest.approx(WAIT_S + TRIES * ANSWER_S)
    assert audits.wake_s() == float("inf")


def test_the_oldest_is_given_up_where_too_many_wait() -> None:
    audits = Audits(toy.FINGERPRINT)
    given_up = [lost.session for number in range(OPEN_MAX + 3) for lost in audits.wait(audit(number, 8))]
    assert given_up == [0, 1, 2]


@pytest.mark.parametrize(("prompt", "together"), [(3, 64), (80, 64), (1_000, 7), (30_000, 1)])
def test_a_message_for_audits_alone_carries_as_many_as_fit(prompt: int, together: int) -> None:
    """One-token answers, each with its whole prompt: by their size on the wire, at least one and at most 16 KiB."""
    audits = Audits(toy.FINGERPRINT)
    for number in range(FULL):
        one = audit(number, 8, primed=False)
        one.tail = one.tail._replace(context=(5,) * prompt)
        audits.wait(one)
    assert audits.full
    sent = audits.riders(0.0, alone=True)
    size = sum(len(msgspec.msgpack.encode(a.rider(toy.FINGERPRINT))) for a in sent)
    assert size <= RIDERS_BYTES or len(sent) == 1
    assert len(sent) == together
    assert len(audits.riders(1.0, alone=True)) == min(len(sent), FULL - len(sent))


@pytest.mark.parametrize(("answers", "chance"), [(33, 0.25), (100, 0.25), (400, 0.05)])
def test_what_is_audited_between_two_blocks_of_short_answers_rides_in_the_second(answers: int, chance: float) -> None:
    """A device that keeps 97 of 100 answers has few messages; audits that waited for more of them came ever later."""
    audits = Audits(toy.FINGERPRINT)
    number = 0
    for block in range(20):
        for _ in range(round(answers * chance)):
            audits.wait(audit(number, 8, due_s=1e9))
            number += 1
        sent = audits.riders(float(block))
        assert len(sent) == round(answers * chance)
        for one in sent:
            assert audits.answered(one.session, answer(0.5)) is one
    assert len(audits) == 0


def test_an_escalation_and_its_riders_are_blocks_of_their_own_at_the_edge() -> None:
    rider = Rider(9, 3, 4, pack_ids([1, 2], 50), 2, 77)
    header: dict[str, Any] = {"version": 3, "sender": "a", "sequence": 1, "sent_ms": 1}
    block = Escalation(
        **header, session=1, epoch=0, base=2, ids=pack_ids([5], 50), patience_ms=5, hints=Hints(riders=(rider,))
    )
    alone, other = block.parts()
    assert alone == Escalation(**header, session=1, epoch=0, base=2, ids=pack_ids([5], 50), patience_ms=5)
    assert (other.session, other.epoch, other.base, other.ids, other.fixed, other.digest) == (9, 3, 4, rider.ids, 2, 77)
    assert (other.extend, other.laws, other.hints) == (0, b"", None)
    assert alone.parts() == (alone,)


# On the bus, in virtual time


def lived(work: Callable[[Fleet, AgentCore], Awaitable[None]], *, sessions_max: int = 64) -> None:
    async def main() -> None:
        fleet = Fleet(toy.pair(0.8), seed=1, clusters=1, delay_s=0.02, sessions_max=sessions_max)
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(1.0)
        async with fleet.online("c0", "a", fleet.pair.drafter()) as agent:
            await work(fleet, agent)
        for node in fleet.nodes.values():
            await node.crash()

    run_virtual(main())


async def write(agent: AgentCore, seed: int, flags: dict[str, str], tokens: int = 12) -> tuple[GenerationResult, int]:
    """One text, and how many of its kept tokens are wrong."""
    config = load(preset="budget", environ={}, flags=flags).config.generation
    sampling = Sampling(seed, 0.8, 1.0, config.coupling)
    prompt = [5, 6, 7 + seed % 5]
    result = await agent.generate(Job(config, sampling, tokens, toy.CONTEXT, frozenset()), prompt, nobody)
    return result, errors_of(prompt, sampling, result)


@pytest.mark.parametrize("sessions_max", [64, 1])
def test_audits_cost_no_message_where_others_go_up_and_find_the_truth(sessions_max: int) -> None:
    """Also where the cloud has dropped the session meanwhile."""

    async def work(fleet: Fleet, agent: AgentCore) -> None:
        wrong = tokens = 0
        for seed in range(30):
            result, errors = await write(agent, seed, KEEPS_MOST)
            wrong, tokens = wrong + errors, tokens + len(result.ids)
        while len(agent.auditor.audits):
            await write(agent, 999, KEEPS_NONE)
            await asyncio.sleep(1.0)
        (known,) = agent.learner._certificates.values()
        counted = fleet.counters.snapshot()
        assert counted["audits"] > 3
        assert counted.get("audit_messages", 0) == counted.get("lost_audits", 0) == 0
        assert known.tokens == tokens
        assert known.estimate * known.tokens == pytest.approx(wrong)

    lived(work, sessions_max=sessions_max)


def test_a_device_that_keeps_everything_is_audited_by_messages_of_its_own() -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> None:
        wrong = 0
        for seed in range(3):
            wrong += (await write(agent, seed, KEEPS_ALL))[1]
        await asyncio.sleep(WAIT_S + 5.0)
        (known,) = agent.learner._certificates.values()
        counted = fleet.counters.snapshot()
        assert (counted["audits"], counted["audit_messages"]) == (3, 1)
        assert known.estimate * known.tokens == pytest.approx(wrong)

    lived(work)


def test_many_short_answers_lose_no_audit_and_share_their_messages() -> None:
    """A device that keeps nearly everything sends its audits together, before any is given up."""

    async def work(fleet: Fleet, agent: AgentCore) -> None:
        wrong = 0
        for seed in range(150):
            wrong += (await write(agent, seed, KEEPS_ALL, tokens=1))[1]
            await asyncio.sleep(0.1)
        await asyncio.sleep(WAIT_S + 5.0)
        (known,) = agent.learner._certificates.values()
        counted = fleet.counters.snapshot()
        assert (counted["audits"], counted.get("lost_audits", 0), known.texts) == (150, 0, 150)
        assert counted["audit_messages"] <= 150 / FULL + 1
        assert known.estimate * known.tokens == pytest.approx(wrong)

    lived(work)


def test_audits_delay_no_block_so_long_that_it_is_sent_again() -> None:
    """Questions with long prompts, all audited, one right after the other: the cloud answers blocks before audits."""

    async def work(fleet: Fleet, agent: AgentCore) -> None:
        config = load(preset="budget", environ={}, flags=KEEPS_MOST).config.generation
        rng = random.Random(1)
        messages = escalated = 0
        for seed in range(120):
            prompt = [rng.randrange(1, toy.VOCAB_SIZE) for _ in range(240)]
            sampling = Sampling(seed, 0.8, 1.0, config.coupling)
            result = await agent.generate(Job(config, sampling, 1, toy.CONTEXT, frozenset()), prompt, nobody)
            messages, escalated = messages + result.uplink_messages, escalated + result.escalated
        counted = fleet.counters.snapshot()
        assert counted["audits"] > 20
        assert (counted.get("retries", 0), messages) == (0, escalated)

    lived(work)


def test_tokens_written_without_a_link_are_scored_when_it_is_back() -> None:
    async def work(fleet: Fleet, agent: AgentCore) -> None:
        for node in fleet.nodes.values():
            await node.crash()
        result, errors = await write(agent, 1, {"generation.deadline_ms": "1000"})
        assert "unverified" in result.sources
        for node in fleet.nodes.values():
            node.start()
        await asyncio.sleep(WAIT_S + TRIES * ANSWER_S)
        (known,) = agent.learner._certificates.values()
        assert fleet.counters.snapshot()["audits"] == 1
        assert known.estimate * known.tokens == pytest.approx(errors)

    lived(work)
