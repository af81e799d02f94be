"""What does membership look like as a kernel's source? One function of vectors of positions, in Triton's Python.

Constants become arguments, so that patterns which differ in lengths or parameters share one source and one compiled
kernel. Divisors stay in the text: division by a known number is a multiplication. It neither imports nor runs Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias, assert_never

from patterndsl.ir.draws import width_drawn
from patterndsl.ir.index import HEAD, Arithmetic, Const, Facet, Function, Index, Param, Read, Select, Var
from patterndsl.ir.interval import Box, Interval, Verdict, bounds
from patterndsl.ir.linear import Frame, Linear
from patterndsl.ir.meaning import Truths, width_of
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
    depends_on,
    indices,
    subexpressions,
    substitute_index,
)
from patterndsl.sema.parameters import MAX_HEADS, Sizes

MAX_SMALL = 2**31 - 1
"""Of a 32-bit integer. Positions are that wide, unless the predicate makes something larger of them."""

Table: TypeAlias = tuple[str, Facet] | Random
"""What a predicate looks up: an input's facet, or the keys that were drawn."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """Membership as source. text: of a function keep(q, k, q_place, k_place, head, row, numbers, tables), of positions
    and of the places where these stand; what it returns is narrower than a tile where it depends on one side alone.

    numbers: the constants, first in the argument of that name; behind them come those of each table, see
    `asked.asked_by`. tables: what is looked up, in order.
    """

    text: str
    numbers: tuple[int, ...]
    tables: tuple[Table, ...]

    @property
    def name(self) -> str:
        """Of the function."""
        return self.text.partition("def ")[2].partition("(")[0]

    @property
    def facets(self) -> tuple[tuple[str, Facet], ...]:
        """What is looked up of inputs."""
        return tuple(table for table in self.tables if not isinstance(table, Random))


@lru_cache(maxsize=256)
def predicate_of(relation: Relation, sizes: Sizes, placed_by: str | None = None) -> Predicate:
    """The source of a bound relation, which may have `head` in it. sizes: bounds of the positions it is asked for.
    placed_by: the input whose rank of a position is the place where it stands, so that it is not looked up."""
    writer = _Writer(_box(sizes), placed_by)
    result = writer.result(relation)
    first = _widened() if has_large(relation, sizes) else []
    head = "def keep(q, k, q_place, k_place, head, row, numbers, tables):"
    return writer.predicate([head, *first, *writer.lines, f"    return {result}"])


def _widened() -> list[str]:
    """Positions of which something larger is made."""
    return [f"    {name} = {name}.to(tl.int64)" for name in ("q", "k", "q_place", "k_place")]


@lru_cache(maxsize=256)
def hiding_of(relation: Relation, rests: tuple[Relation, ...], sizes: Sizes) -> Predicate:
    """The source of hide(x, other, state, q, k, q_place, k_place, head, row, numbers, tables): a tile x with `other`
    where a pair is not kept. state: of the tile, a scalar: WHOLE asks for the relation, those that follow for the rests
    that it leaves."""
    writer = _Writer(_box(sizes))
    body = list[str]()
    for at, asked in enumerate((relation, *rests)):
        writer.lines, writer.names = [], {}
        result = writer.result(asked)
        lines = (*writer.lines, f"    x = tl.where({result}, x, other)")
        body += [f"    if state == {WHOLE + at}:", *(f"    {line}" for line in lines)]
    first = _widened() if has_large(relation, sizes) else []
    head = "def hide(x, other, state, q, k, q_place, k_place, head, row, numbers, tables):"
    return writer.predicate([head, *first, *body, "    return x"])


def of_first_routes(predicate: Predicate, width: int) -> Predicate:
    """The same, of a pair in the first route alone that has both of it. Places are those of routes of so many members.
    Another table is looked up behind all others, of as many numbers as they have each: see `functions.is_first`."""
    body, _, result = predicate.text.rpartition("    return ")
    table, number = len(predicate.tables), len(predicate.numbers) + NUMBERS_OF_TABLE * len(predicate.tables)
    asked = ", ".join((f"tables[{table}]", *(f"numbers[{number + turn}]" for turn in range(NUMBERS_OF_TABLE))))
    text = f"{body}    return ({result.strip()}) & is_first({asked}, row, head, q, k, q_place // {width})\n"
    return replace(predicate, text=text)


WHOLE = 2
"""The state of tiles of which the relation itself is asked."""
NUMBERS_OF_TABLE = 3
"""Its length (rows of what was drawn), and the strides of batch rows and heads."""


class _Unknown:
    """Ranges of what is looked up. An input's values are of 64 bits, and so is what is made of them: they widen
    nothing, and have no range."""

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        if name == _ANY_HEAD.name:
            return 0, MAX_HEADS
        return (0, 0) if facet == "value" else (-1, MAX_SMALL // 2)

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> Truths:
        return True

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        return False, True


def _box(sizes: Sizes) -> Box:
    """All positions. A ragged tile reaches behind them, where it does not matter what a predicate says."""
    return Box((sizes.q_start, sizes.q_start + max(0, sizes.q_len - 1)), (0, max(0, sizes.kv_len - 1)), _Unknown())


def has_large(relation: Relation, sizes: Sizes) -> bool:
    """Whether something that the relation makes of positions is wider than these."""
    ranges = (_range(index, _box(sizes)) for index in indices(relation))
    return any(low < -MAX_SMALL or high > MAX_SMALL for low, high in ranges)


def _range(index: Index, box: Box) -> tuple[int, int]:
    """Bounds over all heads. In the frame of a draw positions are no larger than these."""
    of_any_head = substitute_index(index, lambda symbol: _ANY_HEAD if symbol == HEAD else symbol)
    low, high = bounds(of_any_head, box)
    return int(low), int(high)


def _is_positive(index: Index, box: Box) -> bool:
    """Whether it is seen not to be negative. What is read of an input may be anything, and -1 where there is none."""
    has_values = any(isinstance(part, Read) and part.facet == "value" for part in subexpressions(index))
    return not has_values and _range(index, box)[0] >= 0


def _symbols(index: Index) -> set[str]:
    return {part.name for part in subexpressions(index) if isinstance(part, Var | Read)}


_PLAIN = Frame({}, {})
_ANY_HEAD = Read("head", "value", Const(0))
"""Stands for a number that is looked up: `head` names no input."""


@dataclass
class _Writer:
    """Lines that give each expression a name, once."""

    box: Box
    placed_by: str | None = None
    lines: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    names: dict[Index, str] = field(default_factory=dict)

    @staticmethod
    def later(place: int) -> str:
        """Stands for a number of a table: these lie behind the constants, which are not counted yet."""
        return f"numbers[table + {place}]"

    def predicate(self, lines: Sequence[str]) -> Predicate:
        """The function of these lines, whose expressions were written here."""
        text, base = "\n".join(("@triton.jit", *lines, "")), len(self.numbers)
        for place in range(NUMBERS_OF_TABLE * len(self.tables)):
            text = text.replace(self.later(place), f"numbers[{base + place}]")
        return Predicate(text, tuple(self.numbers), tuple(self.tables))

    # ---- truths

    def result(self, relation: Relation) -> str:
        """Of vectors, also where the relation is a constant, which has no type at all."""
        found = self.relation(relation)
        return found if depends_on(relation, "q") or depends_on(relation, "k") else f"({found}) & (k >= 0)"

    def relation(self, relation: Relation) -> str:
        match relation:
            case Everything():
                return "k >= 0"
            case Nothing():
                return "k < 0"
            case Compare(op, left, right):
                left, right = self.parted(left, right)
                return f"{self.index(left)} {op} {self.index(right)}"
            case Holds(read):
                return f"{self.index(read)} > 0"
            case And(terms):
                return " & ".join(f"({term})" for term in self.all_of(terms))
            case Or(terms):
                return " | ".join(f"({self.relation(term)})" for term in terms)
            case Not(term):
                return f"({self.relation(term)}) == 0"
            case Random():
                table, length, row, head = self.table(relation)
                q, k, count = self.index(relation.q), self.index(relation.k), width_drawn(relation)
                return f"drawn({table}, {length}, {head} * head + {row} * row, {q}, {k}, {count})"
            case Listed(name):
                table, length, row, head = self.table((name, "value"))
                at, key = self.index(relation.row), self.index(relation.key)
                return f"listed({table}, {length}, {row} * row + {head} * head, {at}, {key}, {width_of(relation)})"
            case _:
                assert_never(relation)

    def all_of(self, terms: Sequence[Relation]) -> Iterator[str]:
        """Each term; both bounds of a number, 0 <= x and x < stop, are one comparison of unsigned numbers."""
        stops = dict(found for term in terms if (found := _stop_of(term)) is not None)
        both = {index: stop for index, stop in stops.items() if Compare("<=", Const(0), index) in terms}
        for term in terms:
            match term:
                case Compare("<=", Const(0), index) if index in both:
                    yield f"inside({self.index(index)}, {self.index(Const(both[index]))})"
                case Compare(_, index, _) if _stop_of(term) == (index, both.get(index)):
                    pass
                case _:
                    yield self.relation(term)

    def parted(self, left: Index, right: Index) -> tuple[Index, Index]:
        """Queries on one side and keys on the other, where sums can be put so: `q - k < 9` as `q < k + 9`, of which
        only the comparison is computed for each pair."""
        if not any(_symbols(side) >= {"q", "k"} for side in (left, right)):
            return left, right
        value = _PLAIN.linear(left).plus(_PLAIN.linear(right), -1)
        if any(_symbols(atom) - {"q"} and _symbols(atom) - {"k"} for atom, _ in value.terms):
            return left, right
        of_queries = Linear(tuple(term for term in value.terms if "q" in _symbols(term[0])), 0)
        of_keys = value.plus(of_queries, -1)
        if not of_queries.terms and not of_keys.terms:
            return left, right  # a truth of two numbers is no vector
        if of_queries.terms and of_queries.terms[0][1] < 0:
            parts = of_keys.index(), of_queries.times(-1).index()
        else:
            parts = of_queries.index(), of_keys.times(-1).index()
        made = (made for part in parts for made in subexpressions(part))
        is_small = all(-MAX_SMALL <= end <= MAX_SMALL for index in made for end in _range(index, self.box))
        return parts if is_small else (left, right)

    def table(self, table: Table) -> tuple[str, str, str, str]:
        """A table, its length, and the strides of batch rows and heads."""
        if table not in self.tables:
            self.tables.append(table)
        place = self.tables.index(table)
        length, row, head = (self.later(NUMBERS_OF_TABLE * place + turn) for turn in range(NUMBERS_OF_TABLE))
        return f"tables[{place}]", length, row, head

    # ---- integers

    def index(self, index: Index) -> str:
        """The name of an expression's value."""
        if index not in self.names:
            self.names[index] = self.named(index)
        return self.names[index]

    def named(self, index: Index) -> str:
        match index:
            case Const(0):
                return "0"
            case Const(number):
                self.numbers.append(number)
                return f"numbers[{len(self.numbers) - 1}]"
            case Var("q") | Var("k") | Var("head"):
                return index.name
            case Var(name) | Param(name):
                raise AssertionError(f"{name} is not bound")
            case Read(self.placed_by, "rank", Var("q" | "k") as position):
                return f"{position.name}_place"
        return self.line(self.expression(index))

    def line(self, expression: str) -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"    {name} = {expression}")
        return name

    def expression(self, index: Arithmetic | Function | Select | Read) -> str:
        match index:
            case Arithmetic("//" | "%", left, Const(divisor)):
                return _divided(index.op, self.index(left), divisor, _is_positive(left, self.box))
            case Arithmetic("//", left, right):
                return f"floor_div({self.index(left)}, {self.index(right)})"
            case Arithmetic("%", left, right):
                return f"floor_mod({self.index(left)}, {self.index(right)})"
            case Arithmetic(op, left, right):
                return f"{self.index(left)} {op} {self.index(right)}"
            case Function(name, arguments):
                return _FUNCTIONS[name]([self.index(argument) for argument in arguments])
            case Select(items, at):
                assert not isinstance(items, str), f"the list {items} is not bound"
                place, chosen = self.index(at), "0"
                for turn, item in enumerate(items):
                    chosen = f"tl.where({place} == {turn}, {self.index(item)}, {chosen})"
                return chosen
            case Read(name, facet, at):
                table, length, row, head = self.table((name, facet))
                return f"read({table}, {length}, {row} * row + {head} * head, {self.index(at)})"
            case _:
                assert_never(index)


