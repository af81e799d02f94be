"""What do Hopper's kernels have in common? A warp that copies tiles for groups of warps that multiply, and their rings.

A program stays on its processor and takes piece after piece. Its producer, one warp, has what the consumers own of a
piece, and tiles of the other side that they share, copied into rings in shared memory. Beside the first it leaves notes
of what piece it is, which consumers else would have to look up in turn. It may begin again, see `agreed`.

Barriers. A tile that came is `full`; it is `empty` when each consumer has arrived, whether it needed it or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from patterndsl.runtime.kernels import work

# the first names are those of later versions
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FEW = gl.constexpr(24)
"""Registers of a thread that only copies: the fewest there are."""
STATE_BITS, BLOCK_BITS, FULL = (gl.constexpr(number) for number in (work.STATE_BITS, work.BLOCK_BITS, work.FULL))
FIELDS = gl.constexpr(8)
"""Numbers of a piece: see `Work`."""


def descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """Of blocks that are copied into shared memory as matrix units read them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, shape, strides, block, layout)


@gluon.jit
def pieces_of_program(borders):
    """How many pieces a program takes. borders: see `Work.dealt`."""
    own = borders + gl.program_id(0)
    return gl.load(own + 1) - gl.load(own)


@gluon.jit
def ring_slot(count, size: gl.constexpr):
    """The slot of a ring for what is counted, and the phase of its barriers."""
    return count % size, (count // size) & 1


@gluon.jit
def made_rings(ahead: gl.constexpr, ring: gl.constexpr, consumers: gl.constexpr):
    """Barriers of tiles that are owned, full and empty, and of those that are shared; notes of pieces."""
    rings = (
        gl.allocate_shared_memory(gl.int64, [ahead, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ahead, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ring, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ring, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int32, [ahead * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    for slot in gl.static_range(ahead):
        mbarrier.init(rings[0].index(slot), count=1)
        mbarrier.init(rings[1].index(slot), count=consumers)
    for slot in gl.static_range(ring):
        mbarrier.init(rings[2].index(slot), count=1)
        mbarrier.init(rings[3].index(slot), count=consumers)
    fence_async_shared()
    return rings


@gluon.jit
def note(notes, at, number):
    """Left by the producer, before the tile that it stands for is `full`."""
    notes.index(at).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def noted(notes, at):
    """What a consumer finds there."""
    return gl.max(notes.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def piece_at(notes, slot, which: gl.constexpr):
    """Of what a consumer does: the batch row, the head, the first row of its block, where its entries begin and stop,
    and the slot that its part is left in, below 0 where it does all of its block."""
    at = slot * FIELDS
    first = (noted(notes, at + 2) + noted(notes, at + 6) * which) * 64
    part = noted(notes, at + 5) + noted(notes, at + 7) * which
    return noted(notes, at), noted(notes, at + 1), first, noted(notes, at + 3), noted(notes, at + 4), part


@gluon.jit
def made_agreement(consumers: gl.constexpr):
    """Where consumers tell how many of their pieces stand, and a barrier for when all of them have."""
    barrier = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier.index(0), count=consumers)
    return barrier, gl.allocate_shared_memory(gl.int32, [consumers, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def agree(agreement, which: gl.constexpr, standing):
    """Tells it, once."""
    barrier, told = agreement
    told.index(which).store(gl.full([1], standing, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    mbarrier.arrive(barrier.index(0), count=1)


@gluon.jit
def agreed(agreement, warps: gl.constexpr):
    """The first piece that one of the consumers does again, from which on the program does; the number of pieces where
    all stand. Asked by so many warps."""
    barrier, told = agreement
    mbarrier.wait(barrier.index(0), 0)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    consumers: gl.constexpr = told.shape[0]
    first = gl.max(told.index(0).load(layout), 0)
    for which in gl.static_range(1, consumers):
        first = gl.minimum(first, gl.max(told.index(which).load(layout), 0))
    return first


@gluon.jit
def produce(seen, agreement):
    """Copies all pieces for the consumers, and those that they do again. agreement: none if they never do."""
    turns, count = produced(seen, 0, gl.to_tensor(0), gl.to_tensor(0))
    if len(agreement) > 0:
        produced(seen, agreed(agreement, 1), turns, count)


@gluon.jit
def produced(seen, first_turn, turns, count):
    """From some piece on copies what the consumers own of each, as room for it comes, and the tiles of its entries,
    which they share.

    counts: of heads that own for each that is shared, or (known when compiled) the other way round, the one being 1;
    and of blocks of a head, behind which entries count on through the next one. Where each tile is for one consumer
    alone they wait for this warp, so that it looks up an entry before it needs it. Returns what rings have seen.
    """
    owned, shared, own_tiles, shared_tiles, rings, lists, counts = seen
    own_full, own_empty, full, empty, notes = rings
    pieces, entries, borders = lists
    sharing, shared_by, num_blocks = counts
    ahead: gl.constexpr = own_full.shape[0]
    ring: gl.constexpr = full.shape[0]
    consumers: gl.constexpr = own_tiles[0].shape[0] // ahead
    block: gl.constexpr = shared_tiles[0].shape[3]
    own_bytes: gl.constexpr = consumers * len(owned) * owned[0].block_type.nbytes
    tile_bytes: gl.constexpr = len(shared) * shared[0].block_type.nbytes
    piece = pieces + (gl.load(borders + gl.program_id(0)) + first_turn) * FIELDS
    for _ in range(first_turn, pieces_of_program(borders)):
        row = gl.load(piece)
        head = gl.load(piece + 1)
        first = gl.load(piece + 2)
        begin = gl.load(piece + 3)
        stop = gl.load(piece + 4)
        part = gl.load(piece + 5)
        step = gl.load(piece + 6)
        part_step = gl.load(piece + 7)
        slot, phase = ring_slot(turns, ahead)
        turns += 1
        mbarrier.wait(own_empty.index(slot), phase ^ 1)
        note(notes, slot * FIELDS, row)
        note(notes, slot * FIELDS + 1, head)
        note(notes, slot * FIELDS + 2, first)
        note(notes, slot * FIELDS + 3, begin)
        note(notes, slot * FIELDS + 4, stop)
        note(notes, slot * FIELDS + 5, part)
        note(notes, slot * FIELDS + 6, step)
        note(notes, slot * FIELDS + 7, part_step)
        mbarrier.expect(own_full.index(slot), own_bytes)
        for which in gl.static_range(consumers):
            for one in gl.static_range(len(owned)):
                tile = own_tiles[one].index(slot * consumers + which)
                copy_in(owned[one], [row, head, (first + step * which) * 64, 0], own_full.index(slot), tile)
        other_head = head // sharing * shared_by
        number = gl.load(entries + begin, mask=begin < stop, other=0) >> BLOCK_BITS
        for entry_at in range(begin, stop):
            following = gl.load(entries + entry_at + 1, mask=entry_at + 1 < stop, other=0)
            block_head, block_at = other_head, number
            if shared_by > 1:
                block_head, block_at = other_head + number // num_blocks, number % num_blocks
            slot, phase = ring_slot(count, ring)
            mbarrier.wait(empty.index(slot), phase ^ 1)
            mbarrier.expect(full.index(slot), tile_bytes)
            for one in gl.static_range(len(shared)):
                copy_in(
                    shared[one],
                    [row, block_head, block_at * block, 0],
                    full.index(slot),
                    shared_tiles[one].index(slot),
                )
            number = following >> BLOCK_BITS
            count += 1
        piece += FIELDS
    return turns, count


@gluon.jit
def state_of(entry, which: gl.constexpr):
    """Of a consumer's tile: 0 where it needs none, FULL where all pairs are kept, or what `hide` takes."""
    return (entry >> (STATE_BITS * which)) & ((1 << STATE_BITS) - 1)
