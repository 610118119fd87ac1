"""LESS in the store against the loops: policies with and without the state, coded kept tokens."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.backends.base import FULL, ModelShape
from kvc.errors import ConfigError, KVCError
from kvc.methods import KVSharer, Less, Method, parse
from kvc.ops.evict import Kernels
from kvc.ops.mass import attention_mass
from kvc.store import watch
from kvc.store.evicting import Evicting
from kvc.store.store import KVStore
from tests.oracles import less as oracle
from tests.oracles.less_features import Weights, random_weights
from tests.tolerances import TOLERANCES

HQ, H, D, M, R, SCALE = 4, 2, 16, 12, 5, 0.25
POLICIES = [("h2o", 4, 3), ("sink", 2, 5), ("tova", 7, 0), ("h2o", 5, 0), ("h2o", 0, 6)]
CODED = {"token.bits": 4}


def weights(s1: float = 0.5) -> Weights:
    return random_weights(HQ, H, D, M, R, seed=3, s1=s1, s2=-0.5)


def store_of(policy: str, heavy: int, recent: int, maps: Weights | None = None,
             coded: int = 0, **kwargs: Any) -> KVStore:  # fmt: skip
    codec = parse("token", {"bits": coded, "group_size": 8}).codec if coded else None
    less = Less(policy=policy, heavy=heavy, recent=recent)  # type: ignore[arg-type]
    store = KVStore(Method("less", memory=less, codec=codec), 1, **kwargs)
    if maps is not None:
        names = Kernels._fields
        store._files = {0: Kernels(*(getattr(maps, n).astype(np.float32) for n in names))}
    return store


def tokens(n: int, seed: int = 0, rows: int = 1) -> tuple[Any, Any, Any]:
    """Queries, keys and values of n tokens."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, HQ, n, D)) * 2
    k, v = rng.standard_normal((2, rows, H, n, D))
    return q, k, v


def feed(xp: ModuleType, store: KVStore, q: Any, k: Any, v: Any, pads: Any = None) -> Any:
    """One step as an adapter makes it: the library attends while the tokens are as they came."""
    kind = "float64" if xp.name == "numpy" else "float32"
    q, k, v = (xp.from_numpy(np.ascontiguousarray(x.astype(kind))) for x in (q, k, v))
    store.append(0, k, v, pads)
    if store.dense(0) is not None:
        store.observe(0, q, SCALE)
        return None
    return np.asarray(xp.to_numpy(store.attend(0, q, SCALE)))


def close(xp: ModuleType, got: Any, want: Any) -> None:
    rtol, atol = TOLERANCES["float32"]  # the maps are float32
    loose = 1 if xp.name == "numpy" else 10
    np.testing.assert_allclose(got, want, rtol=rtol * loose, atol=atol * loose)


