"""The backward kernels of Hopper, in Gluon: as `hopper` has the forward one, with the lists and results of `backward`.

A consumer owns 64 rows, of queries or of keys, and needs tiles of the other side, which all consumers of a program
share. Of a tile it multiplies twice for scores and their gradients, and once or twice with these. All that is asked of
matrix units in advance: while weights of one tile are computed, they multiply for it, the one before and the next.

Who holds a tile waits at most for the next one, so that rings of `LEAST_RING` never stand still.
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
    LOG2E,
    copy_out,
    made_rings,
    piece_at,
    pieces_of_program,
    produce,
    ring_slot,
    state_of,
)

LEAST_RING = 3
"""The tile before, whose products may not be done, the one at hand, and the next."""


@gluon.jit
def norms_of(lse):
    """In units of log2; +inf where there is no weight, so that weights are 0."""
    return gl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@gluon.jit
def block_of(entry, kv_head, kv_group: gl.constexpr, num_blocks, block: gl.constexpr):
    """The head of an entry of a transposed list, and its first query."""
    number = entry >> BLOCK_BITS
    head = kv_head
    if kv_group > 1:
        head = kv_head * kv_group + number // num_blocks
        number = number % num_blocks
    return head, number * block


@gluon.jit
def numbers_at(x, entries, at, stop, places, other: gl.constexpr, kv_group: gl.constexpr, even: gl.constexpr):
    """One of each query of an entry's block, if there is such an entry; x: those of a batch row."""
    lines, kv_head, num_blocks, strides, length = places
    entry = gl.load(entries + at, mask=at < stop, other=0)
    head, first = block_of(entry, kv_head, kv_group, num_blocks, lines.shape[0])
    at_lines = x + head.to(gl.int64) * strides[7] + first.to(gl.int64) * strides[8] + lines * strides[8]
    if even:
        found = gl.load(at_lines)
    else:
        found = gl.load(at_lines, mask=lines < length - first, other=other)
    return found


@gluon.jit
def own_of_queries(
    seen, hide: gl.constexpr, even: gl.constexpr, has_grad_lse: gl.constexpr, adds: gl.constexpr, which: gl.constexpr
):
    """Gradients and delta of 64 queries of each piece."""
    tensors, own_tiles, shared_tiles, rings, lists, lengths, numbers, tables, strides, scale = seen
    lse, grad_lse, delta, described, grad_query, part = tensors
    queries, grads, outs = own_tiles
    keys, values = shared_tiles
    own_full, own_empty, full, empty, notes = rings
    entries, borders = lists
    q_len, kv_len, q_start = lengths
    ahead: gl.constexpr = own_full.shape[0]
    ring: gl.constexpr = full.shape[0]
    consumers: gl.constexpr = queries.shape[0] // ahead
    kv_block: gl.constexpr = keys.shape[3]
    dim: gl.constexpr = keys.shape[4]
    dtype: gl.constexpr = queries.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, kv_block, 16])
    of_grads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    of_factors: gl.constexpr = gl.DotOperandLayout(0, of_grads, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    lines = gl.arange(0, 64, layout=of_rows)
    own_lines = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, of_grads)), 1)
    channels = gl.expand_dims(gl.arange(0, dim, layout=gl.SliceLayout(0, of_grads)), 0)
    columns = gl.expand_dims(gl.arange(0, kv_block, layout=gl.SliceLayout(0, of_scores)), 0)
    nothing = gl.zeros([64, kv_block], gl.float32, of_scores)
    steps = scale * LOG2E
    count = 0
    for turn in range(pieces_of_program(borders)):
        own_slot, own_phase = ring_slot(turn, ahead)
        mbarrier.wait(own_full.index(own_slot), own_phase)
        row, head, first, begin, stop, part_slot = piece_at(notes, own_slot, which)
        at_rows = row.to(gl.int64) * strides[3] + head.to(gl.int64) * strides[4] + first.to(gl.int64) * strides[5]
        at_rows = at_rows + lines * strides[5]
        live = lines < q_len - first
        norms = norms_of(gl.load(lse + at_rows, mask=live, other=-float("inf")))
        mine = own_slot * consumers + which
        q = queries.index(mine).reshape([64, dim])
        do = grads.index(mine).reshape([64, dim])
        out = outs.index(mine)
        products = out.reshape([64, dim]).load(of_grads).to(gl.float32) * do.load(of_grads).to(gl.float32)
        sums = gl.convert_layout(gl.sum(products, 1), of_rows)
        if has_grad_lse:
            sums = sums - gl.load(grad_lse + at_rows, mask=live, other=0.0)
        gl.store(delta + at_rows, sums, mask=live)  # parts of a row store the same
        if ahead > 1:  # noqa: SIM102 - known when compiled, unlike the turn
            if turn > 0:  # results of the last piece have left the tiles
                tma.store_wait(0)
                mbarrier.arrive(own_empty.index(ring_slot(turn - 1, ahead)[0]), count=1)
        norms = gl.expand_dims(norms, 1)
        sums = gl.expand_dims(sums, 1)
        acc = gl.zeros([64, dim], gl.float32, of_grads)
        for entry_at in range(begin, stop):
            entry = gl.load(entries + entry_at)
            slot, phase = ring_slot(count, ring)
            mbarrier.wait(full.index(slot), phase)
            state = state_of(entry, which)
            if state > 0:
                k = keys.index(slot).reshape([kv_block, dim])
                v = values.index(slot).reshape([kv_block, dim])
                scores = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
                from_values = warpgroup_mma(do, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                weights = gl.exp2(scores * steps - norms)
                if state > FULL:
                    k_places = (entry >> BLOCK_BITS) * kv_block + columns
                    q_places = gl.expand_dims(first + lines, 1)
                    at = q_places + q_start
                    weights = hide(weights, 0.0, state, at, k_places, q_places, k_places, head, row, numbers, tables)
                    if not even:
                        weights = gl.where(k_places < kv_len, weights, 0.0)
                from_values = warpgroup_mma_wait(0, deps=(from_values,))
                factors = gl.convert_layout((weights * (from_values - sums)).to(dtype), of_factors)
                acc = warpgroup_mma(factors, k, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(slot), count=1)
            count += 1
        acc = acc * scale
        if part_slot >= 0:
            place = part_slot.to(gl.int64) * 64
            gl.store(part + (place + own_lines) * dim + channels, acc)
        else:
            if adds:
                start = row.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1] + first.to(gl.int64) * strides[2]
                known = grad_query + start + own_lines * strides[2] + channels
                acc = acc + gl.load(known, mask=own_lines < q_len - first, other=0.0).to(gl.float32)
            out.reshape([64, dim]).store(acc.to(dtype))
            fence_async_shared()
            copy_out(described, [row, head, first, 0], out)
        if ahead == 1:
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(own_slot), count=1)
    tma.store_wait(0)


