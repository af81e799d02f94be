"""Does the compiler keep exactly the pairs that a second reading of the spec keeps? On random specs, at every pair."""

from __future__ import annotations

from typing import Any

import array_api_compat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound
from tests.strategies import Case, cases, many

TILES = [(64, 64), (64, 1), (8, 4), (16, 128), (1, 1), (7, 3)]


def lookup_of(case: Case, bound: Bound, library: Any = np) -> Lookup:
    """The inputs that the pattern reads, as arrays of NumPy or PyTorch."""
    return Lookup({shape.name: library.asarray(case.inputs[shape.name]) * 1 for shape in bound.inputs})


def spread(truths: Any, shape: tuple[int, ...]) -> Any:
    """Verdicts and memberships may be one bool for all."""
    return np.broadcast_to(np.asarray(truths), shape)


def by_tile(keep: Any, q_block: int, kv_block: int) -> tuple[Any, Any]:
    """Per tile, whether some pair is kept, and whether every pair is: [num_q_blocks, num_kv_blocks]."""
    starts = [np.arange(0, length, block) for length, block in zip(keep.shape, (q_block, kv_block), strict=True)]
    some = np.logical_or.reduceat(np.logical_or.reduceat(keep, starts[0], axis=0), starts[1], axis=1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(keep, starts[0], axis=0), starts[1], axis=1)
    return some, every


def as_masks(tiles: Tiles) -> tuple[Any, Any]:
    """Live tiles, and full ones: [num_q_blocks, num_kv_blocks]."""
    live, full = (np.zeros((tiles.num_q_blocks, tiles.num_kv_blocks), dtype=bool) for _ in range(2))
    q_blks, kv_blks, is_full = (np.asarray(part) for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full))
    assert not live[q_blks, kv_blks].any()
    live[q_blks, kv_blks] = True
    assert int(live.sum()) == tiles.num_tiles, "a tile is listed twice"
    full[q_blks[is_full], kv_blks[is_full]] = True
    return live, full


@many(4)
@given(cases())
def test_the_canonical_text_says_the_same(case: Case) -> None:
    pattern = case.pattern()
    again = patterndsl.parse(str(pattern))
    assert again == pattern
    assert again.spec == pattern.spec
    assert str(again) == str(pattern)


@many(5)
@given(cases())
def test_membership_is_that_of_the_second_reading(case: Case) -> None:
    pattern = case.pattern()
    bound = case.bound(pattern)
    lookup, sizes, expected = lookup_of(case, bound), bound.sizes, case.keep(pattern)
    q = np.arange(sizes.q_start, sizes.q_start + sizes.q_len)[:, None]
    for group in bound.groups:
        found = member(group.relation, Point(q, np.arange(sizes.kv_len), 0, lookup))
        for head in group.heads:
            np.testing.assert_array_equal(spread(found, expected[head].shape), expected[head])


@many(5)
@given(case=cases(), block=st.sampled_from(TILES))
def test_tiles_are_exact(case: Case, block: tuple[int, int]) -> None:
    pattern = case.pattern()
    bound = case.bound(pattern)
    lookup, expected = lookup_of(case, bound), case.keep(pattern)
    for group in bound.groups:
        some, every = by_tile(expected[group.heads[0]], *block)
        live, full = as_masks(find_tiles(group.relation, bound.sizes, lookup, *block))
        np.testing.assert_array_equal(live, some)
        np.testing.assert_array_equal(full, every)
        live, full = as_masks(find_tiles(group.relation, bound.sizes, lookup, *block, tell_full=False))
        np.testing.assert_array_equal(live, some)
        assert not (full & ~every).any(), "a tile is called full and is not"


@many(2)
@given(case=cases(), block=st.sampled_from(TILES))
def test_tiles_from_torch_are_those_from_numpy(case: Case, block: tuple[int, int]) -> None:
    bound = case.bound(case.pattern())
    for group in bound.groups:
        host = find_tiles(group.relation, bound.sizes, lookup_of(case, bound), *block)
        device = find_tiles(group.relation, bound.sizes, lookup_of(case, bound, torch), *block)
        assert array_api_compat.is_torch_array(device.q_blks) == bool(bound.inputs)
        for part in ("q_blks", "kv_blks", "is_full"):
            np.testing.assert_array_equal(getattr(host, part), np.asarray(getattr(device, part)))


@many(3)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_the_verdict_on_a_box_is_sound(case: Case, seed: int) -> None:
    pattern = case.pattern()
    bound = case.bound(pattern)
    lookup, sizes, expected = lookup_of(case, bound), bound.sizes, case.keep(pattern)
    random = np.random.default_rng(seed)
    q_low, q_high = np.sort(random.integers(0, sizes.q_len, (2, 30)), axis=0)
    k_low, k_high = np.sort(random.integers(0, sizes.kv_len, (2, 30)), axis=0)
    for group in bound.groups:
        box = Box((q_low + sizes.q_start, q_high + sizes.q_start), (k_low, k_high), lookup)
        certain, possible = (spread(truths, q_low.shape) for truths in verdict(group.relation, box))
        for at in range(len(q_low)):
            inside = expected[group.heads[0]][q_low[at] : q_high[at] + 1, k_low[at] : k_high[at] + 1]
            assert inside.all() or not certain[at]
            assert possible[at] or not inside.any()


@many(3)
@given(cases())
def test_the_verdict_on_a_point_is_exact(case: Case) -> None:
    pattern = case.pattern()
    bound = case.bound(pattern)
    lookup, sizes, expected = lookup_of(case, bound), bound.sizes, case.keep(pattern)
    q, k = (part.ravel() for part in np.indices((sizes.q_len, sizes.kv_len)))
    for group in bound.groups:
        box = Box((q + sizes.q_start, q + sizes.q_start), (k, k), lookup)
        for truths in verdict(group.relation, box):
            np.testing.assert_array_equal(spread(truths, q.shape), expected[group.heads[0]].ravel())


@pytest.mark.parametrize("missing", [0, 1, 63, 65, 127])
def test_the_helper_sees_a_wrong_pair(missing: int) -> None:
    """`by_tile` is the judge of the tests above."""
    keep = np.ones((130, 130), dtype=bool)
    keep[missing, missing] = False
    some, every = by_tile(keep, 64, 1)
    assert some.all()
    assert every.sum() == every.size - 1