@pytest.mark.parametrize("coded", [0, 4])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("prompt", [1, 6, 7, 8, 40])
@pytest.mark.parametrize(("policy", "heavy", "recent"), POLICIES)
def test_steps_equal_the_loops(
    xp: ModuleType, policy: str, heavy: int, recent: int, prompt: int, state: bool, coded: int
) -> None:
    maps = weights() if state else None
    quantizer = oracle.KeptQuantizer(coded, 8) if coded else None
    loops = oracle.LessCache(policy, heavy, recent, maps, SCALE, quantizer)
    store = store_of(policy, heavy, recent, maps, coded)
    q, k, v = tokens(prompt + 12, seed=prompt)
    feed(xp, store, q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    loops.prefill(q[0, :, :prompt], k[0, :, :prompt], v[0, :, :prompt])
    for t in range(prompt, prompt + 12):
        span = slice(t, t + 1)
        got = feed(xp, store, q[:, :, span], k[:, :, span], v[:, :, span])
        want = loops.step(q[0, :, t], k[0, :, t], v[0, :, t])
        if coded and xp.name != "numpy":  # a code may flip on a tie
            assert np.abs(got[0, :, 0] - want).mean() < 0.02
        else:
            close(xp, got[0, :, 0], want)
    unit = store._slot_of[0].groups[0][1]
    assert isinstance(unit, Evicting)
    unit.settle(False)
    unit._unroll(unit.k.shape[2])
    for g, head in enumerate(loops.heads):
        kept = np.concatenate(
            [xp.to_numpy(unit.kept.pos)[0, g], xp.to_numpy(unit._live(unit.pos))[0, g]]
        )
        assert sorted(kept[kept >= 0].tolist()) == head.positions


@pytest.mark.parametrize(("policy", "heavy", "recent"), POLICIES)
def test_pieces_of_a_prompt_are_the_prompt(
    xp: ModuleType, policy: str, heavy: int, recent: int
) -> None:
    """However an exact prompt is cut, with mlx-lm's lone last token or without."""
    q, k, v = tokens(150, seed=1)

    def run(cuts: list[int], **kwargs: Any) -> Any:
        store = store_of(policy, heavy, recent, weights(), **kwargs)
        for a, b in zip([0, *cuts], [*cuts, 140], strict=True):
            feed(xp, store, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b])
        for t in range(140, 150):
            out = feed(xp, store, q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        return out

    whole = run([])
    close(xp, run([70]), whole)
    close(xp, run([100, 139], lone_tail=True), whole)


@pytest.mark.parametrize("prefill", ["exact", "stream"])
@pytest.mark.parametrize(("policy", "heavy", "recent"), POLICIES)
def test_rows_and_padding_change_nothing(
    xp: ModuleType, policy: str, heavy: int, recent: int, prefill: str
) -> None:
    pads, n = [0, 5, 17], 30
    q, k, v = tokens(n + 9, seed=2, rows=3)

    def run(rows: list[int], cut: int) -> Any:
        store = store_of(policy, heavy, recent, weights(), prefill=prefill)
        left = [pads[row] - cut for row in rows]
        part = [x[rows] for x in (q, k, v)]
        cuts = [cut, 22, n]
        for a, b in pairwise(cuts):
            feed(xp, store, *(x[:, :, a:b] for x in part), left if a == cut else None)
        for t in range(n, n + 9):
            out = feed(xp, store, *(x[:, :, t : t + 1] for x in part))
        return out

    together = run([0, 1, 2], 0)
    for row, pad in enumerate(pads):
        close(xp, run([row], pad)[0], together[row])


@pytest.mark.parametrize(("policy", "heavy", "recent"), POLICIES)
def test_tokens_that_are_taken_back_were_never_there(
    xp: ModuleType, policy: str, heavy: int, recent: int
) -> None:
    q, k, v = tokens(40, seed=4)

    def run(guess: int) -> Any:
        store = store_of(policy, heavy, recent, weights())
        feed(xp, store, q[:, :, :20], k[:, :, :20], v[:, :, :20])
        feed(xp, store, q[:, :, 20:21], k[:, :, 20:21], v[:, :, 20:21])  # ends the prompt
        t = 21
        while t < 35:
            end = t + 1 + guess
            at = [t, *range(39, 39 - guess, -1)]  # one token that stays, and wrong guesses
            out = feed(xp, store, q[:, :, at], k[:, :, at], v[:, :, at])
            store.trim(guess)
            t = end - guess
        return out[:, :, :1]

    close(xp, run(3), run(0))


def test_a_large_budget_is_exact(xp: ModuleType) -> None:
    q, k, v = tokens(30)
    plain = KVStore(parse("none"), 1)
    kind = "float64" if xp.name == "numpy" else "float32"
    plain.append(0, *(xp.from_numpy(x.astype(kind)) for x in (k, v)))
    want = xp.to_numpy(plain.attend(0, xp.from_numpy(q[:, :, -1:].astype(kind)), SCALE))
    for policy, heavy, recent in [("h2o", 20, 20), ("sink", 20, 20), ("tova", 40, 0)]:
        store = store_of(policy, heavy, recent, weights())
        feed(xp, store, q[:, :, :20], k[:, :, :20], v[:, :, :20])
        for t in range(20, 30):
            span = slice(t, t + 1)
            got = feed(xp, store, q[:, :, span], k[:, :, span], v[:, :, span])
        close(xp, got, want)


def test_silent_maps_are_the_bare_policy(xp: ModuleType) -> None:
    q, k, v = tokens(40)
    outs = []
    for maps in (weights(s1=0.0), None):
        store = store_of("h2o", 4, 3, maps)
        feed(xp, store, q[:, :, :30], k[:, :, :30], v[:, :, :30])
        for t in range(30, 40):
            span = slice(t, t + 1)
            out = feed(xp, store, q[:, :, span], k[:, :, span], v[:, :, span])
        outs.append(out)
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("coded", [0, 4])
@pytest.mark.parametrize(("policy", "heavy", "recent"), POLICIES)
def test_bytes_are_the_formula_and_constant(
    xp: ModuleType, policy: str, heavy: int, recent: int, coded: int
) -> None:
    maps = weights()
    store = store_of(policy, heavy, recent, maps, coded)
    _, k, v = (xp.from_numpy(x.astype(np.float16)) for x in tokens(60))
    q = xp.from_numpy(tokens(60)[0].astype(np.float16))
    store.append(0, k, v)
    store.observe(0, q, SCALE)
    want = oracle.nbytes(H, D, heavy + recent, R, policy)
    if coded:
        kept = oracle.kept_bytes_quantized(H, D, recent + 1, heavy, coded, 8)
        want["kept"] = kept
    for _ in range(5):
        store.append(0, k[:, :, :1], v[:, :, :1])
        store.attend(0, q[:, :, :1], SCALE)
        parts = store.report().parts
        assert parts.pop("slack", 0) == 0
        waiting = parts.pop("queries", 0)  # of the last step, until the next one
        assert waiting == (0 if policy == "sink" else HQ * D * 2)
        assert parts.pop("state") == want["state"]
        assert parts.pop("positions") == want["positions"]
        assert parts.pop("scores", 0) == want["scores"]
        assert sum(parts.values()) == want["kept"]
        assert store.nbytes == sum(x.nbytes for x in store.arrays()) == waiting + sum(want.values())


@pytest.mark.parametrize("learned", [False, True], ids=["h2o", "less"])
def test_a_step_asks_for_its_denominator_once(
    xp: ModuleType, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the state has a part in it, which no key's mass has."""
    known = []

    def noted(*args: Any, lse: Any = None, **options: Any) -> Any:
        known.append(lse is not None)
        return attention_mass(*args, lse=lse, **options)

    monkeypatch.setattr(watch, "attention_mass", noted)
    q, k, v = tokens(40)
    store = store_of("h2o", 4, 3, weights() if learned else None)
    feed(xp, store, q[:, :, :30], k[:, :, :30], v[:, :, :30])
    known.clear()
    for t in range(30, 40):
        feed(xp, store, *(x[:, :, t : t + 1] for x in (q, k, v)))
    assert len(known) == 10
    assert known[1:] == [not learned] * 9


def test_beams_copy_rows(xp: ModuleType) -> None:
    q, k, v = tokens(40, rows=2)
    store = store_of("h2o", 4, 3, weights())
    feed(xp, store, q[:, :, :30], k[:, :, :30], v[:, :, :30])
    feed(xp, store, q[:, :, 30:31], k[:, :, 30:31], v[:, :, 30:31])
    store.reorder([1, 1, 0])
    rows = [0, 0, 0]  # the same new token in every beam
    for t in range(31, 40):
        span = slice(t, t + 1)
        out = feed(xp, store, q[rows][:, :, span], k[rows][:, :, span], v[rows][:, :, span])
    np.testing.assert_array_equal(out[0], out[1])
    assert np.abs(out[0] - out[2]).max() > 1e-3


def test_bad_numbers_name_their_layer(xp: ModuleType) -> None:
    q, k, v = tokens(30)
    k[0, 0, 3, 3] = np.inf
    store = store_of("h2o", 4, 3)
    with np.errstate(invalid="ignore"):
        feed(xp, store, q, k, v)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(KVCError, match="layer 0: expected finite numbers in k"),
    ):
        feed(xp, store, q[:, :, :1], k[:, :, :1], v[:, :, :1])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("h2o", {"heavy": "nan"}, "heavy must be a number of tokens"),
        ("h2o", {"recent": "inf"}, "recent must be a number of tokens"),
        ("h2o", {"heavy": "100%"}, "heavy must be below 100%, got '100%'"),
        ("h2o", {"heavy": "five%"}, "heavy must be float, got 'five%'"),
        ("h2o", {"heavy": "2.5"}, "heavy must be a number of tokens"),
        ("h2o", {"policy": "fifo"}, "policy must be one of h2o, sink, tova"),
        ("tova", {"recent": "4"}, "tova protects no window"),
        ("h2o", {"heavy": "0", "recent": "0"}, "keep at least one"),
        ("h2o+gear", {}, "take the preset token"),
        ("minicache+h2o", {}, "evict or merge, not both"),
        ("h2o+tova", {}, "h2o and tova both fill the seam memory"),
    ],
)
def test_bad_methods(text: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, settings)


def test_kernels_that_were_not_looked_for_are_no_bare_policy() -> None:
    with pytest.raises(ConfigError, match="expected a method checked against a model"):
        KVStore(parse("less"), 1)


def test_percentages_are_fractions() -> None:
    assert parse("h2o", {"heavy": "5%", "recent": "2.5%"}) == parse("h2o", {"heavy": 0.05})
    assert parse("gear", {"outliers": "100%"}) == parse("gear", {"outliers": 1})
    assert parse("kvsharer", {"share": "12.5%"}).layout == KVSharer(share=0.125)


def test_budgets_below_one_token_are_refused() -> None:
    shape = ModelShape("llama", 1, HQ, H, D, 100, 128, 4, (FULL,))
    assert Less(heavy=0.01).check(shape).heavy == 1
    with pytest.raises(ConfigError, match=r"heavy 0.007 and recent 0.001 .* below one token"):
        Less(heavy=0.007, recent=0.001).check(shape)
