"""What does a cell look like inside? Everything, a triangle, a band, a small mask, a few keys here and there, or tiles.

The first four run as dense attention on views, keys one by one, tiles as block-sparse attention. What is said is exact:
a shape is taken only where the relation is that, by its normal form or by a descent that finds no pair to tell them
apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, TypeAlias

import numpy as np

from patterndsl.ir.draws import constant
from patterndsl.ir.index import Arithmetic, Const, Index, K, Param, Q, Var, arithmetic, operands
from patterndsl.ir.linear import Frame
from patterndsl.ir.meaning import Point, member, value
from patterndsl.ir.relation import (
    EVERYTHING,
    NOTHING,
    And,
    Compare,
    Listed,
    Random,
    Relation,
    children,
    conjunction,
    direct_indices,
    disjunction,
    subexpressions,
)
from patterndsl.lower.gather import Blocks, fitting_tiles
from patterndsl.lower.geometry import Geometry, Integers, whole
from patterndsl.lower.layout import Cell, Span
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.order import Order, placed
from patterndsl.lower.row import row_runs
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.parameters import Sizes

Truths: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Orders: TypeAlias = tuple[Order, Order]
"""Of queries and of keys."""

MAX_PERIOD = 256
"""Rows after which a band repeats."""
MAX_MASK = 1 << 21
"""Pairs of a mask that is kept and applied as it is."""
STRIP, MAX_STRIPS = 256, 32
"""Queries of a strip where a scattered relation is masked strip by strip, and the most strips."""
MIN_DENSITY = 0.125
"""Where a mask keeps more, no tiles are looked for."""
GATHERING = 2.5
"""How many times as long a pair takes in gathered tiles as under a mask."""


@dataclass(frozen=True, slots=True)
class Full:
    """Every query attends every key."""


@dataclass(frozen=True, slots=True)
class Triangle:
    """Query i attends keys 0..i; as many keys as queries."""


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Tiles of queries that all attend alike: tile t, queries [t * tile, (t + 1) * tile), attends among the keys
    [t * tile, t * tile + width) as mask [tile, width] says. The keys are those of the geometry from its first on."""

    tile: int
    mask: Truths


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """mask [q_len, kv_len], the same for every group."""

    mask: Truths


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """Tiles in local positions, the same for every group; `relation` decides the partial ones. finer: the same pairs by
    smaller tiles, where a kernel takes these in inference alone and they save. orders: those of queries and keys that
    the tiles are of, where these are taken in another order than their own; the relation is of positions all the
    same."""

    tiles: Tiles
    relation: Relation
    finer: Tiles | None = None
    orders: Orders | None = None

    @property
    def in_inference(self) -> Tiles:
        """The tiles of a forward pass that nobody trains with."""
        return self.tiles if self.finer is None else self.finer

    def tiles_by(self, sizes: Sizes, q_block: int, kv_block: int) -> Tiles:
        """The pairs by tiles of this size, found again where they are known by another."""
        if (q_block, kv_block) == (self.tiles.q_block, self.tiles.kv_block):
            return self.tiles
        relation, lookup = (self.relation, Lookup()) if self.orders is None else placed(self.relation, *self.orders)
        return find_tiles(relation, sizes, lookup, q_block, kv_block)


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """A few keys of each query, in local positions: int64 [q_len, width], -1 for none."""

    keys: Integers


def num_runs(tiles: Tiles) -> int:
    """Runs of neighbouring tiles of one block of queries, over all of these."""
    follows = (np.diff(tiles.q_blks) == 0) & (np.diff(tiles.kv_blks) == 1)
    return tiles.num_tiles - int(np.count_nonzero(follows))


def num_rows(tiles: Tiles) -> int:
    """Blocks of queries that have a tile."""
    return int(np.count_nonzero(np.bincount(tiles.q_blks)))


def longest_row(tiles: Tiles) -> int:
    """The most tiles that a block of queries has."""
    return int(np.bincount(tiles.q_blks).max(initial=0))


def longest_column(tiles: Tiles) -> int:
    """The most tiles that a block of keys has."""
    return int(np.bincount(tiles.kv_blks).max(initial=0))


