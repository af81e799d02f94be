"""Which keys must a decoder keep, for every length at once? Those that some query at or after step t attends.

The set {k <= t : there is q >= t with (q, k) in R} is what a cache must hold: a key outside it is dead, whatever is
decoded later. isl takes the query away (a projection), what is left beside 0 <= k <= t is the rule, and its count is
the size of the cache. `cache.py` says the same of one length, with slots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from patterndsl.analysis.budget import within
from patterndsl.analysis.conditions import condition, shown_names
from patterndsl.analysis.count import Cell, count, equalities, reduced
from patterndsl.analysis.digits import Affine, affine
from patterndsl.analysis.enclosing import enclosing
from patterndsl.analysis.figure import Certainty
from patterndsl.analysis.formula import Formula, digits_at, formula
from patterndsl.analysis.latex import Shown
from patterndsl.analysis.pairs import COUNTING, NoFormula, Symbolic, hints
from patterndsl.analysis.polynomial import Monomial, Number, Polynomial, symbol
from patterndsl.analysis.radix import NotAffineError, Split
from patterndsl.analysis.sets import Constraint, GaveUpError, coalesced, constraints, dim_names, limited, regions
from patterndsl.ir.index import HEAD, LAYER, NK, NQ, Const, Index, K, Param, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation, compare, conjunction, draws_in, indices, inputs_read, substitute
from patterndsl.lower.lookup import Lookup

if TYPE_CHECKING:
    import islpy

Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class LooksAhead:
    """Some query attends a later key, which does not exist yet when it is decoded: there is no cache policy."""

    certainty: Certainty

    def __str__(self) -> str:
        may = "attends" if self.certainty == "Exact" else "may attend"
        return f"not decodable: a query {may} a later key"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"kind": "not decodable", "certainty": self.certainty}


@dataclass(frozen=True, slots=True, eq=False)
class CachePolicy(Shown):
    """What step t holds, its own key included, for every t and all values of the parameters.

    kind: "bounded" where the number of keys does not grow with t; `unless` says for which parameters it does even so.
    rule: the condition under which a key 0 <= k <= t is kept. size: their number, in `t` and the parameters; most: its
    maximum over t where it could be shown, else None. certainty: UpperBound where inputs or draws decide, so that some
    data need fewer keys, or where a part of the pattern is not affine and was left out.
    """

    kind: Literal["bounded", "growing"]
    rule: str
    unless: str | None
    size: Formula
    most: Polynomial | None
    step: str
    certainty: Certainty
    _kept: tuple[tuple[Constraint, ...], ...] = field(repr=False)

    def keeps(self, t: int | Integers, keys: Integers, params: Mapping[str, int], n: int | None = None) -> Booleans:
        """Which of these keys, 0 <= k <= t, step t holds; t: one step, or one for each key. n: the length, for patterns
        that depend on it."""
        form = self.size.affine
        digits = digits_at(form, {"N": t + 1 if n is None else n, **params, self.step: t, "k": keys}, of="k")
        if digits is None:
            raise ValueError(f"the policy holds where {' and '.join(self.size.assumes)}")
        kept = np.zeros(keys.shape, dtype=bool)
        for piece in self._kept:
            here = np.ones(keys.shape, dtype=bool)
            for item in piece:
                side = sum((digits[name] * factor for name, factor in item.factors), start=item.constant)
                here &= (side == 0) if item.is_equality else (side >= 0)
            kept |= here
        return kept

    def size_at(self, t: int, params: Mapping[str, int], n: int | None = None) -> int | None:
        """The number of keys that step t holds; None outside the domain of the formula."""
        return self.size.at({"N": t + 1 if n is None else n, **params, self.step: t})

    def most_at(self, params: Mapping[str, int], n: int = 0) -> int | None:
        """The most keys that any step holds; None where that is not known."""
        digits = digits_at(self.size.affine, {"N": n, **params, self.step: 0})
        return None if self.most is None or digits is None else int(self.most.at(digits))

    def most_text(self) -> str | None:
        """The maximum over t as an expression."""
        return None if self.most is None else self.size.text(Cell(self.size.context, self.most))

    def __str__(self) -> str:
        most = self.most_text()
        where, others = self.size.stated(), len(self.size.cells) - 1
        domain = "" if where == "always" else f" for {where}"
        domain += f" ({others:,} other case{'s' * (others > 1)})" if others else ""
        size = f"{self.size.text()} keys at step {self.step}{domain}"
        kind = f"bounded({most})" if most else f"{self.kind}, {size}"
        unless = f" unless {self.unless}" if self.unless else ""
        rule = {"always": "every key", "never": "no key"}.get(self.rule, self.rule)
        if len(rule) > MAX_RULE:
            rule = f"by a rule of {len(self._kept)} cases"
        assumed = f", where {' and '.join(self.size.assumes)}" if self.size.assumes else ""
        return f"{kind}{unless}; keep {rule}{assumed}"

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "kind": self.kind,
            "unless": self.unless,
            "certainty": self.certainty,
            "rule": self.rule,
            "most": self.most_text(),
            "most_expr": None if self.most is None else self.size.python(Cell(self.size.context, self.most)),
            "size": [
                {"keys": text, "where": condition, "expr": self.size.python(cell)}
                for cell, (text, condition) in zip(self.size.cells, self.size.cases(), strict=True)
            ],
            "assumes": list(self.size.assumes),
        }


VALUE = "max_0h"
"""The value of a polynomial as a symbol: no parameter and no digit of one has this name."""
MAX_RULE = 160
"""Characters; a longer rule is not written out beside others."""
EFFORT = COUNTING // 2
"""Operations of isl for each of a few attempts."""

Policy: TypeAlias = CachePolicy | LooksAhead | NoFormula


Attempt: TypeAlias = tuple[bool, bool]
ATTEMPTS: tuple[Attempt, ...] = ((True, False), (False, False), (True, True))
"""How a pattern is written: `digits` and `aligned`, see `digits.affine`."""


def cache_policy(pattern: Symbolic) -> Policy:
    """The policy of one head for every length, or why there is none. Work: bounded, some tenths of a second."""
    return policy_by(pattern, ATTEMPTS)[0]


@within()
def policy_by(pattern: Symbolic, attempts: Sequence[Attempt]) -> tuple[Policy, Sequence[Attempt]]:
    """The same by the first attempt that succeeds, and the attempts from that one on: for patterns that are alike."""
    if _is_seen_ahead(pattern):
        return LooksAhead("Exact"), attempts
    reasons = []
    num_given_up = 0
    for at, (digits, aligned) in enumerate(attempts):
        try:
            return _policy(pattern, digits, aligned), attempts[at:]
        except NotAffineError as failed:
            reasons.append(str(failed))
        except GaveUpError as failed:
            reasons.append(str(failed))
            num_given_up += 1
            if num_given_up == 2:
                break
    bound = None if num_given_up == 2 else _bound(pattern)
    return NoFormula(reasons[0]) if bound is None else bound, attempts


def _bound(pattern: Symbolic) -> CachePolicy | None:
    """What is enough to keep: a policy of more pairs than the pattern has, those that comparisons which are not affine
    would drop among them."""
    more = enclosing(pattern.relation, pattern.given, hints(pattern))
    if more == pattern.relation:
        return None
    for digits in (True, False):
        try:
            found = _policy(replace(pattern, relation=more), digits, False)
        except (NotAffineError, GaveUpError):
            continue
        return replace(found, certainty="UpperBound") if isinstance(found, CachePolicy) else None
    return None


def _is_seen_ahead(pattern: Symbolic) -> bool:
    """Whether a query of some short sequence attends a later key: isl would take longer to say so."""
    if inputs_read(pattern.relation) or any(draws_in(pattern.relation)):
        return False
    for values in pattern.short:
        known: dict[Index, int] = {NQ: values["N"], NK: values["N"], HEAD: 0, LAYER: 0}
        known |= {Param(name): value for name, value in values.items()}
        put: dict[Index, Index] = {index: Const(value) for index, value in known.items()}
        positions = np.arange(values["N"])
        point = Point(positions[:, None], positions, 0, Lookup({}))
        relation = substitute(pattern.relation, partial(_replaced, put))
        if np.any(member(relation, point) & (point.q < point.k)):
            return True
    return False


def _replaced(put: Mapping[Index, Index], index: Index) -> Index:
    return put.get(index, index)


def _policy(pattern: Symbolic, digits: bool, aligned: bool) -> Policy:
    import islpy

    step = _free_name(pattern)
    t = Param(step)
    relations = (
        conjunction((pattern.relation, compare("<=", t, Q))),
        conjunction((compare("<=", K, t), compare("<", t, NQ))),
        compare("<", Q, K),
    )
    form = affine(
        relations, pattern.given, lengths=pattern.lengths, hints=hints(pattern), digits=digits, aligned=aligned
    )
    certainty: Certainty = "UpperBound" if form.flags else "Exact"
    with limited(EFFORT if digits else COUNTING) as context:
        _, (later, known, ahead) = regions(context, form)
        if not later.intersect(ahead).is_empty():
            return LooksAhead(certainty)
        # where the pattern does not depend on N, any number of steps may follow
        free = set() if _depends_on_length(pattern) else _leaves(form, "N")

        def of_keys(points: islpy.Set) -> islpy.Set:
            kind = islpy.dim_type.set
            points = points.project_out(kind, len(form.q_digits) + len(form.k_digits), len(form.flags))
            points = points.project_out(kind, 0, len(form.q_digits))
            return coalesced(_without(points, free))

        alive, frame = of_keys(later.intersect(known)), of_keys(known)
        domain = frame.params()
        typical = [{**values, step: values["N"] // 2 + 17} for values in pattern.typical]
        size = formula(count(alive, domain), form, domain, typical)
        endless = _endless(form, ("N", step))
        kept = _shortest(alive, frame)
        if any(part.dim(islpy.dim_type.div) for part in (*kept.get_basic_sets(), *domain.get_basic_sets())):
            raise NotAffineError("its rule has divisions that no digit stands for")
        rule = condition(kept, shown_names(form, "k"), subject=_leaves(form, "k"))
        parts = [(cell.value, part) for cell in size.cells for part in cell.domain.get_basic_sets()]
        keep = tuple(tuple(constraints(part)) for part in kept.get_basic_sets())
        growing = [part for value, part in parts if _grows(value, part, endless)]
        if any(part in growing for part in size.cells[0].domain.get_basic_sets()):
            return CachePolicy("growing", rule, None, size, None, step, certainty, keep)
        bounded = [(value, part) for value, part in parts if part not in growing]
        most = _most(size.cells[0], bounded, form, step)
        positions = _leaves(form, step) | _leaves(form, "N")
        special = [_without(part.to_set(), positions) for part in growing]
        unless = condition(_united(special).gist(_without(domain, positions)), shown_names(form)) if special else None
        return CachePolicy("bounded", rule, unless, size, most, step, certainty, keep)


def _free_name(pattern: Symbolic) -> str:
    taken = {item.name for relation in _relations(pattern) for item in indices(relation) if isinstance(item, Param)}
    return next(name for name in ("t", *(f"t{at}" for at in range(len(taken) + 1))) if name not in taken)


def _relations(pattern: Symbolic) -> Iterator[Relation]:
    yield pattern.relation
    yield from pattern.given


def _depends_on_length(pattern: Symbolic) -> bool:
    return any(index in (NQ, NK) for relation in _relations(pattern) for index in indices(relation))


def _leaves(form: Affine, name: str) -> set[str]:
    """The digits of a symbol."""
    parts = [item for item in form.defined if isinstance(item, Split) and item.name == name]
    if not parts:
        return {name}
    (part,) = parts
    return _leaves(form, part.quotient) | (_leaves(form, part.remainder) if part.remainder else set())


def _endless(form: Affine, names: tuple[str, ...]) -> set[str]:
    """The digits of these symbols that no divisor bounds, and the named values that depend on them."""
    found = {leaf for name in names for leaf in _leaves(form, name)}
    found -= {item.remainder for item in form.defined if isinstance(item, Split) and item.remainder}
    for item in form.defined:
        if not isinstance(item, Split) and item.value.symbols & found:
            found.add(item.name)
    return found


def _grows(value: Polynomial, domain: islpy.BasicSet, endless: Collection[str]) -> bool:
    """Whether the value can be as large as it likes on the domain, the parameters other than the endless ones fixed."""
    import islpy

    known_names = set(dim_names(domain, islpy.dim_type.param))
    if value.symbols <= known_names and all(len(monomial) <= 1 for monomial in value.terms):
        # one more symbol for the value itself: is it bounded once the endless ones are taken away?
        whole = lcm(*(Fraction(by).denominator for by in value.terms.values()))
        kind, at = islpy.dim_type.param, domain.dim(islpy.dim_type.param)
        plain = domain.remove_divs().add_dims(kind, 1).set_dim_name(kind, at, VALUE)
        factors: dict[Any, Any] = {(item[0] if item else 1): int(by * whole) for item, by in value.terms.items()}
        equal = islpy.Constraint.eq_from_names(plain.get_space(), {**factors, VALUE: -whole})
        left = _without(plain.add_constraint(equal).to_set(), endless)
        return not all(_is_bounded(part, VALUE) for part in left.get_basic_sets())
    for name in value.symbols.intersection(endless):
        (basic,) = _without(domain.to_set(), set(endless) - {name}).get_basic_sets()
        if not _is_bounded(basic, name):
            return True
    return False


def _is_bounded(domain: islpy.BasicSet, name: str) -> bool:
    """Whether something bounds the symbol from above; what its remainder is, `t % 2 = 0`, does not."""
    factors = [(dict(item.factors).get(name, 0), item.is_equality) for item in constraints(domain.remove_divs())]
    return any(factor < 0 or (factor != 0 and is_equality) for factor, is_equality in factors)


def _without(points: islpy.Set, names: Collection[str]) -> islpy.Set:
    """The points for some values of these parameters."""
    import islpy

    kind = islpy.dim_type.param
    for name in names:
        known = dim_names(points, kind)
        if name in known:
            points = points.project_out(kind, known.index(name), 1)
    return points


def _most(main: Cell, parts: Iterable[tuple[Polynomial, islpy.BasicSet]], form: Affine, step: str) -> Polynomial | None:
    """The maximum over t, if it is that of long sequences: its value with the remainders of t at their ends, where that
    is reached and no other part has more."""
    most, reached = main.value, main.domain
    for item in form.defined:
        if isinstance(item, Split) and item.remainder in most.symbols & _leaves(form, step):
            at_zero = most.put({item.remainder: Polynomial({})})
            slope = (most - at_zero).terms
            if (
                any(monomial.count(item.remainder) > 1 for monomial in slope)
                or len({by > 0 for by in slope.values()}) > 1
            ):
                return None
            end = item.radix.put(form.values) - 1 if min(slope.values()) > 0 else Polynomial({})
            most = most.put({item.remainder: end})
            reached = _restricted(reached, symbol(item.remainder) - end)
    steps = _leaves(form, step) | _leaves(form, "N")
    divisors = {name for item in form.defined if isinstance(item, Split) for name in item.radix.symbols}
    is_reached = _without(main.domain, steps).is_subset(_without(reached, steps))
    return most if is_reached and all(_at_most(value, most, part, divisors) for value, part in parts) else None


def _at_most(value: Polynomial, most: Polynomial, domain: islpy.BasicSet, divisors: set[str]) -> bool:
    """Whether the value is no larger on the domain. A product r * x of a divisor r and x <= c counts as r * c."""
    above = reduced(value - most, equalities(domain))
    for name in sorted(divisors & above.symbols):
        products: dict[Monomial, Number] = {
            monomial: by for monomial, by in above.terms.items() if len(monomial) == 2 and name in monomial
        }
        factors: dict[Monomial, Number] = {_other(monomial, name): by for monomial, by in products.items()}
        end = next((end for end in (-1, 0) if not _reaches(domain, Polynomial(factors) - end - 1)), None)
        if products and end is not None:
            above = above - Polynomial(products) + symbol(name) * end
    return not _reaches(domain, above - 1)


def _other(product: Monomial, name: str) -> Monomial:
    """The other factor of a product of two."""
    at = product.index(name)
    return product[:at] + product[at + 1 :]


def _reaches(domain: islpy.BasicSet, value: Polynomial) -> bool:
    """Whether a linear value is at least 0 somewhere; yes where it cannot be decided."""
    import islpy

    names = set(dim_names(domain, islpy.dim_type.param))
    if not value.symbols <= names or any(len(monomial) > 1 for monomial in value.terms):
        return True
    return not _restricted(domain.to_set(), value).is_empty()


def _restricted(domain: islpy.Set, value: Polynomial) -> islpy.Set:
    """The part where a linear value is at least 0."""
    import islpy

    factors: dict[Any, Any] = {(monomial[0] if monomial else 1): int(by) for monomial, by in value.terms.items()}
    return domain.add_constraint(islpy.Constraint.ineq_from_names(domain.get_space(), factors))


def _united(points: Sequence[islpy.Set]) -> islpy.Set:
    found = points[0]
    for other in points[1:]:
        found = found.union(other)
    return found


def _shortest(points: islpy.Set, frame: islpy.Set) -> islpy.Set:
    """The same points inside the frame, by fewer pieces and fewer constraints."""
    import islpy

    def united(pieces: Iterable[list[islpy.Constraint]]) -> islpy.Set:
        found = islpy.Set.empty(points.get_space())
        for items in pieces:
            piece = islpy.BasicSet.universe(points.get_space())
            for item in items:
                piece = piece.add_constraint(item)
            found = found.union(piece.to_set())
        return found

    def fits(pieces: Iterable[list[islpy.Constraint]]) -> bool:
        return bool(united(pieces).intersect(frame).is_equal(points))

    def shortened(pieces: list[list[islpy.Constraint]]) -> list[list[islpy.Constraint]]:
        for at, items in enumerate(pieces):
            for item in items:
                shorter = [other for other in pieces[at] if other is not item]
                if fits([*pieces[:at], shorter, *pieces[at + 1 :]]):
                    pieces[at] = shorter
        for items in list(pieces):
            others = [other for other in pieces if other is not items]
            pieces = others if fits(others) else pieces
        return pieces

    found = points.gist(frame)
    for _ in range(2):  # pieces that became one have constraints to lose again
        found = united(shortened([piece.get_constraints() for piece in coalesced(found).get_basic_sets()]))
    return found
