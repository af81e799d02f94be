"""What does a pattern look like at every zoom, down to single pairs? A quadtree whose equal boxes are one node.

Two boxes of a pattern of shifts, strides and blocks often hold the same picture: `(q - k) % 128` looks alike wherever
the corner has the same residue. Boxes are told apart only by what their corner brings into the undecided comparisons,
so a million positions need a few hundred nodes, not billions. Draws and inputs have no such symmetry; their trees end
at a number of nodes, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import numpy as np

from patterndsl.ir.index import Arithmetic, Const, Function, Index, Param, Read, Select, Var
from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import And, Compare, Everything, Holds, Listed, Not, Nothing, Or, Random, Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import OnEvent
from patterndsl.sema.parameters import Sizes

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

EMPTY, PARTIAL, FULL, FIRST_NODE = 0, 1, 2, 3
"""What a box is: one of three states, or FIRST_NODE + the number of its node in the next level."""
_OUTSIDE = -1
MAX_NODES = 1 << 18
_SAMPLES = 16


@dataclass(frozen=True, slots=True, eq=False)
class Quadtree:
    """Boxes of 2^depth positions halved level by level, counted from (q_start, 0); equal boxes share a node.

    levels[at]: int64 [num_nodes, 4], the codes of the quarters of a box of 2^(depth - at) positions: upper left, upper
    right, lower left, lower right, where lower means later queries. What lies outside the lengths counts as empty.
    finest: size of the boxes where it ends, 1 where every pair is told. A PARTIAL code stands only there.
    exact: False where some of those could be empty or full after all.
    """

    depth: int
    root: int
    levels: tuple[Array, ...]
    sizes: Sizes
    finest: int
    exact: bool

    @property
    def num_nodes(self) -> int:
        return sum(len(level) for level in self.levels)

    def states(self, cell: int) -> Array:
        """uint8 [rows, columns]: EMPTY, PARTIAL or FULL for each cell of `cell` positions, a power of two >= finest."""
        codes = np.full((1, 1), self.root, dtype=np.int64)
        size = 1 << self.depth
        for level in self.levels:
            if size <= cell:
                break
            quarters = np.repeat(codes[..., None], 4, axis=-1)
            is_node = codes >= FIRST_NODE
            quarters[is_node] = level[codes[is_node] - FIRST_NODE]
            size //= 2
            rows, columns = codes.shape
            codes = quarters.reshape(rows, columns, 2, 2).swapaxes(1, 2).reshape(2 * rows, 2 * columns)
            codes = codes[: _ceildiv(self.sizes.q_len, size), : _ceildiv(self.sizes.kv_len, size)]
        if size > cell:  # decided before the levels ran out
            codes = codes.repeat(size // cell, axis=0).repeat(size // cell, axis=1)
        codes = codes[: _ceildiv(self.sizes.q_len, cell), : _ceildiv(self.sizes.kv_len, cell)]
        return np.where(codes >= FIRST_NODE, PARTIAL, codes).astype(np.uint8)


def _ceildiv(a: int, b: int) -> int:
    return -(-a // b)


def grow(
    relation: Relation,
    sizes: Sizes,
    lookup: Lookup,
    max_nodes: int = MAX_NODES,
    on_event: OnEvent | None = None,
) -> Quadtree:
    """The quadtree of a bound relation, as deep as max_nodes allows. Work: O(nodes x nodes of the relation)."""
    depth = max(0, max(sizes.q_len, sizes.kv_len) - 1).bit_length()
    if not sizes.q_len or not sizes.kv_len:
        return Quadtree(depth, EMPTY, (), sizes, 1, True)
    corner = (np.array([sizes.q_start]), np.array([0]))
    codes, _, _ = _judged(relation, sizes, lookup, corner, 1 << depth, max_nodes)
    finest, exact = 1 << depth, True
    levels: list[Array] = []
    q_at, k_at = corner
    room = max_nodes - 1
    is_open = codes[0] >= FIRST_NODE
    while is_open and len(q_at) and finest > 1:
        if on_event:
            on_event("drawing", len(levels), depth)
        half = finest // 2
        quarters = (
            (q_at[:, None] + np.array([0, 0, half, half])).reshape(-1),
            (k_at[:, None] + np.array([0, half, 0, half])).reshape(-1),
        )
        codes, q_at, k_at = _judged(relation, sizes, lookup, quarters, half, room)
        finest = half
        levels.append(codes.reshape(-1, 4))
        room -= len(q_at)
    unresolved = (codes == PARTIAL) if levels else np.zeros(0, dtype=bool)
    if unresolved.any():
        exact = _all_mixed(relation, sizes, lookup, tuple(part[unresolved] for part in quarters), finest)
    root, merged = _merged(codes if not levels else np.array([FIRST_NODE]), levels)
    return Quadtree(depth, root, merged, sizes, finest if unresolved.any() else 1, exact)


# ---- one level down -------------------------------------------------------------------------------------------


def _judged(
    relation: Relation, sizes: Sizes, lookup: Lookup, corners: tuple[Array, Array], size: int, room: int
) -> tuple[Array, Array, Array]:
    """The code of each box, and a corner of each new node; PARTIAL for what there is no room to go on with."""
    q_at, k_at = corners
    inside = (q_at < sizes.q_start + sizes.q_len) & (k_at < sizes.kv_len)
    codes = np.full(q_at.shape, _OUTSIDE, dtype=np.int64)
    box = _box(q_at[inside], k_at[inside], size, sizes, lookup)
    certain, possible = (_spread(truth, box) for truth in verdict(relation, box))
    codes[inside] = np.where(certain, FULL, np.where(possible, PARTIAL, EMPTY))
    undecided = codes == PARTIAL
    q_at, k_at = q_at[undecided], k_at[undecided]
    if not len(q_at) or size == 1:
        return codes, q_at[:0], k_at[:0]
    box = _box(q_at, k_at, size, sizes, lookup)
    columns = [box.q[1] - box.q[0], box.k[1] - box.k[0], *_signature(relation, box, np.ones(q_at.shape, dtype=bool))]
    first, number = _alike(columns)
    if len(first) > room:
        return codes, q_at[:0], k_at[:0]
    codes[undecided] = FIRST_NODE + number
    return codes, q_at[first], k_at[first]


def _box(q_at: Array, k_at: Array, size: int, sizes: Sizes, lookup: Lookup) -> Box:
    """Boxes cut to the positions that exist."""
    q_high = np.minimum(q_at + (size - 1), sizes.q_start + sizes.q_len - 1)
    return Box((q_at, q_high), (k_at, np.minimum(k_at + (size - 1), sizes.kv_len - 1)), lookup)


def _spread(truth: Any, box: Box) -> Array:
    return np.broadcast_to(np.asarray(truth, dtype=bool), box.q[0].shape)


def _alike(columns: Iterable[Array]) -> tuple[Array, Array]:
    """Groups of equal rows: the first row of each, and the number of each row's group."""
    varying = [column for column in columns if len(column) and (column != column[0]).any()]
    code = np.zeros(0, dtype=np.int64)
    width = 1
    packed: list[Array] = []
    for column in varying:
        values, place = np.unique(column, return_inverse=True)
        if not packed or width * len(values) >= 1 << 62:
            packed.append(place)
            width = len(values)
            continue
        packed[-1] = packed[-1] * len(values) + place
        width *= len(values)
    while len(packed) > 1:  # pairs of columns become one, until one is left
        (_, a), (_, b) = (np.unique(packed.pop(), return_inverse=True) for _ in range(2))
        packed.append(a * (int(b.max()) + 1) + b)
    if packed:
        code = packed[0]
    elif columns:
        code = np.zeros(len(next(iter(columns))), dtype=np.int64)
    _, first, number = np.unique(code, return_index=True, return_inverse=True)
    return first, number


