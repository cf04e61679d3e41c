"""What a device learns about its doubts, and what its cluster told it: curves of harm, thresholds, certificates.

Everything here is a function of observations; `edge_agent.policy` decides what follows from it. Messages are encoded and decoded, but not sent. A measure names what a
curve is about (form of doubt, coupling, greedy or sampled, pair of models), so that different ways of generating and
different models never mix.
"""

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from edge_agent.accounts import OpenText, PaperState, Slack
from edge_agent.events import Observation, Token
from edge_agent.measures import Measures
from edge_agent.policy import CurvePair, Knowledge
from fedhlm import choices
from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.learning.certificate import Certificate, CertificateState, audit_chance, tail_probability
from fedhlm.learning.curve import Curve, bin_of, isotonic
from fedhlm.learning.evidence import certificates_of
from fedhlm.learning.learnt_state import check_thresholds
from fedhlm.learning.privacy import noised, sigma_for
from fedhlm.learning.thresholds import (
    OPTIMISERS,
    LocalRound,
    PaperSettings,
    harm_up_to,
)
from fedhlm.protocol.fields import MAX_CURVES, Count, Milliseconds, Pair
from fedhlm.protocol.fingerprint import large_of, pair_in, pair_of
from fedhlm.protocol.messages import Evidence, Fingerprint, Learned, PaperThreshold
from fedhlm.protocol.packing import check_saved_version
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Federation, Generation

TRANSMITTED_MAX: Final = 65_536
SPACE: Final = "learner/3"
PAIRS_KEPT: Final = 4  # pairs of models whose state is kept, the current one included
HARMLESS: Final = 0.2  # a doubt is harmless if m(u) is at most this share of the budget


