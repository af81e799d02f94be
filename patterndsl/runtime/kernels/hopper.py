"""The forward kernel of Hopper, in Gluon: warps that copy and warps that multiply, each doing one thing at a time.

The producer is that of `pipeline`; consumers, groups of four warps with 64 queries each, multiply what is there.

A piece is as in `forward`, its block that of the first consumer's queries. It says behind how many blocks, and slots,
it is from one consumer to the next. An entry says who needs its keys, see `work.shared_lists_of`. Predicates are those
of Triton's kernels: as functions of vectors they are Gluon, too.

Softmax. Weights are powers of scores less some number of their row, which cancels. Only to keep them in range has it to
be the highest score, and to search for that in each tile takes a tenth of the time. So all weights of a piece count
from the highest of a few scores of its first tile. The piece stands if the sums of weights are neither too small nor
too large and its result is finite. From a piece on that does not stand, a program does all again with care, that is,
as in FlashAttention-2 (arXiv:2307.08691, section 3.1). So scores of a row that lie some 40 (of float16, 10) above those
few, or where these are masked, half as far from 0, cost up to twice the time, and no accuracy; what else that
program does then differs by rounding.
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
    agree,
    agreed,
    copy_in,
    copy_out,
    made_agreement,
    made_rings,
    piece_at,
    pieces_of_program,
    produce,
    ring_slot,
    state_of,
)

LEAST, MOST = gl.constexpr(2.0**-30), gl.constexpr(2.0**60)
"""Sums of weights that stand: with smaller ones products with small values would be 0."""
LEAST_HALF = gl.constexpr(2.0**-14)
"""Mean weight of the pairs of all tiles, from which on sums stand in float16: smaller ones have fewer digits there.
Weights that are too large for it make a result that is not finite."""


@gluon.jit
def consume(seen, hide: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr, which: gl.constexpr):
    """Output and lse of 64 queries of each piece: all of them without care, then those that did not stand."""
    agreement, zero = seen[-1], gl.to_tensor(0)
    counts, standing = one_round(seen, zero, (zero, zero, zero), zero, hide, even, goes_on, which, careful=False)
    agree(agreement, which, standing)
    one_round(seen, agreed(agreement, 4), counts, standing, hide, even, goes_on, which, careful=True)
    tma.store_wait(0)


@gluon.jit
def of_threads(x):
    """[rows, n] in the layout of matrix units as [rows, n // 8, 4, 2], of which a thread has the second and the last
    dimension: over these none waits for others."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.jit
def either(one, other):
    """Reduces to any one of all, without looking at them."""
    return one


@gluon.jit
def one_round(
    seen, first_turn, counts, standing,
    hide: gl.constexpr, even: gl.constexpr, goes_on: gl.constexpr, which: gl.constexpr, careful: gl.constexpr,
):  # fmt: skip
    """Pieces from some turn on. counts: of pieces, tiles of keys and former results that came through rings yet.
    standing: how many pieces stand, which are not done again. Returns both.

    A piece that does not stand is not written, as a pass that goes on needs what was there to do it again; those behind
    it are not done.
    """
    tensors, tiles, rings, arrived, lists, lengths, numbers, tables, strides, scale, _ = seen
    out, lse, part_out, part_lse = tensors
    queries, keys, values, outs = tiles
    q_full, q_empty, kv_full, kv_empty, notes = rings
    entries, borders = lists
    q_len, kv_len, q_start = lengths
    turns, count, times_known = counts
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
    for turn in range(first_turn, pieces_of_program(borders)):
        slot, phase = ring_slot(turns, ahead)
        turns += 1
        if careful:
            needed = turn >= standing
        else:
            needed = turn == standing
        mbarrier.wait(q_full.index(slot), phase)
        row, head, first, begin, stop, part = piece_at(notes, slot, which)
        at_lse = lse + row.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + first.to(gl.int64) * strides[2]
        at_lse = at_lse + lines * strides[2]
        top = gl.full([64], -float("inf"), gl.float32, of_rows)
        known_top = top
        if careful:
            total = gl.full([64], 0.0, gl.float32, of_rows)
        else:
            total = gl.sum(gl.sum(of_threads(no_scores), 3), 1)
            highest = total - float("inf")  # sought until a tile has keys for all rows: some may have none
            has_full = gl.to_tensor(0)
            is_first = gl.to_tensor(1)
        acc = gl.zeros([64, dim], gl.float32, of_out)
        if goes_on:  # noqa: SIM102 - known when compiled, unlike the slot
            if part < 0:  # what is there comes while its successor is made
                tma.store_wait(0)
                mbarrier.expect(arrived.index(which), out.block_type.nbytes)
                copy_in(out, [row, head, first, 0], arrived.index(which), result)
                known_top = gl.load(at_lse, mask=lines < q_len - first, other=-float("inf")) * LOG2E
        q = queries.index(slot * consumers + which).reshape([64, dim])
        for entry_at in range(begin, stop):
            entry = gl.load(entries + entry_at)
            kv_slot, kv_phase = ring_slot(count, ring)
            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            state = state_of(entry, which) * needed.to(gl.int32)
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
                    if not careful:  # noqa: SIM102 - known when compiled
                        if has_full == 0:
                            highest = gl.maximum(highest, gl.max(gl.max(of_threads(scores), 3), 1))
                elif not careful:
                    has_full = gl.to_tensor(1)
                if careful:
                    higher = gl.maximum(top, gl.max(scores, 1) * steps)
                    shift = gl.where(higher == -float("inf"), 0.0, higher)
                    weights = gl.exp2(scores * steps - gl.expand_dims(shift, 1))
                    shrink = gl.exp2(top - shift)
                    total = total * shrink + gl.sum(weights, 1)
                    top = higher
                    acc = acc * gl.expand_dims(gl.convert_layout(shrink, of_out_rows), 1)
                else:
                    if is_first > 0:
                        top = gl.max(gl.max(gl.reduce(of_threads(scores), 1, either), 2), 1)
                        top = gl.convert_layout(top, of_rows) * steps
                        top = gl.where(top == -float("inf"), 0.0, top)
                        is_first = gl.to_tensor(0)
                    weights = gl.exp2(scores * steps - gl.expand_dims(top, 1))
                    total += gl.sum(gl.sum(of_threads(weights), 3), 1)
                weights = gl.convert_layout(weights.to(dtype), of_weights)
                v = values.index(kv_slot).reshape([kv_block, dim])
                acc = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(kv_empty.index(kv_slot), count=1)
            count += 1
        mbarrier.arrive(q_empty.index(slot), count=1)
        writes = needed
        if not careful:
            total = gl.convert_layout(gl.sum(total, 1), of_rows)
            top = gl.where(total > 0.0, top, -float("inf"))
            is_empty = (gl.convert_layout(gl.max(highest, 1), of_rows) == -float("inf")) & (has_full == 0)
            least = LEAST
            if dtype == gl.float16:
                least = LEAST_HALF * kv_block * (stop - begin)
            fits = (total >= least) & (total <= MOST) | is_empty
            is_finite = gl.convert_layout(gl.sum(acc * 0.0, 1), of_rows) == 0.0
            writes &= gl.min((fits & is_finite).to(gl.int32), 0) > 0
            standing += writes.to(gl.int32)
        if goes_on:  # noqa: SIM102 - known when compiled, unlike the slot
            if part < 0:
                mbarrier.wait(arrived.index(which), times_known & 1)
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
        if writes:
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
    return (turns, count, times_known), standing


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
    arrived = gl.allocate_shared_memory(gl.int64, [consumers, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(consumers):
        mbarrier.init(arrived.index(which), count=1)
    tensors = (out, lse, part_out, part_lse)
    tiles = (own_tiles[0], shared_tiles[0], shared_tiles[1], outs)
    lengths = (q_len, kv_len, q_start)
    strides = (lb, lh, ll)
    agreement = made_agreement(consumers)
    fence_async_shared()
    seen = tensors, tiles, rings, arrived, (entries, borders), lengths, numbers, tables, strides, scale, agreement
    lists, counts = (pieces, entries, borders), (kv_group, 1, kv_len)
    to_copy = (query,), (key, value), own_tiles, shared_tiles, rings, lists, counts
    gl.warp_specialize(
        [(consume, (seen, hide, even, goes_on, which)) for which in (0, 1, 2, 3)[:consumers]]
        + [(produce, (to_copy, agreement))],
        [4] * (consumers - 1) + [1],
        [registers] * (consumers - 1) + [FEW],
    )


attend = Launcher(attend_kernel)
