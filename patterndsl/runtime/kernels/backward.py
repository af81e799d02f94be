"""The backward kernels: gradients of queries over the lists of the forward pass, of keys over transposed ones.

Pieces and entries are those of `forward`. A transposed piece has a head of keys and a block of keys; its entries count
blocks of queries through all query heads of that head. Parts of a row or column leave sums in slots, which are added
up by a kernel of their own: nothing is added atomically, so results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import (
    APART,
    BY_SLOT,
    LOG2E,
    PLAIN_KEYS,
    by_place,
    head_offset,
    load_norm,
    load_numbers,
    load_rows,
    load_tile,
    row_at,
    store_numbers,
    store_part,
    store_tile,
)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "numbers"])
def query_kernel(
    query, key, value, out, grad_out, lse, grad_lse, delta, grad_query, part, pieces, entries,
    q_order, k_order, numbers, tables,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, gb, gh, gl, lb, lh, ll, db, dh, dl, qob, qoh, kob, koh,
    q_len, kv_len, q_start, num_slots, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr,
    even: tl.constexpr, described: tl.constexpr, ordered: tl.constexpr, has_grad_lse: tl.constexpr,
    adds: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and delta: what is subtracted from the gradient of every score of a row.

    adds: whether gradients are added to what is there.
    """
    piece = pieces + tl.program_id(0) * 6
    row = tl.load(piece) + tl.program_id(1)
    head = tl.load(piece + 1)
    first = tl.load(piece + 2) * q_block
    begin = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    slot = tl.load(piece + 5)
    kv_head = head // kv_group
    q_places = first + tl.arange(0, q_block)
    q_rows = load_rows(q_order, qob, qoh, row, head, first, q_len, q_block, False, ordered)
    q = load_tile(query, qb, qh, ql, row, head, first, q_rows, q_block, dim, padded, False, described)
    do = load_tile(grad_out, gb, gh, gl, row, head, first, q_rows, q_block, value_dim, value_padded, False, described)
    told = by_place(q_rows, q_places, (APART & ordered) != 0)
    into = by_place(q_rows, q_places, (BY_SLOT & ordered) != 0)
    of_keys: tl.constexpr = ordered and (PLAIN_KEYS & ordered) == 0
    o = load_tile(out, ob, oh, ol, row, head, first, told, q_block, value_dim, value_padded, False, described)
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if has_grad_lse:
        sums -= load_numbers(grad_lse, lb, lh, ll, row, head, told, 0.0, False)
    norm = load_norm(lse, lb, lh, ll, row, head, told, False)
    store_numbers(delta, lb, lh, ll, row, head, told, sums)  # parts of a row store the same, and so do its slots
    steps = scale * LOG2E
    acc = tl.zeros([q_block, padded], tl.float32)
    for at in tl.range(begin, stop, num_stages=stages):
        entry = tl.load(entries + at)
        k_first = (entry >> 1) * kv_block
        k_rows = load_rows(k_order, kob, koh, row, head, k_first, kv_len, kv_block, even, of_keys)
        k = load_tile(key, kb, kh, kl, row, kv_head, k_first, k_rows, kv_block, dim, padded, even, described)
        v = load_tile(
            value, vb, vh, vl, row, kv_head, k_first, k_rows, kv_block, value_dim, value_padded, even, described
        )
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        from_values = tl.dot(do, tl.trans(v), input_precision=precision)
        weights = tl.exp2(scores * steps - norm[:, None])
        if (entry & 1) != 0:
            k_places = k_first + tl.arange(0, kv_block)
            q_at = (q_rows + q_start)[:, None]
            kept = keep(q_at, k_rows[None, :], q_places[:, None], k_places[None, :], head, row, numbers, tables)
            if not even:
                kept = kept & (k_rows >= 0)[None, :]
            weights = tl.where(kept, weights, 0.0)
        grad_scores = (weights * (from_values - sums[:, None])).to(k.dtype)
        acc = tl.dot(grad_scores, k, acc, input_precision=precision)
    acc *= scale
    if slot >= 0:
        place = tl.program_id(1).to(tl.int64) * num_slots + slot
        store_part(part, place, acc, q_block, padded)
    else:
        if adds:
            acc += load_tile(grad_query, db, dh, dl, row, head, first, into, q_block, dim, padded, False, False)
        store_tile(grad_query, db, dh, dl, row, head, into, acc, dim, padded)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "numbers", "num_q_blocks", "turn"])
