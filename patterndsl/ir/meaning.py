"""Which pairs does a bound relation hold? Membership, point by point.

This is the truth that everything else is tested against, so it is the plainest reading of the nodes. Positions are
Python ints or integer arrays of any library with NumPy's operators (NumPy, PyTorch), and broadcast. It only uses
operators and `clip`, so it can also be traced into a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol, TypeAlias, assert_never

from patterndsl.ir.index import Arithmetic, Const, Facet, Function, Index, Param, Read, Select, Var
from patterndsl.ir.relation import And, Compare, Everything, Holds, Listed, Not, Nothing, Or, Random, Relation

Integers: TypeAlias = Any
"""An int or an integer array."""
Truths: TypeAlias = Any
"""A bool or a boolean array."""

MAX_ROOT_BITS = 31


class Data(Protocol):
    """What a relation looks up: the values of inputs, and the keys that were drawn at random."""

    def read(self, name: str, facet: Facet, index: Integers) -> Integers:
        """The input at the index; -1 outside its range; truth values as 0 and 1."""

    def drawn(self, node: Random, head: Integers, q: Integers) -> Iterable[Integers]:
        """The keys drawn for query q of the node's frame, turn by turn; -1 where there are fewer, or q is outside."""

    def lists(self, node: Listed, row: Integers, key: Integers) -> Truths:
        """Whether a row lists a key; see `listed_by_reading`."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where a relation is asked: absolute positions q and k, and the head where the relation depends on it."""

    q: Integers
    k: Integers
    head: Integers
    data: Data


def member(relation: Relation, point: Point) -> Truths:
    """Whether (q, k) is in the relation, for every point at once. Work: O(nodes x points)."""
    match relation:
        case Everything():
            return True
        case Nothing():
            return False
        case Compare(op, left, right):
            a, b = value(left, point), value(right, point)
            match op:
                case "<":
                    return a < b
                case "<=":
                    return a <= b
                case "==":
                    return a == b
                case "!=":
                    return a != b
        case Holds(read):
            return value(read, point) > 0
        case And(terms):
            return reduce(lambda a, b: a & b, (member(term, point) for term in terms))
        case Or(terms):
            return reduce(lambda a, b: a | b, (member(term, point) for term in terms))
        case Not(term):
            holds = member(term, point)
            return not holds if isinstance(holds, bool) else ~holds
        case Random():
            return _drawn(relation, point)
        case Listed():
            return _listed(relation, point)
        case _:
            assert_never(relation)


def _drawn(node: Random, point: Point) -> Truths:
    """k' is among the keys drawn for q'; never outside the frame."""
    q, k = value(node.q, point), value(node.k, point)
    holds: Truths = False
    for key in point.data.drawn(node, point.head, q):  # no reduction over a tensor: this must trace to pointwise code
        holds = holds | (key == k)
    return holds & (k >= 0)


def _listed(node: Listed, point: Point) -> Truths:
    row, key = value(node.row, point), value(node.key, point)
    return point.data.lists(node, row, key) & (row >= 0) & (key >= 0)


def listed_by_reading(data: Data, node: Listed, row: Integers, key: Integers) -> Truths:
    """Whether key is among what is listed for row, one after the other: without a reduction, so that it traces."""
    holds: Truths = False
    for turn in range(width_of(node)):
        holds = holds | (data.read(node.name, "value", row * width_of(node) + turn) == key)
    return holds


def width_of(node: Listed) -> int:
    """How many keys a row can list; the node must be bound."""
    assert isinstance(node.width, Const), f"{node.width} is not bound"
    return node.width.value


def value(index: Index, point: Point) -> Integers:
    """The integer that the expression has at every point."""
    match index:
        case Const(number):
            return number
        case Var("q"):
            return point.q
        case Var("k"):
            return point.k
        case Var("head"):
            return point.head
        case Var(name) | Param(name):
            raise AssertionError(f"{name} is not bound")
        case Arithmetic(op, left, right):
            a, b = value(left, point), value(right, point)
            match op:
                case "+":
                    return a + b
                case "-":
                    return a - b
                case "*":
                    return a * b
                case "//":
                    return a // b
                case "%":
                    return a % b
        case Function(name, arguments):
            return _function(name, [value(argument, point) for argument in arguments])
        case Select(items, at):
            assert not isinstance(items, str), f"the list {items} is not bound"
            return _selected([value(item, point) for item in items], value(at, point))
        case Read(name, facet, at):
            return point.data.read(name, facet, value(at, point))
        case _:
            assert_never(index)


def _function(name: str, arguments: Sequence[Integers]) -> Integers:
    match name:
        case "abs":
            return abs(arguments[0])
        case "min":
            return reduce(smaller, arguments)
        case "max":
            return reduce(larger, arguments)
        case "isqrt":
            return integer_root(arguments[0])
        case "log2":
            return sum((arguments[0] >= (1 << bit)) * 1 for bit in range(1, 2 * MAX_ROOT_BITS))
        case _:
            raise AssertionError(f"function {name} has no meaning")


def smaller(a: Integers, b: Integers) -> Integers:
    """Elementwise minimum of ints or arrays."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return b.clip(max=a) if isinstance(a, int) else a.clip(max=b)


def larger(a: Integers, b: Integers) -> Integers:
    """Elementwise maximum of ints or arrays."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    return b.clip(min=a) if isinstance(a, int) else a.clip(min=b)


def integer_root(x: Integers) -> Integers:
    """floor(sqrt(x)) bit by bit: exact, where a float root is not."""
    root = x * 0
    for bit in range(MAX_ROOT_BITS, -1, -1):
        trial = root + (1 << bit)
        root = root + (trial * trial <= x) * (1 << bit)
    return root


def _selected(items: Sequence[Integers], at: Integers) -> Integers:
    return sum(item * (at == place) for place, item in enumerate(items))
