"""Which pairs of a pattern does each call list? Those of selections, and what is said of them beyond being listed.

A table lists blocks of keys for blocks of queries, or the members of routes, who attend each other. Here that is told
apart from the terms that list nothing; where the lists run is for `hulls` and programs of parts to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from patterndsl.ir.index import Const, Index, K, Q, arithmetic
from patterndsl.ir.relation import And, Listed, Relation, conjunction, disjunction, lists_in
from patterndsl.lower.plan import terms_of
from patterndsl.sema.bind import Bound


@dataclass(frozen=True, slots=True)
class Lists:
    """Pairs that each call lists: row r of the table has keys of block k // of for the queries q of q // per == r.

    names: of the table, or of each route's, whose members are queries and keys alike. width: of a row; rows are counted
    from first_row. once: a pair that several routes have counts once.
    """

    names: tuple[str, ...]
    width: int
    of: int
    per: int
    first_row: int
    is_route: bool
    once: bool = True


def apart(relation: Relation, bound: Bound) -> tuple[list[Relation], dict[Lists, Relation]]:
    """The terms of a union that are no lists, and what is said of the pairs of lists beyond being listed."""
    has_lists = any(lists_in(relation))
    plain, by_name = list[Relation](), dict[str, list[Relation]]()
    for term in terms_of(relation, most=MANY) if has_lists else terms_of(relation):
        name = _name_of(term, bound)
        if name is None:
            plain.append(term)
        else:
            by_name.setdefault(name, []).append(conjunction(_beyond(term, name)))
    found = dict[Lists, Relation]()
    for shape in bound.inputs:
        said = [by_name.get(name, []) for name in shape.names]
        if shape.selection is None or not any(said):
            continue
        if any(said[0] != other for other in said):  # not all routes alike
            return terms_of(relation), {}
        selection = shape.selection
        lists = Lists(
            shape.names,
            selection.width,
            selection.of,
            selection.per,
            selection.first_row,
            selection.label is not None,
            bound.merge == "set",
        )
        found[lists] = disjunction(said[0])
    return plain, found


def listed_relation(lists: Lists, rest: Relation, bound: Bound) -> Relation:
    """Being listed, and the rest."""
    return conjunction((disjunction(conjunction(_asked(name, bound)) for name in lists.names), rest))


MANY = 1 << 16
"""More terms than a union has."""


def _name_of(term: Relation, bound: Bound) -> str | None:
    """The table whose lists a term asks for, in the way that they were listed."""
    parts = term.terms if isinstance(term, And) else (term,)
    for part in parts:
        if isinstance(part, Listed) and set(_asked(part.name, bound, part.width)) <= set(parts):
            return part.name
    return None


def _asked(name: str, bound: Bound, of_routes: Index | None = None) -> tuple[Relation, ...]:
    """What is asked of a table where its lists are taken as they are. of_routes: how many members a route is asked for;
    it has no more than there are keys."""
    selection = next(shape.selection for shape in bound.inputs if name in shape.names)
    assert selection is not None
    width = Const(selection.width)
    if selection.label is not None:
        return tuple(Listed(name, of_routes or width, Const(0), position) for position in (Q, K))
    row = arithmetic("-", arithmetic("//", Q, Const(selection.per)), Const(selection.first_row))
    return (Listed(name, width, row, arithmetic("//", K, Const(selection.of))),)


def _beyond(term: Relation, name: str) -> list[Relation]:
    parts = term.terms if isinstance(term, And) else (term,)
    return [part for part in parts if not (isinstance(part, Listed) and part.name == name)]


__all__ = ["Lists", "apart", "listed_relation"]
