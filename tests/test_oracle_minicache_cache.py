"""MiniCache's cache of a pair of layers (arXiv:2405.14366): decoding and bytes."""

from math import pi

import numpy as np

from tests.oracles import attention, minicache, minicache_cache
from tests.oracles.attention import Array
from tests.oracles.checks import assert_close, draw


def two_layers(n: int, near: float = 0.3) -> dict[str, Array]:
    """Queries, keys and values of a pair: q [4, n, 8], k and v [2, n, 8]."""
    x = {name: draw(i, 2, n, 8) for i, name in enumerate(("ka", "va"))}
    x |= {f"{s}b": 1.5 * x[f"{s}a"] + near * draw(5 + i, 2, n, 8) for i, s in enumerate("kv")}
    return x | {"qa": draw(8, 4, n, 8), "qb": draw(9, 4, n, 8)}


def run_pair(
    pair: minicache_cache.MiniCachePair, x: dict[str, Array], prompt: int
) -> tuple[Array, Array]:
    """Outputs of the decode steps of both layers, [n - prompt, Hq, D]."""
    pair.prefill(*(x[name][:, :prompt] for name in ("ka", "va", "kb", "vb")))
    names = ("qa", "ka", "va", "qb", "kb", "vb")
    outs = [pair.step(*(x[name][:, t] for name in names)) for t in range(prompt, x["ka"].shape[1])]
    return np.array([a for a, _ in outs]), np.array([b for _, b in outs])


def exact_pair(x: dict[str, Array], prompt: int) -> tuple[Array, Array]:
    """The same, with full caches."""
    a = attention.attend(x["qa"], x["ka"], x["va"], causal=True).out[:, prompt:]
    b = attention.attend(x["qb"], x["kb"], x["vb"], causal=True).out[:, prompt:]
    return a.swapaxes(0, 1), b.swapaxes(0, 1)


def test_pair_is_exact_where_it_should_be() -> None:
    """Exact: gamma = 1 with nothing merged in decode; proportional layers."""
    x = two_layers(14)
    pair = minicache_cache.MiniCachePair(gamma=1.0, decode_policy="keep")
    for got, expected in zip(run_pair(pair, x, 9), exact_pair(x, 9), strict=True):
        assert_close(got, expected)
    assert pair.n_retained("k") == 18
    assert np.array_equal(pair.restored("a")[0], x["ka"])
    x = two_layers(14, near=0.0)
    pair = minicache_cache.MiniCachePair(t=0.2)
    for got, expected in zip(run_pair(pair, x, 9), exact_pair(x, 9), strict=True):
        assert_close(got, expected)


def test_pair_merges_after_the_step_by_frozen_thresholds() -> None:
    """The first step reads merged prompt and its own exact token; later ones merged tokens."""
    x = two_layers(14)
    pair = minicache_cache.MiniCachePair(gamma=0.3)
    outs = run_pair(pair, x, 9)
    prompt = {s: minicache.merge_block(x[f"k{s}"][:, :9], x[f"k{s}"][:, :9]) for s in "ab"}
    assert prompt["a"].angles.max() < 1e-7
    blocks = {
        s: minicache.merge_block(x[f"{s}a"][:, :9], x[f"{s}b"][:, :9], gamma=0.3, always_keep=1)
        for s in "kv"
    }
    k, v = (
        np.concatenate([minicache.restore(blocks[s], "b", 2), x[f"{s}b"][:, 9:10]], axis=1)
        for s in "kv"
    )
    assert_close(outs[1][0], attention.attend(x["qb"][:, 9:10], k, v).out[:, 0])
    assert pair.n_merged == 14
    d = blocks["k"].angles / pi
    for i, block in enumerate(pair.blocks["k"][1:]):
        w = minicache.angle(x["ka"][0, 9 + i], x["kb"][0, 9 + i]) / pi
        assert_close(block.angles[0, 0] / pi, w)
        assert block.kept[0, 0] == (d.max() - w <= 0.3 * (d.max() - d.min()))


def test_frozen_ratio_threshold_is_the_smallest_retained_angle() -> None:
    """Later entries are retained from there on."""
    angles = np.array([0.1, 0.5, 0.4, 0.2])
    limits = minicache.thresholds(angles, "ratio", 0.5)
    assert_close(limits.low, 0.4 / pi)
    later = minicache.retained([0.39, 0.4, 1.0], "ratio", 0.5, limits)
    assert later.tolist() == [False, True, True]


def test_decode_policies_and_whole_blocks() -> None:
    """How many tokens are merged, and when; a codec sees the directions of whole blocks."""
    x, seen = two_layers(30), []

    def codec(e: Array, tensor: str, index: int) -> Array:
        seen.append((e.shape, tensor, index))
        return e

    make = minicache_cache.MiniCachePair
    for pair, merged in (
        (make(), 30),
        (make(decode_policy="keep"), 18),
        (make(decode_policy="buffer", buffer=8), 26),
        (make(decode_policy="buffer", buffer=8, codec=codec), 24),
        (make(decode_policy="keep", buffer=8, whole_blocks=True), 16),
    ):
        run_pair(pair, x, 18)
        assert pair.n_merged == merged
        for layer in "ab":
            k, v = pair.restored(layer)
            assert k.shape == v.shape == (2, 30, 8)
            assert np.array_equal(k[:, merged:], x[f"k{layer}"][:, merged:])
        assert pair.nbytes()["dense"] == 4 * 2 * 8 * 2 * (30 - merged)
        assert pair.nbytes()["direction"] == 2 * merged * 2 * 8 * 2
        assert pair.blocks["k"][0].kept[0].all()
    assert seen == [
        ((16, 2, 8), "k", 0),
        ((16, 2, 8), "v", 0),
        ((8, 2, 8), "k", 1),
        ((8, 2, 8), "v", 1),
    ]


def test_pair_without_prompt() -> None:
    """Thresholds come from the first merged token."""
    x = two_layers(5)
    pair = minicache_cache.MiniCachePair()
    assert np.all(np.isfinite(run_pair(pair, x, 0)))
    assert pair.n_merged == 5


def test_minicache_bytes_by_hand() -> None:
    """Llama-2-7B, 1024 tokens: one pair, and the whole model from layer 16 on."""
    pair = sum(minicache_cache.pair_bytes(1024, 32, 128).values())
    full = 4 * 1024 * 32 * 128 * 2
    assert (pair, full) == (17_039_376, 33_554_432)
    assert f"{100 * pair / full:.2f}" == "50.78"
    assert f"{16 * full / (8 * full + 8 * pair):.3f}" == "1.326"
    m = 1024 * 32 // 20
    kept = sum(minicache_cache.pair_bytes(1024, 32, 128, m, m).values())
    assert kept - pair == 2 * (2 * m * 128 * 2 + 4 * m)
    assert f"{16 * full / (8 * full + 8 * kept):.2f}" == "1.28"
    token = minicache_cache.pair_bytes(1024, 32, 128, 3, 0, granularity="token")
    assert token["norms"] == 2 * 2 * 1024 * 2
    assert token["retained"] == 3 * (2 * 32 * 128 * 2 + 4)
    assert minicache_cache.pair_bytes(1024, 32, 128, how="mean")["norms"] == 0
    # 4 bits at g = 32 with fp16 scale and zero are 5 bits an element; norms stay fp16.
    coded = full / 2 * 5 / 16 + 262_144
    assert f"{16 / 5:.2f} {16 * full / (8 * full * 5 / 16 + 8 * coded):.2f}" == "3.20 4.20"
