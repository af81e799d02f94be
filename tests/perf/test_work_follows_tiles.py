"""Counters, not clocks: what the descent looks at grows with the live tiles and not with N^2."""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles

LOCAL = [
    "causal & (recent(512) | first(4))",
    "window(256) | global(64)",
    "blocks(64, window(1) | global(1))",
    "block(100)",
]


def tiles_of(text: str, n: int) -> Tiles:
    bound = patterndsl.parse(text).bind(n)
    return find_tiles(bound.groups[0].relation, bound.sizes, Lookup(), 128, 128)


@pytest.mark.parametrize("text", LOCAL)
def test_visited_boxes_per_tile_are_bounded(text: str) -> None:
    for n in (2**14, 2**17, 2**20):
        tiles = tiles_of(text, n)
        assert tiles.num_visited <= 12 * tiles.num_tiles + 200, n


@pytest.mark.parametrize("text", LOCAL)
def test_eight_times_the_length_is_eight_times_the_work(text: str) -> None:
    short, long = tiles_of(text, 2**17), tiles_of(text, 2**20)
    assert long.num_visited <= 8.5 * short.num_visited
    assert long.num_tiles <= 8.5 * short.num_tiles


def test_full_areas_cost_nothing() -> None:
    tiles = tiles_of("causal", 2**15)
    assert tiles.num_tiles == 256 * 257 // 2
    assert tiles.num_visited < 8 * 256
