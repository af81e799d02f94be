"""Which names can an expression see, and what kinds of value do they have?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from patterndsl.ir.index import (
    HEAD,
    LAYER,
    NK,
    NQ,
    Arithmetic,
    Const,
    Facet,
    Function,
    Index,
    K,
    Param,
    Q,
    Read,
    Select,
    Var,
    arithmetic,
    function,
)
from patterndsl.ir.relation import Relation, subexpressions
from patterndsl.sema.model import InputDeclaration, Requirement
from patterndsl.syntax import tree as ast
from patterndsl.syntax.parse import KEYWORDS

Kind: TypeAlias = Literal["integer", "predicate", "attribute", "list"]


@dataclass(frozen=True, slots=True)
class AttributeName:
    """The bare name of a grid axis or input, as an argument: `same(doc)`."""

    meaning: GridAxis | InputDeclaration | None  # None: any attribute, while a definition is checked by itself


@dataclass(frozen=True, slots=True)
class ListValue:
    """A list parameter: its name, or its values where an import was given them."""

    items: str | tuple[Index, ...]


Value: TypeAlias = Index | Relation | AttributeName | ListValue


@dataclass(frozen=True, slots=True)
class GridAxis:
    """A grid axis: size, the product of the sizes of the faster axes, or the parts that it is composed of."""

    name: str
    size: Index
    stride: Index
    others: Index
    outermost: bool
    parts: tuple[GridAxis, ...] = ()

    def base_names(self) -> frozenset[str]:
        return frozenset(part.name for part in self.parts) if self.parts else frozenset({self.name})


@dataclass(frozen=True, slots=True)
class Scope:
    """The names that an expression can see. Definitions see the scope that they stand in, not the caller's."""

    parent: Scope | None = None
    values: dict[str, Value] = field(default_factory=dict)
    attributes: dict[str, GridAxis | InputDeclaration] = field(default_factory=dict)
    definitions: dict[str, list[ast.Definition]] = field(default_factory=dict)
    imports: dict[str, ast.Import] = field(default_factory=dict)
    requirements: dict[str, list[Requirement]] = field(default_factory=dict)  # what an argument asks of the sizes
    broken: set[str] = field(default_factory=set)  # declared wrongly, and reported: their uses are silent

    def names(self) -> set[str]:
        own = {*self.values, *self.definitions, *self.imports}
        return own | self.parent.names() if self.parent else own | set(POSITIONS) | set(FUNCTIONS) | set(PRIMITIVES)

    def is_open(self) -> bool:
        """Whether a section that could not be read might have declared what is looked for."""
        return ast.ANY_NAME in self.broken or (self.parent is not None and self.parent.is_open())


POSITIONS: dict[str, Index] = {"q": Q, "k": K, "head": HEAD, "layer": LAYER, "N": NQ, "Nq": NQ, "Nk": NK}
FUNCTIONS: dict[str, tuple[int, int | None]] = {
    "abs": (1, 1),
    "min": (2, None),
    "max": (2, None),
    "clamp": (3, 3),
    "isqrt": (1, 1),
    "log2": (1, 1),
    "ceildiv": (2, 2),
}
PRIMITIVES = {"random": ("r", "seed", "avoid"), "along": ("axis",)}
RESERVED = frozenset({*POSITIONS, *FUNCTIONS, *PRIMITIVES, *KEYWORDS})


def kind_of(value: Value) -> Kind:
    """The kind of a value."""
    match value:
        case AttributeName():
            return "attribute"
        case ListValue():
            return "list"
        case Const() | Var() | Param() | Arithmetic() | Function() | Select() | Read():
            return "integer"
        case _:
            return "predicate"


def product(factors: Iterable[Index]) -> Index:
    """The product of expressions; 1 of none."""
    total: Index = Const(1)
    for factor in factors:
        total = arithmetic("*", total, factor)
    return total


def coordinate(axis: GridAxis, facet: Facet, position: Index) -> Index:
    """Row-major coordinates; a run of equal coordinates is `stride` long, and there are `others` positions of each."""
    if axis.parts:
        total: Index = Const(0)
        for part in axis.parts:
            total = arithmetic("+", arithmetic("*", total, part.size), coordinate(part, "value", position))
        return total
    runs = arithmetic("//", position, axis.stride)
    along = runs if axis.outermost else arithmetic("%", runs, axis.size)
    match facet:
        case "value":
            return along
        case "start":
            start = arithmetic("*", runs, axis.stride)
            if axis.outermost:
                return start
            # an inner axis of size 1 never changes: its one run starts at 0
            changes = function("min", (Const(1), arithmetic("-", axis.size, Const(1))))
            return arithmetic("*", start, changes)
        case "rank":
            outer = arithmetic("//", position, arithmetic("*", axis.stride, axis.size))
            inner = arithmetic("%", position, axis.stride)
            among = inner if axis.outermost else arithmetic("+", arithmetic("*", outer, axis.stride), inner)
            return arithmetic("+", arithmetic("*", along, axis.others), among)


STAND_IN = Param("?")
"""An integer parameter of a definition that is checked by itself."""


def depends_on_data(index: Index) -> bool:
    """Whether the value changes with the position or an input, and not just with head, layer, N and parameters."""
    return any(part in (Q, K) or isinstance(part, Read) for part in subexpressions(index))


def has_stand_in(index: Index) -> bool:
    """Whether the value is that of a definition which is checked by itself, and so unknown."""
    return STAND_IN in subexpressions(index)