def key_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, part_key, part_value, pieces, entries,
    q_order, k_order, numbers, tables,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, gb, gh, gl, lb, lh, ll, db, dh, dl, eb, eh, el, qob, qoh, kob, koh,
    q_len, kv_len, q_start, num_slots, num_q_blocks, turn, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr,
    even: tl.constexpr, described: tl.constexpr, ordered: tl.constexpr, adds: tl.constexpr,
    precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. even: whether every block of queries is whole; adds: see `query_kernel`. turn: the
    query head of a group by whose order its keys stand."""
    piece = pieces + tl.program_id(0) * 6
    row = tl.load(piece) + tl.program_id(1)
    kv_head = tl.load(piece + 1)
    first = tl.load(piece + 2) * kv_block
    begin = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    slot = tl.load(piece + 5)
    k_places = first + tl.arange(0, kv_block)
    of_keys: tl.constexpr = ordered and (PLAIN_KEYS & ordered) == 0
    k_rows = load_rows(k_order, kob, koh, row, kv_head * kv_group + turn, first, kv_len, kv_block, False, of_keys)
    into = by_place(k_rows, k_places, of_keys and (BY_SLOT & ordered) != 0)
    k = load_tile(key, kb, kh, kl, row, kv_head, first, k_rows, kv_block, dim, padded, False, described)
    v = load_tile(value, vb, vh, vl, row, kv_head, first, k_rows, kv_block, value_dim, value_padded, False, described)
    steps = scale * LOG2E
    acc_key = tl.zeros([kv_block, padded], tl.float32)
    acc_value = tl.zeros([kv_block, value_padded], tl.float32)
    for at in tl.range(begin, stop, num_stages=stages):
        entry = tl.load(entries + at)
        block = entry >> 1
        head = kv_head * kv_group
        if kv_group > 1:
            head += block // num_q_blocks
            block = block % num_q_blocks
        q_first = block * q_block
        q_rows = load_rows(q_order, qob, qoh, row, head, q_first, q_len, q_block, even, ordered)
        q = load_tile(query, qb, qh, ql, row, head, q_first, q_rows, q_block, dim, padded, even, described)
        told = by_place(q_rows, q_first + tl.arange(0, q_block), (APART & ordered) != 0)
        norm = load_norm(lse, lb, lh, ll, row, head, told, even)
        scores = tl.dot(k, tl.trans(q), input_precision=precision)
        weights = tl.exp2(scores * steps - norm[None, :])
        if (entry & 1) != 0:
            q_places = q_first + tl.arange(0, q_block)
            q_at = (q_rows + q_start)[None, :]
            kept = keep(q_at, k_rows[:, None], q_places[None, :], k_places[:, None], head, row, numbers, tables)
            weights = tl.where(kept, weights, 0.0)
        do = load_tile(
            grad_out, gb, gh, gl, row, head, q_first, q_rows, q_block, value_dim, value_padded, even, described
        )
        from_values = tl.dot(v, tl.trans(do), input_precision=precision)
        acc_value = tl.dot(weights.to(do.dtype), do, acc_value, input_precision=precision)
        sums = load_numbers(delta, lb, lh, ll, row, head, told, 0.0, even)
        grad_scores = (weights * (from_values - sums[None, :])).to(q.dtype)
        acc_key = tl.dot(grad_scores, q, acc_key, input_precision=precision)
    acc_key *= scale
    if slot >= 0:
        place = tl.program_id(1).to(tl.int64) * num_slots + slot
        store_part(part_key, place, acc_key, kv_block, padded)
        store_part(part_value, place, acc_value, kv_block, value_padded)
    else:
        if adds:
            acc_key += load_tile(grad_key, db, dh, dl, row, kv_head, first, into, kv_block, dim, padded, False, False)
            acc_value += load_tile(
                grad_value, eb, eh, el, row, kv_head, first, into, kv_block, value_dim, value_padded, False, False
            )
        store_tile(grad_key, db, dh, dl, row, kv_head, into, acc_key, dim, padded)
        store_tile(grad_value, eb, eh, el, row, kv_head, into, acc_value, value_dim, value_padded)


@triton.jit(do_not_specialize=["length", "num_slots", "turn"])
def sum_kernel(
    part, into, joints, order, ib, ih, il, rob, roh, length, num_slots, group, turn,
    width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr, ordered: tl.constexpr,
    adds: tl.constexpr,
):  # fmt: skip
    """One row of a block that was cut, a program each: the sum of its slots. Joints are those of `merge_kernel`; the
    order of their head is that of head * group + turn."""
    joint = joints + (tl.program_id(0) // block) * 5
    inside = tl.program_id(0) % block
    row = tl.load(joint) + tl.program_id(1)
    head = tl.load(joint + 1)
    at_row = row_at(
        order, rob, roh, row, head * group + turn, tl.load(joint + 2) * block + inside, length, ordered
    )  # fmt: skip
    first = tl.program_id(1).to(tl.int64) * num_slots + tl.load(joint + 3)
    count = tl.load(joint + 4)
    channels = tl.arange(0, padded)
    acc = tl.zeros([padded], tl.float32)
    for start in range(0, count, chunk):
        slots = start + tl.arange(0, chunk)
        at = part + ((first + slots) * block + inside)[:, None] * padded + channels[None, :]
        acc += tl.sum(tl.load(at, mask=(slots < count)[:, None], other=0.0), 0)
    at_into = into + head_offset(ib, ih, row, head) + at_row.to(tl.int64) * il + channels
    live = channels < tl.where(at_row >= 0, width, 0)
    if adds:
        acc += tl.load(at_into, mask=live, other=0.0)
    tl.store(at_into, acc.to(into.dtype.element_ty), mask=live)
