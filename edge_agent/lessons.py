"""What an agent does with a finished generation: it learns, counts, has the end audited, and contributes."""

import logging
from collections.abc import Callable

from edge_agent.auditor import Auditor, audit_of
from edge_agent.coins import audit_coin
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.peers import Peers
from edge_agent.profile import Sampler
from edge_agent.result import GenerationResult
from edge_agent.turn import Turn
from fedhlm import choices
from fedhlm.bus.party import Party
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Contribution, Profile
from fedhlm.settings import Generation
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)


class Lessons:
    """Teaches the learner and the peers of one agent. A `guest` contributes nothing."""

    def __init__(
        self,
        *,
        party: Party,
        learner: Learner,
        auditor: Auditor,
        sampler: Sampler | None,
        peers: Callable[[], Peers],
        cluster: Callable[[], str],
        guest: bool,
    ) -> None:
        self._party = party
        self._learner = learner
        self._auditor = auditor
        self._sampler = sampler
        self._peers = peers
        self._cluster = cluster
        self._guest = guest

    async def learn(self, turn: Turn, now_s: float) -> None:
        """Learn from a finished generation, and contribute if a round is due."""
        job, result, tail = turn.job, turn.result, turn.result.ended.tail
        learner = self._learner
        config = job.config
        if not learner.met(turn.pair):
            kept = sum(seen.skipped for seen in result.observed) + len(tail.tokens)
            measures = measures_of(config, job.sampling, turn.pair)
            learner.spoilt(measures, config, tokens=len(result.ids), kept=kept)
            return
        measures = measures_of(config, job.sampling, learner.pair)
        learner.observe(measures, config, result.observed)
        text = learner.finished(
            measures,
            config,
            result.observed,
            tail.tokens,
            tokens=len(result.ids),
            tau=result.tau,
            escalation_bytes=result.escalation_bytes,
            escalated=result.escalated,
            # Drawn for the finished text, because the audit probability depends on its tail.
            coin=audit_coin(job.sampling.seed),
        )
        if text is not None:
            self._auditor.wait(audit_of(turn, measures, text, now_s))
        known = self._peers().collaboration[config.peers]
        for seen in result.observed:
            self._peers().learn(config, seen, result.similarity)
        if result.escalated:
            known.escalated(result.escalation_bytes / result.escalated)
        result.certificate, result.fleet = learner.certificate(measures, config), learner.fleet
        self._party.counters.set_all(tau=result.tau, similarity=result.similarity)
        if (evidence := result.certificate) is not None:
            limit = evidence.limit(config.confidence)
            self._party.counters.set_all(risk=evidence.estimate, risk_limit=limit, risk_generations=evidence.texts)
        if (fleet := result.fleet) is not None:
            limit = fleet.limit(config.confidence)
            self._party.counters.set_all(
                fleet_risk=fleet.estimate, fleet_risk_limit=limit, fleet_risk_tokens=fleet.tokens
            )
        contributes = choices.THRESHOLDS[config.threshold].learns and not self._guest
        if contributes and learner.due(config, now_s):
            await self._contribute(config, result, now_s)

    async def _contribute(self, config: Generation, result: GenerationResult, now_s: float) -> None:
        number = self._learner.round
        ended = self._learner.contribution(config, now_s)
        if ended is None:
            warn_once(log, "releases", "contributions have ended: all federation.releases are used")
            return
        thresholds, curves = ended
        message = Contribution(
            **self._party.stamp(),
            round=number,
            members=1,
            thresholds=thresholds,
            curves=curves,
            evidence=self._learner.evidence(),
        )
        self._party.counters.add("contributions")
        sent = await self._party.send(
            topics.FL_UPDATE, message, cluster=self._cluster(), agent=self._party.stamp.sender
        )
        result.cluster_bytes += sent.packet_bytes
        if self._sampler is not None and self._sampler.due:
            profile = Profile(**self._party.stamp(), agent=self._party.stamp.sender, **self._sampler.take())
            sent = await self._party.send(
                topics.PROFILE, profile, cluster=self._cluster(), agent=self._party.stamp.sender
            )
            result.cluster_bytes += sent.packet_bytes
