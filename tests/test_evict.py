"""LESS's maps, state and admission against the oracle, and what the algorithm implies."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.ops.attention import attend_dense, join
from kvc.ops.evict import Kernels, admit, attend_state, fold_evicted, phi, psi
from tests.oracles import less
from tests.oracles.less_features import Weights, random_weights

B, HQ, H, T, L, D, M, R = 2, 4, 2, 9, 3, 8, 16, 5


def kind(xp: ModuleType) -> str:
    return "float64" if xp.name == "numpy" else "float32"


def draw(xp: ModuleType, *shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(kind(xp))


def close(xp: ModuleType, got: Any, want: Any, atol: float = 2e-5) -> None:
    atol = 1e-11 if xp.name == "numpy" else atol
    np.testing.assert_allclose(xp.to_numpy(got), want, rtol=0, atol=atol)


def maps(xp: ModuleType, s1: float = 0.8) -> tuple[Weights, Kernels]:
    signs = np.array([1, -1, 1, 1, -1])  # u takes |s1|
    weights = random_weights(HQ, H, D, M, R, seed=1, s2=-0.5)
    weights = replace(weights, s1=np.full((H, R), s1) * signs)
    names = Kernels._fields
    return weights, Kernels(*(xp.from_numpy(getattr(weights, n).astype(kind(xp))) for n in names))


def empty(xp: ModuleType, rank: int = R) -> tuple[Any, Any]:
    return (
        xp.from_numpy(np.zeros((B, H, rank, D), kind(xp))),
        xp.from_numpy(np.zeros((B, H, rank), kind(xp))),
    )


def folded(xp: ModuleType, k: Any, v: Any, kernels: Kernels) -> tuple[Any, Any]:
    valid = xp.from_numpy(np.ones(k.shape[:3], bool))
    return fold_evicted(*empty(xp), xp.from_numpy(k), xp.from_numpy(v), valid, kernels)


def test_features_are_the_oracles_and_not_negative(xp: ModuleType) -> None:
    weights, kernels = maps(xp)
    q, k = draw(xp, B, HQ, L, D), draw(xp, B, H, T, D, seed=1)
    got_q, got_k = phi(xp.from_numpy(q), kernels), psi(xp.from_numpy(k), kernels)
    close(xp, got_q, [[weights.phi(j, q[b, j]) for j in range(HQ)] for b in range(B)])
    close(xp, got_k, [[weights.psi(g, k[b, g]) for g in range(H)] for b in range(B)])
    assert (xp.to_numpy(got_q) >= 0).all()
    assert (xp.to_numpy(got_k) >= 0).all()


def test_state_and_kept_tokens_answer_as_the_oracle(xp: ModuleType) -> None:
    weights, kernels = maps(xp)
    q, k, v = draw(xp, B, HQ, L, D), draw(xp, B, H, T, D, seed=1), draw(xp, B, H, T, D, seed=2)
    state, norm = folded(xp, k[:, :, 4:], v[:, :, 4:], kernels)
    qx, kx, vx = (xp.from_numpy(x) for x in (q, k, v))
    kept = attend_dense(qx, kx[:, :, :4], vx[:, :, :4], D**-0.5)
    got = join([kept, attend_state(qx, state, norm, kernels)])
    for b, j, l in np.ndindex(B, HQ, L):
        g = j // (HQ // H)
        want = less.combine(
            q[b, j, l], k[b, g, :4], v[b, g, :4], xp.to_numpy(state)[b, g],
            xp.to_numpy(norm)[b, g], weights.phi(j, q[b, j, l]),
        )  # fmt: skip
        close(xp, got.out[b, j, l], want.out)
        close(xp, got.lse[b, j, l], want.lse)


def test_one_by_one_in_any_order_is_all_at_once(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    k, v = draw(xp, B, H, T, D), draw(xp, B, H, T, D, seed=2)
    want = folded(xp, k, v, kernels)
    state = empty(xp)
    norms = [xp.to_numpy(state[1])]
    valid = xp.from_numpy(np.ones((B, H, 1), bool))
    for t in np.random.default_rng(3).permutation(T):
        one = slice(t, t + 1)
        state = fold_evicted(
            *state, xp.from_numpy(k[:, :, one]), xp.from_numpy(v[:, :, one]), valid, kernels
        )
        norms.append(xp.to_numpy(state[1]))
    close(xp, state[0], xp.to_numpy(want[0]))
    close(xp, state[1], xp.to_numpy(want[1]))
    assert (np.diff(norms, axis=0) >= 0).all()


def test_what_is_not_valid_adds_nothing(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    k, v = draw(xp, B, H, T, D), draw(xp, B, H, T, D, seed=2)
    want = folded(xp, k[:, :, 3:], v[:, :, 3:], kernels)
    k[:, :, :2], v[:, :, :2] = np.nan, np.inf  # a slot that was never written
    valid = np.broadcast_to(np.arange(T) >= 3, (B, H, T)).copy()
    with np.errstate(invalid="ignore"):
        got = fold_evicted(
            *empty(xp), xp.from_numpy(k), xp.from_numpy(v), xp.from_numpy(valid), kernels
        )
    for a, b in zip(got, want, strict=True):
        close(xp, a, xp.to_numpy(b))


def test_an_empty_state_answers_nothing(xp: ModuleType) -> None:
    _, silent = maps(xp, s1=0.0)  # psi = 0
    k = draw(xp, B, H, T, D)
    state, norm = folded(xp, k, k, silent)
    got = attend_state(xp.from_numpy(draw(xp, B, HQ, L, D)), state, norm, silent)
    assert (xp.to_numpy(got.out) == 0).all()
    assert (xp.to_numpy(got.lse) == -np.inf).all()


def test_the_gate_is_per_query(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    k, q = draw(xp, B, H, T, D), draw(xp, B, HQ, L, D, seed=4)
    q[0, 1, 2] = 0  # phi(0) = 0
    got = attend_state(xp.from_numpy(q), *folded(xp, k, k, kernels), kernels)
    lse = xp.to_numpy(got.lse)
    assert np.argwhere(~np.isfinite(lse)).tolist() == [[0, 1, 2]]
    assert (xp.to_numpy(got.out)[0, 1, 2] == 0).all()


def test_equal_values_come_back(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    k, v = draw(xp, B, H, T, D), np.full((B, H, T, D), 1.5, kind(xp))
    q = xp.from_numpy(draw(xp, B, HQ, L, D, seed=4))
    close(xp, attend_state(q, *folded(xp, k, v, kernels), kernels).out, 1.5)


def test_an_exact_kernel_gives_full_attention(
    xp: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psi(k_i) = one-hot i and phi(q)_i = exp(q.k_i / sqrt(D)), the rest of the tokens kept."""
    n = 5
    q, k, v = draw(xp, B, HQ, L, D), draw(xp, B, H, T, D, seed=1), draw(xp, B, H, T, D, seed=2)
    logits = np.einsum("bjld,bjtd->bjlt", q, k.repeat(HQ // H, 1)[:, :, :n]) * D**-0.5
    hot = np.broadcast_to(np.eye(n, dtype=kind(xp)), (B, H, n, n)).copy()
    monkeypatch.setattr("kvc.ops.evict.psi", lambda *_: xp.from_numpy(hot))
    monkeypatch.setattr("kvc.ops.evict.phi", lambda *_: xp.from_numpy(np.exp(logits)))
    _, unused = maps(xp)
    qx, kx, vx = (xp.from_numpy(x) for x in (q, k, v))
    valid = xp.from_numpy(np.ones((B, H, n), bool))
    state = fold_evicted(*empty(xp, n), kx[:, :, :n], vx[:, :, :n], valid, unused)
    kept = attend_dense(qx, kx[:, :, n:], vx[:, :, n:], D**-0.5)
    got = join([kept, attend_state(qx, *state, unused)])
    want = attend_dense(qx, kx, vx, D**-0.5)
    close(xp, got.out, xp.to_numpy(want.out))
    close(xp, got.lse, xp.to_numpy(want.lse))


def test_heads_may_be_permuted(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    q, k, v = draw(xp, B, HQ, L, D), draw(xp, B, H, T, D, seed=1), draw(xp, B, H, T, D, seed=2)
    whole = attend_state(xp.from_numpy(q), *folded(xp, k, v, kernels), kernels)
    queries, heads = [2, 3, 0, 1], [1, 0]
    turned = Kernels(
        *(
            xp.take(x, queries if name in ("a1", "a2") else heads, 0)
            for name, x in zip(Kernels._fields, kernels, strict=True)
        )
    )
    state = folded(xp, k[:, heads].copy(), v[:, heads].copy(), turned)
    got = attend_state(xp.from_numpy(q[:, queries].copy()), *state, turned)
    close(xp, got.out, xp.to_numpy(whole.out)[:, queries])
    close(xp, got.lse, xp.to_numpy(whole.lse)[:, queries])


def test_half_precision_is_folded_in_single(xp: ModuleType) -> None:
    _, kernels = maps(xp)
    k = draw(xp, B, H, T, D).astype("float16")
    state = folded(xp, k, k, Kernels(*(xp.astype(x, xp.dtype("float16")) for x in kernels)))
    assert xp.dtype_name(psi(xp.from_numpy(k), kernels)) == "float32"
    assert xp.dtype_name(state[0]) == kind(xp)


def admitted(xp: ModuleType, *args: Any) -> tuple[Any, Any]:
    kept_pos, kept_score, leave_pos, leave_score = args
    source, evicted = admit(
        xp.from_numpy(np.array(kept_pos, np.int32)), xp.from_numpy(np.array(kept_score, kind(xp))),
        xp.from_numpy(np.array(leave_pos, np.int32)),
        xp.from_numpy(np.array(leave_score, kind(xp))),
    )  # fmt: skip
    assert xp.dtype_name(source) == xp.dtype_name(evicted) == "int32"
    return xp.to_numpy(source), xp.to_numpy(evicted)


def test_admission_by_hand(xp: ModuleType) -> None:
    """Slots 7, 2, 5 and the leaving 8, 9: scores 1 and 1 tie, so the newer of them goes first."""
    source, evicted = admitted(xp, [[[7, 2, 5]]], [[[1.0, 1.0, 4.0]]], [[[8, 9]]], [[[0.5, 3.0]]])
    assert evicted.tolist() == [[[3, 0]]]
    assert source.tolist() == [[[4, 1, 2]]]


def test_empty_slots_fill_first(xp: ModuleType) -> None:
    source, evicted = admitted(
        xp, [[[-1, 3, -1, -1]]], [[[9.0, 0.0, 9.0, 9.0]]], [[[4, 5]]], [[[0.0, -np.inf]]]
    )
    assert sorted(evicted[0, 0].tolist()) == [0, 2]
    assert source.tolist() == [[[4, 1, 5, 3]]]


def test_pads_that_leave_the_window_go_first(xp: ModuleType) -> None:
    source, evicted = admitted(xp, [[[0, 1]]], [[[0.0, 0.0]]], [[[-1, 2]]], [[[9.0, 5.0]]])
    assert evicted.tolist() == [[[2, 1]]]
    assert source.tolist() == [[[0, 3]]]


@pytest.mark.parametrize(("heavy", "leaving"), [(0, 3), (4, 0), (1, 1), (4, 1), (3, 6), (6, 2)])
def test_admission_is_the_oracles_choice(xp: ModuleType, heavy: int, leaving: int) -> None:
    rng = np.random.default_rng(heavy * 7 + leaving)
    n = heavy + leaving
    pos = np.concatenate(  # recycled slots are out of order of time
        [
            np.stack([[rng.permutation(heavy) for _ in range(H)] for _ in range(B)]),
            np.broadcast_to(np.arange(heavy, n), (B, H, leaving)),
        ],
        -1,
    ).astype(np.int32)
    score = rng.integers(0, 4, (B, H, n)).astype(kind(xp))  # many ties
    source, evicted = admitted(
        xp, pos[..., :heavy], score[..., :heavy], pos[..., heavy:], score[..., heavy:]
    )
    for b, g in np.ndindex(B, H):
        order = np.argsort(pos[b, g])
        positions = pos[b, g][order].tolist()
        scores = score[b, g][order].tolist()
        want = less.select("h2o", [*positions, n], [*scores, 0.0], n + 1, heavy, 1)[:-1]
        if not leaving:
            want = positions
        assert sorted(pos[b, g][source[b, g]].tolist()) == want
        assert sorted([*source[b, g], *evicted[b, g]]) == list(range(n))
        stays = source[b, g] < heavy
        np.testing.assert_array_equal(source[b, g][stays], np.arange(heavy)[stays])
        assert (np.diff(source[b, g][~stays]) > 0).all()
