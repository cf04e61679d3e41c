"""Settles tokens by laws of which a model server tells only the likeliest ids.

A row of such a server holds the log-probabilities of at least `told` ids, the likeliest ones. All other ids share one
lower value, which spreads the mass that is left evenly over them. In truth each of them lies between zero probability
and the bound that is no more than the last of the `told` likeliest and no more than the mass that is left. A token is
certain if every law between these two gives it.
"""

import math
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.couplings import Coupling
from fedhlm.decoding.sampling import COLDEST, Logits, perturbed_argmax, scores
from fedhlm.protocol.messages import Sampling

LEAST_REST: Final = 1e-9  # mass that rounding may hide


class SettledToken(NamedTuple):
    """A settled token, and whether it is the one that the whole law would give."""

    token: int
    certain: bool


def row_of(log_probs: dict[int, float], size: int, told: int) -> NDArray[np.float32]:
    """A row, shape (size,), from the log-probabilities that a server told for one position, the `told` likeliest among them.

    An id outside 0..size-1 is padding of the model and left out. So is an id beyond the likeliest that is less likely
    than the ids that were not told.
    """
    order = sorted(
        ((value, token) for token, value in log_probs.items() if 0 <= token < size),
        key=lambda entry: (-entry[0], entry[1]),
    )
    row, spread = _row(order, size, told)
    if len(order) > told and order[-1][0] <= spread:
        row, _ = _row(order[:told], size, told)
    return row


def _row(order: list[tuple[float, int]], size: int, told: int) -> tuple[NDArray[np.float32], float]:
    """The row of (log-probability, id) in falling order, and the value of all other ids."""
    values = np.array([value for value, _ in order])
    rest = max(LEAST_REST, 1.0 - float(np.exp(values).sum()))
    last = float(np.nextafter(np.float32(values[min(told, values.size) - 1]), np.float32(-np.inf)))
    spread = min(math.log(rest / max(1, size - values.size)), last)
    row = np.full(size, spread, np.float32)
    row[[token for _, token in order]] = values
    return row, spread


def settle_told(
    coupling: Coupling, row: Logits, sampling: Sampling, position: int, draft: int | None, law: bytes, *, told: int
) -> SettledToken:
    """Settle one position as `Coupling.settle` does, from a row of which only the ids above its lowest value are told.

    `told` is the number of likeliest ids in the row; 0 means that it holds the whole law.
    """
    token = coupling.settle(row, sampling, position, draft, law)
    if not told or coupling.greedy or sampling.temperature < COLDEST or 0 < (sampling.top_k or 0) <= told:
        return SettledToken(token, True)
    least, most = _between(row, told)
    kept, wide = np.isfinite(scores(least, sampling)), scores(most, sampling)
    if (np.isfinite(wide) & ~np.isfinite(least)).any():
        # Filters by rank keep some of many equal ids. In truth it may be any of those that were not told.
        wide = scores(most, msgspec.structs.replace(sampling, top_p=1.0, top_k=None))
    if np.array_equal(kept, np.isfinite(wide)):  # the filters keep the same ids whatever the rest is, and all are told
        return SettledToken(token, True)
    if not coupling.shared:
        return SettledToken(token, False)
    # The noise of every id is known, so an id that is not told can win only where it would win at its bound.
    winner = perturbed_argmax(wide, sampling.seed, position)
    return SettledToken(winner, True) if kept[winner] else SettledToken(token, False)


def _between(row: Logits, told: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The row with nothing left for the ids that are not told, and the row with their bound."""
    wide = np.asarray(row, np.float64)
    known = wide > wide.min()
    values = np.sort(wide[known])[::-1]
    rest = max(LEAST_REST, 1.0 - float(np.exp(values).sum()))
    bound = min(float(values[min(told, values.size) - 1]), math.log(rest))
    return np.where(known, wide, -np.inf), np.where(known, wide, np.minimum(bound, np.nextafter(values[0], -np.inf)))
