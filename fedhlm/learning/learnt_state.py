"""What a federation knows at one time, as it travels: to the members, and up to the pool of pools."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from fedhlm.errors import ProtocolError
from fedhlm.learning.curve import Curve
from fedhlm.learning.evidence import certificates_of
from fedhlm.protocol.fields import MAX_CURVES, MAX_PAIRS, Pair
from fedhlm.protocol.messages import Contribution, Evidence, Learned, PaperThreshold

CONTROL_MAX: Final = 1e12  # largest control variate: it is a mean gradient on [0, 1], and sums must stay finite


class State(NamedTuple):
    """What a federation knows: thresholds by pair of models, curves by measure. `members` is the number of agents."""

    round: int
    members: int
    refused: int
    thresholds: Mapping[Pair, PaperThreshold]
    curves: Mapping[str, Curve]
    evidence: Evidence | None = None

    @classmethod
    def of(cls, message: Learned) -> "State":
        """Read the state from a message.

        Raises:
            ProtocolError: a curve or the control variate is impossible.
        """
        check_thresholds(message.thresholds)
        certificates_of(message.evidence)
        curves = curves_of(message)
        return cls(message.round, message.members, message.refused, message.thresholds, curves, message.evidence)

    def learned(self, header: Mapping[str, Any]) -> Learned:
        """Make the retained message for the members. `header` holds the header fields."""
        return Learned(
            **header,
            round=self.round,
            members=self.members,
            refused=self.refused,
            thresholds=dict(self.thresholds),
            curves=self._packed(),
            evidence=self.evidence,
        )

    def contribution(self, header: Mapping[str, Any]) -> Contribution:
        """Make the contribution of all members together, for the cloud."""
        return Contribution(
            **header,
            round=self.round,
            members=self.members,
            thresholds=dict(self.thresholds),
            curves=self._packed(),
            evidence=self.evidence,
        )

    def below(self, above: "State | None", *, tokens: float) -> "State":
        """Return this state with what the pool above knows from other members.

        The share that this state contributed is subtracted from the curves of `above`. The rest is scaled down to at
        most `tokens` scored tokens and added. The thresholds and the evidence of `above`, where it has any, replace
        those of this state: they are those of the whole fleet.
        """
        if above is None:
            return self
        others = {name: _without(curve, self.curves.get(name)) for name, curve in above.curves.items()}
        prior = {measure: curve.scaled(_factor(curve, tokens)) for measure, curve in others.items()}
        names = sorted({*self.curves, *prior}, key=lambda name: (name not in self.curves, name))[:MAX_CURVES]
        curves = {name: self.curves.get(name, Curve.empty()) + prior.get(name, Curve.empty()) for name in names}
        thresholds = _few({**self.thresholds, **above.thresholds})
        return self._replace(curves=curves, thresholds=thresholds, evidence=above.evidence or self.evidence)

    def _packed(self) -> dict[str, bytes]:
        return {measure: curve.to_bytes() for measure, curve in self.curves.items()}


def check_thresholds(thresholds: Mapping[Pair, PaperThreshold]) -> None:
    """Check what the types alone do not ensure.

    Raises:
        ProtocolError: the control variate is not finite, or beyond CONTROL_MAX.
    """
    for threshold in thresholds.values():
        if not abs(threshold.control) <= CONTROL_MAX:
            raise ProtocolError(
                f"threshold.control must be a number within +-{CONTROL_MAX:g} (got {threshold.control})"
            )


def _few(thresholds: dict[Pair, PaperThreshold]) -> dict[Pair, PaperThreshold]:
    return dict(list(thresholds.items())[-MAX_PAIRS:])


def curves_of(message: Contribution | Learned) -> dict[str, Curve]:
    """Decode the curves of a message.

    Raises:
        ProtocolError: a curve is impossible.
    """
    return {measure: Curve.from_bytes(data) for measure, data in message.curves.items()}


def _without(whole: Curve, part: Curve | None) -> Curve:
    """Subtract a member's part from a pool. Sums stay valid where the part has grown since, or the pool was trimmed."""
    if part is None:
        return whole
    seen, weight, harm, square = np.maximum(0.0, whole.rows() - part.rows()).T  # (BINS,) each
    harm = np.minimum(harm, weight)
    return Curve(seen, weight, harm, np.minimum(square, harm))


def _factor(curve: Curve, tokens: float) -> float:
    weight = curve.total_weight or curve.total_seen
    return min(1.0, tokens / weight) if weight > 0.0 else 1.0
