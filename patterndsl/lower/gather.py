"""In which unit are keys gathered? Blocks where the pattern is dense, single keys where it is scattered."""

from __future__ import annotations

from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Sizes

Q_BLOCK = 64
KV_BLOCKS = (64, 8, 1)
"""Units tried, coarse to fine. Finer units compute less and cost more per key."""
MIN_SAVING = 2.0
"""A finer unit must shrink the computed area by this factor."""
MAX_TILES = 1 << 24
"""A unit with more tiles than this is not tried: its lists would cost more than they save."""


def gather_tiles(relation: Relation, sizes: Sizes, lookup: Lookup) -> Tiles:
    """Tiles of Q_BLOCK queries by a unit of keys that suits the pattern. Work: O(live tiles)."""
    best = find_tiles(relation, sizes, lookup, Q_BLOCK, KV_BLOCKS[0])
    for kv_block in KV_BLOCKS[1:]:
        num_partial = best.num_tiles - int(best.is_full.sum())
        # what a finer unit can save lies in the partial tiles
        if num_partial * 2 < best.num_tiles or num_partial * (best.kv_block // kv_block) > MAX_TILES:
            return best
        finer = find_tiles(relation, sizes, lookup, Q_BLOCK, kv_block)
        if finer.num_tiles * kv_block * MIN_SAVING > best.num_tiles * best.kv_block:
            return best
        best = finer
    return best