Shape: TypeAlias = Full | Triangle | Band | Masked | Keys | Sparse


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the kernels of a device take well.

    bands: whether masks and overlapping views are welcome. blocks: (q_block, kv_block) of what is block-sparse, coarse
    to fine; a finer one is taken where it computes less by the factor `saving`. finer: those of inference beyond them.
    mask_pairs: of all strips of a relation, where it is masked strip by strip. single_keys: whether a kernel takes what
    is drawn key by key.
    """

    bands: bool
    blocks: Blocks
    saving: float
    finer: Blocks
    mask_pairs: int = 0
    single_keys: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """A geometry and how its groups look inside."""

    geometry: Geometry
    shape: Shape

    @property
    def num_computed(self) -> int:
        """Pairs that are computed, kept or not, over all groups."""
        match self.shape:
            case Full() | Masked():
                return self.geometry.num_pairs
            case Triangle():
                return self.geometry.num_pairs // 2
            case Band(_, mask):
                return self.geometry.num_rows * int(mask.shape[1])
            case Keys(keys):
                return int(keys.size)
            case Sparse(tiles):
                return tiles.num_tiles * tiles.q_block * tiles.kv_block * self.geometry.num_groups


def pieces(cell: Cell, lookup: Lookup, wanted: Wanted, *, sparse: bool) -> list[Piece] | None:
    """The cell as pieces that hold each of its pairs once; None where some are block-sparse and not `sparse`. Work:
    O(live tiles)."""
    geometry, relation = cell.geometry, cell.relation
    if relation == NOTHING:
        return []
    if relation == EVERYTHING:
        return [Piece(geometry, Full())]
    if wanted.single_keys and (keys := _single_keys(cell, lookup)) is not None:
        return [Piece(geometry, Keys(keys))] if keys.size else []
    found = _triangle(cell, lookup)
    if found is None and wanted.bands:
        found = _band(cell, lookup, wanted)
    if found is not None:
        return found if sparse or not any(isinstance(piece.shape, Sparse) for piece in found) else None
    mask = None
    if geometry.q.length * geometry.k.length <= MAX_MASK:
        mask = _mask(relation, (0, geometry.q.length), (0, geometry.k.length), lookup)
        if mask.all():
            return [Piece(geometry, Full())]
        if not mask.any():
            return []
        if wanted.bands and mask.mean() > MIN_DENSITY:
            return [Piece(geometry, Masked(mask))]
    if not sparse:
        return None
    tiles = fitting_tiles(relation, cell.sizes, lookup, wanted.blocks, wanted.saving)
    if not tiles.num_tiles:
        return []
    area = tiles.num_tiles * tiles.q_block * tiles.kv_block
    if wanted.bands and mask is not None and mask.size < GATHERING * area:
        return [Piece(geometry, Masked(mask))]
    if wanted.bands and mask is None and len(geometry.q.axes) == len(geometry.k.axes) == 1:
        strips = list(_strips(cell, tiles))
        masked = sum((q[1] - q[0]) * (k[1] - k[0]) for q, k in strips)
        if masked < min(GATHERING * area, wanted.mask_pairs) and len(strips) <= MAX_STRIPS:
            return [Piece(geometry.narrowed(q, k), Masked(_mask(relation, q, k, lookup))) for q, k in strips]
    return [Piece(geometry, Sparse(tiles, relation, _finer(tiles, relation, cell.sizes, lookup, wanted)))]


def _finer(tiles: Tiles, relation: Relation, sizes: Sizes, lookup: Lookup, wanted: Wanted) -> Tiles | None:
    unit = (tiles.q_block, tiles.kv_block)
    finer = fitting_tiles(relation, sizes, lookup, (unit, *wanted.finer), wanted.saving) if wanted.finer else tiles
    return None if (finer.q_block, finer.kv_block) == unit else finer


def in_order(relation: Relation, sizes: Sizes, orders: Orders, wanted: Wanted, each: int | None = None) -> Piece:
    """A relation of absolute positions as tiles of all of these in another order. Work: O(live tiles) where the order
    fits the relation; each: see `find_tiles`, where it may not."""
    frame = Frame({Q: arithmetic("+", Q, Const(sizes.q_start))}, {Q: (0, sizes.q_len - 1), K: (0, sizes.kv_len - 1)})
    local, inside = frame.relation(relation), Sizes(sizes.q_len, sizes.kv_len, 0, sizes.q_len)
    by_place, lookup = placed(local, *orders)
    tiles = fitting_tiles(by_place, inside, lookup, wanted.blocks, wanted.saving, each)
    finer = _finer(tiles, by_place, inside, lookup, wanted)
    return Piece(whole(sizes.q_len, sizes.kv_len), Sparse(tiles, local, finer, orders))


LONGEST_TILED = 1024
"""Queries and keys of a group that may be tiles although it is dense."""


def tiled(piece: Piece, blocks: tuple[int, int]) -> Piece | None:
    """A full or causal piece of short groups as tiles; None where it is another."""
    geometry = piece.geometry
    is_short = max(geometry.q.length, geometry.k.length) <= LONGEST_TILED
    if not geometry.groups or not is_short or not isinstance(piece.shape, Full | Triangle):
        return None
    relation = Compare("<=", K, Q) if isinstance(piece.shape, Triangle) else EVERYTHING
    sizes = Sizes(geometry.q.length, geometry.k.length, 0, geometry.q.length)
    return Piece(geometry, Sparse(find_tiles(relation, sizes, Lookup(), *blocks), relation))


def _strips(cell: Cell, tiles: Tiles) -> Iterator[tuple[Span, Span]]:
    """Spans of queries that hold all pairs of the relation, each with the span of keys that it reaches; neighbours that
    reach the same keys are one."""
    height = -(-STRIP // tiles.q_block) * tiles.q_block  # whole tiles
    in_strip, before = tiles.q_blks * tiles.q_block // height, None
    for strip in np.unique(in_strip).tolist():
        kv_blks = tiles.kv_blks[in_strip == strip]
        first, stop = int(kv_blks.min()) * tiles.kv_block, (int(kv_blks.max()) + 1) * tiles.kv_block
        q = (strip * height, min((strip + 1) * height, cell.geometry.q.length))
        k = (first, min(stop, cell.geometry.k.length))
        if before is not None and before[1] == k and before[0][1] == q[0]:
            before = ((before[0][0], q[1]), k)
            continue
        if before is not None:
            yield before
        before = (q, k)
    if before is not None:
        yield before


def _mask(relation: Relation, q: Span, k: Span, lookup: Lookup) -> Truths:
    point = Point(np.arange(*q)[:, None], np.arange(*k), 0, lookup)
    shape = (q[1] - q[0], k[1] - k[0])
    return np.ascontiguousarray(np.broadcast_to(member(relation, point), shape))


# ---- single keys


SCATTER = 32
"""How many keys a query could attend for each that is drawn for it, from which on these are taken one by one: below it
tiles hold so many of them that computing the rest costs less (not yet measured between 16 and 128)."""


def _single_keys(cell: Cell, lookup: Lookup) -> Integers | None:
    """The keys of each query as `Keys` has them, where they are among a few that are drawn for it; else None."""
    terms = cell.relation.terms if isinstance(cell.relation, And) else (cell.relation,)
    for node in terms:
        if not isinstance(node, Random) or cell.geometry.groups or K in subexpressions(node.q):
            continue
        offset, count = _key_offset(node.k), constant(node.count)
        if offset is None or not 0 < count * SCATTER <= cell.geometry.k.length:
            continue
        q = np.arange(cell.geometry.q.length)
        rows = np.broadcast_to(value(node.q, Point(q, 0, 0, lookup)), q.shape)
        found = np.stack(list(lookup.drawn(node, 0, rows)), axis=1) - offset
        inside = (found >= 0) & (found < cell.geometry.k.length)
        keys = np.where(inside, found, 0)
        kept = inside & np.asarray(member(cell.relation, Point(q[:, None], keys, 0, lookup)))
        keys = np.where(kept, keys, -1)
        order = np.argsort(~kept, axis=1, kind="stable")  # those that are there come first
        return np.take_along_axis(keys, order, axis=1)[:, : int(kept.sum(axis=1).max(initial=0))]
    return None


def _key_offset(index: Index) -> int | None:
    """c where an index is k + c."""
    match index:
        case Var("k"):
            return 0
        case Arithmetic("+", Var("k"), Const(number)) | Arithmetic("+", Const(number), Var("k")):
            return number
        case Arithmetic("-", Var("k"), Const(number)):
            return -number
    return None


# ---- triangles


def _triangle(cell: Cell, lookup: Lookup) -> list[Piece] | None:
    """k <= q - offset as a square with a triangle, and whole rows beside it; None where it is not that."""
    relation, geometry = cell.relation, cell.geometry
    q_len, kv_len = geometry.q.length, geometry.k.length
    offset = _offset(cell, lookup)
    if offset is None or len(geometry.q.axes) > 1 or len(geometry.k.axes) > 1:
        return None
    frame = Frame({}, {Q: (0, q_len - 1), K: (0, kv_len - 1)})
    if relation != frame.relation(Compare("<=", K, arithmetic("-", Q, Const(offset)))):
        return None
    before = min(kv_len, max(0, -offset))  # keys that come before every query
    first = max(0, offset)  # the first query with a key
    size = min(q_len - first, kv_len - before)
    found = []
    if before:
        found.append(Piece(geometry.narrowed((0, q_len), (0, before)), Full()))
    if size > 0:
        square = geometry.narrowed((first, first + size), (before, before + size))
        found.append(Piece(square, Triangle()))
        if first + size < q_len:
            found.append(Piece(geometry.narrowed((first + size, q_len), (before, before + size)), Full()))
    return found


def _offset(cell: Cell, lookup: Lookup) -> int | None:
    """How far the last key of a row lies before its query, if some row ends inside the keys."""
    q_len, kv_len = cell.geometry.q.length, cell.geometry.k.length
    for row in dict.fromkeys((q_len - 1, q_len // 2, 0)):
        runs = row_runs(cell.relation, cell.sizes, lookup, row)
        if len(runs.starts) == 1 and runs.starts[0] == 0 and 0 < runs.stops[0] < kv_len:
            return row - int(runs.stops[0]) + 1
    # the last row holds every key: then the offset is the one that lets it do so by a hair
    return q_len - kv_len if cell.relation != EVERYTHING else None


# ---- bands


def _band(cell: Cell, lookup: Lookup, wanted: Wanted) -> list[Piece] | None:
    """Tiles of one mask where the relation repeats along the diagonal, and what lies at both ends."""
    relation, geometry = cell.relation, cell.geometry
    period = _period(relation)
    if period is None or len(geometry.q.axes) > 1 or len(geometry.k.axes) > 1:
        return None
    q_len, kv_len = geometry.q.length, geometry.k.length
    if q_len // _tile(period, 0) < MIN_TILES:  # too few of the smallest tiles, however far queries reach
        return None
    reach = _reach(cell, lookup, period)
    if reach is None:
        return None
    left, right = reach
    if left == right == 0 and period > 1:
        return None  # blocks along the diagonal: they are groups
    if not _is_within(cell, lookup, period, (left, right)):
        return None
    tile = _tile(period, left + right)
    left = -(-left // period) * period  # whole periods, so that tiles start where masks do
    left += _padding(left + tile + right, period)
    first = max(0, -(-left // tile))  # tiles before the first key's would reach below key 0
    stop = min(q_len // tile, (kv_len - right) // tile)
    if stop - first < MIN_TILES:
        return None
    width = left + tile + right
    mask = _mask(_shifted(relation, first * tile, first * tile - left), (0, tile), (0, width), lookup)
    rows, keys = (first * tile, stop * tile), (first * tile - left, stop * tile + right)
    found = [Piece(geometry.narrowed(rows, keys), Band(tile, mask))]
    for q, k in (((0, rows[0]), (0, min(kv_len, rows[0] + right))), ((rows[1], q_len), (rows[1] - left, kv_len))):
        if q[0] < q[1]:
            k = (max(0, k[0]), k[1])
            inner = Frame({}, {Q: (0, q[1] - q[0] - 1), K: (0, k[1] - k[0] - 1)})
            part = Cell(geometry.narrowed(q, k), inner.relation(_shifted(relation, q[0], k[0])))
            found.extend(_end(part, lookup, wanted))
    return found


def _end(cell: Cell, lookup: Lookup, wanted: Wanted) -> list[Piece]:
    """What lies before the first or behind the last tile of a band: small, so a mask will do."""
    triangle = _triangle(cell, lookup)
    if triangle is not None or cell.relation in (NOTHING, EVERYTHING):
        return triangle or pieces(cell, lookup, replace(wanted, bands=False), sparse=True) or []
    if cell.geometry.q.length * cell.geometry.k.length > MAX_MASK:
        return pieces(cell, lookup, replace(wanted, bands=False), sparse=True) or []
    mask = _mask(cell.relation, (0, cell.geometry.q.length), (0, cell.geometry.k.length), lookup)
    if not mask.any():
        return []
    return [Piece(cell.geometry, Full() if mask.all() else Masked(mask))]


MIN_TILES = 4
"""Fewer tiles of a band are not worth their ends."""


def _tile(period: int, reach: int) -> int:
    """Rows of a tile, a multiple of the period: some 64, fewer where the band is narrow."""
    rows = 64 if reach >= 64 else 32
    return max(1, rows // period) * period


LANES = 16
"""Keys that vector units take at once: a row of scores that is a multiple of it has no slow end."""


def _padding(width: int, period: int) -> int:
    """Keys more, whole periods of them, that make the width a multiple of LANES; 0 where that takes an eighth more."""
    most = min(LANES * period, width // 8 + 1)
    return next((more for more in range(0, most, period) if (width + more) % LANES == 0), 0)


def _shifted(relation: Relation, q: int, k: int) -> Relation:
    """The relation with positions counted from q and k."""
    put: dict[Var | Param, Index] = {Q: arithmetic("+", Q, Const(q)), K: arithmetic("+", K, Const(k))}
    return Frame(put, {}).relation(relation)


def _period(relation: Relation) -> int | None:
    """By how many positions both sides can be moved without a change; None where that is too far or not at all."""
    period = 1
    for modulus in _moduli(relation):
        period = lcm(period, modulus)
        if period > MAX_PERIOD:
            return None
    plain = Frame({}, {}).relation(relation)
    return period if _shifted(plain, period, period) == plain else None


def _moduli(relation: Relation) -> Iterator[int]:
    if isinstance(relation, Random | Listed):
        yield MAX_PERIOD + 1
    for index in direct_indices(relation):
        yield from _divisors(index)
    for child in children(relation):
        yield from _moduli(child)


def _divisors(index: Index, inner: int = 1) -> Iterator[int]:
    if isinstance(index, Arithmetic) and index.op in ("//", "%") and isinstance(index.right, Const):
        inner *= index.right.value
        yield inner
    for operand in operands(index):
        yield from _divisors(operand, inner)


def _reach(cell: Cell, lookup: Lookup, period: int) -> tuple[int, int] | None:
    """How far queries reach back and ahead, (left, right) from the start of a period; None where they reach an end."""
    q_len, kv_len = cell.geometry.q.length, cell.geometry.k.length
    start = min(q_len, kv_len) // 2 // period * period
    left = right = -(1 << 40)
    if start + period > min(q_len, kv_len):
        return None
    for low, high in _ends(cell, lookup, (start, start + period)):
        if low == 0 or high == kv_len:
            return None
        left, right = max(left, start - low), max(right, high - start - period)
    return None if left == -(1 << 40) else (left, right)


FEW_KEYS = 1 << 12
"""So many keys of a row are looked at sooner than runs of them are found."""


def _ends(cell: Cell, lookup: Lookup, rows: Span) -> Iterator[Span]:
    """From the first key to the last of each row that has any."""
    kv_len = cell.geometry.k.length
    if kv_len <= FEW_KEYS:
        for kept in _mask(cell.relation, rows, (0, kv_len), lookup):
            keys = kept.nonzero()[0]
            if len(keys):
                yield int(keys[0]), int(keys[-1]) + 1
        return
    for row in range(*rows):
        runs = row_runs(cell.relation, cell.sizes, lookup, row)
        if len(runs.starts):
            yield int(runs.starts[0]), int(runs.stops[-1])


def _is_within(cell: Cell, lookup: Lookup, period: int, reach: tuple[int, int]) -> bool:
    """Whether no query at all reaches further than those that were looked at.

    Only the queries of one period are asked, of keys as far before them as any lies before its query: all others see
    the same, moved along the diagonal.
    """
    q_len, kv_len = cell.geometry.q.length, cell.geometry.k.length
    moved = -(-q_len // period) * period
    below = Compare("<=", arithmetic("+", K, Const(reach[0] + 1)), Const(moved))
    above = Compare("<=", Const(moved + period + reach[1]), K)
    beyond = conjunction((_shifted(cell.relation, 0, -moved), disjunction((below, above))))
    return find_tiles(beyond, Sizes(period, moved + kv_len, 0, period), lookup, 64, 64, tell_full=False).num_tiles == 0


__all__ = ["Band", "Full", "Masked", "Piece", "Shape", "Sparse", "Triangle", "Wanted", "pieces", "tiled"]
