"""What may be added to a score? Real numbers made of integers of positions, and of what a layer learns.

The leaves are index expressions, so a bias is about the same positions as the relation that it stands beside. Tables
are learned: an entry for each index, one number of each head, or a vector that meets the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, assert_never

from patterndsl.ir.index import Index, Read
from patterndsl.ir.meaning import Point, value
from patterndsl.ir.relation import subexpressions

RealOp: TypeAlias = Literal["+", "-", "*", "/", "**"]
RealFunction: TypeAlias = Literal["floor", "log", "exp", "sqrt", "abs", "min", "max"]
FUNCTIONS: dict[str, tuple[int, int | None]] = {
    "floor": (1, 1),
    "log": (1, 1),
    "exp": (1, 1),
    "sqrt": (1, 1),
    "abs": (1, 1),
    "min": (1, None),
    "max": (1, None),
}
"""How many arguments each function takes, at least and at most."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number that is written out."""

    value: float


@dataclass(frozen=True, slots=True)
class OfIndex:
    """An integer of positions, head, layer and parameters."""

    index: Index


@dataclass(frozen=True, slots=True)
class Apply:
    """left op right."""

    op: RealOp
    left: Real
    right: Real


@dataclass(frozen=True, slots=True)
class Call:
    """A function of real numbers."""

    name: RealFunction
    arguments: tuple[Real, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """The entry of a table at the floor of a number; one outside the table is its first or last."""

    table: str
    at: Real


Real: TypeAlias = Number | OfIndex | Apply | Call | Entry


class Numbers(Protocol):
    """What a bias is computed with: functions of arrays, and the entries of tables."""

    def number(self, integers: Any) -> Any:
        """Integers as real numbers, in double precision."""

    def call(self, name: RealFunction, arguments: tuple[Any, ...]) -> Any:
        """The function of arrays or numbers."""

    def entry(self, table: str, at: Any) -> Any:
        """The entries of a table at real indices."""


def children(real: Real) -> tuple[Real, ...]:
    """The direct parts."""
    match real:
        case Number() | OfIndex():
            return ()
        case Apply(_, left, right):
            return (left, right)
        case Call(_, arguments):
            return arguments
        case Entry(_, at):
            return (at,)
        case _:
            assert_never(real)


def parts(real: Real) -> Iterator[Real]:
    """The expression and everything inside it."""
    yield real
    for child in children(real):
        yield from parts(child)


def reads(real: Real) -> Iterator[Read]:
    """What the expression reads of inputs and labels."""
    for part in parts(real):
        if isinstance(part, OfIndex):
            yield from (found for found in subexpressions(part.index) if isinstance(found, Read))


def put_index(real: Real, put: Callable[[Index], Index]) -> Real:
    """The expression with its integers replaced."""
    match real:
        case Number():
            return real
        case OfIndex(index):
            return OfIndex(put(index))
        case Apply(op, left, right):
            return Apply(op, put_index(left, put), put_index(right, put))
        case Call(name, arguments):
            return Call(name, tuple(put_index(argument, put) for argument in arguments))
        case Entry(table, at):
            return Entry(table, put_index(at, put))
        case _:
            assert_never(real)


def real_value(real: Real, point: Point, numbers: Numbers) -> Any:
    """The number at every point. Work: O(nodes x points)."""
    match real:
        case Number(number):
            return number
        case OfIndex(index):
            return numbers.number(value(index, point))
        case Apply(op, left, right):
            a, b = real_value(left, point, numbers), real_value(right, point, numbers)
            match op:
                case "+":
                    return a + b
                case "-":
                    return a - b
                case "*":
                    return a * b
                case "/":
                    return a / b
                case "**":
                    return a**b
        case Call(name, arguments):
            found = tuple(real_value(argument, point, numbers) for argument in arguments)
            return numbers.call(name, found)
        case Entry(table, at):
            return numbers.entry(table, real_value(at, point, numbers))
        case _:
            assert_never(real)
