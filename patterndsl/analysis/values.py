"""What is an integer expression in digits? Its value case by case, each a polynomial under a guard."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from patterndsl.analysis.polynomial import Polynomial, constant, symbol
from patterndsl.analysis.radix import FALSE, TRUE, Digits, NotAffineError, both, divided, is_never_negative, safe_name
from patterndsl.ir.index import Arithmetic, Const, Function, Index, Param, Read, Select, Var

MAX_CASES = 64
MAX_INSIDE = 16
"""Floors inside a floor that is left to isl, which takes seconds to read some more."""

Case: TypeAlias = tuple[str, Polynomial]
"""A guard and the value under it; the guards of an expression cover everything once."""


@dataclass
class Values(Digits):
    """Digits, and the values of index expressions in them. `ranks`: of divisors, the inner ones first."""

    memo: dict[Index, list[Case]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    ranks: dict[str, int] = field(default_factory=dict)

    def value(self, index: Index) -> list[Case]:
        if index not in self.memo:
            self.memo[index] = [(guard, self.expand(found)) for guard, found in self.raw(index)]
        return self.memo[index]

    def raw(self, index: Index) -> list[Case]:
        match index:
            case Const(value):
                if abs(value) in self.constants:
                    named = symbol(self.name("constant", constant(abs(value))))
                    return [(TRUE, named if value > 0 else -named)]
                return [(TRUE, constant(value))]
            case Var(name):
                return [(TRUE, self.base(self.lengths.get(name, name)))]
            case Param(name):
                return [(TRUE, self.base(safe_name(name)))]
            case Arithmetic(op, left, right):
                found: list[Case] = []
                for (a, x), (b, y) in self.pairs(self.value(left), self.value(right)):
                    found.extend((both(a, b, guard), value) for guard, value in self.arithmetic(op, x, y))
                return _few(found)
            case Function("abs", (argument,)):
                return _few(
                    [
                        case
                        for guard, value in self.value(argument)
                        for case in (
                            (both(guard, self.compared("<=", constant(0), value)), value),
                            (both(guard, self.compared("<", value, constant(0))), -value),
                        )
                    ]
                )
            case Function("min" | "max" as name, arguments):
                cases = self.value(arguments[0])
                for argument in arguments[1:]:
                    cases = self.chosen(name, cases, self.value(argument))
                return cases
            case Function("isqrt" | "log2" as name, (argument,)):
                values = self.value(argument)
                if any(self.touches_position(value) for _, value in values):
                    raise NotAffineError(f"`{name}` of a position is not affine")
                return [(guard, self.base(self.name(name, value))) for guard, value in values]
            case Select(items, at):
                if isinstance(items, str):
                    raise NotAffineError(f"the list `{items}` has no values yet")
                return _few(
                    [
                        (both(guard, inner, self.compared("==", place, constant(number))), value)
                        for guard, place in self.value(at)
                        for number, item in enumerate(items)
                        for inner, value in self.value(item)
                    ]
                )
            case Read(name):
                raise NotAffineError(f"it calculates with the input `{name}`")
            case _:
                raise AssertionError(index)

    def base(self, name: str) -> Polynomial:
        self.seen.add(name)
        return self.expand(symbol(name))

    def pairs(self, left: list[Case], right: list[Case]) -> Iterable[tuple[Case, Case]]:
        if len(left) * len(right) > MAX_CASES:
            raise NotAffineError("it falls into too many cases")
        return itertools.product(left, right)

    def chosen(self, name: Literal["min", "max"], left: list[Case], right: list[Case]) -> list[Case]:
        found: list[Case] = []
        for (a, x), (b, y) in self.pairs(left, right):
            small, large = (x, y) if name == "min" else (y, x)
            found.append((both(a, b, self.compared("<=", small, large)), x))
            found.append((both(a, b, self.compared("<", large, small)), y))
        return _few(found)

    def arithmetic(self, op: str, left: Polynomial, right: Polynomial) -> list[Case]:
        match op:
            case "+":
                return [(TRUE, left + right)]
            case "-":
                return [(TRUE, left - right)]
            case "*":
                return [(TRUE, left * right)]
            case "//":
                return self.floor(left, right)
            case _:
                return [(guard, left - right * quotient) for guard, quotient in self.floor(left, right)]

    def floor(self, value: Polynomial, divisor: Polynomial) -> list[Case]:
        """value // divisor, case by case."""
        if value.is_constant and divisor.is_constant:
            return [(TRUE, constant(int(value.constant) // int(divisor.constant)))]
        if self.touches_position(divisor):
            raise NotAffineError("it divides by something that depends on the position")
        if divisor.is_constant and self.is_plain(value):
            return self.plain_floor(value, int(divisor.constant))
        if divisor.is_constant and not self.digits and value.degree <= 1:
            return [(TRUE, self.native_floor(value, int(divisor.constant)))]
        if len(divisor.terms) != 1:
            divisor = symbol(self.name("product", divisor))
        cases: list[Case] = [(TRUE, value)]
        while divisor != constant(1):
            radix = self.next_factor(cases[0][1], divisor)
            divisor, _ = divided(divisor, radix)
            cases = _few([(both(a, b), y) for a, x in cases for b, y in self.floor_once(x, radix)])
        return cases

    def plain_floor(self, value: Polynomial, divisor: int) -> list[Case]:
        """value // divisor of parameters, as a named value: these are never negative, so of less than 0 the ceiling of
        the opposite is named."""
        rounded = self.base(self.name("floor", value, divisor))
        if is_never_negative(value):
            return [(TRUE, rounded)]
        opposite = self.base(self.name("floor", -value + (divisor - 1), divisor))
        return _few(
            [
                (self.compared("<=", constant(0), value), rounded),
                (self.compared("<", value, constant(0)), -opposite),
            ]
        )

    def next_factor(self, value: Polynomial, divisor: Polynomial) -> Polynomial:
        """Which factor of a product to divide by first: the radix of the lowest digit, so that digits stay digits."""
        ((monomial, factor),) = divisor.terms.items()
        lowest = (name for name in sorted(self.ranges) if value.terms.get((name,), 0) in (1, -1))
        for radix in (self.expand(self.ranges[name]) for name in lowest):
            if len(radix.terms) == 1 and radix != constant(1) and not divided(divisor, radix)[1].terms:
                return radix
        if not monomial:
            return constant(factor)
        return symbol(min(monomial, key=lambda name: (self.ranks.get(name, len(self.ranks)), name)))

    def floor_once(self, value: Polynomial, radix: Polynomial) -> list[Case]:
        high, low = divided(self.expand(value), radix)
        least, greatest, strict = self.multiples(low, radix)
        final = greatest - 1 if strict else greatest
        if least == final:
            return [(TRUE, high + least)]
        return [
            (
                both(self.compared("<=", radix * times, low), self.compared("<", low, radix * (times + 1))),
                high + times,
            )
            for times in range(least, final + 1)
        ]

    def native_floor(self, value: Polynomial, divisor: int) -> Polynomial:
        text = f"floor(({self.text(value)})/{divisor})"
        if text.count("floor(") > MAX_INSIDE:
            raise NotAffineError("it has too many divisions inside one another")
        name = next((key for key, known in self.floors.items() if known == text), f"floor{len(self.floors)}")
        self.floors[name] = text
        return symbol(name)


def _few(cases: list[Case]) -> list[Case]:
    live = [case for case in cases if case[0] != FALSE]
    if len(live) > MAX_CASES:
        raise NotAffineError("it falls into too many cases")
    return live
