"""Context keys: `dims` bytes, made from the SLM's last hidden state, whose cosine says how similar two contexts are.

Only keys of one projection can be compared. It is the fitted one of the model folder, or else a fallback that is the
same for every party. A key of zeros has no direction and is similar to no other key. The module needs numpy only.
"""

import hashlib
import logging
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from fedhlm.errors import ModelError, ProtocolError

log = logging.getLogger(__name__)

DIMS: Final = 64
PROJECTION_FILE: Final = "projection.npz"
SCALE: Final = 127
FALLBACK_SEED: Final = 20_250_700

Key = NDArray[np.int8]  # (dims,)


class Projection:
    """Makes a key of a hidden state: centre, project, scale to a unit vector, round to int8.

    `mean` is (h,) and `matrix` (h, dims), both float32. Whitening, if any, is part of the matrix. Without it, a few
    directions of large variance dominate every cosine.

    Raises:
        ValueError: the shapes of `mean` and `matrix` do not fit.
    """

    def __init__(self, mean: NDArray[np.float32], matrix: NDArray[np.float32]) -> None:
        if mean.ndim != 1 or matrix.ndim != 2 or matrix.shape[0] != mean.shape[0] or 0 in matrix.shape:
            raise ValueError(
                f"mean and matrix must be of shape (hidden,) and (hidden, dims) (got {mean.shape} and {matrix.shape})"
            )
        self.mean = mean
        self.matrix = matrix

    @property
    def dims(self) -> int:
        """The length of a key in bytes."""
        return int(self.matrix.shape[1])

    @property
    def hidden_size(self) -> int:
        """The length of the hidden state that `key` takes."""
        return int(self.matrix.shape[0])

    @cached_property
    def digest(self) -> str:
        """16 hex digits. Keys of projections with equal digests can be compared."""
        data = np.ascontiguousarray(self.mean, "<f4").tobytes() + np.ascontiguousarray(self.matrix, "<f4").tobytes()
        return hashlib.sha256(f"{self.hidden_size} {self.dims} ".encode() + data).hexdigest()[:16]

    def key(self, hidden: NDArray[np.float32]) -> Key:
        """The key of one hidden state, (dims,) int8 in -127..127; zeros for the mean itself and for a non-finite state.

        Raises:
            ValueError: `hidden` is not (hidden_size,).
        """
        if hidden.shape != self.mean.shape:
            raise ValueError(f"hidden state must be of shape {self.mean.shape} (got {hidden.shape})")
        with np.errstate(invalid="ignore", over="ignore"):  # a non-finite state is handled below
            projected = (hidden.astype(np.float64) - self.mean) @ self.matrix  # (dims,) float64
            length = float(np.sqrt(projected @ projected))
        if not 0.0 < length < float("inf"):
            return np.zeros(self.dims, np.int8)
        return np.rint(projected * (SCALE / length)).astype(np.int8)  # (dims,)

    def save(self, model: Path) -> Path:
        """Write the projection of a model and return its path. The caller lists it in ``model.json``."""
        path = projection_file(model)
        np.savez(path, mean=self.mean.astype("<f4"), matrix=self.matrix.astype("<f4"))
        return path

    @classmethod
    def fallback(cls, hidden_size: int, dims: int = DIMS) -> Self:
        """Make a projection that is the same for every party: orthonormal, from a fixed seed, not centred or whitened.

        The matrix is Q of the QR factorisation of a standard normal matrix from PCG64(FALLBACK_SEED), with signs that
        make the diagonal of R positive. If the hidden state is shorter than the key, the rows are orthonormal and not
        the columns.
        """
        wide, narrow = max(hidden_size, dims), min(hidden_size, dims)
        normal = np.random.Generator(np.random.PCG64(FALLBACK_SEED)).standard_normal((wide, narrow))
        q, r = np.linalg.qr(normal)  # (wide, narrow), (narrow, narrow)
        q *= np.where(np.diag(r) < 0.0, -1.0, 1.0)
        matrix = q if hidden_size >= dims else q.T
        return cls(np.zeros(hidden_size, np.float32), np.ascontiguousarray(matrix, np.float32))


def projection_file(model: Path) -> Path:
    """Where a model's projection is: in its folder, or beside its file."""
    return model.with_suffix(f".{PROJECTION_FILE}") if model.is_file() else model / PROJECTION_FILE


def fitting_of(model: Path) -> str:
    """Return the command that fits the projection which a model lacks; empty if it has one."""
    return "" if projection_file(model).exists() else f"python -m fedhlm_zoo.projection {model}"


def load_projection(model: Path, hidden_size: int) -> Projection:
    """Load the projection of a model; `Projection.fallback`, with a warning, if it has none.

    Raises:
        ModelError: the file cannot be read, or holds no finite projection of `hidden_size` numbers.
    """
    path = projection_file(model)
    if fitting := fitting_of(model):
        told = "%s has no %s: its keys tell contexts apart badly until '%s' has fitted one"
        log.warning(told, model, path.name, fitting)
        return Projection.fallback(hidden_size)
    try:
        # Open the file here, because numpy does not close a file that turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if missing := sorted({"mean", "matrix"} - set(arrays.files)):
                raise ModelError(
                    f"arrays of {path} must be 'mean' and 'matrix' (got none called {' or '.join(missing)})"
                )
            mean, matrix = _float32(arrays["mean"]), _float32(arrays["matrix"])
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as exc:
        raise ModelError(f"{path} is not a projection: {exc}") from exc
    if mean.shape != (hidden_size,) or matrix.ndim != 2 or matrix.shape[0] != hidden_size or not matrix.shape[1]:
        raise ModelError(
            f"mean and matrix of {path} must be of shape ({hidden_size},) and ({hidden_size}, dims) "
            f"(got {mean.shape} and {matrix.shape})"
        )
    if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise ModelError(f"{path} has values that are not finite")
    return Projection(mean, matrix)


def _float32(array: Any) -> NDArray[np.float32]:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise TypeError(
            f"array must be of floating-point numbers (got {getattr(array, 'dtype', type(array).__name__)})"
        )
    return array.astype(np.float32)


def unpack_key(data: bytes, dims: int = DIMS) -> Key:
    """Decode a key from its bytes; (dims,) int8.

    Raises:
        ProtocolError: the length is not `dims`.
    """
    if len(data) != dims:
        raise ProtocolError(f"key must be {dims} bytes (got {len(data)})")
    return np.frombuffer(data, np.int8).copy()  # (dims,)
