"""Uncertainty of a drafted token: how often a softened copy of the law would have drawn another one."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

TEMPERATURE_MAX: Final = 2.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_TEMPERATURES: Final = (TEMPERATURE_MAX * (_NODES + 1.0) / 2.0).astype(np.float32)  # (16,) inside (0, 2)
_SHARES: Final = _WEIGHTS / 2.0  # (16,) sums to 1


def closed_form(logits: NDArray[Any], token: int) -> float:
    """u = 1 - E_T[softmax(z/T)_d] with T uniform on (0, 2], by 16-node Gauss-Legendre quadrature; in [0, 1].

    The mean of U-HLM's K-sample disagreement, without its sampling noise.
    """
    lead = np.asarray(logits, np.float32) - np.float32(logits[token])  # (V,)
    with np.errstate(over="ignore"):
        odds = np.exp(lead[None, :] / _TEMPERATURES[:, None]).sum(axis=1, dtype=np.float64)  # (16,) >= 1
    return float(min(1.0, max(0.0, 1.0 - float(_SHARES @ (1.0 / odds)))))
