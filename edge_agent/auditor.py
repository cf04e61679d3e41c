"""Sends audits over the bus: as riders of the agent's escalations, or alone if no escalation carried them in time."""

import asyncio
from collections.abc import Callable

from edge_agent.accounts import OpenText
from edge_agent.audits import ANSWER_S, WAIT_S, Audit, Audits
from edge_agent.events import Answered, Event, Unprimed, Working
from edge_agent.measures import Measures
from edge_agent.surroundings import Surroundings
from edge_agent.turn import Turn
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Escalation, Fingerprint, Hints, Rider


class Auditor:
    """Sends the audits of one device, and tells its learner and its peers the results."""

    def __init__(self, here: Surroundings, fingerprint: Fingerprint, *, clock_s: Callable[[], float]) -> None:
        self.audits = Audits(fingerprint)
        self._here = here
        self._fingerprint = fingerprint
        self._clock_s = clock_s
        self._changed = asyncio.Event()

    def wait(self, audit: Audit) -> None:
        """Queue an audit until an escalation carries it."""
        self._give_up(self.audits.wait(audit))
        self._changed.set()

    def riders(self, *, alone: bool = False) -> tuple[Rider, ...]:
        """The riders for the escalation that is sent now, or for a message for audits `alone`. They count as sent."""
        return tuple(audit.rider(self._fingerprint) for audit in self.audits.riders(self._clock_s(), alone=alone))

    def hear(self, session: int, event: Event) -> bool:
        """Handle the answer to an audit. Return False if `session` has no audit."""
        if session not in self.audits:
            return False
        match event:
            case Answered():
                if (audit := self.audits.answered(session, event)) is not None:
                    self._end(audit)
            case Unprimed():
                self.audits.unprimed(session)
            case Working():
                pass
            case _:
                if (audit := self.audits.refused(session)) is not None:
                    self._give_up([audit])
        return True

    def _end(self, audit: Audit) -> None:
        scores = [audit.scores[place] for place in range(len(audit.tail.tokens))]
        self._here.party.counters.add("audits")
        self._here.learner.observe(audit.measures, audit.config, scores)
        self._here.learner.audited(audit.text, [s.committed_harm for s in scores])
        for seen in scores:
            self._here.peers().learn(audit.config, seen, audit.similarity)

    def _give_up(self, audits: list[Audit]) -> None:
        for audit in audits:
            self._here.party.counters.add("lost_audits")
            self._here.learner.audited(audit.text, None)

    def give_up_all(self) -> None:
        """Give up all open audits, because another LLM answers now."""
        self._give_up(self.audits.clear())

    async def send_overdue(self) -> None:
        """Send the audits that no escalation has carried in time, and give up those that nobody answers."""
        now = self._clock_s()
        if self._here.party.journal is not None:
            self._here.party.journal.note("round", "audits", at_s=now)
        alone, given_up = self.audits.overdue(now)
        self._give_up(given_up)
        if not alone:
            return
        first, *rest = self.riders(alone=True)
        message = Escalation(
            **self._here.party.stamp(),
            session=first.session,
            epoch=first.epoch,
            base=first.base,
            ids=first.ids,
            patience_ms=round(ANSWER_S * 1000.0),
            fixed=first.fixed,
            extend=0,
            before=first.before,
            hints=Hints(riders=tuple(rest)) if rest else None,
        )
        sent = await self._here.send(topics.ESCALATE, message, expiry_s=ANSWER_S)
        self._here.party.counters.add_all(
            audit_messages=bool(sent), uplink_messages=bool(sent), uplink_bytes=sent.packet_bytes
        )

    async def keep(self) -> None:
        """Send overdue audits until cancelled."""
        while True:
            if self.audits.full:
                await self.send_overdue()
            wake_s = self.audits.wake_s()
            try:
                async with asyncio.timeout_at(None if wake_s == float("inf") else wake_s):
                    await self._changed.wait()
                    self._changed.clear()
            except TimeoutError:
                await self.send_overdue()


def audit_of(turn: Turn, measures: Measures, text: OpenText, now_s: float) -> Audit:
    """Create the audit of a generation that has ended. `text` waits for its result."""
    job, result = turn.job, turn.result
    tail = result.ended.tail
    return Audit(
        turn.session,
        tail._replace(primed=tail.primed and result.finish != "cancelled"),  # a cancelled text has closed its session
        text,
        job.config,
        measures,
        job.sampling,
        result.similarity,
        turn.plan.harm,
        now_s + WAIT_S,
    )
