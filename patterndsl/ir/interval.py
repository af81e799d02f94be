"""What does a bound relation hold on a whole box of positions: all pairs, none, or some?

Interval arithmetic: an index expression becomes its least and greatest possible value, a relation becomes the pair
(certain, possible). Sound for every relation: `certain` means all pairs of the box, not `possible` means none. On
a single point both are exact. Bounds are Python ints or integer arrays of any library with NumPy's operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol, TypeAlias, assert_never

from patterndsl.ir.index import Arithmetic, Const, Facet, Function, Index, Param, Read, Select, Var
from patterndsl.ir.meaning import Integers, Truths, integer_root, larger, smaller
from patterndsl.ir.relation import And, Compare, Everything, Holds, Listed, Not, Nothing, Or, Random, Relation

Interval: TypeAlias = tuple[Integers, Integers]
"""Least and greatest value, both inclusive."""
Verdict: TypeAlias = tuple[Truths, Truths]
"""(certain, possible): holds everywhere in the box; holds somewhere perhaps."""


class BoxData(Protocol):
    """What a relation looks up, over ranges."""

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        """Bounds of the input over a range of indices, -1 included where the range leaves the input."""

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> Truths:
        """Whether some drawn pair lies in the box of the node's frame; exact for a single point."""

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        """Whether all of these rows list all of these keys, and whether some may list some; exact for a single row and
        key."""


@dataclass(frozen=True, slots=True)
class Box:
    """Positions [q_low, q_high] x [k_low, k_high], inclusive; many boxes where the bounds are arrays."""

    q: Interval
    k: Interval
    data: BoxData


def verdict(relation: Relation, box: Box) -> Verdict:
    """(certain, possible) for every box at once. Work: O(nodes x boxes)."""
    match relation:
        case Everything():
            return True, True
        case Nothing():
            return False, False
        case Compare(op, left, right):
            return _compared(op, bounds(left, box), bounds(right, box))
        case Holds(read):
            low, high = bounds(read, box)
            return low > 0, high > 0
        case And(terms):
            verdicts = [verdict(term, box) for term in terms]
            return reduce(_both, (v[0] for v in verdicts)), reduce(_both, (v[1] for v in verdicts))
        case Or(terms):
            verdicts = [verdict(term, box) for term in terms]
            return reduce(_either, (v[0] for v in verdicts)), reduce(_either, (v[1] for v in verdicts))
        case Not(term):
            certain, possible = verdict(term, box)
            return _inverse(possible), _inverse(certain)
        case Random():
            q, k = bounds(relation.q, box), bounds(relation.k, box)
            return of_single_pairs(q, k, box.data.any_drawn(relation, q, k))
        case Listed():
            return box.data.listed(relation, bounds(relation.row, box), bounds(relation.key, box))
        case _:
            assert_never(relation)


def _both(a: Truths, b: Truths) -> Truths:
    return a & b


def _either(a: Truths, b: Truths) -> Truths:
    return a | b


def _inverse(truth: Truths) -> Truths:
    return not truth if isinstance(truth, bool) else ~truth


def _compared(op: str, left: Interval, right: Interval) -> Verdict:
    match op:
        case "<":
            return left[1] < right[0], left[0] < right[1]
        case "<=":
            return left[1] <= right[0], left[0] <= right[1]
    apart = (left[1] < right[0]) | (right[1] < left[0])
    same = (left[0] == left[1]) & (right[0] == right[1]) & (left[0] == right[0])
    return (same, _inverse(apart)) if op == "==" else (apart, _inverse(same))


def of_single_pairs(q: Interval, k: Interval, found: Truths) -> Verdict:
    """Of pairs that are looked up: none of them, or perhaps one; all only where there is but one."""
    point = (q[0] == q[1]) & (k[0] == k[1])
    return found & point, found


def bounds(index: Index, box: Box) -> Interval:
    """Least and greatest value of an expression over every box; never too narrow."""
    match index:
        case Const(number):
            return number, number
        case Var("q"):
            return box.q
        case Var("k"):
            return box.k
        case Var(name) | Param(name):
            raise AssertionError(f"{name} is not bound")
        case Arithmetic(op, left, right):
            a, b = bounds(left, box), bounds(right, box)
            match op:
                case "+":
                    return a[0] + b[0], a[1] + b[1]
                case "-":
                    return a[0] - b[1], a[1] - b[0]
                case "*":
                    return _hull([x * y for x in _ends(a) for y in _ends(b)])
                case "//":
                    return _hull([x // y for x in _ends(a) for y in _ends(b)])
                case "%":
                    return _remainder(a, b)
        case Function(name, arguments):
            return _function(name, [bounds(argument, box) for argument in arguments])
        case Select(items, at):
            assert not isinstance(items, str), f"the list {items} is not bound"
            return _hull([end for item in items for end in bounds(item, box)])
        case Read(name, facet, at):
            return box.data.bounds(name, facet, bounds(at, box))
        case _:
            assert_never(index)


def _ends(interval: Interval) -> Sequence[Integers]:
    """Both ends, or the one value of a constant."""
    low, high = interval
    return (low,) if isinstance(low, int) and isinstance(high, int) and low == high else (low, high)


def _hull(values: Sequence[Integers]) -> Interval:
    return reduce(smaller, values), reduce(larger, values)


def _remainder(x: Interval, divisor: Interval) -> Interval:
    """x % d: exact where x stays within one period of a single divisor, else [0, d - 1]."""
    (low, high), (least, most) = x, divisor
    exact = (least == most) & (low // least == high // least)
    return exact * (low % least), larger(exact * (high % least), (exact ^ True) * (most - 1))


def _function(name: str, arguments: Sequence[Interval]) -> Interval:
    lows, highs = [low for low, _ in arguments], [high for _, high in arguments]
    match name:
        case "abs":
            low, high = arguments[0]
            return larger(larger(low, -high), 0), larger(-low, high)
        case "min":
            return reduce(smaller, lows), reduce(smaller, highs)
        case "max":
            return reduce(larger, lows), reduce(larger, highs)
        case "isqrt":
            return integer_root(lows[0]), integer_root(highs[0])
        case "log2":
            return _log2(lows[0]), _log2(highs[0])
        case _:
            raise AssertionError(f"function {name} has no meaning")


def _log2(x: Integers) -> Integers:
    return sum((x >= (1 << bit)) * 1 for bit in range(1, 62))
