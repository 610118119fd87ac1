"""Faults that reference implementations of the methods have, each shown to be absent here.

Here are those that no other test shows. The others:

GEAR: nothing is packed, test_store_holds_what_it_says; the prompt stays uncompressed,
test_a_prompt_is_compressed_when_the_next_piece_comes; outliers of keys are counted over all heads
and channels, test_outlier_counts_are_decimal and test_bytes_equal_the_formula; too few levels at
8 bits, test_a_block_equals_the_loops; the correction of keys raises the error,
test_each_part_lowers_the_error; rows behind the first get its basis,
test_rows_and_padding_change_nothing; constant groups, test_constant_groups.

KVSharer: owners lose their history in decoding, test_decoding_is_prefilling; sharers compute what
they discard, test_gates_skip_projections_and_open_again; sentences are left out of the mean,
test_means_are_the_oracles; chains, test_chains_are_followed.

LESS: nothing is freed, test_bytes_are_the_formula_and_constant; floors make it inexact,
test_a_large_budget_is_exact; one recent token too many,
test_tokens_are_conserved_and_the_state_is_their_sum; no recent tokens,
test_steps_equal_the_loops; evicted tokens return, test_every_token_goes_once_and_after_its_time;
grouped heads, test_grouped_query_heads; padding, test_pads_that_leave_the_window_go_first; sums in
half precision, test_half_precision_is_folded_in_single.

MiniCache: the wrong half is retained, test_gamma_one_retains_all_and_antipodal_is_always_retained;
directions of parallel vectors, test_angles_and_slerp_at_both_ends; one layer stays as it was,
test_retention_of_all_is_exact; angles in half precision, test_half_precision_is_merged_in_single;
equal angles, test_equal_angles; ragged sets, test_trim_and_reorder.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kvc.calibrate.kvsharer.distances import Mean
from kvc.methods import Method, parse
from kvc.ops.merge import retained
from kvc.store.store import KVStore
from tests.conftest import need
from tests.tolerances import TOLERANCES

H, D, BUFFER = 2, 64, 16
CODED = {"group_size": BUFFER, "buffer": BUFFER}


def tokens(n: int, dtype: str = "float32", seed: int = 0) -> tuple[Any, Any]:
    k, v = np.random.default_rng(seed).standard_normal((2, 1, H, n, D))
    return k.astype(dtype), v.astype(dtype)


def filled(method: Method, k: Any, v: Any, prompt: int, xp: ModuleType) -> KVStore:
    """A store of one layer: a prompt, then single tokens."""
    store = KVStore(method, 1)
    steps = [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, k.shape[2]))]
    for t in steps:
        new = [xp.from_numpy(np.ascontiguousarray(x[:, :, t])) for x in (k, v)]
        store.append(0, *new)
    return store


def test_the_others_are_where_they_are_said_to_be() -> None:
    named = set(re.findall(r"test_\w+", __doc__ or ""))
    sources = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")
    )
    assert len(named) > 20
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_gear_codes_a_block_once(xp: ModuleType) -> None:
    """The reference codes the whole past again and again, on top of what is lost already."""
    k, v = tokens(10 * BUFFER)
    method = parse("gear-l", CODED)
    early, late = (
        [xp.to_numpy(x)[:, :, : 2 * BUFFER] for x in filled(method, k[:, :, :n], v[:, :, :n],
                                                            2 * BUFFER, xp).read(0)]
        for n in (2 * BUFFER + 1, 10 * BUFFER)
    )  # fmt: skip
    for a, b, exact in zip(early, late, (k, v), strict=True):
        np.testing.assert_array_equal(a, b)
        assert abs(a - exact[:, :, : 2 * BUFFER]).max() > 0.1


def test_gear_fits_prompts_with_their_own_rank(xp: ModuleType) -> None:
    """In the reference the rank of the prompt is dead code: that of decoding is always taken."""
    k, v = tokens(3 * BUFFER + 1)
    full = {**CODED, "prefill_rank": D, "rank": 0}  # at full rank nothing is lost
    got = filled(parse("gear-l", full), k, v, 2 * BUFFER, xp).read(0)
    for x, exact in zip(map(xp.to_numpy, got), (k, v), strict=True):
        off = abs(x - exact).max((0, 1, 3))
        assert off[: 2 * BUFFER].max() < 1e-3 < 0.1 < off[2 * BUFFER : 3 * BUFFER].min()


@pytest.mark.parametrize("prompt", [BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 5])
def test_gear_codes_keys_and_values_together(xp: ModuleType, prompt: int) -> None:
    """Prompts of just one buffer leave the reference's values uncompressed for good.

    And prompts that groups do not divide are an error there, or leave a part unquantized.
    """
    k, v = tokens(prompt + 2 * BUFFER + 1)
    for n in (prompt + 1, prompt + 2 * BUFFER + 1):
        got = filled(parse("kivi", CODED), k[:, :, :n], v[:, :, :n], prompt, xp).read(0)
        coded = (n - 1) // BUFFER * BUFFER
        for x, exact in zip(map(xp.to_numpy, got), (k, v), strict=True):
            off = abs(x - exact[:, :, :n]).max((0, 1, 3))
            assert (off[:coded] > 0.01).all()
            assert (off[coded:] == 0).all()


@pytest.mark.parametrize("backbone", ["kivi", "kcvt", "token"])
def test_gear_takes_the_range_of_half_precision(xp: ModuleType, backbone: str) -> None:
    """The largest less the least number overflows half precision in the reference."""
    k, v = (30000 * np.sign(x) for x in tokens(BUFFER + 1, "float16"))
    method = parse("kcvt", {**CODED, "backbone": backbone})
    got = filled(method, k, v, BUFFER, xp).read(0)
    for x, exact in zip(map(xp.to_numpy, got), (k, v), strict=True):
        assert np.isfinite(x).all()
        assert abs(x.astype("f8") - exact).max() <= 60000 / 15 / 2


def test_h2o_sums_in_single_precision(xp: ModuleType) -> None:
    """Sums over thousands of queries lose small terms in half precision, and tie."""
    k, v = tokens(40, "float16")
    store = KVStore(parse("h2o", {"heavy": 4, "recent": 4}), 1)
    for t in (slice(0, 39), slice(39, 40)):
        x = [xp.from_numpy(np.ascontiguousarray(x[:, :, t])) for x in (k, v)]
        store.append(0, *x)
        if store.dense(0) is not None:
            store.observe(0, x[0], D**-0.5)
    parts = {name: x for slot in store._slots for _, (name, x, _) in slot.parts()}
    assert xp.dtype_name(parts["scores"]) == "float32"
    assert xp.dtype_name(parts["kept"]) == "float16"


def test_means_over_sentences_do_not_overflow(xp: ModuleType) -> None:
    """The sum of 30 sentences' keys overflows half precision where channels are massive."""
    mean, (k, v) = Mean(), tokens(3, "float16")
    for _ in range(30):
        store = KVStore(Method(), 1)
        store.append(0, xp.from_numpy(0 * k + 30000), xp.from_numpy(v))
        mean.add(store, (0,))
    found = mean.states()[0]
    np.testing.assert_array_equal(found.k, 30000)
    np.testing.assert_allclose(found.v, v[0], *TOLERANCES["float32"])