@gluon.jit
def own_of_keys(
    seen, hide: gl.constexpr, kv_group: gl.constexpr, even: gl.constexpr, adds: gl.constexpr, which: gl.constexpr
):
    """Gradients of 64 keys and values of each piece."""
    tensors, own_tiles, shared_tiles, rings, lists, lengths, numbers, tables, strides, scale = seen
    lse, delta, key_described, value_described, grad_key, grad_value, part_key, part_value = tensors
    keys, values = own_tiles
    queries, grads = shared_tiles
    own_full, own_empty, full, empty, notes = rings
    entries, borders = lists
    q_len, kv_len, q_start, num_q_blocks = lengths
    ahead: gl.constexpr = own_full.shape[0]
    ring: gl.constexpr = full.shape[0]
    consumers: gl.constexpr = keys.shape[0] // ahead
    q_block: gl.constexpr = queries.shape[3]
    dim: gl.constexpr = queries.shape[4]
    dtype: gl.constexpr = queries.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, q_block, 16])
    of_grads: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    of_factors: gl.constexpr = gl.DotOperandLayout(0, of_grads, 2)
    of_columns: gl.constexpr = gl.SliceLayout(0, of_scores)
    of_numbers: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lines = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, of_scores)), 1)
    own_lines = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, of_grads)), 1)
    channels = gl.expand_dims(gl.arange(0, dim, layout=gl.SliceLayout(0, of_grads)), 0)
    columns = gl.arange(0, q_block, layout=of_columns)
    in_block = gl.arange(0, q_block, layout=of_numbers)
    nothing = gl.zeros([64, q_block], gl.float32, of_scores)
    steps = scale * LOG2E
    count = 0
    for turn in range(pieces_of_program(borders)):
        own_slot, own_phase = ring_slot(turn, ahead)
        mbarrier.wait(own_full.index(own_slot), own_phase)
        row, kv_head, first, begin, stop, part_slot = piece_at(notes, own_slot, which)
        mine = own_slot * consumers + which
        k = keys.index(mine).reshape([64, dim])
        v = values.index(mine).reshape([64, dim])
        if ahead > 1:  # noqa: SIM102 - known when compiled, unlike the turn
            if turn > 0:  # results of the last piece have left the tiles
                tma.store_wait(0)
                mbarrier.arrive(own_empty.index(ring_slot(turn - 1, ahead)[0]), count=1)
        lse_of_row = lse + row.to(gl.int64) * strides[6]
        delta_of_row = delta + row.to(gl.int64) * strides[6]
        acc_key = gl.zeros([64, dim], gl.float32, of_grads)
        acc_value = gl.zeros([64, dim], gl.float32, of_grads)
        # numbers are read when there is room for them, and long before they are used
        places = in_block, kv_head, num_q_blocks, strides, q_len
        lses = numbers_at(lse_of_row, entries, begin, stop, places, -float("inf"), kv_group, even)
        sums = numbers_at(delta_of_row, entries, begin, stop, places, 0.0, kv_group, even)
        for entry_at in range(begin, stop):
            entry = gl.load(entries + entry_at)
            slot, phase = ring_slot(count, ring)
            mbarrier.wait(full.index(slot), phase)
            state = state_of(entry, which)
            if state > 0:
                q = queries.index(slot).reshape([q_block, dim])
                do = grads.index(slot).reshape([q_block, dim])
                scores = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                from_values = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
                norms = gl.expand_dims(gl.convert_layout(norms_of(lses), of_columns), 0)
                scores = warpgroup_mma_wait(1, deps=(scores,))
                weights = gl.exp2(scores * steps - norms)
                if state > FULL:
                    head, q_first = block_of(entry, kv_head, kv_group, num_q_blocks, q_block)
                    q_places = gl.expand_dims(q_first + columns, 0)
                    k_places = first + lines
                    at = q_places + q_start
                    weights = hide(weights, 0.0, state, at, k_places, q_places, k_places, head, row, numbers, tables)
                lses = numbers_at(lse_of_row, entries, entry_at + 1, stop, places, -float("inf"), kv_group, even)
                halves = gl.convert_layout(weights.to(dtype), of_factors)
                from_values = warpgroup_mma_wait(0, deps=(from_values,))
                adding_value = warpgroup_mma(halves, do, acc_value, is_async=True)
                subtracted = gl.expand_dims(gl.convert_layout(sums, of_columns), 0)
                factors = gl.convert_layout((weights * (from_values - subtracted)).to(dtype), of_factors)
                adding_key = warpgroup_mma(factors, q, acc_key, is_async=True)
                sums = numbers_at(delta_of_row, entries, entry_at + 1, stop, places, 0.0, kv_group, even)
                acc_value, acc_key = warpgroup_mma_wait(0, deps=(adding_value, adding_key))
            else:
                lses = numbers_at(lse_of_row, entries, entry_at + 1, stop, places, -float("inf"), kv_group, even)
                sums = numbers_at(delta_of_row, entries, entry_at + 1, stop, places, 0.0, kv_group, even)
            mbarrier.arrive(empty.index(slot), count=1)
            count += 1
        acc_key = acc_key * scale
        if part_slot >= 0:
            place = part_slot.to(gl.int64) * 64
            at_part = (place + own_lines) * dim + channels
            gl.store(part_key + at_part, acc_key)
            gl.store(part_value + at_part, acc_value)
        else:
            if adds:
                live = own_lines < kv_len - first
                start = row.to(gl.int64) * strides[0] + kv_head.to(gl.int64) * strides[1]
                known = grad_key + start + (first + own_lines).to(gl.int64) * strides[2] + channels
                acc_key = acc_key + gl.load(known, mask=live, other=0.0).to(gl.float32)
                start = row.to(gl.int64) * strides[3] + kv_head.to(gl.int64) * strides[4]
                known = grad_value + start + (first + own_lines).to(gl.int64) * strides[5] + channels
                acc_value = acc_value + gl.load(known, mask=live, other=0.0).to(gl.float32)
            k.store(acc_key.to(dtype))
            v.store(acc_value.to(dtype))
            fence_async_shared()
            copy_out(key_described, [row, kv_head, first, 0], keys.index(mine))
            copy_out(value_described, [row, kv_head, first, 0], values.index(mine))
        if ahead == 1:
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(own_slot), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["q_len", "kv_len", "q_start", "kv_group", "numbers"])
def query_kernel(
    query, key, value, out, grad_out, grad_described, lse, grad_lse, delta, grad_query, part, pieces, entries, borders,
    numbers, tables,
    db, dh, dl, lb, lh, ll, q_len, kv_len, q_start, kv_group, scale,
    hide: gl.constexpr, kv_block: gl.constexpr, dim: gl.constexpr,
    consumers: gl.constexpr, ring: gl.constexpr, ahead: gl.constexpr, even: gl.constexpr,
    has_grad_lse: gl.constexpr, adds: gl.constexpr, registers: gl.constexpr,
):  # fmt: skip
    """Gradients of queries, and delta, of each piece. query, key, value, out, grad_out, grad_described: descriptors of
    blocks [1, 1, rows, dim], the last one of grad_query. The rest is as in `backward` and in `hopper`."""
    own_shape: gl.constexpr = [ahead * consumers, 1, 1, 64, dim]
    kv_shape: gl.constexpr = [ring, 1, 1, kv_block, dim]
    own_tiles = (
        gl.allocate_shared_memory(query.dtype, own_shape, query.layout),
        gl.allocate_shared_memory(query.dtype, own_shape, grad_out.layout),
        gl.allocate_shared_memory(query.dtype, own_shape, out.layout),
    )
    shared_tiles = (
        gl.allocate_shared_memory(query.dtype, kv_shape, key.layout),
        gl.allocate_shared_memory(query.dtype, kv_shape, value.layout),
    )
    rings = made_rings(ahead, ring, consumers)
    tensors = (lse, grad_lse, delta, grad_described, grad_query, part)
    lengths = (q_len, kv_len, q_start)
    strides = (db, dh, dl, lb, lh, ll)
    seen = tensors, own_tiles, shared_tiles, rings, (entries, borders), lengths, numbers, tables, strides, scale
    lists, counts = (pieces, entries, borders), (kv_group, 1, kv_len)
    to_copy = (query, grad_out, out), (key, value), own_tiles, shared_tiles, rings, lists, counts
    gl.warp_specialize(
        [(own_of_queries, (seen, hide, even, has_grad_lse, adds, which)) for which in (0, 1, 2, 3)[:consumers]]
        + [(produce, (to_copy, ()))],
        [4] * (consumers - 1) + [1],
        [registers] * (consumers - 1) + [FEW],
    )


