"""Which patches of a grid may make a relation dense? Boxes of a tile's cells, ranked by how many they meet.

The grid is what the relation divides positions by. The estimate looks at the keys of one query; how many tiles a patch
really meets is found by a descent, for the few best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from patterndsl.ir.index import Arithmetic, Const, Index, Read, Var, operands
from patterndsl.ir.linear import Frame
from patterndsl.ir.relation import Listed, Random, Relation, children, direct_indices, indices
from patterndsl.lower.geometry import Integers
from patterndsl.lower.layout import Chain, Digits, digit
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.order import Patches, digits_of
from patterndsl.lower.row import row_keys
from patterndsl.sema.parameters import Sizes

CELLS = 64
"""Of a patch, at most: those of a tile."""
MAX_AXES, MAX_GRIDS, MAX_FOUND = 4, 4, 2
WORTHWHILE = 0.75
"""The share of the tiles met by rows of the grid, that patches must stay below to be looked at."""


def patches_of(relation: Relation, sizes: Sizes, lookup: Lookup) -> list[Patches]:
    """The most promising patches, the best first; none where the relation divides by nothing, or draws its keys.

    relation: bound, of one head, of absolute positions. Work: the keys of a query.
    """
    if not sizes.q_len or not sizes.kv_len or not _is_plain(relation):
        return []
    found = list[tuple[float, Patches]]()
    for chain in itertools.islice(_grids(relation, sizes), MAX_GRIDS):
        found.extend(_of_grid(relation, sizes, lookup, chain))
    found.sort(key=lambda item: item[0])
    return list(dict.fromkeys(patches for _, patches in found))[:MAX_FOUND]


def _is_plain(relation: Relation) -> bool:
    if isinstance(relation, Random | Listed) or any(isinstance(index, Read) for index in indices(relation)):
        return False
    return all(map(_is_plain, children(relation)))


# ---- grids


def _grids(relation: Relation, sizes: Sizes) -> Iterator[Chain]:
    """Divisors of positions that make one system of digits, as many as go together, those with most axes first."""
    longest = max(sizes.q_start + sizes.q_len, sizes.kv_len)
    divisors = sorted({divisor for divisor in _divisors(relation) if 1 < divisor < longest})
    seen = list[set[int]]()
    for number in range(min(MAX_AXES - 1, len(divisors)), 0, -1):
        for chain in itertools.combinations(divisors, number):
            if all(b % a == 0 for a, b in itertools.pairwise(chain)) and not any(set(chain) < more for more in seen):
                seen.append(set(chain))
                yield chain


def _divisors(relation: Relation) -> Iterator[int]:
    for index in direct_indices(relation):
        yield from _divided(index)
    for child in children(relation):
        yield from _divisors(child)


def _divided(index: Index) -> Iterator[int]:
    """Where the digits in an expression end: p // 4 % 8 has 4 and 32. A division of anything but a digit has none."""
    match index:
        case Arithmetic("//" | "%", left, Const(divisor)) if (scale := _scale(left)) is not None:
            yield scale * divisor
        case _:
            pass
    for operand in operands(index):
        yield from _divided(operand)


def _scale(index: Index) -> int | None:
    """The positions in one step of a digit; None where it is none."""
    match index:
        case Var("q" | "k"):
            return 1
        case Arithmetic("//", left, Const(divisor)):
            inner = _scale(left)
            return None if inner is None else inner * divisor
        case Arithmetic("%", left, Const()):
            return _scale(left)
        case _:
            return None


# ---- patches of one grid


@dataclass(frozen=True, slots=True)
class _Axis:
    """A digit. span: its values, inclusive; query: that of the query; keys: those of its keys; offset, unit: where
    windows of so many cells begin, unit 1 where there are none."""

    span: tuple[int, int]
    query: int
    keys: Integers
    offset: int
    unit: int

    @property
    def size(self) -> int:
        return self.span[1] - self.span[0] + 1

    def begins(self, size: int) -> int:
        """At which cell a patch of this size should begin."""
        return self.offset % size if size % self.unit == 0 else 0

    def met(self, size: int) -> int:
        """Patches that the queries of one meet, where their keys move with them, or with their windows."""
        begin = self.begins(size)
        inside, in_window = (self.query - begin) % size, (self.query - self.offset) % self.unit
        steps = np.arange(-inside, size - inside)
        moved = self.keys[:, None] + (in_window + steps) // self.unit * self.unit
        return len(np.unique((np.clip(moved, *self.span) - begin) // size))


def _of_grid(relation: Relation, sizes: Sizes, lookup: Lookup, chain: Chain) -> Iterator[tuple[float, Patches]]:
    """Patches of one grid that meet fewer than its rows do, and how many they meet."""
    axes = _axes(relation, sizes, lookup, chain)
    if axes is None:
        return
    shapes = list(_shapes([axis.size for axis in axes]))
    met = {shape: prod(axis.met(size) for axis, size in zip(axes, shape, strict=True)) for shape in shapes}
    rows = max(shapes, key=lambda shape: shape[: len(axes)])  # the longest along the lowest digits
    for shape in shapes:
        if met[shape] < WORTHWHILE * met[rows]:
            offsets = tuple(axis.begins(size) for axis, size in zip(axes, shape, strict=True))
            yield met[shape], Patches(chain, shape, offsets)


def _axes(relation: Relation, sizes: Sizes, lookup: Lookup, chain: Chain) -> list[_Axis] | None:
    """The digits as a query in the middle of all sides sees them; None where it has no keys."""
    q_stop = sizes.q_start + sizes.q_len
    longest = max(q_stop, sizes.kv_len)
    weights = (1, *chain)
    limits = [above // weight for weight, above in zip(weights, chain, strict=False)]
    limits.append(-(-longest // weights[-1]))
    middle = sum(limit // 2 * weight for limit, weight in zip(limits, weights, strict=True))
    query = min(max(middle, sizes.q_start), q_stop - 1)
    keys = np.asarray(row_keys(relation, sizes, lookup, query))
    if not len(keys):
        return None
    windows = _windows(relation, sizes, chain)
    at = (digits_of(np.array([query]), chain), digits_of(keys, chain))
    return [
        _Axis((0, limit - 1), int(mine[0]), np.unique(theirs), *windows.get(number, (0, 1)))
        for number, (limit, mine, theirs) in enumerate(zip(limits, *at, strict=True))
    ]


def _shapes(limits: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Boxes of at most CELLS cells of which no side can be doubled: of powers of two, or as long as the grid."""
    choices = [[*(1 << bit for bit in range(7) if 1 << bit < limit), limit] for limit in limits]
    for shape in itertools.product(*choices):
        cells = prod(shape)
        if cells <= CELLS and not any(
            2 * side <= limit and 2 * cells <= CELLS for side, limit in zip(shape, limits, strict=True)
        ):
            yield shape


def _windows(relation: Relation, sizes: Sizes, chain: Chain) -> dict[int, tuple[int, int]]:
    """Of digits that are cut into windows, (where one begins, its cells): (x - 2) // 4 begins at 2."""
    digits, plain = Digits(chain), Frame({}, {})
    spans = (sizes.q_start, sizes.q_start + sizes.q_len), (0, sizes.kv_len)
    found = dict[int, tuple[int, int]]()
    for index in indices(digits.frame(*spans).relation(relation)):
        match index:
            case Arithmetic("//", left, Const(unit)):
                cut = plain.linear(left)
                for at in range(digits.number):
                    if any(cut.terms == ((digit(side, at), 1),) for side in ("q", "k")):
                        found.setdefault(at, (-cut.constant % unit, unit))
            case _:
                pass
    return found
