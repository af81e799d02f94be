"""Where do the positions of a pass lie? Groups of queries and keys at regular distances, so that they are views.

A residue class, an axis of a grid, a block and a slice are all of this form; nothing here knows which.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Axis:
    """size steps of `stride` positions."""

    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Side:
    """The queries or keys of a group: start + the sum of one step of each axis, the last axis running fastest.

    start: for queries the index of the row, counted from the first query, for keys the position.
    """

    start: int
    axes: tuple[Axis, ...]

    @property
    def length(self) -> int:
        return prod(axis.size for axis in self.axes)

    def places(self) -> Integers:
        """int64 [length]: the places of the first group in order."""
        found = np.array([self.start])
        for axis in self.axes:
            found = (found[:, None] + np.arange(axis.size) * axis.stride).reshape(-1)
        return found


@dataclass(frozen=True, slots=True)
class Geometry:
    """Groups that attend within themselves: group g has the queries and keys of the first one moved by its steps.

    groups: axes of groups; a step moves queries and keys alike.
    """

    groups: tuple[Axis, ...]
    q: Side
    k: Side

    @property
    def num_groups(self) -> int:
        return prod(axis.size for axis in self.groups)

    @property
    def num_rows(self) -> int:
        return self.num_groups * self.q.length

    @property
    def num_pairs(self) -> int:
        return self.num_rows * self.k.length

    def group_starts(self) -> Integers:
        """int64 [num_groups]: by how much each group is moved."""
        return Side(0, self.groups).places()

    def narrowed(self, q: tuple[int, int], k: tuple[int, int]) -> Geometry:
        """The local queries [start, stop) and keys [start, stop) of every group; what is narrowed has one axis."""
        return Geometry(self.groups, _narrowed(self.q, q), _narrowed(self.k, k))


def whole(q_len: int, kv_len: int) -> Geometry:
    """All queries and all keys in their order."""
    return Geometry((), Side(0, (Axis(q_len, 1),)), Side(0, (Axis(kv_len, 1),)))


def _narrowed(side: Side, part: tuple[int, int]) -> Side:
    start, stop = part
    if (start, stop) == (0, side.length):
        return side
    (axis,) = side.axes
    return Side(side.start + start * axis.stride, (Axis(stop - start, axis.stride),))


def side_of(start: int, axes: tuple[Axis, ...]) -> Side:
    """A side with as few axes as can be: steps of one are left out, steps that continue each other become one."""
    merged: list[Axis] = []
    for axis in axes:
        if axis.size == 1:
            continue
        if merged and merged[-1].stride == axis.size * axis.stride:
            merged[-1] = Axis(merged[-1].size * axis.size, axis.stride)
        else:
            merged.append(axis)
    return Side(start, tuple(merged) or (Axis(1, 1),))
