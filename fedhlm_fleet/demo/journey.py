"""The state of a working fleet in words: who settled the tokens, what was learnt, and the error against the budget.

The input is the retained state of the federation and the finished requests. This module does no I/O.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from fedhlm import choices
from fedhlm.learning.certificate import Certificate
from fedhlm.learning.curve import BINS, Curve, isotonic
from fedhlm.learning.evidence import certificates_of
from fedhlm.protocol.messages import Learned
from fedhlm.settings import Generation
from fedhlm_fleet.colours import WORDS
from fedhlm_fleet.demo.report import Generated, certificate_of, taus_of

BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.:-=+*#"
LABEL: Final = 11  # the width of what a line begins with
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

    @property
    def taus(self) -> list[float]:
        """The threshold of each agent in its newest text; empty where no gate goes by doubt."""
        if not choices.GATES[self._generation.gate].by_doubt:
            return []
        return [last for _, last in taus_of(self._finished)]

    @property
    def limit(self) -> float | None:
        """The limit of the agents' pooled certificate; None where nothing is audited, or nothing was yet."""
        known = certificate_of(self._finished) if self._generation.audit > 0.0 else None
        return known.limit(self.confidence) if known is not None and known.tokens else None

    @property
    def budget(self) -> float:
        """The error allowed per token."""
        return self._generation.budget

    @property
    def confidence(self) -> float:
        """The probability with which the limit holds."""
        return self._generation.confidence

    def legend(self) -> list[str]:
        """Explain the words of `lines`."""
        if not self.learns:
            return []
        read = ", ".join(f"{u:g}" for u in _READ_AT)
        words = (
            f"m(u), learnt from the LLM's verdicts, is the share of wrong drafts at doubt u. It is drawn from u = 0 to 1, "
            f"with its values at u = {read}."
        )
        return [words]

    def line(self) -> str:
        """Describe the state in one line."""
        told = [self._settled()]
        if taus := self.taus:
            told.append(f"tau {sum(taus) / len(taus):.2f}")
        if (limit := self.limit) is not None:
            told.append(f"error <= {limit:.4f}")
        return "; ".join(told)

    def lines(self) -> list[str]:
        """Describe the state, one thing per line."""
        lines = [f"tokens     {self._settled()}"]
        if self.learns:
            lines += [self._round(name) for name in sorted(self.rounds, key=lambda name: (not name, name))]
            lines += [words for name in sorted(self.rounds)[:1] if (words := self._curve(name))]
        if taus := self.taus:
            lines.append(f"threshold  {_threshold(taus)}")
        if choices.PEERS[self._generation.peers].asked and self._finished:
            lines.append(f"peers      {self._peers()}")
        if self._generation.audit > 0.0:
            lines.append(f"error      {self._error()}")
        if self._fleet is not None:
            lines.append(f"fleet      at most {self._fleet.limit(self.confidence):.4f}, as the cloud sums it up")
        return lines

    def _settled(self) -> str:
        total = self.tokens.total()
        shares = [f"{words} {self.tokens[s] / total:.1%}" for s, words in WORDS.items() if self.tokens[s]]
        return f"{total}: {', '.join(shares)}" if total else "none yet"

    def _round(self, cluster: str) -> str:
        state = self.rounds[cluster]
        words = f"round {state.number} of {cluster or 'all'}, {state.members} agent{'s' if state.members != 1 else ''}"
        if state.curve is not None and state.curve.total_weight:
            words += f", {state.curve.total_weight:,.0f} verdicts"
        return f"federated  {words}" + (f", tau {state.threshold:.3f}" if state.threshold is not None else "")

    def _curve(self, cluster: str) -> str:
        curve = self.rounds[cluster].curve
        if curve is None or not curve.total_weight:
            return ""
        m = isotonic(curve)
        read = " ".join(f"{m[int(u * BINS)]:.2f}" for u in _READ_AT)
        return f"m(u)       {sparkline(m.tolist(), self._bars)} {read}"

    def _peers(self) -> str:
        latest = {r.agent: r.statistics.get("similarity") for r in self._finished if r.finish != "error"}
        known = [similarity for similarity in latest.values() if similarity is not None]
        if not known:
            return "settle nothing yet: the cloud has checked too few proposals"
        return f"settle where contexts are similar by {min(known):.2f} or more, at {len(known)} of {len(latest)} agents"

    def _error(self) -> str:
        known, limit = certificate_of(self._finished), self.limit
        if known is None or limit is None:
            return f"nothing audited yet; budget {self.budget:g} per token"
        return (
            f"at most {limit:.4f} per token ({self.confidence:.0%}, {known.texts:.0f} texts), "
            f"R-hat {known.estimate:.4f}, budget {self.budget:g}"
        )


def _threshold(taus: Sequence[float]) -> str:
    if max(taus) == 0.0:
        return "tau 0: every draft is verified, since too little is known"
    low, high, mean = min(taus), max(taus), sum(taus) / len(taus)
    return f"tau {mean:.2f}" + (f", {low:.2f} to {high:.2f} by agent" if low < high else "")


def sparkline(values: Sequence[float], bars: str = BARS) -> str:
    """Draw values in [0, 1] as bars from low to high, averaged into at most 16 bars."""
    step = -(-len(values) // _POINTS)
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    return "".join(bars[min(len(bars) - 1, int(v * len(bars)))] for v in means)
