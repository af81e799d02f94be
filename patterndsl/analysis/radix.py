"""How are polynomials in positions and symbolic divisors compared? In mixed radix digits, case by case.

A symbol gets digits, name = radix * quotient + remainder with 0 <= remainder < radix, where a comparison needs them.
Then `radix * A + B <= 0`, whose B stays within a few multiples of the radix, is a choice between affine cases: A is
smaller than all of them, or A = -j and B <= j * radix. Nothing here knows of patterns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Literal

from patterndsl.analysis.budget import check_time
from patterndsl.analysis.polynomial import Monomial, Number, Polynomial, constant, symbol
from patterndsl.ir.relation import CompareOp

MAX_DEPTH = 1
MAX_TEXT = 40_000
"""Characters: isl takes seconds to read more, uncounted."""
MAX_MULTIPLES = 12
LARGE_CONSTANT = 8
TRUE, FALSE = "true", "false"


class NotAffineError(Exception):
    """The relation has no exact affine form; the text says what stands in the way."""


class NeedsSplit(Exception):
    """Writing goes on only with one more digit: name = radix * quotient + remainder."""

    def __init__(self, name: str, radix: Polynomial, *, exact: bool = False) -> None:
        self.name, self.radix, self.exact = name, radix, exact


class NeedsName(Exception):
    """Writing goes on only if a large constant is treated as a parameter."""

    def __init__(self, value: int) -> None:
        self.value = value


@dataclass(frozen=True, slots=True)
class Split:
    """name = radix * quotient + remainder, 0 <= remainder < radix; no remainder where divisibility is assumed."""

    name: str
    radix: Polynomial
    quotient: str
    remainder: str | None


@dataclass(frozen=True, slots=True)
class Named:
    """A function of lengths and parameters that stands as a parameter of its own."""

    name: str
    operation: Literal["floor", "product", "isqrt", "log2", "constant"]
    value: Polynomial
    divisor: int = 1

    @property
    def least(self) -> int | None:
        """What the value counts as where it is less, as it may be where no guard lets it be used; None where it is
        never less."""
        if self.operation not in ("floor", "isqrt", "log2") or is_never_negative(self.value):
            return None
        return int(self.operation == "log2")


def both(*texts: str) -> str:
    """Their conjunction."""
    if FALSE in texts:
        return FALSE
    return _joined(" and ", [text for text in dict.fromkeys(texts) if text != TRUE], TRUE)


def either(*texts: str) -> str:
    """Their disjunction."""
    if TRUE in texts:
        return TRUE
    return _joined(" or ", [text for text in dict.fromkeys(texts) if text != FALSE], FALSE)


def _joined(word: str, parts: list[str], otherwise: str) -> str:
    text = word.join(f"({part})" for part in parts) if len(parts) > 1 else (parts or [otherwise])[0]
    if len(text) > MAX_TEXT:
        raise NotAffineError("it falls into too many cases")
    return text


def opposite(text: str) -> str:
    """Its negation."""
    return {TRUE: FALSE, FALSE: TRUE}.get(text, f"not ({text})")


@dataclass
class Digits:
    """The digits and named values that a formula has needed so far, and comparisons written in them.

    lengths: the symbol of each length. hints: typical values of symbols, which decide what is assumed to divide what.
    digits: give digits to constant divisors too. aligned: every divisor of a length is assumed to divide it. Methods
    raise NeedsSplit or NeedsName where writing goes on only with one digit more, and NotAffineError where it cannot.
    """

    lengths: Mapping[str, str]
    hints: Mapping[str, int]
    digits: bool
    aligned: bool
    constants: set[int] = field(default_factory=set)
    """Large constants that stand as parameters."""
    literals: set[int] = field(default_factory=set)
    """Large constants of the formula."""
    splits: list[Split] = field(default_factory=list)
    values: dict[str, Polynomial] = field(default_factory=dict)
    """What each split symbol is in the digits that are left."""
    ranges: dict[str, Polynomial] = field(default_factory=dict)
    """0 <= symbol < range."""
    named: dict[tuple[str, Polynomial, int], Named] = field(default_factory=dict)
    floors: dict[str, str] = field(default_factory=dict)
    """Quotients by constants that are left to isl, as texts."""

    positions: frozenset[str] = frozenset(("q", "k"))
    """The digits of both positions."""
    divisors: frozenset[str] = frozenset()
    """The symbols of all radices, in digits."""
    written: dict[tuple[Polynomial, str, tuple[Polynomial, ...]], str | Exception] = field(default_factory=dict)
    """Comparisons of this pass: the same ones come again and again."""

    # ---- digits

    def expand(self, value: Polynomial) -> Polynomial:
        return value.put(self.values)

    def leaves_of(self, name: str) -> set[str]:
        """The digits that came from splitting this symbol."""
        found, queue = set(), [name]
        while queue:
            at = queue.pop()
            parts = [entry for entry in self.splits if entry.name == at]
            if not parts:
                found.add(at)
            for entry in parts:
                queue.append(entry.quotient)
                queue.extend([entry.remainder] if entry.remainder else [])
        return found

    def split(self, name: str, radix: Polynomial, exact: bool) -> None:
        """Adds digits to a symbol."""
        if any(entry.name == name for entry in self.splits):
            raise NotAffineError(f"`{_readable(name)}` would need two systems of digits")
        if name in self.floors:
            raise NotAffineError("a quotient that is left to isl is divided again")
        if any(name in self.expand(entry.radix).symbols for entry in self.splits):
            exact = True  # a divisor has no digits of its own: it is taken as a multiple
        exact = exact or (self.aligned and any(name in self.leaves_of(length) for length in self.lengths.values()))
        if self.depth(name, radix) > MAX_DEPTH:
            raise NotAffineError("the divisors are too entangled")
        quotient, remainder = f"{name}_{len(self.splits)}h", f"{name}_{len(self.splits)}l"
        self.splits.append(Split(name, radix, quotient, None if exact else remainder))
        within = self.ranges.get(name)
        expanded = self.expand(radix) * symbol(quotient)
        if not exact:
            expanded = expanded + symbol(remainder)
            self.ranges[remainder] = radix
        if within is not None:
            whole, rest = divided(self.expand(within), self.expand(radix))
            if not rest.terms:
                self.ranges[quotient] = whole
        put = {name: expanded}
        self.values = {key: value.put(put) for key, value in self.values.items()} | put
        self.positions = frozenset(self.leaves_of("q") | self.leaves_of("k"))
        self.divisors = frozenset(name for entry in self.splits for name in self.expand(entry.radix).symbols)

    def is_split(self, name: str) -> bool:
        return any(entry.name == name for entry in self.splits)

    def depth(self, name: str, radix: Polynomial) -> int:
        """How often the radix was already divided out of what the symbol is a digit of."""
        found = 0
        while (entry := next((e for e in self.splits if name in (e.quotient, e.remainder)), None)) is not None:
            found += entry.radix == radix
            name = entry.name
        return found

    def name(
        self,
        operation: Literal["floor", "product", "isqrt", "log2", "constant"],
        value: Polynomial,
        divisor: int = 1,
    ) -> str:
        key = (operation, value, divisor)
        if key not in self.named:
            self.named[key] = Named(f"u{len(self.named)}", operation, value, divisor)
        return self.named[key].name

    # ---- what a value is made of

    def is_position(self, name: str) -> bool:
        return name in self.positions

    def touches_position(self, value: Polynomial) -> bool:
        return not value.symbols.isdisjoint(self.positions | self.floors.keys())

    def is_plain(self, value: Polynomial) -> bool:
        """Only parameters: no position, and no length, whose digits are wanted."""
        return value.symbols.isdisjoint(self.positions | self.floors.keys()) and not any(
            value.symbols & self.leaves_of(length) for length in self.lengths.values()
        )

    def without_products(self, value: Polynomial) -> Polynomial:
        """Products of parameters alone, none of which is a radix, become parameters themselves."""
        terms: dict[tuple[str, ...], int] = {}
        replaced = Polynomial({})
        for monomial, factor in value.terms.items():
            plain = (
                len(monomial) > 1 and self.divisors.isdisjoint(monomial) and self.is_plain(Polynomial({monomial: 1}))
            )
            if plain:
                replaced = replaced + symbol(self.name("product", Polynomial({monomial: 1}))) * factor
            else:
                terms[monomial] = int(factor)
        return replaced + Polynomial(terms)

    # ---- comparisons

    def compared(self, op: CompareOp, left: Polynomial, right: Polynomial) -> str:
        if op == "<":
            return self.at_most_zero(self.expand(left - right + 1))
        if op == "<=":
            return self.at_most_zero(self.expand(left - right))
        if op == "==":
            return self.is_zero(self.expand(left - right))
        return opposite(self.is_zero(self.expand(left - right)))

    def at_most_zero(self, value: Polynomial) -> str:
        return self.by_radix(value, "<=")

    def is_zero(self, value: Polynomial) -> str:
        return self.by_radix(value, "=")

    def by_radix(self, value: Polynomial, relation: Literal["<=", "="], divided_by: tuple[Polynomial, ...] = ()) -> str:
        """value <= 0 or value = 0, as a choice of affine cases. What it is the rest of a division by is not divided by
        that again; constants are divided out from large to small."""
        key = (value, relation, divided_by)
        if key not in self.written:
            check_time()
            try:
                self.written[key] = self.by_some_radix(value, relation, divided_by)
            except (NeedsSplit, NeedsName, NotAffineError) as failed:
                self.written[key] = failed
        found = self.written[key]
        if isinstance(found, Exception):
            raise found
        return found

    def by_some_radix(self, value: Polynomial, relation: Literal["<=", "="], divided_by: tuple[Polynomial, ...]) -> str:
        if value.is_constant:
            return TRUE if (value.constant <= 0 if relation == "<=" else value.constant == 0) else FALSE
        value = self.without_products(value)
        if value.degree <= 1 and not self.coarse(value):
            return f"{self.text(value)} {relation} 0"
        needed: NeedsSplit | NeedsName | None = None
        reason = "it multiplies two positions"
        for radix in self.radices(value):
            if any(radix == used or _is_larger(radix, used) for used in divided_by):
                continue
            try:
                return self.cases(value, radix, relation, divided_by)
            except (NeedsSplit, NeedsName) as found:
                needed = needed or found
            except NotAffineError as found:
                reason = str(found)
        if needed is not None:
            raise needed
        if value.degree <= 1:
            return f"{self.text(value)} {relation} 0"
        raise NotAffineError(reason)

    def cases(
        self, value: Polynomial, radix: Polynomial, relation: Literal["<=", "="], divided_by: tuple[Polynomial, ...]
    ) -> str:
        high, low = divided(value, radix)
        if not high.terms:
            raise NotAffineError("it is no multiple")
        least, greatest, _ = self.multiples(low, radix)
        parts = []
        if relation == "<=":
            parts.append(self.at_most_zero(high + greatest))
            greatest -= 1
        for times in range(least, greatest + 1):
            rest = self.by_radix(low - radix * times, relation, (*divided_by, radix))
            parts.append(both(self.is_zero(high + times), rest))
        return either(*parts)

    def coarse(self, value: Polynomial) -> bool:
        """Whether a constant radix should be divided out: a digit of a position has a factor."""
        return self.digits and any(
            abs(int(factor)) > 1 and self.is_position(monomial[0])
            for monomial, factor in value.terms.items()
            if len(monomial) == 1
        )

    def radices(self, value: Polynomial) -> list[Polynomial]:
        """What the value may be divided by: parameters of its products, or the constants among the radices."""
        found: dict[Polynomial, None] = {}
        products = [monomial for monomial in value.terms if len(monomial) > 1]
        if products:
            used = [self.expand(entry.radix) for entry in self.splits]
            found.update(dict.fromkeys(radix for radix in used if len(radix.terms) == 1 and not radix.is_constant))
            names = sorted({name for item in products for name in item if not self.is_position(name)})
            found.update({symbol(name): None for name in names})
            return sorted(found, key=lambda radix: any(radix.symbols.difference(item) for item in products))
        constants = sorted(
            {int(entry.radix.constant) for entry in self.splits if entry.radix.is_constant}, reverse=True
        )
        factors = {
            abs(int(factor))
            for item, factor in value.terms.items()
            if item and self.is_position(item[0]) and abs(int(factor)) > 1
        }
        return [constant(c) for c in dict.fromkeys([*constants, *sorted(factors, reverse=True)])]

    def text(self, value: Polynomial) -> str:
        """An affine polynomial as isl reads it."""
        parts = []
        for monomial, factor in value.terms.items():
            name = self.floors.get(monomial[0], monomial[0]) if monomial else ""
            parts.append(f"{int(factor)}{' * ' + name if name else ''}")
        return " + ".join(parts) or "0"

    # ---- how many multiples of a radix

    def multiples(self, low: Polynomial, radix: Polynomial) -> tuple[int, int, bool]:
        """(a, b, strict) with a * radix <= low <= b * radix, or < where strict. The rest of a division stays small."""
        least_share = greatest_share = Fraction(0)
        least = greatest = 0
        for monomial, factor in low.terms.items():
            if not monomial:
                if not radix.is_constant and abs(int(factor)) > LARGE_CONSTANT:
                    raise self.large(abs(int(factor)))
                least, greatest = least + int(factor), greatest + int(factor)
                continue
            if len(monomial) > 1:
                raise self.unrelated(monomial, radix)
            name = monomial[0]
            if radix.is_constant and name in self.ranges and self.expand(self.ranges[name]).is_constant:
                spread = int(factor) * (int(self.expand(self.ranges[name]).constant) - 1)
                least, greatest = least + min(0, spread), greatest + max(0, spread)
                continue
            times, beyond = self.measured(name, radix)
            if factor > 0:
                greatest_share += factor * times
                greatest += int(factor) * beyond
            else:
                least_share += factor * times
                least += int(factor) * beyond
        if radix.is_constant:
            step = int(radix.constant)
            low_end, high_end = floor(least_share * step) + least, ceil(greatest_share * step) + greatest
            least_times, greatest_times, strict = low_end // step, -(-high_end // step), high_end % step != 0
        else:  # a constant is at most as many radices, as a radix is at least 1
            least_times = floor(least_share) + min(0, least)
            greatest_times = ceil(greatest_share) + max(0, greatest)
            strict = greatest < 0 or (greatest == 0 and greatest_share < greatest_times)
        if greatest_times - least_times > MAX_MULTIPLES:
            raise NotAffineError("a constant is too many multiples of a parameter")
        return least_times, greatest_times, strict

    def measured(self, name: str, radix: Polynomial) -> tuple[Fraction, int]:
        """(times, beyond) with 0 <= name <= times * radix + beyond."""
        if name in self.ranges:
            within = self.expand(self.ranges[name])
            if within.is_constant:
                return Fraction(0), int(within.constant) - 1
            times, rest = divided(within, radix)
            if times.is_constant and rest.is_constant:
                return Fraction(times.constant), int(rest.constant) - 1
            part, over = divided(radix, within) if len(within.terms) == 1 else (within, within)
            if part.is_constant and not over.terms:
                return Fraction(1) / Fraction(part.constant), -1
            if not rest.terms:
                raise NeedsSplit(name, radix)
            if len(within.terms) == 1 and within.degree >= 1 and not radix.is_constant:
                raise self.unrelated(next(iter(within.terms)), radix)
            if len(within.terms) == 1 and within.degree == 1:
                raise NeedsSplit(next(iter(within.terms))[0], radix, exact=True)
        for item in self.named.values():
            if item.name == name and item.operation == "floor" and item.value == radix:
                return Fraction(1), 0
        raise NeedsSplit(name, radix)

    def unrelated(self, monomial: tuple[str, ...], radix: Polynomial) -> Exception:
        """What to do about a multiple of another divisor: assume that one measures the other, as the hints do."""
        other = [name for name in monomial if not self.is_position(name) and symbol(name) != radix]
        radix_name = None if radix.is_constant else next(iter(radix.terms))[0]
        for name in other:
            if any(entry.name == name for entry in self.splits) or name in radix.symbols:
                continue
            a = self.hints.get(name)
            b = int(radix.constant) if radix_name is None else self.hints.get(radix_name)
            if a is None or b is None or (b and a % b == 0):
                return NeedsSplit(name, radix, exact=True)
            if radix_name is not None and a and b % a == 0 and not self.is_split(radix_name):
                return NeedsSplit(radix_name, symbol(name), exact=True)
            return NotAffineError(
                f"neither of `{_readable(name)}` and `{_readable(radix_name or str(b))}` divides the other"
            )
        return NotAffineError("two divisors do not divide each other")

    def large(self, value: int) -> Exception:
        """A constant against a symbolic radix: how many radices it is, nobody knows, so it gets digits."""
        near = [known for known in self.literals - self.constants if abs(known - value) <= LARGE_CONSTANT]
        if not near:
            return NotAffineError(f"{value} is an unknown number of multiples of a parameter")
        return NeedsName(min(near, key=lambda known: abs(known - value)))


def divided(value: Polynomial, radix: Polynomial) -> tuple[Polynomial, Polynomial]:
    """(high, low) with value = radix * high + low, where low holds what is no multiple of the radix."""
    high: dict[Monomial, Number] = {}
    low: dict[Monomial, Number] = {}
    if radix.is_constant:
        divisor = int(radix.constant)
        for monomial, factor in value.terms.items():
            times, rest = divmod(int(factor), divisor)
            if monomial and rest:  # a factor that is no multiple stays whole: its symbol may need digits
                times, rest = 0, int(factor)
            high[monomial], low[monomial] = times, rest
        return Polynomial(high), Polynomial(low)
    ((names, step),) = radix.terms.items()
    for monomial, factor in value.terms.items():
        left = list(monomial)
        for name in names:
            if name in left:
                left.remove(name)
        if len(left) == len(monomial) - len(names) and int(factor) % int(step) == 0:
            high[tuple(left)] = int(factor) // int(step)
        else:
            low[monomial] = int(factor)
    return Polynomial(high), Polynomial(low)


def _is_larger(radix: Polynomial, other: Polynomial) -> bool:
    return radix.is_constant and other.is_constant and radix.constant > other.constant


def is_never_negative(value: Polynomial) -> bool:
    """Whether that shows, as no symbol is negative."""
    return all(factor >= 0 for factor in value.terms.values())


def safe_name(name: str) -> str:
    """What a parameter of the user is called here, where its own name means something to isl or to us."""
    return f"{name}_" if _is_taken(name) else name


def plain_name(name: str) -> str:
    """The inverse of `safe_name`; what is no parameter stays as it is."""
    return name[:-1] if name.endswith("_") and _is_taken(name) else name


def _is_taken(name: str) -> bool:
    return _TAKEN.fullmatch(name.rstrip("_")) is not None


_TAKEN = re.compile(
    r"and|or|not|implies|exists|mod|floor|floord|ceild|min|max|true|false|rat"  # words of isl
    r"|(u|e|flag|floor)\d+|\w*_\d+[hl]|\w*_m\d+"  # named values, existentials, flags, digits, residues
)


def _readable(name: str) -> str:
    """The symbol that a digit belongs to."""
    return plain_name(re.sub(r"(_\d+[hl])+$", "", name))
