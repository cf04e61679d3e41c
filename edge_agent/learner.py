"""What a device learns about its doubts, and what its cluster told it: curves of harm, the threshold, the error budget.

Everything here is a function of what was observed; messages are made and read, but not sent. A measure names what a
curve is about (uncertainty, coupling, greedy or sampled), so that different ways of generating never mix.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.events import Finish, Observation
from fedhlm import choices
from fedhlm.errors import ConfigError, ProtocolError
from fedhlm.learning.budget import Budget
from fedhlm.learning.curve import Curve, shrunk
from fedhlm.learning.federation import check_threshold
from fedhlm.learning.privacy import noised, sigma_for
from fedhlm.learning.thresholds import KEEP_NONE, OPTIMISERS, PaperSettings, tau_of_budget, tau_of_price
from fedhlm.protocol.messages import MAX_CURVES, Count, Learned, PaperThreshold, Sampling, Unit
from fedhlm.protocol.sources import SOURCES
from fedhlm.settings import Federation, Generation

PAIRS_MAX: Final = 65_536
SPACE: Final = "learner/1"
SLACK_MEMORY: Final = 0.95  # of what was counted, a generation later
SLACK_EVIDENCE: Final = 10.0  # skipped tokens
SLACK_RISE: Final = 1.03  # a generation


class Measures(NamedTuple):
    """The names of the curves that a generation feeds: of its own drafts, of its peers' proposals.

    `audit` is the probability that the end of it which nobody scored is audited.
    """

    draft: str
    peers: str
    audit: float


def measures_of(config: Generation, sampling: Sampling, max_tokens: int) -> Measures:
    """What belongs to a configuration and a request.

    The audit's probability is `generation.audit` for each token that is asked for, so that its share of the messages
    is the same for short and long texts; all of it is known before anything is drawn, as the estimate demands.
    Powers of two keep the number of budgets small.
    """
    law = f"{sampling.coupling}/{'greedy' if sampling.temperature == 0.0 else 'sampled'}"
    wanted = config.audit * max_tokens
    audit = min(1.0, 2.0 ** math.floor(math.log2(wanted))) if wanted > 0.0 else 0.0
    return Measures(f"{config.uncertainty}/{law}", f"{config.peers}/{law}", audit)


class Slack:
    """How many tokens below tau there are for each that is skipped: a block verifies for nothing what follows a doubt.

    The factor rises slowly, because a higher tau leaves less to verify, and falls at once.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._eligible = 0.0
        self._skipped = 0.0

    def update(self, *, eligible: int, skipped: int) -> None:
        """Counts of one generation."""
        self._eligible = SLACK_MEMORY * self._eligible + eligible
        self._skipped = SLACK_MEMORY * self._skipped + skipped
        if self._skipped >= SLACK_EVIDENCE:
            self.factor = max(1.0, min(self._eligible / self._skipped, SLACK_RISE * self.factor))


