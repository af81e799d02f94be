"""What must each parameter of a definition be? Read off from how the body uses it, so that a wrong argument is blamed
where it is written and not inside the definition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias, assert_never

from patterndsl.sema.model import InputDeclaration
from patterndsl.sema.scope import FUNCTIONS, POSITIONS, PRIMITIVES, Kind, Scope
from patterndsl.syntax import tree as ast

_Known: TypeAlias = dict[tuple[int, Kind | None], dict[str, Kind]]
"""What definitions (by identity) that are to be of a kind demand: each is looked into once, however often it is used,
and one that uses itself finds what is known so far."""


def param_kinds(definition: ast.Definition, home: Scope) -> dict[str, Kind | None]:
    """The kind of each parameter; None where nothing tells, as in `difference(R, S) = R - S`."""
    kinds = _demanded(definition, None, home, {})
    return {param: kinds.get(param) for param in definition.params}


def _demanded(definition: ast.Definition, wanted: Kind | None, home: Scope, known: _Known) -> dict[str, Kind]:
    """What the body demands of each parameter, where it is to be of the wanted kind."""
    at = (id(definition), wanted)
    if at not in known:
        known[at] = {}
        _infer(definition.body, wanted, definition.params, known[at], home, known)
    return known[at]


def _infer(
    expr: ast.Expr,
    wanted: Kind | None,
    params: Sequence[str],
    kinds: dict[str, Kind],
    home: Scope,
    known: _Known,
) -> None:
    """Notes in `kinds` what the expression demands of each parameter that it names."""

    def inside(part: ast.Expr, part_wanted: Kind | None) -> None:
        _infer(part, part_wanted, params, kinds, home, known)

    match expr:
        case ast.Name(name=name):
            if name in params and wanted is not None:
                kinds.setdefault(name, wanted)
        case ast.Attribute(name=name):
            if name in params:
                kinds.setdefault(name, "attribute")
        case ast.Subscript(name=name, index=index):
            if name in params:
                kinds.setdefault(name, "list")
            inside(index, "integer")
        case ast.Call(name=name, arguments=arguments):
            for argument, argument_kind in _argument_kinds(name, arguments, wanted, home, known):
                inside(argument.value, argument_kind)
        case ast.Binary(op=op, left=left, right=right):
            side: Kind | None = "integer"
            if op == "-":
                side = wanted or _evident_kind(left, home) or _evident_kind(right, home)
            inside(left, side)
            inside(right, side)
        case ast.Negative() | ast.Comparison() | ast.InRange() | ast.InSet():
            for child in ast.children(expr):
                inside(child, "integer")
        case ast.Not() | ast.Logic():
            for child in ast.children(expr):
                inside(child, "predicate")
        case ast.At(relation=relation, query=query, key=key, lengths=lengths):
            inside(relation, "predicate")
            for child in (query, key, *(length.value for length in lengths)):
                inside(child, "integer")
        case ast.Number() | ast.Real() | ast.Broken():
            pass
        case _:
            assert_never(expr)


def _evident_kind(expr: ast.Expr, home: Scope, seen: set[str] | None = None) -> Kind | None:
    """The kind that an expression shows by its form, or by what its name is.

    seen: names that are being looked into, or were in vain: the first that tells ends the search.
    """
    seen = set() if seen is None else seen
    match expr:
        case ast.Comparison() | ast.InRange() | ast.InSet() | ast.Not() | ast.Logic() | ast.At():
            return "predicate"
        case ast.Number() | ast.Negative():
            return "integer"
        case ast.Binary(op=op, left=left, right=right):
            return "integer" if op != "-" else _evident_kind(left, home, seen) or _evident_kind(right, home, seen)
        case ast.Attribute(name=name, facet=None) | ast.Subscript(name=name):
            return _read_kind(name, home)
        case ast.Name(name=name) | ast.Call(name=name):
            return _named_kind(name, home, seen)
        case _:
            return None


def _read_kind(name: str, home: Scope) -> Kind | None:
    """What an attribute, list or table of that name holds; None for a parameter, which may stand for any."""
    within: Scope | None = home
    while within is not None:
        declared = within.attributes.get(name)
        if declared is not None:
            return "predicate" if isinstance(declared, InputDeclaration) and declared.dtype == "bool" else "integer"
        if name in within.values:
            return "integer"
        within = within.parent
    return None


def _named_kind(name: str, home: Scope, seen: set[str]) -> Kind | None:
    """What a name without parameters or a call gives."""
    if name in PRIMITIVES:
        return "predicate"
    within: Scope | None = home
    while within is not None and not (name in within.values or name in within.definitions or name in within.imports):
        within = within.parent
    if within is None:
        return "integer" if name in POSITIONS or name in FUNCTIONS else None
    if name in within.values or name in within.imports:
        return "integer" if name in within.values else "predicate"
    if name in seen:
        return None
    seen.add(name)
    kinds = (_evident_kind(item.body, within, seen) for item in within.definitions[name])
    return next((kind for kind in kinds if kind), None)


def _argument_kinds(
    name: str,
    arguments: tuple[ast.Argument, ...],
    wanted: Kind | None,
    home: Scope,
    known: _Known,
) -> Iterator[tuple[ast.Argument, Kind | None]]:
    """Each argument of a call with the kind that the callee demands, where the call is to be of the wanted kind."""
    if name == "random":
        for at, argument in enumerate(arguments):
            yield (
                argument,
                "predicate" if argument.name == "avoid" or (argument.name is None and at == 2) else "integer",
            )
        return
    if name == "along":
        yield from ((argument, "attribute") for argument in arguments)
        return
    within: Scope | None = home
    while within is not None and name not in within.definitions:
        within = within.parent
    overloads = within.definitions[name] if within else []
    callee = next((item for item in overloads if len(item.params) == len(arguments)), None)
    if callee is None or within is None:
        yield from ((argument, "integer" if name in FUNCTIONS else None) for argument in arguments)
        return
    kinds = _demanded(callee, wanted, within, known)
    for at, argument in enumerate(arguments):
        yield argument, kinds.get(argument.name or callee.params[at])
