"""Families of transformers' models, made small, and greedy runs of them."""

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kvc.backends.torch import cache as adapter
from kvc.backends.torch.entry import KVCCache
from kvc.store.store import KVStore
from tests.families import N_NEW, N_PROMPT, PIECE, Run

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # or the last token is likely to come again, whatever is cached
}
WINDOW = {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4}
PATTERN = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 257}
# Families by how they take our cache, and what their configs say beyond the sizes.
HANDLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **EXPERTS},
    "qwen3_next": {
        "head_dim": 16, "num_hidden_layers": 4, "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "shared_expert_intermediate_size": 32, **EXPERTS, **LINEAR,
    },
    "gemma": {"head_dim": 32},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gemma3_text": {**PATTERN, "query_pre_attn_scalar": 16},
    "gemma3n_text": {**PATTERN, **PER_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 4},
    "gemma4_text": {
        **WINDOW, **PER_LAYER, "num_kv_shared_layers": 2, "global_head_dim": 16,
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "phi": {},
    "phi3": {},
    "olmo2": {"num_attention_heads": 8},
    "olmo3": PATTERN,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": {"num_attention_heads": 2},
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2": PATTERN,
    "starcoder2": {"num_attention_heads": 8},
    "stablelm": {},
    "granite": {},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "smollm3": {},
    "nemotron": {},
    "exaone4": PATTERN,
    "ernie4_5": {},
    "llama4_text": {
        "head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 2,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "intermediate_size_mlp": 64, "attention_chunk_size": 8,
    },
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "gptj": {**GPT2, "rotary_dim": 8},
    "falcon": {},
    "bloom": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
}
REFUSED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**EXPERTS, **LATENT},
    "mistral with windows": {"model_type": "mistral", "sliding_window": 8},
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"state_size": 8},
}


def tiny(family: str, **options: Any) -> Any:
    """A causal model with random weights that are large enough to make distinct tokens likely."""
    options = {**SIZES, **{**HANDLE, **DENSE, **REFUSED}[family], **options}
    implementation = options.pop("attn_implementation", None)
    config = CONFIG_MAPPING[options.pop("model_type", family)](**options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.generation_config.eos_token_id = None
    return model


def padded_batch(n_pads: int = 7, n_tokens: int = N_PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, the first one padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(3, 250, (2, n_tokens))
    mask = torch.ones_like(ids)
    mask[0, :n_pads] = 0
    ids[0, :n_pads] = 0
    return ids, mask


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, n: int = 12, **options: Any
) -> Any:
    # mpt would take no cache by itself, and what it computes then is something else
    options = {"max_new_tokens": n, "do_sample": False, "use_cache": True, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **options)


def run(model: Any, cache: KVCCache | None = None, prefill: str = "exact") -> Run:
    """Two rows, one of them padded; a streamed prompt comes in pieces."""
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    if prefill == "stream":
        options["prefill_chunk_size"] = PIECE
    if cache is not None:
        options["past_key_values"] = cache
    found = generate(model, *padded_batch(), N_NEW, **options)
    return Run(found.sequences[:, N_PROMPT:].tolist(), torch.stack(found.logits, 1).numpy())


@cache
def model(family: str) -> Any:
    return tiny(family)


@cache
def plain(family: str) -> Run:
    return run(model(family))


make_cache, model_fit = adapter.make_cache, adapter.model_fit


def store(cache: KVCCache) -> KVStore:
    return cache.store
