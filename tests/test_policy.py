"""A policy over whole sequences drops and answers what the store's does, token by token."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.calibrate.less.capture import Captured
from kvc.calibrate.less.data import exact_of, prepare
from kvc.calibrate.less.layer import epochs
from kvc.calibrate.less.loss import Recipe, begin, error_of
from kvc.calibrate.less.policy import simulate
from kvc.methods import Less, Method, method_of
from kvc.ops.attention import attend_dense
from kvc.ops.evict import Kernels
from kvc.store.store import KVStore
from kvc.store.unit import Query
from tests.tolerances import TOLERANCES

B, HQ, H, T, D, R, M = 2, 4, 2, 40, 8, 3, 5
SCALE = D**-0.5
POLICIES = [
    Less("h2o", heavy=4, recent=3),
    Less("h2o", heavy=5, recent=0),
    Less("h2o", heavy=0, recent=6),
    Less("h2o", heavy=4, recent=3, normalize=True),
    Less("sink", heavy=2, recent=5),
    Less("sink", heavy=0, recent=7),
    Less("tova", heavy=7, recent=0),
]
every_policy = pytest.mark.parametrize("less", POLICIES, ids=repr)


def tokens(seed: int = 0) -> tuple[Any, Any, Any]:
    """q [B, HQ, T, D], k and v [B, H, T, D], of float32."""
    rng = np.random.default_rng(seed)
    shapes = [(B, HQ, T, D), (B, H, T, D), (B, H, T, D)]
    return tuple(1.5 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def through_the_store(
    xp: ModuleType, less: Less, q: Any, k: Any, v: Any, kernels: Kernels | None = None, **more: Any
) -> Any:
    """What a store answers each query after c + 1 tokens, fed one at a time. [B, HQ, N, D]."""
    store = KVStore(method_of(less), 1)
    if kernels is not None:
        store._files = {0: kernels}
    out = []
    for t in range(T):
        store.append(0, k[:, :, t : t + 1], v[:, :, t : t + 1])
        out.append(store.attend(0, q[:, :, t : t + 1], SCALE, **more))
    c = int(less.heavy + less.recent)
    return xp.to_numpy(xp.concat(out[c + 1 :], 2))


@every_policy
def test_the_kept_answer_as_in_the_store(xp: ModuleType, less: Less) -> None:
    q, k, v = map(xp.from_numpy, tokens())
    run = simulate(less, Query(q, SCALE), k, v)
    rtol, atol = TOLERANCES["float32"]
    np.testing.assert_allclose(
        run.out, through_the_store(xp, less, q, k, v), rtol=10 * rtol, atol=10 * atol
    )


def test_soft_caps_and_sinks_take_part(xp: ModuleType) -> None:
    q, k, v = map(xp.from_numpy, tokens(1))
    sinks = xp.from_numpy(np.linspace(-1, 2, HQ).astype(np.float32))
    less, query = POLICIES[0], Query(q, SCALE, 3.0, sinks)
    want = through_the_store(xp, less, q, k, v, softcap=3.0, sinks=sinks)
    rtol, atol = TOLERANCES["float32"]
    np.testing.assert_allclose(
        simulate(less, query, k, v).out, want, rtol=10 * rtol, atol=10 * atol
    )


@every_policy
def test_every_token_goes_once_and_after_its_time(less: Less) -> None:
    q, k, v = tokens()
    order = simulate(less, Query(q, SCALE), k, v).order
    c = int(less.heavy + less.recent)
    assert order.shape == (B, H, T - 1 - c)
    for row in order.reshape(-1, T - 1 - c):
        assert len({*row.tolist()}) == len(row)
    # after query c + n the newest `recent` of the c + 1 + n tokens are safe
    newest = np.arange(c, T - 1) - int(less.recent)
    assert (order <= newest).all()
    if less.policy == "sink":
        assert (order == np.arange(T - 1 - c) + int(less.heavy)).all()


def test_another_layer_reads_what_the_owner_keeps() -> None:
    q, k, v = tokens()
    asks = tokens(5)[0]
    less = POLICIES[0]
    own = simulate(less, Query(q, SCALE), k, v)
    read = simulate(less, Query(q, SCALE), k, v, reader=asks)
    np.testing.assert_array_equal(own.order, read.order)
    # the last query sees all tokens but those that went
    lost = {int(i) for i in own.order[0, 0]}
    kept = [i for i in range(T) if i not in lost]
    want = attend_dense(asks[:1, :2, -1:], k[:1, :1, kept], v[:1, :1, kept], SCALE)
    np.testing.assert_allclose(read.out[0, :2, -1], want.out[0, :, 0], rtol=1e-4, atol=1e-5)


def test_the_exact_answers_are_those_of_a_store_that_keeps_all(xp: ModuleType) -> None:
    q, k, v = tokens(4)
    sinks = xp.from_numpy(np.linspace(-1, 2, HQ).astype(np.float32))
    halves = [x.astype(np.float16) for x in (q, k, v)]
    captured = Captured(*halves, 0, Query(xp.from_numpy(q), SCALE, 3.0, sinks))
    out, lse = exact_of(captured, slice(0, B), 7, sinks)
    store = KVStore(Method(), 1)
    wide = [xp.from_numpy(x.astype(np.float32)) for x in halves]
    store.append(0, *wide[1:])
    want = store.attend(0, wide[0], SCALE, softcap=3.0, sinks=sinks)
    np.testing.assert_allclose(out, xp.to_numpy(want)[:, :, 8:], rtol=1e-4, atol=1e-5)
    assert lse.shape == (B, HQ, T - 8)


def kernels(seed: int = 0) -> Kernels:
    rng = np.random.default_rng(seed)
    shapes = [(HQ, D, M), (HQ, M, R), (H, D, M), (H, M, R), (H, R, R), (H, R), (H, R)]
    return Kernels(*(0.7 * rng.standard_normal(s).astype(np.float32) for s in shapes))


@pytest.mark.parametrize("less", [POLICIES[0], POLICIES[4], POLICIES[6]], ids=repr)
def test_the_loss_is_the_error_of_the_store_with_its_state(xp: ModuleType, less: Less) -> None:
    """The parallel form of training equals decoding, evictions, folds and joins and all."""
    q, k, v = tokens(2)
    run = simulate(less, Query(q, SCALE), k, v)
    exact = attend_dense(q, k, v, SCALE, causal=True).out[:, :, -run.out.shape[2] :]
    project = np.random.default_rng(3).standard_normal((HQ * D, 6)).astype(np.float32)
    size = -run.out.shape[2] % 128

    def padded(x: Any) -> Any:
        return xp.from_numpy(np.pad(x, [(0, 0), (0, 0), (0, size)] + [(0, 0)] * (x.ndim - 3)))

    ordered = [np.take_along_axis(x, run.order[..., None], 2) for x in (k, v)]
    maps = Kernels(*map(xp.from_numpy, kernels()))
    late = q[:, :, -run.out.shape[2] :]
    arrays = (late, *ordered, run.out, run.lse, exact)
    got = error_of(maps, *map(padded, arrays), xp.from_numpy(project))
    on = map(xp.from_numpy, (q, k, v))
    out = through_the_store(xp, less, *on, kernels=kernels())
    error = (out - exact).swapaxes(1, 2).reshape(-1, HQ * D) @ project
    np.testing.assert_allclose(float(xp.to_numpy(got)), (error**2).sum(), rtol=1e-3)


def test_an_epoch_that_makes_things_worse_is_not_the_result(tmp_path: Path) -> None:
    q, k, v = tokens(6)
    halves = [np.concatenate([x, x]).astype(np.float16) for x in (q, k, v)]
    torch = pytest.importorskip("torch")
    captured = Captured(*halves, 0, Query(torch.from_numpy(q), SCALE))
    like = torch.eye(HQ * D)
    data, mass = prepare(captured, captured, POLICIES[0], tmp_path, like)
    recipe = Recipe(rank=R, hidden=M, epochs=3, rate=1e4, dropout=0.0)  # which can only diverge
    start = begin(data, mass, recipe, 0, like)
    found = [*epochs(data, start, 1.0, 1.0, range(3, 4), recipe, 0, like, False)]
    assert [(epoch.number, epoch.best) for epoch in found] == [(n, 0) for n in range(4)]
    assert found[-1].kernels is start
    assert found[-1].errors == found[0].errors
