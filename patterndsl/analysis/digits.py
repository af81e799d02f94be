"""How does a relation become affine? Positions written in mixed radix, so that symbolic divisors disappear.

A Presburger formula knows no `q // s` with s symbolic. Written as q = s * a + r with 0 <= r < s, the quotient is a and
the remainder r. Which symbols need which digits shows while a formula is written; then the writing starts again with
one digit more. Constant divisors are treated the same where digits are wanted (counting), and left to isl's own floor
otherwise (proofs).

Whatever is not arithmetic of positions (inputs, draws) becomes a flag: a free truth value for each pair, the same for
equal atoms. What holds for every value of the flags holds whatever the data are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from patterndsl.analysis.polynomial import Polynomial, constant, symbol
from patterndsl.analysis.radix import (
    FALSE,
    LARGE_CONSTANT,
    TRUE,
    Named,
    NeedsName,
    NeedsSplit,
    NotAffineError,
    Split,
    both,
    either,
    opposite,
    safe_name,
)
from patterndsl.analysis.values import Values
from patterndsl.ir.index import Arithmetic, Const, Index, Param, Read, Var, operands
from patterndsl.ir.relation import (
    And,
    Compare,
    Everything,
    Holds,
    Listed,
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


@dataclass(frozen=True, slots=True)
class Affine:
    """Relations over the same digits, as texts that isl reads.

    q_digits, k_digits: the set dimensions of each side. flags: those of unknown atoms, each 0 or 1. params: everything
    else. domain: what holds of all of them (ranges, minimums). defined: how to compute digits and named values from
    the lengths and parameters, in order. implied: what has to follow from each relation, as the domain leaves it out.
    """

    texts: tuple[str, ...]
    domain: str
    implied: str
    q_digits: tuple[str, ...]
    k_digits: tuple[str, ...]
    flags: tuple[str, ...]
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
    bounded: bool = False,
) -> Affine:
    """The relations over common digits, inside {0 <= q < Nq, 0 <= k < Nk} and what is `given` of the parameters.

    lengths: the symbol of each length, {"Nq": "N", "Nk": "N"} for a self-attention. hints: typical values of symbols,
    which decide what is assumed to divide what. digits: write constant divisors in digits too. aligned: assume that
    every divisor of a length divides it. bounded: a position without digits is kept below the length by the relations
    themselves, as k is in `k * s <= q` (`Affine.implied`), so that it needs none.
    Raises NotAffineError with the reason.
    """
    typical = {safe_name(name): value for name, value in (hints or {}).items()}
    writer = _Writer(dict(lengths), typical, digits, aligned, ranks=_ranks(relations), bounded=bounded)
    for _ in range(MAX_SPLITS):
        try:
            return writer.write(relations, given)
        except NeedsSplit as needed:
            writer.split(needed.name, needed.radix, needed.exact)
        except NeedsName as needed:
            writer.constants.add(needed.value)
        except RecursionError:  # multiples of one divisor lead to those of another, and back
            break
    raise NotAffineError("the divisors are too entangled")


@dataclass
class _Writer(Values):
    """Writes relations as texts of isl. `flags`: the free truth value of each atom that is no arithmetic."""

    flags: dict[Relation, str] = field(default_factory=dict)
    bounded: bool = False
    implied: list[str] = field(default_factory=list)

    # ---- one pass

    def write(self, relations: Sequence[Relation], given: Sequence[Relation]) -> Affine:
        self.floors, self.flags, self.memo, self.written, self.implied = {}, {}, {}, {}, []
        self.literals = {
            abs(index.value)
            for item in relations
            for index in indices(item)
            if isinstance(index, Const) and abs(index.value) > LARGE_CONSTANT
        }
        texts = tuple(self.relation(item) for item in relations)
        for demand in given:
            if isinstance(demand, Compare) and isinstance(demand.left, Const) and demand.left.value < 0:
                # every symbol counts from 0 here
                name = demand.right.name if isinstance(demand.right, Param) else "a parameter"
                raise NotAffineError(f"`{name}` may be negative")
        known = [self.relation(item) for item in given]
        symbols = self.symbols()
        bounds = [self.below("q", self.lengths["Nq"]), self.below("k", self.lengths["Nk"])]
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
            both(*self.implied),
            q_digits,
            k_digits,
            flags,
            params,
            (*self.named.values(), *self.splits),
            {name: self.expand(symbol(name)) for name in ("q", "k", *sorted(self.symbols()))},
        )

    def below(self, position: str, length: str) -> str:
        """position < length; or nothing, and something stronger without products is said to be implied."""
        try:
            return self.compared("<", symbol(position), symbol(length))
        except NeedsSplit as needed:
            if not self.bounded or needed.name != position:
                raise
        self.implied.append(self.compared("<", symbol(position), self.at_most(self.expand(symbol(length)))))
        return TRUE

    def at_most(self, value: Polynomial) -> Polynomial:
        """A sum of digits that the sum of their multiples is never less than, as all radices are at least 1."""
        terms: dict[tuple[str, ...], int] = {}
        for monomial, factor in value.terms.items():
            digit = tuple(name for name in monomial if name not in self.divisors)
            if factor < 0 or len(digit) > 1:
                raise NotAffineError("its length is no sum of digits")
            terms[digit] = terms.get(digit, 0) + int(factor)
        return Polynomial(terms)

    def symbols(self) -> set[str]:
        """Every symbol met so far."""
        met = {"q", "k", *self.lengths.values(), *self.values, *self.seen}
        for value in self.values.values():
            met |= value.symbols
        for item in self.named.values():
            met |= {item.name} | self.expand(item.value).symbols
        return met

    def definition(self, item: Named) -> str:
        """What isl may know of a named value; the rest it takes as any number from 0."""
        this = symbol(item.name)
        if item.operation == "constant":
            return TRUE if self.is_split(item.name) else self.compared("==", this, item.value)
        value = self.expand(item.value)
        if item.operation == "floor":
            rest = value - this * item.divisor
            known = both(self.compared("<=", constant(0), rest), self.compared("<", rest, constant(item.divisor)))
        elif item.operation == "isqrt":
            positive = either(self.compared("<=", value, constant(0)), self.compared("<=", constant(1), this))
            known = both(self.compared("<=", this, value), positive)
        else:
            return TRUE
        if item.least is None:
            return known
        # the value stands where a guard says that it is not negative; elsewhere the name must exclude nothing
        nothing = both(self.compared("<", value, constant(0)), self.compared("==", this, constant(0)))
        return either(both(self.compared("<=", constant(0), value), known), nothing)

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
            case Holds() | Random() | Listed():
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
        if isinstance(atom, Compare):  # what is known of it on the diagonal may name its parameters
            self.seen |= symbols_of(atom.left) | symbols_of(atom.right)
        return f"{self.flags.setdefault(atom, f'flag{len(self.flags)}')} = 1"

    def reflexive(self, atom: Relation, flag: str) -> str:
        """What is known of an atom: q.x == k.x is true on the diagonal, and draws avoid what they avoid."""
        if isinstance(atom, Compare):
            value = _linear(_on_diagonal(atom.left)) - _linear(_on_diagonal(atom.right))
            known = {safe_name(index.name) for index in subexpressions(atom.left) if isinstance(index, Param)}
            known |= {safe_name(index.name) for index in subexpressions(atom.right) if isinstance(index, Param)}
            if value.symbols <= known:
                holds, off = self.compared(atom.op, value, constant(0)), self.compared("!=", symbol("q"), symbol("k"))
                return either(off, both(f"{flag} = 1", holds), both(f"{flag} = 0", opposite(holds)))
        if isinstance(atom, Random) and (atom.q, atom.k) == (Var("q"), Var("k")):
            return either(f"{flag} = 0", opposite(self.relation(atom.avoid)))
        return TRUE


def resolved(affine: Affine, of: str = "") -> list[Split | Named]:
    """Definitions of lengths and parameters, and of the position `of`, in an order in which each needs only earlier
    ones."""
    positions = {"q", "k"} - {of}
    for item in affine.defined:
        if isinstance(item, Split) and item.name in positions:
            positions |= {item.quotient, item.remainder or item.quotient}
    waiting = [item for item in affine.defined if not (isinstance(item, Split) and item.name in positions)]
    made = {name for item in waiting for name in _made(item)}
    ordered: list[Split | Named] = []
    while waiting:
        ready = next(item for item in waiting if not (_needs(item) & made))
        waiting.remove(ready)
        made -= set(_made(ready))
        ordered.append(ready)
    return ordered


def _made(item: Split | Named) -> tuple[str, ...]:
    if isinstance(item, Named):
        return (item.name,)
    return (item.quotient,) if item.remainder is None else (item.quotient, item.remainder)


def _needs(item: Split | Named) -> frozenset[str]:
    return item.value.symbols if isinstance(item, Named) else item.radix.symbols | {item.name}


def _ranks(relations: Sequence[Relation]) -> dict[str, int]:
    """Which divisors are inner: `q % x` or `q // x` shows x, `q // (x * y)` then y, wherever they stand."""
    found = {
        symbols_of(index.right)
        for item in relations
        for index in indices(item)
        if isinstance(index, Arithmetic) and index.op in ("//", "%") and isinstance(index.left, Var)
    }
    ranks: dict[str, int] = {}
    for names in sorted(found, key=lambda names: (len(names), sorted(names))):
        for name in sorted(names - ranks.keys()):
            ranks[name] = len(ranks)
    return ranks


def symbols_of(index: Index) -> frozenset[str]:
    """The parameters in the expression."""
    return frozenset(safe_name(item.name) for item in subexpressions(index) if isinstance(item, Param))


def _reads(index: Index) -> bool:
    return isinstance(index, Read) or any(map(_reads, operands(index)))


def _linear(index: Index) -> Polynomial:
    """The expression as a polynomial in its parameters; everything else is a symbol of its own."""
    match index:
        case Const(value):
            return constant(value)
        case Param(name):
            return symbol(safe_name(name))
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
