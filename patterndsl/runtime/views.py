"""How do the positions of a pass become tensors that a kernel takes? As strided views, [B * H, groups, length, ...].

Kernels know two dimensions beside the sequence. Heads that share key heads, and batch rows that do not continue each
other in memory, are taken one after the other, so that nothing is copied but orders that have no single stride.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from patterndsl.lower.geometry import Axis, Geometry, Side


@dataclass(frozen=True, slots=True)
class Part:
    """Batch rows, query heads and as many key heads that one launch takes."""

    rows: slice
    q_heads: slice
    kv_heads: slice

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of [B, Hq, ...]."""
        return x[self.rows, self.q_heads]

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of [B, Hkv, ...]."""
        return x[self.rows, self.kv_heads]


def parts(heads: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> list[Part]:
    """The heads, over all batch rows, in parts whose rows and heads are one dimension in all three tensors.

    query: [B, Hq, Tq, D], key, value: [B, Hkv, Tk, D]; heads: some of the query heads, ascending.
    """
    batch, kv_group = query.shape[0], query.shape[1] // key.shape[1]
    # the query heads of one key head do not fit one stride of keys: first ones, second ones, ...
    turns = [tuple(head for head in heads if head % kv_group == turn) for turn in range(kv_group)]
    runs = [run for turn in turns if turn for run in _runs(turn, kv_group)]
    found = [Part(slice(None), q_heads, kv_heads) for q_heads, kv_heads in runs]
    if batch == 1 or all(_is_one_dimension(part, query, key, value) for part in found):
        return found
    return [Part(slice(row, row + 1), part.q_heads, part.kv_heads) for row in range(batch) for part in found]


def _runs(heads: tuple[int, ...], kv_group: int) -> Iterator[tuple[slice, slice]]:
    """The heads, all at the same place of their key head, in runs of one step."""
    at = 0
    while at < len(heads):
        step = heads[at + 1] - heads[at] if at + 1 < len(heads) else kv_group
        stop = at + 1
        while stop < len(heads) and heads[stop] - heads[stop - 1] == step:
            stop += 1
        q_heads = slice(heads[at], heads[stop - 1] + 1, step)
        yield q_heads, slice(heads[at] // kv_group, heads[stop - 1] // kv_group + 1, step // kv_group)
        at = stop


def _is_one_dimension(part: Part, query: Tensor, key: Tensor, value: Tensor) -> bool:
    seen = part.of_queries(query), part.of_keys(key), part.of_keys(value)
    return all(x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in seen)


@dataclass(frozen=True, slots=True)
class Launch:
    """What one call of a kernel sees: groups of queries and of keys. keys_overlap: groups share keys with the next one,
    as the tiles of a band do."""

    q_groups: tuple[Axis, ...]
    k_groups: tuple[Axis, ...]
    q: Side
    k: Side
    keys_overlap: bool = False

    @staticmethod
    def of(geometry: Geometry) -> Launch:
        return Launch(geometry.groups, geometry.groups, geometry.q, geometry.k)

    def key_gradients(self, grad: Tensor) -> Iterator[tuple[tuple[Axis, ...], Side, Tensor]]:
        """Gradients of the keys [B * H, groups, length, D] in parts that hold no key twice: groups, keys, gradients."""
        if self.k_groups and self.k_groups[0].stride == 0:  # all groups have the same keys
            yield (), self.k, grad.sum(1, keepdim=True)
            return
        if not self.keys_overlap:
            yield self.k_groups, self.k, grad
            return
        ((tiles,), (axis,)) = self.k_groups, self.k.axes
        width = tiles.stride // axis.stride
        for first in range(0, axis.size, width):
            size = min(width, axis.size - first)
            strip = Side(self.k.start + first * axis.stride, (Axis(size, axis.stride),))
            yield self.k_groups, strip, grad[:, :, first : first + size]


def is_everything(groups: Sequence[Axis], side: Side, length: int) -> bool:
    """Whether the positions are all there are, in their own order."""
    return not groups and side == Side(0, (Axis(length, 1),))


def places(x: Tensor, axes: Sequence[Axis], first: int) -> Tensor:
    """[B, H, *axes, ...] of [B, H, T, ...]: the positions first + steps of the axes; a view that may overlap itself."""
    row, head, step, *rest = x.stride()
    size = (*x.shape[:2], *(axis.size for axis in axes), *x.shape[3:])
    stride = (row, head, *(axis.stride * step for axis in axes), *rest)
    return x.as_strided(size, stride, x.storage_offset() + first * step)


def grouped(x: Tensor, groups: Sequence[Axis], side: Side) -> Tensor:
    """[B * H, groups, length, ...] of [B, H, T, ...]; a copy where no view has that form."""
    seen = places(x, (*groups, *side.axes), side.start)
    num_groups = prod(axis.size for axis in groups)
    return seen.reshape(x.shape[0] * x.shape[1], num_groups, side.length, *x.shape[3:])


def split(x: Tensor, like: Tensor, groups: Sequence[Axis], side: Side) -> Tensor:
    """[B, H, *groups, *axes, ...] of [B * H, groups, length, ...], the form of `places`. like: any [B, H, ...]."""
    sizes = [axis.size for axis in itertools.chain(groups, side.axes)]
    return x.reshape(*like.shape[:2], *sizes, *x.shape[3:])


def by_group(x: Tensor, groups: Sequence[Axis], side: Side) -> Tensor | None:
    """`grouped` where one axis of groups and one of steps hold all positions, by views that have derivatives; else
    None. x: [B, H, T, ...]."""
    if len(groups) != 1 or len(side.axes) != 1 or side.start or x.shape[0] * x.shape[1] == 0:
        return None
    (group,), (axis,) = groups, side.axes
    if group.size * axis.size != x.shape[2] or {group.stride, axis.stride} not in ({1, group.size}, {1, axis.size}):
        return None
    rows: Any = x.flatten(0, 1)
    seen: Tensor
    if group.stride == 1:
        seen = rows.unflatten(1, (axis.size, group.size)).transpose(1, 2)
    else:
        seen = rows.unflatten(1, (group.size, axis.size))
    return seen


def from_groups(x: Tensor, groups: Sequence[Axis], heads: Sequence[int]) -> Tensor:
    """The inverse: [B * H, groups, L, ...] to [B, H, T, ...]."""
    rows: Any = (x.transpose(1, 2) if groups[0].stride == 1 else x).flatten(1, 2)
    found: Tensor = rows.unflatten(0, tuple(heads))
    return found


def adopted(x: Tensor, like: Tensor, groups: Sequence[Axis], side: Side) -> Tensor | None:
    """A part of all positions, [B, H, *groups, *axes, ...], as [B, H, T, ...] without a copy, where it lies in memory
    as that would; else None. like: [B, H, T, ...] of the same sizes."""
    num_rows = side.length * prod(axis.size for axis in groups)
    if side.start or num_rows != like.shape[2] or x.shape[:2] != like.shape[:2] or x.numel() == 0:
        return None
    rest = x.shape[2 + len(groups) + len(side.axes) :]
    shape = (*like.shape[:3], *rest)
    plain = torch.empty(shape, device="meta")
    if places(plain, (*groups, *side.axes), 0).stride() != x.stride():
        return None
    return x.as_strided(shape, plain.stride())
