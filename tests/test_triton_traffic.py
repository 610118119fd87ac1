"""The bytes that kernels move over the least possible, at the sizes that are raced on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvc.ops.codec import Spec
from kvc.ops.quant import Role
from tests.cases.encode import GEAR2, Case, args
from tests.conftest import need
from tests.triton_device import counted, kernels, marks, on_gpu

pytestmark = marks()

SIZES = [(1, 1000), (1, 8192), (1, 131072), (16, 8192), (64, 8192), (16, 32768), (16, 65536)]
MODELS = {"Llama-3-8B": (32, 8), "Llama-2-7B": (32, 32), "Llama-2-13B": (40, 40)}
D = 128
ATTENTION, OTHERS = 1.05, 1.10  # at most
HIDDEN, FEATURES = 512, 8  # of LESS's maps


@pytest.fixture(autouse=True)
def triton() -> None:
    need("torch")
    need("triton")


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    return found


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def heads(request: pytest.FixtureRequest) -> tuple[int, int]:
    found: tuple[int, int] = request.param
    return found


@pytest.mark.parametrize("joined", [(), (1,), (8, 1)], ids=str)
def test_attend_dense(
    size: tuple[int, int], heads: tuple[int, int], joined: tuple[int, ...]
) -> None:
    from kvc.cuda_kernels.attend_dense import traffic

    (B, T), (Hq, H) = size, heads
    assert traffic(B, Hq, H, 1, D, T, 2, joined=joined).ratio <= ATTENTION


def test_attention_mass(size: tuple[int, int], heads: tuple[int, int]) -> None:
    from kvc.cuda_kernels.attention_mass import traffic

    (B, T), (Hq, H) = size, heads
    assert traffic(B, Hq, H, 1, D, T, 2).ratio <= ATTENTION
    # the denominator has to be known before any probability
    assert traffic(B, Hq, H, 1, D, T, 2, known=False).ratio <= 2 * ATTENTION


def test_a_prompts_mass_reads_keys_for_each_tile_of_queries() -> None:
    from kvc.cuda_kernels.attention_mass import traffic

    # 64 rows of queries share a read of the keys, and 64 keys one of the queries: caches serve both
    assert traffic(1, 32, 8, 512, D, 8192, 2).ratio <= 50


def test_join(heads: tuple[int, int]) -> None:
    from kvc.cuda_kernels.join import traffic

    for answers in (2, 16, 66):
        assert traffic(heads[0], D, answers, itemsize=2, sinks=2).ratio <= ATTENTION


def test_attend_state(heads: tuple[int, int]) -> None:
    from kvc.cuda_kernels.attend_state import traffic

    assert traffic(1, *heads, 1, D, HIDDEN, FEATURES, 2, 2).ratio <= ATTENTION
    # each of a group's query heads reads its state, and 16 rows share a read of the maps: programs
    # side by side, which a cache serves
    (Hq, H), B = heads, 64
    assert traffic(B, Hq, H, 1, D, HIDDEN, FEATURES, 2, 2).ratio <= max(B / 16, Hq / H)


def test_fold_evicted(heads: tuple[int, int]) -> None:
    from kvc.cuda_kernels.fold_evicted import traffic

    def ratio(B: int, n: int) -> float:
        return traffic(B, heads[1], n, D, HIDDEN, FEATURES, 2, 2).ratio

    assert ratio(1, 1) <= OTHERS
    # 16 tokens of one row share a read of the maps, which caches serve: 1 MiB for 8 heads
    assert ratio(1, 1024) <= 18
    assert ratio(16, 1) <= 16


@pytest.mark.parametrize("role", ["k", "v"])
@pytest.mark.parametrize("n", [64, 8192])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize(role: Role, n: int, bits: int) -> None:
    from kvc.cuda_kernels.quantize import traffic

    for backbone in ("kivi", "token", "kcvt"):
        found = traffic((1, 8, n, D), 2, bits, role, backbone, 64)
        walks = backbone == "kcvt" and role == "k" and n > 64  # one group, of all tokens
        assert found.ratio <= (2 if walks else 1)


def specs(n: int) -> Iterator[tuple[str, Spec]]:
    yield "kivi", Spec("k", 4, "kivi", 64, n, D)
    yield "turned", Spec("k", 4, "kivi", 64, n, D, rotate="hadamard")
    yield "dual", Spec("v", 2, "kivi", 64, n, D, rotate="hadamard", scales="dual")


@pytest.mark.parametrize("n", [64, 128, 8192])
def test_encode(n: int) -> None:
    from kvc.cuda_kernels.encode_traffic import traffic

    # what is kept in float32 between launches, in caches, and read again; by rank
    most = {
        "kivi": {0: 1.0, 2: 3.9 if n == 64 else 12},
        "turned": {0: 4.2, 2: 6.8 if n == 64 else 15},
        "dual": {0: 38, 2: 46},
    }
    for name, spec in specs(n):
        for rank, bound in most[name].items():
            found = traffic((1, 8, n, D), 2, spec, rank=rank, n_iter=3)
            assert found.ratio <= bound, (name, rank)


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize(
    "case",
    [
        Case(role="v", bits=4, rank=3, n_iter=2, D=128, group=64),
        Case("float32", B=2, H=3),
        Case(n=320, rank=3),  # a fit by several programs
        Case(n=320, rank=2, n_iter=1, role="v"),
        Case(backbone="kcvt", n=100),
        Case(rotate="hadamard", rank=0),
        Case("bfloat16", n=64, D=128, bits=4, **GEAR2),
        Case("float32", role="v", n=100, D=80, scales="dual"),
    ],
    ids=lambda case: case.id,
)
def test_encode_moves_what_it_tells(case: Case) -> None:
    from kvc.backends.torch import ops
    from kvc.cuda_kernels import encode
    from kvc.cuda_kernels.encode_traffic import traffic

    x = ops.astype(ops.from_numpy(args(case)["x"]), ops.dtype(case.dtype))
    with kernels(), counted() as count:
        encode.run(x, case.spec, **case.options)
    shape = (case.B, case.H, case.n, case.D)
    told = traffic(shape, x.element_size(), case.spec, rank=case.rank, n_iter=case.n_iter)
    assert told.touched == count.touched


@pytest.mark.skipif(on_gpu(), reason="the interpreter counts")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("L", "T", "dtype"), [(1, 1000, "float16"), (1, 300, "float32"), (20, 150, "float16")]
)
def test_attention_mass_moves_what_it_tells(L: int, T: int, dtype: str, known: bool) -> None:
    import torch

    from kvc.cuda_kernels import attention_mass

    rand = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, L, 80, generator=rand).to(getattr(torch, dtype))
    k = torch.randn(1, 2, T, 80, generator=rand).to(q.dtype)
    with kernels(), counted() as count:
        attention_mass.run(q, k, 0.1, lse=torch.zeros(1, 4, L) if known else None)
    told = attention_mass.traffic(1, 4, 2, L, 80, T, q.element_size(), known=known)
    assert told.touched == count.touched
