"""How many pairs? Exact counts of affine relations as piecewise polynomials in the lengths and parameters.

The set is cut into disjoint convex pieces, and its dimensions are summed away one at a time (Pugh 1994, Counting
Solutions to Presburger Formulas): between its greatest lower and least upper bound a dimension runs over consecutive
integers, and a polynomial summed over them is a polynomial (Faulhaber). In mixed radix digits nearly all bounds have
factors of one; what has not is first split by residues.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any, Literal

from patterndsl.analysis.budget import check_time
from patterndsl.analysis.polynomial import Polynomial, constant, symbol, total
from patterndsl.analysis.sets import Constraint, GaveUpError, coalesced, constraints, dim_names

if TYPE_CHECKING:
    import islpy

MAX_RESIDUES = 64
MAX_DEPTH = 16
"""Residues of what already is one residue of something."""
MAX_PIECES = 3000
MAX_CELLS = 500


@dataclass(frozen=True)
class Cell:
    """The value on one part of the parameter space, a set of isl."""

    domain: islpy.Set
    value: Polynomial

    @cached_property
    def equalities(self) -> tuple[tuple[Constraint, ...], ...]:
        """Those of each convex part."""
        return tuple(equalities(basic) for basic in self.domain.get_basic_sets())


def count(points: islpy.Set, context: islpy.Set) -> tuple[Cell, ...]:
    """The number of points for every value of the parameters in `context`, as cells that are disjoint and cover it.

    Exact. Raises GaveUpError where the pieces or residues become too many.
    """
    counter = _Counter()
    for basic in points.make_disjoint().get_basic_sets():
        for part in _lifted(basic):
            counter.add(part, constant(1))
    return combined(counter.found, context)


def combined(parts: Iterable[tuple[islpy.Set, Polynomial]], context: islpy.Set) -> tuple[Cell, ...]:
    """The sum of functions that are each a polynomial on their domain and 0 elsewhere, on disjoint cells."""
    summed: list[tuple[islpy.Set, Polynomial]] = []
    for domain, value in parts:
        at = next((at for at, (known, _) in enumerate(summed) if known.plain_is_equal(domain)), None)
        if at is None:
            summed.append((domain, value))
        else:
            summed[at] = (domain, summed[at][1] + value)
    cells = [(context, Polynomial({}))]
    for domain, value in summed:
        check_time()
        after: dict[Polynomial, islpy.Set] = {}
        for cell, known in cells:
            inside = cell.intersect(domain)
            if inside.is_empty():
                _put(after, known, cell)
                continue
            _put(after, known + value, inside)
            outside = cell.subtract(domain)
            if not outside.is_empty():
                _put(after, known, outside)
        cells = [(coalesced(cell), known) for known, cell in after.items()]
        if len(cells) > MAX_CELLS:
            raise GaveUpError(f"the formula has more than {MAX_CELLS} cases")
    return tuple(Cell(cell, value) for cell, value in cells)


def agrees(cell: Cell, value: Polynomial) -> bool:
    """Whether the value is right on the cell: equal, or equal under the equalities that hold there."""
    difference = cell.value - value
    if not difference.terms:
        return True
    return not any(reduced(difference, known).terms for known in cell.equalities)


def equalities(domain: islpy.BasicSet) -> tuple[Constraint, ...]:
    """What is equal on the domain, said or implied."""
    return tuple(item for item in constraints(domain.detect_equalities()) if item.is_equality)


def reduced(value: Polynomial, known: Iterable[Constraint]) -> Polynomial:
    """The same value without symbols that these equalities express by others."""
    for item in known:
        name = next((name for name, factor in item.factors if abs(factor) == 1), "")
        if name in value.symbols:
            value = value.put({name: _solved(item, name)})
    return value


def _put(cells: dict[Polynomial, islpy.Set], value: Polynomial, domain: islpy.Set) -> None:
    cells[value] = cells[value].union(domain) if value in cells else domain


class _Counter:
    """Sums basic sets over their dimensions; `found` collects polynomials with their parameter domains."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.found: list[tuple[islpy.Set, Polynomial]] = []
        self.num_pieces = 0

    def add(self, basic: islpy.BasicSet, value: Polynomial) -> None:
        """Adds the sum of `value` over the points of the set."""
        import islpy

        check_time()
        self.num_pieces += 1
        if self.num_pieces > MAX_PIECES:
            raise GaveUpError(f"the count falls into more than {MAX_PIECES} pieces")
        if basic.is_empty():
            return
        names = dim_names(basic, islpy.dim_type.set)
        if not names:
            self.found.append((basic.to_set().params(), value))
            return
        basic = basic.detect_equalities().remove_redundancies()
        known = constraints(basic)
        name = min(names, key=lambda name: _cost(name, known))
        mixed = [item for item in known if abs(dict(item.factors).get(name, 0)) > 1]
        solved = [item for item in known if item.is_equality and abs(dict(item.factors).get(name, 0)) == 1]
        if solved:
            put = {name: _solved(solved[0], name)}
            self.add(_without(basic, name), value.put(put))
        elif mixed:
            self.by_residue(basic, value, name, mixed)
        else:
            self.summed(basic, value, name, known)

    def summed(self, basic: islpy.BasicSet, value: Polynomial, name: str, known: Sequence[Constraint]) -> None:
        lowers = [_bound(item, name) for item in known if dict(item.factors).get(name) == 1]
        uppers = [_bound(item, name) for item in known if dict(item.factors).get(name) == -1]
        assert lowers and uppers, f"{name} is unbounded"
        rest = _without(basic, name)
        for at, lower in enumerate(lowers):
            highest = [lower - other - (other_at < at) for other_at, other in enumerate(lowers) if other_at != at]
            region = _restricted(rest, highest)
            if region.is_empty():
                continue
            for upper_at, upper in enumerate(uppers):
                lowest = [other - upper - (o < upper_at) for o, other in enumerate(uppers) if o != upper_at]
                part = _restricted(region, [*lowest, upper - lower])
                if not part.is_empty():
                    self.add(part, value.summed(name, lower, upper))

    def by_residue(self, basic: islpy.BasicSet, value: Polynomial, name: str, mixed: Sequence[Constraint]) -> None:
        """Bounds such as 2 x <= y are whole where the residue of y is known: one piece for each."""
        import islpy

        if self.depth == MAX_DEPTH:
            raise GaveUpError("its residues have residues without end")
        modulus = lcm(*(abs(dict(item.factors)[name]) for item in mixed))
        others = sorted(
            {other for item in mixed for other, factor in item.factors if other != name and factor % modulus}
        )
        if modulus ** len(others) > MAX_RESIDUES or not others:
            others = others or [name]
            if modulus ** len(others) > MAX_RESIDUES:
                raise GaveUpError(f"the bounds have {modulus} residues in {len(others)} symbols")
        params = set(dim_names(basic, islpy.dim_type.param))
        for residues in itertools.product(range(modulus), repeat=len(others)):
            piece, put, back = basic, value, []
            for other, residue in zip(others, residues, strict=True):
                part = f"{other}_m{self.num_pieces}"
                kind = islpy.dim_type.param if other in params else islpy.dim_type.set
                piece = _split(piece, kind, other, part, modulus, residue)
                put = put.put({other: symbol(part) * modulus + residue})
                if other in params:
                    back.append((other, part, residue))
            inner = _Counter(self.depth + 1)
            inner.num_pieces = self.num_pieces
            inner.add(piece, put)
            self.num_pieces = inner.num_pieces
            for domain, found in inner.found:
                for other, part, residue in back:
                    domain = _joined(domain, other, part, modulus, residue)
                    found = found.put({part: (symbol(other) - residue) * Fraction(1, modulus)})
                self.found.append((domain, found))