@gluon.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_q_blocks", "numbers"])
def key_kernel(
    query, key, value, grad_out, key_described, value_described, lse, delta, grad_key, grad_value,
    part_key, part_value, pieces, entries, borders, numbers, tables,
    db, dh, dl, eb, eh, el, lb, lh, ll, q_len, kv_len, q_start, num_q_blocks, scale,
    hide: gl.constexpr, kv_group: gl.constexpr, q_block: gl.constexpr, dim: gl.constexpr,
    consumers: gl.constexpr, ring: gl.constexpr, ahead: gl.constexpr, even: gl.constexpr, adds: gl.constexpr,
    registers: gl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of each transposed piece. query, key, value, grad_out, key_described,
    value_described: descriptors of blocks [1, 1, rows, dim], the last two of grad_key and grad_value."""
    own_shape: gl.constexpr = [ahead * consumers, 1, 1, 64, dim]
    q_shape: gl.constexpr = [ring, 1, 1, q_block, dim]
    own_tiles = (
        gl.allocate_shared_memory(query.dtype, own_shape, key.layout),
        gl.allocate_shared_memory(query.dtype, own_shape, value.layout),
    )
    shared_tiles = (
        gl.allocate_shared_memory(query.dtype, q_shape, query.layout),
        gl.allocate_shared_memory(query.dtype, q_shape, grad_out.layout),
    )
    rings = made_rings(ahead, ring, consumers)
    tensors = (lse, delta, key_described, value_described, grad_key, grad_value, part_key, part_value)
    lengths = (q_len, kv_len, q_start, num_q_blocks)
    strides = (db, dh, dl, eb, eh, el, lb, lh, ll)
    seen = tensors, own_tiles, shared_tiles, rings, (entries, borders), lengths, numbers, tables, strides, scale
    lists, counts = (pieces, entries, borders), (1, kv_group, num_q_blocks)
    to_copy = (key, value), (query, grad_out), own_tiles, shared_tiles, rings, lists, counts
    gl.warp_specialize(
        [(own_of_keys, (seen, hide, kv_group, even, adds, which)) for which in (0, 1, 2, 3)[:consumers]]
        + [(produce, (to_copy, ()))],
        [4] * (consumers - 1) + [1],
        [registers] * (consumers - 1) + [FEW],
    )


of_queries, of_keys = Launcher(query_kernel), Launcher(key_kernel)
