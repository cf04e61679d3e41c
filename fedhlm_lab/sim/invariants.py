"""Invariants of a simulated fleet, checked by a monitor on every message and every commit.

Each token is compared with the model that is its source, and the text of the preset `exact` with the LLM alone.
Queues and memories are compared with the bounds that their own modules state.
"""

# A monitor reads the private state of parts.
# ruff: noqa: SLF001

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

from cloud_verifier.batching import RUNNING_OF_ONE
from cloud_verifier.queues import WAITING_MAX
from cloud_verifier.service import CloudService
from edge_agent.core import EVENTS_MAX, AgentCore
from edge_agent.events import Committed, Plan
from edge_agent.pipeline import Pending
from edge_agent.requests import PROMPTS_MAX, REQUESTS_REMEMBERED
from edge_agent.result import GenerationResult, Job
from edge_agent.service import AgentService
from edge_broker import memory, relay
from edge_broker.service import ASSIGNED_MAX, EdgeService
from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.errors import ProtocolError
from fedhlm.learning.federation import MEMBERS_MAX
from fedhlm.protocol import topics
from fedhlm.protocol.codec import decode
from fedhlm.protocol.fields import FinishReason
from fedhlm.protocol.messages import Cancel, Output, Sampling
from fedhlm.protocol.sources import SOURCES
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.loopback_broker import Packet
from fedhlm_lab.sim.parts import Part
from fedhlm_lab.sim.scenario import Scenario

SLACK_S: Final = 5.0  # beyond a deadline: drafting, and a timer that waits for its turn
KEPT: Final = ("local", "peer", "neighbour")
CHANCE: Final = 3.0  # standard deviations of a count of rare events
DEADLINES: Final = 3.0  # a context that is asked for again starts the wait anew


class Violation(AssertionError):
    """An invariant is violated.

    `name` is the invariant, `text` what happened, `at_s` the virtual time.
    """

    def __init__(self, name: str, text: str, at_s: float) -> None:
        super().__init__(f"{name}: {text} (at {at_s:.3f} s)")
        self.name = name
        self.text = text
        self.at_s = at_s


class Attempt:
    """One generation in one life of an agent: the tokens committed so far, with their sources."""

    def __init__(self, agent: str, prompt: Sequence[int], job: Job, now_s: float) -> None:
        self.agent = agent
        self.prompt = list(prompt)
        self.sampling = job.sampling
        self.max_tokens = job.max_tokens
        self.ids: list[int] = []
        self.sources: list[str] = []
        self.began_s = self.news_s = now_s
        self.over = False


class Bound(NamedTuple):
    """A size and its limit."""

    what: str
    size: int
    limit: int


