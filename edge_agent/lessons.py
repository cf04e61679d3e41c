"""What an agent does with a finished generation: it learns, counts, has the end audited, and contributes."""

import logging

from edge_agent.auditor import Auditor, audit_of
from edge_agent.coins import audit_coin
from edge_agent.measures import measures_of
from edge_agent.profile import Sampler
from edge_agent.result import GenerationResult
from edge_agent.surroundings import Surroundings
from edge_agent.turn import Turn
from fedhlm import choices
from fedhlm.learning.evidence import export_fleet
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Contribution, Profile
from fedhlm.settings import Generation
from fedhlm.telemetry import warn_once

log = logging.getLogger(__name__)


class Lessons:
    """Teaches the learner and the peers of one agent. A `guest` contributes nothing."""

    def __init__(self, here: Surroundings, auditor: Auditor, sampler: Sampler | None, *, guest: bool) -> None:
        self._here = here
        self._auditor = auditor
        self._sampler = sampler
        self._guest = guest

    async def learn(self, turn: Turn, now_s: float) -> None:
        """Learn from a finished generation, and contribute if a round is due."""
        job, result, tail = turn.job, turn.result, turn.result.ended.tail
        learner = self._here.learner
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
            coin=audit_coin(turn.session),
        )
        if text is not None:
            self._auditor.wait(audit_of(turn, measures, text, now_s))
        known = self._here.peers().collaboration[config.peers]
        for seen in result.observed:
            self._here.peers().learn(config, seen, result.similarity)
        if result.escalated:
            known.escalated(result.escalation_bytes / result.escalated)
        result.certificate, result.fleet = learner.certificate(measures, config), learner.fleet
        self._here.party.counters.set_all(tau=result.tau, similarity=result.similarity)
        if (evidence := result.certificate) is not None:
            limit = evidence.limit(config.confidence)
            self._here.party.counters.set_all(risk=evidence.estimate, risk_limit=limit, risk_generations=evidence.texts)
            self._here.party.counters.set_all(risk_budget=config.budget)
        if (fleet := result.fleet) is not None:
            export_fleet(self._here.party.counters, fleet, config.confidence)
        contributes = choices.THRESHOLDS[config.threshold].learns and not self._guest
        if contributes and learner.due(config, now_s):
            await self._contribute(config, result, now_s)

    async def _contribute(self, config: Generation, result: GenerationResult, now_s: float) -> None:
        number = self._here.learner.round
        ended = self._here.learner.contribution(config, now_s)
        if ended is None:
            warn_once(log, "releases", "contributions have ended: all federation.releases are used")
            return
        thresholds, curves = ended
        message = Contribution(
            **self._here.party.stamp(),
            round=number,
            members=1,
            thresholds=thresholds,
            curves=curves,
            evidence=self._here.learner.evidence(),
        )
        self._here.party.counters.add("contributions")
        sent = await self._here.send(topics.FL_UPDATE, message)
        result.cluster_bytes += sent.packet_bytes
        if self._sampler is not None and self._sampler.due:
            profile = Profile(**self._here.party.stamp(), agent=self._here.party.stamp.sender, **self._sampler.take())
            sent = await self._here.send(topics.PROFILE, profile)
            result.cluster_bytes += sent.packet_bytes
