"""How are told tiles listed on a GPU in a few launches? Counted, put next to each other, and cut, a kernel for each.

What `told_lists` says in plain PyTorch, in a tenth of the steps: a step is a wait for the host, and there are no others
in a call. Tiles are read where they were told, through query heads that share a head of keys and the other way round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from patterndsl.runtime.kernels.told_lists import States, Turned, room_of
from patterndsl.runtime.kernels.work import Work

OWNERS, STEP, LANES = 32, 64, 256
"""Owners of a program and entries that it reads at once; owners of a program that cuts."""


@triton.jit
def _states(x, at, owner_stride, inner_stride, group_stride, owners, first, entries, width, inner, step: tl.constexpr):
    """[owners, step] of the tiles of some owners, from entry `entries` on; 0 behind the last of either."""
    entry = entries + tl.arange(0, step)
    place = (entry // inner) * group_stride + (entry % inner) * inner_stride
    live = (first[:, None] < owners) & (entry[None, :] < width)
    return tl.load(x + at + first[:, None] * owner_stride + place[None, :], mask=live, other=0)


@triton.jit(do_not_specialize=["owners", "width", "inner"])
def _count_kernel(
    live, counts, list_stride, owner_stride, inner_stride, group_stride, owners, width, inner,
    block: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """How many tiles each owner of a list has."""
    first = tl.program_id(0) * block + tl.arange(0, block)
    at = tl.program_id(1).to(tl.int64) * list_stride
    total = tl.zeros([block], tl.int32)
    for entries in range(0, width, step):
        tiles = _states(
            live, at, owner_stride, inner_stride, group_stride, owners, first, entries, width, inner, step
        )  # fmt: skip
        total += tl.sum((tiles != 0).to(tl.int32), 1)
    tl.store(counts + tl.program_id(1) * owners + first, total, mask=first < owners)


@triton.jit(do_not_specialize=["owners", "width", "inner"])
def _entry_kernel(
    live, full, counts, ends, entries_of, list_stride, owner_stride, inner_stride, group_stride, owners, width, inner,
    block: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """The tiles of each owner, one after the other."""
    first = tl.program_id(0) * block + tl.arange(0, block)
    at = tl.program_id(1).to(tl.int64) * list_stride
    mine = tl.program_id(1) * owners + first
    place = tl.load(ends + mine, mask=first < owners, other=0) - tl.load(counts + mine, mask=first < owners, other=0)
    for entries in range(0, width, step):
        tiles = _states(
            live, at, owner_stride, inner_stride, group_stride, owners, first, entries, width, inner, step
        )  # fmt: skip
        whole = _states(
            full, at, owner_stride, inner_stride, group_stride, owners, first, entries, width, inner, step
        )  # fmt: skip
        is_live = tiles != 0
        rank = tl.cumsum(is_live.to(tl.int32), 1)
        entry = 2 * (entries + tl.arange(0, step))[None, :] + (whole == 0).to(tl.int32)
        tl.store(entries_of + place[:, None] + rank - 1, entry, mask=is_live)
        place += tl.sum(is_live.to(tl.int32), 1)


@triton.jit
def _count_of(counts, owner, owners, heads, some, total):
    """The place of an owner's list among all lists, and how long it is."""
    row = owner // (heads * owners)
    head = (owner // owners) % heads
    mine = (row * some + tl.minimum(head, some - 1)) * owners + owner % owners
    return mine, tl.load(counts + mine, mask=owner < total, other=0)


@triton.jit(do_not_specialize=["owners", "heads", "some", "total", "lists", "copies"])
def _cut_kernel(counts, ends, cuts, owners, heads, some, total, lists, copies, parts_of, shortest, block: tl.constexpr):
    """Parts of each owner's list, int32 [3, total]: how many, how many slots they take, and whether there are any."""
    owner = tl.program_id(0) * block + tl.arange(0, block)
    _, count = _count_of(counts, owner, owners, heads, some, total)
    work = tl.load(ends + lists - 1).to(tl.int64) * (heads // some) * copies
    longest = tl.maximum((work + parts_of - 1) // parts_of, shortest).to(tl.int32)
    is_cut = count > 2 * longest
    parts = tl.where(is_cut, (count + longest - 1) // longest, 1)
    tl.store(cuts + owner, parts, mask=owner < total)
    tl.store(cuts + total + owner, tl.where(is_cut, parts, 0), mask=owner < total)
    tl.store(cuts + 2 * total + owner, is_cut.to(tl.int32), mask=owner < total)


@triton.jit
def _six(pieces, at, live, row, head, block, start, stop, slot):
    tl.store(pieces + at * 6, row, mask=live)
    tl.store(pieces + at * 6 + 1, head, mask=live)
    tl.store(pieces + at * 6 + 2, block, mask=live)
    tl.store(pieces + at * 6 + 3, start, mask=live)
    tl.store(pieces + at * 6 + 4, stop, mask=live)
    tl.store(pieces + at * 6 + 5, slot, mask=live)


@triton.jit(do_not_specialize=["owners", "heads", "some", "total", "num_pieces", "num_joints", "num_slots"])
def _piece_kernel(
    counts, ends, cuts, sums, pieces, joints, owners, heads, some, total, num_pieces, num_joints, num_slots,
    is_cut: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Pieces, the last owners' first, and joints; programs behind those of owners write what is left over."""
    owner = tl.program_id(0) * block + tl.arange(0, block)
    there = owner < total
    mine, count = _count_of(counts, owner, owners, heads, some, total)
    begin = tl.load(ends + mine, mask=there, other=0) - count
    row, head, place = owner // (heads * owners), (owner // owners) % heads, owner % owners
    if is_cut:
        used, joined = tl.load(sums + total - 1), tl.load(sums + 3 * total - 1)
        parts = tl.load(cuts + owner, mask=there, other=0)
        of = tl.maximum(parts, 1)
        slots = tl.load(cuts + total + owner, mask=there, other=0)
        first = tl.load(sums + owner, mask=there, other=0) - parts
        slot = tl.load(sums + total + owner, mask=there, other=0) - slots
        joint = tl.load(sums + 2 * total + owner, mask=there, other=0) - 1
        for turn in range(tl.max(parts, 0)):
            start, stop = begin + count * turn // of, begin + count * (turn + 1) // of
            at = used - 1 - (first + turn)
            _six(pieces, at, turn < parts, row, head, place, start, stop, tl.where(slots > 0, slot + turn, -1))
        has = slots > 0
        tl.store(joints + joint * 5, row, mask=has)
        tl.store(joints + joint * 5 + 1, head, mask=has)
        tl.store(joints + joint * 5 + 2, place, mask=has)
        tl.store(joints + joint * 5 + 3, slot, mask=has)
        tl.store(joints + joint * 5 + 4, slots, mask=has)
        behind = tl.maximum(owner - tl.cdiv(total, block) * block, -1)
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


def work_of(told: States, turned: Turned, heads: int, batch: int) -> Work:
    """See `told_lists.work_of_states`, of the states as they are turned; pieces are in another order."""
    rows, some, owners, width, inner = turned[:5]
    live, full = (x.contiguous().view(torch.int8) for x in (told.live, told.full))
    device, lists = live.device, rows * some
    grid, sizes = (triton.cdiv(owners, OWNERS), lists), (*turned.strides, owners, width, inner)
    counts = torch.empty(lists * owners, dtype=torch.int32, device=device)
    _count_kernel[grid](live, counts, *sizes, block=OWNERS, step=STEP)
    ends = counts.cumsum(0, dtype=torch.int32)
    entries = torch.empty(turned.most, dtype=torch.int32, device=device)
    _entry_kernel[grid](live, full, counts, ends, entries, *sizes, block=OWNERS, step=STEP)
    copies, total = batch if rows == 1 else 1, rows * heads * owners
    room = room_of(turned, heads, copies)
    num_slots = room.slots + 1 if room.slots else 0  # one more, for what is left over
    pieces = torch.empty((total + room.slots, 6), dtype=torch.int32, device=device)
    joints = torch.empty((room.joints, 5), dtype=torch.int32, device=device)
    cuts = sums = counts
    if room.slots:
        cuts = torch.empty((3, total), dtype=torch.int32, device=device)
        _cut_kernel[(triton.cdiv(total, LANES),)](
            counts, ends, cuts, owners, heads, some, total, lists * owners, copies,
            room.parts, room.shortest, block=LANES,
        )  # fmt: skip
        sums = cuts.cumsum(1, dtype=torch.int32)
    _piece_kernel[(triton.cdiv(total, LANES) + triton.cdiv(max(room.slots, room.joints), LANES),)](
        counts, ends, cuts, sums, pieces, joints, owners, heads, some, total, len(pieces), len(joints),
        num_slots, is_cut=room.slots > 0, block=LANES,
    )  # fmt: skip
    return Work(pieces, entries, joints, num_slots, rows == 1)
