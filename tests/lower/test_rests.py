"""What tiles leave undecided: inside each of them it says the same as the whole pattern."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl.ir.index import Arithmetic, Const, K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Compare, Relation, depends_on, draws_in, inputs_read
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.rests import MOST, OTHER, rests_of
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound
from tests.property.test_membership import lookup_of, spread
from tests.strategies import Case, cases, many


def assert_same(relation: Relation, rest: Relation, tiles: Tiles, at: int, bound: Bound, lookup: Lookup) -> None:
    """At each pair of a tile."""
    sizes = bound.sizes
    first_q, first_k = int(tiles.q_blks[at]) * tiles.q_block, int(tiles.kv_blks[at]) * tiles.kv_block
    q = sizes.q_start + np.arange(first_q, min(first_q + tiles.q_block, sizes.q_len))[:, None]
    k = np.arange(first_k, min(first_k + tiles.kv_block, sizes.kv_len))
    whole, left = (spread(member(each, Point(q, k, 0, lookup)), (len(q), len(k))) for each in (relation, rest))
    np.testing.assert_array_equal(left, whole)


@many(2)
@given(case=cases(), block=st.sampled_from([(64, 64), (8, 4), (3, 7)]))
def test_rests_say_the_same(case: Case, block: tuple[int, int]) -> None:
    bound = case.bound(case.pattern())
    lookup = lookup_of(case, bound)
    groups = [(group.relation, find_tiles(group.relation, bound.sizes, lookup, *block)) for group in bound.groups]
    rests = rests_of(groups, bound.sizes)
    assert len(rests.relations) <= MOST
    assert not any(any(draws_in(rest)) or inputs_read(rest) for rest in rests.relations)
    for (relation, tiles), places in zip(groups, rests.places, strict=True):
        assert len(places) == tiles.num_tiles
        for at in np.flatnonzero(~tiles.is_full & (places != OTHER)):
            assert_same(relation, rests.relations[places[at]], tiles, int(at), bound, lookup)


def of(text: str) -> tuple[Bound, Relation, Tiles]:
    bound = patterndsl.parse(text).bind(4096)
    relation = bound.groups[0].relation
    return bound, relation, find_tiles(relation, bound.sizes, Lookup(), 64, 64)


DISTANCE = Arithmetic("-", Q, K)


@pytest.mark.parametrize(
    ("text", "wanted", "as_a_whole"),
    [
        (
            "recent(512) | causal & first(4)",
            {Compare("<=", Const(0), DISTANCE), Compare("<", K, Const(4)), Compare("<", DISTANCE, Const(512))},
            2,
        ),
        (
            "window(256) | global(64)",
            {Compare("<=", side, Const(256)) for side in (DISTANCE, Arithmetic("-", Const(0), DISTANCE))},
            0,
        ),
        ("causal", set(), 64),
        ("all", set(), 0),
    ],
)
def test_most_tiles_leave_one_comparison(text: str, wanted: set[Relation], as_a_whole: int) -> None:
    """Those that few leave are asked for the whole."""
    bound, relation, tiles = of(text)
    rests = rests_of([(relation, tiles)], bound.sizes)
    partial = rests.places[0][~tiles.is_full]
    often = [place for place in range(len(rests.relations)) if (partial == place).sum() > 9]
    assert {rests.relations[place] for place in often} == wanted
    assert (partial == OTHER).sum() == as_a_whole


def test_heads_have_rests_of_their_own() -> None:
    bound = patterndsl.parse("causal & (head == 0 & recent(256) | head == 1 & strided(128))").bind(1024, heads=2)
    groups = [(each.relation, find_tiles(each.relation, bound.sizes, Lookup(), 64, 64)) for each in bound.groups]
    rests = rests_of(groups, bound.sizes)
    partial = [places[~tiles.is_full] for (_, tiles), places in zip(groups, rests.places, strict=True)]
    left = [{rests.relations[place] for place in np.unique(places) if place != OTHER} for places in partial]
    assert Compare("<", DISTANCE, Const(256)) in left[0] - left[1]
    assert left[1] and not any(depends_on(each, "head") for each in left[0] | left[1])
