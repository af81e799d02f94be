"""How do the positions of a pass become tensors that a kernel takes? As strided views, [B * H, groups, length, ...].

Kernels know two dimensions beside the sequence. Heads that share key heads, and batch rows that do not continue each
other in memory, are taken one after the other, so that nothing is copied but orders that have no single stride.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from patterndsl.lower.geometry import Axis, Geometry, Integers, Side

Form: TypeAlias = tuple[torch.Size, tuple[int, ...]]
"""Sizes and strides of a tensor: views of one form are found once."""

MAX_FORMS = 64
"""Forms that are remembered; with more, all are found anew."""


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor with its channels next to each other, as kernels take for granted; a copy where they are not."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True, slots=True)
class Part:
    """Batch rows, query heads and as many key heads that one launch takes; heads of None are all."""

    rows: slice
    q_heads: slice | None
    kv_heads: slice | None

    @property
    def is_whole(self) -> bool:
        """Whether it is all rows and query heads."""
        return self.q_heads is None and self.rows == _ALL

    def of_queries(self, x: Tensor) -> Tensor:
        """The part of [B, Hq, ...]."""
        return _part(x, self.rows, self.q_heads)

    def of_keys(self, x: Tensor) -> Tensor:
        """The part of [B, Hkv, ...]."""
        return _part(x, self.rows, self.kv_heads)


_ALL = slice(None)
EVERYTHING = Part(_ALL, None, None)


def _part(x: Tensor, rows: slice, heads: slice | None) -> Tensor:
    if heads is None:
        return x if rows == _ALL else x[rows]
    return x[rows, heads]


def parts(heads: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor) -> list[Part]:
    """The heads, over all batch rows, in parts whose rows and heads are one dimension in all three tensors.

    query: [B, Hq, Tq, D], key, value: [B, Hkv, Tk, D]; heads: some of the query heads, ascending.
    """
    batch, kv_group = query.shape[0], query.shape[1] // key.shape[1]
    # the query heads of one key head do not fit one stride of keys: first ones, second ones, ...
    turns = [tuple(head for head in heads if head % kv_group == turn) for turn in range(kv_group)]
    runs = [run for turn in turns if turn for run in _runs(turn, kv_group)]
    found = [Part(_ALL, _heads(q_heads, query), _heads(kv_heads, key)) for q_heads, kv_heads in runs]
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


def _heads(heads: slice, x: Tensor) -> slice | None:
    return None if heads.indices(x.shape[1]) == (0, x.shape[1], 1) else heads


def _is_one_dimension(part: Part, query: Tensor, key: Tensor, value: Tensor) -> bool:
    seen = part.of_queries(query), part.of_keys(key), part.of_keys(value)
    return all(x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in seen)


class _Seen(NamedTuple):
    """How a view is made: its size, stride and first element, and the shape that it then takes if it is a copy."""

    size: Sequence[int]
    stride: tuple[int, ...]
    first: int
    shape: tuple[int, ...] | None


class Places:
    """Groups of positions, and where they lie in tensors [B, H, T, ...]: found once for each form of these."""

    __slots__ = ("_adopted", "_forms", "axes", "groups", "num_groups", "num_rows", "side")

    def __init__(self, groups: Sequence[Axis], side: Side) -> None:
        self.groups, self.side = tuple(groups), side
        self.axes = (*groups, *side.axes)
        self.num_groups = prod(axis.size for axis in groups)
        self.num_rows = self.num_groups * side.length  # positions of all groups
        self._forms: dict[Form, _Seen] = {}
        self._adopted: dict[tuple[Form, torch.Size], tuple[Form | None]] = {}

    def rows(self) -> Integers:
        """int64 [num_rows]: the positions of all groups."""
        return Side(self.side.start, self.axes).places()

    def grouped(self, x: Tensor) -> Tensor:
        """[B * H, groups, length, ...] of [B, H, T, ...]; a copy where no view has that form."""
        size, stride, first, shape = self._form(x)
        seen = x.as_strided(size, stride, x.storage_offset() + first)
        return seen if shape is None else seen.reshape(shape)

    def into(self, x: Tensor) -> Tensor:
        """The positions as a view of [B, H, T, ...], to write into: [B * H, groups, length, ...] or
        [B, H, *groups, *axes, ...]."""
        size, stride, first, _ = self._form(x)
        return x.as_strided(size, stride, x.storage_offset() + first)

    def fit(self, part: Tensor, view: Tensor) -> Tensor:
        """[B * H, groups, length, ...] in the dimensions of such a view."""
        if part.dim() == view.dim() and part.shape[:3] == view.shape[:3]:
            return part
        rest = part.shape[3:]
        return part.reshape(*view.shape[: view.dim() - len(rest)], *rest)

    def adopted(self, part: Tensor, shape: torch.Size) -> Tensor | None:
        """All positions, [B * H, groups, length, D], as [B, H, T, D] without a copy, where they lie in memory as that
        would; else None. shape: B, H, T."""
        if self.side.start or self.num_rows != shape[2]:
            return None
        key = ((part.shape, part.stride()), shape)
        known = self._adopted.get(key)
        if known is None:
            make_room(self._adopted)
            known = self._adopted[key] = (self._whole(part, shape),)
        (form,) = known
        return None if form is None else part.as_strided(*form)

    def _whole(self, part: Tensor, shape: torch.Size) -> Form | None:
        if part.numel() == 0 or part.shape[0] != shape[0] * shape[1]:
            return None
        plain = torch.empty((*shape, *part.shape[3:]), device="meta")
        split = part.reshape(*shape[:2], *(axis.size for axis in self.axes), *part.shape[3:])
        lies = split.data_ptr() == part.data_ptr() and places(plain, self.axes, 0).stride() == split.stride()
        return (plain.shape, plain.stride()) if lies else None

    def _form(self, x: Tensor) -> _Seen:
        key = (x.shape, x.stride())
        found = self._forms.get(key)
        if found is None:
            make_room(self._forms)
            found = self._forms[key] = self._found(*key)
        return found

    def _found(self, shape: torch.Size, stride: tuple[int, ...]) -> _Seen:
        step, first = stride[2], self.side.start * stride[2]
        target = (shape[0] * shape[1], self.num_groups, self.side.length, *shape[3:])
        rows = _one_dimension(((shape[0], stride[0]), (shape[1], stride[1])), stride[1])
        length = _one_dimension([(axis.size, axis.stride * step) for axis in self.side.axes], step)
        whole = 1 if length is None else self.side.length * length
        groups = _one_dimension([(axis.size, axis.stride * step) for axis in self.groups], whole)
        if rows is not None and groups is not None and length is not None:
            return _Seen(target, (rows, groups, length, *stride[3:]), first, None)
        size = (*shape[:2], *(axis.size for axis in self.axes), *shape[3:])
        return _Seen(size, (*stride[:2], *(axis.stride * step for axis in self.axes), *stride[3:]), first, target)


def _one_dimension(dimensions: Sequence[tuple[int, int]], single: int) -> int | None:
    """The stride of some (size, stride) as one dimension; None where they do not continue each other.

    single: what it is where all sizes are 1.
    """
    kept = [(size, stride) for size, stride in dimensions if size != 1]
    for (_, outer), (size, inner) in pairwise(kept):
        if outer != size * inner:
            return None
    return kept[-1][1] if kept else single


def make_room(forms: dict[Any, Any]) -> None:
    """Keeps what is remembered by form bounded. What another thread asked for may be forgotten: it has that in hand."""
    if len(forms) >= MAX_FORMS:
        forms.clear()


class Launch:
    """What one call of a kernel sees: groups of queries and of keys. keys_overlap: groups share keys with the next one,
    as the tiles of a band do."""

    __slots__ = ("_strips", "keys", "keys_overlap", "queries")

    def __init__(
        self,
        q_groups: Sequence[Axis],
        k_groups: Sequence[Axis],
        q: Side,
        k: Side,
        keys_overlap: bool = False,
    ) -> None:
        self.queries, self.keys, self.keys_overlap = Places(q_groups, q), Places(k_groups, k), keys_overlap
        self._strips = tuple(self._found_strips()) if keys_overlap else ()

    @property
    def has_each_key_once(self) -> bool:
        """Whether no two groups share keys."""
        return not self.keys_overlap and all(axis.stride for axis in self.keys.groups)

    @staticmethod
    def of(geometry: Geometry) -> Launch:
        """All groups of a layout, in one launch."""
        return Launch(geometry.groups, geometry.groups, geometry.q, geometry.k)

    def split(self, most: int) -> Iterator[Launch]:
        """Launches of some steps of the first group axis each, together this one, that have gradients for about `most`
        positions, or for one step."""
        if not self.queries.groups:
            yield self
            return
        (q_axis, *q_more), (k_axis, *k_more) = self.queries.groups, self.keys.groups
        q, k = self.queries.side, self.keys.side
        of_step = (q.length + 2 * k.length) * self.queries.num_groups // q_axis.size
        number = min(q_axis.size, max(1, -(-of_step * q_axis.size // max(1, most))))
        for at in range(number):
            first, stop = at * q_axis.size // number, (at + 1) * q_axis.size // number
            yield Launch(
                (Axis(stop - first, q_axis.stride), *q_more),
                (Axis(stop - first, k_axis.stride), *k_more),
                Side(q.start + first * q_axis.stride, q.axes),
                Side(k.start + first * k_axis.stride, k.axes),
                self.keys_overlap,
            )

    def key_gradients(self, grad: Tensor) -> Iterator[tuple[Places, Tensor]]:
        """Gradients of the keys [B * H, groups, length, D] in parts that hold no key twice, and where these lie."""
        keys = self.keys
        if keys.groups and keys.groups[0].stride == 0:  # all groups have the same keys
            yield Places((), keys.side), grad.sum(1, keepdim=True)
            return
        if not self.keys_overlap:
            yield keys, grad
            return
        for part, strip in self._strips:
            yield strip, grad[:, :, part]

    def _found_strips(self) -> Iterator[tuple[slice, Places]]:
        """Parts of the keys of each group that are as wide as groups are apart."""
        ((tiles,), (axis,)) = self.keys.groups, self.keys.side.axes
        width = tiles.stride // axis.stride
        for first in range(0, axis.size, width):
            size = min(width, axis.size - first)
            strip = Side(self.keys.side.start + first * axis.stride, (Axis(size, axis.stride),))
            yield slice(first, first + size), Places(self.keys.groups, strip)


class OneLaunch:
    """A kernel that takes one call, forward and backward."""

    def __init__(self, geometry: Geometry) -> None:
        self.launches = (Launch.of(geometry),)

    def gradient_launches(self, row_bytes: int) -> tuple[Launch, ...]:
        """See `runtime.planned.Kernel`."""
        return self.launches


def is_everything(groups: Sequence[Axis], side: Side, length: int) -> bool:
    """Whether the positions are all there are, in their own order."""
    return not groups and side == Side(0, (Axis(length, 1),))


def places(x: Tensor, axes: Sequence[Axis], first: int) -> Tensor:
    """[B, H, *axes, ...] of [B, H, T, ...]: the positions first + steps of the axes; a view that may overlap itself."""
    row, head, step, *rest = x.stride()
    size = (*x.shape[:2], *(axis.size for axis in axes), *x.shape[3:])
    stride = (row, head, *(axis.stride * step for axis in axes), *rest)
    return x.as_strided(size, stride, x.storage_offset() + first * step)


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
