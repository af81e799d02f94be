"""Who stands in the slots of a call? Routes and lists turned round on the device, in tensors of sizes known before.

Routes are slots as they are; where a token stands, a sort says. Lists for each query are sorted by the blocks that they
list, so that tiles of queries meet a block of keys whole. Nothing waits for the device; for equal inputs slots are the
same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.lower.hulls import Lists
from patterndsl.runtime.kernels.slot_kernels import (
    begin_kernel,
    column_kernel,
    entry_kernel,
    item_kernel,
    narrow_kernel,
    range_kernel,
    route_kernel,
    stand_kernel,
    tile_kernel,
)
from patterndsl.runtime.kernels.slots import Slots, Sure
from patterndsl.runtime.kernels.work import Work
from patterndsl.sema.parameters import Sizes

LANES, CHUNK = 256, 512
"""Numbers that a program makes, and those that it reads at once."""
MOST_NARROW = 2**15 - 1
"""Of a 16-bit integer: sorting takes as long as its integers are wide."""


class Routed(NamedTuple):
    """Slots of routes, in which key: int32 [rows, heads, slots] stands as well."""

    slots: Slots
    key: Tensor


def routed(table: Tensor, width: int, sizes: Sizes) -> Routed:
    """The slots of routes of so many members, [rows, heads, routes * width] in any integers. -1, what is no key, and a
    member that its route has already are nobody. Work: two sorts of the members."""
    rows, heads, length = table.shape
    lists, device = rows * heads, table.device
    members = torch.empty((rows, heads, length), dtype=torch.int32, device=device)
    grid = (-(-length // LANES), lists)
    narrow_kernel[grid](table, members, *table.stride()[:2], heads, length, sizes.kv_len, block=LANES)
    members = members.view(rows, heads, -1, width).sort(-1).values
    key = torch.empty((rows, heads, length), dtype=torch.int32, device=device)
    is_apart = sizes.q_start > 0 or sizes.q_len != sizes.kv_len
    query = torch.empty_like(key) if is_apart else key
    stand_kernel[grid](
        members, key, query, length, width, sizes.q_start, sizes.q_len, apart=is_apart, block=LANES
    )  # fmt: skip
    ascending, places = key.sort(dim=-1, stable=True)
    number = sizes.kv_len + 1
    begins = torch.empty((rows, heads, number), dtype=torch.int32, device=device)
    begin_kernel[-(-number // LANES), lists](ascending, begins, length, number, length.bit_length(), block=LANES)
    return Routed(Slots(query, places, begins), key)


def routes_of(key: Tensor, width: int, kv_len: int) -> Tensor:
    """In which routes each key is, int32 [rows, heads, keys, words]: bits of words of 32. key: see `Routed`."""
    rows, heads, length = key.shape
    words = -(-(length // width) // 32)
    bits = torch.zeros((rows, heads, kv_len, words), dtype=torch.int32, device=key.device)
    route_kernel[-(-length // LANES), rows * heads](key, bits, length, width, kv_len, words, block=LANES)
    return bits


# ---- lists for each query


class Keys(NamedTuple):
    """Keys by blocks that are listed. order: int32 [1, 1, places], which key stands where, so that no tile is of two of
    these blocks; None where keys lie so. per_block: tiles of one; number: of all."""

    order: Tensor | None
    per_block: int
    number: int


@lru_cache(maxsize=64)
def keys_of(of: int, kv_len: int, kv_block: int, device: torch.device) -> Keys:
    """The keys of blocks of so many."""
    per_block, num_blocks = -(-of // kv_block), -(-kv_len // of)
    if of % kv_block == 0:
        return Keys(None, per_block, -(-kv_len // kv_block))
    place = torch.arange(num_blocks * per_block * kv_block, device=device)
    block, inside = place // (per_block * kv_block), place % (per_block * kv_block)
    key = block * of + inside
    order = key.where((inside < of) & (key < kv_len), -1).int()
    return Keys(order.view(1, 1, -1), per_block, num_blocks * per_block)


@lru_cache(maxsize=64)
def _entries(number: int, device: torch.device) -> Tensor:
    """Each block of keys, and each of them again, masked."""
    blocks = 2 * torch.arange(number, dtype=torch.int32, device=device)
    return torch.cat([blocks, blocks + 1])


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """Lists turned round. slots: tiles of so many slots have queries of one listed block; tiles: int32 [lists,
    num_blocks + 1], how many of them blocks before have; states: see `slot_kernels.tile_kernel`; rows: the work of each
    tile. some: query heads that have their list in common."""

    slots: Slots
    keys: Keys
    tiles: Tensor
    states: Tensor
    rows: Work
    tile: int
    some: int
    heads: int

    def columns(self, kv_group: int, q_block: int) -> Work:
        """The tiles of each block of keys, through the query heads that share it, in blocks of so many queries."""
        (lists, num_tiles), num_blocks, device = self.states.shape, self.tiles.shape[1] - 1, self.states.device
        rows, split = lists * self.some // self.heads, self.tile // q_block
        of_keys = rows * self.heads // kv_group
        size = of_keys * kv_group * num_tiles * split
        entries = torch.empty(size, dtype=torch.int32, device=device)
        entry_kernel[-(-num_tiles // LANES), rows * self.heads](
            self.states, self.tiles, entries, num_tiles, num_blocks, self.heads,
            split=split, some=self.some, kv_group=kv_group, block=LANES,
        )  # fmt: skip
        pieces = torch.empty((of_keys * self.keys.number, 6), dtype=torch.int32, device=device)
        column_kernel[-(-self.keys.number // LANES), of_keys](
            self.tiles, pieces, num_tiles, num_blocks, self.heads, self.keys.per_block, self.keys.number,
            split=split, some=self.some, kv_group=kv_group, block=LANES,
        )  # fmt: skip
        return Work(pieces, entries, self.rows.joints, 0, self.rows.is_shared)


def turned(table: Tensor, lists: Lists, sizes: Sizes, sure: Sure, heads: int, tile: int, kv_block: int) -> Turned:
    """Lists [rows, heads or 1, rows of the table * width] in any integers, by the blocks that they list. heads: query
    heads; tile: slots of a tile. -1, what is no block, and a block that its query has listed already are left out.
    Work: one sort of all that is listed; O(tiles x blocks) beside it."""
    rows, some_heads, _ = table.shape
    number, device = rows * some_heads, table.device
    items, num_blocks = sizes.q_len * lists.width, -(-sizes.kv_len // lists.of)
    kind = torch.int16 if num_blocks < MOST_NARROW else torch.int32
    blocks = torch.empty((number, items), dtype=kind, device=device)
    places = torch.empty((rows, some_heads, items), dtype=torch.int32, device=device)
    item_kernel[-(-items // LANES), number](
        table, blocks, places, *table.stride()[:2], some_heads, items, lists.width, lists.per, sizes.q_start,
        lists.first_row, num_blocks, block=LANES,
    )  # fmt: skip
    ascending, order = blocks.sort(dim=-1, stable=True)
    begins, tiles = (torch.empty((number, num_blocks + 1), dtype=torch.int32, device=device) for _ in range(2))
    chunk = min(CHUNK, max(16, 1 << num_blocks.bit_length()))
    range_kernel[number,](
        ascending, begins, tiles, items, num_blocks, items.bit_length(), tile=tile, chunk=chunk
    )  # fmt: skip
    num_tiles = items // tile + min(num_blocks, items)
    keys = keys_of(lists.of, sizes.kv_len, kv_block, device)
    query = torch.empty((rows, some_heads, num_tiles * tile), dtype=torch.int32, device=device)
    states = torch.empty((number, num_tiles), dtype=torch.int32, device=device)
    pieces = torch.empty((rows * heads * num_tiles, 6), dtype=torch.int32, device=device)
    some = heads // some_heads
    tile_kernel[num_tiles, number](
        order, begins, tiles, query, places, states, pieces, items, num_tiles, lists.width, sizes.q_start, num_blocks,
        lists.of, keys.per_block, keys.number, sizes.kv_len, heads,
        sure="never" if keys.order is not None else sure, tile=tile, chunk=chunk, some=some,
    )  # fmt: skip
    work = Work(pieces, _entries(keys.number, device), pieces.new_empty(0, 5), 0, rows == 1)
    return Turned(Slots(query, places, None, lists.width), keys, tiles, states, work, tile, some, heads)
