"""Which cases of a formula can be said as one? Cells are joined where the polynomial of one holds on others as well.

Where equalities hold on a cell, as at N = w, its polynomial can be written in several ways, and one of them is often
that of its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patterndsl.analysis.count import Cell, agrees, reduced
from patterndsl.analysis.sets import coalesced

if TYPE_CHECKING:
    import islpy

MAX_COMPARED = 32
"""Convex parts that are compared with each other; of more, only the first cell is joined with others."""


def joined(cells: Sequence[Cell], context: islpy.Set) -> list[Cell]:
    """Cells of the same function, disjoint as these are, with the first one first; the others simple ones first."""
    few = sum(len(cell.domain.get_basic_sets()) for cell in cells) <= MAX_COMPARED
    main, waiting = _grown(cells[0], cells[1:], context, few)
    found: list[Cell] = []
    left = context.subtract(main.domain)
    while waiting and few:
        first, *others = sorted(waiting, key=_num_equalities)  # what holds in general takes in what is special
        cell, waiting = _grown(first, others, left, few)
        left = left.subtract(cell.domain)
        found.append(cell)
    return [main, *sorted(map(_plainer, [*found, *waiting]), key=lambda cell: len(cell.value.terms))]


def _grown(main: Cell, others: Sequence[Cell], space: islpy.Set, few: bool) -> tuple[Cell, list[Cell]]:
    """The cell with the parts of the others where its polynomial holds, and what is left of them; together they are
    `space`."""
    parts = [Cell(basic.to_set(), cell.value) for cell in others for basic in cell.domain.get_basic_sets()]
    compared = parts if few else []
    ways = {cell.value for cell in (main, *others) if agrees(main, cell.value)}
    value = min(
        ways,
        key=lambda way: (-sum(agrees(part, way) for part in compared), len(way.terms), way.degree, repr(way)),
    )
    domain = main.domain
    rest = []
    for cell in others:
        for basic in cell.domain.get_basic_sets():
            if agrees(Cell(basic.to_set(), cell.value), value):
                domain = domain.union(basic.to_set())
        left = cell.domain.subtract(domain)
        if not left.is_empty():
            rest.append(Cell(coalesced(left), cell.value))
    return _rounded(Cell(coalesced(domain), value), rest, space)


def _rounded(main: Cell, rest: list[Cell], space: islpy.Set) -> tuple[Cell, list[Cell]]:
    """The cell on a convex domain, if its polynomial is right on all of it: one condition instead of several."""
    hull = main.domain.simple_hull().to_set().intersect(space)
    shared = [Cell(cell.domain.intersect(hull), cell.value) for cell in rest]
    if not all(cell.domain.is_empty() or agrees(cell, main.value) for cell in shared):
        return main, rest
    left = [Cell(coalesced(cell.domain.subtract(hull)), cell.value) for cell in rest]
    return Cell(hull, main.value), [cell for cell in left if not cell.domain.is_empty()]


def _plainer(cell: Cell) -> Cell:
    """The same cell, its value with fewer terms where equalities hold on all of it."""
    value = reduced(cell.value, cell.equalities[0]) if len(cell.equalities) == 1 else cell.value
    is_plainer = value.symbols <= cell.value.symbols and len(value.terms) < len(cell.value.terms)
    return Cell(cell.domain, value) if is_plainer else cell


def _num_equalities(cell: Cell) -> int:
    return min(map(len, cell.equalities))
