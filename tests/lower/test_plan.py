"""Do the passes of every plan hold each pair of the pattern once, and no other? Written out as masks of N x N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given

import patterndsl
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower import shapes as lower_shapes
from patterndsl.lower.devices import CPU, CUDA, Machine
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.order import Order, Patches
from patterndsl.lower.plan import SEARCHED, Option, Pass, Plan, plan
from patterndsl.lower.row import Runs, row_runs
from patterndsl.lower.shapes import Band, Full, Keys, Masked, Piece, Sparse, Triangle, in_order
from patterndsl.lower.stored import Arrays, read_option, written_option
from patterndsl.lower.tiles import Tiles, TooHard, find_tiles
from patterndsl.sema.bind import Sizes
from tests.strategies import Case, cases, many


def times_held(passes: Sequence[Pass], shape: tuple[int, int], lookup: Lookup) -> Any:
    """int [q_len, kv_len]: how many of the passes hold each pair, less those that take it out again."""
    held = np.zeros(shape, dtype=int)
    for item in passes:
        piece, sign, geometry = item.piece, item.sign, item.piece.geometry
        for moved in geometry.group_starts():
            rows, keys = geometry.q.places() + moved, geometry.k.places() + moved
            held[np.ix_(rows, keys)] += sign * inside(piece, len(rows), len(keys), lookup)
    return held


def inside(piece: Piece, q_len: int, kv_len: int, lookup: Lookup) -> Any:
    kept = np.zeros((q_len, kv_len), dtype=bool)
    match piece.shape:
        case Full():
            kept[:] = True
        case Triangle():
            assert q_len == kv_len
            kept = np.tri(q_len, dtype=bool)
        case Masked(mask):
            kept = mask
        case Band(tile, mask):
            assert q_len % tile == 0
            for first in range(0, q_len, tile):
                kept[first : first + tile, first : first + mask.shape[1]] = mask
        case Keys(listed):
            query, turn = np.nonzero(listed >= 0)
            kept[query, listed[query, turn]] = True
            assert kept.sum() == len(query), "a key of a query stands there twice"
        case Sparse(tiles, relation, orders=orders):
            q, k = (np.arange(q_len), np.arange(kv_len)) if orders is None else (order.positions() for order in orders)
            assert sorted(q) == list(range(q_len)) and sorted(k) == list(range(kv_len)), "not an order of all positions"
            holds = np.broadcast_to(member(relation, Point(q[:, None], k, 0, lookup)), kept.shape)
            for q_blk, kv_blk, is_full in zip(tiles.q_blks, tiles.kv_blks, tiles.is_full, strict=True):
                rows = slice(q_blk * tiles.q_block, (q_blk + 1) * tiles.q_block)
                keys = slice(kv_blk * tiles.kv_block, (kv_blk + 1) * tiles.kv_block)
                kept[rows, keys] = True if is_full else holds[rows, keys]
            assert (kept == holds).all(), "a pair outside the live tiles"
            kept[np.ix_(q, k)] = kept.copy()
    return kept


def planned(text: str, n: int, machine: Machine = CPU, **sizes: int) -> Plan:
    return plan(patterndsl.parse(text).bind(n, **sizes), Lookup(), machine)


def shapes_of(option: Option) -> list[str]:
    return [type(item.piece.shape).__name__ for item in option.passes]


@pytest.mark.parametrize("machine", [CPU, CUDA], ids=lambda machine: machine.name)
@many(1)
@given(case=cases())
def test_every_plan_holds_each_pair_once(case: Case, machine: Machine) -> None:
    assume(not case.inputs)
    pattern = case.pattern()
    bound, keep, lookup = case.bound(pattern), case.keep(pattern), Lookup()
    found = plan(bound, lookup, machine)
    for group, options in zip(bound.groups, found.options, strict=True):
        for option in options:
            held = times_held(option.passes, keep.shape[1:], lookup)
            assert (held == keep[group.heads[0]]).all(), option


@pytest.mark.parametrize(
    ("text", "n", "shapes"),
    [
        ("causal", 1000, ["Triangle"]),
        ("all", 1000, ["Full"]),
        ("causal & strided(16)", 1024, ["Triangle"]),
        ("causal & strided(16)", 1000, ["Triangle", "Triangle"]),
        ("causal & block(50)", 1000, ["Triangle"]),
        ("recent(128)", 6400, ["Band", "Triangle"]),
        ("causal & dilated(63, 4)", 8192, ["Band", "Triangle"]),
        ("causal & (recent(64) | strided(64))", 8192, ["Band", "Triangle", "Triangle"]),
        ("window(100) | global(5)", 8192, ["Full", "Full", "Band", "Masked", "Masked"]),
        ("blocks(64, window(1))", 8192, ["Band", "Full", "Full"]),
        ("grid: {row: 64, col: 64}\nattend: q.row == k.row\n", 4096, ["Full"]),
        ("grid: {row: 64, col: 64}\nattend: q.col == k.col\n", 4096, ["Full"]),
        ("grid: {row: 64, col: 64}\nattend: q.col // 8 == k.col // 8 & q.row // 8 == k.row // 8\n", 4096, ["Full"]),
    ],
)
def test_structure_is_found_whatever_it_is_called(text: str, n: int, shapes: list[str]) -> None:
    (options,) = planned(text, n).options
    assert shapes_of(options[0]) == shapes


def test_little_more_is_computed_than_is_kept() -> None:
    """What reordering is for: as written, every tile below the diagonal holds a pair of the stride."""
    text, n = "causal & (recent(128) | strided(128))", 16_384
    (options,) = planned(text, n).options
    kept = sum(min(q + 1, 128) + q // 128 for q in range(n))  # the window's keys, and those of the stride before it
    computed = sum(item.piece.num_computed for item in options[0].passes)
    assert computed < 1.6 * kept


@pytest.mark.parametrize(
    ("text", "n", "kernels"),
    [
        ("causal & (recent(256) | strided(256))", 16_384, ["triton", "triton"]),
        ("causal & (block(256) | columns(256, 8))", 16_384, ["triton", "triton"]),
        ("grid: {row: 64, col: 256}\nattend: q.row == k.row | q.col == k.col\n", 16_384, ["triton", "triton"]),
        ("causal", 16_384, ["sdpa"]),
        ("strided(4)", 16_384, ["sdpa"]),
    ],
    ids=["strided", "fixed", "axial", "dense", "long groups"],
)
def test_short_groups_are_tiles_on_a_gpu_and_long_ones_dense(text: str, n: int, kernels: list[str]) -> None:
    """As measured on an H200: groups of 64 and of 256 take dense kernels longer, whose tiles are of 128."""
    (options,) = planned(text, n, CUDA, heads=16).options
    assert [item.kernel for item in options[0].passes] == kernels


def test_patches_that_do_not_fit_are_given_up() -> None:
    """Work for each tile and not for each pair: strides of 128 lie across patches of a grid of 64 columns."""
    bound = patterndsl.parse("strided(128) & ~window(256)").bind(2048)
    (relation,) = (group.relation for group in bound.groups)
    patches = Patches((64,), (1, 64), (0, 0))
    orders = Order(patches, 0, 2048), Order(patches, 0, 2048)
    whole = in_order(relation, bound.sizes, orders, CUDA.wanted)
    assert isinstance(whole.shape, Sparse) and whole.shape.tiles.num_visited > 2048 * 2048 // 2, "all pairs were asked"
    with pytest.raises(TooHard):
        in_order(relation, bound.sizes, orders, CUDA.wanted, SEARCHED)


def test_drawn_keys_are_taken_one_by_one() -> None:
    """On a GPU, where a tile would hold a few; stored, they are the same."""
    sizes = {"kv_len": 400, "q_start": 30, "heads": 2}
    text = "recent(9) | k < 300 & random(3, seed = head, avoid = recent(5) | ~causal)"
    for options, group in zip(planned(text, 300, CUDA, **sizes).options, (0, 1), strict=True):
        by_keys = [option for option in options if any(isinstance(item.piece.shape, Keys) for item in option.passes)]
        assert by_keys
        bound = patterndsl.parse(text).bind(300, **sizes)
        for option in by_keys:
            arrays = Arrays()
            stored = read_option(written_option(option, arrays), arrays.named)
            for passes in (option.passes, stored.passes):
                held = times_held(passes, (270, 400), Lookup())
                point = Point(np.arange(30, 300)[:, None], np.arange(400), 0, Lookup())
                assert (held == member(bound.groups[group].relation, point)).all()


@pytest.mark.parametrize(
    ("text", "n", "tiles"),
    [
        # a patch of 8 x 8 reaches one patch further each way
        ("abs(q // 128 - k // 128) <= 6 & abs(q % 128 - k % 128) <= 6", 16_384, 46 * 46),
        # windows are patches where both begin together
        ("(q // 128 - 4) // 8 == (k // 128 - 4) // 8 & (q % 128 - 4) // 8 == (k % 128 - 4) // 8", 16_384, 260),
    ],
    ids=["neighbourhood", "moved windows"],
)
def test_a_grid_is_taken_in_patches_that_meet_few_tiles(text: str, n: int, tiles: int) -> None:
    (options,) = planned(text, n, CUDA).options
    (item,) = options[0].passes
    assert isinstance(item.piece.shape, Sparse) and item.piece.shape.orders is not None
    assert item.piece.shape.orders[0].patches.sizes == (8, 8)
    assert item.piece.shape.tiles.num_tiles <= tiles


VIDEO = """\
grid: {time: 4, row: 8, col: 8}
attend: q.time - k.time in 0..3 & abs(q.row - k.row) <= 1 & abs(q.col - k.col) <= 1 | along(time) & k.time <= q.time
"""


@pytest.mark.parametrize(
    ("text", "n"),
    [
        (VIDEO, 256),
        ("causal & (recent(9) | strided(24)) & q % 3 != 1", 500),
        ("window(5) & k // 4 != q // 4", 260),
        ("k - q in 3..9 & q % 5 < 2", 333),
    ],
    ids=["grid", "causal", "window", "ahead"],
)
def test_rows_of_few_keys_are_looked_at_as_runs_of_many_are_found(
    text: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> list[tuple[Any, dict[str, Any]]]:
        arrays = [Arrays() for _ in planned(text, n).options[0]]
        options = zip(planned(text, n).options[0], arrays, strict=True)
        return [(written_option(option, into), into.named) for option, into in options]

    by_points = written()
    monkeypatch.setattr(lower_shapes, "FEW_KEYS", 0)
    for (option, arrays), (other, others) in zip(by_points, written(), strict=True):
        assert option == other
        assert arrays.keys() == others.keys()
        assert all((arrays[name] == others[name]).all() for name in arrays)


def test_a_grid_is_planned_without_a_search_for_runs_in_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counted(relation: Relation, sizes: Sizes, lookup: Lookup, row: int) -> Runs:
        rows.append(row)
        return row_runs(relation, sizes, lookup, row)

    monkeypatch.setattr(lower_shapes, "row_runs", counted)
    planned(VIDEO, 256)
    assert len(rows) < 64, "of 64 that a period has"


@pytest.mark.parametrize("text", ["recent(4)", "window(100)", "causal & dilated(63, 4)", "blocks(64, window(1))"])
def test_how_far_a_band_reaches_is_asked_of_one_period(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visited = []

    def counted(*about: Any, **how: Any) -> Tiles:
        found = find_tiles(*about, **how)
        visited.append(found.num_visited)
        return found

    monkeypatch.setattr(lower_shapes, "find_tiles", counted)
    (options,) = planned(text, 1 << 22).options
    assert isinstance(options[0].passes[0].piece.shape, Band)
    assert max(visited) < 2000, "not of every query"


@pytest.mark.parametrize(
    ("text", "is_band"),
    [("recent(9) | q - k == 201", False), ("recent(9) | k - q == 150", False), ("recent(9) & q - k != 200", True)],
)
def test_what_few_queries_reach_makes_no_band(text: str, is_band: bool) -> None:
    """The queries in the middle, which are looked at, have no key so far away."""
    (options,) = planned(text, 300).options
    assert isinstance(options[0].passes[0].piece.shape, Band) == is_band


def test_plans_are_the_same_twice() -> None:
    text = "causal & (recent(64) | strided(64)) | blocks(32, random(2))"
    first, second = (planned(text, 2000) for _ in range(2))
    assert [option.text for option in first.options[0]] == [option.text for option in second.options[0]]
    texts = [[item.text for item in found.passes] for found in (first, second)]
    assert texts[0] == texts[1]


def test_work_follows_the_pattern_and_not_the_square() -> None:
    """A plan of a million positions is made of views: nothing in it has a million entries."""
    found = planned("causal & (recent(1024) | strided(1024))", 1 << 20)
    for item in found.passes:
        assert not isinstance(item.piece.shape, Sparse)
        if isinstance(item.piece.shape, Band | Masked):
            assert item.piece.shape.mask.size < 1 << 21
