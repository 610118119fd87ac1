"""Attention of other libraries over keys and values as they came, for one query in each row.

A peer is a function of q [B, Hq, 1, D] and k, v [B, H, T, D] that prepares whatever its library
would hold in place of them, and gives a function without arguments to be timed. Decode kernels
only: a prefill kernel with one query is no fair opponent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvc.measure.speed.clock import NotRaced

Run = Callable[[], torch.Tensor]
PAGE = 16  # tokens


def sdpa(
    backend: SDPBackend | None, packed: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Run:
    """PyTorch's own; packed, the query heads of a group are queries of one head.

    Raises:
        NotRaced: if the backend needs another device.
    """
    if backend is SDPBackend.CUDNN_ATTENTION and not q.is_cuda:
        raise NotRaced("cuDNN needs a GPU")
    B, Hq, L, D = q.shape
    H = k.shape[1]
    queries = q.reshape(B, H, Hq // H * L, D) if packed else q

    def run() -> torch.Tensor:
        return scaled_dot_product_attention(queries, k, v, enable_gqa=not packed).reshape(q.shape)

    def forced() -> torch.Tensor:
        with sdpa_kernel(backend):
            return run()

    return forced if backend else run


def flash_attention(module: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """The authors' FlashAttention 2 (`flash_attn`) or 3 (`flash_attn_interface`)."""
    attend = imported(module).flash_attn_with_kvcache
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))  # as it holds them
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    queries = q.transpose(1, 2).contiguous()
    return lambda: attend(queries, k, v, cache_seqlens=lengths).transpose(1, 2)


def flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """FlashInfer's decode over pages of 16 tokens, planned beforehand."""
    library = imported("flashinfer")
    (B, Hq, _, D), (_, H, T, _) = q.shape, k.shape
    n = T // PAGE
    if n * PAGE != T:
        raise NotRaced(f"{T} tokens are no whole pages of {PAGE}")
    pages = torch.stack([x.transpose(1, 2).reshape(B * n, PAGE, H, D) for x in (k, v)], 1)
    space = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    starts, every, last = (
        x.to(q.device, torch.int32)
        for x in (torch.arange(B + 1) * n, torch.arange(B * n), torch.full((B,), PAGE))
    )
    types = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    wrapper.plan(starts, every, last, Hq, H, D, PAGE, **types)
    queries = q[:, :, 0].contiguous()
    return lambda: wrapper.run(queries, pages)[:, :, None]


def imported(module: str) -> Any:
    """A library that need not be there.

    Raises:
        NotRaced: if it is not.
    """
    try:
        return __import__(module)
    except ImportError as why:
        raise NotRaced(f"{module} does not import ({why})") from None


PEERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Run]] = {
    "sdpa flash": partial(sdpa, SDPBackend.FLASH_ATTENTION, False),
    "sdpa flash, packed": partial(sdpa, SDPBackend.FLASH_ATTENTION, True),
    "sdpa cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION, False),
    "sdpa cudnn, packed": partial(sdpa, SDPBackend.CUDNN_ATTENTION, True),
    "sdpa, its own choice": partial(sdpa, None, False),
    "flashinfer": flashinfer,
    "flash-attn 3": partial(flash_attention, "flash_attn_interface"),
    "flash-attn 2": partial(flash_attention, "flash_attn"),
}
