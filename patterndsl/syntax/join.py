"""How do two specs become one? `left & right` and `left | right`, with what both declare.

A name that both declare must be declared alike, and none may take the place of a name of the prelude that the other
uses: each side means in the whole what it means alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Literal, TypeAlias, TypeVar

from patterndsl.diagnostics import Diagnostic, InputError, input_error
from patterndsl.syntax import tree as ast
from patterndsl.syntax.used import reached

Declared: TypeAlias = ast.Param | ast.Axis | ast.Input | ast.Label | ast.Selection | ast.Import | ast.Definition

_SECTIONS = ("params", "grid", "inputs", "labels", "select", "imports", "define")
_OF_A_WHOLE = ("fallback", "merge", "sources", "tables", "roles", "branches", "combine")
"""What says how keys become an output, and not only which there are."""

_Item = TypeVar("_Item", bound=Declared)
_Value = TypeVar("_Value")


def joined(op: Literal["&", "|"], left: ast.Spec, right: ast.Spec) -> ast.Spec:
    """The spec of `left op right`, which has no name. Raises InputError: E505 where a side says more than which pairs
    are attended, E208 where the sides mean different things by one name."""
    for side in (left, right):
        check_relation(op, side)
    terms = (*_terms(op, left.attend), *_terms(op, right.attend))
    wrong = [*_captured(left, right), *_captured(right, left)]
    spec = ast.Spec(
        ast.Logic(op, terms, place=left.attend.place),
        _united(left.params, right.params, wrong),
        _one("grid", left.grid, right.grid),
        _united(left.inputs, right.inputs, wrong),
        _united(left.labels, right.labels, wrong),
        _united(left.select, right.select, wrong),
        _united(left.imports, right.imports, wrong),
        _united(left.define, right.define, wrong),
        share=_one("share", left.share, right.share),
        keys=_one("keys", left.keys, right.keys),
        place=left.place,
    )
    if wrong:
        raise InputError(wrong)
    return spec


def check_relation(op: str, spec: ast.Spec) -> None:
    """Raises InputError (E505) on a spec that says more than which pairs are attended."""
    usual = {item.name: item.default for item in fields(ast.Spec)}
    for name in _OF_A_WHOLE:
        if getattr(spec, name) != usual[name]:
            is_composite = bool(spec.branches)
            help = (
                "terms[0].pattern is a relation" if is_composite else f"write one spec, with the `{name}` of the whole"
            )
            raise input_error("E505", f"the pattern has `{name}`, which is of a whole pattern", help)


def _terms(op: str, expr: ast.Expr) -> tuple[ast.Expr, ...]:
    return expr.terms if isinstance(expr, ast.Logic) and expr.op == op else (expr,)


def _united(left: Sequence[_Item], right: Sequence[_Item], wrong: list[Diagnostic]) -> tuple[_Item, ...]:
    """What either declares; what they declare differently is wrong."""
    known = {item.name: item for item in left}
    for item in right:
        if known.get(item.name, item) != item:
            message = f"`{item.name}` is declared differently on the two sides"
            help = "rename one, or give both one value: pattern.with_params(...)"
            wrong.append(Diagnostic("E208", message, item.place, help))
    return (*left, *(item for item in right if item.name not in known))


def _captured(side: ast.Spec, other: ast.Spec) -> list[Diagnostic]:
    """What a side declares and the other has from the prelude."""
    own, theirs = _declared(side), _declared(other)
    local = {name for definition in other.define for name in definition.params}
    used = reached(other, other.attend) - local - theirs.keys()
    return [
        Diagnostic("E208", f"one side declares `{name}`, and the other means the prelude's", item.place, "rename it")
        for name, item in own.items()
        if name in used
    ]


def _declared(spec: ast.Spec) -> Mapping[str, Declared]:
    return {item.name: item for name in _SECTIONS for item in getattr(spec, name)}


def _one(name: str, left: _Value, right: _Value) -> _Value:
    """What one side says, or both alike. Raises InputError (E208)."""
    if left and right and left != right:
        raise input_error("E208", f"the two sides have different `{name}`", "give both the same")
    return left or right


__all__ = ["check_relation", "joined"]