class Snapshot(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A learner on disk."""

    space: str
    round: Count
    releases: Count
    threshold: Unit | None
    control: float
    server_control: float
    curves: dict[str, bytes]
    cluster: dict[str, bytes]
    budgets: dict[str, dict[str, float]]


class Learner:
    """One device's knowledge. `rng` makes the noise of privacy; it is not used without."""

    def __init__(self, federation: Federation, rng: np.random.Generator) -> None:
        self.round = 0
        self.curves: defaultdict[str, Curve] = defaultdict(Curve.empty)
        self.cluster: dict[str, Curve] = {}
        self.threshold: float | None = None  # the published rule's; None before its first round
        self._global_threshold: float | None = None
        self._control = 0.0
        self._server_control = 0.0
        self._pairs: list[tuple[float, float]] = []  # (u, beta) of this round's transmitted tokens
        self._budgets: dict[str, Budget] = {}
        self._slack: defaultdict[str, Slack] = defaultdict(Slack)
        self._escalation_bytes = 0.0
        self._escalated = 0
        self._federation = federation
        self._rng = rng
        self._releases = 0
        self._tokens = 0
        self._round_began_s: float | None = None  # the first generation begins the first round

    def observe(self, measures: Measures, config: Generation, observations: Sequence[Observation]) -> None:
        """Take in what the target said of drafted tokens."""
        draft, peers = self.curves[measures.draft], self.curves[measures.peers]
        for seen in observations:
            draft.see(seen.uncertainty)
            if seen.harm is not None:
                draft.add(seen.uncertainty, seen.harm)
            if choices.PEERS[config.peers].asked:
                # A token that peers had no say in counts where no threshold reaches, so that shares are of all tokens.
                score, harm = seen.match or (1.0, 1.0)
                peers.see(score)
                peers.add(score, harm)
            if not seen.skipped and len(self._pairs) < PAIRS_MAX:
                self._pairs.append((seen.uncertainty, seen.beta))

    def finished(
        self,
        measures: Measures,
        config: Generation,
        observations: Sequence[Observation],
        finish: Finish,
        *,
        tokens: int,
        tau: float,
        audited: bool,
        escalation_bytes: int,
        escalated: int,
    ) -> None:
        """One generation is over: account for its skipped tokens.

        A tail that the audit's coin chose but nobody scored, and tokens committed because the link was gone, count as
        wrong: nothing is hoped.
        """
        self._tokens += tokens
        self._escalation_bytes += escalation_bytes
        self._escalated += escalated
        for uncertainty, _ in finish.unseen:
            self.curves[measures.draft].see(uncertainty)
            if choices.PEERS[config.peers].asked:
                self.curves[measures.peers].see(1.0)
        if measures.audit == 0.0:
            return
        local = [o for o in observations if SOURCES[o.source].kept]
        self._slack[_kind(measures)].update(
            eligible=sum(o.uncertainty <= tau for o in local) + len(finish.unseen),
            skipped=sum(o.skipped for o in local) + len(finish.unseen),
        )
        seen = [o.committed_harm for o in observations if o.skipped and not o.audit]
        tail = [o.committed_harm for o in observations if o.skipped and o.audit]
        lost = sum(SOURCES[source].unreachable for _, source in finish.unseen)
        seen += [1.0] * lost
        unseen = len(finish.unseen) - lost
        harms = tail + [1.0] * unseen if audited else None
        self.budget(measures, config).add_session(tokens, seen, harms, len(tail) + unseen)

    def budget(self, measures: Measures, config: Generation) -> Budget:
        """The running error budget of a measure and an audit's probability; another confidence begins a new one."""
        name, delta = _kind(measures), 1.0 - config.confidence
        known = self._budgets.get(name)
        if known is None or known.delta != delta:
            known = self._budgets[name] = Budget(measures.audit, delta)
        return known

    def risk(self, measures: Measures, config: Generation) -> Budget | None:
        """The budget, with R-hat and its limit; None where nothing is audited."""
        return None if measures.audit == 0.0 else copy(self.budget(measures, config))

    def tau(self, measures: Measures, config: Generation) -> float:
        """The threshold on the uncertainty for the next generation; KEEP_NONE verifies everything."""
        return THRESHOLDS[config.threshold](self, measures, config)

    def similarity(self, measures: Measures, config: Generation) -> float | None:
        """The cosine from which peers may settle a token; None: never, there is no evidence that it is safe."""
        consensus = config.consensus
        if not choices.PEERS[config.peers].asked:
            return None
        if not (consensus.adapt and choices.THRESHOLDS[config.threshold].keeps_budget):
            return consensus.similarity
        if self._overdrawn(measures, config):
            return None
        own, evidence = self._evidence(measures.peers)
        m = shrunk(own, evidence, config.learning.shrinkage)
        share = tau_of_budget(own, m, self._allowed(measures, config) * consensus.error_share, self._delta(config))
        return None if share == KEEP_NONE else max(consensus.similarity, 1.0 - share)

    def calibrated(self, measures: Measures, config: Generation) -> float:
        """The most that the budget, or the price of a transmission, allows to keep (docs/algorithms.md, 4.2)."""
        own, evidence = self._evidence(measures.draft)
        m = shrunk(own, evidence, config.learning.shrinkage)
        return OBJECTIVES[config.learning.objective](self, measures, config, own, m)

    def tau_by_price(self, _measures: Measures, config: Generation, _own: Curve, m: NDArray[np.float64]) -> float:
        """The most that is worth its price: what a transmission costs against the harm that it prevents."""
        return tau_of_price(m, self.price(config))

    def tau_by_budget(self, measures: Measures, config: Generation, own: Curve, m: NDArray[np.float64]) -> float:
        """The most that keeps the error below the budget, the share of peers' errors left out."""
        if self._overdrawn(measures, config):
            return KEEP_NONE
        share = 1.0 - config.consensus.error_share if choices.PEERS[config.peers].asked else 1.0
        return tau_of_budget(own, m, self._allowed(measures, config) * share, self._delta(config))

    def price(self, config: Generation) -> float:
        """c/w: what escalating a token costs, by the bytes measured here, in units of a wrong token."""
        learning = config.learning
        measured = self._escalation_bytes / self._escalated if self._escalated else 0.0
        return (measured + learning.round_trip_bytes) / learning.harm_bytes

    def _overdrawn(self, measures: Measures, config: Generation) -> bool:
        """Whether the estimate is above the budget by more than it errs: then all is verified until it is not."""
        risk = self.risk(measures, config)
        return risk is not None and risk.surely > config.budget

    def _allowed(self, measures: Measures, config: Generation) -> float:
        """What the kept tokens' curve may cost: the budget, loosened by tokens that are verified although they could be
        kept."""
        return min(1.0, config.budget * self._slack[_kind(measures)].factor)

    def _delta(self, config: Generation) -> float:
        return 1.0 - config.confidence

    def _evidence(self, measure: str) -> tuple[Curve, Curve]:
        """This device's curve and the larger of it and its cluster's."""
        own = self.curves[measure]
        cluster = self.cluster.get(measure)
        return own, own if cluster is None or cluster.total_weight < own.total_weight else cluster

    def due(self, config: Generation, now_s: float) -> bool:
        """Whether this round's contribution should go out."""
        if self._round_began_s is None:
            self._round_began_s = now_s
        learning = config.learning
        seen = max((curve.total_seen for curve in self.curves.values()), default=0.0)
        return self._tokens >= max(learning.round_tokens, learning.growth * seen) or (
            self._tokens > 0 and now_s - self._round_began_s >= learning.round_s
        )

    def contribution(self, config: Generation, now_s: float) -> tuple[PaperThreshold | None, dict[str, bytes]] | None:
        """End a round: its threshold and the sums to send; None when the releases that privacy allows are used up."""
        federation = self._federation
        if federation.epsilon > 0.0 and self._releases >= federation.releases:
            return None
        paper = self._paper_update(config) if choices.THRESHOLDS[config.threshold].descends else None
        self.round += 1
        self._releases += 1
        self._tokens = 0
        self._pairs.clear()
        self._round_began_s = now_s
        if federation.epsilon > 0.0:
            # A token may be in two curves, that of the drafts and that of the peers.
            sigma = math.sqrt(2.0) * sigma_for(federation.epsilon, federation.delta, federation.releases)
            shared = {name: noised(curve, sigma, self._rng) for name, curve in self.curves.items()}
        else:
            shared = dict(self.curves)
        largest = sorted(shared, key=lambda name: -shared[name].total_weight)[:MAX_CURVES]
        packed = {name: shared[name].to_bytes() for name in largest if shared[name].total_seen > 0.0}
        if config.learning.forgetting > 0.0:
            for name in self.curves:
                self.curves[name] = self.curves[name].decayed(1.0 - config.learning.forgetting)
        return paper, packed

    def _paper_update(self, config: Generation) -> PaperThreshold:
        learning = config.learning
        settings = PaperSettings(
            gamma=learning.gamma,
            learning_rate=learning.learning_rate,
            decay=learning.decay,
            lam=learning.regularisation,
            mu=learning.proximal,
            optimiser=learning.optimiser,
            local_steps=learning.local_steps,
        )
        local = config.tau if self.threshold is None else self.threshold
        pairs = np.array(self._pairs, np.float64).reshape(-1, 2)  # (n, 2)
        update = OPTIMISERS[learning.optimiser](
            pairs,
            local,
            local if self._global_threshold is None else self._global_threshold,
            self._control,
            self._server_control,
            self.round,
            settings,
        )
        self.threshold, self._control = update.threshold, update.control
        return PaperThreshold(update.threshold, update.count, update.control, update.steps)

    def learned(self, state: Learned) -> None:
        """Take over what the cluster knows.

        Raises:
            ProtocolError: a curve that is none, or an impossible control; nothing is changed then.
        """
        check_threshold(state.threshold)
        curves = {name: Curve.from_bytes(data) for name, data in state.curves.items()}
        self.cluster = curves
        if state.threshold is not None:
            self.threshold = self._global_threshold = state.threshold.threshold
            self._server_control = state.threshold.control

    def snapshot(self) -> bytes:
        """All there is to keep over a restart."""
        return msgspec.msgpack.encode(
            Snapshot(
                SPACE,
                self.round,
                self._releases,
                self.threshold,
                self._control,
                self._server_control,
                {name: curve.to_bytes() for name, curve in self.curves.items()},
                {name: curve.to_bytes() for name, curve in self.cluster.items()},
                {name: budget.snapshot() for name, budget in self._budgets.items()},
            )
        )

    def restore(self, data: bytes) -> None:
        """Take back what `snapshot` gave.

        Raises:
            ProtocolError: not a snapshot of this version; nothing is changed then.
        """
        try:
            kept = msgspec.msgpack.decode(data, type=Snapshot)
            curves = {name: Curve.from_bytes(raw) for name, raw in kept.curves.items()}
            cluster = {name: Curve.from_bytes(raw) for name, raw in kept.cluster.items()}
            budgets = {name: Budget.restore(raw) for name, raw in kept.budgets.items()}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as exc:
            raise ProtocolError(f"not a learner's snapshot: {exc}") from exc
        for control in (kept.control, kept.server_control):
            check_threshold(PaperThreshold(0.0, 0, control))
        if kept.space != SPACE:
            raise ProtocolError(f"space of the snapshot must be {SPACE!r} (got {kept.space!r})")
        self.round, self._releases, self.threshold = kept.round, kept.releases, kept.threshold
        self._control, self._server_control = kept.control, kept.server_control
        self.curves.update(curves)
        self.cluster, self._budgets = cluster, budgets


def _kind(measures: Measures) -> str:
    """What generations must have in common to be counted together."""
    return f"{measures.draft}/{measures.audit:g}"


def _fixed(_learner: Learner, _measures: Measures, config: Generation) -> float:
    return config.tau


def _published(learner: Learner, _measures: Measures, config: Generation) -> float:
    return config.tau if learner.threshold is None else learner.threshold


OBJECTIVES: Final[dict[str, Callable[[Learner, Measures, Generation, Curve, NDArray[np.float64]], float]]] = {
    "budget": Learner.tau_by_budget,
    "price": Learner.tau_by_price,
}

THRESHOLDS: Final[dict[str, Callable[[Learner, Measures, Generation], float]]] = {
    "none": _fixed,
    "fixed": _fixed,
    "paper-fl": _published,
    "calibrated-fl": Learner.calibrated,
}
