"""The doubt u of a draft: how unsure the SLM is of it.

All forms use the model's own logits, before temperature and top-p. A run uses one form, because m(u) is fitted to it.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedhlm.decoding.sampling import DOUBT_STREAM, uniforms
from fedhlm.protocol.messages import Sampling

TEMPERATURE_MAX: Final = 2.0
K_SAMPLES: Final = 20
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_QUADRATURE: Final = TEMPERATURE_MAX * (_NODES + 1.0) / 2.0  # (16,) float64 inside (0, 2)
_SHARES: Final = _WEIGHTS / 2.0  # (16,) sums to 1
SAMPLE_TEMPERATURES: Final = TEMPERATURE_MAX * np.arange(1, K_SAMPLES + 1) / K_SAMPLES  # (20,) float64 on (0, 2]
# Larger temporary arrays return to the system after every call. Allocating them again costs more than the arithmetic,
# so all temperatures share one.
_TILE_ELEMENTS: Final = 32_768
# A vocabulary above _LARGE is condensed first, as the exponentials are most of the work. Depths are in logits below the
# largest one. Tokens down to _NEAR count as they are, others by steps, and none below _DEEPEST: at T = 2 a million of
# these have 1e-8 of the odds of the largest.
_LARGE: Final = 16_384
_NEAR: Final = 8
_DEEPEST: Final = 64
_STEPS: Final = 256  # to a logit

Uncertainty = Callable[[NDArray[Any], int, Sampling, int], float]
"""Returns u in [0, 1] for logits of shape (V,), a draft, the sampling and the position."""


def agreement(logits: NDArray[Any], token: int, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """softmax(z/T)_token for each T, computed in float32; shape (len(temperatures),), values in [0, 1]."""
    lead = np.asarray(logits, np.float32) - np.float32(logits[token])  # (V,)
    counts = None
    if lead.size > _LARGE and np.isfinite(peak := lead.max()):
        lead, counts = _condensed(lead, peak)  # (n,) both
    coldness = np.asarray(1.0 / temperatures, np.float32)[:, None]  # (n, 1)
    rows = max(1, _TILE_ELEMENTS // lead.size)
    shares = np.empty(temperatures.size)  # (n,)
    tile = np.empty((min(rows, temperatures.size), lead.size), np.float32)
    with np.errstate(over="ignore"):  # for a very unlikely token at a low temperature, 1 / inf is the right answer
        for start in range(0, temperatures.size, rows):
            odds = tile[: temperatures.size - start]  # (rows, V)
            np.multiply(lead, coldness[start : start + rows], out=odds)
            np.exp(odds, out=odds)
            # The token's own 1 keeps a plain sum at least 1, and the largest logit the other one.
            shares[start : start + rows] = 1.0 / (odds.sum(axis=1) if counts is None else odds @ counts)
    return shares


def _condensed(lead: NDArray[np.float32], peak: np.float32) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Leads, and how many tokens have each: those near the largest as they are, deeper ones at the middle of a step."""
    depth = peak - lead
    counts = np.bincount((np.minimum(depth, _DEEPEST) * _STEPS).astype(np.int32))
    counts[: _NEAR * _STEPS] = 0
    counts[_DEEPEST * _STEPS :] = 0
    held = np.flatnonzero(counts)
    near = lead[depth < _NEAR]
    middles = peak - (held + 0.5) / _STEPS
    ones = np.ones(near.size)
    return np.concatenate((near, middles), dtype=np.float32), np.concatenate((ones, counts[held]), dtype=np.float32)


def closed_form(logits: NDArray[Any], token: int) -> float:
    """u = 1 - E_T[softmax(z/T)_d] with T uniform on (0, 2], by 16-node Gauss-Legendre quadrature; in [0, 1].

    This is the mean of U-HLM's K-sample disagreement, without the sampling noise. `logits` has shape (V,).
    """
    return float(min(1.0, max(0.0, 1.0 - float(_SHARES @ agreement(logits, token, _QUADRATURE)))))


def k_sample(logits: NDArray[Any], token: int, sampling: Sampling, position: int) -> float:
    """U-HLM's form: the share of K = 20 draws that are not `token`; draw k is from softmax(z / T_k) with T_k = 2 k / K.

    When the inverse CDF starts with `token`, a draw is `token` iff its uniform number is below the token's probability.
    No other probability is therefore needed. The uniform numbers are keyed by (seed, position).
    """
    draws = uniforms(sampling.seed, position, DOUBT_STREAM, K_SAMPLES)  # (20,)
    return float(np.mean(draws >= agreement(logits, token, SAMPLE_TEMPERATURES)))


def entropy(logits: NDArray[Any]) -> float:
    """H(softmax(z)) / ln V, which is FedHLM's step 2 scaled to [0, 1]; 0 for a vocabulary of one token."""
    if len(logits) == 1:
        return 0.0
    lead = np.asarray(logits, np.float64) - float(np.max(logits))  # (V,)
    weights = np.exp(lead)
    total = float(weights.sum())
    nats = float(np.log(total)) - float(weights @ lead) / total
    return min(1.0, max(0.0, nats / float(np.log(len(logits)))))


UNCERTAINTIES: Final[dict[str, Uncertainty]] = {
    "closed-form": lambda logits, token, _sampling, _position: closed_form(logits, token),
    "k-sample": k_sample,
    "entropy": lambda logits, _token, _sampling, _position: entropy(logits),
}