def _cost(name: str, known: Sequence[Constraint]) -> tuple[bool, int]:
    """Equalities first, then whole bounds, then few of them."""
    factors = [(dict(item.factors).get(name, 0), item.is_equality) for item in known]
    if any(abs(factor) == 1 and equal for factor, equal in factors):
        return False, 0
    mixed = any(abs(factor) > 1 for factor, _ in factors)
    lowers = sum(factor > 0 for factor, _ in factors)
    uppers = sum(factor < 0 for factor, _ in factors)
    return mixed, lowers * uppers


def _bound(item: Constraint, name: str) -> Polynomial:
    """What the constraint, with a factor of 1 or -1, bounds the symbol by."""
    rest = total(
        [constant(item.constant), *(symbol(other) * factor for other, factor in item.factors if other != name)]
    )
    return -rest if dict(item.factors)[name] == 1 else rest


_solved = _bound


def _without(basic: islpy.BasicSet, name: str) -> islpy.BasicSet:
    """The set without a dimension whose bounds are whole, so that the projection has no gaps."""
    import islpy

    kind = islpy.dim_type.set
    return basic.project_out(kind, dim_names(basic, kind).index(name), 1)


def _restricted(basic: islpy.BasicSet, at_least_zero: Iterable[Polynomial]) -> islpy.BasicSet:
    import islpy

    # islpy would convert a plain space itself, and print where a spent context has none
    space: Any = islpy.LocalSpace.from_space(basic.get_space())
    for value in at_least_zero:
        if value.is_constant:
            if value.constant < 0:
                return islpy.BasicSet.empty(basic.get_space())
            continue
        factors: dict[str | Literal[1], islpy.Val | int] = {
            name[0] if name else 1: int(factor) for name, factor in value.terms.items()
        }
        basic = basic.add_constraint(islpy.Constraint.ineq_from_names(space, factors))
    return basic


