"""The kernel of `attend_dense`: a running softmax over tiles of tokens, then over answers."""

from __future__ import annotations

import triton
import triton.language as tl

from kvc.cuda_kernels.softmax import finish, scores_of, take, take_sink, take_stack


@triton.jit(do_not_specialize=["n", "span"])
def attend_dense_kernel(
    q, k, v, valid, length, outs, lses, counts, sinks, out, lse,
    q_b, q_h, q_l, k_b, k_h, k_t, v_b, v_h, v_t, valid_b, valid_h, valid_t,
    n, span, H, scale, softcap,
    G: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, PAIRS: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """A program has `span` tokens of a head of K and V, and up to ROWS of the rows that share them.

    q [B, H G, L, D]; k, v [B, H, n, D]; valid [B, H, n]: strides as named, D contiguous. With
    `length` [1] there are so many tokens, and n is room for more. outs and lses as in `take_stack`,
    counts 2 n + 1 of each; sinks [H G]; out [splits, B, H G, L, D] and lse [splits, B, H G, L],
    contiguous. DP is D or the next power of two.
    """
    share: tl.constexpr = G * L  # rows of a head, by query head and query
    tiles: tl.constexpr = (share + ROWS - 1) // ROWS
    head = tl.program_id(0) // tiles  # of all batch rows
    first = tl.program_id(0) % tiles * ROWS
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    every = tl.num_programs(0) // tiles * share
    row = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    group, query = (first + row) // L, (first + row) % L
    mine = (first + row < share)[:, None] & (d < D)[None, :]

    q += b * q_b + h * G * q_h
    queries = tl.load(
        q + (group * q_h + query * q_l)[:, None] + d[None, :], mask=mine, other=0.0
    ).to(PRODUCT)
    if length is not None:
        n = tl.load(length)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, n)
    k += b * k_b + h * k_h + begin.to(tl.int64) * k_t
    v += b * v_b + h * v_h + begin.to(tl.int64) * v_t
    if valid is not None:
        valid += b * valid_b + h * valid_h + begin.to(tl.int64) * valid_t
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, DP], tl.float32)
    for start in tl.range(begin, stop, TILE):
        there = start + t < stop
        inside = there[:, None] & (d < D)[None, :]
        key = tl.load(k + t[:, None] * k_t + d[None, :], mask=inside, other=0.0).to(PRODUCT)
        products = tl.dot(queries, tl.trans(key), input_precision="ieee")
        seen = there[None, :]
        if valid is not None:
            seen = seen & tl.load(valid + t * valid_t, mask=there, other=0).to(tl.int1)[None, :]
            valid += TILE * valid_t
        if CAUSAL:
            seen = seen & ((start + t)[None, :] <= n - L + query[:, None])
        scores = tl.where(seen, scores_of(products, scale, softcap, SOFTCAP), float("-inf"))
        top, total, factor, p = take(top, total, scores)
        value = tl.load(v + t[:, None] * v_t + d[None, :], mask=inside, other=0.0).to(PRODUCT)
        weighted = tl.dot(p.to(PRODUCT), value, weighted * factor[:, None], input_precision="ieee")
        k += TILE * k_t
        v += TILE * v_t

    for i in tl.static_range(len(outs)):
        top, total, weighted = take_stack(
            top, total, weighted, outs[i], lses[i], counts[i] // 2, every, head * share + first,
            tl.minimum(share - first, ROWS), row, d, D, PAIRS,
        )  # fmt: skip
    if sinks is not None:
        logit = tl.load(sinks + h * G + group, mask=first + row < share, other=0.0)
        top, total, weighted = take_sink(top, total, weighted, logit.to(tl.float32))
    answer, own_lse = finish(top, total, weighted)
    at = tl.program_id(1).to(tl.int64) * every + head * share + first + row
    tl.store(out + at[:, None] * D + d[None, :], answer.to(out.dtype.element_ty), mask=mine)
    tl.store(lse + at, own_lse, mask=first + row < share)
