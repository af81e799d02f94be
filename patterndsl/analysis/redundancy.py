"""Which parts of a spec change nothing? A term of a union that the others cover, a difference that removes nothing.

The spec is taken apart as it was written, so that what is found has a place. A part is dead when the pattern without it
is proven equal for every N and every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from patterndsl.analysis.budget import SECONDS, GaveUpError, check_time, within
from patterndsl.analysis.proof import proven
from patterndsl.diagnostics import PatternError, SourceRange
from patterndsl.sema.resolve import resolve
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression

OPERATIONS = 1_500_000
"""Of isl, in one proof: there may be many terms."""

Same: TypeAlias = Callable[[ast.Spec, ast.Spec], str | None]
"""The scope within which two specs are equal; None where that is not known. Raises GaveUpError when time is over."""


@dataclass(frozen=True, slots=True)
class DeadTerm:
    """A part that changes nothing: `text` at `place`, and where the proof holds."""

    text: str
    why: Literal["covered by the other terms", "removes nothing"]
    scope: str
    place: SourceRange

    def __str__(self) -> str:
        return f"`{self.text}` is {self.why}" if self.why.startswith("covered") else f"`- {self.text}` {self.why}"


@dataclass(frozen=True, slots=True)
class Redundancy:
    """What was found to be dead. num_open: parts that there was no time to look at."""

    dead: tuple[DeadTerm, ...]
    num_open: int


def redundancy(spec: ast.Spec, same: Same | None = None, seconds: float = SECONDS) -> Redundancy:
    """What can be dropped from `attend` and the definitions, one after the other: of two equal terms the later one.

    same: where two specs are known to be equal; by default where they are proven to be.
    Nothing of a multiset, where each term counts by itself. Work: one proof for each term of a union and each
    difference, until the time is over.
    """
    if spec.merge == "multiset":
        return Redundancy((), 0)
    found: list[DeadTerm] = []
    with within(seconds):
        while (step := _step(spec, same or _same)) is not None:
            if isinstance(step, int):
                return Redundancy(tuple(found), step)
            spec, term = step
            found.append(term)
    return Redundancy(tuple(found), 0)


def dead_terms(spec: ast.Spec, same: Same | None = None) -> tuple[DeadTerm, ...]:
    """Those of `redundancy`."""
    return redundancy(spec, same).dead


def _step(spec: ast.Spec, same: Same) -> tuple[ast.Spec, DeadTerm] | int | None:
    """The spec without its first dead part, and that part; None where there is none, and how many parts are open where
    the time is over."""
    parts = list(_shorter(spec))
    for tried, (shorter, part, why) in enumerate(parts):
        try:
            check_time()
            scope = same(spec, shorter)
        except GaveUpError:
            return len(parts) - tried
        if scope is not None:
            return shorter, DeadTerm(render_expression(part), why, scope, part.place)
    return None


def _same(spec: ast.Spec, shorter: ast.Spec) -> str | None:
    """Where the two are proven equal."""
    try:
        verdict = proven("equals", resolve(spec), resolve(shorter), operations=OPERATIONS)
    except PatternError:
        return None  # not a pattern any more: integers were subtracted
    return None if verdict is None else verdict.scope


Shorter = tuple[ast.Spec, ast.Expr, Literal["covered by the other terms", "removes nothing"]]


def _shorter(spec: ast.Spec) -> Iterator[Shorter]:
    """The spec with one part left out, the part, and what it would mean if nothing changed; later parts first."""
    for expr, part, why in _without_a_part(spec.attend):
        yield replace(spec, attend=expr), part, why
    for at, definition in enumerate(spec.define):
        for expr, part, why in _without_a_part(definition.body):
            define = (*spec.define[:at], replace(definition, body=expr), *spec.define[at + 1 :])
            yield replace(spec, define=define), part, why


def _without_a_part(
    expr: ast.Expr,
) -> Iterator[tuple[ast.Expr, ast.Expr, Literal["covered by the other terms", "removes nothing"]]]:
    if isinstance(expr, ast.Logic) and expr.op == "|":
        for at in reversed(range(len(expr.terms))):
            rest = (*expr.terms[:at], *expr.terms[at + 1 :])
            left = rest[0] if len(rest) == 1 else replace(expr, terms=rest)
            yield left, expr.terms[at], "covered by the other terms"
    if isinstance(expr, ast.Binary) and expr.op == "-":
        yield expr.left, expr.right, "removes nothing"
    for name, value in _parts(expr):
        for at, child in enumerate(value if isinstance(value, tuple) else (value,)):
            inner = child.value if isinstance(child, ast.Argument) else child
            for shorter, part, why in _without_a_part(inner):
                changed: Any = replace(child, value=shorter) if isinstance(child, ast.Argument) else shorter
                if isinstance(value, tuple):
                    changed = (*value[:at], changed, *value[at + 1 :])
                yield replace(expr, **{name: changed}), part, why


def _parts(expr: ast.Expr) -> Iterator[tuple[str, Any]]:
    """The fields that hold predicates or arguments."""
    kept = (ast.Logic, ast.Not, ast.At, ast.Call, ast.Binary)
    if not isinstance(expr, kept):
        return
    for item in fields(expr):
        if item.name in ("terms", "operand", "relation", "arguments", "left", "right"):
            yield item.name, getattr(expr, item.name)
