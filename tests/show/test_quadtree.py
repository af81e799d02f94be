"""Does the quadtree hold the pattern, at every cell size, and with how many nodes?"""

from typing import Any

import numpy as np
import pytest

import patterndsl
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL, grow, pruned

DOC = np.repeat(np.arange(7), [1, 9, 30, 2, 2, 50, 6])
PAD = np.arange(100) % 11 < 7

PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("all", {}),
    ("none", {}),
    ("causal", {}),
    ("window(5)", {}),
    ("causal & (window(3) | strided(7)) | first(2)", {}),
    ("strided(8) & k % 8 == 3 & q % 8 == 4", {}),  # empty, which intervals alone see only at single pairs
    ("strided(8) | ~strided(8)", {}),
    ("blocks(4, window(1) | global(1) | random(2, seed = 3))", {}),
    ("random(3, seed = 1, avoid = window(2))", {}),
    ("q % 7 == k % 5", {}),
    ("(q * q) % 13 == k % 11", {}),
    ("min(q, k) // 3 == max(q, k) // 4 | isqrt(q) == log2(k + 1)", {}),
    ("(abs(q - k) % 6 in {0, 2}) - ((q - 3) // 5 == k // 7)", {}),
    ("causal & (q // 3 - k // 3) % 4 == 1", {}),
    ("q.row == k.row | q.col == k.col", {"grid": {"row": 10, "col": 10}}),
    ("causal & same(doc)", {"inputs": {"doc": "int[N]"}}),
    ("within(doc, window(2) | first(1)) & k.pad", {"inputs": {"doc": "int[N]", "pad": "bool[Nk]"}}),
    ("chunks(doc, 8, 1)", {"inputs": {"doc": "int[N]"}}),
]
SIZES = [
    pytest.param({"n": 100}, id="100"),
    pytest.param({"n": 100, "q_len": 37, "q_start": 60}, id="37-queries-of-100"),
]
INPUTS = {"doc": DOC, "pad": PAD.astype(np.int64)}


def bound_and_lookup(text: str, options: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, Lookup]:
    bound = patterndsl.parse(text, **options).bind(**sizes)
    return bound, Lookup({shape.name: INPUTS[shape.name] for shape in bound.inputs})


def brute(bound: Any, lookup: Lookup, cell: int) -> Any:
    sizes = bound.sizes
    q = np.arange(sizes.q_start, sizes.q_start + sizes.q_len)[:, None]
    kept = member(bound.groups[0].relation, Point(q, np.arange(sizes.kv_len)[None], 0, lookup))
    kept = np.broadcast_to(kept, (sizes.q_len, sizes.kv_len))
    rows = [kept[at : at + cell] for at in range(0, sizes.q_len, cell)]
    blocks = [[row[:, at : at + cell] for at in range(0, sizes.kv_len, cell)] for row in rows]
    return np.array([[FULL if b.all() else PARTIAL if b.any() else EMPTY for b in row] for row in blocks])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("text", "options"), PATTERNS, ids=[text for text, _ in PATTERNS])
def test_equals_the_enumerated_pattern(text: str, options: dict[str, Any], sizes: dict[str, int]) -> None:
    bound, lookup = bound_and_lookup(text, options, sizes)
    tree = grow(bound.groups[0].relation, bound.sizes, lookup)
    assert (tree.finest, tree.exact) == (1, True)
    for cell in (1, 2, 8, 64, 256):
        assert np.array_equal(tree.states(cell), brute(bound, lookup, cell)), f"cells of {cell}"


@pytest.mark.parametrize("max_nodes", [1, 5, 40])
@pytest.mark.parametrize(("text", "options"), PATTERNS, ids=[text for text, _ in PATTERNS])
def test_a_shallow_tree_says_partial_and_never_wrongly_empty_or_full(
    text: str, options: dict[str, Any], max_nodes: int
) -> None:
    bound, lookup = bound_and_lookup(text, options, {"n": 100})
    tree = grow(bound.groups[0].relation, bound.sizes, lookup, max_nodes)
    truth = brute(bound, lookup, tree.finest)
    states = tree.states(tree.finest)
    assert ((states == truth) | (states == PARTIAL)).all()
    assert not tree.exact or np.array_equal(states, truth)


def test_agrees_with_the_tile_descent() -> None:
    bound = patterndsl.parse("causal & (window(20) | strided(60)) | first(9)").bind(5000)
    tiles = find_tiles(bound.groups[0].relation, bound.sizes, Lookup(), 64, 64)
    states = grow(bound.groups[0].relation, bound.sizes, Lookup()).states(64)
    expected = np.zeros_like(states)
    expected[tiles.q_blks, tiles.kv_blks] = np.where(tiles.is_full, FULL, PARTIAL)
    assert np.array_equal(states, expected)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("causal", 21),
        ("causal & window(256)", 100),
        ("causal & (window(256) | strided(128)) | first(4)", 200),
        ("causal & (window(300) | strided(1000)) | first(100)", 2000),
    ],
)
def test_a_million_positions_need_few_nodes(text: str, most: int) -> None:
    bound = patterndsl.parse(text).bind(1 << 20)
    tree = grow(bound.groups[0].relation, bound.sizes, Lookup())
    assert (tree.finest, tree.exact) == (1, True)
    assert tree.num_nodes <= most


def test_draws_of_a_million_positions_end_at_the_node_limit() -> None:
    bound = patterndsl.parse("random(2, seed = 1)").bind(1 << 16)
    tree = grow(bound.groups[0].relation, bound.sizes, Lookup(), 1000)
    assert tree.finest > 1
    assert tree.num_nodes <= 1000


def test_pruned_is_the_tree_one_level_up() -> None:
    bound = patterndsl.parse("causal & window(5)").bind(100)
    tree = grow(bound.groups[0].relation, bound.sizes, Lookup())
    coarse = pruned(tree)
    assert coarse.finest == 2
    assert np.array_equal(coarse.states(2), tree.states(2))
    while coarse.levels:
        coarse = pruned(coarse)
    assert coarse.root == PARTIAL


@pytest.mark.parametrize("sizes", [{"n": 0}, {"q_len": 0, "kv_len": 5}, {"q_len": 3, "kv_len": 0}, {"n": 1}])
def test_empty_and_single_sequences(sizes: dict[str, int]) -> None:
    bound = patterndsl.parse("causal").bind(**sizes)
    tree = grow(bound.groups[0].relation, bound.sizes, Lookup())
    assert tree.states(1).shape == (bound.sizes.q_len, bound.sizes.kv_len)
    assert tree.exact
