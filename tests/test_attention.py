"""Attention's definitions against loops: partial answers, their join, mass, ranking, pieces."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.ops import attention
from kvc.ops.attention import attend_dense, join
from kvc.ops.mass import attention_mass, log_probs
from tests.oracles import attention as oracle
from tests.tolerances import TOLERANCES

B, HQ, H, L, T, D, SCALE = 2, 4, 2, 5, 13, 8, 0.3


def draw(xp: ModuleType, *shape: int, seed: int = 0) -> tuple[Any, Any]:
    """Numbers, and the same as an array of the backend."""
    kind = "float64" if xp.name == "numpy" else "float32"
    x = np.random.default_rng(seed).standard_normal(shape).astype(kind)
    return x, xp.from_numpy(x)


def close(xp: ModuleType, got: Any, want: Any) -> None:
    rtol, atol = TOLERANCES["float64" if xp.name == "numpy" else "float32"]
    np.testing.assert_allclose(xp.to_numpy(got), want, rtol=rtol * 10, atol=atol * 10)


def inputs(xp: ModuleType) -> Any:
    shapes = ((B, HQ, L, D), (B, H, T, D), (B, H, T, D))
    return [draw(xp, *shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("causal", [False, True])
def test_the_answer_is_the_oracles(xp: ModuleType, causal: bool) -> None:
    (q, qx), (k, kx), (v, vx) = inputs(xp)
    got = attend_dense(qx, kx, vx, SCALE, causal=causal)
    for b in range(B):
        want = oracle.attend(q[b], k[b], v[b], SCALE, causal=causal)
        close(xp, got.out[b], want.out)


@pytest.mark.parametrize("causal", [False, True])
def test_few_queries_at_a_time_change_nothing(
    xp: ModuleType, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, q), (_, k), (_, v) = inputs(xp)
    valid = xp.from_numpy(np.random.default_rng(5).random((B, H, T)) < 0.7)
    whole = attend_dense(q, k, v, SCALE, causal=causal, valid=valid)
    monkeypatch.setattr(attention, "SCORES", 2 * B * HQ * T)
    pieces = attend_dense(q, k, v, SCALE, causal=causal, valid=valid)
    for got, want in zip(pieces, whole, strict=True):
        close(xp, got, xp.to_numpy(want))


def test_mass_of_few_queries_at_a_time_is_the_same(
    xp: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, q), (_, k) = draw(xp, B, HQ, 40, D), draw(xp, B, H, 48, D, seed=1)
    valid = xp.from_numpy(np.random.default_rng(5).random((B, H, 48)) < 0.7)
    want = xp.to_numpy(attention_mass(q, k, SCALE, valid=valid))
    monkeypatch.setattr("kvc.ops.mass.SCORES", 16 * B * HQ * 48)
    close(xp, attention_mass(q, k, SCALE, valid=valid), want)


def test_two_halves_join_to_the_whole(xp: ModuleType) -> None:
    (_, q), (_, k), (_, v) = inputs(xp)
    halves = [attend_dense(q, k[:, :, s], v[:, :, s], SCALE) for s in (slice(4), slice(4, T))]
    for got, want in zip(join(halves), attend_dense(q, k, v, SCALE), strict=True):
        close(xp, got, xp.to_numpy(want))


def test_slots_that_are_empty_are_not_seen(xp: ModuleType) -> None:
    (_, q), (_, k), (_, v) = inputs(xp)
    valid = np.zeros((B, 1, T), bool)
    valid[:, :, 3:9] = True
    got = attend_dense(q, k, v, SCALE, valid=xp.from_numpy(valid))
    want = attend_dense(q, k[:, :, 3:9], v[:, :, 3:9], SCALE)
    close(xp, got.out, xp.to_numpy(want.out))
    nothing = attend_dense(q, k, v, SCALE, valid=xp.from_numpy(valid & False))
    assert (xp.to_numpy(nothing.out) == 0).all()
    assert (xp.to_numpy(nothing.lse) == -np.inf).all()


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [0, 3, L, 9, T])
def test_a_length_is_as_good_as_so_many_tokens(
    xp: ModuleType, causal: bool, n: int, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, q), (_, k), (_, v) = inputs(xp)
    if pieces:
        monkeypatch.setattr(attention, "SCORES", 2 * B * HQ * T)
    length = xp.from_numpy(np.array([n], np.int32))
    got = attend_dense(q, k, v, SCALE, causal=causal, length=length)
    want = attend_dense(q, k[:, :, :n], v[:, :, :n], SCALE, causal=causal)
    for a, b in zip(got, want, strict=True):
        close(xp, a, xp.to_numpy(b))


def test_mass_is_the_oracles_and_sums_to_the_queries(xp: ModuleType) -> None:
    (q, qx), (k, kx), _ = inputs(xp)
    got = attention_mass(qx, kx, SCALE)
    close(xp, xp.sum(got, -1), np.full((B, H), HQ // H * L))
    for b in range(B):
        full = np.concatenate([np.zeros((HQ, T - L, D)), q[b]], axis=1)
        want = oracle.attention_mass(full, k[b], SCALE, causal=True)
        want -= oracle.attention_mass(full[:, : T - L], k[b, :, : T - L], SCALE, causal=True) @ (
            np.eye(T - L, T)
        )
        close(xp, got[b], want)


def test_mass_from_the_denominator_that_attention_found(xp: ModuleType) -> None:
    (_, q), (_, k), (_, v) = inputs(xp)
    valid = xp.from_numpy(np.random.default_rng(5).random((B, H, T)) < 0.7)
    sinks = draw(xp, HQ, seed=4)[1]
    lse = attend_dense(q, k, v, SCALE, causal=True, valid=valid, sinks=sinks).lse
    want = attention_mass(q, k, SCALE, valid=valid, sinks=sinks)
    close(xp, attention_mass(q, k, SCALE, valid=valid, lse=lse), xp.to_numpy(want))


def test_sinks_and_soft_caps_take_their_share(xp: ModuleType) -> None:
    (q, qx), (k, kx), _ = inputs(xp)
    sinks, cap = np.linspace(-1, 2, HQ), 1.5
    given: Any = {"softcap": cap, "sinks": xp.from_numpy(sinks.astype(q.dtype))}
    got = attention_mass(qx[:, :, -1:], kx, SCALE, **given)
    ranked = log_probs(qx[:, :, -1:], kx, SCALE, **given)
    s = np.einsum("bjd,bjtd->bjt", q[:, :, -1], k.repeat(HQ // H, 1)) * SCALE
    s = np.exp(np.tanh(s / cap) * cap)
    p = s / (s.sum(-1, keepdims=True) + np.exp(sinks)[:, None])
    close(xp, got, p.reshape(B, H, HQ // H, T).sum(2))
    close(xp, ranked, np.log(p.sum(1)))


def test_the_least_probabilities_keep_their_order(xp: ModuleType) -> None:
    """Where float32 has no such small numbers, all would be equally unlikely."""
    k = -np.arange(T, dtype=np.float32).reshape(1, 1, T, 1) * 100
    q = np.ones((1, 1, 1, 1), np.float32)
    got = xp.to_numpy(log_probs(xp.from_numpy(q), xp.from_numpy(k), 1.0))
    assert (np.diff(got[0]) < -99).all()
