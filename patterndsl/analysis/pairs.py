"""How many pairs does a pattern keep, for every N and all parameters at once? Exactly, or with the reason why not.

One rung after the other: everything symbolic; the length assumed to be a multiple of the divisors; parameters at given
values. What reads inputs or draws is bounded: nothing of it kept, all of it kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm, prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from patterndsl.analysis.count import Cell, count
from patterndsl.analysis.digits import Affine, affine
from patterndsl.analysis.formula import Formula, digits_at, formula, usual_first
from patterndsl.analysis.polynomial import Polynomial, constant, symbol
from patterndsl.analysis.radix import NotAffineError
from patterndsl.analysis.sets import Constraint, GaveUpError, coalesced, constraints, limited, regions
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import NK, Arithmetic, Const, Index, Param, Select, Var
from patterndsl.ir.relation import (
    EVERYTHING,
    Compare,
    Holds,
    Listed,
    Not,
    Random,
    Relation,
    children,
    compare,
    draws_in,
    indices,
    inputs_read,
    lists_in,
    looks_nothing_up,
    narrowed,
    substitute,
    substitute_index,
)
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_SIZE, param_values, self_sizes

if TYPE_CHECKING:
    import islpy

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

TYPICAL = (1_000_003, 998_244_353, 65_536, 1 << 20, 1_000_000, 3_628_800, 4_096)
SHORT = (64, 256)

COUNTING = 650_000
"""Operations of isl that one count may take, some tenths of a second: a report has several."""
LENGTHS = {"Nq": "N", "Nk": "N"}
"""Queries and keys of a self-attention are equally many."""


@dataclass(frozen=True, slots=True)
class NoFormula:
    """Why there is no formula."""

    reason: str


@dataclass(frozen=True, slots=True)
class Symbolic:
    """A relation with its parameters free: list parameters, head and layer put in.

    given: what the spec demands of the parameters. typical, short: N and parameters of some long and short sequences.
    lengths: the symbols of the numbers of queries and keys.
    """

    relation: Relation
    given: tuple[Relation, ...]
    typical: tuple[Mapping[str, int], ...]
    short: tuple[Mapping[str, int], ...]
    lengths: Mapping[str, str] = field(default_factory=lambda: dict(LENGTHS))


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
    given += (substitute(item, put) for item in _inside_lists(resolved))
    relation = substitute(resolved.relation, put, lists)
    lengths = dict(LENGTHS)
    if resolved.num_keys is not None:
        num_keys = substitute_index(resolved.num_keys, put, lists)
        lengths["Nk"] = num_keys.name if isinstance(num_keys, Param) else "Nk"
        if not isinstance(num_keys, Param):
            given.append(compare("==", NK, num_keys))
    demanded = tuple(item for item in given if item != EVERYTHING)
    typical, short = (_defaults(resolved, values, some) for some in (TYPICAL, SHORT))
    return Symbolic(relation, demanded, typical, short, lengths)


def _inside_lists(resolved: Resolved) -> Iterator[Relation]:
    """What says that each list has an item for the head and layer: others are refused, whatever they would attend."""
    sizes = {item.name: len(item.default) for item in resolved.params if isinstance(item.default, tuple)}
    for index in dict.fromkeys(indices(resolved.relation)):
        if isinstance(index, Select) and isinstance(index.items, str):
            yield compare("<=", Const(0), index.index)
            yield compare("<", index.index, Const(sizes[index.items]))


def _defaults(resolved: Resolved, fixed: Mapping[str, int], lengths: Iterable[int]) -> tuple[Mapping[str, int], ...]:
    """Parameters at their defaults for those of the lengths that the spec allows."""
    found = []
    for n in lengths:
        try:
            sizes = self_sizes(resolved, n, fixed)
            values = param_values(resolved, dict(fixed), sizes)
        except PatternError:
            continue
        numbers = {name: value for name, value in values.items() if isinstance(value, int)}
        found.append({"N": n, "Nk": sizes.kv_len, "head": 0, "layer": 0, **numbers})
    return tuple(found)


def usual(resolved: Resolved, fixed: Mapping[str, int], n: int | None) -> tuple[Mapping[str, int], ...]:
    """Parameters at their defaults, at long sequences, some of them multiples of all parameters; at one length where it
    is given."""
    if n is not None:
        return _defaults(resolved, fixed, (n,))
    found = _defaults(resolved, fixed, TYPICAL)
    steps = {lcm(*(max(1, value) for name, value in values.items() if name != "N")) for values in found}
    lengths = sorted({step * times for step in steps for times in (1, 2, 3, 4, 8) if step * times < MAX_SIZE})
    return (*found, *_defaults(resolved, fixed, lengths))


Way: TypeAlias = Mapping[str, bool]
WAYS: tuple[Way, ...] = ({}, {"bounded": True}, {"aligned": True}, {"digits": False})
"""How a pattern is written for counting, see `digits.affine`."""


def pairs(pattern: Symbolic) -> Formula | NoFormula:
    """The number of pairs of a self-attention of N positions, one head, exact in N and the parameters that are free."""
    return pairs_by(pattern, WAYS)[0]


def pairs_by(pattern: Symbolic, ways: Sequence[Way]) -> tuple[Formula | NoFormula, Sequence[Way]]:
    """The same by the first way that succeeds, and the ways from that one on: patterns that are alike go the same way.

    Where everything symbolic is too much, the relation itself may keep positions below N, or N is assumed to be a
    multiple of what divides it (`Formula.assumes`); and where digits do not help, constant divisors are left to isl,
    and the formula has cases by residues.
    """
    reasons, tried = [], []
    for at, way in enumerate(ways):
        try:
            form = _form(pattern, **way)
            if form.flags:
                raise NotAffineError("it depends on an input or on draws")
            if form not in tried:
                tried.append(form)
                return _counted(pattern, form), ways[at:]
        except (NotAffineError, GaveUpError) as failed:
            reasons.append(str(failed))
    return NoFormula(reasons[0]), ways


def most_pairs(pattern: Symbolic) -> Formula | NoFormula:
    """The number of pairs that some inputs or draws can keep: never fewer than the pattern has, and often many more.

    Draws that are only added to the pattern count with what they can draw at most.
    """
    drawn = _drawn_at_most(pattern)
    if drawn is not None:
        still = replace(pattern, relation=_without_draws(pattern.relation))
        found = pairs(still)
        if isinstance(found, Formula):
            more = drawn.put(found.affine.values)
            cells = tuple(Cell(cell.domain, cell.value + more) for cell in found.cells)
            return replace(found, cells=cells)
    try:
        return _counted(pattern, _form(pattern))
    except (NotAffineError, GaveUpError) as failed:
        return NoFormula(str(failed))


def _form(pattern: Symbolic, *, digits: bool = True, aligned: bool = False, bounded: bool = False) -> Affine:
    return affine(
        [pattern.relation],
        pattern.given,
        lengths=pattern.lengths,
        hints=hints(pattern),
        digits=digits,
        aligned=aligned,
        bounded=bounded,
    )


def _counted(pattern: Symbolic, form: Affine) -> Formula:
    with limited(COUNTING) as context:
        points, domain = _points(context, form)
        return usual_first(formula(count(points, domain), form, domain, pattern.typical))


def _drawn_at_most(pattern: Symbolic) -> Polynomial | None:
    """How many pairs the draws and lists of a relation can be, where they stand alone or in frames of whole blocks, and
    are nowhere negated: the keys of each query, times the positions that a pair of the frame stands for."""
    if not _draws_only_add(pattern.relation):
        return None
    total = Polynomial({})
    for node in draws_in(pattern.relation):
        blocks = [_block_of(side, name) for side, name in ((node.q, "q"), (node.k, "k"))]
        number = _plain(node.count)
        if number is None or blocks[0] is None or blocks[1] is None:
            return None
        # frames are whole blocks: at most N + b - 1 positions of queries
        total = total + number * blocks[1] * (symbol("N") + blocks[0] - 1)
    for listed in lists_in(pattern.relation):
        width, block = _plain(listed.width), _block_of(listed.key, "k")
        if width is None or block is None:
            return None
        total = total + width * block * symbol("N")
    return total if total.terms else None


def _block_of(side: Index, name: str) -> Polynomial | None:
    """1 for q itself, b for q // b."""
    match side:
        case Var(found) if found == name:
            return constant(1)
        case Arithmetic("//", Var(found), divisor) if found == name:
            return _plain(divisor)
        case _:
            return None


