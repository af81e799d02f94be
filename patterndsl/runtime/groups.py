"""Which batch rows and heads share tiles? Groups as the gathered backend takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.gather import gather_tiles
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.data import DeviceData, Inputs, device_data
from patterndsl.runtime.gathered import Group, block_lists
from patterndsl.runtime.heads import folded, num_rows_of, rows_of
from patterndsl.sema.bind import Bound


def lookups_of_rows(given: Inputs) -> Sequence[Lookup]:
    """One lookup per batch row of the inputs, on their device."""
    num_rows = num_rows_of(given)

    def at(values: Tensor, row: int) -> Tensor:
        return values if values.dim() == 1 else values[0 if values.shape[0] == 1 else row]

    return [
        Lookup({name: at(values, row) for name, values in given.items()})
        for row in range(1 if num_rows is None else num_rows)
    ]


def lookups_of_heads(given: Inputs, num_heads: int) -> Sequence[Sequence[Lookup]]:
    """One lookup per batch row and head, where inputs differ from head to head."""
    num_rows = rows_of(given)
    flat = lookups_of_rows(folded(given, range(num_heads), num_rows))
    return [flat[row * num_heads : (row + 1) * num_heads] for row in range(num_rows)]


def groups_of_row(
    bound: Bound, tiles: Sequence[Tiles], given: Inputs, row: int | None, device: torch.device
) -> Iterator[Group]:
    """The head groups of one batch row (None: of all), from the tiles of each."""
    for group, found in zip(bound.groups, tiles, strict=True):
        data = device_data(group.relation, 1, given, device).at_row(row or 0)
        heads = group.heads if len(bound.groups) > 1 else None
        keep = _Keep(group.relation, bound.sizes.q_start, data)
        yield Group(None if row is None else (row,), heads, block_lists(found, device), keep)


def groups_of_heads(bound: Bound, given: Inputs, device: torch.device) -> Iterator[Group]:
    """A group for each head and batch row, where inputs differ from head to head."""
    num_heads, num_rows = bound.num_heads, rows_of(given)
    flat = folded(given, range(num_heads), num_rows)
    for row, lookups in enumerate(lookups_of_heads(given, num_heads)):
        for group in bound.groups:
            data = device_data(group.relation, 1, flat, device)
            for head in group.heads:
                tiles = gather_tiles(group.relation, bound.sizes, lookups[head])
                keep = _Keep(group.relation, bound.sizes.q_start, data.at_row(row * num_heads + head))
                rows = (row,) if num_rows > 1 else None
                yield Group(rows, (head,), block_lists(tiles, device), keep)


@dataclass(frozen=True, slots=True)
class _Keep:
    """Membership of one head group and batch row, with queries counted from the program's first."""

    relation: Relation
    q_start: int
    data: DeviceData

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        holds = member(self.relation, Point(q + self.q_start, k, 0, self.data))
        return torch.as_tensor(holds, device=q.device)
