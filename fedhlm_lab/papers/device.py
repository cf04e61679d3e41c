"""A device on cached laws: the agent's own machine, learner and peers, and the cloud's own verifier.

A request is one token after a prompt whose laws are known. The verdict travels as the message that a cloud sends, so
that its rounding counts too.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_verifier.verdicts import verdict_of
from cloud_verifier.verifier import Block, Session, Settled, settle
from edge_agent.coins import audit_coin
from edge_agent.events import Answered, Drafted, DraftNext, Escalate, Finish, Observation, Plan
from edge_agent.generation import GenerationMachine, scored
from edge_agent.learner import Learner
from edge_agent.measures import measures_of
from edge_agent.model import Drawn
from edge_agent.peers import Peers
from edge_agent.planning import event_of, plan_of
from edge_agent.result import Job
from fedhlm import choices
from fedhlm.decoding.couplings import COUPLINGS, split_laws
from fedhlm.decoding.important import important_of
from fedhlm.decoding.uncertainty import UNCERTAINTIES
from fedhlm.protocol.fields import Source
from fedhlm.protocol.messages import SCHEMA_VERSION, Escalation, Sampling, Verdict
from fedhlm.settings import Generation
from fedhlm_lab.papers.laws import Laws
from fedhlm_lab.papers.requests import LabRequest
from fedhlm_lab.studies.driving import drive

CONTEXT_MAX: Final = 1 << 20


class LabOutcome(NamedTuple):
    """What became of a request.

    `source` settled the token. `right` says that it names the topic, and `agrees` that it is the LLM's. `beta` is the
    draft's rejection probability, where a verdict told it. `looked_up` says that peers were asked, and `audited` that
    the token was scored after the text had ended.
    """

    source: Source
    token: int
    right: bool
    agrees: bool
    doubt: float
    beta: float | None
    looked_up: bool
    audited: bool
    tau: float


class LawTexts:
    """The requests' laws, and what the SLM draws from them, remembered from one policy to the next.

    Drafts with whole laws are remembered only with `keep_laws`: those of many requests would fill the memory. `word`
    returns the text of a token, and `topics` the right word of each article.
    """

    def __init__(
        self, laws: Laws, topics: Sequence[str], word: Callable[[int], str], *, keep_laws: bool = False
    ) -> None:
        self.laws = laws
        self._topics = topics
        self._word = word
        self._keep_laws = keep_laws
        self._drawn: dict[tuple[int, Sampling, str], Drawn] = {}
        self._target: dict[tuple[int, Sampling], int] = {}

    def row(self, article: int) -> int:
        """The last row of an article."""
        return int(self.laws.first[article]) + self.laws.prompts[article].rows - 1

    def draw(self, article: int, sampling: Sampling, uncertainty: str) -> Drawn:
        """Draft the token after an article, as `edge_agent.model.Slm` does."""
        name = (article, sampling, uncertainty)
        if (known := self._drawn.get(name)) is not None:
            return known
        logits, position = self.laws.small[self.row(article)], len(self.laws.prompts[article].ids)
        token, prob, law = COUPLINGS[sampling.coupling].draft(logits, sampling, position)
        doubt = UNCERTAINTIES[uncertainty](logits, token, sampling, position)
        drawn = Drawn(token, prob, doubt, law, self.laws.keys[self.row(article)].tobytes())
        if self._keep_laws or not law:
            self._drawn[name] = drawn
        return drawn

    def target(self, article: int, sampling: Sampling) -> int:
        """The LLM's own token after an article."""
        name = (article, sampling)
        if name not in self._target:
            logits, position = self.laws.large[self.row(article)], len(self.laws.prompts[article].ids)
            oracle = COUPLINGS[COUPLINGS[sampling.coupling].alone]
            self._target[name] = oracle.settle(logits, sampling, position, None, b"")
        return self._target[name]

    def read(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return "".join(map(self._word, ids))

    def right(self, article: int, token: int) -> bool:
        """Whether a token names the topic of an article."""
        return self._word(token).strip() == self._topics[article]

    def settled(self, article: int, session: Session, block: Block) -> Settled:
        """Settle a block of one token by the cloud's rules; the row behind it is unknown (nan), and nothing reads it."""
        work = settle(session, block)
        feed = next(work)
        rows: NDArray[Any] = np.full((feed.rows, self.laws.facts.vocab_size), np.nan, np.float32)  # (rows, V)
        rows[0] = self.laws.large[self.row(article)]
        try:
            work.send(rows)
        except StopIteration as end:
            return Settled(*end.value)
        raise ValueError("a request must be settled by one row (got a block that wants more)")


Saw = Callable[[Verdict, int, bool], object]
"""Told of each verdict, with the number of its ids, and whether it is on an audit: what an edge sees pass."""


class LawDevice:
    """One client. `publish` is told of the doubtful drafts that it escalates, and `saw` of the verdicts."""

    def __init__(
        self,
        name: str,
        config: Generation,
        learner: Learner,
        texts: LawTexts,
        *,
        temperature: float = 0.0,
        publish: Callable[[str, Escalate], object] = lambda _name, _block: None,
        saw: Saw = lambda _verdict, _added, _audit: None,
    ) -> None:
        self.name = name
        self.config = config
        self.learner = learner
        self.peers = Peers(name, lambda: 0.0, size=config.consensus.size, max_age_s=1.0)
        self._texts = texts
        self._temperature = temperature
        self._publish = publish
        self._saw = saw
        self._important = important_of(config.always_verify, texts.read)

    def answer(self, request: LabRequest) -> LabOutcome:
        """Settle one request, audit it if the coin says so, and learn from it."""
        article, config, learner = request.article, self.config, self.learner
        sampling = Sampling(request.seed, self._temperature, 1.0, config.coupling)
        prompt = self._texts.laws.prompts[article].ids
        plan = plan_of(Job(config, sampling, 1, CONTEXT_MAX, frozenset()), learner, self.peers)
        looked: list[Drafted] = []
        machine = GenerationMachine(plan._replace(consult=_noting(plan, looked)), list(prompt))
        drawn = self._texts.draw(article, sampling, config.uncertainty)

        def draft(wanted: DraftNext) -> Drafted:
            return Drafted(
                wanted.revision,
                len(wanted.ids),
                drawn.token,
                drawn.prob,
                drawn.uncertainty,
                drawn.law,
                drawn.key,
                self._important([], drawn.token),
            )

        def verdict(block: Escalate) -> Answered:
            self._publish(self.name, block)
            laws = split_laws(COUPLINGS[sampling.coupling], block.laws, len(block.ids), self._vocab)
            return self._verdict(article, sampling, Block(block.base, block.ids, block.fixed, block.extend, laws))

        done = drive(machine, draft, verdict)
        measures = measures_of(config, sampling, learner.pair)
        learner.observe(measures, config, done.observed)
        for seen in done.observed:
            self.peers.learn(config, seen, plan.similarity)
        text = learner.finished(
            measures,
            config,
            done.observed,
            done.end.tail.tokens,
            tokens=1,
            tau=plan.tau,
            escalation_bytes=0,
            escalated=machine.tally.escalated,
            coin=audit_coin(request.seed),
        )
        observed = done.observed
        if text is not None and done.end.tail.tokens:
            observed = self._audit(article, sampling, plan, done.end)
            learner.observe(measures, config, observed)
            learner.audited(text, [seen.committed_harm for seen in observed])
        (token,) = done.tokens
        return LabOutcome(
            token.source,
            token.token,
            self._texts.right(article, token.token),
            token.token == self._texts.target(article, sampling),
            drawn.uncertainty,
            observed[0].beta if observed else None,
            bool(looked) and choices.PEERS[config.peers].asked,
            any(seen.audit for seen in observed),
            plan.tau,
        )

    @property
    def _vocab(self) -> int:
        return self._texts.laws.facts.vocab_size

    def _verdict(self, article: int, sampling: Sampling, block: Block, *, audit: bool = False) -> Answered:
        prompt = list(self._texts.laws.prompts[article].ids)
        outcome = self._texts.settled(article, Session(sampling, self._vocab, frozenset(), prompt), block)
        header: dict[str, Any] = {"version": SCHEMA_VERSION, "sender": "cloud", "sequence": 0, "sent_ms": 0}
        about = Escalation(**header, session=0, epoch=0, base=block.base, ids=b"", patience_ms=0)
        verdict = verdict_of(about, outcome, lambda: header, vocab_size=self._vocab)
        if verdict is None or not isinstance(event := event_of(verdict, self._vocab), Answered):
            raise ValueError(f"the cloud must answer a block (got {verdict!r})")
        self._saw(verdict, len(outcome.ids), audit)
        return event

    def _audit(self, article: int, sampling: Sampling, plan: Plan, end: Finish) -> list[Observation]:
        """Have the tail scored, as `edge_agent.audits` has it; here the answer comes at once."""
        tail = end.tail
        ids = [token.token for token in tail.tokens]
        block = Block(len(tail.context), ids, len(ids), 0, [b""] * len(ids))
        answer = self._verdict(article, sampling, block, audit=True)
        return [scored(plan.harm, t, answer, i, skipped=True, audit=True) for i, t in enumerate(tail.tokens)]


def _noting(plan: Plan, looked: list[Drafted]) -> Callable[[Drafted], Any]:
    """The plan's `consult`, which notes every lookup."""

    def consult(draft: Drafted) -> Any:
        looked.append(draft)
        return plan.consult(draft)

    return consult
