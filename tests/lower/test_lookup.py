"""Lists and draws that are looked up, by point and by box, as plain loops over them say."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.meaning import Point, listed_by_reading, member
from patterndsl.ir.relation import Listed
from patterndsl.lower.lookup import FEW_LISTED, Lookup


@given(st.integers(1, 40), st.integers(FEW_LISTED - 2, FEW_LISTED + 12), st.integers(0, 2**31))
def test_long_lists_are_looked_up_as_short_ones(num_rows: int, width: int, seed: int) -> None:
    """By a table of truths and its cells, as reading one key after the other says."""
    random = np.random.default_rng(seed)
    lists = random.integers(-1, 50, (num_rows, width))
    node, lookup = Listed("top", Const(width), Q, K), Lookup({"top": lists.ravel()})
    q, k = np.broadcast_arrays(np.arange(-2, num_rows + 3)[:, None], np.arange(-2, 54))
    expected = np.array([[0 <= row < num_rows and key >= 0 and key in lists[row] for key in k[0]] for row in q[:, 0]])
    assert np.array_equal(member(node, Point(q, k, 0, lookup)), expected)
    assert np.array_equal(listed_by_reading(lookup, node, q, k) & (q >= 0) & (k >= 0), expected)
    for told in lookup.listed(node, (q.ravel(),) * 2, (k.ravel(),) * 2):  # of single pairs all is what some is
        assert np.array_equal(told, expected.ravel())
    q_low, k_low = random.integers(0, 40, 50), random.integers(0, 40, 50)
    q_high, k_high = q_low + random.integers(0, 9, 50), k_low + random.integers(0, 9, 50)
    _, boxes = lookup.listed(node, (q_low, q_high), (k_low, k_high))
    inside = [
        expected[a + 2 : b + 3, c + 2 : d + 3].any() for a, b, c, d in zip(q_low, q_high, k_low, k_high, strict=True)
    ]
    assert not (np.array(inside) & ~boxes).any()  # a box near a pair may be said to have it