# ---- what tells boxes apart ---------------------------------------------------------------------------------------


def _signature(relation: Relation, box: Box, matters: Array) -> Iterator[Array]:
    """Columns whose equality makes two boxes of one extent hold the same picture.

    What is decided, or cannot matter since something around it is decided, says nothing more.
    """
    certain, possible = (_spread(truth, box) for truth in verdict(relation, box))
    undecided = matters & possible & ~certain
    yield np.where(matters, 2 * undecided + certain, 0)
    match relation:
        case Everything() | Nothing():
            return
        case And(terms) | Or(terms):
            for term in terms:
                yield from _signature(term, box, undecided)
            return
        case Not(term):
            yield from _signature(term, box, undecided)
            return
        case Compare(_, left, right):
            (a, a_shape), (b, b_shape) = _index(left, box), _index(right, box)
            columns = [a - b, *a_shape, *b_shape]
        case Holds(read):
            columns = _index(read, box)[1]
        case Random(q=q, k=k) | Listed(row=q, key=k):
            columns = [column for part in (q, k) for column in _flat(_index(part, box))]
        case _:
            assert_never(relation)
    for column in columns:
        yield np.where(undecided, column, 0)


_Parts: TypeAlias = tuple[Any, list[Any]]


def _index(index: Index, box: Box) -> _Parts:
    """offset, shape: over a box the expression is `offset` plus a function of local positions that `shape` tells."""
    match index:
        case Const(number):
            return number, []
        case Var("q"):
            return box.q[0], []
        case Var("k"):
            return box.k[0], []
        case Var(name) | Param(name):
            raise AssertionError(f"{name} is not bound")
        case Arithmetic(op, left, right):
            return _arithmetic(op, _index(left, box), right, box)
        case Function(_, arguments):
            return 0, [column for argument in arguments for column in _flat(_index(argument, box))]
        case Select(items, at):
            assert not isinstance(items, str), f"the list {items} is not bound"
            return 0, [column for part in (*items, at) for column in _flat(_index(part, box))]
        case Read(_, _, at):
            return 0, _flat(_index(at, box))
        case _:
            assert_never(index)


