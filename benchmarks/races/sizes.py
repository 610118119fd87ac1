"""What is raced: shapes of models, methods, and how large everything is on a GPU and in a dry run.

The most important cases come first: a race whose time is up leaves out the last ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA3_8B, LLAMA2_7B, LLAMA2_13B = "Llama-3-8B", "Llama-2-7B", "Llama-2-13B"

# the methods by the names of the rows
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("none", {}),
    "kivi 4 bits": ("kivi", {"bits": 4}),
    "kivi 2 bits": ("kivi", {"bits": 2}),
    "gear-l 4 bits": ("gear-l", {"bits": 4, "prefill_rank": 2, "rank": 2}),
    "gear-l 2 bits": ("gear-l", {"bits": 2, "prefill_rank": 4, "rank": 4}),
    "gear 2 bits": ("gear", {"bits": 2}),
    "gear2": ("gear2", {}),
}
LOW_RANK = ("gear-l 4 bits", "gear-l 2 bits")
KIVI = ("kivi 4 bits", "kivi 2 bits")
DENSE = ("dense",)
LIBRARY = ("transformers dynamic",)  # the library's own cache, which copies itself at every step
QUANTIZED = ("transformers quanto 4 bits", "transformers quanto 2 bits", "transformers hqq 4 bits")


@dataclass(frozen=True)
class Steps:
    """Decode steps behind n tokens, of the first batch and of smaller ones until dense fits."""

    model: str
    batches: tuple[int, ...]
    n: int
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """Generation of `new` tokens behind prompts of n."""

    model: str
    batch: int
    n: int
    new: int
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """All races."""

    models: dict[str, dict[str, int]]  # of LlamaConfig
    kernel: tuple[tuple[int, int], ...]  # batch and tokens, of the first model's heads
    steps: tuple[Steps, ...]
    growth: tuple[Steps, ...]
    flat: tuple[int, ...]  # tokens behind which LESS is timed
    budget: int  # tokens that LESS keeps
    hidden: int  # width of its kernels' features
    prompts: tuple[int, ...]  # tokens whose encoding is timed
    spikes: tuple[tuple[int, int], ...]  # batch and tokens behind which every step is timed
    unwatched: int  # steps before that: a block is encoded, and its kernels are compiled
    watched: int  # timed ones, with another block among them
    stream: tuple[int, int]  # tokens, and of a piece, whose peak memory is measured
    texts: tuple[Texts, ...]
    shared: Texts  # KVSharer's
    merged: int  # tokens whose bytes MiniCache is asked for


def _llama(
    width: int, inner: int, layers: int, heads: int, kv: int, vocab: int, n: int
) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": n,
        "head_dim": 128,
    }


K = 1024
GROWN = ("dense", *LOW_RANK)
FULL = Sizes(
    models={
        LLAMA3_8B: _llama(4096, 14336, 32, 32, 8, 128256, 8192),
        LLAMA2_7B: _llama(4096, 11008, 32, 32, 32, 32000, 4096),
        LLAMA2_13B: _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    },
    kernel=(
        (64, 8 * K), (16, 32 * K), (1, 64 * K), (1, 512 * K), (1, 8 * K), (16, 8 * K), (1, 128 * K),
    ),
    steps=(
        Steps(LLAMA3_8B, (64, 48, 32), 8 * K, ("dense", *LOW_RANK, *KIVI)),
        Steps(LLAMA3_8B, (1,), K, (*DENSE, *LOW_RANK, "kivi 4 bits", *LIBRARY)),
        Steps(LLAMA3_8B, (1,), 32 * K, (*DENSE, *LOW_RANK, *LIBRARY, *QUANTIZED)),
        Steps(LLAMA3_8B, (16, 12, 8), 32 * K, (*DENSE, *LOW_RANK)),
        Steps(LLAMA3_8B, (1,), 64 * K, (*DENSE, *LOW_RANK)),
        Steps(LLAMA3_8B, (16,), 8 * K, ("gear 2 bits", "gear2", *LIBRARY)),
        Steps(LLAMA2_7B, (16,), 4 * K, (*DENSE, *LOW_RANK)),
        Steps(LLAMA2_13B, (8,), 4 * K, (*DENSE, *LOW_RANK)),
    ),
    growth=tuple(Steps(LLAMA3_8B, (1,), n * K, GROWN) for n in (4, 256, 64, 16, 128)),
    flat=(4 * K, 128 * K, 32 * K),
    budget=410,  # 5 % of the model's 8k
    hidden=512,
    prompts=(8 * K, 32 * K),
    spikes=((16, 8 * K), (1, 8 * K)),
    unwatched=70,
    watched=70,
    stream=(32 * K, 2 * K),
    texts=(
        Texts(LLAMA3_8B, 16, 4 * K, 48, (*LIBRARY, *DENSE, *LOW_RANK)),
        Texts(LLAMA3_8B, 1, 32 * K, 48, (*DENSE, *LOW_RANK)),
        Texts(LLAMA2_7B, 18, 1000, 64, (*LIBRARY, *DENSE, *LOW_RANK)),
    ),
    shared=Texts(LLAMA2_13B, 4, 2 * K, 32, ()),
    merged=8 * K,
)  # fmt: skip
_TINY = _llama(64, 96, 4, 4, 2, 128, 256) | {"head_dim": 64}
DRY = Sizes(
    models=dict.fromkeys(FULL.models, _TINY),
    kernel=((2, 256),),
    steps=(Steps(LLAMA3_8B, (2,), 128, (*DENSE, *LOW_RANK, *LIBRARY, *QUANTIZED)),),
    growth=tuple(Steps(LLAMA3_8B, (1,), n, GROWN[:2]) for n in (64, 192)),
    flat=(128, 192),
    budget=12,
    hidden=16,
    prompts=(128,),
    spikes=((1, 64),),
    unwatched=62,
    watched=4,
    stream=(192, 64),
    texts=(Texts(LLAMA3_8B, 1, 100, 4, (*LIBRARY, *DENSE, "gear-l 2 bits")),),
    shared=Texts(LLAMA2_13B, 1, 64, 4, ()),
    merged=128,
)
