"""Families of mlx-lm's models, made small, and greedy runs of them."""

import importlib
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.utils import MODEL_REMAPPING

from kvc.backends.mlx.cache import make_cache as make_cache
from kvc.backends.mlx.cache import model_fit as model_fit
from kvc.backends.mlx.entry import KVCEntry
from kvc.store.store import KVStore
from tests.families import N_NEW, N_PROMPT, PIECE, Run

# What ModelArgs of the families below ask for; each takes what it knows.
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": False,  # or the last token is likely to come again
    "attention_bias": False,
    "mlp_bias": False,
    "use_qkv_bias": False,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "rotary_dim": 8,
    "logit_scale": 0.1,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "n_ctx": 512,
    "n_inner": 96,
    "num_layers": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "norm_eps": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_multiple_of": 16,
    "block_ff_dim": 64,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "intermediate_size_mlp": 64,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 0, 1, 0],
    "use_qk_norm": True,
    "global_head_dim": 16,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 160,
}
SECOND = ["sliding_attention", "full_attention"] * 2
# Families by how they take our cache, and what their configs say beyond that.
HANDLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mistral3": {"text_config": {**CONFIG, "model_type": "llama"}},
    "mixtral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {},
    "qwen3_5": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2, "rope_scaling": None},
    "gemma": {"head_dim": 32},
    "gemma3_text": {},
    "gemma4_text": {"layer_types": SECOND},
    "phi": {},
    "phi3": {},
    "olmo2": {"num_attention_heads": 8},
    "olmo3": {"layer_types": SECOND},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"num_attention_heads": 2},
    "gpt_oss": {},
    "gptj": {},
    "cohere": {},
    "cohere2": {},
    "starcoder2": {"num_attention_heads": 8},
    "granite": {},
    "glm": {},
    "glm4": {},
    "smollm3": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": None},
    "llama4_text": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
}
DENSE: dict[str, dict[str, Any]] = {"gemma2": {}, "stablelm": {}, "plamo2": {}}
# Those of which some layers keep the library's own entries.
HYBRID = (
    "qwen3_5", "qwen3_next", "gemma3_text", "gemma4_text", "olmo3", "gpt_oss", "cohere2", "exaone4",
    "lfm2", "plamo2",
)  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "glm4_moe_lite": {},
    "falcon_h1": {},
    "mamba": {"state_size": 8, "conv_kernel": 4, "time_step_rank": 4},
}


def tiny(family: str, **changes: Any) -> Any:
    """A model with random weights that are large enough to make distinct tokens likely."""
    config = {**CONFIG, "model_type": family, **{**HANDLE, **DENSE, **REFUSED}[family], **changes}
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.eval()
    noise = tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters())
    model.update(noise)
    mx.eval(model.parameters())
    return model


def ids(n: int) -> Any:
    return mx.array([(i * 37 + 5) % 160 for i in range(n)])


def generate(
    model: Any, cache: Any = None, n: int = 10, prompt: Any = None, step: int = 16
) -> tuple[list[int], Any]:
    """Greedy tokens, and the logprobs of each."""
    prompt = ids(40) if prompt is None else prompt
    options = {"prompt_cache": cache, "prefill_step_size": step}
    steps = list(generate_step(prompt, model, max_tokens=n, **options))
    return [int(token) for token, _ in steps], mx.stack([logprobs for _, logprobs in steps])


def run(model: Any, cache: Any = None, prefill: str = "exact") -> Run:
    """One row; its prompt comes in pieces, as mlx-lm always sends it."""
    tokens, logprobs = generate(model, cache, N_NEW, ids(N_PROMPT), PIECE)
    return Run([tokens], np.array(logprobs)[None])


@cache
def model(family: str) -> Any:
    return tiny(family)


@cache
def plain(family: str) -> Run:
    return run(model(family))


def store(cache: list[Any]) -> KVStore:
    found: KVStore = next(entry.store for entry in cache if isinstance(entry, KVCEntry))
    return found
