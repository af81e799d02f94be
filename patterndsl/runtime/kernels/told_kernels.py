"""How are tiles of a call told and listed on a GPU in a few launches? Bounds, lists, and their cuts, a kernel for each.

What `told` and `told_lists` say in plain PyTorch, in a tenth of the steps: a step is a wait for the host, and there are
no others in a call. The verdict over tiles is generated, see `verdicts`, and asked where it is listed: nothing is kept
of tiles that are not live.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.ir.index import Facet
from patterndsl.runtime.kernels.told_lists import Turned, room_of
from patterndsl.runtime.kernels.told_tables import ListJob, RangeJob, TileJob
from patterndsl.runtime.kernels.work import Work

TILES, LEAVES, BLOCKS = 16, 1024, 256
"""Of a program at once: tiles whose values are bounded, values of a tree, and blocks that a row may list."""
OWNERS, STEP, LANES = 4, 128, 256
"""Owners of a program and entries that it asks at once; owners of a program that cuts."""


# ---- what a verdict looks up


@triton.jit(do_not_specialize=["numbers", "half"])
def _bounds_kernel(
    tables, bounds, counters, numbers, half, num_jobs: tl.constexpr, size: tl.constexpr, tiles: tl.constexpr
):  # fmt: skip
    """Least and greatest values of tiles, for each job of `told_tables.TileJob`; and no entry is counted yet."""
    if tl.program_id(0) == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros([2], tl.int32))
    cell = tl.program_id(0) * tiles + tl.arange(0, tiles)
    for job in tl.static_range(num_jobs):
        there = cell < numbers[job * 7 + 1]
        begin = numbers[job * 7 + 4] + (cell % numbers[job * 7 + 2]) * numbers[job * 7 + 6]
        last = tl.minimum(begin + numbers[job * 7 + 6], numbers[job * 7 + 5]) - 1
        at = tl.minimum(begin[:, None] + tl.arange(0, size)[None, :], last[:, None])
        outer = (cell // numbers[job * 7 + 2]).to(tl.int64) * numbers[job * 7 + 3]
        values = tl.load(tables[job] + outer[:, None] + at, mask=there[:, None], other=0).to(tl.int64)
        place = bounds + numbers[job * 7] + cell
        tl.store(place, tl.min(values, 1), mask=there)
        tl.store(place + half, tl.max(values, 1), mask=there)


@triton.jit(do_not_specialize=["first", "half", "leaves", "nodes", "length"])
def _range_kernel(
    table, ranges, first, half, leaves, nodes, length, is_first: tl.constexpr, size: tl.constexpr, levels: tl.constexpr
):  # fmt: skip
    """Bounds of aligned blocks of 2, 4, ... of the nodes nodes..2 x nodes of a tree, which are the values themselves at
    first. Grid: (parts of them, tables)."""
    tree = ranges + first + tl.program_id(1).to(tl.int64) * 2 * leaves
    mine = tl.program_id(0) * size
    at = mine + tl.arange(0, size)
    if is_first:  # where there are fewer values than leaves the last one is there again
        place = tl.minimum(at, length - 1)
        mine_of = table + tl.program_id(1).to(tl.int64) * length
        least = tl.load(mine_of + place, mask=place >= 0, other=-1).to(tl.int64)
        most = least
        tl.store(tree + nodes + at, least)
        tl.store(tree + half + nodes + at, most)
    else:
        least, most = tl.load(tree + nodes + at), tl.load(tree + half + nodes + at)
    for level in tl.static_range(levels):
        least = tl.min(tl.reshape(least, [size >> (level + 1), 2]), 1)
        most = tl.max(tl.reshape(most, [size >> (level + 1), 2]), 1)
        above = tree + ((nodes + mine) >> (level + 1)) + tl.arange(0, size >> (level + 1))
        tl.store(above, least)
        tl.store(above + half, most)


@triton.jit(do_not_specialize=["first", "num_rows", "num_blocks", "width"])
def _lists_kernel(
    table, lists, first, num_rows, num_blocks, width, size: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    """Which blocks a row of a table lists, a byte each. Grid: (rows, tables)."""
    row = tl.program_id(1).to(tl.int64) * num_rows + tl.program_id(0)
    mine = lists + first + row * num_blocks
    for start in range(0, num_blocks, size):
        at = start + tl.arange(0, size)
        tl.store(mine + at, (at * 0).to(tl.int8), mask=at < num_blocks)
    tl.debug_barrier()  # another thread may write the same byte
    turn = tl.arange(0, padded)
    block = tl.load(table + row * width + turn, mask=turn < width, other=-1)
    tl.store(mine + block, (turn * 0 + 1).to(tl.int8), mask=(block >= 0) & (block < num_blocks))


def bounds_of(
    tables: Mapping[tuple[str, Facet], Tensor], jobs: tuple[TileJob, ...], size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bounds of tiles, int64 [2, size], and two counters int32 [2] that are 0."""
    bounds = torch.empty((2, size), dtype=torch.int64, device=device)
    counters = torch.empty(2, dtype=torch.int32, device=device)
    widest, most = max([1, *(job.size for job in jobs)]), max([1, *(job.cells for job in jobs)])
    given = tuple(tables[job.name, job.facet] for job in jobs), bounds, counters
    _bounds.of(
        (triton.cdiv(most, TILES), 1, 1),
        (*given, tuple(number for job in jobs for number in job[2:]), size),
        {"num_jobs": len(jobs), "size": triton.next_power_of_2(widest), "tiles": TILES},
    )
    return bounds, counters


