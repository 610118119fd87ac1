"""The segments of a cache: tokens as they came, and coded blocks.

Rows of one `Tokens` are of one length; the store keeps rows behind different paddings apart, so
that padding can change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvc.backends.base import Array, ops_of
from kvc.errors import KVCError
from kvc.methods.gear import Gear
from kvc.ops.attention import Partial, attend_dense, join
from kvc.ops.codec import Code, Spec, attend_coded, decode, encode
from kvc.ops.quant import Quantized, Role
from kvc.ops.residual import LowRank, Outliers

GROWTH = 64  # tokens by which a window's buffers grow

Block = tuple[Code, Spec, Code, Spec]  # K and how it was coded, V and how it was coded


@dataclass(slots=True)
class Window:
    """Tokens as they came: the first `n` of buffers [B, H, capacity, D]."""

    k: Array
    v: Array
    n: int

    def append(self, k: Array, v: Array) -> None:
        """Adds tokens [B, H, L, D] behind the others; the buffers grow where they are full."""
        xp = ops_of(k)
        end = self.n + k.shape[2]
        missing = end - self.k.shape[2]
        if missing > 0:
            more = max(missing, GROWTH, self.n // 8)
            shape = (*k.shape[:2], more, k.shape[3])
            room = xp.zeros(shape, k.dtype, k)
            self.k, self.v = xp.concat([self.k, room], 2), xp.concat([self.v, room], 2)
        self.k, self.v = xp.write(self.k, self.n, k, 2), xp.write(self.v, self.n, v, 2)
        self.n = end

    def tokens(self, start: int = 0, stop: int | None = None) -> tuple[Array, Array]:
        """K and V of some of the tokens, views."""
        stop = self.n if stop is None else stop
        return self.k[:, :, start:stop], self.v[:, :, start:stop]

    def rows(self, rows: Sequence[int], start: int = 0) -> Window:
        """Some of the rows, from a token on."""
        xp = ops_of(self.k)
        k, v = self.tokens(start)
        return Window(xp.take(k, rows, 0), xp.take(v, rows, 0), self.n - start)


@dataclass(slots=True)
class Tokens:
    """The cache of rows of one length: sinks, coded blocks, and a window of the newest tokens."""

    window: Window
    sink: Window | None = None
    blocks: list[Block] = field(default_factory=list)

    def settle(self, codec: Gear, layer: int, prompt: bool) -> None:
        """Codes the tokens that are due: whole buffers older than the codec's window.

        A prompt's are coded as one block with the prompt's rank, later ones a buffer at a time.

        Raises:
            KVCError: if K or V hold NaN or infinity, naming the layer.
        """
        sink = 0 if self.sink else codec.sink
        due = (self.window.n - sink - codec.window) // codec.buffer * codec.buffer
        if due <= 0:
            return
        if sink:
            self.sink = self._copy(0, sink)
        size, rank = (due, codec.prefill_rank) if prompt else (codec.buffer, codec.rank)
        for start in range(sink, sink + due, size):
            k, v = self.window.tokens(start, start + size)
            self.blocks.append((*self._code(k, "k", codec, layer, rank),
                                *self._code(v, "v", codec, layer, rank)))  # fmt: skip
        self.window = self._copy(sink + due, self.window.n)

    def _copy(self, start: int, stop: int) -> Window:
        k, v = self.window.tokens(start, stop)
        xp = ops_of(k)
        return Window(xp.copy(k), xp.copy(v), stop - start)  # a view would hold the whole buffer

    def _code(self, x: Array, role: Role, codec: Gear, layer: int, rank: int) -> tuple[Code, Spec]:
        xp = ops_of(x)
        if not bool(xp.all(xp.isfinite(x))):
            raise KVCError(f"layer {layer}: expected finite numbers in {role}, got NaN or infinity")
        spec = Spec(
            role, codec.bits_of(role), codec.backbone, codec.group_size, x.shape[2], x.shape[3]
        )
        seed = (codec.seed, layer, len(self.blocks))
        code = encode(x, spec, rank=rank, outliers=codec.outliers, n_iter=codec.n_iter, seed=seed)
        return code, spec

    def attend(self, q: Array, scale: float, softcap: float | None) -> Partial:
        """The answer of all segments; the newest L tokens are the queries' own."""
        parts = [attend_dense(q, *self.window.tokens(), scale, causal=True, softcap=softcap)]
        if self.sink:
            parts.append(attend_dense(q, *self.sink.tokens(), scale, softcap=softcap))
        if self.blocks:
            parts.append(attend_coded(q, self.blocks, scale, softcap=softcap))
        return join(parts)

    def read(self) -> tuple[Array, Array]:
        """K and V [B, H, T, D] as the attention sees them, in the dtype that came."""
        xp = ops_of(self.window.k)
        dtype = self.window.k.dtype
        ks, vs = ([self.sink.k], [self.sink.v]) if self.sink else ([], [])
        for k, k_spec, v, v_spec in self.blocks:
            ks.append(xp.astype(decode(k, k_spec), dtype))
            vs.append(xp.astype(decode(v, v_spec), dtype))
        k, v = self.window.tokens()
        return xp.concat([*ks, k], 2), xp.concat([*vs, v], 2)

    def rows(self, rows: Sequence[int]) -> Tokens:
        """Some of the rows, which may repeat."""

        def take(x: Array) -> Array:
            return ops_of(x).take(x, rows, 0)

        def picked(code: Code) -> Code:
            low, exact = code.l, code.s
            return Code(
                Quantized(*map(take, code.d)),
                LowRank(*map(take, low)) if low else None,
                Outliers(*map(take, exact)) if exact else None,
            )

        return replace(
            self,
            window=self.window.rows(rows),
            sink=self.sink and self.sink.rows(rows),
            blocks=[(picked(k), ks, picked(v), vs) for k, ks, v, vs in self.blocks],
        )

    def parts(self) -> Iterator[tuple[str, Array]]:
        """Every array that is held, with the name of the part that its bytes count for."""
        for window in filter(None, (self.window, self.sink)):
            yield from (("window", window.k), ("window", window.v))
        for k, _, v, _ in self.blocks:
            for code in (k, v):
                yield from (("codes", code.d.codes), ("scales", code.d.step))
                yield "scales", code.d.low
                yield from (("low rank", x) for x in code.l or ())
                yield from (("outliers", x) for x in code.s or ())
