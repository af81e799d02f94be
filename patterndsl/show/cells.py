"""What is there to see of a pattern? Cells of positions, each empty, partial or full, and the figures under a picture.

Cells are live tiles at the picture's own size, so a million positions cost what a thousand do. How they look is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.sema.bind import Bound, HeadGroup
from patterndsl.sema.parameters import Sizes
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL, grow

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

EFFORT, MAX_NODES = 1 << 18, 1 << 16
"""Boxes, then nodes of a quadtree, spent on telling undecided cells apart: each a fraction of a second."""


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """states: uint8 [rows, columns], row = block of q_cell queries from q_start on, column = block of kv_cell keys.

    A ragged last cell is full when all that exists of it is kept. `exact` is False where cells were left undecided
    and count as partial, so that `num_live` is an upper bound.
    """

    states: Array
    q_cell: int
    kv_cell: int
    sizes: Sizes
    exact: bool

    @property
    def is_single(self) -> bool:
        """Every cell is one pair: there is nothing partial."""
        return self.q_cell == self.kv_cell == 1

    @property
    def num_live(self) -> int:
        return int(np.count_nonzero(self.states))

    @property
    def num_full(self) -> int:
        return int(np.count_nonzero(self.states == FULL))

    @property
    def live_share(self) -> float:
        """Share of all pairs that lie in live cells; 0 where there are no pairs."""
        heights, widths = _extents(self.sizes.q_len, self.q_cell), _extents(self.sizes.kv_len, self.kv_cell)
        num_pairs = self.sizes.q_len * self.sizes.kv_len
        return float(heights @ (self.states != EMPTY) @ widths) / num_pairs if num_pairs else 0.0


def _extents(length: int, cell: int) -> Array:
    """Positions that exist in each cell."""
    starts = np.arange(0, length, cell, dtype=np.float64)
    return np.minimum(starts + cell, length) - starts


def find_cells(
    relation: Relation, sizes: Sizes, lookup: Lookup, q_cell: int, kv_cell: int, effort: int = EFFORT
) -> Cells:
    """The cells of a bound relation. Work: the live cells, and `effort` and MAX_NODES for what is hard to tell.

    What the descent leaves undecided the quadtree may tell: to it a stride is one node, however often it comes.
    """
    tiles = find_tiles(relation, sizes, lookup, q_cell, kv_cell, effort=effort)
    states = np.zeros((tiles.num_q_blocks, tiles.num_kv_blocks), dtype=np.uint8)
    states[tiles.q_blks, tiles.kv_blks] = np.where(tiles.is_full, FULL, PARTIAL)
    if tiles.num_guessed:
        told = _from_quadtree(relation, sizes, lookup, q_cell, kv_cell)
        if told is not None:
            return Cells(told, q_cell, kv_cell, sizes, True)
    return Cells(states, q_cell, kv_cell, sizes, tiles.num_guessed == 0)


def _from_quadtree(relation: Relation, sizes: Sizes, lookup: Lookup, q_cell: int, kv_cell: int) -> Array | None:
    """The states, where a quadtree of MAX_NODES tells all of them."""
    if kv_cell & (kv_cell - 1) or q_cell % kv_cell:
        return None
    tree = grow(relation, sizes, lookup, MAX_NODES)
    if not tree.exact or tree.finest > kv_cell:
        return None
    states = tree.states(kv_cell)
    height = q_cell // kv_cell
    starts = range(0, len(states), height)
    rows = [states[start : start + height] for start in starts]
    return np.stack([np.where((row == row[0]).all(axis=0), row[0], PARTIAL) for row in rows])


def fitting_cell(sizes: Sizes, max_rows: int, max_columns: int) -> int:
    """The least power of two whose square cells fit into so many rows and columns."""
    cell = 1
    while sizes.q_len > cell * max_rows or sizes.kv_len > cell * max_columns:
        cell *= 2
    return cell


@dataclass(frozen=True, slots=True)
class Caption:
    """The words of a picture: its title, and what there is to know about the view."""

    title: str
    view: str


def caption(
    name: str | None, text: str, bound: Bound, group: HeadGroup, layer: int | None, drawn: Sequence[str] = ()
) -> Caption:
    """The words for one head group. name, text: of the pattern; layer: as the user gave it, if they did; drawn: which
    inputs are a random sample."""
    one_line = " ".join(text.split())
    title = f"{name}: {one_line}" if name else one_line
    view = [_lengths(bound.sizes)]
    if len(bound.groups) > 1:
        view.append(f"{_heads(group.heads)} of {bound.num_heads}; {len(bound.groups)} groups differ")
    if layer is not None:
        view.append(f"layer {layer}")
    if drawn:
        view.append(f"{', '.join(drawn)} at random")
    return Caption(title, " · ".join(view))


def _lengths(sizes: Sizes) -> str:
    if sizes.q_start == 0 and sizes.q_len == sizes.kv_len == sizes.total:
        return f"N {sizes.total:,}"
    first = f"{sizes.q_len:,} queries" + (f" from {sizes.q_start:,} on" if sizes.q_start else "")
    return f"{first} · {sizes.kv_len:,} keys · N {sizes.total:,}"


def _heads(heads: tuple[int, ...]) -> str:
    """`head 3`, `heads 0-3`, `heads 0, 2, 4 ...`."""
    if len(heads) == 1:
        return f"head {heads[0]}"
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return f"heads {heads[0]}-{heads[-1]}"
    return "heads " + ", ".join(map(str, heads[:4])) + (" ..." if len(heads) > 4 else "")


def figures(cells: Cells) -> str:
    """Cell size, live cells, full cells and their share, in one line."""
    num_cells = cells.states.size
    share = f"{_percent(cells.live_share)} of all pairs"
    most = "" if cells.exact else "at most "
    if cells.is_single:
        return f"{most}{cells.num_live:,} of {num_cells:,} pairs kept ({_percent(cells.live_share)})"
    size = f"cells of {cells.q_cell:,}×{cells.kv_cell:,}"
    return f"{size} · {most}{cells.num_live:,} of {num_cells:,} live ({share}), {cells.num_full:,} full"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if 0 < share < 0.1 else f"{100 * share:.1f} %"