def test_minicache_takes_the_norms_of_massive_vectors(xp: ModuleType) -> None:
    """Squares of half-precision numbers above 255 overflow, long before the norm does."""
    k, v = (3000 * x for x in tokens(9, "float16"))
    store = KVStore(parse("minicache", {"start": 0, "gamma": 0, "always_keep": 0}), 2)
    for t in (slice(0, 8), slice(8, 9)):
        for layer in (0, 1):
            x = [xp.from_numpy(np.ascontiguousarray(x[:, :, t])) for x in (k, v)]
            store.append(layer, *x)
    for layer in (0, 1):  # equal layers are restored, up to rounding
        for x, exact in zip(map(xp.to_numpy, store.read(layer)), (k, v), strict=True):
            np.testing.assert_allclose(x.astype("f8"), exact, rtol=3e-3, atol=3000 * 3e-3)


def test_one_outlier_need_not_decide_what_minicache_retains(xp: ModuleType) -> None:
    """The angle rule goes by the widest angle, such as a first token's; `ratio` counts."""
    plain = np.random.default_rng(0).uniform(0.2, 0.5, (1, 1, 100))
    outlier = np.concatenate([[[[2.2]]], plain[..., 1:]], -1)
    kept = {
        (rule, name): int(xp.to_numpy(retained(xp.from_numpy(angle), rule, 0.05)).sum())
        for rule in ("angle", "ratio")
        for name, angle in (("plain", plain), ("outlier", outlier))
    }
    assert kept["angle", "outlier"] == 1
    assert kept["angle", "plain"] > 2
    assert kept["ratio", "outlier"] == kept["ratio", "plain"] == 5


def test_sharers_read_their_owners_in_eager_attention() -> None:
    """The reference's cache fails there for owners above the number of stored layers."""
    need("torch")
    need("transformers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import kvc

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    torch.manual_seed(0)
    weights = LlamaForCausalLM(LlamaConfig(**sizes)).state_dict()
    ids, found = torch.arange(3, 15)[None], []
    for attention in ("eager", "sdpa"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation=attention)).eval()
        model.load_state_dict(weights)
        cache = kvc.make_cache(model, "kvsharer", map="2:0,3:1")  # layers 4 and 5 own theirs
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
        found.append(torch.cat(steps, 1).numpy())
    np.testing.assert_allclose(*found, *TOLERANCES["float32"])
    assert cache.get_seq_length() == 12