class Snapshot(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A learner as it is saved. `pairs` are those with state, the current one last."""

    space: str
    round: Count
    releases: Count
    pairs: list[Pair]
    paper: dict[Pair, PaperState]
    curves: dict[str, bytes]
    cluster: dict[str, bytes]
    certificates: dict[str, CertificateState]
    began_ms: Milliseconds | None = None


class Learner:
    """The knowledge of one device. `rng` draws the privacy noise, and is not used without privacy.

    What was learnt about another pair of models than the current one is set aside: it rules nothing and is not
    contributed, and it counts again when its pair comes back.
    """

    def __init__(self, federation: Federation, rng: np.random.Generator) -> None:
        self.round = 0
        self._recent: list[Pair] = [""]  # pairs with state, the current one last
        self._paper: defaultdict[Pair, PaperState] = defaultdict(PaperState)
        self._told: Mapping[Pair, PaperThreshold] = {}  # the cluster's latest thresholds
        self._fleet: Mapping[Pair, Certificate] = {}
        self.began_ms: int | None = None  # when the evidence began, Unix time in milliseconds
        self.curves: defaultdict[str, Curve] = defaultdict(Curve.empty)
        self.cluster: dict[str, Curve] = {}
        self._transmitted: list[tuple[float, float]] = []  # (u, beta) of the tokens transmitted in this round
        self._certificates: defaultdict[str, Certificate] = defaultdict(Certificate)
        self._open: deque[OpenText] = deque()
        self._slack: defaultdict[str, Slack] = defaultdict(Slack)
        self._escalation_bytes = 0.0
        self._escalated = 0
        self._federation = federation
        self._rng = rng
        self._releases = 0
        self._tokens = 0
        self._round_began_s: float | None = None  # the first generation begins the first round

    @property
    def pair(self) -> Pair:
        """The pair of models that generates now (`fedhlm.protocol.fingerprint.pair_of`)."""
        return self._recent[-1]

    @property
    def threshold(self) -> float | None:
        """The threshold of the published rule (`paper-fl`) for the current pair; None before its first round."""
        return self._paper[self.pair].threshold

    def meet(self, small: Fingerprint, large: Fingerprint | None) -> Pair | None:
        """Note which models work together. Return the former pair if its state is set aside by that.

        While no cloud is known (`large` None), the last known LLM counts. What a device did before it knew any LLM
        belongs to the first one that it meets.
        """
        former, pair = self.pair, pair_of(small, large, otherwise=large_of(self.pair))
        if pair == former:
            return None
        self._transmitted.clear()
        self._recent = [*(known for known in self._recent if known != pair), pair]
        if former in ("", pair_of(small, None)):
            self._adopt(former)
            former = ""
        for old in self._recent[:-PAIRS_KEPT]:
            self._drop(old)
        self._recent = self._recent[-PAIRS_KEPT:]
        if pair in self._told:
            self._paper[pair].hear(self._told[pair])
        return former or None

    def met(self, pair: Pair) -> bool:
        """Whether a text that began with `pair` still belongs to the current pair."""
        return pair == self.pair or not large_of(pair)

    def _adopt(self, unknown: Pair) -> None:
        """Move the state of a pair without LLM to the current pair."""
        self._recent.remove(unknown)

        def renamed(measure: str) -> str:
            return measure.removesuffix(unknown) + self.pair

        for name in [name for name in self.curves if pair_in(name) == unknown]:
            self.curves[renamed(name)] += self.curves.pop(name)
        for name in [name for name in self._certificates if pair_in(name) == unknown]:
            self._certificates[renamed(name)] += self._certificates.pop(name)
        for name in [name for name in self._slack if pair_in(name) == unknown]:
            self._slack[renamed(name)] = self._slack.pop(name)
        for text in self._open:
            text.measure = renamed(text.measure) if pair_in(text.measure) == unknown else text.measure
        if unknown in self._paper:
            self._paper[self.pair] = self._paper.pop(unknown)

    def _drop(self, pair: Pair) -> None:
        """Forget a pair."""
        by_measure: tuple[dict[str, Any], ...] = (self.curves, self._certificates, self._slack)
        for table in by_measure:
            for name in [name for name in table if pair_in(name) == pair]:
                del table[name]
        self._paper.pop(pair, None)

    def _current(self) -> dict[str, Curve]:
        return {name: curve for name, curve in self.curves.items() if pair_in(name) == self.pair}

    def observe(self, measures: Measures, config: Generation, observations: Sequence[Observation]) -> None:
        """Learn what the target said of drafted tokens."""
        draft, peers = self.curves[measures.draft], self.curves[measures.peers]
        for seen in observations:
            if seen.rule and not seen.skipped:
                continue  # no threshold decides on it, so the budget does not count it
            if not seen.audit:  # otherwise the decision was counted when the text ended
                draft.see(seen.uncertainty)
            if seen.harm is not None:
                draft.add(seen.uncertainty, seen.harm)
            if choices.PEERS[config.peers].asked:
                # A token without a proposal counts where no threshold reaches, so that shares refer to all tokens.
                score, harm = seen.match or (1.0, 1.0)
                if not seen.audit:
                    peers.see(score)
                peers.add(score, harm)
            if not seen.skipped and len(self._transmitted) < TRANSMITTED_MAX:
                self._transmitted.append((seen.uncertainty, seen.beta))

    def finished(
        self,
        measures: Measures,
        config: Generation,
        observations: Sequence[Observation],
        tail: Sequence[Token],
        *,
        tokens: int,
        tau: float,
        escalation_bytes: int,
        escalated: int,
        coin: float,
    ) -> OpenText | None:
        """Account for the skipped tokens of a finished generation. Return its text if an audit is due.

        `coin` is uniform in (0, 1). Tokens that were committed because the link was down are always audited.
        """
        self._tokens += tokens
        self._escalation_bytes += escalation_bytes
        self._escalated += escalated
        for token in tail:
            self.curves[measures.draft].see(token.uncertainty)
            if choices.PEERS[config.peers].asked:
                self.curves[measures.peers].see(1.0 if token.match is None else token.match.score)
        if config.audit == 0.0:
            return None
        ruled = sum(bool(o.rule) and not o.skipped for o in observations)  # verified whatever their doubt
        local = [o for o in observations if SOURCES[o.source].kept and not (o.rule and not o.skipped)]
        self._slack[measures.draft].update(
            eligible=sum(o.uncertainty <= tau for o in local) + len(tail),
            skipped=sum(o.skipped for o in local) + len(tail),
        )
        scored = [o.committed_harm for o in observations if o.skipped]
        lost = any(SOURCES[token.source].unreachable for token in tail)
        probability = 1.0 if lost else tail_probability(self.audit_chances(measures, config, tail, tau=tau))
        text = OpenText(
            measures.draft,
            max(tokens - ruled, len(scored) + len(tail)),
            scored,
            len(tail),
            probability,
            over=coin >= probability,
        )
        self._open.append(text)
        self._fold()
        return None if text.over else text

    def spoilt(self, measures: Measures, config: Generation, *, tokens: int, kept: int) -> None:
        """Account for a text during which the models changed: its `kept` tokens count as wrong, and teach nothing."""
        self._tokens += tokens
        if config.audit:
            self._open.append(OpenText(measures.draft, tokens, [1.0] * kept, 0, 1.0, over=True))
            self._fold()

    def audited(self, text: OpenText, harms: Sequence[float] | None) -> None:
        """Finish the audit of a text. `harms` None means that nobody answered; then every token counts as wrong."""
        text.audited = [1.0] * text.tail if harms is None else list(harms)
        text.over = True
        self._fold()

    def audit_chances(
        self, measures: Measures, config: Generation, tail: Sequence[Token], *, tau: float
    ) -> list[float]:
        """The chance of each token of an unscored tail that it is audited. `tau` is the threshold that kept them.

        A token whose doubt makes harm likely has `config.audit`. The others have less with much evidence, because the
        fewer of them need to be seen to show that they are harmless. The certificate that counts is that of the fleet,
        as far as this device knows its size. Its harm is the observed one, or what the device's curve expects below
        `tau` if that is more: slopes retire for good, and at first few wrong tokens have been audited.
        """
        own, evidence = self._curves_of(measures.draft)
        m = isotonic(own)
        known = self._certificates[measures.draft]
        harmless = audit_chance(
            config.audit,
            max(known.tokens, evidence.total_seen),
            max(known.estimate, harm_up_to(own, m, tau) / self._slack[measures.draft].factor),
            budget=config.budget,
            confidence=config.confidence,
        )
        if evidence is not own:
            m = np.maximum(m, isotonic(evidence))  # a cluster that lies can only raise a chance
        likely = HARMLESS * config.budget
        return [config.audit if m[bin_of(token.uncertainty)] > likely else harmless for token in tail]

    def _fold(self) -> None:
        """Add texts to their certificates in order, so that later texts cannot influence earlier ones."""
        while self._open and self._open[0].over:
            text = self._open.popleft()
            self._certificates[text.measure].add(
                text.tokens, text.scored, text.tail, text.audited, probability=text.probability
            )

    def certificate(self, measures: Measures, config: Generation) -> Certificate | None:
        """The certificate of the error per token, over all texts accounted for; None if auditing is disabled."""
        return None if config.audit == 0.0 else self._certificates[measures.draft].copy()

    def begin(self, wall_ms: int) -> None:
        """Begin an evidence, unless one was restored. `wall_ms` is the Unix time in milliseconds."""
        if self.began_ms is None:
            self.began_ms = wall_ms

    def evidence(self) -> Evidence | None:
        """The certificate of all texts of the current pair, for the fleet's; None without any.

        With privacy it is never sent: its sums carry no noise.
        """
        mine = [known for name, known in self._certificates.items() if pair_in(name) == self.pair and known.tokens]
        if not mine or self.began_ms is None or not large_of(self.pair) or self._federation.epsilon > 0.0:
            return None
        return Evidence(self.began_ms, {self.pair: sum(mine, Certificate()).to_bytes()})

    @property
    def fleet(self) -> Certificate | None:
        """The fleet's certificate for the current pair, as the cluster told it last."""
        return self._fleet.get(self.pair)

    def knowledge(self, measures: Measures, config: Generation) -> Knowledge:
        """What decides on the next generation (`edge_agent.policy`)."""
        slack = self._slack.get(measures.draft)
        return Knowledge(
            draft=self._curves_of(measures.draft),
            peers=self._curves_of(measures.peers),
            certificate=self.certificate(measures, config),
            slack=slack.factor if slack else 1.0,
            published=self.threshold,
            escalation_bytes=self.escalation_bytes,
        )

    @property
    def escalation_bytes(self) -> float:
        """The mean number of bytes per escalated token; 0 before the first."""
        return self._escalation_bytes / self._escalated if self._escalated else 0.0

    def _curves_of(self, measure: str) -> CurvePair:
        own = self.curves.get(measure, Curve.empty())
        cluster = self.cluster.get(measure)
        return CurvePair(own, own if cluster is None or cluster.total_weight < own.total_weight else cluster)

    def due(self, config: Generation, now_s: float) -> bool:
        """Whether this round's contribution must be sent."""
        if self._round_began_s is None:
            self._round_began_s = now_s
        learning = config.learning
        seen = max((curve.total_seen for curve in self._current().values()), default=0.0)
        return self._tokens >= max(learning.round_tokens, learning.growth * seen) or (
            self._tokens > 0 and now_s - self._round_began_s >= learning.round_s
        )

    def contribution(
        self, config: Generation, now_s: float
    ) -> tuple[dict[Pair, PaperThreshold], dict[str, bytes]] | None:
        """End a round. Return the threshold and the encoded curves of the current pair to send.

        The result is None if no privacy releases are left.
        """
        federation = self._federation
        if federation.epsilon > 0.0 and self._releases >= federation.releases:
            return None
        descends = choices.THRESHOLDS[config.threshold].descends
        paper = {self.pair: self._paper_update(config)} if descends else {}
        self.round += 1
        self._releases += 1
        self._tokens = 0
        self._transmitted.clear()
        self._round_began_s = now_s
        if federation.epsilon > 0.0:
            # A token may be in two curves, that of the drafts and that of the peers.
            sigma = math.sqrt(2.0) * sigma_for(federation.epsilon, federation.delta, federation.releases)
            shared = {name: noised(curve, sigma, self._rng) for name, curve in self._current().items()}
        else:
            shared = self._current()
        largest = sorted(shared, key=lambda name: -shared[name].total_weight)[:MAX_CURVES]
        packed = {name: shared[name].to_bytes() for name in largest if shared[name].total_seen > 0.0}
        if config.learning.forgetting > 0.0:
            for name in self._current():
                self.curves[name] = self.curves[name].decayed(1.0 - config.learning.forgetting)
        return paper, packed

    def _paper_update(self, config: Generation) -> PaperThreshold:
        known = self._paper[self.pair]
        local = config.tau if known.threshold is None else known.threshold
        pairs = np.array(self._transmitted, np.float64).reshape(-1, 2)  # (n, 2)
        given = LocalRound(
            pairs,
            local,
            global_threshold=local if known.published is None else known.published,
            client_control=known.control,
            server_control=known.server_control,
            number=self.round,
            settings=PaperSettings.of(config.learning),
        )
        update = OPTIMISERS[given.settings.optimiser](given)
        known.threshold, known.control = update.threshold, update.control
        return PaperThreshold(update.threshold, update.count, update.control, update.steps)

    def learned(self, state: Learned) -> None:
        """Adopt what the cluster knows.

        Raises:
            ProtocolError: a curve is malformed, or a control is impossible. Nothing changes then.
        """
        check_thresholds(state.thresholds)
        curves = {name: Curve.from_bytes(data) for name, data in state.curves.items()}
        fleet = certificates_of(state.evidence)
        self.cluster = curves
        self._fleet = fleet
        self._told = state.thresholds
        if self.pair in self._told:
            self._paper[self.pair].hear(self._told[self.pair])

    def snapshot(self) -> bytes:
        """Encode everything that must survive a restart."""
        return msgspec.msgpack.encode(
            Snapshot(
                SPACE,
                self.round,
                self._releases,
                self._recent,
                dict(self._paper),
                {name: curve.to_bytes() for name, curve in self.curves.items()},
                {name: curve.to_bytes() for name, curve in self.cluster.items()},
                self._settled(),
                self.began_ms,
            )
        )

    def _settled(self) -> dict[str, CertificateState]:
        """The certificates as they would be if all tokens of open audits were wrong."""
        settled = {name: known.copy() for name, known in self._certificates.items()}
        for text in self._open:
            harms = text.audited if text.over else [1.0] * text.tail
            known = settled.setdefault(text.measure, Certificate())
            known.add(text.tokens, text.scored, text.tail, harms, probability=text.probability)
        return {name: known.state() for name, known in settled.items()}

    def restore(self, data: bytes) -> None:
        """Restore the state that `snapshot` saved.

        Raises:
            ProtocolError: the data is not a snapshot of this version. Nothing changes then.
        """
        check_saved_version(data, SPACE, what="the learner's snapshot")
        try:
            kept = msgspec.msgpack.decode(data, type=Snapshot)
            curves = {name: Curve.from_bytes(raw) for name, raw in kept.curves.items()}
            cluster = {name: Curve.from_bytes(raw) for name, raw in kept.cluster.items()}
            certificates = {name: Certificate.of(state) for name, state in kept.certificates.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as exc:
            raise ProtocolError(f"learner's snapshot cannot be decoded: {exc}") from exc
        for known in kept.paper.values():
            for control in (known.control, known.server_control):
                check_thresholds({"one": PaperThreshold(0.0, 0, control)})
        if not 1 <= len(kept.pairs) <= PAIRS_KEPT:
            raise ProtocolError(f"snapshot must hold 1 to {PAIRS_KEPT} pairs of models (got {len(kept.pairs)})")
        self.round, self._releases, self.began_ms = kept.round, kept.releases, kept.began_ms
        self._recent = kept.pairs
        self._paper.update(kept.paper)
        self.curves.update(curves)
        self.cluster = cluster
        self._certificates.update(certificates)
