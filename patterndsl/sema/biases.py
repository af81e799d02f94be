"""What does a bias mean? Real numbers of an expression, whose integers are expanded as anywhere else."""

from __future__ import annotations

from collections.abc import Container

from patterndsl.diagnostics import nearest
from patterndsl.ir.real import FUNCTIONS, Apply, Call, Entry, Number, OfIndex, Real, RealFunction, RealOp
from patterndsl.sema.expand import Expander
from patterndsl.sema.scope import Scope
from patterndsl.syntax import tree as ast

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


def real(expr: ast.Expr, expander: Expander, scope: Scope, tables: Container[str]) -> Real:
    """The number that an expression stands for. Mistakes are reported by the expander, which raises Stop."""
    match expr:
        case ast.Real(value=number):
            return Number(float(number))
        case ast.Negative(operand=operand):
            return Apply("-", Number(0.0), real(operand, expander, scope, tables))
        case ast.Binary(op=op, left=left, right=right) if op in OPERATORS:
            sides = (real(side, expander, scope, tables) for side in (left, right))
            return Apply(OPERATORS[op], *sides)
        case ast.Subscript(name=name, index=index) if name in tables:
            return Entry(name, real(index, expander, scope, tables))
        case ast.Call(name=name, arguments=arguments) if name in NAMES and name not in scope.definitions:
            least, most = FUNCTIONS[name]
            if any(argument.name for argument in arguments) or not least <= len(arguments) <= (most or len(arguments)):
                counts = "one number" if most == 1 else "numbers"
                raise expander.report("E204", f"`{name}` takes {counts}", expr.place, f"write {name}(...)")
            return Call(NAMES[name], tuple(real(item.value, expander, scope, tables) for item in arguments))
        case ast.Name(name=name) if name in tables:
            message = f"`{name}` is a table, and one entry belongs here"
            raise expander.report("E207", message, expr.place, f"index it: {name}[q - k]")
        case ast.Subscript(name=name) if (near := nearest(name, _known(tables))) and not _is_value(name, scope):
            raise expander.report("E201", f"unknown table `{name}`", expr.place, f"did you mean `{near}`?")
        case _:
            return OfIndex(expander.integer(expr, scope, "a bias is made of"))


def _known(tables: Container[str]) -> list[str]:
    return list(tables) if isinstance(tables, dict | list | tuple | set) else []


def _is_value(name: str, scope: Scope | None) -> bool:
    while scope is not None:
        if name in scope.values or name in scope.attributes:
            return True
        scope = scope.parent
    return False