class Monitor:
    """Checks one run. `failed` completes with a Violation when the first invariant is violated."""

    def __init__(self, scenario: Scenario, drafter: toy.ToyDrafter) -> None:
        self.scenario = scenario
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.attempts: defaultdict[int, list[Attempt]] = defaultdict(list)  # by the seed of their request
        self.seeds: dict[str, int] = {}  # of requests, by name
        self.cancelled: set[int] = set()  # seeds of requests that the client gave up
        self.tokens: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()  # tokens that an agent or its peers settled, by agent
        self.wrong: Counter[str] = Counter()  # those that the LLM would have written otherwise
        self.written: Counter[str] = Counter()
        self.messages = 0
        self.rollbacks = 0
        self._drafter = drafter
        self._now_s = asyncio.get_running_loop().time

    def fail(self, name: str, text: str) -> None:
        """Report a violation; the first one counts."""
        if not self.failed.done():
            self.failed.set_exception(Violation(name, text, self._now_s()))

    # Commits

    def begin(self, agent: str, prompt: Sequence[int], job: Job) -> Attempt:
        """Start a generation."""
        attempt = Attempt(agent, prompt, job, self._now_s())
        self.attempts[job.sampling.seed].append(attempt)
        return attempt

    def commit(self, attempt: Attempt, tokens: Sequence[Committed]) -> None:
        """Check committed tokens: their source, their order and their time."""
        self._in_time(attempt, "the next token")
        for token in tokens:
            if attempt.over:
                self.fail("exactly-once", f"{attempt.agent} committed {token} after its end")
            if len(attempt.ids) >= attempt.max_tokens:
                self.fail("exactly-once", f"{attempt.agent} committed more than {attempt.max_tokens} tokens")
            self._check_source(attempt, token)
            self._judge(attempt, token)
            attempt.ids.append(token.token)
            attempt.sources.append(token.source)

    def end(self, attempt: Attempt, result: GenerationResult) -> None:
        """End a generation: its result must equal what was committed and, for `exact`, the oracle's text."""
        self._in_time(attempt, "the end")
        attempt.over = True
        self.tokens.update(result.sources)
        self.rollbacks += result.rollbacks
        where = f"{attempt.agent}, prompt {attempt.prompt}, seed {attempt.sampling.seed}"
        if attempt.ids != result.ids or attempt.sources != result.sources:
            self.fail("exactly-once", f"{where}: committed {attempt.ids}, reported {result.ids}")
        stopped = bool(result.ids) and result.ids[-1] == toy.EOS_ID
        cut = result.finish == "cancelled" and attempt.sampling.seed in self.cancelled
        if not cut and result.finish != ("stop" if stopped else "length"):
            self.fail("ends", f"{where}: finished with {result.finish!r} {result.error}")
        if len(result.ids) != attempt.max_tokens and not stopped and not cut:
            self.fail("exactly-once", f"{where}: {len(result.ids)} tokens of {attempt.max_tokens}")
        if all(SOURCES[source].verified for source in result.sources) and COUPLINGS[attempt.sampling.coupling].shared:
            tokens = len(result.ids) if cut else attempt.max_tokens
            wanted = toy.large_alone(attempt.prompt, attempt.sampling, tokens)
            if result.ids != wanted:
                self.fail("oracle", f"{where}: wrote {result.ids}, the LLM alone {wanted}")

    def _judge(self, attempt: Attempt, token: Committed) -> None:
        self.written[attempt.agent] += 1
        if token.source in KEPT:
            ids, sampling = attempt.prompt + attempt.ids, attempt.sampling
            settle = COUPLINGS[sampling.coupling].settle
            self.kept[attempt.agent] += 1
            self.wrong[attempt.agent] += settle(toy.large_logits(ids), sampling, len(ids), None, b"") != token.token

    def check_budget(self, liars: Collection[str]) -> None:
        """Check that no honest agent exceeds its budget by more than chance explains."""
        config = self.scenario.loaded.config.generation
        if (
            not choices.THRESHOLDS[config.threshold].keeps_budget
            or not choices.OBJECTIVES[config.learning.objective].bounded
        ):
            return
        for agent, written in self.written.items():
            most = config.budget * written
            if agent not in liars and self.wrong[agent] > most + CHANCE * math.sqrt(most):
                self.fail(
                    "budget",
                    f"{agent} wrote {written} tokens: wrong ones must be at most {most:.1f} (got {self.wrong[agent]})",
                )

    def _in_time(self, attempt: Attempt, what: str) -> None:
        now_s, last_s = self._now_s(), attempt.news_s
        attempt.news_s = now_s
        if now_s - last_s > DEADLINES * self.scenario.deadline_s + SLACK_S:
            self.fail("ends", f"{attempt.agent} waited {now_s - last_s:.1f} s for {what}")

    def _check_source(self, attempt: Attempt, token: Committed) -> None:
        sampling, ids = attempt.sampling, attempt.prompt + attempt.ids
        expected = self._expected(ids, sampling, token)
        if token.token not in expected:
            self.fail(
                "source",
                f"token {len(attempt.ids)} of {attempt.prompt} must be one of {sorted(expected)} after {ids} "
                f"(got {token.token} from {token.source})",
            )
        generation = self.scenario.loaded.config.generation
        exact = choices.GATES[generation.gate].verifies_all and not choices.PEERS[generation.peers].asked
        if exact and not (SOURCES[token.source].verified or SOURCES[token.source].unreachable):
            self.fail("source", f"a preset that verifies every token committed one from {token.source}")

    def _expected(self, ids: list[int], sampling: Sampling, token: Committed) -> set[int]:
        if SOURCES[token.source].by_peers:  # whatever was settled in a similar context
            return {token.token}
        draft = self._drafter.draft_now(ids, sampling)
        if SOURCES[token.source].kept or SOURCES[token.source].unreachable:
            return {draft.token}
        logits, coupling = toy.large_logits(ids), COUPLINGS[sampling.coupling]
        settled = {coupling.settle(logits, sampling, len(ids), draft.token, draft.law)}
        if not token.drafted:  # also without a draft: a bonus token, or one that the cloud decoded
            settled.add(coupling.settle(logits, sampling, len(ids), None, b""))
        return settled

    # Messages

    def see(self, packet: Packet) -> None:
        """Check a message that the broker took; an output must equal what its agent committed."""
        self.messages += 1
        if packet.topic.endswith("/output"):
            self._check_output(packet)
        elif packet.topic.endswith("/cancel"):
            cancel = decode(packet.payload)
            if isinstance(cancel, Cancel):
                self.cancelled.add(self.seeds[cancel.request])

    def _check_output(self, packet: Packet) -> None:
        try:
            output = decode(packet.payload)
        except ProtocolError as exc:
            return self.fail("output", f"{packet.topic}: {exc}")
        if not isinstance(output, Output):
            return self.fail("output", f"{packet.topic} carries {output!r}")
        if output.finish == "error":
            return self.fail("ends", f"{output.sender} refused {output.request}: {output.error}")
        if output.finish == "cancelled" and not output.statistics:
            return None  # its turn had not come
        start, end = output.position, output.position + len(output.ids)
        made = self.attempts[self.seeds.get(output.request, -1)]
        told = (list(output.ids), list(output.sources))
        if not any((a.ids[start:end], a.sources[start:end]) == told and a.agent == output.sender for a in made):
            self.fail(
                "output",
                f"{output.sender} says {output.ids} at {start} of {output.request}, and committed something else",
            )
        return None

    # Bounds

    def see_pending(self, agent: str, pending: Pending, limit: int) -> None:
        """Check what is pending in a generation's state machine."""
        if pending.tail > limit:
            self.fail("bounded", f"the tail of {agent} must be at most {limit} tokens (got {pending.tail})")

    def check_parts(self, parts: Sequence[Part]) -> None:
        """Check that no part has ended by itself, and that no queue or memory exceeds its bound."""
        for part in parts:
            if part.failure is not None:
                self.fail("alive", f"{part.name} ended by itself: {part.failure!r}")
            for bound in bounds(part, self.scenario):
                if bound.size > bound.limit:
                    self.fail(
                        "bounded", f"{bound.what} of {part.name} must be at most {bound.limit} (got {bound.size})"
                    )