def _lifted(basic: islpy.BasicSet) -> list[islpy.BasicSet]:
    """Existential dimensions as dimensions: each is a quotient that the others determine, so no point is added. Where
    the quotients differ there are several parts, which are disjoint."""
    import islpy

    if basic.dim(islpy.dim_type.div) == 0:
        return [basic]
    parts = basic.compute_divs()
    if parts.n_basic_set() > 1:
        parts = parts.make_disjoint()
    return [_with_dims(part) for part in parts.get_basic_sets()]


def _with_dims(basic: islpy.BasicSet) -> islpy.BasicSet:
    import islpy

    before = basic.dim(islpy.dim_type.set)
    names = dim_names(basic, islpy.dim_type.set)
    lifted = basic.lift().flatten()
    for at in range(lifted.dim(islpy.dim_type.set)):
        lifted = lifted.set_dim_name(islpy.dim_type.set, at, names[at] if at < before else f"e{at - before}")
    return lifted


def _split(
    basic: islpy.BasicSet, kind: islpy.dim_type, name: str, part: str, modulus: int, residue: int
) -> islpy.BasicSet:
    """The points with name = modulus * part + residue, in terms of `part`."""
    import islpy

    size = basic.dim(kind)
    at = dim_names(basic, kind).index(name)
    basic = basic.add_dims(kind, 1).set_dim_name(kind, size, part)
    equal = islpy.Constraint.eq_from_names(basic.get_space(), {name: 1, part: -modulus, 1: -residue})
    return basic.add_constraint(equal).project_out(kind, at, 1)


def _joined(domain: islpy.Set, name: str, part: str, modulus: int, residue: int) -> islpy.Set:
    """The inverse on a domain of parameters: `name` again, a multiple plus the residue."""
    import islpy

    kind = islpy.dim_type.param
    size = domain.dim(kind)
    at = dim_names(domain, kind).index(part)
    domain = domain.add_dims(kind, 1).set_dim_name(kind, size, name)
    equal = islpy.Constraint.eq_from_names(domain.get_space(), {name: 1, part: -modulus, 1: -residue})
    return domain.add_constraint(equal).project_out(kind, at, 1)
