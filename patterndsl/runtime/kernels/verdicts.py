"""What does the verdict over tiles look as a kernel's source? `ir.interval.verdict`, asked of names instead of numbers.

Its bounds are names of a kernel's values, and what it does to them are lines of Triton's Python: what intervals mean is
said once, and a kernel tells what PyTorch tells. Constants become arguments, as in `predicate`, but for divisors. It
neither imports nor runs Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from patterndsl.ir.index import Facet
from patterndsl.ir.interval import Box, Interval, Verdict, verdict
from patterndsl.ir.relation import Listed, Random
from patterndsl.lower.listings import Listing
from patterndsl.runtime.kernels.predicate import has_large
from patterndsl.sema.bind import HeadGroup
from patterndsl.sema.parameters import Sizes

Side: TypeAlias = Literal["q", "k"]
SIDES: tuple[Side, Side] = ("q", "k")


@dataclass(frozen=True, slots=True)
class OfTiles:
    """Least and greatest value of an input's facet in each tile of queries, or of keys."""

    name: str
    facet: Facet
    side: Side


@dataclass(frozen=True, slots=True)
class OfRanges:
    """The same over ranges of any places: of aligned blocks of 1, 2, 4, ... values."""

    name: str
    facet: Facet


@dataclass(frozen=True, slots=True)
class OfLists:
    """Which blocks the rows of a table list."""

    name: str


Lookup: TypeAlias = OfTiles | OfRanges | OfLists

PLACES = 6
"""Numbers of a lookup: where its values begin, the steps of batch rows and heads, and what its own function wants."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The verdict as source. text: of a function tell(q_low, q_high, k_low, k_high, q_tile, k_tile, there, head, row,
    numbers, places, bounds, ranges, lists), of the first and last positions of tiles and of where these stand, which
    gives two truths of each tile that is `there`: whether all of its pairs hold, and whether one may.

    numbers: the constants; lookups: in the order of their places.
    """

    text: str
    numbers: tuple[int, ...]
    lookups: tuple[Lookup, ...]


@lru_cache(maxsize=256)
def verdicts_of(
    groups: tuple[HeadGroup, ...],
    sizes: Sizes,
    blocks: tuple[int, int],
    covers: frozenset[tuple[str, Side]],
    listings: tuple[tuple[str, Listing], ...],
) -> Verdicts:
    """The source for heads that have relations of their own. covers: inputs with a value for each query, or each key,
    so that a read at positions is one of tiles."""
    writer = _Writer()
    names = _Names(writer, sizes, blocks, covers, dict(listings))
    box = Box(_ends(writer, "q"), _ends(writer, "k"), names)
    for group in groups:
        if len(groups) > 1:
            writer.open(" | ".join(f"(head == {head})" for head in group.heads))
        found = verdict(group.relation, box)
        for name, truth in zip(("certain", "possible"), found, strict=True):
            there = truth & _Name(writer, "there", True)
            text = "there & (there == 0)" if there is False else there.text
            writer.lines.append(f"{writer.margin}{name} = {text}")
        writer.close()
    wide = any(has_large(group.relation, sizes) for group in groups)
    first = [f"    {name} = {name}.to(tl.int64)" for name in ("q_low", "q_high", "k_low", "k_high")] if wide else []
    arguments = "q_low, q_high, k_low, k_high, q_tile, k_tile, there, head, row, numbers, places, bounds, ranges, lists"
    begin = ["    certain = there", "    possible = there"]  # one type, whichever group comes
    body = [*first, *begin, *writer.lines, "    return certain, possible"]
    text = "\n".join(["@triton.jit", f"def tell({arguments}):", *body, ""])
    return Verdicts(text, tuple(writer.numbers), tuple(writer.lookups))


def _ends(writer: _Writer, side: Side) -> Interval:
    return _Name(writer, f"{side}_low"), _Name(writer, f"{side}_high")


