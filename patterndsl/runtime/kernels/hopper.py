"""The forward kernel of Hopper, in Gluon: warps that copy and warps that multiply, each doing one thing at a time.

A program stays on its processor and takes piece after piece. Its producer, one warp, has tiles of keys and values
copied into a ring in shared memory; its consumers, groups of four warps with 64 queries each, multiply what is there.

A piece is as in `forward`, its block that of the first consumer's queries. It says behind how many blocks, and slots,
it is from one consumer to the next. An entry says who needs its keys, see `work.shared_lists_of`. Predicates are those
of Triton's kernels: as functions of vectors they are Gluon, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from patterndsl.device.launcher import Launcher

# the first names are those of later versions
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
FEW = gl.constexpr(24)
"""Registers of a thread that only copies: the fewest there are."""


def descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """Of blocks that are copied into shared memory as matrix units read them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, shape, strides, block, layout)


@gluon.jit
def pieces_of_program(deals):
    """How many pieces a program takes. deals: see `dealing.deal`."""
    own = deals + gl.program_id(0)
    return gl.load(own + 1) - gl.load(own)


@gluon.jit
def place_in(deals, turn):
    """The place of the piece that a program takes in a turn."""
    return gl.load(deals + gl.load(deals + gl.program_id(0)) + turn)


