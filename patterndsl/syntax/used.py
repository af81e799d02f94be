"""Which names does an expression use, itself or through what the spec declares by them?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from patterndsl.syntax import tree as ast


def reached(spec: ast.Spec, *exprs: ast.Expr) -> set[str]:
    """The names in expressions, and those in what the spec declares by these names."""
    declared: dict[str, list[ast.Expr]] = {}
    for definition in spec.define:
        declared.setdefault(definition.name, []).append(definition.body)
    with_sizes: tuple[ast.Param | ast.Axis | ast.Input | ast.Label | ast.Selection, ...]
    with_sizes = (*spec.params, *spec.grid, *spec.inputs, *spec.labels, *spec.select)
    for item in with_sizes:
        declared.setdefault(item.name, []).extend(expressions(item))
    found: set[str] = set()
    waiting = list(exprs)
    while waiting:
        for name in set(_names(waiting.pop())) - found:
            found.add(name)
            waiting.extend(declared.get(name, ()))
    return found


def _names(expr: ast.Expr) -> Iterator[str]:
    """Every name that stands in an expression, of whatever kind."""
    if isinstance(expr, ast.Name | ast.Attribute | ast.Subscript | ast.Call):
        yield expr.name
    for child in ast.children(expr):
        yield from _names(child)


def expressions(declared: ast.Param | ast.Axis | ast.Input | ast.Label | ast.Selection) -> Iterator[ast.Expr]:
    """The expressions of a declaration; axes that an axis is composed of count as named."""
    for item in fields(declared):
        value = getattr(declared, item.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str) and item.name == "size":
                yield ast.Name(part, place=declared.place)
            elif isinstance(part, ast.Expr):
                yield part
