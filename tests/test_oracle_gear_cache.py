"""GEAR's streaming cache (arXiv:2403.05527): what is coded when, and its bytes."""

from dataclasses import replace

import numpy as np
import pytest

from tests.oracles import attention, codes, gear, gear_cache
from tests.oracles.checks import CLOSE, SMALL, assert_close, draw, spiky


def stream(s: gear.Settings, prompt: int, steps: int, seed: int = 0) -> gear_cache.GearCache:
    """A cache after a prompt and some steps."""
    k, v = spiky(seed, 2, prompt + steps, 16), spiky(seed + 9, 2, prompt + steps, 16)
    q = draw(seed + 20, 4, prompt + steps, 16)
    cache = gear_cache.GearCache(s)
    if prompt:
        cache.prefill(k[:, :prompt], v[:, :prompt])
    for t in range(prompt, prompt + steps):
        cache.step(k[:, t], v[:, t], q[:, t])
    return cache


@pytest.mark.parametrize("prompt", [0, 1, 15, 16, 17, 33])
def test_chunk_policy(prompt: int) -> None:
    """One prompt chunk of whole buffers at r_p, then one per filled buffer at r_d."""
    cache = stream(SMALL, prompt, 20)
    first = prompt // 16 * 16
    n_later = (prompt + 20 - first) // 16
    expected = ([first] if first else []) + [16] * n_later
    ranks = ([4] if first else []) + [2] * n_later
    for role, exact, read in (("k", cache.k, cache.keys()), ("v", cache.v, cache.values())):
        chunks = cache.chunks(role)  # type: ignore[arg-type]
        assert [chunk.n for chunk in chunks] == expected
        assert [chunk.rank for chunk in chunks] == ranks
        assert cache.dense(role) == (prompt + 20) % 16  # type: ignore[arg-type]
        at = 0
        for index, (n, rank) in enumerate(zip(expected, ranks, strict=True)):
            alone = gear.compress(exact[:, at : at + n], role, SMALL, rank, index)  # type: ignore[arg-type]
            assert np.array_equal(read[:, at : at + n], alone.x)
            at += n
        assert np.array_equal(read[:, at:], exact[:, at:])


def test_steps_are_exact_until_the_buffer_has_been_full() -> None:
    """The step that fills the buffer still attends at full precision; the next one does not."""
    k, v, q = spiky(0, 2, 17, 16), spiky(9, 2, 17, 16), draw(2, 4, 17, 16)
    cache = gear_cache.GearCache(SMALL)
    prompt_out = cache.prefill(k[:, :10], v[:, :10], q[:, :10])
    whole = attention.attend(q, k, v, causal=True).out
    assert prompt_out is not None
    assert_close(prompt_out, whole[:, :10])
    for t in range(10, 17):
        out = cache.step(k[:, t], v[:, t], q[:, t])
        assert (np.abs(out - whole[:, t]).max() < CLOSE) == (t < 16)


def test_lossless_settings_are_exact_attention() -> None:
    """All entries outliers, or full rank."""
    k, v, q = spiky(0, 2, 40, 16), spiky(9, 2, 40, 16), draw(2, 4, 40, 16)
    whole = attention.attend(q, k, v, causal=True).out
    every = replace(SMALL, outliers=1.0)
    full = replace(SMALL, variant="gear_l", prefill_rank=16, rank=16, rotate="hadamard")
    for s in (every, full, replace(every, scales="dual", sink=3, window=5)):
        cache = gear_cache.GearCache(s)
        cache.prefill(k[:, :20], v[:, :20])
        for t in range(20, 40):
            assert_close(cache.step(k[:, t], v[:, t], q[:, t]), whole[:, t])
        assert cache.compressed("k") >= 16


def test_sink_and_window() -> None:
    """The first and the newest tokens stay as they came, between chunks of n_b."""
    s = replace(SMALL, sink=3, window=5)
    for prompt, steps in ((23, 0), (24, 0), (8, 16), (2, 38), (0, 24)):
        cache = stream(s, prompt, steps)
        n = prompt + steps
        assert cache.compressed("k") == cache.compressed("v") == max(0, n - 8) // 16 * 16
        assert np.array_equal(cache.keys()[:, :3], cache.k[:, :3])
        assert np.array_equal(cache.values()[:, n - 5 :], cache.v[:, n - 5 :])