def bounds(part: Part, scenario: Scenario) -> Iterator[Bound]:
    """Everything that can grow in a part.

    A queue that was shrunk may keep the messages that it held.
    """
    for bus in (bus for bus in part.buses if bus._open):
        yield Bound(f"{bus.client_id} unread", bus.unread, bus.room_in)
        yield Bound(f"{bus.client_id} unsent", bus.unsent, bus.room_out)
    match part.service:
        case AgentService() as service:
            yield Bound("prompts", len(service.requests.open), PROMPTS_MAX)
            yield Bound("requests remembered", len(service.requests), 2 * REQUESTS_REMEMBERED)
            yield Bound("generations", len(service.agent._routes), 1)
            for queue in service.agent._routes.values():
                yield Bound("events", queue.qsize(), EVENTS_MAX + 2)  # besides what it posts to itself
            yield Bound("peers' tokens", service.agent.peers.memory.size, service.agent.peers.memory.capacity)
        case EdgeService() as service:
            held = service.memory
            blocks = scenario.agents * scenario.loaded.config.generation.pipeline.window * scenario.prompts * 8
            yield Bound("relay", len(service.relay.pending), blocks)
            yield Bound("epochs", len(service.relay._epochs), relay.SESSIONS_MAX)
            yield Bound("verified tokens", held.size, held.capacity)
            yield Bound("sessions of doubts", len(held._doubts), memory.SESSIONS_MAX)
            yield Bound("doubts", max(map(len, held._doubts.values()), default=0), memory.DOUBTS_MAX)
            yield Bound("blocks", len(held._pending), memory.PENDING_MAX)
            yield Bound("digest", held.waiting, memory.DIGEST_MAX * memory.DIGESTS_MAX)
            yield Bound("members", len(service.members), min(MEMBERS_MAX, scenario.agents))
            yield Bound("agents", len(service.agents), scenario.agents)
            yield Bound("assignments", len(service._assigned), ASSIGNED_MAX)
        case CloudService() as service:
            batcher = service.batcher
            yield Bound("jobs", batcher.waiting, WAITING_MAX)
            yield Bound("bytes of caches", batcher.cached_bytes, batcher.cache_bytes)
            yield Bound("sessions", len(batcher.sessions), batcher.sessions.sessions_max)
            yield Bound("running", len(batcher.running), 2 * RUNNING_OF_ONE * scenario.agents)
            yield Bound("members", len(service.coordinator.members), min(MEMBERS_MAX, scenario.clusters))
        case _:
            pass


