"""Hostile members of a federation: agents with valid rights that send false contributions.

A lie changes the sums or the threshold of an outgoing contribution. In everything else the agent is honest.
"""

from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, Final

import numpy as np

from edge_agent.learner import Learner
from fedhlm.learning.curve import BINS, Curve
from fedhlm.protocol.fields import Pair
from fedhlm.protocol.messages import Contribution, PaperThreshold
from fedhlm.settings import Generation

BOAST: Final = 1e6  # tokens that a liar claims
LARGEST_COUNT: Final = 2**31 - 1
TIMID: Final = frozenset({"bin-63", "harmful"})  # lies that claim harm: a low threshold under `paper-fl`
DRIFT: Final = 1.1  # the factor by which a patient liar goes further each round

Spoken = tuple[dict[Pair, PaperThreshold], dict[str, bytes]]


def _bin_0(curve: Curve, _round: int) -> Curve:
    """Claim that nearly all tokens are certain and none was wrong."""
    told = Curve.empty()
    told.seen[0] = told.weight[0] = BOAST
    return told


def _seen(curve: Curve, _round: int) -> Curve:
    """Report the true evidence, but claim that nearly all decisions were about certain tokens."""
    told = curve.copy()
    told.seen[0] = BOAST
    return told


def _bin_63(curve: Curve, _round: int) -> Curve:
    """Claim that nearly all tokens lie in the last bin of doubt, and that all were wrong."""
    told = Curve.empty()
    told.seen[-1] = told.weight[-1] = told.harm[-1] = told.square[-1] = BOAST
    return told


def _harmless(curve: Curve, _round: int) -> Curve:
    """Claim that no token of any doubt did harm."""
    told = Curve.empty()
    told.seen[:] = told.weight[:] = BOAST / BINS
    return told


def _harmful(curve: Curve, _round: int) -> Curve:
    """Claim that every token was wrong."""
    told = _harmless(curve, 0)
    told.harm[:] = told.square[:] = told.weight
    return told


def _forgiving(curve: Curve, _round: int) -> Curve:
    """Report the true token counts, but no harm: a modest liar."""
    return Curve(curve.seen, curve.weight, np.zeros(BINS), np.zeros(BINS))


def _drift(curve: Curve, number: int) -> Curve:
    """Claim slightly more tokens and slightly less harm in each round."""
    by = min(BOAST, DRIFT**number)
    return Curve(curve.seen * by, curve.weight * by, curve.harm / by, curve.square / by)


LIES: Final[Mapping[str, Callable[[Curve, int], Curve]]] = {
    "bin-0": _bin_0,
    "seen": _seen,
    "bin-63": _bin_63,
    "harmless": _harmless,
    "harmful": _harmful,
    "forgiving": _forgiving,
    "drift": _drift,
}


def lie(name: str, spoken: Spoken, number: int) -> Spoken:
    """What a liar sends instead of `spoken` in its round `number`; `name` is a key of LIES."""
    thresholds, packed = spoken
    curves = {measure: LIES[name](Curve.from_bytes(data), number).to_bytes() for measure, data in packed.items()}
    claimed = 0.0 if name in TIMID else 1.0
    loud = {pair: PaperThreshold(claimed, LARGEST_COUNT, t.control, t.steps) for pair, t in thresholds.items()}
    return loud, curves


def false_contribution(known: Contribution | None, name: str, number: int, header: Mapping[str, Any]) -> Contribution:
    """Make a liar's `number`-th contribution with these header fields, from the honest one that is known of it."""
    if known is None:
        known = Contribution(**header, round=0, members=1, curves={"unknown": Curve.empty().to_bytes()})
    thresholds, curves = lie(name, (dict(known.thresholds), dict(known.curves)), number)
    return Contribution(**header, round=known.round + number, members=1, thresholds=thresholds, curves=curves)


def tempt(learner: Learner, lie_now: Callable[[], str | None]) -> None:
    """Make a learner contribute after every generation, and lie while `lie_now` names a lie (None: no lie)."""
    due, contribution, numbers = learner.due, learner.contribution, count(1)

    def due_now(config: Generation, now_s: float) -> bool:
        return lie_now() is not None or due(config, now_s)

    def told(config: Generation, now_s: float) -> Spoken | None:
        spoken, name = contribution(config, now_s), lie_now()
        return spoken if spoken is None or name is None else lie(name, spoken, next(numbers))

    learner.due, learner.contribution = due_now, told  # type: ignore[method-assign]