def ranges_of(
    tables: Mapping[tuple[str, Facet], Tensor], jobs: tuple[RangeJob, ...], size: int, device: torch.device
) -> Tensor:
    """Trees of bounds, int64 [2, size]; see `told_functions.bounds_between`."""
    ranges = torch.empty((2, size), dtype=torch.int64, device=device)
    for job in jobs:
        nodes = job.leaves
        while nodes == job.leaves or nodes > 1:
            part = min(nodes, LEAVES)
            _range_kernel[(nodes // part, job.tables)](
                tables[job.name, job.facet], ranges, job.first, size, job.leaves, nodes, job.length,
                is_first=nodes == job.leaves, size=part, levels=part.bit_length() - 1,
            )  # fmt: skip
            if part == 1:
                break
            nodes //= part
    return ranges


def lists_of(tables: Mapping[str, Tensor], jobs: tuple[ListJob, ...], size: int, device: torch.device) -> Tensor:
    """Which blocks rows list, a byte each."""
    lists = torch.empty(size, dtype=torch.int8, device=device)
    for job in jobs:
        _lists.of(
            (job.num_rows, job.tables, 1),
            (tables[job.name], lists, job.first, job.num_rows, job.num_blocks, job.width),
            {"size": BLOCKS, "padded": triton.next_power_of_2(job.width)},
        )
    return lists


# ---- lists of tiles


@triton.jit
def _tiles(
    owner, entry, owners, inner, q_start, q_stop, kv_stop, head, row, numbers, places, bounds, ranges, lists,
    tell: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr, by_key: tl.constexpr,
):  # fmt: skip
    """Which tiles [owners, entries] may have a pair, and which have all of theirs and reach over no end."""
    there = (owner < owners)[:, None] & (entry < inner)[None, :]
    owner, entry = tl.minimum(owner, owners - 1)[:, None], tl.minimum(entry, inner - 1)[None, :]
    if by_key:
        q_tile, k_tile = entry, owner
    else:
        q_tile, k_tile = owner, entry
    q_low, k_low = q_start + q_tile * q_block, k_tile * kv_block
    q_high, k_high = tl.minimum(q_low + (q_block - 1), q_stop - 1), tl.minimum(k_low + (kv_block - 1), kv_stop - 1)
    certain, possible = tell(
        q_low, q_high, k_low, k_high, q_tile, k_tile, there, head, row, numbers, places, bounds, ranges, lists
    )  # fmt: skip
    return possible, certain & (q_high - q_low == q_block - 1) & (k_high - k_low == kv_block - 1)


@triton.jit(do_not_specialize=["owners", "inner", "q_start", "q_stop", "kv_stop", "numbers", "places"])
def _list_kernel(
    counts, entries_of, counters, owners, inner, turns, some, q_start, q_stop, kv_stop,
    numbers, places, bounds, ranges, lists,
    tell: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr, by_key: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """The live tiles of each owner, one after the other: counted first, so that each program takes the room it needs.

    Grid: (owners, lists). turns: heads of a list; some: lists of a batch row.
    """
    owner = tl.program_id(0) * block + tl.arange(0, block)
    row = (tl.program_id(1) // some).to(tl.int64)
    first = (tl.program_id(1) % some).to(tl.int64) * turns
    count = tl.zeros([block], tl.int32)
    for turn in range(turns):
        for start in range(0, inner, step):
            entry = start + tl.arange(0, step)
            live, _ = _tiles(
                owner, entry, owners, inner, q_start, q_stop, kv_stop, first + turn, row,
                numbers, places, bounds, ranges, lists, tell, q_block, kv_block, by_key,
            )  # fmt: skip
            count += tl.sum(live.to(tl.int32), 1)
    if by_key:
        counters += 1
    begin = tl.atomic_add(counters, tl.sum(count, 0)) + tl.cumsum(count, 0) - count
    mine = counts + tl.program_id(1) * owners + owner
    tl.store(mine, count, mask=owner < owners)
    tl.store(mine + tl.num_programs(1) * owners, begin, mask=owner < owners)
    for turn in range(turns):
        for start in range(0, inner, step):
            entry = start + tl.arange(0, step)
            live, full = _tiles(
                owner, entry, owners, inner, q_start, q_stop, kv_stop, first + turn, row,
                numbers, places, bounds, ranges, lists, tell, q_block, kv_block, by_key,
            )  # fmt: skip
            rank = tl.cumsum(live.to(tl.int32), 1)
            found = 2 * (turn * inner + entry)[None, :] + (full == 0).to(tl.int32)
            tl.store(entries_of + begin[:, None] + rank - 1, found, mask=live)
            begin += tl.sum(live.to(tl.int32), 1)


# ---- pieces of work


@triton.jit
def _parts_of(counts, counters, which, owner, owners, heads, some, total, copies, parts_of, shortest):
    """The place of each owner's list among all lists, how long it is, and in how many parts it is cut."""
    there = owner < total
    row, head = owner // (heads * owners), (owner // owners) % heads
    mine = (row * some + tl.minimum(head, some - 1)) * owners + owner % owners
    count = tl.load(counts + mine, mask=there, other=0)
    work = tl.load(counters + which).to(tl.int64) * (heads // some) * copies
    longest = tl.maximum((work + parts_of - 1) // parts_of, shortest).to(tl.int32)
    parts = tl.where(count > 2 * longest, (count + longest - 1) // longest, 1)
    return mine, count, tl.where(there, parts, 0)


@triton.jit(do_not_specialize=["which", "owners", "heads", "some", "total", "copies", "chunks"])
def _cut_kernel(
    counts, counters, sums, which, owners, heads, some, total, copies, chunks, parts_of, shortest,
    block: tl.constexpr,
):  # fmt: skip
    """Of the owners of each program, int32 [3, chunks]: parts of their lists, those of lists that are cut, and how many
    these are."""
    owner = tl.program_id(0) * block + tl.arange(0, block)
    _, _, parts = _parts_of(
        counts, counters, which, owner, owners, heads, some, total, copies, parts_of, shortest
    )  # fmt: skip
    at = sums + tl.program_id(0)
    tl.store(at, tl.sum(parts, 0))
    tl.store(at + chunks, tl.sum(tl.where(parts > 1, parts, 0), 0))
    tl.store(at + 2 * chunks, tl.sum((parts > 1).to(tl.int32), 0))


@triton.jit
def _sums_of(sums, chunks, step: tl.constexpr):
    """The sum of the programs before this one, and of all."""
    before, everything = tl.zeros([step], tl.int32), tl.zeros([step], tl.int32)
    for start in range(0, chunks, step):
        at = start + tl.arange(0, step)
        found = tl.load(sums + at, mask=at < chunks, other=0)
        before += tl.where(at < tl.program_id(0), found, 0)
        everything += found
    return tl.sum(before, 0), tl.sum(everything, 0)


@triton.jit
def _six(pieces, at, live, row, head, block, start, stop, slot):
    tl.store(pieces + at * 6, row, mask=live)
    tl.store(pieces + at * 6 + 1, head, mask=live)
    tl.store(pieces + at * 6 + 2, block, mask=live)
    tl.store(pieces + at * 6 + 3, start, mask=live)
    tl.store(pieces + at * 6 + 4, stop, mask=live)
    tl.store(pieces + at * 6 + 5, slot, mask=live)


@triton.jit(
    do_not_specialize=[
        "which", "owners", "heads", "some", "total", "copies", "chunks", "num_pieces", "num_joints", "num_slots",
    ]
)  # fmt: skip
def _piece_kernel(
    counts, counters, sums, pieces, joints, which, owners, heads, some, total, copies, chunks, parts_of, shortest,
    num_pieces, num_joints, num_slots, is_cut: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Pieces, the last owners' first, and joints; programs behind those of owners write what is left over."""
    owner = tl.program_id(0) * block + tl.arange(0, block)
    mine, count, parts = _parts_of(
        counts, counters, which, owner, owners, heads, some, total, copies, parts_of, shortest
    )  # fmt: skip
    there = owner < total
    begin = tl.load(counts + total // heads * some + mine, mask=there, other=0)
    row, head, place = owner // (heads * owners), (owner // owners) % heads, owner % owners
    if is_cut:
        before, used = _sums_of(sums, chunks, block)
        slots_before, _ = _sums_of(sums + chunks, chunks, block)
        joints_before, joined = _sums_of(sums + 2 * chunks, chunks, block)
        has = parts > 1
        slots = tl.where(has, parts, 0)
        first = before + tl.cumsum(parts, 0) - parts
        slot = slots_before + tl.cumsum(slots, 0) - slots
        joint = joints_before + tl.cumsum(has.to(tl.int32), 0) - 1
        of = tl.maximum(parts, 1)
        for turn in range(tl.max(parts, 0)):
            start, stop = begin + count * turn // of, begin + count * (turn + 1) // of
            at = used - 1 - (first + turn)
            _six(pieces, at, turn < parts, row, head, place, start, stop, tl.where(has, slot + turn, -1))
        tl.store(joints + joint * 5, row, mask=has)
        tl.store(joints + joint * 5 + 1, head, mask=has)
        tl.store(joints + joint * 5 + 2, place, mask=has)
        tl.store(joints + joint * 5 + 3, slot, mask=has)
        tl.store(joints + joint * 5 + 4, slots, mask=has)
        behind = tl.maximum(owner - chunks * block, -1)
        spare, none = used + behind, behind * 0
        _six(pieces, spare, (behind >= 0) & (spare < num_pieces), none, none, none, none, none, none + num_slots - 1)
        loose = joined + behind
        left = (behind >= 0) & (loose < num_joints)
        tl.store(joints + loose * 5, none, mask=left)
        tl.store(joints + loose * 5 + 1, none, mask=left)
        tl.store(joints + loose * 5 + 2, none + owners, mask=left)
        tl.store(joints + loose * 5 + 3, none, mask=left)
        tl.store(joints + loose * 5 + 4, none, mask=left)
    else:
        _six(pieces, total - 1 - owner, there, row, head, place, begin, begin + count, owner * 0 - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """What tells the tiles of a call. tell: the function of `verdicts`, with its numbers and places; tables: bounds,
    ranges and lists that it looks up. ends: the first query, and the ends of queries and of keys; blocks: of a tile.
    counters: int32 [2], 0 until entries of blocks of queries, and of those of keys, are counted."""

    tell: Any
    numbers: tuple[int, ...]
    places: tuple[int, ...]
    tables: tuple[Tensor, Tensor, Tensor]
    ends: tuple[int, int, int]
    blocks: tuple[int, int]
    counters: Tensor


def work_of(asking: Asking, turned: Turned, heads: int, batch: int) -> Work:
    """See `told_lists.work_of_states`, whose lists these are; they and their pieces lie in another order."""
    rows, some, owners, _, inner, by_key = turned[:6]
    device, lists = asking.counters.device, rows * some
    counts = torch.empty((2, lists * owners), dtype=torch.int32, device=device)  # and where they begin
    entries = torch.empty(turned.most, dtype=torch.int32, device=device)
    q_block, kv_block = asking.blocks
    _list.of(
        (triton.cdiv(owners, OWNERS), lists, 1),
        (
            counts, entries, asking.counters, owners, inner, turned.turns, some, *asking.ends,
            asking.numbers, asking.places, *asking.tables,
        ),
        {
            "tell": asking.tell, "q_block": q_block, "kv_block": kv_block, "by_key": by_key,
            "block": OWNERS, "step": STEP,
        },
    )  # fmt: skip
    copies, total = batch if rows == 1 else 1, rows * heads * owners
    room = room_of(turned, heads, copies)
    num_slots = room.slots + 1 if room.slots else 0  # one more, for what is left over
    pieces = torch.empty((total + room.slots, 6), dtype=torch.int32, device=device)
    joints = torch.empty((room.joints, 5), dtype=torch.int32, device=device)
    chunks, sums = triton.cdiv(total, LANES), counts
    of = int(by_key), owners, heads, some, total, copies, chunks, room.parts, room.shortest
    if room.slots:
        sums = torch.empty((3, chunks), dtype=torch.int32, device=device)
        _cut.of((chunks, 1, 1), (counts, asking.counters, sums, *of), {"block": LANES})
    _piece.of(
        (chunks + triton.cdiv(max(room.slots, room.joints), LANES), 1, 1),
        (counts, asking.counters, sums, pieces, joints, *of, len(pieces), len(joints), num_slots),
        {"is_cut": room.slots > 0, "block": LANES},
    )
    return Work(pieces, entries, joints, num_slots, rows == 1)


_bounds, _lists, _list, _cut, _piece = (
    Launcher(kernel) for kernel in (_bounds_kernel, _lists_kernel, _list_kernel, _cut_kernel, _piece_kernel)
)
