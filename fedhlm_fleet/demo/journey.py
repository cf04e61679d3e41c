"""The state of a working fleet in words: who settled the tokens, what was learnt, and the error against the budget.

The input is the retained state of the federation and the finished requests. This module does no I/O.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from fedhlm import choices
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import BINS, Curve, isotonic
from fedhlm.learning.evidence import certificates_of, fleet_words
from fedhlm.protocol.messages import Learned
from fedhlm.settings import Generation
from fedhlm_fleet.demo.report import SOURCES, Generated, certificate_of, taus_of

BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.:-=+*#"
_POINTS: Final = 16
_READ_AT: Final = (0.1, 0.5, 0.9)


class Round(NamedTuple):
    """One published state of the federation: the learnt curve of the displayed measure, and the threshold."""

    number: int
    members: int
    curve: Curve | None
    threshold: float | None


class Journey:
    """The state of a fleet.

    `measure` is the beginning of the name of the curve to show (`edge_agent.measures.measures_of` without a pair of
    models); of several pairs, the one with the most evidence is shown. `bars` are the characters that draw the curve,
    from low to high.
    """

    def __init__(self, generation: Generation, measure: str, *, bars: str = BARS) -> None:
        self.tokens: Counter[str] = Counter()
        self.rounds: dict[str, Round] = {}
        self._generation = generation
        self._measure = measure
        self._bars = bars
        self._finished: list[Generated] = []
        self._fleet: Certificate | None = None

    def heard(self, sources: Sequence[str]) -> None:
        """Count committed tokens by their source."""
        self.tokens.update(sources)

    def finished(self, generated: Generated) -> None:
        """Take in a finished request."""
        if generated.task == "continue":
            self._finished.append(generated)

    def learned(self, cluster: str, state: Learned) -> None:
        """Take in a new state of a cluster or, with "", of all clusters.

        Raises:
            ProtocolError: a curve or the evidence is malformed.
        """
        if not cluster and state.evidence is not None:
            self._fleet = sum(certificates_of(state.evidence).values(), Certificate())
        curves = [Curve.from_bytes(data) for name, data in state.curves.items() if name.startswith(self._measure)]
        curve = max(curves, key=lambda known: known.total_weight, default=None)
        thresholds = sorted(state.thresholds.values(), key=lambda told: -told.count)
        threshold = thresholds[0].threshold if thresholds else None
        self.rounds[cluster] = Round(state.round, state.members, curve, threshold)

    @property
    def learns(self) -> bool:
        """Whether learning changes which tokens are kept."""
        return choices.THRESHOLDS[self._generation.threshold].learns

    def legend(self) -> list[str]:
        """Explain the words of `lines`."""
        if not self.learns:
            return []
        read = ", ".join(f"{u:g}" for u in _READ_AT)
        return [
            "doubt u: how unsure the small model is of a token; tau: up to this doubt a token is kept",
            f"m(u): learnt share of wrong tokens, drawn from u = 0 to 1, as numbers at u = {read}",
        ]

    def lines(self, *, brief: bool = False) -> list[str]:
        """Describe the state, one thing per line; `brief` leaves out the lines of single clusters."""
        lines = [f"tokens     {self._settled()}"]
        if self.learns:
            names = sorted(self.rounds, key=lambda name: (not name, name))
            lines += [self._round(name) for name in names if not (brief and name and "" in self.rounds)]
        if choices.GATES[self._generation.gate].by_doubt and (taus := taus_of(self._finished)):
            lines.append(f"threshold  {self._threshold([last for _, last in taus])}")
        if choices.PEERS[self._generation.peers].asked and self._finished:
            lines.append(f"peers      {self._peers()}")
        if self._generation.audit > 0.0:
            lines.append(f"error      {self._error()}")
        if self._fleet is not None:
            lines.append(f"fleet      {fleet_words(self._fleet, self._generation.confidence)}")
        return lines

    def _settled(self) -> str:
        total = self.tokens.total()
        shares = [f"{words} {self.tokens[s] / total:.1%}" for s, words in SOURCES.items() if self.tokens[s]]
        return f"{total}: {', '.join(shares)}" if total else "none yet"

    def _round(self, cluster: str) -> str:
        state = self.rounds[cluster]
        words = f"federated  {cluster or 'all'}: round {state.number}, {state.members} agents"
        if state.threshold is not None:
            words += f", tau {state.threshold:.3f}"
        if state.curve is not None and state.curve.total_weight:
            m = isotonic(state.curve)
            read = " ".join(f"{m[int(u * BINS)]:.2f}" for u in _READ_AT)
            words += f", {state.curve.total_weight:.0f} tokens, m(u) {sparkline(m.tolist(), self._bars)} {read}"
        return words

    def _threshold(self, taus: list[float]) -> str:
        if max(taus) == 0.0:
            return "tau 0: every token is verified, since too little is known to keep any"
        low, high, mean = min(taus), max(taus), sum(taus) / len(taus)
        return f"tau {mean:.2f}" + (f", {low:.2f} to {high:.2f} by agent" if low < high else "")

    def _peers(self) -> str:
        latest = {r.agent: r.statistics.get("similarity") for r in self._finished if r.finish != "error"}
        known = [similarity for similarity in latest.values() if similarity is not None]
        if not known:
            return "may settle nothing yet: too few of their proposals were checked by the cloud"
        return f"may settle where contexts are similar by {min(known):.2f} or more, for {len(known)} of {len(latest)} agents"

    def _error(self) -> str:
        known = certificate_of(self._finished)
        budget = f"budget {self._generation.budget:g} per token"
        if known is None or not known.tokens:
            return budget
        limit, confidence = known.limit(self._generation.confidence), self._generation.confidence
        return (
            f"{budget}, estimated {known.estimate:.4f}, at most {limit:.4f} ({confidence:.0%}, {known.texts:.0f} texts)"
        )


def sparkline(values: Sequence[float], bars: str = BARS) -> str:
    """Draw values in [0, 1] as bars from low to high, averaged into at most 16 bars."""
    step = -(-len(values) // _POINTS)
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    return "".join(bars[min(len(bars) - 1, int(v * len(bars)))] for v in means)