def _stop_of(term: Relation) -> tuple[Index, int] | None:
    """x and stop of a term x < stop whose stop is small and not negative."""
    match term:
        case Compare("<", index, Const(stop)) if 0 <= stop <= MAX_SMALL:
            return index, stop
        case Compare("<=", index, Const(last)) if 0 <= last < MAX_SMALL:
            return index, last + 1
    return None


def _divided(op: str, x: str, divisor: int, is_positive: bool) -> str:
    """x // divisor or x % divisor, floored; a kernel's own division rounds towards 0."""
    if divisor & (divisor - 1) == 0:
        return f"{x} >> {divisor.bit_length() - 1}" if op == "//" else f"{x} & {divisor - 1}"
    if is_positive:
        return f"{x} {op} {divisor}"
    return f"{'floor_div' if op == '//' else 'floor_mod'}({x}, {divisor})"


def _nested(name: str) -> Callable[[list[str]], str]:
    def joined(arguments: list[str]) -> str:
        found = arguments[0]
        for argument in arguments[1:]:
            found = f"{name}({found}, {argument})"
        return found

    return joined


_FUNCTIONS: dict[str, Callable[[list[str]], str]] = {
    "abs": lambda arguments: f"tl.abs({arguments[0]})",
    "min": _nested("tl.minimum"),
    "max": _nested("tl.maximum"),
    "isqrt": lambda arguments: f"integer_root({arguments[0]})",
    "log2": lambda arguments: f"integer_log2({arguments[0]})",
}
