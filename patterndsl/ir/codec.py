"""How is a relation written as data, and read again? As a list of its distinct nodes, each behind those it is made of.

The list holds only lists, strings and integers, so it is JSON as it stands, and never nests deeper than a node's own
fields. Reading is the exact inverse but for source places, which are not written. Nothing is simplified on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast, get_args

from patterndsl.ir.index import (
    Arithmetic,
    ArithmeticOp,
    Const,
    Facet,
    Function,
    Index,
    Param,
    Read,
    Select,
    Symbol,
    Var,
)
from patterndsl.ir.relation import (
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
)

Written: TypeAlias = list[list[Any]]
"""Nodes as [name, field, ...]; a field that is a node is its place in the list. The last node is the whole."""

Kind: TypeAlias = str | tuple[str, ...]
"""integer, text, one of some texts, a node (index, relation, read) or several (indices, relations, or items: a text
too)."""

FIELDS: Mapping[type, tuple[Kind, ...]] = {
    Const: ("integer",),
    Var: (get_args(Symbol),),
    Param: ("text",),
    Arithmetic: (get_args(ArithmeticOp), "index", "index"),
    Function: (("abs", "min", "max", "isqrt", "log2"), "indices"),
    Select: ("items", "index"),
    Read: ("text", get_args(Facet), "index"),
    Everything: (),
    Nothing: (),
    Compare: (get_args(CompareOp), "index", "index"),
    Holds: ("read",),
    And: ("relations",),
    Or: ("relations",),
    Not: ("relation",),
    Listed: ("text", "index", "index", "index"),
    Random: ("index", "index", "relation", "index", "index", "index", "index"),
}
"""What the fields of each node hold, in their order."""

_NODES = {node.__name__: node for node in FIELDS}
_MEMBERS: Mapping[str, tuple[type, ...]] = {
    "index": get_args(Index),
    "relation": get_args(Relation),
    "read": (Read,),
}
_LISTS: Mapping[str, str] = {"indices": "index", "relations": "relation", "items": "index"}


def written(relation: Relation) -> Written:
    """The relation as data. Work: O(nodes)."""
    found: Written = []
    places: dict[tuple[Any, ...], int] = {}

    def place_of(node: Any) -> int:
        fields = FIELDS[type(node)]
        names = list(type(node).__match_args__)[: len(fields)]
        parts = [_field(kind, getattr(node, name), place_of) for kind, name in zip(fields, names, strict=True)]
        row = [type(node).__name__, *parts]
        key = tuple(tuple(part) if isinstance(part, list) else part for part in row)
        if key not in places:
            places[key] = len(found)
            found.append(row)
        return places[key]

    place_of(relation)
    return found


def _field(kind: Kind, value: Any, place_of: Callable[[Any], int]) -> Any:
    if kind in _MEMBERS:
        return place_of(value)
    return [place_of(item) for item in value] if isinstance(value, tuple) else value


def read(data: Sequence[Sequence[Any]]) -> Relation:
    """The relation of the data. Raises ValueError where it is none."""
    nodes: list[Any] = []
    for row in data:
        if not isinstance(row, list) or not row or not isinstance(row[0], str) or row[0] not in _NODES:
            raise ValueError(f"not a node: {row!r}")
        node = _NODES[row[0]]
        fields = FIELDS[node]
        if len(row) != 1 + len(fields):
            raise ValueError(f"{len(fields)} fields make a {row[0]}: {row!r}")
        nodes.append(node(*(_value(kind, part, nodes) for kind, part in zip(fields, row[1:], strict=True))))
    if not nodes or not isinstance(nodes[-1], _MEMBERS["relation"]):
        raise ValueError("the last node is no relation")
    return cast("Relation", nodes[-1])


def _value(kind: Kind, part: Any, nodes: Sequence[Any]) -> Any:
    if isinstance(kind, tuple):
        fits = part in kind
    elif kind in _MEMBERS:
        return _node(kind, part, nodes)
    elif kind in _LISTS and isinstance(part, list):
        return tuple(_node(_LISTS[kind], place, nodes) for place in part)
    else:
        fits = type(part) is int if kind == "integer" else isinstance(part, str) and kind in ("text", "items")
    if not fits:
        raise ValueError(f"{part!r} is no {kind}")
    return part


def _node(kind: str, place: Any, nodes: Sequence[Any]) -> Any:
    if type(place) is not int or not 0 <= place < len(nodes) or not isinstance(nodes[place], _MEMBERS[kind]):
        raise ValueError(f"{place!r} is no earlier {kind}")
    return nodes[place]
