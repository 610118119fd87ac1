"""What `attend_coded` is told of K or of V: sizes, and arrays by the names in the shader."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from kvc.metal_kernels.kernel import DTYPES
from kvc.ops.codec import Code, Spec
from kvc.ops.past import Layout
from kvc.ops.quant import Role
from kvc.ops.scales import Dual

BY_CHANNEL, TOKEN_SCALES, BY_TOKEN, ONE_GROUP = range(4)  # how codes lie, as in coded.metal
SIDE_BY_SIDE = 8  # elements that a lane reads at a time
PIECE = 32  # tokens that a simdgroup takes at a time; no piece has tokens of two blocks
TILE = 128  # tokens that a threadgroup takes at a time
RANK = 16
GROUPS = 8


@dataclass(frozen=True)
class Side:
    """K or V of one run of blocks; uncoded vectors are one block, of 0 bits."""

    inputs: dict[str, mx.array]
    sizes: tuple[int, ...]  # in the order of `Side` in coded.metal
    heads: int
    n: int  # tokens of a block
    blocks: int
    layout: Layout
    bits: int = 0
    kind: int = BY_TOKEN
    groups: int = 0  # of channels, with scales for each token that all simdgroups need
    whole: bool = False  # whether a tile has one mu and c for each channel
    rank: int = 0
    rotated: bool = False
    dtype: mx.Dtype = mx.float32  # of uncoded vectors

    @property
    def buffers(self) -> int:
        """Buffers of Metal: the arrays, and the strides of those that are views."""
        return len(self.inputs) + sum(name[2:] in ("plain", "norm") for name in self.inputs)


def why_not(layout: Layout, role: Role) -> str | None:
    """Why K or V cannot be read as they lie, or None."""
    if layout.dense is not None:
        if layout.dense.dtype not in DTYPES:
            return f"takes float16, bfloat16 or float32 tokens, not {layout.dense.dtype}"
        return None
    (run,) = layout.runs
    spec, code = run.spec, run.code
    share, width, by_token = _share(spec), _width(spec), spec.role == "v"
    if role == "k" and by_token and (spec.scales or code.l or code.s):
        return "takes keys that lie by token without two-sided scales, low rank and outliers"
    if spec.rotate and layout.index is not None:
        return "takes no retained vectors where others are rotated"
    if by_token and width % SIDE_BY_SIDE:
        return f"takes groups of a multiple of {SIDE_BY_SIDE} channels, not {width}"
    if _groups(spec) > GROUPS:
        return f"takes up to {GROUPS} groups of channels in keys, not {_groups(spec)}"
    least = PIECE if by_token else SIDE_BY_SIDE
    if share % least and share < spec.n:
        return f"takes {role} in groups of a multiple of {least} tokens, not {share}"
    if code.l is not None and code.l.a.shape[-1] > RANK:
        return f"takes a rank of up to {RANK}, not {code.l.a.shape[-1]}"
    return None


def side(layout: Layout, role: Role) -> Side:
    """Arrays and sizes of K or V that `why_not` has nothing against."""
    inputs: dict[str, mx.array] = {}
    norms = vectors = retained = 1
    dense = layout.dense
    shape = layout.runs[0].code.d.codes.shape[1:] if dense is None else dense.shape
    heads, head_dim = shape[1], layout.runs[0].spec.head_dim if dense is None else shape[3]
    if layout.norm is not None:
        norm = layout.norm
        inputs[f"{role}_norm"] = norm if norm.size >= 8 else mx.tile(norm, (1, 1, 8))
        norms = layout.norm.shape[1]
    if layout.index is not None and layout.exact is not None:
        retained = layout.index.shape[1]
        vectors = heads if layout.exact.shape[2] == head_dim else 1
        inputs[f"{role}_retained"] = _whole(layout.index)
        inputs[f"{role}_exact"] = _whole(layout.exact)
    exact = (norms, vectors, retained)
    if dense is not None:
        inputs[f"{role}_plain"] = dense
        return Side(inputs, (1, 1, 1, 0, *exact), heads, shape[2], 1, layout, dtype=dense.dtype)
    (run,) = layout.runs
    spec, code = run.spec, run.code
    inputs |= {name: _whole(x) for name, x in _arrays(code, role).items() if x is not None}
    of_all = spec.backbone == "kcvt" and not spec.scales  # heads have one step and low together
    outliers = code.s.index.shape[-1] if code.s else 0
    return Side(
        inputs,
        (_share(spec), _width(spec), 1 if of_all else heads, outliers, *exact),
        heads,
        spec.n,
        run.n,
        layout,
        bits=spec.bits,
        kind=ONE_GROUP if _one_group(spec, run.n) else _kind(spec),
        groups=_groups(spec),
        whole=bool(spec.scales) and _share(spec) % TILE == 0,
        rank=code.l.a.shape[-1] if code.l else 0,
        rotated=bool(spec.rotate),
    )


def _arrays(code: Code, role: Role) -> dict[str, mx.array | None]:
    d, l, s = code
    names = {role: d.codes, f"{role}_step": d.step, f"{role}_low": d.low}
    if isinstance(d, Dual):
        names |= {f"{role}_mu": d.mu, f"{role}_c": d.c, f"{role}_r": d.r}
    if l is not None:
        names |= {f"{role}_a": l.a, f"{role}_b": l.c}
    if s is not None:
        names |= {f"{role}_index": s.index, f"{role}_delta": s.delta}
    return names


def _share(spec: Spec) -> int:
    """Tokens that have one step and low, or one mu and c, in each channel."""
    if spec.scales:
        return min(spec.tile, spec.n)
    return spec.group_size if spec.backbone == "kivi" and spec.role == "k" else spec.n


def _width(spec: Spec) -> int:
    """Channels that have one step and low in each token."""
    grouped = spec.backbone != "kcvt" and not spec.scales
    return spec.group_size if grouped and _kind(spec) != BY_CHANNEL else spec.head_dim


def _kind(spec: Spec) -> int:
    if spec.role == "v":
        return BY_TOKEN
    return TOKEN_SCALES if spec.backbone == "token" and not spec.scales else BY_CHANNEL


def _one_group(spec: Spec, blocks: int) -> bool:
    """Whether all tiles of a run have the same scales of channels."""
    kcvt = spec.backbone == "kcvt" and not spec.scales
    return kcvt and _kind(spec) == BY_CHANNEL and blocks == 1 and spec.n > TILE


def _groups(spec: Spec) -> int:
    if _kind(spec) == BY_TOKEN:
        return 0
    if spec.scales:
        return 1
    return spec.head_dim // spec.group_size if _kind(spec) == TOKEN_SCALES else 0


def _whole(x: mx.array) -> mx.array:
    """An array in order, of eight elements or more, however short it is: as `_full`."""
    return _full(mx.contiguous(x))


def _full(x: mx.array) -> mx.array:
    """An array that a kernel gets as a device pointer however short it is: copies without bytes."""
    return x if x.size >= 8 else mx.broadcast_to(x, (8, *x.shape))
