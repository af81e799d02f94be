"""Are the cells of a picture, and the figures under it, those of the pattern?"""

import numpy as np
import pytest

import patterndsl
from patterndsl.lower.lookup import Lookup
from patterndsl.show.cells import Cells, caption, figures, find_cells, fitting_cell
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL


def cells(text: str, q_cell: int = 1, kv_cell: int | None = None, **sizes: int) -> Cells:
    bound = patterndsl.parse(text).bind(**sizes)
    return find_cells(bound.groups[0].relation, bound.sizes, Lookup(), q_cell, kv_cell or q_cell)


def test_single_pairs_are_kept_or_not() -> None:
    assert cells("causal", n=3).states.tolist() == [[FULL, 0, 0], [FULL, FULL, 0], [FULL, FULL, FULL]]


def test_blocks_are_empty_partial_or_full_and_ragged_ones_count_what_exists() -> None:
    found = cells("causal", 2, n=5)
    assert found.states.tolist() == [[PARTIAL, EMPTY, EMPTY], [FULL, PARTIAL, EMPTY], [FULL, FULL, FULL]]
    assert (found.num_live, found.num_full) == (6, 4)
    assert found.live_share == pytest.approx((2 * 2 + 2 * 4 + 1 * 5) / 25)


def test_cells_may_be_taller_than_wide() -> None:
    assert cells("causal", 4, 2, n=8).states.tolist() == [[PARTIAL] * 2 + [0] * 2, [FULL, FULL, PARTIAL, PARTIAL]]


def test_what_intervals_cannot_tell_the_quadtree_does() -> None:
    found = cells("strided(128) & k % 128 == 5 & q % 128 == 6", 2048, n=1 << 20)
    assert found.exact
    assert found.num_live == 0


def test_tall_cells_of_the_quadtree_are_those_of_the_descent() -> None:
    text = "strided(12) & k % 12 == 5 & q % 12 in {5, 6}"
    hard = patterndsl.parse(text).bind(3000)
    quick = find_cells(hard.groups[0].relation, hard.sizes, Lookup(), 256, 128, effort=0)
    exact = find_cells(hard.groups[0].relation, hard.sizes, Lookup(), 256, 128, effort=1 << 30)
    assert quick.exact
    assert np.array_equal(quick.states, exact.states)


def test_what_nothing_tells_is_said_to_be_an_upper_bound() -> None:
    found = cells("(q * q) % 97 == k % 31 & q % 97 == 5", 2048, n=1 << 20)
    assert not found.exact
    assert "at most" in figures(found)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "cell"), [(256, 256, 4), (257, 256, 8), (3, 256, 4), (0, 0, 1), (1 << 20, 1 << 20, 16384)]
)
def test_the_least_power_of_two_that_fits(q_len: int, kv_len: int, cell: int) -> None:
    bound = patterndsl.parse("all").bind(q_len=q_len, kv_len=kv_len)
    assert fitting_cell(bound.sizes, 64, 64) == cell


def test_figures_and_caption() -> None:
    assert figures(cells("causal", n=4)) == "10 of 16 pairs kept (62.5 %)"
    assert figures(cells("causal", 2, n=4)) == "cells of 2×2 · 3 of 4 live (75.0 % of all pairs), 1 full"
    bound = patterndsl.parse("causal & recent(w[head])", params={"w": [1, 2, 2, 1, 1]}).bind(4, heads=5, layer=2)
    words = [caption("name", "causal\n  & x", bound, group, 2).view for group in bound.groups]
    heads = ("heads 0, 3, 4 of 5", "heads 1-2 of 5")
    assert words == [f"N 4 · {shown}; 2 groups differ · layer 2" for shown in heads]
    assert caption("name", "causal\n  & x", bound, bound.groups[0], None).title == "name: causal & x"
    late = patterndsl.parse("causal").bind(q_len=3, kv_len=8, q_start=5)
    assert caption(None, "causal", late, late.groups[0], None).view == "3 queries from 5 on · 8 keys · N 8"
