"""KVSharer's oracle (arXiv:2410.18517): maps, distances and the greedy search."""

import numpy as np
import pytest

from tests.oracles import kvsharer
from tests.oracles.checks import assert_close, draw


def test_maps() -> None:
    """Owners below, no chains, layer 0 its own."""
    assert kvsharer.why_invalid((0, 0, 2, 2), 2) is None
    assert kvsharer.why_invalid((0, 0, 1)) is not None
    assert kvsharer.why_invalid((1, 1)) is not None
    assert kvsharer.why_invalid((0, 0, 0), 1) is not None
    assert kvsharer.compress_paths((0, 1, 2, 1, 4, 3)) == (0, 1, 2, 1, 4, 1)
    assert kvsharer.share((0, 1, 2, 3, 3, 5), 3, 1) == (0, 1, 2, 1, 1, 5)
    assert kvsharer.share((0, 1, 1, 3), 3, 2) == (0, 1, 1, 1)
    assert kvsharer.sharers((0, 0, 2, 2)) == [1, 3]


def test_share_count_rounds_half_up() -> None:
    """Of 12.5 %, in decimals, and never all layers."""
    assert [kvsharer.share_count(0.125, n) for n in (32, 40, 4, 12)] == [4, 5, 1, 2]
    assert kvsharer.share_count(0.375, 12) == 5
    assert kvsharer.share_count("0.29", 50) == 15  # 14.5; in binary a little less
    assert kvsharer.share_count(1.0, 8) == 7
    assert kvsharer.share_count(0.0, 8) == 0


def test_distances_by_hand() -> None:
    """Three layers, one head, two positions, two channels."""
    k = np.array([[[[0, 0], [0, 0]]], [[[3, 4], [0, 0]]], [[[0, 0], [6, 8]]]], float)
    v = np.array([[[[1, 0], [0, 0]]], [[[1, 0], [0, 0]]], [[[1, 0], [0, 2]]]], float)
    d = kvsharer.distances(k, v)
    # K: 5/2, 10/2, (5+10)/2; V: 0, 2/2, 2/2; half their sums.
    assert_close([d[1, 0], d[2, 0], d[2, 1]], [1.25, 3.0, 4.25])
    assert np.array_equal(d, d.T)
    assert np.all(np.diag(d) == 0)
    assert kvsharer.rank_pairs(d) == [(2, 1), (2, 0), (1, 0)]
    assert kvsharer.rank_pairs(d, "ascending") == [(1, 0), (2, 0), (2, 1)]
    flat = kvsharer.distances(k, v, "flat")
    assert_close([flat[1, 0], flat[2, 0]], [2.5, np.sqrt(9 + 25)])
    assert_close(flat[2, 1], np.sqrt(9 + 25 + 1.5**2 + 2**2))


def test_ranking_ties_and_scale() -> None:
    """Equal to six digits: the smaller i, then the smaller j; a common factor changes nothing."""
    d = np.ones((3, 3)) + 1e-8 * draw(0, 3, 3)
    assert kvsharer.rank_pairs(d) == [(1, 0), (2, 0), (2, 1)]
    k, v = draw(1, 6, 2, 4, 8), draw(2, 6, 2, 4, 8)
    for how in ("positionwise", "flat"):
        once = kvsharer.rank_pairs(kvsharer.distances(k, v, how))
        assert once == kvsharer.rank_pairs(kvsharer.distances(3 * k, 3 * v, how))


def test_mean_states_and_similarity() -> None:
    """Averages of equal lengths; both readings of likeness."""
    assert_close(kvsharer.mean_states([np.ones((1, 1, 2, 2)), np.zeros((1, 1, 2, 2))]), 0.5)
    with pytest.raises(ValueError, match="as long as"):
        kvsharer.mean_states([np.ones((1, 1, 2, 2)), np.ones((1, 1, 3, 2))])
    x, y = (
        [np.array([[1.0, 0]]), np.array([[0, 2.0]])],
        [np.array([[1.0, 0]]), np.array([[2.0, 0]])],
    )
    assert_close(kvsharer.similarity(x, y), 0.5)
    assert_close(kvsharer.similarity(x, y, "mean_repr"), 1 / np.sqrt(5))
    assert_close(kvsharer.similarity(x, x), 1)


def test_greedy() -> None:
    """Rank order, strict threshold, sharers passed over, partial results, no needless call."""
    ranked = [(5, 3), (5, 1), (3, 1), (4, 2), (2, 0), (1, 0)]
    got = kvsharer.greedy(ranked, 6, 3, lambda m: 1.0, -1)
    assert got.accepted == [(5, 3), (3, 1), (4, 2)] == got.tried
    assert got.map == (0, 1, 2, 1, 2, 1)
    assert got.complete
    none = kvsharer.greedy(ranked, 6, 3, lambda m: 1.0, 1.01)
    assert (none.map, none.accepted, none.complete) == (tuple(range(6)), [], False)
    assert none.tried == ranked
    assert kvsharer.greedy(ranked, 6, 1, lambda m: 0.5).accepted == []  # not above T
    picky = kvsharer.greedy(ranked, 6, 2, lambda m: 0.9 if m[3] == 3 else 0.1)
    assert picky.accepted == [(5, 3), (4, 2)]
    assert kvsharer.greedy(ranked, 6, 0, lambda m: 1.0) == (tuple(range(6)), [], [], True)
    with pytest.raises(ValueError, match="cannot share"):
        kvsharer.greedy(ranked, 6, 6, lambda m: 1.0)


def test_greedy_maps_are_valid() -> None:
    """Whatever the order and the acceptances."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        d = rng.uniform(size=(9, 9))
        found = kvsharer.greedy(kvsharer.rank_pairs(d), 9, 4, lambda m, r=rng: r.uniform(), 0.3)  # type: ignore[misc]
        assert kvsharer.why_invalid(found.map, 4) is None
        assert len(kvsharer.sharers(found.map)) == len(found.accepted)


def test_kvsharer_bytes_by_hand() -> None:
    """Per token: Llama-2-7B sharing 8 of 32 layers, Llama-2-13B sharing 10 of 40."""
    assert kvsharer.cache_bytes(32, 0, 32, 128, 1) == 524_288
    assert kvsharer.cache_bytes(32, 8, 32, 128, 1) == 393_216
    assert kvsharer.cache_bytes(40, 0, 40, 128, 1) == 819_200
    assert kvsharer.cache_bytes(40, 10, 40, 128, 1) == 614_400
