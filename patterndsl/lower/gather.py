"""In which unit are tiles found? Blocks where the pattern is dense, down to single keys where it is scattered."""

from __future__ import annotations

from typing import TypeAlias

from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.parameters import Sizes

Blocks: TypeAlias = tuple[tuple[int, int], ...]
"""(q_block, kv_block), coarse to fine."""

GATHERED: Blocks = ((64, 64), (64, 8), (64, 1))
"""Units of the gathered backend. Finer ones compute less and cost more per key."""
SAVING = 2.0
"""By which factor a finer unit of the gathered backend must shrink the computed area."""
MAX_TILES = 1 << 24
"""A unit with more tiles than this is not tried: its lists would cost more than they save."""


def gather_tiles(relation: Relation, sizes: Sizes, lookup: Lookup) -> Tiles:
    """Tiles of 64 queries by a unit of keys that suits the pattern. Work: O(live tiles)."""
    return fitting_tiles(relation, sizes, lookup, GATHERED, SAVING)


def fitting_tiles(
    relation: Relation, sizes: Sizes, lookup: Lookup, blocks: Blocks, saving: float, each: int | None = None
) -> Tiles:
    """Tiles by the finest of these units whose every step saves the factor `saving`. Work: O(live tiles). each: see
    `find_tiles`, for the coarsest unit."""
    best = find_tiles(relation, sizes, lookup, *blocks[0], each=each)
    for q_block, kv_block in blocks[1:]:
        num_partial = best.num_tiles - int(best.is_full.sum())
        finer_each = best.q_block * best.kv_block // (q_block * kv_block)
        # what finer tiles can save lies in the partial ones
        if num_partial * saving < best.num_tiles * (saving - 1) or num_partial * finer_each > MAX_TILES:
            return best
        finer = find_tiles(relation, sizes, lookup, q_block, kv_block)
        if finer.num_tiles * saving > best.num_tiles * finer_each:
            return best
        best = finer
    return best
