"""Where a transformers model and the store meet: the handle, the attention function, the hook.

`KVCLayer.update` returns a `Handle` in place of key and value tensors. The library carries it to
the attention function unread, and the function below lets the store answer. The name under which
that function is registered says which implementation it stands in for: `kvc_sdpa`, `kvc_eager`.
That one gets every call with plain tensors, every prompt that is still uncompressed, and builds
all masks, so that sliding layers, sinks and soft caps keep their own code.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    AttentionInterface,
    PreTrainedModel,
)

from kvc.errors import ConfigError
from kvc.store.batch import attend_rows

if TYPE_CHECKING:
    from kvc.store.store import KVStore

PREFIX = "kvc_"


class Handle:
    """Stands for the keys (or values) that a layer of the store holds; it is no tensor."""

    __slots__ = ("always_attend", "device", "dtype", "layer", "shape", "store")
    ndim = 4

    def __init__(self, store: "KVStore", layer: int, new: torch.Tensor, always_attend: bool):
        batch, n_heads, _, head_dim = new.shape
        self.store, self.layer, self.always_attend = store, layer, always_attend
        self.shape = torch.Size((batch, n_heads, store.length(layer), head_dim))
        self.dtype, self.device = new.dtype, new.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


class RowsHandle(Handle):
    """Stands for what a layer holds of rows that have a store each and bring one token each."""

    __slots__ = ("stores",)

    def __init__(self, stores: Sequence["KVStore"], layer: int, new: torch.Tensor) -> None:
        batch, n_heads, _, head_dim = new.shape
        self.stores, self.layer, self.always_attend = stores, layer, False
        columns = max(store.length(layer) for store in stores)
        self.shape = torch.Size((batch, n_heads, columns, head_dim))
        self.dtype, self.device = new.dtype, new.device


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    *args: Any,
    stands_for: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for handles; plain tensors go to the implementation this one stands for.

    Shapes: query [B, n_heads, L, head_dim]; returns [B, L, n_heads, head_dim].

    Raises:
        ConfigError: If a layer keeps all tokens in the cache but looks at a window of them only.
    """
    plain = _implementation(module, stands_for)
    if not isinstance(key, Handle):
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(key, RowsHandle):  # one query sees all of its row: there is nothing to mask

        def own(store: "KVStore", q: torch.Tensor) -> torch.Tensor:
            return _answer(plain, module, key, store, q, None, args, kwargs)[0].transpose(1, 2)

        out = attend_rows(key.stores, query, [1] * len(key.stores), own)
        return out.transpose(1, 2).contiguous(), None
    return _answer(plain, module, key, key.store, query, attention_mask, args, kwargs)


def _answer(
    plain: Callable[..., Any],
    module: nn.Module,
    key: Handle,
    store: "KVStore",
    query: torch.Tensor,
    attention_mask: Any,
    args: Any,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What one store answers, or `plain` over its tokens while they are as they came."""
    layer = key.layer
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    kv = None if key.always_attend else store.dense(layer)
    if kv is not None:
        out, weights = plain(module, query, *kv, attention_mask, *args, **kwargs)
        store.observe(layer, query, scale, softcap=softcap, sinks=sinks)
        return out, weights
    window = kwargs.get("sliding_window")
    if window is not None and (key.always_attend or store.length(layer) > window):
        raise ConfigError(
            f"kvc: a full-attention layer of the cache is read through a window of {window} "
            "tokens: this model's config and code disagree; use it without kvc"
        )
    out = store.attend(layer, query, scale, softcap, sinks)
    return out.transpose(1, 2).contiguous(), None


def _implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function `name` as the model's own source file would look it up."""
    for cls in type(module).__mro__:
        names = vars(sys.modules[cls.__module__])
        if "eager_attention_forward" in names:
            table = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
            return table.get_interface(name, names["eager_attention_forward"])
    return ALL_ATTENTION_FUNCTIONS[name]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that runs the text layers: `model` itself where it has no inner one."""
    inner = model.get_decoder()
    return inner if isinstance(inner, PreTrainedModel) else model


def install(model: PreTrainedModel) -> None:
    """Route the attention of the decoder to `attention`.

    Flash and flex attention read their own name back from the config and want masks of another
    kind: SDPA stands in for them, or the model's eager code where SDPA is not supported.
    """
    decoder = decoder_of(model)
    had = decoder.config._attn_implementation or "eager"
    if had.startswith(PREFIX):
        return
    keeps = had in ("eager", "sdpa")
    name = had if keeps else "sdpa" if decoder._supports_sdpa else "eager"
    AttentionInterface.register(PREFIX + name, partial(attention, stands_for=name))
    AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    decoder.set_attn_implementation(PREFIX + name)
    if decoder.config._attn_implementation != PREFIX + name:
        raise ConfigError("kvc: the model's attention cannot be set from outside")
    vars(decoder)["_kvc_had"] = had


def uninstall(model: PreTrainedModel) -> None:
    """Give the decoder back the attention that it had."""
    if is_installed(model):
        decoder = decoder_of(model)
        decoder.set_attn_implementation(vars(decoder).pop("_kvc_had"))


def is_installed(model: PreTrainedModel) -> bool:
    """Whether the decoder's attention comes to us."""
    return str(decoder_of(model).config._attn_implementation).startswith(PREFIX)


def supports_interface(model: PreTrainedModel) -> bool:
    """Whether the decoder's attention goes through the library's attention interface."""
    return bool(decoder_of(model)._can_set_attn_implementation())


def leading_pads(mask: torch.Tensor, past: int, n_new: int) -> list[int] | None:
    """How many of the new columns are left padding, per row; None if none are.

    Shapes: mask [B, past + n_new], 1 where there is a token.

    Raises:
        ConfigError: If padding stands anywhere but in front of a row's first token.
    """
    seen = mask[:, past : past + n_new].ne(0).cpu()
    pads = (~seen).cumprod(1).sum(1)
    if int((~seen).sum()) != int(pads.sum()):
        raise ConfigError(
            "kvc: the attention mask has padding after tokens; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return [int(n) for n in pads] if pads.any() else None