def _plain(index: Index) -> Polynomial | None:
    match index:
        case Const(value):
            return constant(value)
        case Param(name):
            return symbol(name)
        case _:
            return None


def _draws_only_add(relation: Relation) -> bool:
    if isinstance(relation, Not):
        return looks_nothing_up(relation.term)
    if isinstance(relation, Listed):
        return not isinstance(relation.row, Const)  # those are members of routes, of which it is only one
    if isinstance(relation, Holds) or (isinstance(relation, Compare) and inputs_read(relation)):
        return False
    return all(map(_draws_only_add, children(relation)))


def _without_draws(relation: Relation) -> Relation:
    return narrowed(relation, lambda atom: None if isinstance(atom, Random | Listed) else atom)


@dataclass(frozen=True, slots=True)
class RowLengths:
    """How many keys each query has: on disjoint parts of the lengths, parameters and digits of a query, a polynomial in
    these. Each part is a union of convex ones."""

    form: Affine
    parts: tuple[tuple[tuple[tuple[Constraint, ...], ...], Polynomial], ...]

    def at(self, values: Mapping[str, int]) -> Integers | None:
        """For all queries of one length: int64 [N], exact; None where these values fit no digits of the form."""
        n = values["N"]
        digits = digits_at(self.form, {**values, "q": np.arange(n, dtype=np.int64)}, of="q")
        if digits is None:
            return None
        lengths = np.zeros(n, dtype=np.int64)
        for convex, value in self.parts:
            inside = np.zeros(n, dtype=bool)
            for known in convex:
                here = np.ones(n, dtype=bool)
                for item in known:
                    side = sum((digits[name] * factor for name, factor in item.factors), start=item.constant)
                    here &= (side == 0) if item.is_equality else (side >= 0)
                inside |= here
            whole = lcm(*(Fraction(factor).denominator for factor in value.terms.values()))
            found: Any = np.zeros(n, dtype=np.int64)
            for monomial, factor in value.terms.items():
                found = found + int(factor * whole) * prod((digits[name] for name in monomial), start=1)
            lengths += np.where(inside, found // whole, 0)
        return lengths


def row_lengths(form: Affine) -> RowLengths | None:
    """How many keys each query has, by the form that its pairs were counted in; None where that is too much.

    The keys are summed away and the digits of the query stay.
    """
    import islpy

    try:
        with limited(COUNTING // 2) as context:
            points, _ = _points(context, form)
            kinds = (islpy.dim_type.param, len(form.params), islpy.dim_type.set)
            moved = coalesced(points.move_dims(*kinds, 0, len(form.q_digits)))
            parts = []
            for cell in count(moved, moved.params()):
                convex = cell.domain.get_basic_sets()
                if any(basic.dim(islpy.dim_type.div) for basic in convex):
                    return None
                parts.append((tuple(tuple(constraints(basic)) for basic in convex), cell.value))
    except GaveUpError:
        return None
    return RowLengths(form, tuple(parts))


def _points(context: islpy.Context, form: Affine) -> tuple[islpy.Set, islpy.Set]:
    """The pairs (those of some data, where there are flags) and the parameters for which the pattern is defined."""
    import islpy

    everywhere, (points,) = regions(context, form)
    kept = len(form.q_digits) + len(form.k_digits)
    points = points.project_out(islpy.dim_type.set, kept, len(form.flags))
    return coalesced(points), everywhere.params()


def hints(pattern: Symbolic) -> dict[str, int]:
    """Parameters at the default of some length, which say what is likely to divide what."""
    return dict(pattern.typical[0]) if pattern.typical else {}
