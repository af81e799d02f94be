"""Does a call tell tile by tile where a pattern can have pairs? By bounds of inputs, and by blocks that it lists.

Documents, paddings and tables bound what a tile may hold; orders, and what is listed or drawn key by key, do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from patterndsl.ir.index import Const, K, Q, Read, arithmetic
from patterndsl.ir.relation import Listed, draws_in, indices, lists_in
from patterndsl.sema.bind import Bound

BLOCK = 64
"""Queries and keys of a tile, about."""
MAX_CELLS = 1 << 25
"""Tiles, live or not, of all heads that differ, up to which they are told: some hundred megabytes of lists, where all
of them are live."""
FEWEST = 16
"""Queries, and keys, that are listed together at least: of fewer, a tile would be asked pair by pair."""


def can_tell(bound: Bound) -> bool:
    """Whether the tiles of a pattern with inputs are told so."""
    listings = listings_of(bound)
    if not bound.inputs or bound.merge != "set" or bound.fallback is not None or listings is None:
        return False
    if any(isinstance(index, Read) and index.facet == "rank" for index in indices(bound.relation)):
        return False  # places in an order say nothing of where positions are
    heads = bound.num_heads if listings else len(bound.groups)
    num_cells = heads * -(-bound.sizes.q_len // BLOCK) * -(-bound.sizes.kv_len // BLOCK)
    return not any(draws_in(bound.relation)) and num_cells <= MAX_CELLS


def listings_of(bound: Bound) -> dict[str, Listing] | None:
    """How blocks are listed, for each table that the pattern asks; None where some are asked in another way."""
    found = dict[str, Listing]()
    for node in lists_in(bound.relation):
        selection = next(shape.selection for shape in bound.inputs if node.name in shape.names)
        if selection is None or selection.label is not None or min(selection.per, selection.of) < FEWEST:
            return None
        listing = Listing(selection.width, selection.num_blocks, selection.of, selection.per, selection.first_row)
        if node != listing.asked(node.name):
            return None
        found[node.name] = listing
    return found


@dataclass(frozen=True, slots=True)
class Listing:
    """How a table lists blocks: row r has `width` of num_blocks blocks of `of` keys for the queries q of
    q // per - first_row == r."""

    width: int
    num_blocks: int
    of: int
    per: int
    first_row: int

    def asked(self, name: str) -> Listed:
        """The pairs that a table lists."""
        row = arithmetic("-", arithmetic("//", Q, Const(self.per)), Const(self.first_row))
        return Listed(name, Const(self.width), row, arithmetic("//", K, Const(self.of)))

    def holds_tiles(self, blocks: tuple[int, int], q_start: int) -> bool:
        """Whether no tile of so many queries and keys reaches over the end of a block."""
        return self.per % blocks[0] == 0 and q_start % blocks[0] == 0 and self.of % blocks[1] == 0
