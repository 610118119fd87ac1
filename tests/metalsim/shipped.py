"""The Metal kernels that MLX ships, run on given arrays: an outside test of the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from tests.metalsim.build import KERNELS, Source, build, flat
from tests.metalsim.launch import Buffer, launch
from tests.metalsim.patch import view

TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}


@dataclass
class Shipped:
    """One kernel of MLX with its arguments; `run` computes its output.

    Inputs are arrays of MLX, or of numpy for the constant ones, by buffer index.
    """

    headers: Sequence[str]  # under KERNELS
    kernel: str
    template: str
    inputs: Mapping[int, mx.array | np.ndarray]
    output: tuple[int, tuple[int, ...], mx.Dtype]  # buffer index, shape, dtype
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    constants: Mapping[int, object] = field(default_factory=dict)  # function constants
    strict: bool = True

    def text(self) -> str:
        """The kernel's source with all it includes."""
        return flat("".join(f'#include "{KERNELS}{name}"\n' for name in self.headers))

    def run(
        self, mode: str = "check", text: str | None = None, order: str = "shuffled"
    ) -> mx.array:
        """The output; `text` replaces the source."""
        call = f"{self.kernel}<{self.template}>"
        source = Source(self.kernel, text or self.text(), self.kernel, call)
        binary = build(source, mode, self.constants, self.strict)
        names = {p.index: p.name for p in binary.parameters if p.kind != "attribute"}
        at, shape, dtype = self.output
        buffers = []
        for i in range(max(names) + 1):
            x = self.inputs.get(i, np.zeros(0, np.uint8))
            data = np.ascontiguousarray(view(x) if isinstance(x, mx.array) else x)
            buffer = Buffer(names.get(i, "unused"), data.reshape(-1).view(np.uint8))
            buffer.element = data.itemsize
            buffer.space = "device" if isinstance(x, mx.array) else "constant"
            if i == at:
                size = int(np.prod(shape)) * dtype.size
                buffer = Buffer(names[i], None, size, element=dtype.size, output=True)
            buffers.append(buffer)
        run = launch(
            binary, buffers, self.grid, self.threadgroup, check=mode == "check", order=order, seed=1
        )
        return mx.array(run.outputs[0]).view(dtype).reshape(shape)


def sdpa_vector(dtype: mx.Dtype, *, causal: bool = False) -> tuple[Shipped, mx.array]:
    """One query per head (three if causal) on 150 keys, and MLX's answer on the CPU."""
    H, H_kv, L, N, D = 8, 2, 3 if causal else 1, 150, 64
    q, k, v = (_normal(dtype, 1, h, n, D) for h, n in ((H, L), (H_kv, N), (H_kv, N)))
    scale = D**-0.5
    wide = (x.astype(mx.float32) for x in (q, k, v))
    expected = mx.fast.scaled_dot_product_attention(
        *wide, scale=scale, mask="causal" if causal else None
    )
    numbers = {4: np.int32(H // H_kv), 5: np.int32(N), 10: np.float32(scale)}
    strides = {6: np.uint64(N * D), 7: np.uint64(D), 8: np.uint64(N * D), 9: np.uint64(D)}
    kernel = Shipped(
        ("sdpa_vector.h",),
        "sdpa_vector",
        f"{TYPES[dtype]}, {D}, {D}",
        {0: q, 1: k, 2: v} | {i: np.array([x]) for i, x in (numbers | strides).items()},
        (3, q.shape, dtype),
        (H * 1024, L, 1),
        (1024, 1, 1),
        {22: causal, 26: 1},
    )
    return kernel, expected


def _quantized(dtype: mx.Dtype, rows: int, k: int, n: int) -> tuple[mx.array, ...]:
    x, w = _normal(dtype, rows, k), _normal(dtype, n, k)
    codes, scales, biases = mx.quantize(w, 64, 4)
    wide = (y.astype(mx.float32) for y in (scales, biases))
    expected = mx.quantized_matmul(x.astype(mx.float32), codes, *wide, True, 64, 4)
    return codes, scales, biases, x, expected


_GEMM = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")


def affine_qmv_fast(dtype: mx.Dtype) -> tuple[Shipped, mx.array]:
    """A vector times a matrix of 4-bit codes."""
    k, n = 1024, 64
    *inputs, expected = _quantized(dtype, 1, k, n)
    kernel = Shipped(
        _GEMM,
        "affine_qmv_fast",
        f"{TYPES[dtype]}, 64, 4, false",
        dict(enumerate(inputs)) | {5: np.array([k], np.int32), 6: np.array([n], np.int32)},
        (4, (1, n), dtype),
        (32, n // 8 * 2, 1),
        (32, 2, 1),
    )
    return kernel, expected


def affine_qmm_t(dtype: mx.Dtype, *, n: int = 64) -> tuple[Shipped, mx.array]:
    """A matrix times one of 4-bit codes, by simdgroup_matrix."""
    rows, k = 33, 128
    *inputs, expected = _quantized(dtype, rows, k, n)
    sizes = {5 + i: np.array([x], np.int32) for i, x in enumerate((k, n, rows))}
    kernel = Shipped(
        _GEMM,
        "affine_qmm_t",
        f"{TYPES[dtype]}, 64, 4, {'true' if n % 32 == 0 else 'false'}, false",
        dict(enumerate(inputs)) | sizes,
        (4, (rows, n), dtype),
        (-(-n // 32) * 32, -(-rows // 32) * 2, 2),
        (32, 2, 2),
        strict=False,  # it assigns structs between address spaces, which clang does not know
    )
    return kernel, expected


def steel_attention(dtype: mx.Dtype, *, causal: bool = False) -> tuple[Shipped, mx.array]:
    """Attention of 40 queries on 50 keys, by simdgroup_matrix and sums over lanes of a row."""
    H, H_kv, L, N, D = 2, 1, 40, 50, 64
    q, k, v = (_normal(dtype, 1, h, n, D) for h, n in ((H, L), (H_kv, N), (H_kv, N)))
    scale, rows, cols = D**-0.5, 32, 32
    wide = (x.astype(mx.float32) for x in (q, k, v))
    expected = mx.fast.scaled_dot_product_attention(
        *wide, scale=scale, mask="causal" if causal else None
    )
    fields = [(1, H, D, L, N, H // H_kv), (scale,)]
    fields += [(-(-L // rows), -(-N // cols), L // rows, N // cols, L % rows, N % cols, N - L)]
    steps = [s for h, n in ((H, L), (H_kv, N), (H_kv, N), (H, L)) for s in (h * n * D, n * D, D)]
    parts = [np.array(x, np.float32 if i == 1 else np.int32) for i, x in enumerate(fields)]
    parts.append(np.array(steps, np.int64))
    parameters = np.frombuffer(b"".join(x.tobytes() for x in parts), np.uint8)
    kernel = Shipped(
        ("steel/attn/kernels/steel_attention.h",),
        "attention",
        f"{TYPES[dtype]}, {rows}, {cols}, {D}, {D}, 4, 1, {TYPES[dtype]}, float",
        {0: q, 1: k, 2: v, 4: parameters},
        (3, q.shape, dtype),
        (-(-L // rows) * 32, H * 4, 1),
        (32, 4, 1),
        {200: L % rows == 0, 201: N % cols == 0, 301: causal},
    )
    return kernel, expected


def _normal(dtype: mx.Dtype, *shape: int) -> mx.array:
    rng = np.random.default_rng(sum(shape))
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
