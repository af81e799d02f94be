"""How many pairs does a pattern keep, for every N and all parameters at once? Exactly, or with the reason why not.

One rung after the other: everything symbolic; the length assumed to be a multiple of the divisors; parameters at given
values. What reads inputs or draws is bounded: nothing of it kept, all of it kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patterndsl.analysis.count import count
from patterndsl.analysis.digits import Affine, NotAffineError, affine
from patterndsl.analysis.formula import Formula, formula
from patterndsl.analysis.sets import GaveUpError, limited, region
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import Const, Index, Param, Var
from patterndsl.ir.relation import EVERYTHING, Relation, compare, substitute
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import param_values, sizes_of

TYPICAL = (1_000_003, 998_244_353, 65_536, 1 << 20, 1_000_000, 3_628_800, 4_096)


@dataclass(frozen=True, slots=True)
class NoFormula:
    """Why there is no formula."""

    reason: str


@dataclass(frozen=True, slots=True)
class Symbolic:
    """A relation with its parameters free: list parameters, head and layer put in."""

    relation: Relation
    given: tuple[Relation, ...]
    typical: tuple[Mapping[str, int], ...]


def symbolic(
    resolved: Resolved,
    *,
    head: int | None = None,
    layer: int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Symbolic:
    """The relation for all N and parameters, with what the spec demands of them. Lists have their default values;
    head, layer and parameters are put in where given."""
    lists = {item.name: item.default for item in resolved.params if isinstance(item.default, tuple)}
    values = dict(fixed or {})

    def put(found: Var | Param) -> Index:
        if isinstance(found, Param):
            return Const(values[found.name]) if found.name in values else found
        number = {"head": head, "layer": layer}.get(found.name)
        return found if number is None else Const(number)

    given = [
        substitute(compare("<=", item.minimum, Param(item.name)), put)
        for item in resolved.params
        if item.minimum is not None and not isinstance(item.default, tuple)
    ]
    for item in resolved.requirements:
        if isinstance(item.value, str):
            continue  # a list, whose values are put in
        left, right = (item.value, item.least) if item.kind == "grid" else (item.least, item.value)
        given.append(substitute(compare("==" if item.kind == "grid" else "<=", left, right), put, lists))
    relation = substitute(resolved.relation, put, lists)
    return Symbolic(relation, tuple(item for item in given if item != EVERYTHING), _typical(resolved, values))


def _typical(resolved: Resolved, fixed: Mapping[str, int]) -> tuple[Mapping[str, int], ...]:
    """Parameters at their defaults for some long sequences that the spec allows."""
    found = []
    for n in TYPICAL:
        try:
            values = param_values(resolved, dict(fixed), sizes_of(n, None, None, 0))
        except PatternError:
            continue
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        found.append({"N": n, "head": 0, "layer": 0, **numbers})
    return tuple(found)


def pairs(pattern: Symbolic) -> Formula | NoFormula:
    """The number of pairs of a self-attention of N positions, one head, exact in N and the parameters that are free.

    Where everything symbolic is too much, N is assumed to be a multiple of what divides it (`Formula.assumes`).
    """
    reasons = []
    for aligned in (False, True):
        try:
            return _counted(pattern, aligned)
        except (NotAffineError, GaveUpError) as failed:
            reasons.append(str(failed))
    return NoFormula(reasons[0])


def _counted(pattern: Symbolic, aligned: bool) -> Formula:
    form = affine([pattern.relation], pattern.given, lengths=LENGTHS, hints=hints(pattern), aligned=aligned)
    if form.flags:
        raise NotAffineError("it depends on an input or on draws")
    with limited() as context:
        positions = form.q_digits + form.k_digits
        everywhere = region(context, form.params, positions, form.domain)
        points = everywhere.intersect(region(context, form.params, positions, form.texts[0]))
        return formula(count(points, everywhere.params()), form, everywhere.params(), pattern.typical)


LENGTHS = {"Nq": "N", "Nk": "N"}


def hints(pattern: Symbolic) -> dict[str, int]:
    """Parameters at the default of some length, which say what is likely to divide what."""
    return dict(pattern.typical[0]) if pattern.typical else {}


__all__ = ["LENGTHS", "Affine", "NoFormula", "Sequence", "Symbolic", "hints", "pairs", "symbolic"]
