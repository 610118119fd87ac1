"""What GEAR's fields may be, what they say otherwise, and the spec they make."""

from __future__ import annotations

from typing import Any

import pytest

from kvc.errors import ConfigError
from kvc.methods import Gear, KVSharer, Less, parse
from kvc.ops.codec import Spec

SLIDING = {"prefill_rank": 0, "rank": 0, "outliers": 0.0, "value_window": "sliding"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_group": -1}, "k_group must be 0 or more, got -1"),
        ({"k_group": 48}, r"multiple of k_group .* 64 and 48; set gear.buffer=192 or gear.k_gr"),
        ({"group_size": 48}, r"buffer must be a multiple of group_size .* or gear.group_size=16"),
        ({"rotate": "givens"}, "rotate must be empty or hadamard, got 'givens'"),
        ({"scales": "two"}, "scales must be empty or dual, got 'two'"),
        ({"value_window": "all"}, "value_window must be chunk or sliding, got 'all'"),
        ({"backbone": "awq"}, "backbone must be kivi, kcvt or token, got 'awq'"),
        ({"scale_dtype": "int8"}, "scale_dtype must be empty, float16, bfloat16 or float32, got"),
        ({"zero_dtype": "half"}, "zero_dtype must be empty, float16, bfloat16 or float32, got"),
        ({"layer_bits": "3"}, "such as 0-3:8/4,7:4, got '3'"),
        ({"layer_bits": "0:3"}, "the bits, 2, 4 or 8, of keys and values, .* got '0:3'"),
        ({"layer_bits": "0-2:4,2:8/4"}, "layer_bits must name a layer once, got 2 twice"),
        ({"value_window": "sliding"}, r"got prefill_rank=4; set gear.prefill_rank=0 or gear.value"),
        *(
            (
                {**SLIDING, field: value},
                rf"value_window=sliding .* got {field}={value}; set gear.{field}=",
            )
            for field, value in (
                ("rank", 2), ("outliers", 0.1), ("window", 8), ("rotate", "hadamard"),
                ("scales", "dual"), ("backbone", "kcvt"),
            )
        ),
    ],
)  # fmt: skip
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gear(**fields)


def test_groups_must_divide_the_width() -> None:
    for fields, message in (
        ({}, r"group_size must divide .* head_dim 80, got 64; set gear.group_size=16"),
        ({"v_group": 32}, r"v_group must divide .* head_dim 80, got 32; set gear.v_group=16"),
        ({"v_group": 16, "k_group": 64, "backbone": "token"}, "k_group must divide .* 80, got 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            Gear(**fields).check(80)  # type: ignore[arg-type]
    Gear(v_group=16).check(80)
    Gear(backbone="kcvt").check(80)
    Gear(scales="dual", buffer=100).check(80)  # neither the buffer nor the width has groups


def test_a_layer_has_bits_of_its_own() -> None:
    codec = Gear(bits=2, k_bits=4, layer_bits="0-1:8/4, 3:4")
    assert [codec.of(i).bits_of("k") for i in range(5)] == [8, 8, 4, 4, 4]
    assert [codec.of(i).bits_of("v") for i in range(5)] == [4, 4, 2, 4, 2]
    assert codec.of(0) == Gear(bits=2, k_bits=8, v_bits=4)


def test_layers_with_bits_of_their_own_must_be_there() -> None:
    codec = Gear(layer_bits="2:8,9:8")
    codec.check_layers((2, 5, 9))
    with pytest.raises(ConfigError, match=r"layers that keep all tokens \(2, 5\), got 9"):
        codec.check_layers((2, 5))


def test_a_spec_is_of_one_role() -> None:
    codec = Gear(bits=2, k_bits=4, k_group=32, buffer=128, rotate="hadamard", zero_dtype="float32")
    assert codec.spec("k", 256, 64) == Spec(
        "k", 4, "kivi", 32, 256, 64, rotate="hadamard", tile=128, zero_dtype="float32"
    )
    assert (codec.spec("v", 1, 64).bits, codec.spec("v", 1, 64).group_size) == (2, 64)


def test_a_sliding_window_takes_plain_kivi() -> None:
    assert Gear(**SLIDING, sink=4, group_size=32).value_window == "sliding"  # type: ignore[arg-type]


def test_values_add_up_to_what_parse_gives() -> None:
    settings = {"kvsharer.map": "3:1", "gear.bits": "4"}
    assert KVSharer("3:1") + Gear(bits=4) == parse("kvsharer+gear", settings)
    assert KVSharer("3:1") + Less() + parse("token") == parse(
        "kvsharer+h2o+token", {"kvsharer.map": "3:1"}
    )
    with pytest.raises(ConfigError, match="gear and gear both fill the seam codec"):
        Gear() + Gear()
