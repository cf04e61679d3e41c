"""The agent as a running service: feeds the generation machine with its model, its bus and its timers.

Prompts are served one after the other; each generation has its own session, and verdicts find it by that number.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from edge_agent.gate import GATES, Settings
from edge_agent.generation import (
    Answered,
    Cancelled,
    Commit,
    Committed,
    Draft,
    Drafted,
    Escalate,
    Event,
    Finish,
    Generation,
    LinkUp,
    Observe,
    Plan,
    Refused,
    Tick,
    Unprimed,
)
from edge_agent.model import Drafter
from edge_agent.pipeline import PIPELINES, Limits
from fedhlm import topics
from fedhlm.config import Generation as GenerationConfig
from fedhlm.errors import ProtocolError
from fedhlm.messages import (
    Escalation,
    Fingerprint,
    FinishReason,
    Presence,
    Prime,
    Sampling,
    Verdict,
    pack_ids,
    unpack_ids,
    unpack_probs,
)
from fedhlm.party import Party
from fedhlm.telemetry import Counters, warn_once

log = logging.getLogger(__name__)

EVENTS_MAX: Final = 1_024


@dataclass
class Result:
    """One finished generation: ids with who settled each, why it ended, and what it cost on the uplink."""

    ids: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    finish: FinishReason = "error"
    error: str = ""
    uplink_bytes: int = 0
    uplink_messages: int = 0
    round_trips: int = 0
    rollbacks: int = 0
    discarded: int = 0
    observed: list[tuple[float, float]] = field(default_factory=list)
    wall_s: float = 0.0

    def statistics(self) -> dict[str, float]:
        """Figures for the last message of a request."""
        by_source = {f"tokens_{source}": float(count) for source, count in Counter(self.sources).items()}
        betas = [beta for _, beta in self.observed]
        return by_source | {
            "uplink_bytes": float(self.uplink_bytes),
            "uplink_messages": float(self.uplink_messages),
            "round_trips": float(self.round_trips),
            "rollbacks": float(self.rollbacks),
            "discarded": float(self.discarded),
            "mean_beta": sum(betas) / len(betas) if betas else 0.0,
            "wall_s": self.wall_s,
        }


def plan_of(
    config: GenerationConfig, sampling: Sampling, *, max_tokens: int, context_max: int, eos_ids: frozenset[int]
) -> Plan:
    """The machine's plan for a merged configuration; its names are checked by the configuration's types."""
    pipeline = config.pipeline
    limits = Limits(
        window=pipeline.window,
        block=pipeline.block,
        flush_uncertainty=pipeline.flush_uncertainty,
        flush_age_s=pipeline.flush_age_ms / 1000.0,
        survival_floor=pipeline.survival_floor,
        bonus=pipeline.bonus,
    )
    return Plan(
        sampling=sampling,
        gate=GATES[config.gate](Settings(config.tau, config.send_probability, sampling.seed)),
        pipeline=PIPELINES[pipeline.kind](limits),
        max_tokens=max_tokens,
        context_max=context_max,
        eos_ids=eos_ids,
        deadline_s=config.deadline_ms / 1000.0,
        retry_s=config.retry_ms / 1000.0,
    )


class Agent:
    """Runs generations over one bus. `new_session` gives numbers below 2**63 that do not repeat among recent ones."""

    def __init__(
        self,
        *,
        party: Party,
        cluster: str,
        drafter: Drafter,
        fingerprint: Fingerprint,
        counters: Counters,
        new_session: Callable[[], int],
    ) -> None:
        self.party = party
        self.cluster = cluster
        self.name = party.stamp.sender
        self.fingerprint = fingerprint
        self.link_up = True
        self.upstream: Fingerprint | None = None
        self._drafter = drafter
        self._counters = counters
        self._new_session = new_session
        self._routes: dict[int, asyncio.Queue[Event]] = {}

    async def subscribe(self) -> None:
        """Ask for this agent's verdicts and its edge's presence."""
        await self.party.bus.subscribe(
            topics.VERDICT.name(self.party.root, cluster=self.cluster, agent=self.name),
            topics.EDGE_STATUS.name(self.party.root, cluster=self.cluster),
        )

    def on_verdict(self, verdict: Verdict) -> None:
        """Hand a verdict to its generation; one that nobody waits for is counted and dropped."""
        queue = self._routes.get(verdict.session)
        if queue is None:
            self._counters.add("late_verdicts")
            return
        try:
            event = self._event(verdict)
        except ProtocolError as exc:
            self._counters.add("refused_messages")
            warn_once(log, "bad verdict", "refused a verdict: %s", exc)
            return
        self._counters.add("verdicts")
        self._post(queue, event)

    def on_edge(self, state: Presence) -> None:
        """The edge, or the cloud behind it, came or went."""
        self.upstream = state.upstream if state.online else None
        if self.upstream is not None:
            self.link_up = True
            for queue in self._routes.values():
                self._post(queue, LinkUp())

    def cancel(self, reason: FinishReason) -> None:
        """End every running generation."""
        for queue in self._routes.values():
            self._post(queue, Cancelled(reason))

    def _post(self, queue: asyncio.Queue[Event], event: Event) -> None:
        if queue.qsize() < EVENTS_MAX:
            queue.put_nowait(event)
        else:  # the machine asks again for what it misses
            self._counters.add("dropped_messages")

    def _event(self, verdict: Verdict) -> Event:
        match verdict.status:
            case "settled":
                ids = unpack_ids(verdict.ids, self.fingerprint.vocab_size)
                probs = [float(p) for p in unpack_probs(verdict.target_probs)]
                return Answered(verdict.epoch, verdict.base, verdict.accepted, ids, probs, verdict.source)
            case "unprimed":
                return Unprimed(verdict.epoch)
            case "refused":
                return Refused(verdict.reason)

    async def generate(
        self,
        plan: Plan,
        prompt: list[int],
        on_commit: Callable[[list[Committed]], Awaitable[FinishReason | None]],
    ) -> Result:
        """Generate from prompt ids; `on_commit` gets tokens as they are committed and may end the generation.

        Raises:
            ValueError: an empty prompt, or one that leaves no room in the model's context.
        """
        clock = asyncio.get_running_loop().time
        began = clock()
        machine = Generation(plan, list(prompt), link_up=self.link_up)
        session = self._new_session()
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._routes[session] = queue
        result = Result()
        try:
            async with asyncio.TaskGroup() as group:
                actions = machine.start(clock())
                while True:
                    for action in actions:
                        match action:
                            case Draft():
                                group.create_task(self._draft(action, plan.sampling, queue), name="draft")
                            case Escalate():
                                await self._escalate(session, plan, action, result)
                            case Commit(tokens):
                                result.ids += [t.token for t in tokens]
                                result.sources += [t.source for t in tokens]
                                result.drafted += [t.drafted for t in tokens]
                                reason = await on_commit(tokens)
                                if reason is not None:
                                    self._post(queue, Cancelled(reason))
                            case Observe(pairs):
                                result.observed += pairs
                            case Finish(reason, error):
                                result.finish, result.error = reason, error
                    if machine.finished:
                        break
                    event = await self._next_event(queue, machine.wake_s())
                    result.round_trips += isinstance(event, Answered)
                    actions = machine.handle(event, clock())
        finally:
            del self._routes[session]
            self.link_up = machine.link_up
        result.rollbacks, result.discarded = machine.tally.rollbacks, machine.tally.discarded
        result.wall_s = clock() - began
        self._count(machine, result)
        return result

    def _count(self, machine: Generation, result: Result) -> None:
        tally = machine.tally
        for name, amount in (
            ("escalations", tally.escalations),
            ("retries", tally.retries),
            ("rollbacks", tally.rollbacks),
            ("reprimes", tally.reprimes),
            ("stale_verdicts", tally.stale),
            ("late_verdicts", tally.conflicts),
            ("uplink_messages", result.uplink_messages),
            ("uplink_bytes", result.uplink_bytes),
        ):
            self._counters.add(name, amount)
        for source, amount in Counter(result.sources).items():
            self._counters.add("tokens_by_source", amount, label=source)
        self._counters.add("generations", label=result.finish)

    async def _draft(self, action: Draft, sampling: Sampling, queue: asyncio.Queue[Event]) -> None:
        drawn = await self._drafter.draft(action.ids, sampling)
        # At most one draft is under way, and the machine would wait for a lost one for ever: no limit applies here.
        queue.put_nowait(
            Drafted(action.revision, len(action.ids), drawn.token, drawn.prob, drawn.uncertainty, drawn.law)
        )

    async def _next_event(self, queue: asyncio.Queue[Event], wake_s: float) -> Event:
        if not queue.empty():
            return queue.get_nowait()
        try:
            async with asyncio.timeout_at(None if wake_s == float("inf") else wake_s):
                return await queue.get()
        except TimeoutError:
            return Tick()

    async def _escalate(self, session: int, plan: Plan, action: Escalate, result: Result) -> None:
        vocab_size = self.fingerprint.vocab_size
        stamp = self.party.stamp()
        prime = None
        if action.context is not None:
            prime = Prime(plan.sampling, self.fingerprint, pack_ids(action.context, vocab_size))
        message = Escalation(
            **stamp,
            session=session,
            epoch=action.epoch,
            base=action.base,
            ids=pack_ids(action.ids, vocab_size),
            patience_ms=round(action.deadline_s * 1000.0),
            fixed=action.fixed,
            extend=action.extend,
            prime=prime,
            laws=action.laws,
        )
        sent = await self.party.send(
            topics.ESCALATE, message, expiry_s=action.deadline_s, cluster=self.cluster, agent=self.name
        )
        result.uplink_bytes += sent
        result.uplink_messages += sent > 0
