"""Random specs that a user could paste: every one is valid, at every step of shrinking.

`cases()` draws a `Case`: a spec text, the sizes to bind it at and its inputs. Validity is by construction: divisors are
positive in every place where they may stand, roots and logarithms stay in their domain, and no value leaves 62 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from hypothesis import assume, settings
from hypothesis import strategies as st

import patterndsl
from tests import brute

Kind: TypeAlias = Literal["integer", "small", "predicate", "attribute", "list"]
"""What a parameter takes; `small` is an integer free of positions and inputs."""
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

# how tightly a construct binds
OR, AND, NOT, RELATION, SUM, PRODUCT, UNARY, POSTFIX = range(8)


def many(times: float) -> settings:
    """So many times the examples that the profile asks for."""
    return settings(max_examples=int(times * settings().max_examples))


@dataclass(frozen=True)
class Case:
    """A spec, the sizes it is asked at, and the values of its inputs."""

    text: str
    sizes: dict[str, int]
    heads: int = 1
    layer: int = 0
    inputs: dict[str, list[int] | list[bool]] = field(default_factory=dict)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a failure: the spec as a file has it, and how to ask for it."""
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        bind = f"patterndsl.parse(text).bind({sizes}, heads={self.heads}, layer={self.layer})"
        printer.text(f"Case of {bind}, inputs={self.inputs}, text:\n{self.text.rstrip()}\n")

    @property
    def lengths(self) -> brute.Lengths:
        return brute.lengths(**self.sizes)

    def pattern(self) -> patterndsl.Pattern:
        return patterndsl.parse(self.text)

    def bound(self, pattern: patterndsl.Pattern) -> Any:
        return pattern.bind(self.sizes.get("n"), **self.keywords, heads=self.heads, layer=self.layer)

    @property
    def keywords(self) -> dict[str, Any]:
        return {name: value for name, value in self.sizes.items() if name != "n"}

    def keep(self, pattern: patterndsl.Pattern) -> Any:
        """bool [heads, q_len, kv_len] by brute force."""
        return brute.keep(pattern.spec, self.lengths, self.heads, self.layer, self.inputs)


@dataclass(frozen=True)
class Piece:
    """A text, how tightly it binds, and whether its form alone shows its kind."""

    text: str
    binding: int = POSTFIX
    evident: bool = True


@dataclass(frozen=True)
class Callable_:
    """A definition or import: its parameters with their kinds, and what it gives."""

    name: str
    kinds: tuple[tuple[str, Kind], ...]
    gives: Literal["integer", "predicate"]
    reads_inputs: bool
    by_name: bool = False  # an import: its parameters have defaults, and are given by name
    has_grid: bool = False  # its axes multiply to N, so it stands only where N is the sequence's


@dataclass(frozen=True)
class Names:
    """What an expression may use where it stands."""

    integers: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    small: tuple[str, ...] = ()  # parameters: they depend on no position and no input
    predicates: tuple[str, ...] = ()
    q_values: tuple[str, ...] = ()  # attributes q.name
    k_values: tuple[str, ...] = ()
    q_truths: tuple[str, ...] = ()
    k_truths: tuple[str, ...] = ()
    with_facets: tuple[str, ...] = ()  # attributes of both sides that have .start and .rank
    attributes: tuple[str, ...] = ()  # those and composed axes: what `same` takes
    axes: tuple[str, ...] = ()
    lists: tuple[tuple[str, int], ...] = ()
    tables: tuple[str, ...] = ()
    truth_tables: tuple[str, ...] = ()
    callables: tuple[Callable_, ...] = ()
    inputs: tuple[str, ...] = ()
    top: bool = True  # positions are those of the sequence, and so small

    def without_inputs(self) -> Names:
        """For what `random` avoids, which must be known before the inputs are."""
        free = {"with_facets", "attributes", "q_values", "k_values"}
        kept: dict[str, Any] = {name: tuple(a for a in getattr(self, name) if a not in self.inputs) for name in free}
        callables = tuple(c for c in self.callables if not c.reads_inputs and "predicate" not in dict(c.kinds).values())
        return replace(
            self,
            **kept,
            integers=self.small,
            predicates=(),
            q_truths=(),
            k_truths=(),
            tables=(),
            truth_tables=(),
            callables=callables,
        )