@gluon.jit
def ring_slot(count, size: gl.constexpr):
    """The slot of a ring for what is counted, and the phase of its barriers."""
    return count % size, (count // size) & 1


@gluon.jit
def made_barriers(ahead: gl.constexpr, ring: gl.constexpr, consumers: gl.constexpr):
    """Of tiles that are owned, full and empty, and of those that are shared."""
    barriers = (
        gl.allocate_shared_memory(gl.int64, [ahead, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ahead, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ring, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [ring, 1], mbarrier.MBarrierLayout()),
    )
    for slot in gl.static_range(ahead):
        mbarrier.init(barriers[0].index(slot), count=1)
        mbarrier.init(barriers[1].index(slot), count=consumers)
    for slot in gl.static_range(ring):
        mbarrier.init(barriers[2].index(slot), count=1)
        mbarrier.init(barriers[3].index(slot), count=consumers)
    fence_async_shared()
    return barriers


@gluon.jit
def produce(tensors, shared, barriers, lists, lengths):
    """Copies the queries of a piece, as room for them comes, and the keys and values of its entries."""
    query, key, value, _, _, _, _ = tensors
    queries, keys, values, _ = shared
    q_full, q_empty, kv_full, kv_empty = barriers
    pieces, entries, deals = lists
    rows, _, _, _, _, kv_group = lengths
    ahead: gl.constexpr = q_full.shape[0]
    ring: gl.constexpr = kv_full.shape[0]
    consumers: gl.constexpr = queries.shape[0] // ahead
    kv_block: gl.constexpr = keys.shape[3]
    q_bytes: gl.constexpr = consumers * query.block_type.nbytes
    kv_bytes: gl.constexpr = key.block_type.nbytes + value.block_type.nbytes
    count = 0
    for turn in range(pieces_of_program(deals)):
        at = place_in(deals, turn)
        piece = pieces + (at // rows) * 8
        row = gl.load(piece) + at % rows
        head = gl.load(piece + 1)
        first = gl.load(piece + 2) * 64
        step = gl.load(piece + 6) * 64
        slot, phase = ring_slot(turn, ahead)
        mbarrier.wait(q_empty.index(slot), phase ^ 1)
        mbarrier.expect(q_full.index(slot), q_bytes)
        for which in gl.static_range(consumers):
            copy_in(
                query, [row, head, first + step * which, 0], q_full.index(slot), queries.index(slot * consumers + which)
            )
        kv_head = head // kv_group
        for entry_at in range(gl.load(piece + 3), gl.load(piece + 4)):
            k_first = (gl.load(entries + entry_at) >> 8) * kv_block
            slot, phase = ring_slot(count, ring)
            mbarrier.wait(kv_empty.index(slot), phase ^ 1)
            mbarrier.expect(kv_full.index(slot), kv_bytes)
            copy_in(key, [row, kv_head, k_first, 0], kv_full.index(slot), keys.index(slot))
            copy_in(value, [row, kv_head, k_first, 0], kv_full.index(slot), values.index(slot))
            count += 1


@gluon.jit
def consume(seen, keep: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr, which: gl.constexpr):
    """Output and lse of 64 queries of each piece."""
    tensors, shared, barriers, known, lists, lengths, numbers, tables, strides, scale = seen
    _, _, _, out, lse, part_out, part_lse = tensors
    queries, keys, values, outs = shared
    q_full, q_empty, kv_full, kv_empty = barriers
    pieces, entries, deals = lists
    rows, q_len, kv_len, q_start, num_slots, _ = lengths
    ahead: gl.constexpr = q_full.shape[0]
    ring: gl.constexpr = kv_full.shape[0]
    consumers: gl.constexpr = queries.shape[0] // ahead
    kv_block: gl.constexpr = keys.shape[3]
    dim: gl.constexpr = keys.shape[4]
    dtype: gl.constexpr = queries.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kv_block, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    of_out_rows: gl.constexpr = gl.SliceLayout(1, of_out)
    lines = gl.arange(0, 64, layout=of_rows)
    out_lines = gl.expand_dims(gl.arange(0, 64, layout=of_out_rows), 1)
    channels = gl.expand_dims(gl.arange(0, dim, layout=gl.SliceLayout(0, of_out)), 0)
    columns = gl.expand_dims(gl.arange(0, kv_block, layout=gl.SliceLayout(0, of_scores)), 0)
    no_scores = gl.zeros([64, kv_block], gl.float32, of_scores)
    result = outs.index(which)
    steps = scale * LOG2E
    count = 0
    times_known = 0
    for turn in range(pieces_of_program(deals)):
        at = place_in(deals, turn)
        shared_row = at % rows
        piece = pieces + (at // rows) * 8
        row = gl.load(piece) + shared_row
        head = gl.load(piece + 1)
        first = (gl.load(piece + 2) + gl.load(piece + 6) * which) * 64
        part = gl.load(piece + 5)
        at_lse = lse + row.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + first.to(gl.int64) * strides[2]
        at_lse = at_lse + lines * strides[2]
        top = gl.full([64], -float("inf"), gl.float32, of_rows)
        total = gl.full([64], 0.0, gl.float32, of_rows)
        acc = gl.zeros([64, dim], gl.float32, of_out)
        known_top = top
        if goes_on:  # noqa: SIM102 - known when compiled, unlike the slot
            if part < 0:  # what is there comes while its successor is made
                tma.store_wait(0)
                mbarrier.expect(known.index(which), out.block_type.nbytes)
                copy_in(out, [row, head, first, 0], known.index(which), result)
                known_top = gl.load(at_lse, mask=lines < q_len - first, other=-float("inf")) * LOG2E
        slot, phase = ring_slot(turn, ahead)
        mbarrier.wait(q_full.index(slot), phase)
        q = queries.index(slot * consumers + which).reshape([64, dim])
        for entry_at in range(gl.load(piece + 3), gl.load(piece + 4)):
            entry = gl.load(entries + entry_at)
            kv_slot, kv_phase = ring_slot(count, ring)
            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            if ((entry >> (4 + which)) & 1) != 0:
                k = keys.index(kv_slot).reshape([kv_block, dim])
                scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                if ((entry >> which) & 1) != 0:
                    k_places = (entry >> 8) * kv_block + columns
                    q_places = gl.expand_dims(first + lines, 1)
                    kept = keep(q_places + q_start, k_places, q_places, k_places, head, row, numbers, tables)
                    if not even:
                        kept = kept & (k_places < kv_len)
                    scores = gl.where(kept, scores, -float("inf"))
                higher = gl.maximum(top, gl.max(scores, 1) * steps)
                shift = gl.where(higher == -float("inf"), 0.0, higher)
                weights = gl.exp2(scores * steps - gl.expand_dims(shift, 1))
                shrink = gl.exp2(top - shift)
                total = total * shrink + gl.sum(weights, 1)
                top = higher
                acc = acc * gl.expand_dims(gl.convert_layout(shrink, of_out_rows), 1)
                weights = gl.convert_layout(weights.to(dtype), of_weights)
                v = values.index(kv_slot).reshape([kv_block, dim])
                acc = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(kv_empty.index(kv_slot), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        if goes_on:  # noqa: SIM102 - known when compiled, unlike the slot
            if part < 0:
                mbarrier.wait(known.index(which), times_known & 1)
                times_known += 1
                higher = gl.maximum(top, known_top)
                shift = gl.where(higher == -float("inf"), 0.0, higher)
                shrink, known_weight = gl.exp2(top - shift), gl.exp2(known_top - shift)
                total = total * shrink + known_weight
                top = higher
                before = result.reshape([64, dim]).load(of_out).to(gl.float32)
                before = before * gl.expand_dims(gl.convert_layout(known_weight, of_out_rows), 1)
                acc = acc * gl.expand_dims(gl.convert_layout(shrink, of_out_rows), 1) + before
        empty = total == 0.0
        some = gl.where(empty, 1.0, total)
        found = gl.where(empty, -float("inf"), (top + gl.log2(some)) * LN2)
        acc = acc * gl.expand_dims(gl.convert_layout(1.0 / some, of_out_rows), 1)
        if part >= 0:
            place = (shared_row.to(gl.int64) * num_slots + part + gl.load(piece + 7) * which) * 64
            gl.store(part_lse + place + lines, found)
            gl.store(part_out + (place + out_lines) * dim + channels, acc)
        else:
            gl.store(at_lse, found, mask=lines < q_len - first)
            tma.store_wait(0)
            result.reshape([64, dim]).store(acc.to(dtype))
            fence_async_shared()
            copy_out(out, [row, head, first, 0], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "rows", "kv_group", "numbers"])
def attend_kernel(
    query, key, value, out, lse, part_out, part_lse, pieces, entries, deals, numbers, tables,
    lb, lh, ll, rows, q_len, kv_len, q_start, num_slots, kv_group, scale,
    keep: gl.constexpr, kv_block: gl.constexpr, dim: gl.constexpr,
    consumers: gl.constexpr, ring: gl.constexpr, ahead: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr,
    registers: gl.constexpr,
):  # fmt: skip
    """Output and lse of each piece. query, key, value, out: descriptors of blocks [1, 1, rows, dim]. ring: tiles of
    keys in shared memory; ahead: of queries, for each consumer; even: whether every block of keys is whole."""
    q_shape: gl.constexpr = [ahead * consumers, 1, 1, 64, dim]
    kv_shape: gl.constexpr = [ring, 1, 1, kv_block, dim]
    shared = (
        gl.allocate_shared_memory(query.dtype, q_shape, query.layout),
        gl.allocate_shared_memory(query.dtype, kv_shape, key.layout),
        gl.allocate_shared_memory(query.dtype, kv_shape, value.layout),
        gl.allocate_shared_memory(query.dtype, [consumers, 1, 1, 64, dim], query.layout),
    )
    barriers = made_barriers(ahead, ring, consumers)
    known = gl.allocate_shared_memory(gl.int64, [consumers, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(consumers):
        mbarrier.init(known.index(which), count=1)
    fence_async_shared()
    tensors = (query, key, value, out, lse, part_out, part_lse)
    lists = (pieces, entries, deals)
    lengths = (rows, q_len, kv_len, q_start, num_slots, kv_group)
    strides = (lb, lh, ll)
    seen = tensors, shared, barriers, known, lists, lengths, numbers, tables, strides, scale
    gl.warp_specialize(
        [(consume, (seen, keep, even, goes_on, which)) for which in (0, 1, 2, 3)[:consumers]]
        + [(produce, (tensors, shared, barriers, lists, lengths))],
        [4] * (consumers - 1) + [1],
        [registers] * (consumers - 1) + [FEW],
    )


attend = Launcher(attend_kernel)
