"""How does a relation read in other coordinates? Linear sums of symbols with known ranges, simplified on the way.

Positions are replaced by sums of digits, q = 256 q.0 + q.1; then `//` and `%` by a divisor of the weights disappear,
common summands cancel, and what the ranges decide is decided. Everything is exact: the new relation holds where the
old one does, wherever the symbols are in their ranges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeAlias, assert_never

from patterndsl.ir.index import (
    Arithmetic,
    Const,
    Function,
    Index,
    Param,
    Read,
    Select,
    Var,
    arithmetic,
    function,
    select,
)
from patterndsl.ir.relation import (
    EVERYTHING,
    NOTHING,
    And,
    Compare,
    CompareOp,
    Everything,
    Holds,
    Listed,
    Not,
    Nothing,
    Or,
    Random,
    Relation,
    compare,
    conjunction,
    disjunction,
    negation,
)

Range: TypeAlias = tuple[int, int]
"""Least and greatest value, both inclusive."""

UNKNOWN: Range = (-(1 << 62), 1 << 62)
"""What an expression may be of which nothing else is known: every value stays within 62 bits, which is checked when
sizes are bound."""


@dataclass(frozen=True, slots=True)
class Linear:
    """constant + the sum of factor * atom; atoms in a fixed order, each once, no factor 0."""

    terms: tuple[tuple[Index, int], ...]
    constant: int

    @staticmethod
    def of(terms: Mapping[Index, int], constant: int) -> Linear:
        found = [term for term in terms.items() if term[1]]
        if len(found) > 1:
            found.sort(key=lambda term: repr(term[0]))
        return Linear(tuple(found), constant)

    def plus(self, other: Linear, times: int = 1) -> Linear:
        if not other.terms:
            return Linear(self.terms, self.constant + other.constant * times)
        terms = dict(self.terms)
        for atom, factor in other.terms:
            terms[atom] = terms.get(atom, 0) + factor * times
        return Linear.of(terms, self.constant + other.constant * times)

    def times(self, factor: int) -> Linear:
        return Linear(tuple((atom, by * factor) for atom, by in self.terms if factor), self.constant * factor)

    def over(self, divisor: int) -> Linear:
        """The exact quotient."""
        return Linear(tuple((atom, by // divisor) for atom, by in self.terms), self.constant // divisor)

    def index(self) -> Index:
        """As an expression."""
        added: Index | None = None
        for atom, factor in self.terms:
            if factor > 0:
                part = arithmetic("*", atom, Const(factor))
                added = part if added is None else arithmetic("+", added, part)
        total: Index = Const(self.constant) if added is None else added
        for atom, factor in self.terms:
            if factor < 0:
                total = arithmetic("-", total, arithmetic("*", atom, Const(-factor)))
        if added is None or not self.constant:
            return total
        op: Arithmetic | Index
        if self.constant > 0:
            op = arithmetic("+", total, Const(self.constant))
        else:
            op = arithmetic("-", total, Const(-self.constant))
        return op


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands for the positions and other symbols, and between which bounds the new symbols lie."""

    put: Mapping[Var | Param, Index]
    ranges: Mapping[Index, Range]

    # ---- expressions

    def linear(self, index: Index) -> Linear:
        match index:
            case Const(value):
                return Linear((), value)
            case Var() | Param():
                standing = self.put.get(index)
                if standing is None or standing == index:
                    return Linear(((index, 1),), 0)
                return Frame({}, self.ranges).linear(standing)
            case Arithmetic("+", left, right):
                return self.linear(left).plus(self.linear(right))
            case Arithmetic("-", left, right):
                return self.linear(left).plus(self.linear(right), -1)
            case Arithmetic("*", left, right):
                return self._product(self.linear(left), self.linear(right))
            case Arithmetic(op, left, right):
                whole, divisor = self.linear(left), self.linear(right)
                if divisor.terms or divisor.constant < 1:
                    return _atom(arithmetic(op, whole.index(), divisor.index(), index.place))
                return self._floor(whole, divisor.constant) if op == "//" else self._modulo(whole, divisor.constant)
            case Function(name, arguments):
                return self._function(name, [self.linear(argument) for argument in arguments])
            case Read(name, facet, at):
                return _atom(Read(name, facet, self.linear(at).index()))
            case Select(items, at, place):
                values = items if isinstance(items, str) else tuple(self.linear(item).index() for item in items)
                return _atom(select(values, self.linear(at).index(), place))
            case _:
                assert_never(index)

    def _product(self, left: Linear, right: Linear) -> Linear:
        if not left.terms:
            return right.times(left.constant)
        if not right.terms:
            return left.times(right.constant)
        return _atom(arithmetic("*", left.index(), right.index()))

    def _floor(self, value: Linear, divisor: int) -> Linear:
        """value // divisor: what the divisor divides comes out, and the rest is left if it spans a multiple."""
        high, low = _parted(value, divisor)
        least, greatest = self.bounds(low)
        if least // divisor == greatest // divisor:
            return high.plus(Linear((), least // divisor))
        common = gcd(divisor, *(factor for _, factor in low.terms))
        rest = Linear(tuple((atom, factor // common) for atom, factor in low.terms), low.constant // common)
        return high.plus(_atom(arithmetic("//", rest.index(), Const(divisor // common))))

    def _modulo(self, value: Linear, divisor: int) -> Linear:
        _, low = _parted(value, divisor)
        least, greatest = self.bounds(low)
        if least // divisor == greatest // divisor:
            return low.plus(Linear((), least // divisor * divisor), -1)
        return _atom(arithmetic("%", low.index(), Const(divisor)))

    def _function(self, name: str, arguments: list[Linear]) -> Linear:
        match name:
            case "abs":
                (value,) = arguments
                least, greatest = self.bounds(value)
                if least >= 0 or greatest <= 0:
                    return value.times(1 if least >= 0 else -1)
                common = gcd(value.constant, *(factor for _, factor in value.terms))
                part = value.over(common)
                if part.terms[0][1] < 0:  # abs(x) = abs(-x): one form for both
                    part = part.times(-1)
                return _atom(function("abs", (part.index(),))).times(common)
            case "min" | "max":
                kept = self._candidates(arguments, 1 if name == "min" else -1)
                if len(kept) == 1:
                    return kept[0]
                return _atom(function("min" if name == "min" else "max", tuple(item.index() for item in kept)))
            case "isqrt" | "log2":
                return _atom(function("isqrt" if name == "isqrt" else "log2", (arguments[0].index(),)))
            case _:
                raise AssertionError(name)

    def _candidates(self, arguments: list[Linear], sign: int) -> list[Linear]:
        """The arguments that can be the least (sign 1) or greatest (sign -1)."""
        kept: list[Linear] = []
        for argument in arguments:
            if any(self.bounds(argument.plus(other, -1).times(sign))[0] >= 0 for other in kept):
                continue
            kept = [other for other in kept if self.bounds(other.plus(argument, -1).times(sign))[0] < 0]
            kept.append(argument)
        return kept

    def bounds(self, value: Linear) -> Range:
        """Between which values it lies; never too narrow."""
        least = greatest = value.constant
        for atom, factor in value.terms:
            low, high = self._atom_bounds(atom)
            least += factor * (low if factor > 0 else high)
            greatest += factor * (high if factor > 0 else low)
        return least, greatest

    def _atom_bounds(self, atom: Index) -> Range:
        if atom in self.ranges:
            return self.ranges[atom]
        inner = Frame({}, self.ranges)
        match atom:
            case Arithmetic("%", _, Const(divisor)):
                return 0, divisor - 1
            case Arithmetic("//", left, Const(divisor)):
                low, high = inner.bounds(inner.linear(left))
                return low // divisor, high // divisor
            case Arithmetic("*", left, right):
                a, b = inner.bounds(inner.linear(left)), inner.bounds(inner.linear(right))
                corners = [x * y for x in a for y in b]
                return min(corners), max(corners)
            case Function("abs", (argument,)):
                low, high = inner.bounds(inner.linear(argument))
                return max(0, low, -high), max(-low, high)
            case Function("min" | "max" as name, arguments):
                found = [inner.bounds(inner.linear(argument)) for argument in arguments]
                pick = min if name == "min" else max
                return pick(low for low, _ in found), pick(high for _, high in found)
            case _:
                return UNKNOWN

    # ---- relations

    def relation(self, relation: Relation) -> Relation:
        """The relation in the new symbols, simplified."""
        match relation:
            case Everything() | Nothing():
                return relation
            case Compare(op, left, right):
                return self.compared(op, self.linear(left).plus(self.linear(right), -1))
            case Holds(read):
                return Holds(Read(read.name, read.facet, self.linear(read.index).index()))
            case And(terms):
                return _unit_propagated(conjunction(map(self.relation, terms)), self)
            case Or(terms):
                return disjunction(map(self.relation, terms))
            case Not(term):
                return self.negated(self.relation(term))
            case Listed(name, width, row, key):
                return Listed(name, width, self.linear(row).index(), self.linear(key).index())
            case Random(count, seed, avoid, q, k, num_q, num_k, place):
                q, k, num_q, num_k = (self.linear(item).index() for item in (q, k, num_q, num_k))
                return Random(count, seed, avoid, q, k, num_q, num_k, place)
            case _:
                assert_never(relation)

    def compared(self, op: CompareOp, value: Linear) -> Relation:
        """value op 0."""
        match op:
            case "<":
                return self._at_most_zero(value.plus(Linear((), 1)))
            case "<=":
                return self._at_most_zero(value)
            case "==":
                return self._zero(value)
            case "!=":
                return self.negated(self._zero(value))

    def negated(self, term: Relation) -> Relation:
        """The complement, by De Morgan's laws as far down as comparisons: so that what one side must be shows."""
        match term:
            case And(terms):
                return disjunction(map(self.negated, terms))
            case Or(terms):
                return _unit_propagated(conjunction(map(self.negated, terms)), self)
            case Compare("<=" | "<" as op, left, right):
                plain = Frame({}, self.ranges)  # the term is in the new symbols already
                value = plain.linear(right).plus(plain.linear(left), -1)
                return self._at_most_zero(value.plus(Linear((), 1)) if op == "<=" else value)
            case _:
                return negation(term)

    def _at_most_zero(self, value: Linear) -> Relation:
        least, greatest = self.bounds(value)
        if greatest <= 0:
            return EVERYTHING
        if least > 0:
            return NOTHING
        common = gcd(*(factor for _, factor in value.terms))
        value = Linear(tuple((a, f // common) for a, f in value.terms), -(-value.constant // common))
        opened = self._without_floor(value)
        if opened is not None:
            return self._at_most_zero(opened)
        return _compare("<=", value)

    def _without_floor(self, value: Linear) -> Linear | None:
        """x // d <= n is x <= d n + d - 1, and x // d >= n is x >= d n; None where no floor stands alone."""
        for atom, factor in value.terms:
            if not isinstance(atom, Arithmetic) or atom.op != "//" or abs(factor) != 1:
                continue
            if not isinstance(atom.right, Const):
                continue
            divisor, inner = atom.right.value, Frame({}, self.ranges).linear(atom.left)
            rest = value.plus(_atom(atom), -factor).times(divisor)
            slack = 1 - divisor if factor > 0 else 0
            return inner.times(factor).plus(rest).plus(Linear((), slack))
        return None

    def _zero(self, value: Linear) -> Relation:
        least, greatest = self.bounds(value)
        if greatest < 0 or least > 0:
            return NOTHING
        if not value.terms:
            return EVERYTHING
        common = gcd(*(factor for _, factor in value.terms))
        if value.constant % common:
            return NOTHING
        value = value.over(common)
        opened = self._without_modulo(value)
        if opened is not None:
            return self._zero(opened)
        # the rest below a divisor of the others is 0 by itself: 256 x + y = 0 with |y| < 256
        for divisor in sorted({abs(factor) for _, factor in value.terms} - {1}, reverse=True):
            high, low = _parted(value, divisor)
            least, greatest = self.bounds(low)
            if high.terms and low.terms and -divisor < least and greatest < divisor:
                return conjunction((self._zero(low), self._zero(high)))
        return _compare("==", value)

    def _without_modulo(self, value: Linear) -> Linear | None:
        """x % d = n is x = n + a multiple of d, if x can be only one of those; None where x can be several."""
        if len(value.terms) != 1:
            return None
        ((atom, factor),) = value.terms
        if not isinstance(atom, Arithmetic) or atom.op != "%" or not isinstance(atom.right, Const):
            return None
        divisor, wanted = atom.right.value, -value.constant // factor
        inner = Frame({}, self.ranges).linear(atom.left)
        least, greatest = self.bounds(inner)
        first = least + (wanted - least) % divisor  # the least value of that remainder
        return inner.plus(Linear((), -first)) if first <= greatest < first + divisor else None


def _unit_propagated(relation: Relation, frame: Frame) -> Relation:
    """A & (~A | B) = A & B, A & (A | B) = A, what divisions by multiples imply, and of two bounds the closer one."""
    if not isinstance(relation, And):
        return relation
    units = {term for term in relation.terms if not isinstance(term, Or)}
    opposites = {frame.negated(term) for term in units}
    if opposites & units:
        return NOTHING
    divided = _Divided.by(units)
    kept: list[Relation] = []
    for term in relation.terms:
        if isinstance(term, Or):
            if not units.isdisjoint(term.terms):
                continue
            term = disjunction(divided.decided(part) for part in term.terms if part not in opposites)
        else:
            term = divided.decided(term)
        kept.append(term)
    found = _closest(kept)
    return found if found == relation else _unit_propagated(found, frame)


@dataclass(frozen=True, slots=True)
class _Divided:
    """What terms that all hold say of remainders, and of whether two expressions lie in one block."""

    remainders: Mapping[Index, Sequence[tuple[int, int]]]
    """(m, r) for each x % m == r."""
    together: Mapping[tuple[Index, Index], Sequence[int]]
    """d for each x // d == y // d."""
    apart: Mapping[tuple[Index, Index], Sequence[int]]
    """d for each x // d != y // d."""

    @staticmethod
    def by(terms: Iterable[Relation]) -> _Divided:
        remainders = defaultdict[Index, list[tuple[int, int]]](list)
        together, apart = (defaultdict[tuple[Index, Index], list[int]](list) for _ in range(2))
        for term in terms:
            match term:
                case Compare("==", Arithmetic("%", x, Const(divisor)), Const(rest)):
                    remainders[x].append((divisor, rest))
                case Compare("==" | "!=" as op, Arithmetic("//", x, Const(d)), Arithmetic("//", y, Const(e))) if d == e:
                    (together if op == "==" else apart)[x, y].append(d)
        return _Divided(remainders, together, apart)

    def decided(self, term: Relation) -> Relation:
        """The term, or what it is where a *different* divisor decides it: x % 4 == 2 makes x % 2 == 0, and who shares a
        block of 64 shares the one of 128."""
        holds = None
        match term:
            case Compare("==" | "!=", Arithmetic("%", x, Const(divisor)), Const(rest)):
                known = (r % divisor for m, r in self.remainders.get(x, ()) if m % divisor == 0 and m != divisor)
                holds = next((remainder == rest for remainder in known), None)
            case Compare("==" | "!=", Arithmetic("//", x, Const(d)), Arithmetic("//", y, Const(e))) if d == e:
                if any(d % other == 0 and d != other for other in self.together.get((x, y), ())):
                    holds = True
                elif any(other % d == 0 and d != other for other in self.apart.get((x, y), ())):
                    holds = False
        if holds is None or not isinstance(term, Compare):
            return term
        return EVERYTHING if holds == (term.op == "==") else NOTHING


def _closest(terms: list[Relation]) -> Relation:
    """Their conjunction, where of `x <= 3` and `x <= 5` only the first is said, and `x <= 3 & x >= 5` is nothing."""
    plain, least = Frame({}, {}), dict[tuple[tuple[Index, int], ...], int]()
    sums: dict[Relation, Linear] = {}  # each says that a sum is at most 0: the largest constant says most
    for term in terms:
        if isinstance(term, Compare) and term.op == "<=":
            value = sums[term] = plain.linear(term.left).plus(plain.linear(term.right), -1)
            least[value.terms] = max(value.constant, least.get(value.terms, value.constant))
    for value in sums.values():
        opposite = least.get(value.times(-1).terms)
        if opposite is not None and value.constant + opposite > 0:
            return NOTHING
    return conjunction(term for term in terms if term not in sums or sums[term].constant == least[sums[term].terms])


def _atom(index: Index) -> Linear:
    return Linear((), index.value) if isinstance(index, Const) else Linear(((index, 1),), 0)


def _parted(value: Linear, divisor: int) -> tuple[Linear, Linear]:
    """(high, low) with value = divisor * high + low, the constant's remainder in low."""
    high = {atom: factor // divisor for atom, factor in value.terms if factor % divisor == 0}
    low = {atom: factor for atom, factor in value.terms if factor % divisor}
    return Linear.of(high, value.constant // divisor), Linear.of(low, value.constant % divisor)


def _compare(op: CompareOp, value: Linear) -> Relation:
    """value op 0 with what is added on the left and what is subtracted on the right."""
    if op == "==" and value.terms and value.terms[0][1] < 0:
        value = value.times(-1)
    left = Linear(tuple((a, f) for a, f in value.terms if f > 0), max(0, value.constant))
    right = Linear(tuple((a, -f) for a, f in value.terms if f < 0), max(0, -value.constant))
    return compare(op, left.index(), right.index())
