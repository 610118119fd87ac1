"""The checks of the oracles: only an oracle that passes them is fit to judge the library.

Here attention: joins, masks, sinks, and figures worked out by hand.
"""

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.oracles import attention
from tests.oracles.checks import assert_close, draw


def test_oracles_import_nothing_of_the_library() -> None:
    """The independent truth stands on NumPy and itself alone."""
    for path in (Path(__file__).parent / "oracles").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if name.split(".")[0] == "kvc"], path


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_join_of_disjoint_sets_is_attention_over_all(softcap: float | None) -> None:
    """Halves, an empty set and the sinks, joined, are the whole."""
    q, k, v, sinks = draw(0, 4, 3, 8), draw(1, 2, 7, 8), draw(2, 2, 7, 5), draw(3, 4)
    whole = attention.attend(q, k, v, softcap=softcap, sinks=sinks)
    parts = [
        attention.attend(q, k[:, a:b], v[:, a:b], softcap=softcap)
        for a, b in ((0, 3), (3, 3), (3, 7))
    ]
    joined = attention.join([*parts, attention.sink_partial(sinks, 3, 5)])
    assert_close(joined.out, whole.out)
    assert_close(joined.lse, whole.lse)


def test_attention_by_hand() -> None:
    """Two keys with logits 0 and log 3: weights 1/4 and 3/4, denominator 4."""
    q, k = np.array([[[1.0]]]), np.array([[[0.0], [np.log(3)]]])
    v = np.array([[[4.0], [8.0]]])
    got = attention.attend(q, k, v)
    assert_close(got.out, [[[7.0]]])
    assert_close(got.lse, [[np.log(4)]])
    with_sink = attention.attend(q, k, v, sinks=[np.log(4)])
    assert_close(with_sink.out, [[[3.5]]])
    capped = attention.attend(q, k, v, softcap=2.0).lse
    assert_close(capped, [[np.log(1 + np.exp(2 * np.tanh(np.log(3) / 2)))]])


def test_causal_is_every_query_alone_over_its_own_past() -> None:
    """With more keys than queries, the last query sees all keys."""
    q, k, v = draw(0, 4, 3, 8), draw(1, 2, 7, 8), draw(2, 2, 7, 8)
    whole = attention.attend(q, k, v, causal=True)
    for l in range(3):
        alone = attention.attend(q[:, l : l + 1], k[:, : 5 + l], v[:, : 5 + l])
        assert_close(whole.out[:, l], alone.out[:, 0])
        assert_close(whole.lse[:, l], alone.lse[:, 0])


def test_grouped_heads_are_repeated_key_heads() -> None:
    """Query head j reads key head j // G."""
    q, k, v = draw(0, 6, 2, 8), draw(1, 2, 5, 8), draw(2, 2, 5, 8)
    repeated = attention.attend(q, np.repeat(k, 3, axis=0), np.repeat(v, 3, axis=0))
    assert_close(attention.attend(q, k, v).out, repeated.out)


def test_attention_mass() -> None:
    """Every query gives one unit; the given denominator is honoured."""
    q, k = draw(0, 4, 5, 8), draw(1, 2, 5, 8)
    mass = attention.attention_mass(q, k, causal=True)
    assert_close(mass.sum(axis=1), [10, 10])
    p = attention.probs(q, k, causal=True)
    assert_close(mass[1], p[2:].sum(axis=(0, 1)))
    lse = attention.attend(q, k, k).lse
    halves = [attention.attention_mass(q, k[:, a:b], lse=lse) for a, b in ((0, 2), (2, 5))]
    assert_close(np.concatenate(halves, axis=1), attention.attention_mass(q, k))
