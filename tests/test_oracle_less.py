"""LESS's oracle (arXiv:2402.09398): policies, kernels and the state of what was evicted."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from tests.oracles import attention, codes, less, less_features
from tests.oracles.attention import Array
from tests.oracles.checks import assert_close, draw


def run_less(
    policy: str,
    features: less_features.Features | None,
    prompt: int = 9,
    n: int = 16,
    heavy: int = 3,
    recent: int = 2,
    **options: object,
) -> tuple[less.LessCache, list[Array], tuple[Array, Array, Array]]:
    """A cache after a prompt and steps, with its outputs and inputs: 4 query heads on 2."""
    q, k, v = 2 * draw(0, 4, n, 8), draw(1, 2, n, 8), draw(2, 2, n, 8)
    cache = less.LessCache(policy, heavy, recent, features, **options)  # type: ignore[arg-type]
    outs = list(cache.prefill(q[:, :prompt], k[:, :prompt], v[:, :prompt]).swapaxes(0, 1))
    outs += [cache.step(q[:, t], k[:, t], v[:, t]) for t in range(prompt, n)]
    return cache, outs, (q, k, v)


WEIGHTS = less_features.random_weights(4, 2, 8, 16, 4, s1=0.5, s2=0.3)


def test_gelu_and_features() -> None:
    """GELU(1) = Phi(1); features are never negative; s1 = 0 turns psi off."""
    assert_close(
        less_features.gelu([0.0, 1.0, -1.0]), [0, 0.8413447460685429, -0.15865525393145707]
    )
    q, k = draw(0, 8), draw(1, 8)
    assert np.all(WEIGHTS.phi(3, q) >= 0)
    assert np.all(WEIGHTS.psi(1, k) >= 0)
    assert WEIGHTS.rank == 4
    one = np.ones((1, 1))
    g = less_features.gelu(less_features.gelu(1.0))
    assert_close(less_features.phi(np.ones(1), one, one), [g])
    # u = |s1| g, then |u + 3 u s2|.
    by_hand = less_features.psi(np.ones(1), one, one, 3 * one, np.array([-0.5]), np.array([-2.0]))
    assert_close(by_hand, [2.5 * g])
    assert np.all(replace(WEIGHTS, s1=np.zeros((2, 4))).psi(1, k) == 0)


def test_combined_attention() -> None:
    """The stable form is the naive one; logits far out do no harm; it is not shift-invariant."""
    q, keys, values, state = draw(0, 8), draw(1, 5, 8), draw(2, 5, 8), draw(3, 4, 8)
    norm, features = np.abs(draw(4, 4)), np.abs(draw(5, 4))
    weights = np.exp(keys @ q / np.sqrt(8))
    naive = (weights @ values + features @ state) / (weights.sum() + features @ norm)
    got = less.combine(q, keys, values, state, norm, features)
    assert_close(got.out, naive)
    assert_close(got.lse, np.log(weights.sum() + features @ norm))
    far = less.combine(q, keys - 1e5 * q, values, state, norm, features)
    assert_close(far.out, features @ state / (features @ norm))
    near = less.combine(q, keys + 1e5 * q, values, state, norm, features)
    assert_close(near.out, less.combine(q, keys, values, 0 * state, 0 * norm, features).out, 1e-6)
    none = less.combine(q, keys, values, state, norm, np.zeros(4))
    assert_close(none.out, attention.attend(q[None, None], keys[None], values[None]).out[0, 0])


@pytest.mark.parametrize("policy", less.POLICIES)
def test_large_budget_is_exact(policy: str) -> None:
    """Nothing evicted: exact attention whatever the weights."""
    _, outs, (q, k, v) = run_less(policy, WEIGHTS, heavy=10, recent=6)
    assert_close(np.array(outs).swapaxes(0, 1), attention.attend(q, k, v, causal=True).out)


@pytest.mark.parametrize("policy", less.POLICIES)
def test_no_features_is_the_bare_policy(policy: str) -> None:
    """Bit for bit, with psi = 0."""
    _, zero, _ = run_less(policy, replace(WEIGHTS, s1=np.zeros((2, 4))))
    _, bare, _ = run_less(policy, None)
    assert np.array_equal(zero, bare)


class OneHot:
    """Maps by which the state holds every key exactly: psi(k_i) = e_i, phi_i = exp(q k_i)."""

    def __init__(self, k: Array) -> None:
        """Keys of the whole run, [H, T, D]."""
        self.k, self.rank = k, int(k.shape[1])

    def phi(self, head: int, q: Array) -> Array:
        """The true weight of every key."""
        return np.asarray(np.exp(self.k[head // 2] @ q / np.sqrt(len(q))))

    def psi(self, head: int, k: Array) -> Array:
        """Which key it is."""
        return np.asarray(np.all(self.k[head] == k, axis=1), np.float64)


@pytest.mark.parametrize("policy", less.POLICIES)
def test_exact_kernel_is_full_attention(policy: str) -> None:
    """Evicted tokens answer through the state as if they had stayed."""
    _, outs, (q, k, v) = run_less(policy, OneHot(draw(1, 2, 16, 8)))
    assert_close(np.array(outs).swapaxes(0, 1), attention.attend(q, k, v, causal=True).out)


@pytest.mark.parametrize("policy", less.POLICIES)
@pytest.mark.parametrize(("heavy", "recent"), [(3, 2), (4, 0), (0, 4)])
@pytest.mark.parametrize("prompt", [1, 4, 9])
def test_tokens_are_conserved_and_the_state_is_their_sum(
    policy: str, heavy: int, recent: int, prompt: int
) -> None:
    """Kept and evicted are all, once; the state equals one batch fold."""
    cache, _, (_, k, v) = run_less(policy, WEIGHTS, prompt, heavy=heavy, recent=recent)
    for g, head in enumerate(cache.heads):
        assert sorted(head.positions + head.evicted) == list(range(16))
        assert head.positions == sorted(head.positions)
        assert len(head.positions) == heavy + recent
        if policy != "tova":
            assert head.positions[heavy:] == list(range(16 - recent, 16))
        if policy == "sink":
            assert head.positions[:heavy] == list(range(heavy))
        features = np.array([WEIGHTS.psi(g, k[g, i]) for i in head.evicted])
        assert_close(head.norm, features.sum(axis=0))
        assert_close(head.state, features.T @ v[g, head.evicted])


def heaviest(positions: Iterable[int], score: list[float], count: int) -> list[int]:
    """The positions of the largest scores, in order."""
    return sorted(sorted(positions, key=lambda at: -score[at])[:count])


def test_h2o_by_hand() -> None:
    """Prompt scores are the full softmax summed over queries; later only kept tokens share."""
    cache, _, (q, k, _) = run_less("h2o", None, prompt=9, n=10)
    for g in range(2):
        probs = attention.probs(q[:, :9], k[:, :9], causal=True)[2 * g : 2 * g + 2]
        score = probs.sum(axis=(0, 1)).tolist()
        seen = [*heaviest(range(7), score, 3), 7, 8, 9]
        probs = attention.probs(q[2 * g : 2 * g + 2, 9:], k[g : g + 1, seen])
        total = [*score, 0.0]
        for position, new in zip(seen, probs[:, 0].sum(axis=0), strict=True):
            total[position] += new
        assert cache.heads[g].positions == [*heaviest(seen[:4], total, 3), 8, 9]
        assert_close(cache.heads[g].scores, [total[p] for p in cache.heads[g].positions])


def test_tova_by_hand() -> None:
    """The last query decides, averaged over all heads; the newest may go."""
    cache, _, (q, k, _) = run_less("tova", None, prompt=9, n=9)
    share = attention.probs(q[:, 8:9], k[:, :9])[:, 0].mean(axis=0)
    expected = sorted(np.argsort(-share)[:5].tolist())
    assert [head.positions for head in cache.heads] == [expected, expected]
    assert less.select("tova", [0, 1, 2], [0.5, 0.4, 0.1], 3, 1, 1) == [0, 1]
    cache, _, (q, k, _) = run_less("tova", None, prompt=9, n=10)
    share = attention.probs(q[:, 8:9], k[:, :9])[:, 0].mean(axis=0)
    seen = [*sorted(np.argsort(-share)[:5].tolist()), 9]
    share = attention.probs(q[:, 9:], k[:, seen])[:, 0].mean(axis=0)
    expected = [position for i, position in enumerate(seen) if i != share.argmin()]
    assert [head.positions for head in cache.heads] == [expected, expected]


def test_ties_go_to_the_older() -> None:
    """In every policy that has scores."""
    assert less.select("h2o", [0, 1, 2, 3], [1.0, 1.0, 1.0, 0.0], 4, 2, 1) == [0, 1, 3]
    assert less.select("tova", [0, 1, 2], [1.0, 1.0, 1.0], 3, 2, 0) == [0, 1]
    assert less.select("sink", [0, 1, 5, 6], [0.0] * 4, 7, 2, 1) == [0, 1, 3]


def test_equal_values_give_that_value() -> None:
    """Numerator and denominator agree."""
    q, k = draw(0, 4, 12, 8), draw(1, 2, 12, 8)
    v = np.broadcast_to(draw(2, 8), (2, 12, 8))
    cache = less.LessCache("h2o", 2, 2, WEIGHTS)
    cache.prefill(q[:, :6], k[:, :6], v[:, :6])
    for t in range(6, 12):
        assert_close(cache.step(q[:, t], k[:, t], v[:, t]), np.broadcast_to(v[0, 0], (4, 8)))


def test_grouped_query_heads() -> None:
    """Equal heads of a group, with equal query maps, answer alike."""
    twice = [0, 0, 2, 2]
    weights = replace(WEIGHTS, a1=WEIGHTS.a1[twice], a2=WEIGHTS.a2[twice])
    q, k, v = draw(0, 4, 12, 8)[twice], draw(1, 2, 12, 8), draw(2, 2, 12, 8)
    cache = less.LessCache("h2o", 2, 2, weights)
    cache.prefill(q[:, :6], k[:, :6], v[:, :6])
    for t in range(6, 12):
        out = cache.step(q[:, t], k[:, t], v[:, t])
        assert np.array_equal(out[0], out[1])
        assert np.array_equal(out[2], out[3])


def test_state_only_grows() -> None:
    """Its norm z is never negative and never falls."""
    q, k, v = draw(0, 4, 20, 8), draw(1, 2, 20, 8), draw(2, 2, 20, 8)
    cache, before = less.LessCache("h2o", 2, 2, WEIGHTS), np.zeros((2, 4))
    for t in range(20):
        cache.step(q[:, t], k[:, t], v[:, t])
        now = np.array([head.norm for head in cache.heads])
        assert np.all(now >= before)
        before = now
    assert before.min() > 0


def test_quantized_kept_tokens() -> None:
    """Exact in the window, coded behind it; psi takes the key that is stored."""
    quantizer = less.KeptQuantizer(2, 4)
    cache, _, (_, k, v) = run_less("h2o", WEIGHTS, quantizer=quantizer)
    for g, head in enumerate(cache.heads):
        assert head.coded == [True] * 3 + [False] * 2
        for i, position in enumerate(head.positions):
            expected = quantizer(k[g, position]) if head.coded[i] else k[g, position]
            assert np.array_equal(head.keys[i], expected)
        norm = np.zeros(4)
        for i, position in enumerate(head.evicted):
            # The prompt's evictions are the first 4. Step i - 4 evicts before it quantizes what
            # leaves the window of 2, which is token i + 3.
            exact = i < 4 or position == i + 3
            norm += WEIGHTS.psi(g, k[g, position] if exact else quantizer(k[g, position]))
        assert_close(head.norm, norm)
    whole = codes.dequantize(codes.quantize(v[:1, :1], "v", "token", 2, 4))
    assert np.array_equal(quantizer(v[0, 0]), whole[0, 0])


def test_less_bytes_by_hand() -> None:
    """Llama-2-7B at c = 204, R = 8, M = 512."""
    got = less.nbytes(32, 128, 204, 8, "h2o", n_kept=204)
    assert got["kept"] == 3_342_336 == 204 * 16_384
    assert got["state"] == 132_096
    assert less.nbytes(32, 128, 204, 8, "h2o", state_bytes=2)["state"] == 66_048
    assert got["positions"] == got["scores"] == 32 * 205 * 4
    assert less.nbytes(32, 128, 204, 8, "sink")["scores"] == 0
    assert less.nbytes(32, 128, 204, 8, "tova")["kept"] == 205 * 16_384
    assert f"{132_096 / 16_384:.2f} {66_048 / 16_384:.2f}" == "8.06 4.03"
    assert less_features.n_weights(32, 32, 128, 512, 8) == 4_459_008
    assert 32 * 4_459_008 == 142_688_256
    w = WEIGHTS
    sizes = sum(x.size for x in (w.a1, w.a2, w.b1, w.b2, w.b3, w.s1, w.s2))
    assert sizes == less_features.n_weights(4, 2, 8, 16, 4)
    assert less.kept_bytes_quantized(1, 128, 1, 1, 2, 64) == 2 * (256 + 32 + 8)
