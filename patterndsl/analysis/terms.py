"""Which part of a pattern is it about? The terms of its union with their places, and words for what was counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from patterndsl.analysis.kept import Integers, Sample
from patterndsl.diagnostics import PatternError
from patterndsl.ir.relation import Relation
from patterndsl.sema.resolve import resolve
from patterndsl.syntax import tree as ast
from patterndsl.syntax.used import reached

MAX_TERMS = 12
MAX_PARAMS = 4


@dataclass(frozen=True, slots=True)
class Term:
    """A term of the pattern's union, and the pattern with this term alone, by head."""

    expr: ast.Expr
    relations: Mapping[int, Relation]


def terms_of(spec: ast.Spec, seen: Sample) -> tuple[Term, ...]:
    """The terms of the first union that the pattern is made of, at the sizes seen; none if it is no union."""
    definitions = {item.name: item.body for item in spec.define if not item.params}
    found: list[Term] = []
    for expr, alone in _alone(spec.attend, definitions):
        try:
            relations = seen.relations(resolve(replace(spec, attend=alone)))
        except PatternError:
            return ()
        if relations is None or len(found) == MAX_TERMS:
            return ()
        found.append(Term(expr, relations))
    return tuple(found)


def _alone(expr: ast.Expr, definitions: Mapping[str, ast.Expr]) -> Iterator[tuple[ast.Expr, ast.Expr]]:
    """Each term of the first union in an expression, and the expression with that term in the union's place."""
    match expr:
        case ast.Logic("|", terms):
            yield from zip(terms, terms, strict=True)
        case ast.Logic("&", terms):
            for place, term in enumerate(terms):
                found = list(_alone(term, definitions))
                for part, alone in found:
                    yield part, replace(expr, terms=(*terms[:place], alone, *terms[place + 1 :]))
                if found:
                    return
        case ast.Binary("-", left):
            for part, alone in _alone(left, definitions):
                yield part, replace(expr, left=alone)
        case ast.At(relation):
            for part, alone in _alone(relation, definitions):
                yield part, replace(expr, relation=alone)
        case ast.Name(name) if name in definitions:
            yield from _alone(definitions[name], definitions)


# ---- words --------------------------------------------------------------------------------------------------


def at(seen: Sample, spec: ast.Spec, expr: ast.Expr | None = None) -> str:
    """`N = 4,096, w = 64`: the length, and the parameters that the expression depends on."""
    named = reached(spec, spec.attend if expr is None else expr)
    values = {name: value for name, value in seen.params.items() if name in named and isinstance(value, int)}
    shown = [f"{name} = {value:,}" for name, value in list(values.items())[:MAX_PARAMS]]
    return ", ".join([f"N = {seen.n:,}", *shown])


def in_heads(seen: Sample, heads: tuple[int, ...]) -> str:
    """` in heads 0, 4`, where it is not in all of them."""
    if len(heads) == seen.num_heads:
        return ""
    shown = ", ".join(map(str, heads[:4])) + (", …" if len(heads) > 4 else "")
    return f" in head {shown}" if len(heads) == 1 else f" in heads {shown}"


def queries(rows: Integers, n: int) -> str:
    """Ascending rows in words: `query 0`, `the first 4 queries`, `512 of 4,096 queries (the first is 3)`."""
    first, last, count = int(rows[0]), int(rows[-1]), len(rows)
    if count == 1:
        return f"query {first:,}"
    if last - first == count - 1:
        if first == 0:
            return f"the first {count:,} queries"
        if last == n - 1:
            return f"the last {count:,} queries"
        return f"queries {first:,} to {last:,}"
    return f"{count:,} of {n:,} queries (the first is {first:,})"
