"""What does a bias mean? Real numbers of an expression, whose integers are expanded as anywhere else."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Sequence

from patterndsl.diagnostics import nearest
from patterndsl.ir.index import Const, Index, K
from patterndsl.ir.real import (
    FUNCTIONS,
    Apply,
    Call,
    Entry,
    Number,
    OfIndex,
    Real,
    RealFunction,
    RealOp,
    children,
    put_index,
)
from patterndsl.ir.relation import substitute_index
from patterndsl.sema.expand import Expander
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import Sizes, param_values, put_size
from patterndsl.sema.scope import Scope
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression

OPERATORS: dict[str, RealOp] = {"+": "+", "-": "-", "*": "*", "/": "/", "**": "**"}
NAMES: dict[str, RealFunction] = {
    "floor": "floor",
    "log": "log",
    "exp": "exp",
    "sqrt": "sqrt",
    "abs": "abs",
    "min": "min",
    "max": "max",
}


def real(expr: ast.Expr, expander: Expander, scope: Scope, tables: Container[str], what: str = "bias") -> Real:
    """The number that an expression stands for. Mistakes are reported by the expander, which raises Stop. what: it is
    of, in their words: bias or decay."""
    match expr:
        case ast.Real(value=number):
            return Number(float(number))
        case ast.Negative(operand=operand):
            return _number(Apply("-", Number(0.0), real(operand, expander, scope, tables, what)), expr, expander, what)
        case ast.Binary(op=op, left=left, right=right) if op in OPERATORS:
            sides = (real(side, expander, scope, tables, what) for side in (left, right))
            return _number(Apply(OPERATORS[op], *sides), expr, expander, what)
        case ast.Subscript(name=name, index=index) if name in tables:
            return Entry(name, real(index, expander, scope, tables, what))
        case ast.Call(name=name, arguments=arguments) if name in NAMES and name not in scope.definitions:
            least, most = FUNCTIONS[name]
            if any(argument.name for argument in arguments) or not least <= len(arguments) <= (most or len(arguments)):
                counts = "one number" if most == 1 else "numbers"
                raise expander.report("E204", f"`{name}` takes {counts}", expr.place, f"write {name}(...)")
            made = Call(NAMES[name], tuple(real(item.value, expander, scope, tables, what) for item in arguments))
            return _number(made, expr, expander, what)
        case ast.Name(name=name) if name in tables:
            message = f"`{name}` is a table, and one entry belongs here"
            raise expander.report("E207", message, expr.place, f"index it: {name}[q - k]")
        case ast.Subscript(name=name) if (near := nearest(name, _known(tables))) and not _is_value(name, scope):
            raise expander.report("E201", f"unknown table `{name}`", expr.place, f"did you mean `{near}`?")
        case _:
            return OfIndex(expander.integer(expr, scope, f"a {what} is made of"))


def bound_bias(bias: Real, resolved: Resolved, position: Index, sizes: Sizes, layer: int) -> Real:
    """A bias between queries and numbers of keys, with sizes and parameters put in. position: where key number k
    stands."""
    values = param_values(resolved, {}, sizes)
    lists: dict[str, tuple[Index, ...]] = {
        name: tuple(map(Const, value)) for name, value in values.items() if isinstance(value, tuple)
    }

    def stand(index: Index) -> Index:
        at_position = substitute_index(index, lambda found: position if found == K else found)
        return substitute_index(at_position, lambda found: put_size(found, sizes, values, layer), lists)

    return put_index(bias, stand)


def _number(made: Real, expr: ast.Expr, expander: Expander, what: str) -> Real:
    """What was made of numbers alone, as one number. Reports E403 and E407 where there is none."""
    operands = [_written(part) for part in children(made)]
    numbers = [x for x in operands if x is not None]
    if len(numbers) < len(operands):
        return made
    text = f"`{render_expression(expr)}`"
    try:
        found = _computed(made, numbers)
    except ZeroDivisionError:
        raise expander.report("E403", f"{text} divides by zero", expr.place, "divide by something else") from None
    except (ValueError, OverflowError):
        found = math.nan
    if not isinstance(found, float) or not math.isfinite(found):
        help = "a bias adds finite real numbers" if what == "bias" else "a decay is a factor above 0 and at most 1"
        raise expander.report("E407", f"{text} is no finite real number", expr.place, help)
    return Number(found)


def _written(part: Real) -> float | None:
    match part:
        case Number(number):
            return number
        case OfIndex(Const(number)):
            return float(number)
        case _:
            return None


def _computed(made: Real, numbers: Sequence[float]) -> object:
    """Of real numbers; complex where a negative one has a root."""
    match made:
        case Apply(op):
            return _OPERATIONS[op](*numbers)
        case Call(name):
            return float(_FUNCTIONS[name](*numbers))
        case _:
            raise AssertionError(f"no operation: {made}")


_OPERATIONS: dict[RealOp, Callable[[float, float], object]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
_FUNCTIONS: dict[RealFunction, Callable[..., float]] = {
    "floor": math.floor,
    "log": math.log,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "abs": abs,
    "min": min,
    "max": max,
}


def _known(tables: Container[str]) -> list[str]:
    return list(tables) if isinstance(tables, dict | list | tuple | set) else []


def _is_value(name: str, scope: Scope | None) -> bool:
    while scope is not None:
        if name in scope.values or name in scope.attributes:
            return True
        scope = scope.parent
    return False
