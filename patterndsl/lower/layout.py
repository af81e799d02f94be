"""In which order of positions is a relation dense? In that of mixed radix digits, as the relation divides positions.

What a relation divides positions by says which digits to try. Digits that must be equal on both sides number the
groups, digits that are bounded on one side thin it out, the others are the order within a group. The relation is
rewritten in these coordinates, and where nothing of the group is left in it, all groups share what is found for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from patterndsl.ir.index import Arithmetic, Const, Index, Param, Var, arithmetic, operands
from patterndsl.ir.linear import Frame, Range
from patterndsl.ir.relation import NOTHING, And, Compare, Relation, children, direct_indices, indices
from patterndsl.lower.geometry import Axis, Geometry, Side, side_of
from patterndsl.sema.parameters import Sizes

Span: TypeAlias = tuple[int, int]
"""[start, stop)."""
Chain: TypeAlias = tuple[int, ...]
"""Ascending divisors, each a multiple of the one before: 8, 256 cuts p into p % 8, p % 256 // 8 and p // 256."""

MAX_CHAINS, MAX_DIVISORS = 40, 3
MAX_CELLS = 16
"""Ragged ends that a layout may have; with more it is not worth it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Groups with one geometry, and the relation within a group, in local positions."""

    geometry: Geometry
    relation: Relation

    @property
    def sizes(self) -> Sizes:
        """Those of the local relation: its queries start at 0."""
        q_len, kv_len = self.geometry.q.length, self.geometry.k.length
        return Sizes(q_len, kv_len, 0, q_len)


def chains(relation: Relation, sizes: Sizes) -> list[Chain]:
    """The digit systems to try, the identity first: some of the divisors that positions are divided by."""
    longest = max(sizes.q_start + sizes.q_len, sizes.kv_len)
    found = sorted({modulus for modulus in _moduli(relation) if 1 < modulus < longest})
    chosen = (chain for number in range(MAX_DIVISORS + 1) for chain in itertools.combinations(found, number))
    fitting = (chain for chain in chosen if all(b % a == 0 for a, b in itertools.pairwise(chain)))
    return list(itertools.islice(fitting, MAX_CHAINS))


def _moduli(relation: Relation) -> Iterator[int]:
    for index in direct_indices(relation):
        yield from _boundaries(index)
    for child in children(relation):
        yield from _moduli(child)


def _boundaries(index: Index) -> Iterator[int]:
    """What positions are divided by, through nested divisions: p // 4 % 8 has 4 and 32."""
    if isinstance(index, Arithmetic) and index.op in ("//", "%") and isinstance(index.right, Const):
        yield index.right.value * _divided_by(index.left)
    for operand in operands(index):
        yield from _boundaries(operand)


def _divided_by(index: Index) -> int:
    """The divisor of positions inside an expression, the largest of several."""
    scale = max((_divided_by(operand) for operand in operands(index)), default=1)
    if isinstance(index, Arithmetic) and index.op == "//" and isinstance(index.right, Const):
        return scale * index.right.value
    return scale


def cells(relation: Relation, sizes: Sizes, chain: Chain, *, narrow: bool = True) -> list[Cell] | None:
    """The relation by groups in the digits of the chain, its empty parts left out; None where the chain does not help.

    narrow: leave out what a term says of one side alone, such as the first rows in `q >= 64`.

    Together the cells hold each pair of the relation once. relation: bound, of one head. Work: a few rewritings.
    """
    digits = Digits(chain)
    q_span, k_span = (sizes.q_start, sizes.q_start + sizes.q_len), (0, sizes.kv_len)
    if q_span[0] == q_span[1] or not sizes.kv_len:
        return []
    inside = digits.frame(q_span, k_span).relation(relation)
    terms = inside.terms if isinstance(inside, And) else (inside,)
    if inside == NOTHING:
        return []
    said = terms if narrow else ()
    boxes = tuple(_box(said, side, digits.number) for side in ("q", "k"))
    groups = frozenset(at for at in range(digits.number) if _equal(at) in terms)
    if groups:
        found = _cells(relation, digits, (q_span, k_span), groups, boxes, sizes.q_start)
        if found is not None:
            return found
    is_thinned = any(box != UNBOUNDED for side in boxes for box in side[:-1])
    if chain and not is_thinned:
        return None
    return _cells(relation, digits, (q_span, k_span), frozenset(), boxes, sizes.q_start)


def _cells(
    relation: Relation,
    digits: Digits,
    spans: tuple[Span, Span],
    groups: frozenset[int],
    boxes: Sequence[tuple[Span, ...]],
    q_start: int,
) -> list[Cell] | None:
    """The cells with these digits as groups; None where groups differ from each other, or ends are too many."""
    found: list[Cell] = []
    for parts in _parts(digits, 0, *spans, groups, boxes):
        cell = _cell(relation, parts, digits, groups, q_start)
        if cell is None:
            return None
        if cell.relation != NOTHING:
            found.append(cell)
        if len(found) > MAX_CELLS:
            return None
    return found


