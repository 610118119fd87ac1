"""What Apple's compiler refuses is refused here, at its line."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core", reason="the simulator needs mlx")

# ruff: noqa: E402
from tests.metalsim import CompileError, need, simulate
from tests.metalsim.compute import compute

I = "const uint i = thread_position_in_grid.x;\n"


@pytest.fixture(autouse=True, scope="module")
def _clang() -> None:
    need()


REFUSED = {  # source, header, what the message says
    "no address space": (
        f"{I}const float* p = x;\nout[i] = p[i];",
        "",
        "`float\\*` names no address space",
    ),
    "private pointer to device memory": (
        f"{I}const thread float* p = x;\nout[i] = p[i];",
        "",
        "cannot initialize",
    ),
    "another address space": (
        f"{I}const threadgroup float* p = x;\nout[i] = p[i];",
        "",
        "cannot initialize|address space",
    ),
    "device pointer to constants": (
        f"{I}const device float* p = small;\nout[i] = p[i] + x[i];",
        "",
        "cannot initialize",
    ),
    "reference without address space": (
        f"{I}float y = x[i];\ntwice(y);\nout[i] = y;",
        "inline void twice(float& y) { y *= 2; }\n",
        "`float&` names no address space",
    ),
    "pointer of a template without address space": (
        f"{I}out[i] = first(x + i);",
        "template <typename T>\ninline T first(const T* p) { return p[0]; }\n",
        "`T\\*` names no address space",
    ),
    "threadgroup variable in a function": (
        f"{I}out[i] = f(x[i]);",
        "inline float f(float y) { threadgroup float z; z = y; return z; }\n",
        "only be declared in a kernel",
    ),
    "double": (f"{I}double y = x[i];\nout[i] = float(y);", "", "poisoned"),
    "float to bfloat": (f"{I}bfloat y = x[i];\nout[i] = float(y);", "", "bfloat"),
    "bfloat output": (f"{I}out[i] = x[i] * 2.0f;", "", "bfloat"),
    "uninitialised variable": (f"{I}float y;\nif (i > 3) y = x[i];\nout[i] = y;", "", "uninit"),
    "simd_sum of 64 bits": (f"{I}out[i] = simd_sum(long(x[i]));", "", "does not take this type"),
    "unknown name": (f"{I}out[i] = simd_add(x[i]);", "", "undeclared|not declared"),
    "wrong vector": (f"{I}float4 v = float4(x[i], 1.0f);\nout[i] = v.x;", "", "components"),
    "half to float vector": (
        f"{I}half4 h = half4(x[i]);\nfloat4 v = h;\nout[i] = v.x;",
        "",
        "half",
    ),
    "exception": (f"{I}if (i > 99) throw 1;\nout[i] = x[i];", "", "poisoned"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metal_would_not_compile_it(case: str) -> None:
    source, header, says = REFUSED[case]
    dtype = mx.bfloat16 if case == "bfloat output" else mx.float32
    inputs = {"x": mx.zeros((64,)), "small": mx.zeros((4,))}
    with simulate("check"), pytest.raises(CompileError, match=says) as caught:
        compute(source, inputs, (64,), dtype, header=header)
    assert caught.match(r"test\.metal:\d+")
