"""What is an integer expression? Functions of the positions q and k, the head, the layer and the lengths.

Arithmetic is exact and floors, as in Python. Construction folds constants; it decides nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from patterndsl.diagnostics import SourceRange, error

Symbol: TypeAlias = Literal["q", "k", "head", "layer", "Nq", "Nk"]
Facet: TypeAlias = Literal["value", "start", "rank"]
ArithmeticOp: TypeAlias = Literal["+", "-", "*", "//", "%"]


@dataclass(frozen=True, slots=True)
class Const:
    """An integer."""

    value: int


@dataclass(frozen=True, slots=True)
class Var:
    """A position, the head, the layer, or a length (N is Nq)."""

    name: Symbol


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the spec; binding replaces it by its value."""

    name: str


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """left op right; `//` and `%` floor, and their divisor must be positive (checked when sizes are bound)."""

    op: ArithmeticOp
    left: Index
    right: Index
    place: SourceRange | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Function:
    """abs(x), min(x, ...), max(x, ...), isqrt(x) for x >= 0, log2(x) (floor) for x >= 1."""

    name: Literal["abs", "min", "max", "isqrt", "log2"]
    arguments: tuple[Index, ...]
    place: SourceRange | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Select:
    """items[index], index a function of head and layer; `items` is a parameter's name until it is bound."""

    items: str | tuple[Index, ...]
    index: Index
    place: SourceRange | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Read:
    """The value of an input at a position or table index: its value, the first position of its run, or its
    place in the stable order by value. Outside its range an input reads -1."""

    name: str
    facet: Facet
    index: Index


Index: TypeAlias = Const | Var | Param | Arithmetic | Function | Select | Read

Q, K, NQ, NK = Var("q"), Var("k"), Var("Nq"), Var("Nk")
HEAD, LAYER = Var("head"), Var("layer")


def arithmetic(op: ArithmeticOp, left: Index, right: Index, place: SourceRange | None = None) -> Index:
    """left op right with constants folded. Raises PatternError (E403) on a constant divisor below 1."""
    if op in ("//", "%") and isinstance(right, Const) and right.value < 1:
        word = "division" if op == "//" else "modulo"
        raise error("E403", f"{word} by {right.value}", place, "the divisor must be at least 1")
    match op, left, right:
        case _, Const(a), Const(b):
            return Const(_fold(op, a, b))
        case ("+", x, Const(0)) | ("+", Const(0), x) | ("-", x, Const(0)):
            return x
        case ("*", x, Const(1)) | ("*", Const(1), x) | ("//", x, Const(1)):
            return x
        case ("*", _, Const(0)) | ("*", Const(0), _) | ("%", _, Const(1)):
            return Const(0)
    return Arithmetic(op, left, right, place)


def _fold(op: ArithmeticOp, a: int, b: int) -> int:
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


def function(
    name: Literal["abs", "min", "max", "isqrt", "log2"],
    arguments: tuple[Index, ...],
    place: SourceRange | None = None,
) -> Index:
    """name(arguments) with constants folded. Raises PatternError (E407) on a constant outside the domain."""
    values = [argument.value for argument in arguments if isinstance(argument, Const)]
    if len(values) < len(arguments):
        return Function(name, arguments, place)
    match name:
        case "abs":
            return Const(abs(values[0]))
        case "min":
            return Const(min(values))
        case "max":
            return Const(max(values))
        case "isqrt":
            if values[0] < 0:
                raise error("E407", f"isqrt of {values[0]}", place, "the argument must be at least 0")
            return Const(math.isqrt(values[0]))
        case "log2":
            if values[0] < 1:
                raise error("E407", f"log2 of {values[0]}", place, "the argument must be at least 1")
            return Const(values[0].bit_length() - 1)


def select(items: str | tuple[Index, ...], index: Index, place: SourceRange | None = None) -> Index:
    """items[index]. Raises PatternError (E405) on a constant index outside the list."""
    if isinstance(items, str) or not isinstance(index, Const):
        return Select(items, index, place)
    if not 0 <= index.value < len(items):
        raise error(
            "E405",
            f"the list of {len(items)} has no item {index.value}; items count from 0",
            place,
            "give one value per head or layer, or index it modulo its length",
        )
    return items[index.value]


def operands(index: Index) -> tuple[Index, ...]:
    """The direct subexpressions."""
    match index:
        case Const() | Var() | Param():
            return ()
        case Arithmetic(left=left, right=right):
            return (left, right)
        case Function(arguments=arguments):
            return arguments
        case Select(items=items, index=at):
            return (at,) if isinstance(items, str) else (*items, at)
        case Read(index=at):
            return (at,)


def in_words_of(index: Index, known: Callable[[Index], Index | None]) -> Index | None:
    """The expression with what `known` says in the place of parts of it, larger ones first; None where a part is left
    of which that knows nothing, and which is no number."""
    found = known(index)
    if found is not None or isinstance(index, Const):
        return index if found is None else found
    parts = [in_words_of(part, known) for part in operands(index)]
    said = tuple(part for part in parts if part is not None)
    if len(said) < len(parts):
        return None
    match index:
        case Arithmetic(op, _, _, place):
            return arithmetic(op, said[0], said[1], place)
        case Function(name, _, place):
            return function(name, said, place)
        case _:
            return None