@dataclass(frozen=True, slots=True)
class Digits:
    """Digits from the lowest up: digit i is p // weight(i) % size(i), the top one without the modulo."""

    chain: Chain

    @property
    def number(self) -> int:
        return len(self.chain) + 1

    def weight(self, at: int) -> int:
        return self.chain[at - 1] if at else 1

    def size(self, at: int) -> int:
        return self.chain[at] // self.weight(at)

    def frame(self, q_span: Span, k_span: Span) -> Frame:
        put: dict[Var | Param, Index] = {}
        ranges: dict[Index, Range] = {}
        for side, span in (("q", q_span), ("k", k_span)):
            total: Index = Const(0)
            for at in range(self.number):
                mine = digit(side, at)
                total = arithmetic("+", total, arithmetic("*", mine, Const(self.weight(at))))
                top = (span[0] // self.weight(at), (span[1] - 1) // self.weight(at))
                ranges[mine] = top if at == self.number - 1 else (0, self.size(at) - 1)
            put[Var("q" if side == "q" else "k")] = total
        return Frame(put, ranges)


def digit(side: str, at: int) -> Param:
    """The symbol of a digit of queries or keys."""
    return Param(f"{side}.{at}")


def _equal(at: int) -> Relation:
    return Compare("==", digit("k", at), digit("q", at))


UNBOUNDED: Span = (0, 1 << 62)


def _box(terms: Iterable[Relation], side: str, number: int) -> tuple[Span, ...]:
    """Between which bounds each digit of a side must lie, as single terms say it."""
    box = [UNBOUNDED] * number
    for term in terms:
        for at in range(number):
            mine, (start, stop) = digit(side, at), box[at]
            match term:
                case Compare("<=", left, Const(value)) if left == mine:
                    box[at] = start, min(stop, value + 1)
                case Compare("<=", Const(value), right) if right == mine:
                    box[at] = max(start, value), stop
                case Compare("==", left, Const(value)) if left == mine:
                    box[at] = max(start, value), min(stop, value + 1)
    return tuple(box)


Parts: TypeAlias = tuple[tuple[Span, Span], ...]
"""The spans of each digit from the lowest up, of queries and of keys."""


def _parts(
    digits: Digits, at: int, q: Span, k: Span, groups: frozenset[int], boxes: Sequence[tuple[Span, ...]]
) -> Iterator[Parts]:
    """Disjoint boxes of digits that cover positions [q) x [k), as far as they lie in the groups and `boxes`."""
    if at == digits.number - 1:
        spans = (_common(q, boxes[0][at]), _common(k, boxes[1][at]))
        if at in groups:
            spans = (_common(*spans), _common(*spans))
        if all(start < stop for start, stop in spans):
            yield (spans,)
        return
    size = digits.size(at)
    if at in groups:
        whole = _common(_common((0, size), boxes[0][at]), boxes[1][at])
        edges = sorted({*whole, *(edge % size for edge in (*q, *k) if whole[0] < edge % size < whole[1])})
        for start, stop in itertools.pairwise(edges):
            q_high, k_high = ((-((start - low) // size), -((start - high) // size)) for low, high in (q, k))
            for others in _parts(digits, at + 1, q_high, k_high, groups, boxes):
                yield (((start, stop), (start, stop)), *others)
        return
    for (q_low, q_high), (k_low, k_high) in itertools.product(_blocks(q, size), _blocks(k, size)):
        spans = (_common(q_low, boxes[0][at]), _common(k_low, boxes[1][at]))
        if all(start < stop for start, stop in spans):
            for others in _parts(digits, at + 1, q_high, k_high, groups, boxes):
                yield (spans, *others)


def _common(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])


def _blocks(span: Span, size: int) -> Iterator[tuple[Span, Span]]:
    """(span of p % size, span of p // size) for the whole blocks, and for the ragged ones at both ends."""
    start, stop = span
    first, last = -(-start // size), stop // size
    if first > last:  # within one block
        yield (start % size, stop % size), (last, last + 1)
        return
    if start % size:
        yield (start % size, size), (first - 1, first)
    if first < last:
        yield (0, size), (first, last)
    if stop % size:
        yield (0, stop % size), (last, last + 1)


def _cell(relation: Relation, parts: Parts, digits: Digits, groups: frozenset[int], q_start: int) -> Cell | None:
    group_axes: list[Axis] = []
    q_axes: list[Axis] = []
    k_axes: list[Axis] = []
    q_first = k_first = 0
    for at in reversed(range(digits.number)):
        weight, (q, k) = digits.weight(at), parts[at]
        q_first, k_first = q_first + q[0] * weight, k_first + k[0] * weight
        if at in groups:
            group_axes.append(Axis(q[1] - q[0], weight))
        else:
            q_axes.append(Axis(q[1] - q[0], weight))
            k_axes.append(Axis(k[1] - k[0], weight))
    q_side, k_side = side_of(q_first, tuple(q_axes)), side_of(k_first, tuple(k_axes))
    moved, ranges = _moved(group_axes)
    put: dict[Var | Param, Index] = {}
    for name, side in (("q", q_side), ("k", k_side)):
        position = Var("q") if name == "q" else Var("k")
        put[position] = arithmetic("+", _position(position, side), moved)
        ranges[position] = (0, side.length - 1)
    local = Frame(put, ranges).relation(relation)
    if any(isinstance(index, Param) for index in indices(local)):
        return None  # groups differ
    shown = side_of(0, tuple(group_axes)).axes if group_axes else ()
    return Cell(Geometry(shown, Side(q_side.start - q_start, q_side.axes), k_side), local)


def _moved(group_axes: Sequence[Axis]) -> tuple[Index, dict[Index, Range]]:
    """By how much a group is moved, as an expression in the numbers of its axes, and the ranges of these."""
    moved: Index = Const(0)
    ranges: dict[Index, Range] = {}
    for at, axis in enumerate(group_axes):
        step = Param(f"group.{at}")
        moved = arithmetic("+", moved, arithmetic("*", step, Const(axis.stride)))
        ranges[step] = (0, axis.size - 1)
    return moved, ranges


def _position(local: Var, side: Side) -> Index:
    """The position of a local one, in the first group."""
    total: Index = Const(side.start)
    inner = side.length
    for at, axis in enumerate(side.axes):
        inner //= axis.size
        step = arithmetic("//", local, Const(inner))
        if at:
            step = arithmetic("%", step, Const(axis.size))
        total = arithmetic("+", total, arithmetic("*", step, Const(axis.stride)))
    return total