def idle(part: Part) -> Iterator[Bound]:
    """What must be empty when a fleet has nothing to do."""
    for bus in (bus for bus in part.buses if bus._open):
        yield Bound(f"{bus.client_id} unread", bus.unread, 0)
        yield Bound(f"{bus.client_id} unsent", bus.unsent, 0)
    match part.service:
        case AgentService() as service:
            yield Bound("prompts", len(service.requests.open), 0)
            yield Bound("generations", len(service.agent._routes), 0)
        case EdgeService() as service:
            yield Bound("relay", len(service.relay.pending), 0)
            yield Bound("digest", service.memory.waiting, 0)
        case CloudService() as service:
            yield Bound("jobs", service.batcher.waiting, 0)
            yield Bound("running", len(service.batcher.running), 0)
        case _:
            pass


class WatchedAgent(AgentCore):
    """An agent that reports its plans and commits to the monitor."""

    monitor: Monitor

    def plan(self, job: Job) -> Plan:
        """Plan as the agent does, with the pipeline watched."""
        plan = super().plan(job)
        config = job.config.pipeline
        limit = {"async": config.window, "blocking": config.block, "tree": config.nodes, "remote": 1}[config.kind]
        decide, watch = plan.pipeline.must_send, self.monitor.see_pending

        def must_send(pending: Pending) -> bool:
            watch(self.name, pending, limit)
            return decide(pending)

        return plan._replace(pipeline=plan.pipeline._replace(must_send=must_send))

    async def generate(
        self,
        job: Job,
        prompt: list[int],
        on_commit: Callable[[list[Committed]], Awaitable[FinishReason | None]],
        *given: Any,
        **named: Any,
    ) -> GenerationResult:
        """Generate as the agent does; the monitor sees each commit first."""
        attempt = self.monitor.begin(self.name, prompt, job)

        async def watched(tokens: list[Committed]) -> FinishReason | None:
            self.monitor.commit(attempt, tokens)
            return await on_commit(tokens)

        result = await super().generate(job, prompt, watched, *given, **named)
        self.monitor.end(attempt, result)
        return result


def presence_topics(agents: Sequence[tuple[str, str]], clusters: int) -> list[str]:
    """The presence topic of every part; `agents` are (cluster, name)."""
    return [
        *(topics.AGENT_STATUS.name(cluster=cluster, agent=name) for cluster, name in agents),
        *(topics.EDGE_STATUS.name(cluster=f"c{c}") for c in range(clusters)),
        topics.CLOUD_STATUS.name(),
    ]
