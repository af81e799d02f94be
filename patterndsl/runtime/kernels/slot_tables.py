"""Who stands in the slots of a call? Routes and lists turned round on the device, in tensors of sizes known before.

Routes are slots as they are; where a token stands is counted. Lists for each query are sorted by the blocks that they
list, so that tiles of queries meet a block of keys whole. Nothing waits for the device; for equal inputs slots are the
same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.device.graphs import remembered
from patterndsl.device.launcher import Launcher
from patterndsl.lower.hulls import Lists
from patterndsl.runtime.kernels import work
from patterndsl.runtime.kernels.slot_kernels import (
    begin_kernel,
    column_kernel,
    entry_kernel,
    fill_kernel,
    item_kernel,
    narrow_kernel,
    range_kernel,
    route_kernel,
    settle_kernel,
    sort_kernel,
    stand_kernel,
    tile_kernel,
)
from patterndsl.runtime.kernels.slots import Slots, Sure
from patterndsl.runtime.kernels.sorting import order_by_label
from patterndsl.runtime.kernels.work import Work
from patterndsl.sema.parameters import Sizes

LANES, CHUNK = 256, 512
"""Numbers that a program makes, and those that it reads at once."""
MOST_NARROW = 2**15 - 1
"""Of a 16-bit integer: sorting takes as long as its integers are wide."""
MOST_COUNTED = 2047
"""Blocks up to which lists are sorted by counting: a label more is what lists nothing."""
MOST_SORTED = 1024
"""Members of routes that a program sorts at once; those of wider ones are left to PyTorch."""

_narrow, _sort, _stand = Launcher(narrow_kernel), Launcher(sort_kernel), Launcher(stand_kernel)
_fill, _settle, _route = Launcher(fill_kernel), Launcher(settle_kernel), Launcher(route_kernel)
_begin, _item, _range, _tile = (Launcher(x) for x in (begin_kernel, item_kernel, range_kernel, tile_kernel))
_entry, _column = Launcher(entry_kernel), Launcher(column_kernel)


class Routed(NamedTuple):
    """Slots of routes, in which key: int32 [rows, heads, slots] stands as well."""

    slots: Slots
    key: Tensor


def routed(table: Tensor, width: int, sizes: Sizes) -> Routed:
    """The slots of routes of so many members, [rows, heads, routes * width] in any integers. Members of a route ascend;
    -1, what is no key, and a member that its route has already are nobody. Work: a sort of each route, and for each
    place what its key has."""
    (rows, heads, length), kv_len = table.shape, sizes.kv_len
    grid = (-(-length // LANES), rows * heads, 1)
    members = _ascending(table, width, kv_len)
    key = _integers(table, rows, heads, length)
    is_apart = sizes.q_start > 0 or sizes.q_len != sizes.kv_len
    query = _integers(table, rows, heads, length) if is_apart else key
    counts = torch.zeros(rows * heads * kv_len + 1, dtype=torch.int32, device=table.device)
    turns, loose, places = (_integers(table, rows * heads * length) for _ in range(3))
    _stand(
        grid,
        (members, key, query, counts, turns),
        (length, width, kv_len, sizes.q_start, sizes.q_len),
        {"apart": is_apart, "block": LANES},
    )
    begins = counts.cumsum(0, dtype=torch.int32)
    _fill(grid, (key, turns, begins, loose), (length, kv_len), {"block": LANES})
    _settle(grid, (key, begins, loose, places), (length, kv_len), {"block": LANES})
    return Routed(Slots(query, places.view(1, 1, -1), begins[:-1].view(rows, heads, kv_len)), key)


def _ascending(table: Tensor, width: int, kv_len: int) -> Tensor:
    """int32 [rows, heads, routes * width]: the members of each route, -1 first."""
    rows, heads, length = table.shape
    members, steps = _integers(table, rows, heads, length), table.stride()[:2]
    if width > MOST_SORTED:
        grid = (-(-length // LANES), rows * heads, 1)
        _narrow(grid, (table, members), (*steps, heads, length, kv_len), {"block": LANES})
        return members.view(rows, heads, -1, width).sort(-1).values.view(rows, heads, length)
    padded = max(16, 1 << (width - 1).bit_length())
    at_once, routes = MOST_SORTED // padded, length // width
    constants = {"at_once": at_once, "padded": padded}
    _sort((-(-routes // at_once), rows * heads, 1), (table, members), (*steps, heads, routes, width, kv_len), constants)
    return members


def _integers(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int32, device=like.device)


def routes_of(key: Tensor, width: int, kv_len: int) -> Tensor:
    """In which routes each key is, int32 [rows, heads, keys, words]: bits of words of 32. key: see `Routed`."""
    rows, heads, length = key.shape
    words = -(-(length // width) // 32)
    bits = torch.zeros((rows, heads, kv_len, words), dtype=torch.int32, device=key.device)
    grid = (-(-length // LANES), rows * heads, 1)
    _route(grid, (key, bits), (length, width, kv_len, words), {"block": LANES})
    return bits


# ---- lists for each query


class Keys(NamedTuple):
    """Keys by blocks that are listed. order: int32 [1, 1, places], which key stands where, so that no tile is of two of
    these blocks; None where keys lie so. per_block: tiles of one; number: of all."""

    order: Tensor | None
    per_block: int
    number: int


@remembered(64)
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


@remembered(64)
def _entries(number: int, device: torch.device) -> Tensor:
    """Each block of keys, and each of them again, masked."""
    blocks = 2 * torch.arange(number, dtype=torch.int32, device=device)
    return torch.cat([blocks, blocks + 1])


def _sorted(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Positions in the stable order by values [rows, heads, length] below a number, and how many of these are less than
    0, 1, ..., int32 [rows, heads, number]."""
    rows, heads, length = values.shape
    ascending, order = values.sort(dim=-1, stable=True)
    begins = _integers(values, rows, heads, number)
    grid, integers = (-(-number // LANES), rows * heads, 1), (length, number, length.bit_length())
    _begin(grid, (ascending, begins), integers, {"block": LANES})
    return order, begins


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

    def columns(self, kv_group: int, q_block: int, batch: int) -> Work:
        """The tiles of each block of keys, through the query heads that share it, in blocks of so many queries. A list
        that is longer than a large GPU's share of all is cut, see `work.PARTS`."""
        (lists, num_tiles), num_blocks, num_kv = self.states.shape, self.tiles.shape[1] - 1, self.keys.number
        rows, split = lists * self.some // self.heads, self.tile // q_block
        of_keys = rows * self.heads // kv_group
        owners, most = of_keys * num_kv, kv_group * num_tiles * split
        total = of_keys * most * self.keys.per_block
        longest = max(work.SHORTEST, total * (batch if rows == 1 else 1) // work.PARTS)
        is_cut = most > 2 * longest
        num_slots = total // longest * 3 // 2 + 2 if is_cut else 0
        num_joints = num_slots // 3 + 1 if is_cut else 0
        entries, pieces = _integers(self.states, of_keys * most), _integers(self.states, owners + num_slots, 6)
        joints, used = _integers(self.states, num_joints, 5), _integers(self.states, 2)
        constants = {"split": split, "some": self.some, "kv_group": kv_group}
        _entry(
            (-(-num_tiles // LANES), rows * self.heads, 1),
            (self.states, self.tiles, entries, pieces, joints, used),
            (num_tiles, num_blocks, self.heads, num_kv, owners, num_slots, num_joints),
            {**constants, "block": LANES},
        )
        _column(
            (-(-num_kv // LANES), of_keys, 1),
            (self.tiles, pieces, joints, used),
            (num_tiles, num_blocks, self.heads, self.keys.per_block, num_kv, owners, longest),
            {**constants, "is_cut": is_cut, "block": LANES},
        )
        return Work(pieces, entries, joints, num_slots, self.rows.is_shared)


def turned(table: Tensor, lists: Lists, sizes: Sizes, sure: Sure, heads: int, tile: int, kv_block: int) -> Turned:
    """Lists [rows, heads or 1, rows of the table * width] in any integers, by the blocks that they list. heads: query
    heads; tile: slots of a tile. -1, what is no block, and a block that its query has listed already are left out.
    Work: one sort of all that is listed; O(tiles x blocks) beside it."""
    rows, some_heads, _ = table.shape
    number = rows * some_heads
    items, num_blocks = sizes.q_len * lists.width, -(-sizes.kv_len // lists.of)
    kind = torch.int16 if num_blocks < MOST_NARROW else torch.int32
    blocks = torch.empty((rows, some_heads, items), dtype=kind, device=table.device)
    places = _integers(table, rows, some_heads, items)
    integers = (
        *table.stride()[:2],
        some_heads,
        items,
        lists.width,
        lists.per,
        sizes.q_start,
        lists.first_row,
        num_blocks,
    )
    _item((-(-items // LANES), number, 1), (table, blocks, places), integers, {"block": LANES})
    is_counted = num_blocks <= MOST_COUNTED
    order, begins = order_by_label(blocks, num_blocks + 1) if is_counted else _sorted(blocks, num_blocks + 1)
    steps, chunk = begins.stride()[1:], min(CHUNK, max(16, 1 << num_blocks.bit_length()))
    tiles = _integers(table, number, num_blocks + 1)
    _range((number, 1, 1), (begins, tiles), (*steps, num_blocks), {"tile": tile, "chunk": chunk})
    num_tiles, some = items // tile + min(num_blocks, items), heads // some_heads
    keys = keys_of(lists.of, sizes.kv_len, kv_block, table.device)
    query, states = _integers(table, rows, some_heads, num_tiles * tile), _integers(table, number, num_tiles)
    pieces = _integers(table, rows * heads * num_tiles, 6)
    _tile(
        (num_tiles, number, 1),
        (order, begins, tiles, query, places, states, pieces),
        (
            *steps, items, num_tiles, lists.width, sizes.q_start, num_blocks, lists.of, keys.per_block, keys.number,
            sizes.kv_len, heads,
        ),
        {"sure": "never" if keys.order is not None else sure, "tile": tile, "chunk": chunk, "some": some},
    )  # fmt: skip
    found = Work(pieces, _entries(keys.number, table.device), _integers(table, 0, 5), 0, rows == 1)
    return Turned(Slots(query, places, None, lists.width), keys, tiles, states, found, tile, some, heads)
