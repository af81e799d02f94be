"""The forward kernel of Hopper, in Gluon: warps that copy and warps that multiply, each doing one thing at a time.

The producer is that of `pipeline`; consumers, groups of four warps with 64 queries each, multiply what is there.

A piece is as in `forward`, its block that of the first consumer's queries. It says behind how many blocks, and slots,
it is from one consumer to the next. An entry says who needs its keys, see `work.shared_lists_of`. Predicates are those
of Triton's kernels: as functions of vectors they are Gluon, too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.kernels.pipeline import (
    BLOCK_BITS,
    FEW,
    FULL,
    LN2,
    LOG2E,
    copy_in,
    copy_out,
    made_rings,
    piece_at,
    pieces_of_program,
    produce,
    ring_slot,
    state_of,
)


@gluon.jit
def consume(seen, hide: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr, which: gl.constexpr):
    """Output and lse of 64 queries of each piece."""
    tensors, tiles, rings, known, lists, lengths, numbers, tables, strides, scale = seen
    out, lse, part_out, part_lse = tensors
    queries, keys, values, outs = tiles
    q_full, q_empty, kv_full, kv_empty, notes = rings
    entries, borders = lists
    q_len, kv_len, q_start = lengths
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
    for turn in range(pieces_of_program(borders)):
        slot, phase = ring_slot(turn, ahead)
        mbarrier.wait(q_full.index(slot), phase)
        row, head, first, begin, stop, part = piece_at(notes, slot, which)
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
        q = queries.index(slot * consumers + which).reshape([64, dim])
        for entry_at in range(begin, stop):
            entry = gl.load(entries + entry_at)
            kv_slot, kv_phase = ring_slot(count, ring)
            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            state = state_of(entry, which)
            if state > 0:
                k = keys.index(kv_slot).reshape([kv_block, dim])
                scores = warpgroup_mma(q, k.permute((1, 0)), no_scores, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=(scores,))
                if state > FULL:
                    k_places = (entry >> BLOCK_BITS) * kv_block + columns
                    q_places = gl.expand_dims(first + lines, 1)
                    at = q_places + q_start
                    scores = hide(
                        scores, -float("inf"), state, at, k_places, q_places, k_places, head, row, numbers, tables
                    )
                    if not even:
                        scores = gl.where(k_places < kv_len, scores, -float("inf"))
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
            place = part.to(gl.int64) * 64
            gl.store(part_lse + place + lines, found)
            gl.store(part_out + (place + out_lines) * dim + channels, acc)
        else:
            gl.store(at_lse, found, mask=lines < q_len - first)
            tma.store_wait(0)
            result.reshape([64, dim]).store(acc.to(dtype))
            fence_async_shared()
            copy_out(out, [row, head, first, 0], result)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "q_start", "kv_group", "numbers"])
def attend_kernel(
    query, key, value, out, lse, part_out, part_lse, pieces, entries, borders, numbers, tables,
    lb, lh, ll, q_len, kv_len, q_start, kv_group, scale,
    hide: gl.constexpr, kv_block: gl.constexpr, dim: gl.constexpr,
    consumers: gl.constexpr, ring: gl.constexpr, ahead: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr,
    registers: gl.constexpr,
):  # fmt: skip
    """Output and lse of each piece. query, key, value, out: descriptors of blocks [1, 1, rows, dim]. ring: tiles of
    keys in shared memory; ahead: of queries, for each consumer; even: whether every block of keys is whole."""
    q_shape: gl.constexpr = [ahead * consumers, 1, 1, 64, dim]
    kv_shape: gl.constexpr = [ring, 1, 1, kv_block, dim]
    own_tiles = (gl.allocate_shared_memory(query.dtype, q_shape, query.layout),)
    shared_tiles = (
        gl.allocate_shared_memory(query.dtype, kv_shape, key.layout),
        gl.allocate_shared_memory(query.dtype, kv_shape, value.layout),
    )
    outs = gl.allocate_shared_memory(query.dtype, [consumers, 1, 1, 64, dim], query.layout)
    rings = made_rings(ahead, ring, consumers)
    known = gl.allocate_shared_memory(gl.int64, [consumers, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(consumers):
        mbarrier.init(known.index(which), count=1)
    fence_async_shared()
    tensors = (out, lse, part_out, part_lse)
    tiles = (own_tiles[0], shared_tiles[0], shared_tiles[1], outs)
    lengths = (q_len, kv_len, q_start)
    strides = (lb, lh, ll)
    seen = tensors, tiles, rings, known, (entries, borders), lengths, numbers, tables, strides, scale
    lists, counts = (pieces, entries, borders), (kv_group, 1, kv_len)
    to_copy = (query,), (key, value), own_tiles, shared_tiles, rings, lists, counts
    gl.warp_specialize(
        [(consume, (seen, hide, even, goes_on, which)) for which in (0, 1, 2, 3)[:consumers]] + [(produce, (to_copy,))],
        [4] * (consumers - 1) + [1],
        [registers] * (consumers - 1) + [FEW],
    )


attend = Launcher(attend_kernel)