def test_sliding_value_window() -> None:
    """The last n_b values exact; K in chunks as ever; quantized values as in chunk mode."""
    s = replace(SMALL, variant="quant", value_window="sliding")
    for prompt, steps in ((0, 10), (0, 20), (20, 7), (40, 9)):
        cache = stream(s, prompt, steps)
        n = prompt + steps
        assert cache.dense("v") == min(n, 16)
        assert cache.compressed("k") == n // 16 * 16
        coded = cache.compressed("v")
        assert np.array_equal(cache.values()[:, coded:], cache.v[:, coded:])
        if coded:
            once = gear.compress(cache.v[:, :coded], "v", s).x
            assert np.array_equal(cache.values()[:, :coded], once)
    with pytest.raises(ValueError, match="low-rank"):
        replace(s, variant="gear_l")
    with pytest.raises(ValueError, match="buffer"):
        replace(SMALL, buffer=12)


LLAMA = gear.Settings(variant="gear", buffer=1024)  # with H = 32, D = 128


def llama_bytes(s: gear.Settings, n: int, rank: int) -> dict[str, int]:
    """One chunk, no dense tokens."""
    return gear_cache.cache_bytes(32, 128, s, [(n, rank)], [(n, rank)], 0, 0)


def test_gear_bytes_by_hand() -> None:
    """2 bits, g = 64, 1024 tokens, rank 4, 2 % outliers, all in fp16."""
    got = llama_bytes(LLAMA, 1024, 4)
    assert got == {
        "codes": 2_097_152,
        "k_meta": 262_144,
        "v_meta": 262_144,
        "lowrank": 589_824,
        "sparse": 2 * 327_680,
        "buffer": 0,
    }
    full = 2 * 32 * 128 * 1024 * 2
    assert full == 16_777_216
    ratios = [
        sum(llama_bytes(replace(LLAMA, variant=v), 1024, 4).values()) / full
        for v in ("quant", "gear_l", "gear")
    ]
    assert [f"{100 * ratio:.2f}" for ratio in ratios] == ["15.62", "19.14", "23.05"]
    later = llama_bytes(LLAMA, 64, 2)["lowrank"]
    assert later == 49_152
    assert f"{100 * later / (full / 16):.2f}" == "4.69"


def test_packed_rows_are_whole_words() -> None:
    """Keys of kcvt, 20 tokens at 2 bits: 40 bits a row are two words."""
    s = replace(LLAMA, backbone="kcvt", buffer=20)
    assert gear_cache.role_bytes("k", 20, 32, 128, s, 0)["codes"] == 32_768
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0)["codes"] == 20_480
    assert gear_cache.role_bytes("k", 20, 32, 128, s, 0)["meta"] == 2 * 2 * 32 * 128
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0)["meta"] == 2 * 2 * 20
    assert gear_cache.role_bytes("v", 20, 32, 128, s, 0, ez=4)["meta"] == 6 * 20
    wide = gear_cache.role_bytes("v", 20, 513, 128, s, 0)["sparse"]
    assert wide == 20 * 2 * gear.outlier_count(0.02, 513 * 128) * 6


def test_dual_bytes() -> None:
    """(T + 2 D) es per head, tile and tensor."""
    s = replace(LLAMA, scales="dual", tile=128, k_bits=4)
    assert gear_cache.role_bytes("v", 128, 1, 128, s, 0)["meta"] == 3 * 128 * 2
    assert gear_cache.role_bytes("v", 256, 1, 128, s, 0)["meta"] == 2 * 3 * 128 * 2
    assert gear_cache.role_bytes("k", 128, 1, 128, s, 0)["meta"] == 5 * 128 * 2
    # 2.375 bits per element at 128 x 128 tiles.
    part = gear_cache.role_bytes("v", 128, 1, 128, replace(s, variant="quant"), 0)
    assert 8 * sum(part.values()) / 128**2 == 2.375


@pytest.mark.parametrize("changes", [{}, {"sink": 2, "window": 3}, {"backbone": "kcvt"}])
def test_bytes_are_the_sizes_of_what_is_held(changes: dict[str, object]) -> None:
    """The formula against the arrays of a cache."""
    cache = stream(replace(SMALL, **changes), 35, 20)  # type: ignore[arg-type]
    chunks = cache.k_chunks + cache.v_chunks
    got = gear_cache.nbytes(cache)
    assert got["codes"] == sum(c.words.nbytes for c in chunks if c.words is not None)
    assert got["lowrank"] == sum(2 * (c.a.size + c.c.size) for c in chunks)
    assert got["sparse"] == sum(4 * int(c.outlier.sum()) for c in chunks)
    assert got["buffer"] == 2 * 2 * 16 * (cache.dense("k") + cache.dense("v"))
    meta = 0
    for chunk in chunks:
        backbone = str(changes.get("backbone", "kivi"))
        meta += 4 * len(list(codes.groups(chunk.codes.shape, chunk.role, backbone, 8)))
    assert got["k_meta"] + got["v_meta"] == meta
    held = gear_cache.nbytes(cache, allocated=True)["buffer"]
    assert held == 2 * 2 * 2 * 16 * (16 + cache.settings.sink + cache.settings.window)
