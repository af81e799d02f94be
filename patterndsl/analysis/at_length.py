"""What does a head keep and compute at one length? Pairs, rows and tiles, counted in the live tiles.

Full tiles are known; in partial ones every pair is looked at, and where they are too many, those of some of them. Where
the tiles themselves are too many, pairs follow from the formula alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from patterndsl.analysis.figure import Certainty, Figure
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.pairs import NoFormula, row_lengths
from patterndsl.analysis.policy import CachePolicy, Policy
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import indices
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound, HeadGroup, Sizes

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

MAX_COUNTED = 1 << 24
"""Pairs of partial tiles that are looked at one by one."""
FEW = 256
"""Indices of a relation up to which a pair is looked at in the usual time."""
CHUNK = 1 << 20
EFFORT = 1 << 16
MAX_LENGTH = 1 << 24
"""Of longer sequences no row and no tile is looked at."""
MAX_TILES = 1 << 23
"""Tiles that are counted, in a few seconds; whether they are more is told by tiles of COARSE times the side."""
COARSE = 8


@dataclass(frozen=True, slots=True)
class HeadFigures:
    """What one head has at a length. least_row, greatest_row: keys of a query; None where rows were not counted.

    tiles; computed, the pairs in them: None where they are too many to count. cache: keys that a decoder holds for this
    head in the worst step; None where there is no cache policy.
    """

    pairs: Figure
    least_row: Figure | None
    greatest_row: Figure | None
    tiles: Figure | None
    computed: Figure | None
    cache: Figure | None


def head_figures(
    group: HeadGroup,
    bound: Bound,
    lookup: Lookup,
    block: int,
    found: Formula | NoFormula,
    upper: Formula | None,
    policy: Policy,
    values: Mapping[str, int],
) -> HeadFigures | None:
    """The figures of each head of a group; None where nothing is known. values: the length and the parameters, for the
    formulas. upper: what bounds the pairs."""
    n = bound.sizes.total
    tiles = _tiles(group, bound, lookup, block)
    sure: Certainty = "UpperBound" if tiles is not None and tiles.num_guessed else "Exact"
    pairs = rows = None
    if isinstance(found, Formula) and (number := found.at(values)) is not None:
        pairs = Figure(number, "Exact", "pairs", "formula")
        of_rows = row_lengths(found.affine) if n <= MAX_LENGTH else None
        rows = None if of_rows is None else of_rows.at(values)
    if tiles is not None and (pairs is None or rows is None):
        counted, rows = _counted(group, bound, lookup, tiles)
        pairs = pairs or counted
    if pairs is None and upper is not None and (number := upper.at(values)) is not None:
        pairs = Figure(min(number, n * bound.sizes.kv_len), "UpperBound", "pairs", "formula")
    if pairs is None:
        return None
    return HeadFigures(
        pairs,
        Figure(int(rows.min()), "Exact", "keys") if rows is not None and n else None,
        Figure(int(rows.max()), "Exact", "keys") if rows is not None and n else None,
        Figure(tiles.num_tiles, sure, "tiles") if tiles is not None else None,
        Figure(area(tiles, bound.sizes), sure, "pairs") if tiles is not None else None,
        _held(policy, values, n) if isinstance(policy, CachePolicy) else None,
    )


def _tiles(group: HeadGroup, bound: Bound, lookup: Lookup, block: int) -> Tiles | None:
    """The live tiles, unless they are too many."""
    n, num_keys = bound.sizes.total, bound.sizes.kv_len
    if max(n, num_keys) > MAX_LENGTH:
        return None
    if (n // block) * (num_keys // block) > MAX_TILES:
        side = COARSE * block
        coarse = find_tiles(group.relation, bound.sizes, lookup, side, side, tell_full=False, effort=EFFORT)
        if coarse.num_tiles * COARSE**2 > MAX_TILES:
            return None
    return find_tiles(group.relation, bound.sizes, lookup, block, block, effort=EFFORT)


def area(tiles: Tiles, sizes: Sizes) -> int:
    """Pairs in live tiles of all positions: whole blocks, but no position that is not there."""
    return int((_height(tiles, sizes.total) * _width(tiles, sizes.kv_len)).sum())


def _height(tiles: Tiles, n: int) -> Any:
    return np.minimum(tiles.q_block, n - tiles.q_blks * tiles.q_block)


def _width(tiles: Tiles, num_keys: int) -> Any:
    return np.minimum(tiles.kv_block, num_keys - tiles.kv_blks * tiles.kv_block)


def _counted(group: HeadGroup, bound: Bound, lookup: Lookup, tiles: Tiles) -> tuple[Figure, Integers | None]:
    """The pairs, and the keys of each query: int64 [n], None where only some tiles were looked at."""
    n, full = bound.sizes.total, tiles.is_full
    partial = np.flatnonzero(~full)
    most = max(
        1, int(MAX_COUNTED / (tiles.q_block * tiles.kv_block) / max(1.0, sum(1 for _ in indices(group.relation)) / FEW))
    )
    looked = partial
    if len(partial) > most:
        looked = np.sort(np.random.default_rng(0).choice(partial, most, replace=False))
    rows = np.zeros(n, dtype=np.int64)
    for q, kept in _kept(group, bound, lookup, tiles, looked):
        np.add.at(rows, q, kept)
    inside = np.arange(tiles.q_block)
    q = (tiles.q_blks[full] * tiles.q_block)[:, None] + inside
    whole = np.zeros(n, dtype=np.int64)
    np.add.at(whole, q[q < n], np.broadcast_to(_width(tiles, bound.sizes.kv_len)[full][:, None], q.shape)[q < n])
    if len(looked) == len(partial):
        return Figure(int(rows.sum() + whole.sum()), "Exact", "pairs", "enumeration"), rows + whole
    estimate = whole.sum() + rows.sum() * len(partial) / len(looked)
    return Figure(
        float(round(estimate)), "Expected", "pairs", f"{len(looked):,} of {len(partial):,} partial tiles"
    ), None


def _kept(
    group: HeadGroup, bound: Bound, lookup: Lookup, tiles: Tiles, looked: Integers
) -> Iterator[tuple[Integers, Integers]]:
    """Queries of partial tiles, and how many keys of the tile each has."""
    n, num_keys = bound.sizes.total, bound.sizes.kv_len
    step = max(1, CHUNK // (tiles.q_block * tiles.kv_block))
    for start in range(0, len(looked), step):
        part = looked[start : start + step]
        q = (tiles.q_blks[part] * tiles.q_block)[:, None, None] + np.arange(tiles.q_block)[:, None]
        k = (tiles.kv_blks[part] * tiles.kv_block)[:, None, None] + np.arange(tiles.kv_block)
        point = Point(np.minimum(q, n - 1), np.minimum(k, num_keys - 1), group.heads[0], lookup)
        holds = member(group.relation, point) & (q < n) & (k < num_keys)
        kept = np.broadcast_to(holds, (len(part), tiles.q_block, tiles.kv_block)).sum(axis=2)
        queries = q[:, :, 0]
        yield queries[queries < n], kept[queries < n]


def _held(policy: CachePolicy, values: Mapping[str, int], n: int) -> Figure | None:
    """The most keys of a step where that is known, else those of the last one."""
    params = {name: value for name, value in values.items() if name != "N"}
    if n == 0:
        return Figure(0, policy.certainty, "keys")
    most = policy.most_at(params, n)
    if most is not None and most <= n:
        return Figure(most, policy.certainty, "keys", "the most of any step")
    last = policy.size_at(n - 1, params, n)
    return None if last is None else Figure(last, policy.certainty, "keys", "at the last step")
