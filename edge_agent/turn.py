"""A running generation: its state, and the source of its events."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from edge_agent.events import Committed, Drafted, Event, Judged, Plan, Tick
from edge_agent.generation import GenerationMachine, Tally
from edge_agent.model import Drawn
from edge_agent.profile import PromptSample
from edge_agent.result import GenerationResult, Job
from fedhlm.bus.party import Party
from fedhlm.protocol import topics
from fedhlm.protocol.fields import FinishReason, Pair
from fedhlm.protocol.messages import Escalation
from fedhlm.telemetry import Counters, warn_once

log = logging.getLogger(__name__)

CLOSE_S: Final = 20.0  # seconds for which the end of a session is worth its delivery

NextEvent = Callable[[asyncio.Queue[Event], float], Awaitable[Event]]
"""Waits for the next event of a generation, or until a Tick is due."""


async def next_event(queue: asyncio.Queue[Event], wake_s: float) -> Event:
    """The queue's next event, or a Tick at `wake_s`, in seconds on the loop's clock."""
    if not queue.empty():
        return queue.get_nowait()
    try:
        async with asyncio.timeout_at(None if wake_s == float("inf") else wake_s):
            return await queue.get()
    except TimeoutError:
        return Tick()


class Turn(NamedTuple):
    """A running generation. `sample` collects the drafts that the cloud may see. `on_judged` hears of every draft.

    `pair` names the models that the plan was made for. `important` names the rule by which a draft is always verified
    (`fedhlm.decoding.important`). `context` is that of the request's span.
    """

    session: int
    job: Job
    plan: Plan
    queue: asyncio.Queue[Event]
    sample: PromptSample | None
    result: GenerationResult
    pair: Pair
    on_commit: Callable[[list[Committed]], Awaitable[FinishReason | None]]
    on_judged: Callable[[Judged], object]
    important: Callable[[Sequence[int], int], str]
    context: str = ""


def count(counters: Counters, tally: Tally, result: GenerationResult) -> None:
    """Count what a generation did."""
    counters.add_all(
        escalations=tally.escalations,
        retries=tally.retries,
        rollbacks=tally.rollbacks,
        reprimes=tally.reprimes,
        stale_verdicts=tally.stale,
        late_verdicts=tally.conflicts,
        drafted_tokens=tally.drafted,
        discarded_tokens=tally.discarded,
        escalated_tokens=tally.escalated,
        uplink_messages=result.uplink_messages,
        uplink_bytes=result.uplink_bytes,
    )
    for rule, amount in result.always_verified().items():
        counters.add("always_verified", amount, label=rule)
    for source, amount in Counter(result.sources).items():
        counters.add("tokens_by_source", amount, label=source)
    counters.add("generations", label=result.finish)
    drafting = result.drafting()
    counters.add_all(
        spec_decode_num_drafts=sum(drafting.accepted),
        spec_decode_num_draft_tokens=drafting.drafts,
        spec_decode_num_accepted_tokens=sum(j * blocks for j, blocks in enumerate(drafting.accepted)),
    )
    for position in range(len(drafting.accepted) - 1):
        blocks = sum(drafting.accepted[position + 1 :])
        counters.add("spec_decode_num_accepted_tokens_per_pos", blocks, label=str(position))
    for seen in result.observed:
        counters.observe("doubt", seen.uncertainty)
        if seen.harm is not None:
            counters.observe("harm", min(1.0, max(0.0, seen.harm)))


def tell_late(machine: GenerationMachine) -> None:
    """Warn that a deadline has passed, and name the setting that would have been long enough."""
    deadline_ms, prompt_ms = (round(1000.0 * s) for s in (machine.plan.deadline_s, machine.plan.prompt_s))
    tokens, report = machine.prompt_length, machine.working
    if report is None:
        what = "no answer came within generation.deadline_ms (%d): what follows is unverified until one comes"
        warn_once(log, "late", what, deadline_ms)
        return
    warn_once(
        log,
        "late prompt",
        "the cloud was still at work on a prompt of %d tokens, of which it had read %d, when generation.deadline_ms (%d) "
        "and generation.prompt_ms (%d) had passed: what follows is unverified until it answers. "
        "Raise generation.prompt_ms to wait longer",
        tokens,
        report.fed,
        deadline_ms,
        prompt_ms,
    )


def drafted(revision: int, position: int, drawn: Drawn, rule: str) -> Drafted:
    """A draft as the machine takes it. `rule` is that of `Drafted`."""
    return Drafted(revision, position, drawn.token, drawn.prob, drawn.uncertainty, drawn.law, drawn.key, rule)


async def close(turn: Turn, party: Party, cluster: str) -> None:
    """Tell edge and cloud that nobody waits for this session any more."""
    message = Escalation(
        **party.stamp(),
        session=turn.session,
        epoch=turn.result.ended.tail.epoch,
        base=0,
        ids=b"",
        patience_ms=round(CLOSE_S * 1000.0),
        extend=0,
    )
    agent = party.stamp.sender
    sent = await party.send(topics.ESCALATE, message, expiry_s=CLOSE_S, cluster=cluster, agent=agent)
    turn.result.uplink_bytes += sent.packet_bytes
    turn.result.uplink_messages += bool(sent)
