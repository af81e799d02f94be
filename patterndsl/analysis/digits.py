"""How does a relation become affine? Positions written in mixed radix, so that symbolic divisors disappear.

A Presburger formula knows no `q // s` with s symbolic. Written as q = s * a + r with 0 <= r < s, the quotient is a and
the remainder r, and a comparison `s * A + B <= 0` whose B stays within a few multiples of s is a choice between affine
cases: A smaller than all of them, or A = -j and B <= j * s. Which symbols need which digits shows while a formula is
written; then the writing starts again with one digit more. Constant divisors are treated the same where digits are
wanted (counting), and left to isl's own floor otherwise (proofs).

Whatever is not arithmetic of positions (inputs, draws) becomes a flag: a free truth value for each pair, the same for
equal atoms. What holds for every value of the flags holds whatever the data are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import Literal, TypeAlias, assert_never

from patterndsl.analysis.polynomial import Monomial, Number, Polynomial, constant, symbol
from patterndsl.ir.index import Arithmetic, Const, Function, Index, Param, Read, Select, Var, operands
from patterndsl.ir.relation import (
    And,
    Compare,
    CompareOp,
    Everything,
    Holds,
    Not,
    Nothing,
    Or,
    Random,
    Relation,
    indices,
    subexpressions,
    substitute_index,
)

MAX_SPLITS = 24
MAX_DEPTH = 1
MAX_TEXT = 200_000
MAX_CASES = 64
MAX_MULTIPLES = 12
LARGE_CONSTANT = 8
TRUE, FALSE = "true", "false"
RESERVED = frozenset(
    ("and", "or", "not", "implies", "exists", "mod", "floor", "floord", "ceild", "min", "max", "true", "false", "rat")
)

Case: TypeAlias = tuple[str, Polynomial]
"""A guard and the value under it; the guards of an expression cover everything once."""


class NotAffineError(Exception):
    """The relation has no exact affine form; the text says what stands in the way."""


class _NeedsSplit(Exception):
    """Writing goes on only with one more digit: name = radix * quotient + remainder."""

    def __init__(self, name: str, radix: Polynomial, *, exact: bool = False) -> None:
        self.name, self.radix, self.exact = name, radix, exact


class _NeedsName(Exception):
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


@dataclass(frozen=True, slots=True)
class Affine:
    """Relations over the same digits, as texts that isl reads.

    q_digits, k_digits: the set dimensions of each side. flags: those of unknown atoms, each 0 or 1. params: everything
    else. domain: what holds of all of them (ranges, minimums). defined: how to compute digits and named values from
    the lengths and parameters, in order.
    """

    texts: tuple[str, ...]
    domain: str
    q_digits: tuple[str, ...]
    k_digits: tuple[str, ...]
    flags: tuple[str, ...]
    unknowns: tuple[Relation, ...]
    params: tuple[str, ...]
    defined: tuple[Split | Named, ...]
    values: Mapping[str, Polynomial]
    """q, k, the lengths and parameters in digits."""

    @property
    def assumed(self) -> tuple[Split, ...]:
        """The divisions that are assumed to leave no remainder."""
        return tuple(item for item in self.defined if isinstance(item, Split) and item.remainder is None)


def affine(
    relations: Sequence[Relation],
    given: Sequence[Relation] = (),
    *,
    lengths: Mapping[str, str],
    hints: Mapping[str, int] | None = None,
    digits: bool = True,
    aligned: bool = False,
) -> Affine:
    """The relations over common digits, inside {0 <= q < Nq, 0 <= k < Nk} and what is `given` of the parameters.

    lengths: the symbol of each length, {"Nq": "N", "Nk": "N"} for a self-attention. hints: typical values of symbols,
    which decide what is assumed to divide what. digits: write constant divisors in digits too. aligned: assume that
    every divisor of a length divides it.
    Raises NotAffineError with the reason.
    """
    writer = _Writer(dict(lengths), dict(hints or {}), digits, aligned)
    writer.rank(relations)
    for _ in range(MAX_SPLITS):
        try:
            return writer.write(relations, given)
        except _NeedsSplit as needed:
            writer.split(needed.name, needed.radix, needed.exact)
        except _NeedsName as needed:
            writer.constants.add(needed.value)
        except RecursionError:  # multiples of one divisor lead to those of another, and back
            break
    raise NotAffineError("the divisors are too entangled")


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
class _Writer:
    lengths: dict[str, str]
    hints: dict[str, int]
    digits: bool
    aligned: bool
    constants: set[int] = field(default_factory=set)
    splits: list[Split] = field(default_factory=list)
    values: dict[str, Polynomial] = field(default_factory=dict)
    """What each split symbol is in the digits that are left."""
    ranges: dict[str, Polynomial] = field(default_factory=dict)
    """0 <= symbol < range."""
    named: dict[tuple[str, Polynomial, int], Named] = field(default_factory=dict)
    floors: dict[str, str] = field(default_factory=dict)
    flags: dict[Relation, str] = field(default_factory=dict)
    memo: dict[Index, list[Case]] = field(default_factory=dict)
    literals: set[int] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    ranks: dict[str, int] = field(default_factory=dict)

    def rank(self, relations: Sequence[Relation]) -> None:
        """Which divisors are inner: `q % x` or `q // x` shows x, `q // (x * y)` then y, wherever they stand."""
        found = {
            symbols_of(index.right)
            for item in relations
            for index in indices(item)
            if isinstance(index, Arithmetic) and index.op in ("//", "%") and isinstance(index.left, Var)
        }
        for names in sorted(found, key=lambda names: (len(names), sorted(names))):
            for name in sorted(names - self.ranks.keys()):
                self.ranks[name] = len(self.ranks)

    # ---- one pass

    def write(self, relations: Sequence[Relation], given: Sequence[Relation]) -> Affine:
        self.floors, self.flags, self.memo = {}, {}, {}
        self.literals = {
            abs(index.value)
            for item in relations
            for index in indices(item)
            if isinstance(index, Const) and abs(index.value) > LARGE_CONSTANT
        }
        texts = tuple(self.relation(item) for item in relations)
        known = [self.relation(item) for item in given]
        symbols = self.symbols()
        bounds = [
            self.compared("<=", symbol("q"), symbol(self.lengths["Nq"]) - 1),
            self.compared("<=", symbol("k"), symbol(self.lengths["Nk"]) - 1),
        ]
        for name in sorted(symbols):
            if name in self.ranges:
                bounds.append(self.compared("<=", symbol(name), self.ranges[name] - 1))
            if name not in self.values:
                bounds.append(self.compared("<=", constant(0), symbol(name)))
        for entry in self.splits:
            bounds.append(self.compared("<=", constant(1), entry.radix))
        for item in self.named.values():
            bounds.append(self.definition(item))
        known_atoms: dict[Relation, str] = {}
        while len(known_atoms) < len(self.flags):  # what a draw avoids may have atoms of its own
            atom, flag = next(item for item in self.flags.items() if item[0] not in known_atoms)
            known_atoms[atom] = flag
            bounds.append(self.reflexive(atom, flag))
        flags = tuple(self.flags.values())
        bounds.extend(f"0 <= {flag} <= 1" for flag in flags)
        leaves = {name for name in self.symbols() if name not in self.values}
        q_digits = tuple(sorted(self.expand(symbol("q")).symbols & self.leaves_of("q")))
        k_digits = tuple(sorted(self.expand(symbol("k")).symbols & self.leaves_of("k")))
        params = tuple(sorted(leaves - set(q_digits) - set(k_digits)))
        return Affine(
            texts,
            both(*known, *bounds),
            q_digits,
            k_digits,
            flags,
            tuple(self.flags),
            params,
            (*self.named.values(), *self.splits),
            {name: self.expand(symbol(name)) for name in ("q", "k", *sorted(self.symbols()))},
        )

    def symbols(self) -> set[str]:
        """Every symbol met so far."""
        met = {"q", "k", *self.lengths.values(), *self.values, *self.seen}
        for value in self.values.values():
            met |= value.symbols
        for item in self.named.values():
            met |= {item.name} | self.expand(item.value).symbols
        return met

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

    def expand(self, value: Polynomial) -> Polynomial:
        return value.put(self.values)

    def split(self, name: str, radix: Polynomial, exact: bool) -> None:
        """Adds digits to a symbol."""
        if any(entry.name == name for entry in self.splits):
            raise NotAffineError(f"`{_readable(name)}` would need two systems of digits")
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
            whole, rest = _divided(self.expand(within), self.expand(radix))
            if not rest.terms:
                self.ranges[quotient] = whole
        put = {name: expanded}
        self.values = {key: value.put(put) for key, value in self.values.items()} | put

    def depth(self, name: str, radix: Polynomial) -> int:
        """How often the radix was already divided out of what the symbol is a digit of."""
        found = 0
        while (entry := next((e for e in self.splits if name in (e.quotient, e.remainder)), None)) is not None:
            found += entry.radix == radix
            name = entry.name
        return found

    # ---- formulas

    def relation(self, relation: Relation) -> str:
        match relation:
            case Everything():
                return TRUE
            case Nothing():
                return FALSE
            case Compare(op, left, right):
                if _reads(left) or _reads(right):
                    return self.flag(relation)
                return either(
                    *(
                        both(a, b, self.compared(op, x, y))
                        for (a, x), (b, y) in self.pairs(self.value(left), self.value(right))
                    )
                )
            case Holds() | Random():
                return self.flag(relation)
            case And(terms):
                return both(*map(self.relation, terms))
            case Or(terms):
                return either(*map(self.relation, terms))
            case Not(term):
                return opposite(self.relation(term))
            case _:
                assert_never(relation)

    def flag(self, atom: Relation) -> str:
        """A free truth value; `<` and `!=` are the opposites of `<=` and `==`."""
        if isinstance(atom, Compare) and atom.op == "!=":
            return opposite(self.flag(Compare("==", atom.left, atom.right)))
        if isinstance(atom, Compare) and atom.op == "<":
            return opposite(self.flag(Compare("<=", atom.right, atom.left)))
        return f"{self.flags.setdefault(atom, f'flag{len(self.flags)}')} = 1"

    def reflexive(self, atom: Relation, flag: str) -> str:
        """What is known of an atom: q.x == k.x is true on the diagonal, and draws avoid what they avoid."""
        if isinstance(atom, Compare):
            value = _linear(_on_diagonal(atom.left)) - _linear(_on_diagonal(atom.right))
            known = {_safe(index.name) for index in subexpressions(atom.left) if isinstance(index, Param)}
            known |= {_safe(index.name) for index in subexpressions(atom.right) if isinstance(index, Param)}
            if value.symbols <= known:
                holds, off = self.compared(atom.op, value, constant(0)), self.compared("!=", symbol("q"), symbol("k"))
                return either(off, both(f"{flag} = 1", holds), both(f"{flag} = 0", opposite(holds)))
        if isinstance(atom, Random) and (atom.q, atom.k) == (Var("q"), Var("k")):
            return either(f"{flag} = 0", opposite(self.relation(atom.avoid)))
        return TRUE

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

    def by_radix(self, value: Polynomial, relation: Literal["<=", "="], below: int | None = None) -> str:
        """value <= 0 or value = 0, as a choice of affine cases; constants are divided out from `below` down."""
        if value.is_constant:
            return TRUE if (value.constant <= 0 if relation == "<=" else value.constant == 0) else FALSE
        value = self.without_products(value)
        if value.degree <= 1 and not self.coarse(value):
            return f"{self.text(value)} {relation} 0"
        needed: _NeedsSplit | _NeedsName | None = None
        reason = "it multiplies two positions"
        for radix in self.radices(value):
            if below is not None and radix.is_constant and radix.constant >= below:
                continue
            try:
                return self.cases(value, radix, relation)
            except (_NeedsSplit, _NeedsName) as found:
                needed = needed or found
            except NotAffineError as found:
                reason = str(found)
        if needed is not None:
            raise needed
        if value.degree <= 1:
            return f"{self.text(value)} {relation} 0"
        raise NotAffineError(reason)

    def cases(self, value: Polynomial, radix: Polynomial, relation: Literal["<=", "="]) -> str:
        high, low = _divided(value, radix)
        if not high.terms:
            raise NotAffineError("it is no multiple")
        least, greatest, _ = self.multiples(low, radix)
        parts = []
        if relation == "<=":
            parts.append(self.at_most_zero(high + greatest))
            greatest -= 1
        for times in range(least, greatest + 1):
            rest = self.by_radix(low - radix * times, relation, int(radix.constant) if radix.is_constant else None)
            parts.append(both(self.is_zero(high + times), rest))
        return either(*parts)

    def coarse(self, value: Polynomial) -> bool:
        """Whether a constant radix should be divided out: a digit of a position has a factor."""
        return self.digits and any(
            abs(int(factor)) > 1 and self.is_position(monomial[0])
            for monomial, factor in value.terms.items()
            if len(monomial) == 1
        )

    def is_position(self, name: str) -> bool:
        return name in self.leaves_of("q") | self.leaves_of("k")

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
            times, rest = _divided(within, radix)
            if times.is_constant and rest.is_constant:
                return Fraction(times.constant), int(rest.constant) - 1
            part, over = _divided(radix, within) if len(within.terms) == 1 else (within, within)
            if part.is_constant and not over.terms:
                return Fraction(1) / Fraction(part.constant), -1
            if not rest.terms:
                raise _NeedsSplit(name, radix)
            if len(within.terms) == 1 and within.degree >= 1 and not radix.is_constant:
                raise self.unrelated(next(iter(within.terms)), radix)
            if len(within.terms) == 1 and within.degree == 1:
                raise _NeedsSplit(next(iter(within.terms))[0], radix, exact=True)
        for item in self.named.values():
            if item.name == name and item.operation == "floor" and item.value == radix:
                return Fraction(1), 0
        raise _NeedsSplit(name, radix)

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
                return _NeedsSplit(name, radix, exact=True)
            if radix_name is not None and a and b % a == 0 and not self.is_split(radix_name):
                return _NeedsSplit(radix_name, symbol(name), exact=True)
            return NotAffineError(
                f"neither of `{_readable(name)}` and `{_readable(radix_name or str(b))}` divides the other"
            )
        return NotAffineError("two divisors do not divide each other")

    def large(self, value: int) -> Exception:
        """A constant against a symbolic radix: how many radices it is, nobody knows, so it gets digits."""
        near = [known for known in self.literals - self.constants if abs(known - value) <= LARGE_CONSTANT]
        if not near:
            return NotAffineError(f"{value} is an unknown number of multiples of a parameter")
        return _NeedsName(min(near, key=lambda known: abs(known - value)))

    def is_split(self, name: str) -> bool:
        return any(entry.name == name for entry in self.splits)

    # ---- values

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
                return [(TRUE, self.base(_safe(name)))]
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
            case Function(name, (argument,)):
                values = self.value(argument)
                if any(self.touches_position(value) for _, value in values):
                    raise NotAffineError(f"`{name}` of a position is not affine")
                return [(guard, self.base(self.name(name, value))) for guard, value in values]  # type: ignore[arg-type]
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
            return [(TRUE, self.base(self.name("floor", value, int(divisor.constant))))]
        if divisor.is_constant and not self.digits and value.degree <= 1:
            return [(TRUE, self.native_floor(value, int(divisor.constant)))]
        if len(divisor.terms) != 1:
            divisor = symbol(self.name("product", divisor))
        cases: list[Case] = [(TRUE, value)]
        while divisor != constant(1):
            radix = self.next_factor(cases[0][1], divisor)
            divisor, _ = _divided(divisor, radix)
            cases = _few([(both(a, b), y) for a, x in cases for b, y in self.floor_once(x, radix)])
        return cases

    def next_factor(self, value: Polynomial, divisor: Polynomial) -> Polynomial:
        """Which factor of a product to divide by first: the radix of the lowest digit, so that digits stay digits."""
        ((monomial, factor),) = divisor.terms.items()
        lowest = (name for name in sorted(self.ranges) if value.terms.get((name,), 0) in (1, -1))
        for radix in (self.expand(self.ranges[name]) for name in lowest):
            if len(radix.terms) == 1 and radix != constant(1) and not _divided(divisor, radix)[1].terms:
                return radix
        if not monomial:
            return constant(factor)
        return symbol(min(monomial, key=lambda name: (self.ranks.get(name, len(self.ranks)), name)))

    def floor_once(self, value: Polynomial, radix: Polynomial) -> list[Case]:
        high, low = _divided(self.expand(value), radix)
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
        name = next((key for key, known in self.floors.items() if known == text), f"floor{len(self.floors)}")
        self.floors[name] = text
        return symbol(name)

    # ---- functions of parameters

    def is_plain(self, value: Polynomial) -> bool:
        """Only parameters: no position, and no length, whose digits are wanted."""
        return value.symbols.isdisjoint(self.leaves_of("q") | self.leaves_of("k") | self.floors.keys()) and not any(
            value.symbols & self.leaves_of(length) for length in self.lengths.values()
        )

    def touches_position(self, value: Polynomial) -> bool:
        return not value.symbols.isdisjoint(self.leaves_of("q") | self.leaves_of("k") | self.floors.keys())

    def without_products(self, value: Polynomial) -> Polynomial:
        """Products of parameters alone, none of which is a radix, become parameters themselves."""
        radices = {name for entry in self.splits for name in self.expand(entry.radix).symbols}
        terms: dict[tuple[str, ...], int] = {}
        replaced = Polynomial({})
        for monomial, factor in value.terms.items():
            plain = len(monomial) > 1 and radices.isdisjoint(monomial) and self.is_plain(Polynomial({monomial: 1}))
            if plain:
                replaced = replaced + symbol(self.name("product", Polynomial({monomial: 1}))) * factor
            else:
                terms[monomial] = int(factor)
        return replaced + Polynomial(terms)

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

    def definition(self, item: Named) -> str:
        """What isl may know of a named value; the rest it takes as any number from 0."""
        this = symbol(item.name)
        if item.operation == "constant":
            return TRUE if self.is_split(item.name) else self.compared("==", this, item.value)
        if item.operation == "floor":
            rest = self.expand(item.value) - this * item.divisor
            return both(self.compared("<=", constant(0), rest), self.compared("<", rest, constant(item.divisor)))
        return TRUE

    def text(self, value: Polynomial) -> str:
        """An affine polynomial as isl reads it."""
        parts = []
        for monomial, factor in value.terms.items():
            name = self.floors.get(monomial[0], monomial[0]) if monomial else ""
            parts.append(f"{int(factor)}{' * ' + name if name else ''}")
        return " + ".join(parts) or "0"


def _divided(value: Polynomial, radix: Polynomial) -> tuple[Polynomial, Polynomial]:
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


def _few(cases: list[Case]) -> list[Case]:
    live = [case for case in cases if case[0] != FALSE]
    if len(live) > MAX_CASES:
        raise NotAffineError("it falls into too many cases")
    return live


def symbols_of(index: Index) -> frozenset[str]:
    """The parameters in the expression."""
    return frozenset(_safe(item.name) for item in subexpressions(index) if isinstance(item, Param))


def _reads(index: Index) -> bool:
    return isinstance(index, Read) or any(map(_reads, operands(index)))


def _linear(index: Index) -> Polynomial:
    """The expression as a polynomial in its parameters; everything else is a symbol of its own."""
    match index:
        case Const(value):
            return constant(value)
        case Param(name):
            return symbol(_safe(name))
        case Arithmetic("+", left, right):
            return _linear(left) + _linear(right)
        case Arithmetic("-", left, right):
            return _linear(left) - _linear(right)
        case Arithmetic("*", left, right):
            return _linear(left) * _linear(right)
        case _:
            return symbol(f"<{index!r}>")


def _on_diagonal(index: Index) -> Index:
    return substitute_index(index, lambda found: Var("q") if found == Var("k") else found)


def _safe(name: str) -> str:
    return f"{name}_" if name in RESERVED else name


def _readable(name: str) -> str:
    return name.split("_")[0] if name[-1:] in "hl" and "_" in name else name
