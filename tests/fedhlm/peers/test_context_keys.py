"""Keys keep the angle between hidden states, fit in dims bytes, and compare only where the projection is the same."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedhlm.decoding.decoder import load_info
from fedhlm.errors import ModelError, ProtocolError
from fedhlm.peers.context_keys import DIMS, PROJECTION_FILE, Projection, load_projection, unpack_key
from fedhlm_zoo.shipped import model_folder

H = 96
seeds = st.integers(0, 2**32 - 1)


def cosine(keys: NDArray[np.int8], key: NDArray[np.int8]) -> NDArray[np.float32]:
    """Cosine of every row of `keys` (n, dims) with `key` (dims,); (n,) float32, 0 where either is all zeros."""
    rows, one = keys.astype(np.float32), key.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows) * (one @ one))  # (n,)
    similarity: NDArray[np.float32] = np.divide(
        rows @ one, lengths, out=np.zeros(len(rows), np.float32), where=lengths > 0.0
    )
    similarity.clip(-1.0, 1.0, out=similarity)  # rounding may pass 1
    return similarity


def hidden(seed: int, size: int = H) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def some_projection(seed: int, dims: int = 16) -> Projection:
    rng = np.random.default_rng(seed)
    return Projection(hidden(seed), rng.standard_normal((H, dims)).astype(np.float32))


@given(seeds, seeds)
def test_the_cosine_of_keys_is_that_of_the_projected_states(one: int, other: int) -> None:
    projection = some_projection(3)
    a, b = (((hidden(s) - projection.mean) @ projection.matrix).astype(np.float64) for s in (one, other))
    expected = a @ b / np.sqrt((a @ a) * (b @ b))
    found = cosine(projection.key(hidden(one))[None], projection.key(hidden(other)))[0]
    # Rounding moves each of 16 entries by at most half a step of 127.
    assert abs(found - expected) <= 2 * 0.5 * np.sqrt(16) / 127 + 1e-6


@given(seeds, st.floats(1e-3, 1e3))
def test_a_key_depends_on_direction_alone(seed: int, scale: float) -> None:
    projection = some_projection(3)
    away = (hidden(seed) * np.float32(scale)).astype(np.float32)
    difference = projection.key(projection.mean + hidden(seed)).astype(int) - projection.key(projection.mean + away)
    assert np.abs(difference).max() <= 1


@given(seeds)
def test_a_key_is_a_unit_vector_in_steps_of_127(seed: int) -> None:
    key = some_projection(3).key(hidden(seed))
    assert key.dtype == np.int8
    assert key.shape == (16,)
    assert key.min() >= -127
    assert abs(np.linalg.norm(key.astype(float)) - 127) <= 0.5 * np.sqrt(16)


def test_the_mean_and_broken_states_have_no_direction() -> None:
    projection = some_projection(3)
    assert not projection.key(projection.mean).any()
    for bad in (np.nan, np.inf, -np.inf):
        state = hidden(1)
        state[5] = bad
        assert not projection.key(state).any()


def test_a_state_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of shape \(96,\) \(got \(95,\)\)"):
        some_projection(3).key(hidden(1, H - 1))


@pytest.mark.parametrize(
    ("mean", "matrix"), [((3,), (4, 2)), ((3, 1), (3, 2)), ((3,), (3,)), ((3,), (3, 0)), ((0,), (0, 2))]
)
def test_shapes_that_do_not_fit_are_refused(mean: tuple[int, ...], matrix: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Projection(np.zeros(mean, np.float32), np.zeros(matrix, np.float32))


@pytest.mark.parametrize("size", [DIMS - 30, DIMS, 3 * DIMS])
def test_the_fallback_keeps_lengths_and_is_the_same_twice(size: int) -> None:
    one, two = Projection.fallback(size), Projection.fallback(size)
    assert one.digest == two.digest
    assert (one.hidden_size, one.dims) == (size, DIMS)
    wide = one.matrix if size >= DIMS else one.matrix.T
    np.testing.assert_allclose(wide.T @ wide, np.eye(min(size, DIMS)), atol=1e-5)


def test_the_digest_tells_key_spaces_apart() -> None:
    matrix = np.eye(4, dtype=np.float32)
    spaces = [
        Projection(np.zeros(4, np.float32), matrix),
        Projection(np.ones(4, np.float32), matrix),
        Projection(np.zeros(4, np.float32), matrix[:, :2]),
        Projection(np.zeros(4, np.float32), -matrix),
    ]
    assert len({s.digest for s in spaces}) == len(spaces)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    projection = some_projection(4)
    assert projection.save(tmp_path) == tmp_path / PROJECTION_FILE
    assert load_projection(tmp_path, H).digest == projection.digest


def test_a_folder_without_a_projection_has_the_fallback_and_says_how_to_fit_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_projection(tmp_path, H).digest == Projection.fallback(H).digest
    assert len(caplog.messages) == 1
    assert f"'python -m fedhlm_zoo.projection {tmp_path}'" in caplog.messages[0]
    caplog.clear()
    some_projection(4).save(tmp_path)
    load_projection(tmp_path, H)
    assert not caplog.messages


def test_a_malformed_projection_is_named(tmp_path: Path) -> None:
    path = tmp_path / PROJECTION_FILE
    mean, matrix = np.zeros(H, np.float32), np.zeros((H, 4), np.float32)
    broken = matrix.copy()
    broken[0, 0] = np.nan
    for arrays, message in (
        ({"mean": mean}, r"got none called matrix"),
        (
            {"mean": mean[1:], "matrix": matrix},
            r"must be of shape \(96,\) and \(96, dims\) \(got \(95,\) and \(96, 4\)\)",
        ),
        ({"mean": mean, "matrix": matrix[0]}, "must be of shape"),
        ({"mean": mean, "matrix": matrix[:, :0]}, "must be of shape"),
        ({"mean": mean, "matrix": broken}, "not finite"),
        ({"mean": mean, "matrix": matrix.astype(np.int64)}, "must be of floating-point numbers"),
        ({"mean": mean, "matrix": np.array([{}])}, "is not a projection"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ModelError, match=message) as caught:
            load_projection(tmp_path, H)
        assert str(path) in str(caught.value)
    whole = path.read_bytes()
    for data in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"text"):
        path.write_bytes(data)
        with pytest.raises(ModelError, match="is not a projection"):
            load_projection(tmp_path, H)
    np.save(path.with_suffix(".npy"), mean)
    path.with_suffix(".npy").rename(path)
    with pytest.raises(ModelError, match="is not a projection"):
        load_projection(tmp_path, H)


@given(st.integers(0, 12), st.integers(1, 9), seeds)
def test_cosine_is_the_definition(rows: int, dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, key = rng.integers(-128, 128, (rows, dims)).astype(np.int8), rng.integers(-128, 128, dims).astype(np.int8)
    found = cosine(keys, key)
    assert found.shape == (rows,)
    assert found.dtype == np.float32
    for row, value in zip(keys.astype(float), found, strict=True):
        lengths = np.linalg.norm(row) * np.linalg.norm(key.astype(float))
        assert value == pytest.approx(row @ key.astype(float) / lengths if lengths else 0.0, abs=1e-6)


def test_a_key_of_zeros_is_like_nothing() -> None:
    zeros, ones = np.zeros(4, np.int8), np.ones(4, np.int8)
    assert cosine(np.stack([zeros, ones]), ones).tolist() == [0.0, 1.0]
    assert cosine(np.stack([zeros, ones]), zeros).tolist() == [0.0, 0.0]


@given(st.binary(max_size=2 * DIMS))
def test_unpacking_checks_the_length(data: bytes) -> None:
    if len(data) == DIMS:
        assert unpack_key(data).tobytes() == data
    else:
        with pytest.raises(ProtocolError, match=f"key must be {DIMS} bytes \\(got {len(data)}\\)"):
            unpack_key(data)
    assert unpack_key(data, len(data)).tobytes() == data


def test_the_shipped_slm_has_a_fitted_projection() -> None:
    folder = model_folder("", "slm")
    info = load_info(folder)
    assert PROJECTION_FILE in info.files
    projection = load_projection(folder, info.hidden_size)
    assert projection.dims == DIMS
    assert projection.digest != Projection.fallback(info.hidden_size).digest
