"""What is a count? A polynomial in named integers with rational coefficients; summed, it stays one.

Only what exact counting needs: sums, products, substitution and definite sums (Faulhaber). Rendering is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from functools import cache
from math import comb
from typing import TypeAlias

Monomial: TypeAlias = tuple[str, ...]
"""Symbols in ascending order, each as often as its power says; () is the constant."""
Number: TypeAlias = int | Fraction


class Polynomial:
    """A sum of monomials, immutable; equal and hashed by value."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, Number]) -> None:
        self.terms = {monomial: factor for monomial, factor in terms.items() if factor}

    def __eq__(self, other: object) -> bool:
        return self.terms == other.terms if isinstance(other, Polynomial) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __repr__(self) -> str:
        written = (" * ".join([str(factor), *monomial]) for monomial, factor in sorted(self.terms.items()))
        return f"Polynomial({' + '.join(written) or '0'})"

    def __add__(self, other: Polynomial | Number) -> Polynomial:
        terms = dict(self.terms)
        for monomial, factor in _polynomial(other).terms.items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return Polynomial(terms)

    def __neg__(self) -> Polynomial:
        return self * -1

    def __sub__(self, other: Polynomial | Number) -> Polynomial:
        return self + _polynomial(other) * -1

    def __mul__(self, other: Polynomial | Number) -> Polynomial:
        if not isinstance(other, Polynomial):
            return Polynomial({monomial: factor * other for monomial, factor in self.terms.items()})
        terms: dict[Monomial, Number] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                monomial = tuple(sorted(left + right))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return Polynomial(terms)

    @property
    def constant(self) -> Number:
        """The constant term."""
        return self.terms.get((), 0)

    @property
    def is_constant(self) -> bool:
        return not self.terms or set(self.terms) == {()}

    @property
    def degree(self) -> int:
        return max(map(len, self.terms), default=0)

    @property
    def symbols(self) -> frozenset[str]:
        return frozenset(symbol for monomial in self.terms for symbol in monomial)

    def by_power(self, symbol: str) -> dict[int, Polynomial]:
        """The coefficient of each power of the symbol, itself a polynomial in the other symbols."""
        powers: dict[int, dict[Monomial, Number]] = {}
        for monomial, factor in self.terms.items():
            rest = tuple(name for name in monomial if name != symbol)
            powers.setdefault(len(monomial) - len(rest), {})[rest] = factor
        return {power: Polynomial(terms) for power, terms in powers.items()}

    def put(self, values: Mapping[str, Polynomial]) -> Polynomial:
        """The polynomial with symbols replaced, all at once."""
        if self.symbols.isdisjoint(values):
            return self
        terms: dict[Monomial, Number] = {}
        for monomial, factor in self.terms.items():
            product = Polynomial({tuple(name for name in monomial if name not in values): factor})
            for name in monomial:
                if name in values:
                    product = product * values[name]
            for part, by in product.terms.items():
                terms[part] = terms.get(part, 0) + by
        return Polynomial(terms)

    def at(self, values: Mapping[str, int]) -> Fraction:
        """The value where every symbol has one."""
        total = Fraction(0)
        for monomial, factor in self.terms.items():
            product = Fraction(factor)
            for name in monomial:
                product *= values[name]
            total += product
        return total

    def summed(self, symbol: str, first: Polynomial, final: Polynomial) -> Polynomial:
        """The sum over symbol = first, ..., final (inclusive); right wherever final >= first - 1."""
        before = first - 1
        total = Polynomial({})
        for power, coefficient in self.by_power(symbol).items():
            total = total + coefficient * (_powers_to(power, final) - _powers_to(power, before))
        return total


def constant(value: Number) -> Polynomial:
    return Polynomial({(): value})


def symbol(name: str) -> Polynomial:
    return Polynomial({(name,): 1})


def total(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Their sum."""
    result = Polynomial({})
    for item in polynomials:
        result = result + item
    return result


def _polynomial(value: Polynomial | Number) -> Polynomial:
    return value if isinstance(value, Polynomial) else constant(value)


def _powers_to(power: int, final: Polynomial) -> Polynomial:
    """0^power + 1^power + ... + final^power, as a polynomial in `final`."""
    result, raised = Polynomial({}), constant(1)
    for coefficient in _faulhaber(power):
        result = result + raised * coefficient
        raised = raised * final
    return result


@cache
def _faulhaber(power: int) -> tuple[Fraction, ...]:
    """Coefficients c of S(x) = sum_i c[i] x^i, the sum of the powers of 0, ..., x; (x + 1)^(p + 1) telescopes."""
    if power == 0:
        return (Fraction(1), Fraction(1))
    # (x + 1)^(p + 1) = sum_j C(p + 1, j) S_j(x), where S_j sums i^j over 0..x and 0^0 = 1
    coefficients = [Fraction(comb(power + 1, i)) for i in range(power + 2)]
    for lower in range(power):
        for i, factor in enumerate(_faulhaber(lower)):
            coefficients[i] -= comb(power + 1, lower) * factor
    return tuple(factor / (power + 1) for factor in coefficients)
