"""The backward kernels: gradients of queries over the lists of the forward pass, of keys over transposed ones.

Pieces and entries are those of `forward`. A transposed piece has a head of keys and a block of keys; its entries count
blocks of queries through all query heads of that head. Parts of a row or column leave sums in slots, which are added
up by a kernel of their own: nothing is added atomically, so results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import LOG2E, load_tile, store_tile


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "numbers"])
def query_kernel(
    query, key, value, out, grad_out, lse, grad_lse, delta, grad_query, part, pieces, entries, numbers, tables,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, gb, gh, gl, lb, lh, ll, db, dh, dl,
    q_len, kv_len, q_start, num_slots, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr,
    even: tl.constexpr, has_grad_lse: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and delta: what is subtracted from the gradient of every score of a row."""
    piece = pieces + tl.program_id(0) * 6
    row = tl.load(piece) + tl.program_id(1)
    head = tl.load(piece + 1)
    first = tl.load(piece + 2) * q_block
    begin = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    slot = tl.load(piece + 5)
    wide_row = row.to(tl.int64)
    wide_first = first.to(tl.int64)
    places = first + tl.arange(0, q_block)
    live = places < q_len
    q = load_tile(query + wide_row * qb + head * qh + wide_first * ql, ql, first, q_len, q_block, dim, padded, False)
    g_at = grad_out + wide_row * gb + head * gh + wide_first * gl
    do = load_tile(g_at, gl, first, q_len, q_block, value_dim, value_padded, False)
    o_at = out + wide_row * ob + head * oh + wide_first * ol
    o = load_tile(o_at, ol, first, q_len, q_block, value_dim, value_padded, False)
    l_at = wide_row * lb + head * lh + places.to(tl.int64) * ll
    sums = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if has_grad_lse:
        sums -= tl.load(grad_lse + l_at, mask=live, other=0.0)
    tl.store(delta + l_at, sums, mask=live)  # parts of one row store the same
    norm = tl.load(lse + l_at, mask=live, other=-float("inf"))
    norm = tl.where(norm == -float("inf"), float("inf"), norm * LOG2E)
    k_at = key + wide_row * kb + (head // kv_group) * kh
    v_at = value + wide_row * vb + (head // kv_group) * vh
    steps = scale * LOG2E
    acc = tl.zeros([q_block, padded], tl.float32)
    for at in tl.range(begin, stop, num_stages=stages):
        entry = tl.load(entries + at)
        k_first = (entry >> 1) * kv_block
        k = load_tile(k_at + k_first.to(tl.int64) * kl, kl, k_first, kv_len, kv_block, dim, padded, even)
        v = load_tile(v_at + k_first.to(tl.int64) * vl, vl, k_first, kv_len, kv_block, value_dim, value_padded, even)
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        from_values = tl.dot(do, tl.trans(v), input_precision=precision)
        weights = tl.exp2(scores * steps - norm[:, None])
        if (entry & 1) != 0:
            k_places = k_first + tl.arange(0, kv_block)
            kept = keep((places + q_start)[:, None], k_places[None, :], head, row, numbers, tables)
            weights = tl.where(kept & (k_places < kv_len)[None, :], weights, 0.0)
        grad_scores = (weights * (from_values - sums[:, None])).to(k.dtype)
        acc = tl.dot(grad_scores, k, acc, input_precision=precision)
    acc *= scale
    if slot >= 0:
        place = tl.program_id(1).to(tl.int64) * num_slots + slot
        store_tile(part + place * q_block * padded, padded, 0, q_block, acc, q_block, padded, padded)
    else:
        d_at = grad_query + wide_row * db + head * dh + wide_first * dl
        store_tile(d_at, dl, first, q_len, acc, q_block, dim, padded)


@triton.jit(do_not_specialize=["q_len", "kv_len", "q_start", "num_slots", "numbers", "num_q_blocks"])
def key_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, part_key, part_value, pieces, entries,
    numbers, tables,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, gb, gh, gl, lb, lh, ll, db, dh, dl, eb, eh, el,
    q_len, kv_len, q_start, num_slots, num_q_blocks, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, kv_block: tl.constexpr,
    even: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. even: whether every block of queries is whole."""
    piece = pieces + tl.program_id(0) * 6
    row = tl.load(piece) + tl.program_id(1)
    kv_head = tl.load(piece + 1)
    first = tl.load(piece + 2) * kv_block
    begin = tl.load(piece + 3)
    stop = tl.load(piece + 4)
    slot = tl.load(piece + 5)
    wide_row = row.to(tl.int64)
    wide_first = first.to(tl.int64)
    places = first + tl.arange(0, kv_block)
    k_at = key + wide_row * kb + kv_head * kh + wide_first * kl
    k = load_tile(k_at, kl, first, kv_len, kv_block, dim, padded, False)
    v_at = value + wide_row * vb + kv_head * vh + wide_first * vl
    v = load_tile(v_at, vl, first, kv_len, kv_block, value_dim, value_padded, False)
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
        wide_q = q_first.to(tl.int64)
        q_places = q_first + tl.arange(0, q_block)
        q_at = query + wide_row * qb + head * qh + wide_q * ql
        q = load_tile(q_at, ql, q_first, q_len, q_block, dim, padded, even)
        l_at = wide_row * lb + head * lh + q_places.to(tl.int64) * ll
        norm = tl.load(lse + l_at, mask=q_places < q_len, other=-float("inf"))
        norm = tl.where(norm == -float("inf"), float("inf"), norm * LOG2E)
        scores = tl.dot(k, tl.trans(q), input_precision=precision)
        weights = tl.exp2(scores * steps - norm[None, :])
        if (entry & 1) != 0:
            kept = keep((q_places + q_start)[None, :], places[:, None], head, row, numbers, tables)
            weights = tl.where(kept, weights, 0.0)
        g_at = grad_out + wide_row * gb + head * gh + wide_q * gl
        do = load_tile(g_at, gl, q_first, q_len, q_block, value_dim, value_padded, even)
        from_values = tl.dot(v, tl.trans(do), input_precision=precision)
        acc_value = tl.dot(weights.to(do.dtype), do, acc_value, input_precision=precision)
        sums = tl.load(delta + l_at, mask=q_places < q_len, other=0.0)
        grad_scores = (weights * (from_values - sums[None, :])).to(q.dtype)
        acc_key = tl.dot(grad_scores, q, acc_key, input_precision=precision)
    acc_key *= scale
    if slot >= 0:
        place = tl.program_id(1).to(tl.int64) * num_slots + slot
        store_tile(part_key + place * kv_block * padded, padded, 0, kv_block, acc_key, kv_block, padded, padded)
        at_value = part_value + place * kv_block * value_padded
        store_tile(at_value, value_padded, 0, kv_block, acc_value, kv_block, value_padded, value_padded)
    else:
        d_at = grad_key + wide_row * db + kv_head * dh + wide_first * dl
        store_tile(d_at, dl, first, kv_len, acc_key, kv_block, dim, padded)
        e_at = grad_value + wide_row * eb + kv_head * eh + wide_first * el
        store_tile(e_at, el, first, kv_len, acc_value, kv_block, value_dim, value_padded)


@triton.jit(do_not_specialize=["length", "num_slots"])
def sum_kernel(
    part, into, joints, ib, ih, il, length, num_slots,
    width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """One row of a block that was cut, a program each: the sum of its slots. Joints are those of `merge_kernel`."""
    joint = joints + (tl.program_id(0) // block) * 5
    inside = tl.program_id(0) % block
    row = (tl.load(joint) + tl.program_id(1)).to(tl.int64)
    head = tl.load(joint + 1)
    place = tl.load(joint + 2) * block + inside
    first = tl.program_id(1).to(tl.int64) * num_slots + tl.load(joint + 3)
    count = tl.load(joint + 4)
    channels = tl.arange(0, padded)
    acc = tl.zeros([padded], tl.float32)
    for start in range(0, count, chunk):
        slots = start + tl.arange(0, chunk)
        at = part + ((first + slots) * block + inside)[:, None] * padded + channels[None, :]
        acc += tl.sum(tl.load(at, mask=(slots < count)[:, None], other=0.0), 0)
    if place < length:
        into_at = into + row * ib + head * ih + place.to(tl.int64) * il + channels
        tl.store(into_at, acc.to(into.dtype.element_ty), mask=channels < width)
