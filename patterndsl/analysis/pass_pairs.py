"""How many pairs does a pass of a plan keep? Counted in its shape; in partial tiles one by one, where they are few."""

from __future__ import annotations

import numpy as np

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import indices
from patterndsl.lower.geometry import Geometry
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.shapes import Band, Full, Keys, Masked, Piece, Sparse, Triangle

MAX_COUNTED = 1 << 24
"""Pairs of partial tiles that are looked at one by one, in some tenths of a second."""
FEW = 32
"""Indices of a relation up to which a pair is looked at in the usual time."""
CHUNK = 1 << 20


def kept_pairs(piece: Piece, lookup: Lookup) -> int | None:
    """The pairs of one head that the piece keeps, over all groups; None where they are too many to count."""
    geometry = piece.geometry
    match piece.shape:
        case Full():
            return geometry.num_pairs
        case Triangle():
            length = geometry.q.length
            return geometry.num_groups * (length * (length + 1) // 2)
        case Band(tile, mask):
            return geometry.num_groups * (geometry.q.length // tile) * int(mask.sum())
        case Masked(mask):
            return geometry.num_groups * int(mask.sum())
        case Keys(keys):
            return int(np.count_nonzero(keys >= 0))
        case Sparse():
            kept = _in_tiles(geometry, piece.shape, lookup)
            return None if kept is None else geometry.num_groups * kept


def _in_tiles(geometry: Geometry, shape: Sparse, lookup: Lookup) -> int | None:
    """Those of one group."""
    tiles, q_len, kv_len = shape.tiles, geometry.q.length, geometry.k.length
    heights = np.minimum(tiles.q_block, q_len - tiles.q_blks * tiles.q_block)
    widths = np.minimum(tiles.kv_block, kv_len - tiles.kv_blks * tiles.kv_block)
    partial = np.flatnonzero(~tiles.is_full)
    effort = max(1.0, sum(1 for _ in indices(shape.relation)) / FEW)
    if len(partial) * tiles.q_block * tiles.kv_block * effort > MAX_COUNTED:
        return None
    kept = int((heights * widths)[tiles.is_full].sum())
    orders = None if shape.orders is None else [order.positions() for order in shape.orders]
    step = max(1, CHUNK // (tiles.q_block * tiles.kv_block))
    for first in range(0, len(partial), step):
        some = partial[first : first + step]
        q = (tiles.q_blks[some] * tiles.q_block)[:, None, None] + np.arange(tiles.q_block)[:, None]
        k = (tiles.kv_blks[some] * tiles.kv_block)[:, None, None] + np.arange(tiles.kv_block)
        inside = (q < q_len) & (k < kv_len)
        q, k = np.minimum(q, q_len - 1), np.minimum(k, kv_len - 1)
        if orders is not None:
            q, k = orders[0][q], orders[1][k]
        kept += int((member(shape.relation, Point(q, k, 0, lookup)) & inside).sum())
    return kept
