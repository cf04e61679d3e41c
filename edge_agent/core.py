"""What an agent does with each prompt and message: joins the generation, its model, the bus and the timers.

Prompts are served one after the other. Each generation has its own session, whose number routes its verdicts.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from edge_agent.auditor import Auditor
from edge_agent.coins import peers_coin
from edge_agent.events import (
    Answered,
    Cancelled,
    Commit,
    Committed,
    DraftNext,
    Escalate,
    Event,
    Finish,
    Grown,
    Judged,
    LinkDown,
    LinkUp,
    Observe,
    Plan,
    Refused,
    Unprimed,
    Working,
)
from edge_agent.generation import GenerationMachine
from edge_agent.growth import RANKS, Delay, TreeLimits, TreeRequest
from edge_agent.journal import AgentStart, Ended, Notes, Planned
from edge_agent.learner import Learner
from edge_agent.lessons import Lessons
from edge_agent.membership import Membership
from edge_agent.model import Drafter
from edge_agent.peers import Peers
from edge_agent.planning import event_of, plan_of
from edge_agent.profile import Sampler
from edge_agent.result import GenerationResult, Job
from edge_agent.surroundings import Surroundings
from edge_agent.turn import NextEvent, Turn, close, count, drafted, next_event, tell_late
from fedhlm.bus.party import Party, Received
from fedhlm.decoding.important import TOOL_CALL, important_of
from fedhlm.decoding.tree import pack_branches
from fedhlm.errors import ProtocolError
from fedhlm.process.saver import Saver
from fedhlm.protocol import topics
from fedhlm.protocol.fields import MAX_DOUBTS, FinishReason
from fedhlm.protocol.messages import (
    Assignment,
    Escalation,
    Fingerprint,
    Hints,
    Learned,
    Presence,
    Prime,
    UncertainTokens,
    Verdict,
    VerifiedTokens,
)
from fedhlm.protocol.packing import pack_ids
from fedhlm.protocol.roles import ROLES
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Consensus, Federation
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)

EVENTS_MAX: Final = 1_024
LEARNER_FILE: Final = "learner"


class AgentCore:
    """Runs generations over one bus, in `cluster` until the agent is assigned to another one.

    `new_session` returns numbers below 2**63 that do not repeat among recent ones. `sampler` collects samples of the
    drafts for the cloud. `make_peers` creates an empty view of a cluster, and `saver` saves the `learner`. A `guest` of
    the same name serves no prompts, announces no presence and contributes nothing. A journal's replay replaces
    `clock_s` (the loop's by default) and `next_event`.
    """

    def __init__(
        self,
        *,
        party: Party,
        cluster: str,
        drafter: Drafter,
        fingerprint: Fingerprint,
        new_session: Callable[[], int],
        learner: Learner,
        saver: Saver,
        make_peers: Callable[[], Peers],
        sampler: Sampler | None = None,
        guest: bool = False,
        clock_s: Callable[[], float] | None = None,
        next_event: NextEvent = next_event,
    ) -> None:
        self.party = party
        self.name = party.stamp.sender
        self.fingerprint = fingerprint
        self.membership = Membership(party=party, cluster=cluster, fingerprint=fingerprint, guest=guest)
        self.learner = learner
        self.peers = make_peers()
        self.link_up = True
        self.upstream: Fingerprint | None = None
        self.edge_software = ""
        self.absent = ""  # what is missing upstream, as far as known; empty: nothing
        self._looked = asyncio.Event()
        self._drafter = drafter
        self._counters = party.counters
        self._saver = saver
        self._saved_round = learner.round
        self._new_session = new_session
        self._make_peers = make_peers
        self._sampler = sampler
        self._clock_s = clock_s or (lambda: asyncio.get_running_loop().time())
        self._next_event = next_event
        here = Surroundings(party, learner, peers=lambda: self.peers, cluster=lambda: self.cluster)
        self.auditor = Auditor(here, fingerprint, clock_s=self._clock_s)
        self._lessons = Lessons(here, self.auditor, sampler, guest=guest)
        self._notes = Notes(party)
        self._routes: dict[int, asyncio.Queue[Event]] = {}
        self._approximate: Counter[int] = Counter()  # by session: verdicts that may not be the LLM's own
        self._delay = Delay()
        self._meet(None)
        learner.begin(party.stamp.wall_ms())

    @property
    def cluster(self) -> str:
        """The agent's current cluster."""
        return self.membership.cluster

    def plan(self, job: Job) -> Plan:
        """Create the plan of a job with the current thresholds. The settings' types have checked all names."""
        return plan_of(job, self.learner, self.peers)

    async def save(self) -> None:
        """Save the learner, at most once per round, to spare the flash memory of small devices."""
        if self.learner.round != self._saved_round:
            self._saved_round = self.learner.round
            await self._saver.save()

    def flush(self) -> None:
        """Save the learner and wait until it is on disk. Call this last."""
        self._saver.flush()

    def note_start(self, federation: Federation, consensus: Consensus) -> None:
        """Begin the journal, if one is kept, with the agent's settings and what it has learnt in earlier lives."""
        self._notes.start(
            lambda: AgentStart(
                name=self.name,
                cluster=self.cluster,
                root=self.party.root,
                fingerprint=self.fingerprint,
                federation=federation,
                consensus=consensus,
                space=self.peers.space,
                learner=self.learner.snapshot(),
            )
        )

    async def subscribe(self) -> None:
        """Subscribe to prompts, verdicts, the edge's presence, the cluster's knowledge, and assignments."""
        await self.membership.subscribe()

    async def handle(self, received: Received) -> bool:
        """Handle one message, unless it is a prompt. Return False if its type is not expected here."""
        message, cluster = received.message, received.levels.get("cluster", self.cluster)
        here = cluster == self.cluster
        if not here and isinstance(message, Learned | VerifiedTokens | UncertainTokens):
            return True  # of a cluster that the agent has left, or has not joined yet
        try:
            match message:
                case Verdict():
                    self._counters.add_all(downlink_messages=1, downlink_bytes=received.wire_bytes)
                    self.on_verdict(message)
                case Presence() if ROLES[message.role].relays:
                    if here:
                        self.on_edge(message)
                    elif await self.membership.seen(cluster, message):
                        self._moved(message)
                case Assignment():
                    await self.membership.assigned(message.cluster)
                case Learned():
                    self.learner.learned(message)
                case VerifiedTokens():
                    self.peers.hear_verified(message)
                case UncertainTokens():
                    self.peers.hear_doubts(message)
                case _:
                    return False
        except ProtocolError as exc:
            self._counters.add("refused_messages")
            warn_once(log, type(message).__name__, "refused a message of %s: %s", message.sender, exc)
        return True

    def _moved(self, edge: Presence) -> None:
        """Start in another cluster. Knowledge about the old cluster's agents is dropped; verified tokens are kept."""
        self._counters.add("assignments")
        self.auditor.audits.moved()
        self.peers.centroid = self._make_peers().centroid
        self.learner.cluster = {}  # until the retained state of the new cluster arrives
        self.on_edge(edge)

    def on_verdict(self, verdict: Verdict) -> None:
        """Pass a verdict to its generation. If that has ended, the verdict only shows that the link is up."""
        self.party.spans.answered("", verdict)
        queue = self._routes.get(verdict.session)
        if queue is None:
            if not (
                verdict.session in self.auditor.audits
                and self.auditor.hear(verdict.session, event_of(verdict, self.fingerprint.vocab_size))
            ):
                self._counters.add("late_verdicts")
            # An agent that works offline may end every text before the answer to its probe arrives.
            self._set_link_up()
            return
        event = event_of(verdict, self.fingerprint.vocab_size)
        if isinstance(event, Answered) and verdict.reason:
            self._approximate[verdict.session] += 1
            warn_once(log, "approximate", "the cloud cannot promise its texts token for token: %s", verdict.reason)
        if SOURCES[verdict.source].verified:
            self.absent = ""
        if not isinstance(event, Working):
            self._counters.add("verdicts")
            self._delay.heard((verdict.session, verdict.epoch, verdict.base), self._clock_s())
        self._post(queue, event)

    def on_edge(self, state: Presence) -> None:
        """Handle a change of presence of the edge or of the cloud behind it."""
        self.upstream = state.upstream if state.online else None
        self.edge_software = state.software
        if self.upstream is not None:
            self._meet(self.upstream)
            self._set_link_up()
        elif state.online:
            self._miss(f"the edge of cluster {self.cluster} sees no cloud")
        else:
            self._miss(f"the edge of cluster {self.cluster} is offline")
        self._looked.set()

    def _meet(self, large: Fingerprint | None) -> None:
        """Work with this LLM from now on. What was learnt about another one is set aside until that comes back."""
        former = self.learner.meet(self.fingerprint, large)
        if former is None:
            return
        log.warning(
            "the models are now %s and %s (pair %s): what was learnt about pair %s is set aside until it comes back",
            self.fingerprint.model,
            "an unknown one" if large is None else large.model,
            self.learner.pair,
            former,
        )
        self.auditor.give_up_all()
        self.peers = self._make_peers()  # the former LLM verified its tokens

    async def look_around(self, within_s: float) -> None:
        """Wait at most `within_s` seconds for the edge's retained presence. Without one the edge counts as missing."""
        try:
            async with asyncio.timeout(within_s):
                await self._looked.wait()
        except TimeoutError:
            self._miss(f"no edge has announced itself in cluster {self.cluster}")

    def _miss(self, who: str) -> None:
        """Note who is missing. Unless configured to, no text waits for answers from then on."""
        if who != self.absent:
            log.warning("%s: what it should verify is marked unverified until it does", who)
        self.absent = who
        for queue in self._routes.values():
            self._post(queue, LinkDown())

    def _set_link_up(self) -> None:
        if self.absent:
            log.info("cluster %s can have tokens verified again", self.cluster)
        self.absent = ""
        self.link_up = True
        for queue in self._routes.values():
            self._post(queue, LinkUp())

    def cancel(self, reason: FinishReason) -> None:
        """End all running generations."""
        for queue in self._routes.values():
            self._post(queue, Cancelled(reason))

    def _post(self, queue: asyncio.Queue[Event], event: Event) -> None:
        if queue.qsize() < EVENTS_MAX:
            queue.put_nowait(event)
        else:  # the machine asks again for what it misses
            self._counters.add("dropped_messages")

    async def generate(
        self,
        job: Job,
        prompt: list[int],
        on_commit: Callable[[list[Committed]], Awaitable[FinishReason | None]],
        on_judged: Callable[[Judged], object] = lambda _judged: None,
        read: Callable[[Sequence[int]], str] | None = None,
        context: str = "",
    ) -> GenerationResult:
        """Generate from prompt ids. `on_commit` receives tokens as they are committed, and may end the generation.

        `on_judged` receives what was decided on each draft, before the commit of its position. `read` returns the text
        of ids, which the rules of `generation.always_verify` need (None: they do not apply). Escalations are spans
        inside the one that `context` names.

        Raises:
            ValueError: the prompt is empty, or leaves no room in the model's context.
        """
        now = began = self._clock_s()
        session = self._new_session()
        link_up = self.link_up and not (self.absent and not job.config.wait_offline)
        self._notes.began(session, job, prompt, link_up=link_up, now_s=now)
        plan = self.plan(job)
        self._notes.write("plan", Planned(plan.tau, plan.similarity))
        machine = GenerationMachine(plan, list(prompt), link_up=link_up)
        result = GenerationResult(tau=plan.tau, similarity=plan.similarity, confidence=job.config.confidence)
        sample = None if self._sampler is None else self._sampler.begin()
        # A text under a grammar is read by a program, which acts on the calls in it.
        always = job.config.always_verify if job.sampling.grammar is None else (*job.config.always_verify, TOOL_CALL)
        important = important_of(always, read)
        start = len(prompt)
        turn = Turn(
            session,
            job,
            plan,
            asyncio.Queue(),
            sample,
            result,
            self.learner.pair,
            on_commit,
            on_judged,
            lambda ids, new: important(ids[start:], new),
            context,
        )
        self._routes[session] = turn.queue
        place = self.cluster
        try:
            async with asyncio.TaskGroup() as group:
                actions = machine.start(now)
                while True:
                    for action in actions:
                        if isinstance(action, DraftNext):
                            group.create_task(self._draft(action, turn), name="draft")
                        else:
                            await self._act(action, turn)
                    if machine.finished:
                        break
                    event = await self._next_event(turn.queue, machine.wake_s())
                    actions = []  # those of the last event are done
                    if isinstance(event, LinkDown) and job.config.wait_offline:
                        continue
                    now = self._clock_s()
                    self._notes.write("fed", event, now)
                    if isinstance(event, Answered):
                        result.round_trips += 1
                        if SOURCES[event.source].verified:
                            result.settled(event.epoch, event.base, event.accepted)
                    if place != self.cluster:
                        # Sessions belong to clusters. A cloud that still held this session from an earlier stay might
                        # continue from an outdated context.
                        place = self.cluster
                        actions += machine.handle(Unprimed(machine.epoch), now)
                    actions += machine.handle(event, now)
                    if machine.late_s == now:
                        tell_late(machine)
        finally:
            del self._routes[session]
            result.approximate = self._approximate.pop(session, 0)
            self.party.spans.end_session("", session, "abandoned")
            self.link_up = machine.link_up
        result.rollbacks, result.discarded = machine.tally.rollbacks, machine.tally.discarded
        result.escalated = machine.tally.escalated
        result.wall_s = now - began
        count(self._counters, machine.tally, result)
        if self._sampler is not None and sample is not None:
            self._sampler.end(sample)
        await self._lessons.learn(turn, now)
        return result

    async def _act(self, action: Escalate | Commit | Judged | Observe | Finish, turn: Turn) -> None:
        result = turn.result
        match action:
            case Escalate():
                await self._publish_doubts(turn, action)
                await self._escalate(turn, action)
            case Commit(tokens):
                self._notes.write("committed", tokens)
                result.commit(tokens)
                reason = await turn.on_commit(tokens)
                if reason is not None:
                    self._post(turn.queue, Cancelled(reason))
            case Judged():
                self._notes.write("judged", action)
                turn.on_judged(action)
            case Observe(observations):
                result.observed += observations
            case Finish(reason, error):
                result.finish, result.error, result.ended = reason, error, action
                self._notes.write("ended", Ended(reason, error))
                if reason == "cancelled" and result.uplink_messages:
                    await close(turn, self.party, self.cluster)

    async def _draft(self, action: DraftNext, turn: Turn) -> None:
        ids, position = action.ids, len(action.ids)
        sampling, uncertainty, queue = turn.plan.sampling, turn.job.config.uncertainty, turn.queue
        # At most one draft is pending, and the machine would wait for a lost one for ever. So EVENTS_MAX is ignored.
        if not action.levels:
            drawn = await self._drafter.draft(ids, sampling, uncertainty)
            chain = [drafted(action.revision, position, drawn, turn.important(ids, drawn.token))]
            queue.put_nowait(chain[0])
        else:
            limits = TreeLimits(turn.job.config.pipeline.nodes, RANKS, action.levels, self._delay.mean_s)
            grown = await self._drafter.grow(TreeRequest(ids, sampling, limits, uncertainty, action.settled))
            before = [*ids, *(drawn.token for drawn in grown.chain)]
            chain = [
                drafted(action.revision, position + i, drawn, turn.important(before[: position + i], drawn.token))
                for i, drawn in enumerate(grown.chain)
            ]
            queue.put_nowait(Grown(action.revision, position, chain, grown.branches))
        if turn.sample is not None:
            for draft in chain:
                turn.sample.see(draft.position, draft.key, draft.uncertainty)

    async def _publish_doubts(self, turn: Turn, action: Escalate) -> None:
        """Publish the block's doubtful drafts to the cluster before the block is sent, if that is worth its bytes."""
        job = turn.job
        coin = peers_coin(turn.session)
        if not action.uncertain or not self.peers.asks(job.config, coin):
            return
        comparable_bytes = 0
        for start in range(0, len(action.uncertain), MAX_DOUBTS):
            items = action.uncertain[start : start + MAX_DOUBTS]
            message = UncertainTokens(**self.party.stamp(), session=turn.session, space=self.peers.space, items=items)
            sent = await self.party.send(topics.PEER, message, cluster=self.cluster, agent=self.name)
            turn.result.cluster_bytes += sent.packet_bytes
            comparable_bytes += sent.comparable_bytes
        for _ in action.uncertain:
            self.peers.collaboration[job.config.peers].published(round(comparable_bytes / len(action.uncertain)))

    async def _escalate(self, turn: Turn, action: Escalate) -> None:
        vocab_size, plan, session = self.fingerprint.vocab_size, turn.plan, turn.session
        stamp = self.party.stamp()
        before: Prime | int | None = action.digest
        if action.context is not None:
            before = Prime(plan.sampling, self.fingerprint, pack_ids(action.context, vocab_size))
        hints: Hints | int | None = plan.pipeline.drafts or None
        riders = () if hints else self.auditor.riders()
        similarity = None if action.for_target or hints else plan.similarity
        if similarity is not None or action.branches or riders:
            hints = Hints(similarity, plan.votes, pack_branches(action.branches, vocab_size), riders)
        self._delay.sent((session, action.epoch, action.base), self._clock_s())
        message = Escalation(
            **stamp,
            session=session,
            epoch=action.epoch,
            base=action.base,
            ids=pack_ids(action.ids, vocab_size),
            patience_ms=round(action.deadline_s * 1000.0),
            fixed=action.fixed,
            extend=action.extend,
            before=before,
            laws=action.laws,
            hints=hints,
        )
        drafts = len(action.ids) - action.fixed
        self.party.spans.begin("escalate", "client", "", message, turn.context, drafts=drafts)
        sent = await self.party.send(
            topics.ESCALATE, message, expiry_s=action.deadline_s, cluster=self.cluster, agent=self.name
        )
        turn.result.uplink_bytes += sent.packet_bytes
        turn.result.escalation_bytes += sent.comparable_bytes
        turn.result.sent(action.epoch, action.base, fixed=action.fixed, drafts=drafts)
        turn.result.uplink_messages += bool(sent)
        if sent.too_large:
            self._post(turn.queue, Refused(self.party.why_too_large()))