def fit(piece: Piece, binding: int) -> str:
    return f"({piece.text})" if piece.binding < binding else piece.text


class Expressions:
    """Draws expressions. `draw` is that of a composite strategy."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def one_of(self, *choices: Callable[[], Piece]) -> Piece:
        return self.draw(st.sampled_from(choices))()

    def pick(self, items: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(items))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    # ---- integers -----------------------------------------------------------------------------------------

    def integer(self, names: Names, depth: int) -> Piece:
        if depth <= 0 or self.number(0, 3) == 0:
            return self.integer_leaf(names)
        return self.one_of(
            lambda: self.sum(names, depth - 1),
            lambda: self.floored(names, depth - 1),
            lambda: self.product(names, depth - 1),
            lambda: self.integer_call(names, depth - 1),
            lambda: Piece(f"-{fit(self.integer(names, depth - 1), UNARY)}", UNARY),
            lambda: self.looked_up(names, depth - 1),
        )

    def integer_leaf(self, names: Names) -> Piece:
        choices = [lambda: self.position(names)] * 4 + [
            lambda: Piece(str(self.pick((0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65)))),
            lambda: Piece(self.pick(("N", "Nq", "Nk", "head", "layer"))),
        ]
        if names.tables:
            choices += [lambda: Piece(f"{self.pick(names.tables)}[{self.position(names).text}]")] * 3
        if names.integers:
            choices.append(lambda: Piece(self.pick(names.integers), evident=False))
        return self.one_of(*choices)

    def position(self, names: Names) -> Piece:
        """q or k, or an attribute of it."""
        attributes = [f"q.{name}" for name in names.q_values] + [f"k.{name}" for name in names.k_values]
        facets = [f"{at}.{name}.{f}" for at in "qk" for name in names.with_facets for f in ("start", "rank")]
        return Piece(self.pick(["q", "k", *attributes * 2, *facets]), evident=False)

    def small(self, names: Names) -> Piece:
        """Free of positions and inputs."""
        return Piece(self.pick(["1", "0", "2", "3", "5", "head", "layer", "N", "Nk", *names.small]), evident=False)

    def size(self, names: Names) -> Piece:
        """Positive, and free of positions, heads and inputs."""
        text = self.pick(["1", "2", "3", "4", "5", "7", "8", "16", "layer + 1", *names.positive])
        return Piece(text, SUM if "+" in text else POSTFIX)

    def positive(self, names: Names, depth: int) -> Piece:
        if depth <= 0 or self.number(0, 2) == 0:
            return self.size(names)

        def inner() -> str:
            return self.integer(names, depth - 1).text

        return self.one_of(
            lambda: Piece(f"max(1, {inner()})"),
            lambda: Piece(f"abs({inner()}) + {self.number(1, 3)}", SUM),
            lambda: Piece(f"clamp({inner()}, 1, {self.number(1, 9)})"),
            lambda: Piece("head + 1", SUM),
            lambda: Piece("2 * layer + 1", SUM),
            lambda: Piece(f"max({inner()}, {self.number(1, 4)}, {inner()})"),
        )

    def sum(self, names: Names, depth: int) -> Piece:
        left, op, right = self.integer(names, depth), self.pick("+-"), self.integer(names, depth)
        return Piece(f"{fit(left, SUM)} {op} {fit(right, PRODUCT)}", SUM, left.evident or right.evident or op == "+")

    def product(self, names: Names, depth: int) -> Piece:
        if names.top and depth == 0 and self.number(0, 1):
            left = Piece(self.pick("qk"))
            return Piece(f"{left.text} * {self.pick('qk')}", PRODUCT)
        left, right = self.integer(names, depth), self.small(names)
        if self.number(0, 1):
            return Piece(f"{fit(right, PRODUCT)} * {fit(left, UNARY)}", PRODUCT)
        return Piece(f"{fit(left, PRODUCT)} * {fit(right, UNARY)}", PRODUCT)

    def floored(self, names: Names, depth: int) -> Piece:
        left, op, right = self.integer(names, depth), self.pick(("//", "%")), self.positive(names, depth)
        return Piece(f"{fit(left, PRODUCT)} {op} {fit(right, UNARY)}", PRODUCT)

    def integer_call(self, names: Names, depth: int) -> Piece:
        def some() -> str:
            return self.integer(names, depth).text

        def few(name: str) -> Piece:
            return Piece(f"{name}({', '.join(some() for _ in range(self.number(2, 3)))})")

        defined = [c for c in names.callables if c.gives == "integer"]
        choices = [
            lambda: Piece(f"abs({some()})"),
            lambda: few("min"),
            lambda: few("max"),
            lambda: Piece(f"clamp({some()}, {some()}, {some()})"),
            lambda: Piece(f"isqrt({self.pick(('abs(', 'max(0, ', 'max('))}{some()}{self.pick((')', ', 0)'))})"),
            lambda: Piece(f"log2({self.positive(names, depth).text})"),
            lambda: Piece(f"ceildiv({some()}, {self.positive(names, depth).text})"),
        ]
        choices[4] = lambda: Piece(f"isqrt({self.pick((f'abs({some()})', f'max(0, {some()})', 'N'))})")
        if defined:
            choices.append(lambda: self.call(self.pick(defined), names, depth))
        return self.one_of(*choices)

    def looked_up(self, names: Names, depth: int) -> Piece:
        choices: list[Callable[[], Piece]] = []
        if names.tables:
            choices.append(lambda: Piece(f"{self.pick(names.tables)}[{self.integer(names, depth).text}]"))
        if names.lists:
            choices.append(lambda: self.listed(names))
        return self.one_of(*choices) if choices else self.integer_leaf(names)

    def listed(self, names: Names) -> Piece:
        name, length = self.pick(names.lists)
        return Piece(f"{name}[{self.pick(('head', 'layer'))} % {length}]")

    # ---- predicates ---------------------------------------------------------------------------------------

    def predicate(self, names: Names, depth: int) -> Piece:
        if depth <= 0 or self.number(0, 4) == 0:
            return self.predicate_leaf(names, max(0, depth))
        return self.one_of(
            lambda: self.logic(names, depth - 1),
            lambda: self.logic(names, depth - 1),
            lambda: self.predicate_leaf(names, depth),
            lambda: self.difference(names, depth - 1),
            lambda: Piece(f"{self.pick(('~', 'not '))}{fit(self.predicate(names, depth - 1), NOT)}", NOT),
            lambda: self.moved(names, depth - 1),
            lambda: self.moved_by_name(names, depth - 1),
        )

    def predicate_leaf(self, names: Names, depth: int) -> Piece:
        choices: list[Callable[[], Piece]] = [
            lambda: self.related(names, depth),
            lambda: self.comparison(names, depth),
            lambda: self.library(names, depth),
            lambda: self.library(names, depth),
            lambda: self.members(names, depth),
            lambda: self.random(names, depth),
        ]
        if names.predicates or names.q_truths or names.k_truths or names.truth_tables:
            choices += [lambda: self.truth(names, depth)] * 4
        if names.axes or names.attributes:
            choices += [lambda: self.of_attribute(names, depth)] * 5
        defined = [c for c in names.callables if c.gives == "predicate" and (names.top or not c.has_grid)]
        if defined:
            choices += [lambda: self.call(self.pick(defined), names, depth)] * 3
        return self.one_of(*choices)

    def related(self, names: Names, depth: int) -> Piece:
        """The query and the key side by side, or the head and layer by themselves: what patterns are mostly made of."""
        sides = [("q", "k"), ("q", "k"), *((f"q.{name}", f"k.{name}") for name in names.attributes * 2)]
        query, key = self.pick(sides)
        op, size = self.pick(("<=", "<", "==", "!=", ">=", ">")), self.positive(names, min(1, depth))
        return self.one_of(
            lambda: Piece(f"{query} {op} {key}", RELATION),
            lambda: Piece(f"{query} - {key} {op} {fit(size, SUM)}", RELATION),
            lambda: Piece(f"0 <= {query} - {key} < {fit(size, SUM)}", RELATION),
            lambda: Piece(f"{query} % {fit(size, UNARY)} {op} {key} % {fit(size, UNARY)}", RELATION),
            lambda: Piece(f"{query} // {fit(size, UNARY)} - {key} // {fit(size, UNARY)} in 0..2", RELATION),
            lambda: Piece(f"head % {self.number(2, 3)} == {self.number(0, 1)}", RELATION),
            lambda: Piece(f"(q + {self.pick(('head', 'layer'))}) % {fit(size, UNARY)} {op} k", RELATION),
        )

    def comparison(self, names: Names, depth: int) -> Piece:
        text = fit(self.integer(names, depth), SUM)
        for _ in range(self.pick((1, 1, 1, 2, 3))):
            text += f" {self.pick(('<=', '<', '==', '!=', '>=', '>'))} {fit(self.integer(names, depth), SUM)}"
        return Piece(text, RELATION)

    def members(self, names: Names, depth: int) -> Piece:
        operand = fit(self.integer(names, depth), SUM)
        parts = [fit(self.integer(names, min(1, depth)), SUM) for _ in range(self.number(1, 3))]
        if len(parts) == 2:
            return Piece(f"{operand} in {parts[0]}..{parts[1]}", RELATION)
        return Piece(f"{operand} in {{{', '.join(parts)}}}", RELATION)

    def library(self, names: Names, depth: int) -> Piece:
        """A name of the prelude that takes integers."""

        def width() -> str:
            """Mostly a small number, now and then anything."""
            return self.integer(names, depth).text if self.number(0, 5) == 0 else self.small_number(names)

        def step() -> str:
            return self.positive(names, min(1, depth)).text

        return self.one_of(
            lambda: Piece("causal"),
            lambda: Piece(self.pick(("all", "none"))),
            lambda: Piece(f"window({width()})"),
            lambda: Piece(f"window({width()}, {width()})"),
            lambda: Piece(f"window(right = {width()}, left = {width()})"),
            lambda: Piece(f"recent({width()})"),
            lambda: Piece(f"block({step()})"),
            lambda: Piece(f"strided({step()})"),
            lambda: Piece(f"dilated({width()}, {self.size(names).text})"),
            lambda: Piece(f"columns({step()}, {width()})"),
            lambda: Piece(f"first({width()})"),
            lambda: Piece(f"global({width()})"),
        )

    def small_number(self, names: Names) -> str:
        return str(self.pick([1, 0, 2, 3, 4, 5, 8, 16, *names.small]))

    def random(self, names: Names, depth: int) -> Piece:
        arguments = [str(self.pick([1, 0, 2, 3, 5, *names.positive]))]
        if self.number(0, 1):
            arguments.append(f"seed = {self.pick(('1', '7', 'head', '1000 * layer + head', 'N'))}")
        if self.number(0, 1):
            arguments.append(f"avoid = {self.predicate(names.without_inputs(), min(1, depth)).text}")
        return Piece(f"random({', '.join(arguments)})")

    def truth(self, names: Names, depth: int) -> Piece:
        attributes = [f"q.{name}" for name in names.q_truths] + [f"k.{name}" for name in names.k_truths]
        known = [*names.predicates, *attributes]
        if names.truth_tables and (not known or self.number(0, 1)):
            index = self.integer(names, depth).text
            return Piece(f"{self.pick(names.truth_tables)}[{index}]", evident=False)
        return Piece(self.pick(known), evident=False)

    def of_attribute(self, names: Names, depth: int) -> Piece:
        choices: list[Callable[[], Piece]] = []
        if names.attributes:
            choices.append(lambda: Piece(f"same({self.pick(names.attributes)})"))
        if names.with_facets:
            choices.append(lambda: self.chunks(names))
            choices.append(lambda: self.within(names, depth - 1))
        if names.axes:
            choices.append(lambda: Piece(f"along({self.pick(names.axes)})"))
        return self.one_of(*choices)

    def within(self, names: Names, depth: int) -> Piece:
        return Piece(f"within({self.pick(names.with_facets)}, {self.predicate(self.far(names), depth).text})")

    def chunks(self, names: Names) -> Piece:
        label, size, back = self.pick(names.with_facets), self.size(names).text, self.number(0, 2)
        return Piece(f"chunks({label}, {size}, {back})")

    def logic(self, names: Names, depth: int) -> Piece:
        op, binding = self.pick((("|", OR), ("&", AND), ("or", OR), ("and", AND)))
        terms = [fit(self.predicate(names, depth), binding + 1) for _ in range(self.pick((2, 2, 3)))]
        return Piece(f" {op} ".join(terms), binding)

    def difference(self, names: Names, depth: int) -> Piece:
        """The left side shows by its form that it is a predicate, so that parameters at the right are known to be."""
        left, right = self.predicate(names, depth), self.predicate(names, depth)
        if not left.evident:
            left = Piece(f"{fit(left, AND)} & all", AND)
        return Piece(f"{fit(left, SUM)} - {fit(right, PRODUCT)}", SUM)

    def far(self, names: Names) -> Names:
        return replace(names, top=False)

    def moved(self, names: Names, depth: int) -> Piece:
        """`R at (q', k')`, with or without new lengths."""
        relation = self.predicate(self.far(names), depth)
        size, step = fit(self.size(names), UNARY), self.small_number(names)
        more = self.pick(("1", "5", *names.positive))
        lengths = ("", f", N = ceildiv(N, {size})", f", Nk = Nk + {more}, Nq = N", ", N = max(1, N - 1)")
        query, key, both = self.pick(
            (
                ("k", "q", ", Nq = Nk, Nk = Nq"),
                ("q", f"k + {step}", ""),
                (f"q // {size}", f"k // {size}", self.pick(lengths)),
                (f"q % {size}", f"k % {size}", f", N = {fit(self.size(names), SUM)}"),
                (self.integer(names, 1).text, self.integer(names, 1).text, self.pick(lengths)),
            )
        )
        return Piece(f"{fit(relation, POSTFIX)} at ({query}, {key}{both})")

    def moved_by_name(self, names: Names, depth: int) -> Piece:
        relation = self.predicate(self.far(names), depth).text
        return self.one_of(
            lambda: Piece(f"blocks({self.size(names).text}, {relation})"),
            lambda: Piece(f"transpose({relation})"),
            lambda: Piece(f"shifted({relation}, {self.integer(names, min(1, depth)).text})"),
        )

    # ---- definitions and imports --------------------------------------------------------------------------

    def call(self, item: Callable_, names: Names, depth: int) -> Piece:
        arguments = []
        for param, kind in item.kinds:
            if item.by_name and self.number(0, 1):
                continue
            named = item.by_name or self.number(0, 3) == 0
            arguments.append((f"{param} = " if named else "") + self.argument(kind, names, depth - 1))
        if not arguments:
            return Piece(item.name, evident=False)
        return Piece(f"{item.name}({', '.join(arguments)})", evident=False)

    def argument(self, kind: Kind, names: Names, depth: int) -> str:
        match kind:
            case "integer":
                return self.integer(names, depth).text
            case "small":
                return self.small(names).text
            case "predicate":
                return self.predicate(self.far(names), depth).text
            case "attribute":
                return str(self.pick(names.with_facets))
            case "list":
                return str(self.pick(names.lists)[0])


# ---- specs ------------------------------------------------------------------------------------------------------

AXES = (("row", "col"), ("z", "y", "x"), ("col",))
YAML_PLAIN = re.compile(r"[A-Za-z0-9(][^:#\n]*")


@dataclass
class Parts:
    """A spec in the making: the lines of each section, and the names that it has so far."""

    names: Names = field(default_factory=Names)
    sections: dict[str, list[str]] = field(default_factory=dict)

    def add(self, section: str, *lines: str) -> None:
        self.sections.setdefault(section, []).extend(lines)

    def add_names(self, **more: tuple[Any, ...]) -> None:
        joined: dict[str, Any] = {name: (*getattr(self.names, name), *new) for name, new in more.items()}
        self.names = replace(self.names, **joined)

    def text(self, attend: str) -> str:
        if not self.sections:
            return attend
        lines = [line for section, body in self.sections.items() for line in (f"{section}:", *body)]
        return "\n".join([*lines, f"attend: {attend}", ""])


class Specs(Expressions):
    """Draws whole specs."""

    def scalar(self, text: str, indent: int = 4) -> str:
        """The expression as YAML: plain where it may be, or in one of the other four styles."""
        style = self.pick(("plain", "double", "single", "|", ">"))
        if style == "plain" and YAML_PLAIN.fullmatch(text) and text not in ("all", "none"):
            return text
        if style in ("|", ">"):
            words, pad = text.replace(" & ", " &\n").replace(" | ", " |\n").split("\n"), "\n" + " " * indent
            return style + "".join(pad + word for word in words)
        return f"'{text}'" if style == "single" else f'"{text}"'

    def params(self, parts: Parts) -> None:
        for name in ("w", "s", "g")[: self.pick((0, 1, 0, 2, 3))]:
            before = [f"{known} + 1" for known in parts.names.positive]
            value, positive = self.pick(
                (
                    (str(self.number(1, 9)), True),
                    (str(self.number(-3, 0)), False),
                    ("isqrt(N)", False),
                    ("N // 4", False),
                    ("max(1, log2(N + 1))", True),
                    *((text, True) for text in before),
                )
            )
            form = self.pick(('"{}"', '{{default: "{}", doc: how many}}', '{{default: "{}", min: -3}}'))
            parts.add("params", f"  {name}: {form.format(value)}")
            parts.add_names(integers=(name,), small=(name,), positive=(name,) if positive else ())
        if self.number(0, 3) == 0:
            values = self.draw(st.lists(st.integers(-1, 6), min_size=2, max_size=4))
            parts.add("params", f"  steps: {values}")
            parts.add_names(lists=(("steps", len(values)),))

    def grid(self, parts: Parts, sizes: Sequence[int]) -> None:
        """Axes whose sizes multiply to N."""
        axes = next(axes for axes in AXES if len(axes) == len(sizes))
        total = 1
        for size in sizes:
            total *= size
        for axis, size in zip(axes, sizes, strict=True):
            symbolic = f"ceildiv(N, {total // size})" if total else "N"
            parts.add("grid", f"  {axis}: {self.pick((str(size), symbolic))}")
        composed: tuple[str, ...] = ()
        if len(axes) == 3 and self.number(0, 1):
            composed = ("tile",)
            parts.add("grid", f"  tile: [{self.pick(('z, x', 'x, z', 'y, x'))}]")
        parts.add_names(
            q_values=(*axes, *composed),
            k_values=(*axes, *composed),
            with_facets=axes,
            attributes=(*axes, *composed),
            axes=(*axes, *composed),
        )

    def inputs(self, parts: Parts, sizes: brute.Lengths) -> dict[str, list[int] | list[bool]]:
        """Declares some inputs; returns their values."""
        both = max(sizes.total, sizes.kv_len)
        values: dict[str, list[int] | list[bool]] = {}
        for name in self.draw(st.lists(st.sampled_from(sorted(INPUTS)), unique=True, max_size=3)):
            kind, sections = INPUTS[name]
            length = {"N": both, "Nq": sizes.total, "Nk": sizes.kv_len, "6": 6}.get(kind.strip("intbol[]"))
            values[name] = self.values(kind, self.number(1, 9) if length is None else length)
            parts.add("inputs", f"  {name}: {kind}")
            parts.add_names(inputs=(name,), **dict.fromkeys(sections, (name,)))
        return values

    def values(self, kind: str, length: int) -> list[int] | list[bool]:
        if kind.startswith("bool"):
            return [bool(self.number(0, 1)) for _ in range(min(length, 12))] + [at % 3 == 0 for at in range(12, length)]
        if self.number(0, 1):  # runs, as packed documents have them
            values: list[int] = []
            while len(values) < length:
                values += [self.number(0, 4)] * self.number(1, 1 + length // 3)
            return values[:length]
        start, step, period = self.number(-2, 9), self.number(1, 9), self.number(1, 11)
        return [(start + step * at * at) % period - (start % 2) for at in range(length)]

    def definitions(self, parts: Parts, names: Sequence[str]) -> None:
        for name in names:
            kinds = self.param_kinds(parts.names)
            gives: Literal["integer", "predicate"] = self.pick(("predicate", "predicate", "integer"))
            if gives == "integer":
                kinds = tuple((param, kind) for param, kind in kinds if kind != "predicate")
            inner = self.inside(parts.names, kinds)
            body = (self.integer if gives == "integer" else self.predicate)(inner, self.number(1, 2))
            text = self.all_used(body, kinds, gives)
            head = f"{name}({', '.join(param for param, _ in kinds)})" if kinds else name
            parts.add("define", f"  {head}: {self.scalar(text)}")
            reads = bool(parts.names.inputs) or bool(kinds)
            parts.add_names(callables=(Callable_(name, kinds, gives, reads),))

    def param_kinds(self, names: Names) -> tuple[tuple[str, Kind], ...]:
        possible: list[tuple[str, Kind]] = [("a", "integer"), ("R", "predicate"), ("S", "predicate")]
        possible += [("x", "attribute")] if names.with_facets else []
        possible += [("l", "list")] if names.lists else []
        return tuple(self.draw(st.lists(st.sampled_from(possible), unique=True, max_size=2)))

    def inside(self, names: Names, kinds: Sequence[tuple[str, Kind]]) -> Names:
        """What a body sees: its parameters too."""
        of = {wanted: tuple(param for param, kind in kinds if kind == wanted) for wanted in ("integer", "predicate")}
        attributes = tuple(param for param, kind in kinds if kind == "attribute")
        return replace(
            names,
            top=False,
            integers=(*names.integers, *of["integer"]),
            predicates=(*names.predicates, *of["predicate"]),
            q_values=(*names.q_values, *attributes),
            k_values=(*names.k_values, *attributes),
            with_facets=(*names.with_facets, *attributes),
            inputs=(*names.inputs, *attributes),  # it may stand for one
            lists=(*names.lists, *((param, 2) for param, kind in kinds if kind == "list")),
        )

    def all_used(self, body: Piece, kinds: Sequence[tuple[str, Kind]], gives: str) -> str:
        """A parameter's kind is read off from its use, so each one is used."""
        uses = {"integer": "{} == 0", "predicate": "{}", "attribute": "q.{0} == k.{0}", "list": "{}[0] == 1"}
        sums = {"integer": "{}", "attribute": "q.{}", "list": "{}[0]"}
        for param, kind in kinds:
            if kind != "integer" and re.search(rf"\b{param}\b(?! = )", body.text):
                continue
            if gives == "integer":
                body = Piece(f"{fit(body, SUM)} + {sums[kind].format(param)}", SUM)
            else:
                body = Piece(f"{fit(body, NOT)} & {uses[kind].format(param)}", AND)
        return body.text

    def import_in_place(self, parts: Parts, grid: Sequence[int]) -> None:
        """Another spec, written in place."""
        inner = Parts()
        self.params(inner)
        has_grid = bool(grid) and bool(self.number(0, 1))
        if has_grid:
            self.grid(inner, grid)
        if self.number(0, 2) == 0:
            self.definitions(inner, ("inner",))
        attend = self.scalar(self.predicate(inner.names, self.number(0, 2)).text, 6)
        lines = [f"    {line}" for line in (inner.text(attend) if inner.sections else f"attend: {attend}").split("\n")]
        kinds: tuple[tuple[str, Kind], ...] = tuple(
            (param, "small") for param in inner.names.small if param not in inner.names.positive
        )
        parts.add("import", "  other:", *(line for line in lines if line.strip()))
        parts.add_names(callables=(Callable_("other", kinds, "predicate", True, True, has_grid),))


INPUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "doc": ("int[N]", ("q_values", "k_values", "with_facets", "attributes")),
    "bucket": ("int[N]", ("q_values", "k_values", "with_facets", "attributes")),
    "rate": ("int[Nq]", ("q_values",)),
    "age": ("int[Nk]", ("k_values",)),
    "chosen": ("bool[N]", ("q_truths", "k_truths")),
    "pad": ("bool[Nk]", ("k_truths",)),
    "prefix": ("int[]", ("tables",)),
    "reach": ("int[6]", ("tables",)),
    "open": ("bool[]", ("truth_tables",)),
}

LENGTHS = st.one_of(st.sampled_from((2, 1, 3, 7, 8, 15, 16, 17, 31, 33)), st.integers(1, 40))
LONGER = st.one_of(st.sampled_from((63, 65, 127, 64, 128)), st.integers(40, 130))
LONGEST = st.integers(130, 300)


@st.composite
def cases(draw: Draw, *, max_heads: int = 4, max_length: int = 300) -> Case:
    """A valid spec, sizes for it, and values of its inputs."""
    specs = Specs(draw)
    kind = specs.pick(("short",) * 14 + ("longer",) * 5 + ("longest",))
    length = min(max_length, draw({"short": LENGTHS, "longer": LONGER, "longest": LONGEST}[kind]))
    grid: tuple[int, ...] = ()
    if specs.number(0, 2) == 0:
        inner = draw(st.lists(st.sampled_from((2, 1, 3, 4, 5, 7, 8)), max_size=2))
        outer = length
        for size in inner:
            outer = -(-outer // size)
        grid = (outer, *inner)
        length = outer
        for size in inner:
            length *= size
    sizes = {"n": length}
    if specs.number(0, 3) == 0:
        q_start = specs.number(0, length - 1)
        sizes = {"q_len": length - q_start, "kv_len": specs.number(1, 1 + 2 * length), "q_start": q_start}
        sizes = specs.pick((sizes, {"n": length, "q_len": specs.number(1, length - q_start), "q_start": q_start}))
    parts, inputs = Parts(), {}
    if specs.number(0, 4):
        specs.params(parts)
        if grid:
            specs.grid(parts, grid)
        if specs.number(0, 2):
            inputs = specs.inputs(parts, brute.lengths(**sizes))
        if specs.number(0, 3) == 0:
            specs.import_in_place(parts, grid)
        specs.definitions(parts, ("near", "far", "step")[: specs.pick((0, 1, 0, 2, 0, 3))])
    expression = specs.predicate(parts.names, specs.pick((2, 1, 3)))
    attend = specs.scalar(expression.text, 2) if parts.sections else expression.text
    heads = specs.pick((1, 2, 1, 3, 4)) if kind == "short" else specs.number(1, 2)
    case = Case(parts.text(attend), sizes, min(heads, max_heads), specs.number(0, 3), inputs)
    assume(not inputs or not leaves_62_bits(case))
    return case


def leaves_62_bits(case: Case) -> bool:
    """Products of inputs, which may be any 32-bit numbers, can be rightly refused; nothing else that is drawn is."""
    try:
        case.bound(case.pattern())
    except patterndsl.PatternError as failed:
        return all("62 bits" in found.message for found in failed.diagnostics)
    return False
