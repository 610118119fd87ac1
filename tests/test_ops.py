"""Rung one: every verb of every backend computes what NumPy computes."""

from types import ModuleType

import numpy as np
import pytest

from kvc.backends.base import ops_of

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 6)).astype(np.float32)
INDEX = np.array([[[1, 0, 2]]], dtype=np.int32) * np.ones((2, 1, 1), dtype=np.int32)


def test_the_verbs_are_found_by_the_array(xp: ModuleType) -> None:
    assert ops_of(xp.from_numpy(X)) is xp
    with pytest.raises(TypeError, match="expected a numpy, mlx or torch array"):
        ops_of([1.0])


@pytest.mark.parametrize("verb", ["abs", "exp", "sin", "cos", "tanh", "round", "gelu"])
def test_elementwise(xp: ModuleType, verb: str) -> None:
    import kvc.backends.numpy.ops as truth

    got = xp.to_numpy(getattr(xp, verb)(xp.from_numpy(X)))
    np.testing.assert_allclose(got, getattr(truth, verb)(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verb", ["min", "max", "sum", "mean"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_reductions(xp: ModuleType, verb: str, axis: int) -> None:
    got = xp.to_numpy(getattr(xp, verb)(xp.from_numpy(X), axis, keepdims=True))
    np.testing.assert_allclose(got, getattr(np, verb)(X, axis, keepdims=True), rtol=1e-5)


def test_equals_keep_their_order(xp: ModuleType) -> None:
    x = np.array([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]], dtype=np.float32)
    assert xp.to_numpy(xp.top_k(xp.from_numpy(x), 4)).tolist() == [[1, 2, 4, 0]]
    assert xp.to_numpy(xp.argsort(xp.from_numpy(x), -1)).tolist() == [[3, 0, 5, 1, 2, 4]]


def test_gather_and_scatter(xp: ModuleType) -> None:
    index, x = xp.from_numpy(INDEX), xp.from_numpy(X)
    np.testing.assert_array_equal(
        xp.to_numpy(xp.take_along_axis(x, index, -1)),
        np.take_along_axis(X, np.broadcast_to(INDEX, (2, 3, 3)), -1),
    )
    full = np.ascontiguousarray(np.broadcast_to(INDEX, (2, 3, 3)))
    values = RNG.standard_normal((2, 3, 3)).astype(np.float32)
    put = X.copy()
    np.put_along_axis(put, full, values, -1)
    got = xp.put_along_axis(xp.from_numpy(X), xp.from_numpy(full), xp.from_numpy(values), -1)
    np.testing.assert_array_equal(xp.to_numpy(got), put)


def test_repeated_indices_add_up(xp: ModuleType) -> None:
    index = np.array([[0, 0, 2]], dtype=np.int32)
    got = xp.add_along_axis(
        xp.from_numpy(np.zeros((1, 4), np.float32)),
        xp.from_numpy(index),
        xp.from_numpy(np.array([[1.0, 2.0, 5.0]], np.float32)),
        -1,
    )
    assert xp.to_numpy(got).tolist() == [[3.0, 0.0, 5.0, 0.0]]


def test_write(xp: ModuleType) -> None:
    piece = np.ones((2, 1, 6), np.float32)
    want = X.copy()
    want[:, 1:2] = piece
    got = xp.write(xp.copy(xp.from_numpy(X)), 1, xp.from_numpy(piece), 1)
    np.testing.assert_array_equal(xp.to_numpy(got), want)


def test_write_where_an_array_says(xp: ModuleType) -> None:
    want, piece = X.copy(), np.full((2, 1, 6), 7, np.float32)
    want[:, 2:3] = piece
    at = xp.from_numpy(np.array([2], np.int64))
    got = xp.write(xp.copy(xp.from_numpy(X)), at, xp.from_numpy(piece), 1)
    np.testing.assert_array_equal(xp.to_numpy(got), want)


def test_after_changes_nothing(xp: ModuleType) -> None:
    x = xp.from_numpy(X)
    np.testing.assert_array_equal(xp.to_numpy(xp.after(x, x * 2)), X)


def test_orthonormal(xp: ModuleType) -> None:
    q = xp.to_numpy(xp.orthonormal(xp.from_numpy(X.swapaxes(-1, -2).copy())))
    np.testing.assert_allclose(
        q.swapaxes(-1, -2) @ q, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-5
    )


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-12, 0.0])
def test_orthonormal_of_dependent_columns(xp: ModuleType, size: float) -> None:
    """A projection still, on all that the columns span; equal rows bring equal rounding noise."""
    rng = np.random.default_rng(0)
    x = size * rng.normal(size=(64, 4, 2)) @ rng.normal(size=(64, 2, 8))
    x = np.concatenate([x, x], 1).astype(np.float32)
    q = xp.to_numpy(xp.orthonormal(xp.from_numpy(x)))
    gram = q.swapaxes(-1, -2) @ q
    np.testing.assert_allclose(gram @ gram, gram, atol=1e-4)
    np.testing.assert_allclose(q @ (q.swapaxes(-1, -2) @ x), x, atol=1e-4 * size)


def test_words_shift(xp: ModuleType) -> None:
    """Codes of 8 bits in the top byte survive a shift and a mask, whatever the sign of the word."""
    word = xp.from_numpy(np.array([0xFF000001], dtype=np.uint32))
    assert int(xp.to_numpy((word >> 24) & 255)[0]) == 255
