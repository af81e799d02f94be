"""Which patterns are chunks in the orders of a call, or where it lists them? Their form a CPU computes in small blocks.

In an order by an input, such as that of a round of hashing, queries are chunks one behind the other, and keys are in
one piece and move along; so they may be in windows beside it. See `runtime.chunked`. Members of a route attend each
other, whoever they are, see `runtime.routed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patterndsl.ir.index import Read
from patterndsl.ir.relation import indices
from patterndsl.lower.devices import Machine
from patterndsl.lower.geometry import Axis, Side
from patterndsl.lower.hulls import Hull
from patterndsl.lower.kernel_hulls import slot_hulls
from patterndsl.lower.shapes import Band, Full, Masked, Piece, Triangle, Truths
from patterndsl.sema.bind import Bound

MAX_CHUNK_PAIRS = 1 << 18
"""Pairs of the largest chunk: longer ones are left to a kernel that cuts them."""
MAX_LENGTH = 1 << 24
"""Positions that float32 tells apart."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """`number` chunks of queries from place `q_start` on, one behind the other, each of `q_len`; the keys of the first
    are `kv_len` from place `k_start` on, those of the next one `q_len` further. mask: [q_len, kv_len], pairs of each
    that count; None for all."""

    number: int
    q_start: int
    q_len: int
    k_start: int
    kv_len: int
    mask: Truths | None


def may_be_chunks(bound: Bound) -> bool:
    """Whether hulls of it can be chunks: what ranks positions by no input has none."""
    return _is_square(bound) and any(isinstance(i, Read) and i.facet == "rank" for i in indices(bound.relation))


def only_chunks(found: tuple[Hull, ...] | None) -> tuple[Hull, ...] | None:
    """Hulls that are all chunks. None where one is not, or none is in the order of an input."""
    if found is None or all(hull.order is None for hull in found) or not all(map(_are_chunks, found)):
        return None
    return found


def route_hulls(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    """Hulls of routes of few members, where these are all there is and their results are averaged."""
    if bound.merge != "mean" or bound.fallback is not None or not _is_square(bound):
        return None
    found = slot_hulls(bound, machine)
    if found is None or found.beside:
        return None
    is_small = all(hull.lists is not None and hull.lists.width**2 <= MAX_CHUNK_PAIRS for hull in found.listed)
    return found.listed if is_small else None


def _is_square(bound: Bound) -> bool:
    sizes = bound.sizes
    return sizes.q_start == 0 and 0 < sizes.q_len == sizes.kv_len <= MAX_LENGTH


def _are_chunks(hull: Hull) -> bool:
    is_static = hull.runs is None and hull.lists is None and not hull.in_call
    return is_static and all(chunks_of(item.piece) is not None for item in hull.passes)


def chunks_of(piece: Piece) -> tuple[Chunks, ...] | None:
    """A piece as chunks; None where it is something else."""
    geometry, shape = piece.geometry, piece.shape
    if not all(_is_dense(side) for side in (geometry.q, geometry.k)):
        return None
    q, k = geometry.q, geometry.k
    match shape:
        case Band(tile, mask):
            number, kept = q.length // tile, None if mask.all() else mask
            moved = geometry.group_starts().tolist()
            found = [Chunks(number, q.start + by, tile, k.start + by, mask.shape[1], kept) for by in moved]
        case Full() | Triangle() | Masked() if geometry.groups in ((), (Axis(geometry.num_groups, q.length),)):
            found = [Chunks(geometry.num_groups, q.start, q.length, k.start, k.length, _mask(piece))]
        case _:
            return None
    return tuple(found) if all(item.q_len * item.kv_len <= MAX_CHUNK_PAIRS for item in found) else None


def _is_dense(side: Side) -> bool:
    return len(side.axes) == 1 and (side.axes[0].stride == 1 or side.length == 1)


def _mask(piece: Piece) -> Truths | None:
    match piece.shape:
        case Masked(mask) if not mask.all():
            return mask
        case Triangle():
            return np.tri(piece.geometry.q.length, piece.geometry.k.length, dtype=np.bool_)
        case _:
            return None
