"""What is left of a piece where positions end early? Pieces again: what fits stays whole, what does not is cut.

A relation is at any shorter length what it is at a longer one, without the positions beyond: so passes that were
planned once serve every length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from patterndsl.lower.geometry import Axis, Geometry, Integers, Side
from patterndsl.lower.shapes import Band, Full, Masked, Piece, Triangle, Truths


def can_clip(piece: Piece) -> bool:
    """Whether queries and keys of a group lie in ascending steps, and it is dense, so that a group is cut at one
    place."""
    sides = piece.geometry.q, piece.geometry.k
    return isinstance(piece.shape, Full | Triangle | Band | Masked) and all(len(side.axes) == 1 for side in sides)


def clipped(piece: Piece, length: int) -> Iterator[Piece]:
    """The pairs of a piece that `can_clip` whose positions are below `length`. Work: O(groups), and of what is cut."""
    geometry = piece.geometry
    starts = geometry.group_starts().reshape([axis.size for axis in geometry.groups])
    fitting = np.stack([_num_below(side, starts, length) for side in (geometry.q, geometry.k)], axis=-1)
    for moved, groups, (num_q, num_k) in _alike(geometry.groups, fitting):
        if num_q and num_k:
            sides = (Side(side.start + moved, side.axes) for side in (geometry.q, geometry.k))
            yield from _cut(Piece(Geometry(groups, *sides), piece.shape), num_q, num_k)


def _num_below(side: Side, starts: Integers, length: int) -> Integers:
    """How many positions of a side are below `length`, for each group."""
    (axis,) = side.axes
    return np.clip(-((side.start + starts - length) // axis.stride), 0, axis.size)


def _alike(groups: tuple[Axis, ...], fitting: Integers) -> Iterator[tuple[int, tuple[Axis, ...], tuple[int, int]]]:
    """Groups of which as much fits: by how much the first is moved, and their axes."""
    if not groups:
        yield 0, (), (int(fitting[0]), int(fitting[1]))
        return
    axis, *inner = groups
    steps = fitting.reshape(axis.size, -1)
    changes = np.flatnonzero((steps[1:] != steps[:-1]).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), axis.size]
    for first, stop in pairwise(bounds):
        for moved, more, counts in _alike(tuple(inner), fitting[first]):
            yield first * axis.stride + moved, (Axis(stop - first, axis.stride), *more), counts


def _cut(piece: Piece, num_q: int, num_k: int) -> Iterator[Piece]:
    """The first queries and keys of each group, at least one of each."""
    geometry = piece.geometry
    if (num_q, num_k) == (geometry.q.length, geometry.k.length):
        yield piece
        return
    match piece.shape:
        case Full():
            yield Piece(geometry.narrowed((0, num_q), (0, num_k)), Full())
        case Triangle():
            both = min(num_q, num_k)
            yield Piece(geometry.narrowed((0, both), (0, both)), Triangle())
            if both < num_q:
                yield Piece(geometry.narrowed((both, num_q), (0, both)), Full())
        case Masked(mask):
            yield from _masked(geometry, (0, num_q), (0, num_k), mask[:num_q, :num_k])
        case Band():
            yield from _cut_band(geometry, piece.shape, num_q, num_k)
        case _:
            raise AssertionError("only what is dense is cut")


def _cut_band(geometry: Geometry, band: Band, num_q: int, num_k: int) -> Iterator[Piece]:
    """Tiles of which all queries and keys are there, and the others, which are a few, as one mask."""
    tile, width = band.tile, band.mask.shape[1]
    num_q = min(num_q, -(-num_k // tile) * tile)  # tiles without keys
    num_whole = max(0, min(num_q // tile, (num_k - width) // tile + 1))
    start = num_whole * tile
    if num_whole:
        stop = start - tile + width
        yield Piece(geometry.narrowed((0, start), (0, stop)), band)
    if start < num_q:
        stop = min(num_k, (num_q - 1) // tile * tile + width)
        mask = np.zeros((num_q - start, stop - start), dtype=np.bool_)
        for at in range(0, num_q - start, tile):
            part = mask[at : at + tile, at : at + width]
            part[:] = band.mask[: part.shape[0], : part.shape[1]]
        yield from _masked(geometry, (start, num_q), (start, stop), mask)


def _masked(geometry: Geometry, q: tuple[int, int], k: tuple[int, int], mask: Truths) -> Iterator[Piece]:
    if mask.any():
        yield Piece(geometry.narrowed(q, k), Masked(mask))