def _flat(parts: _Parts) -> list[Any]:
    return [parts[0], *parts[1]]


def _arithmetic(op: str, left: _Parts, right: Index, box: Box) -> _Parts:
    (offset, shape), number = left, right.value if isinstance(right, Const) else None
    match op, number:
        case "+", _:
            other, other_shape = _index(right, box)
            return offset + other, [*shape, *other_shape]
        case "-", _:
            other, other_shape = _index(right, box)
            return offset - other, [*shape, *other_shape]
        case "*", int():
            return offset * number, shape
        case "//", int():
            return offset // number, [*shape, offset % number]
        case "%", int():
            return 0, [*shape, offset % number]
        case _:
            return 0, [offset, *shape, *_flat(_index(right, box))]


# ---- the ends ---------------------------------------------------------------------------------------------------


def _all_mixed(relation: Relation, sizes: Sizes, lookup: Lookup, corners: tuple[Array, ...], size: int) -> bool:
    """Whether samples show a kept and a dropped pair in every box."""
    box = _box(corners[0], corners[1], size, sizes, lookup)
    kept = np.zeros(corners[0].shape, dtype=bool)
    dropped = kept.copy()
    heights, widths = box.q[1] - box.q[0], box.k[1] - box.k[0]
    for turn in range(_SAMPLES):  # along both diagonals
        q = box.q[0] + heights * turn // (_SAMPLES - 1)
        for k in (box.k[0] + widths * turn // (_SAMPLES - 1), box.k[1] - widths * turn // (_SAMPLES - 1)):
            holds = _spread(member(relation, Point(q, k, 0, lookup)), box)
            kept |= holds
            dropped |= ~holds
    return bool((kept & dropped).all())


def _merged(root: Array, levels: list[Array]) -> tuple[int, tuple[Array, ...]]:
    """The tree from the leaves up: nodes whose quarters agree become states, nodes with equal quarters become one."""
    codes_below = np.arange(FIRST_NODE)
    merged: list[Array] = []
    for level in reversed(levels):
        quarters = np.where(level == _OUTSIDE, _OUTSIDE, codes_below[level])
        outside = quarters == _OUTSIDE
        full, empty = (((quarters == state) | outside).all(axis=1) for state in (FULL, EMPTY))
        quarters[outside] = EMPTY
        mixed = ~(full | empty)
        first, number = _alike(list(quarters[mixed].T))
        merged.append(quarters[mixed][first])
        codes = np.where(full, FULL, EMPTY)
        codes[mixed] = FIRST_NODE + number
        codes_below = np.concatenate((np.arange(FIRST_NODE), codes))
    while merged and not len(merged[0]):
        merged.pop(0)
    return int(codes_below[root[0]]), tuple(reversed(merged))


def pruned(tree: Quadtree) -> Quadtree:
    """The tree without its last level: what was a node there is now partial."""
    levels = list(tree.levels[:-1])
    size = 1 << (tree.depth - len(levels))
    if not levels:
        return Quadtree(tree.depth, PARTIAL, (), tree.sizes, size, tree.exact)
    levels[-1] = np.where(levels[-1] >= FIRST_NODE, PARTIAL, levels[-1])
    return Quadtree(tree.depth, tree.root, tuple(levels), tree.sizes, size, tree.exact)
