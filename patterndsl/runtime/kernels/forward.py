"""The forward kernels: attention over lists of tiles, and the merge of rows that were cut into pieces.

A piece of work is a row of `pieces`: batch row, head, block of queries, its entries [begin, stop), and the slot where a
part of a row leaves its result, -1 where it is a whole one. An entry is 2 * (block of keys) + (1 where it is masked).
Grid: (pieces, batch rows that share them). Scores are in units of log2 in loops, log-sum-exps natural in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import (
    BY_SLOT,
    LN2,
    LOG2E,
    PLAIN_KEYS,
    by_place,
    head_offset,
    load_numbers,
    load_rows,
    load_tile,
    row_at,
    store_numbers,
    store_part,
    store_tile,
)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "numbers"])
def attend_kernel(
    query, key, value, out, lse, part_out, part_lse, pieces, entries, q_order, k_order, numbers, tables,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, lb, lh, ll, qob, qoh, kob, koh,
    q_len, kv_len, q_start, num_slots, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr,
    even: tl.constexpr, described: tl.constexpr, ordered: tl.constexpr, goes_on: tl.constexpr,
    precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Output and lse of each piece. q_len, kv_len: places of queries and of keys; even: whether every block of keys is
    whole; described: what query, key and value are, and ordered: what orders places have, see `rows`; goes_on: whether
    softmaxes begin with what is in out and lse."""
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
    into = by_place(q_rows, q_places, (BY_SLOT & ordered) != 0)
    of_keys: tl.constexpr = ordered and (PLAIN_KEYS & ordered) == 0
    steps = scale * LOG2E
    top = tl.full([q_block], -float("inf"), tl.float32)
    total = tl.zeros([q_block], tl.float32)
    acc = tl.zeros([q_block, value_padded], tl.float32)
    if goes_on:  # noqa: SIM102 - known when compiled, unlike the slot
        if slot < 0:
            top = load_numbers(lse, lb, lh, ll, row, head, q_rows, -float("inf"), False) * LOG2E
            total = tl.where(top == -float("inf"), 0.0, 1.0)
            known = load_tile(out, ob, oh, ol, row, head, first, q_rows, q_block, value_dim, value_padded, False, False)
            acc = known.to(tl.float32)
    for at in tl.range(begin, stop, num_stages=stages):
        entry = tl.load(entries + at)
        k_first = (entry >> 1) * kv_block
        k_rows = load_rows(k_order, kob, koh, row, head, k_first, kv_len, kv_block, even, of_keys)
        k = load_tile(key, kb, kh, kl, row, kv_head, k_first, k_rows, kv_block, dim, padded, even, described)
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        if (entry & 1) != 0:
            k_places = k_first + tl.arange(0, kv_block)
            q_at = (q_rows + q_start)[:, None]
            kept = keep(q_at, k_rows[None, :], q_places[:, None], k_places[None, :], head, row, numbers, tables)
            if not even:
                kept = kept & (k_rows >= 0)[None, :]
            scores = tl.where(kept, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * steps)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores * steps - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = load_tile(
            value, vb, vh, vl, row, kv_head, k_first, k_rows, kv_block, value_dim, value_padded, even, described
        )
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=precision)
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    if slot >= 0:
        place = tl.program_id(1).to(tl.int64) * num_slots + slot
        store_part(part_out, place, acc, q_block, value_padded)
        tl.store(part_lse + place * q_block + tl.arange(0, q_block), found)
    else:
        store_tile(out, ob, oh, ol, row, head, into, acc, value_dim, value_padded)
        store_numbers(lse, lb, lh, ll, row, head, into, found)


@triton.jit(do_not_specialize=["length", "num_slots"])
def merge_kernel(
    part_out, part_lse, out, lse, joints, order, ob, oh, ol, lb, lh, ll, qob, qoh, length, num_slots,
    value_dim: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, chunk: tl.constexpr,
    ordered: tl.constexpr, goes_on: tl.constexpr,
):  # fmt: skip
    """One row of a block that was cut, a program each: the results of its slots, read `chunk` at a time.

    A joint is a row of `joints`: batch row, head, block of queries, its first slot and the number of slots.
    """
    joint = joints + (tl.program_id(0) // q_block) * 5
    inside = tl.program_id(0) % q_block
    row = tl.load(joint) + tl.program_id(1)
    head = tl.load(joint + 1)
    at = row_at(order, qob, qoh, row, head, tl.load(joint + 2) * q_block + inside, length, ordered)
    first = tl.program_id(1).to(tl.int64) * num_slots + tl.load(joint + 3)
    count = tl.load(joint + 4)
    channels = tl.arange(0, value_padded)
    at_lse = lse + head_offset(lb, lh, row, head) + at.to(tl.int64) * ll
    at_out = out + head_offset(ob, oh, row, head) + at.to(tl.int64) * ol + channels
    live = channels < tl.where(at >= 0, value_dim, 0)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([value_padded], tl.float32)
    if goes_on:
        if at >= 0:
            top = tl.load(at_lse) * LOG2E
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        acc = tl.load(at_out, mask=live, other=0.0).to(tl.float32)
    for start in range(0, count, chunk):
        slots = start + tl.arange(0, chunk)
        rows = (first + slots) * q_block + inside
        mine = tl.load(part_lse + rows, mask=slots < count, other=-float("inf")) * LOG2E
        tile = tl.load(
            part_out + rows[:, None] * value_padded + channels[None, :], mask=(slots < count)[:, None], other=0.0
        )
        higher = tl.maximum(top, tl.max(mine, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        shares = tl.exp2(mine - shift)
        shrink = tl.exp2(top - shift)
        acc = acc * shrink + tl.sum(tile * shares[:, None], 0)
        total = total * shrink + tl.sum(shares, 0)
        top = higher
    empty = total == 0.0
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    merged = acc / tl.where(empty, 1.0, total)
    if at >= 0:
        tl.store(at_lse, found)
        tl.store(at_out, merged.to(out.dtype.element_ty), mask=live)