@dataclass
class _Writer:
    """Lines that give each expression a name, once."""

    margin: str = "    "
    lines: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def open(self, condition: str) -> None:
        """What follows is of some heads: names that others have are not known there."""
        self.lines.append(f"{self.margin}if {condition}:")
        self.margin += "    "

    def close(self) -> None:
        self.margin, self.names = "    ", {}

    def name(self, expression: str, *, is_truth: bool = False) -> _Name:
        if expression not in self.names:
            self.names[expression] = f"x{len(self.lines)}"
            self.lines.append(f"{self.margin}{self.names[expression]} = {expression}")
        return _Name(self, self.names[expression], is_truth)

    def pair(self, call: str) -> tuple[_Name, _Name]:
        """What a function gives that gives two."""
        if call not in self.names:
            self.names[call] = f"x{len(self.lines)}"
            self.lines.append(f"{self.margin}{self.names[call]}, {self.names[call]}_ = {call}")
        return _Name(self, self.names[call]), _Name(self, f"{self.names[call]}_")

    def text(self, value: Any) -> str:
        """An operand: of arithmetic and comparisons, where a constant is an argument."""
        if isinstance(value, _Name):
            return value.text
        if value in (0, 1):
            return str(int(value))
        if value not in self.numbers:
            self.numbers.append(value)
        return f"numbers[{self.numbers.index(value)}]"

    def places(self, lookup: Lookup) -> tuple[str, list[str]]:
        """Where the values of a batch row and head begin, and the other numbers of a lookup."""
        if lookup not in self.lookups:
            self.lookups.append(lookup)
        first = PLACES * self.lookups.index(lookup)
        begin, row, head, *others = (f"places[{first + turn}]" for turn in range(PLACES))
        return f"{begin} + row * {row} + head * {head}", others


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """A value of the kernel: what is done to it is a line. Constants that change nothing are left out."""

    writer: _Writer
    text: str
    is_truth: bool = False

    def __add__(self, other: Any) -> Any:
        return self if _is(other, 0) else self._number("+", other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self if _is(other, 0) else self._number("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._number("-", other, turned=True)

    def __neg__(self) -> Any:
        return 0 - self

    def __mul__(self, other: Any) -> Any:
        if _is(other, 0):
            return 0
        return self._integer() if _is(other, 1) else self._number("*", other)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: Any) -> Any:
        if isinstance(divisor, int):
            return self if divisor == 1 else self._divided("floor_div", ">>", divisor.bit_length() - 1, divisor)
        return self.writer.name(f"floor_div({self.text}, {divisor.text})")

    def __rfloordiv__(self, other: int) -> Any:
        return self.writer.name(f"floor_div({self.text} * 0 + {self.writer.text(other)}, {self.text})")

    def __mod__(self, divisor: Any) -> Any:
        if isinstance(divisor, int):
            return 0 if divisor == 1 else self._divided("floor_mod", "&", divisor - 1, divisor)
        return self.writer.name(f"floor_mod({self.text}, {divisor.text})")

    def __rmod__(self, other: int) -> Any:
        return self.writer.name(f"floor_mod({self.text} * 0 + {self.writer.text(other)}, {self.text})")

    def _divided(self, function: str, shift: str, by: int, divisor: int) -> _Name:
        """By a constant, which stays in the text: floored, where a kernel's own division rounds towards 0."""
        if divisor & (divisor - 1) == 0:
            return self.writer.name(f"{self.text} {shift} {by}")
        return self.writer.name(f"{function}({self.text}, {divisor})")

    def __lt__(self, other: Any) -> Any:
        return self._compared("<", other)

    def __le__(self, other: Any) -> Any:
        return self._compared("<=", other)

    def __gt__(self, other: Any) -> Any:
        return self._compared(">", other)

    def __ge__(self, other: Any) -> Any:
        return self._compared(">=", other)

    def __eq__(self, other: object) -> Any:
        return self._compared("==", other)

    def __and__(self, other: Any) -> Any:
        if isinstance(other, bool):
            return self if other else False
        return self if other.text == self.text else self._truth("&", other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Any:
        if isinstance(other, bool):
            return True if other else self
        return self if other.text == self.text else self._truth("|", other)

    __ror__ = __or__

    def __xor__(self, other: bool) -> Any:
        return ~self if other else self

    def __invert__(self) -> _Name:
        return self.writer.name(f"{self.text} == 0", is_truth=True)

    def clip(self, *, min: Any = None, max: Any = None) -> Any:
        function, other = ("minimum", max) if min is None else ("maximum", min)
        return self.writer.name(f"tl.{function}({self.text}, {self.writer.text(other)})")

    def _integer(self) -> _Name:
        return self.writer.name(f"{self.text}.to(tl.int32)") if self.is_truth else self

    def _number(self, op: str, other: Any, *, turned: bool = False) -> _Name:
        mine, theirs = self._integer().text, _operand(self.writer, other)
        return self.writer.name(f"{theirs} {op} {mine}" if turned else f"{mine} {op} {theirs}")

    def _compared(self, op: str, other: Any) -> _Name | bool:
        if isinstance(other, _Name) and other.text == self.text:
            return "=" in op
        return self.writer.name(f"{self.text} {op} {self.writer.text(other)}", is_truth=True)

    def _truth(self, op: str, other: _Name) -> _Name:
        return self.writer.name(f"{self.text} {op} {other.text}", is_truth=True)


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def _operand(writer: _Writer, value: Any) -> str:
    return value._integer().text if isinstance(value, _Name) else writer.text(value)


@dataclass(frozen=True, slots=True)
class _Names:
    """The `BoxData` of a kernel: what `told.TileData` looks up, as lines."""

    writer: _Writer
    sizes: Sizes
    blocks: tuple[int, int]
    covers: frozenset[tuple[str, Side]]
    listings: Mapping[str, Listing]

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        for side in SIDES:
            if (name, side) in self.covers and all(map(_is_same, index, _ends(self.writer, side))):
                begin, (half, *_) = self.writer.places(OfTiles(name, facet, side))
                at = self.writer.name(f"bounds + {begin} + {side}_tile").text
                return self.writer.name(f"tl.load({at})"), self.writer.name(f"tl.load({at} + {half})")
        begin, (half, leaves, length) = self.writer.places(OfRanges(name, facet))
        low, high = (self._vector(end) for end in index)
        return self.writer.pair(f"bounds_between(ranges + {begin}, {half}, {leaves}, {length}, {low}, {high})")

    def _vector(self, value: Any) -> str:
        if isinstance(value, _Name):
            return value.text
        return self.writer.name(f"k_low * 0 + {self.writer.text(value)}").text

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> Any:
        raise AssertionError("draws are not told in a call")

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        listing = self.listings[node.name]
        begin, (num_blocks, *_) = self.writer.places(OfLists(node.name))
        (first, last), (start, stop) = row, key
        table = f"lists + {begin}, {num_blocks}"
        if listing.holds_tiles(self.blocks, self.sizes.q_start):
            found = self.writer.name(f"lists_block({table}, {first.text}, {start.text})", is_truth=True)
            return found, found
        of = listing.per, listing.of
        down, across = (-(-(tile - 1) // size) + 1 for tile, size in zip(self.blocks, of, strict=True))
        ends = f"{first.text}, {last.text}, {start.text}, {stop.text}"
        number = self.writer.name(f"num_listed({table}, {ends}, {down}, {across})")
        return number == (last - first + 1) * (stop - start + 1), number > 0


def _is_same(one: Any, other: Any) -> bool:
    return isinstance(one, _Name) and one.text == other.text
