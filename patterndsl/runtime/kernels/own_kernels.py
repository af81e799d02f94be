"""The kernels of rows that attend their own key and nothing else, where nothing else is theirs.

What they give is the value itself, and the score is the log-sum-exp. Where all rows of a block have keys, no more is
read than their log-sum-exps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import load_numbers, load_rows, load_tile, store_numbers, store_tile


@triton.jit(do_not_specialize=["length"])
def attend_own_kernel(
    query, key, value, out, lse, alone, qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, lb, lh, ll, length, scale,
    kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr,
    value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, query heads, batch rows). alone: which rows these are, where lse has its numbers."""
    first = tl.program_id(0) * block
    head = tl.program_id(1)
    row = tl.program_id(2)
    rows = load_rows(alone, 0, 0, row, head, first, length, block, False, False)
    is_alone = load_numbers(lse, lb, lh, ll, row, head, rows, 0.0, False) == -float("inf")
    store_numbers(alone, lb, lh, ll, row, head, rows, is_alone.to(tl.int8))
    if tl.max(is_alone.to(tl.int32), 0) > 0:
        kv_head = head // kv_group
        rows = tl.where(is_alone, rows, -1)
        q = load_tile(query, qb, qh, ql, row, head, first, rows, block, dim, padded, False, False)
        k = load_tile(key, kb, kh, kl, row, kv_head, first, rows, block, dim, padded, False, False)
        v = load_tile(value, vb, vh, vl, row, kv_head, first, rows, block, value_dim, value_padded, False, False)
        store_tile(out, ob, oh, ol, row, head, rows, v, value_dim, value_padded)
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        store_numbers(lse, lb, lh, ll, row, head, rows, scores)


@triton.jit(do_not_specialize=["length"])
def own_gradients_kernel(
    query, key, grad_out, grad_lse, alone, grad_query, grad_key, grad_value,
    qb, qh, ql, kb, kh, kl, gb, gh, gl, lb, lh, ll, db, dh, dl, eb, eh, el, fb, fh, fl, length, scale,
    kv_group: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr,
    value_padded: tl.constexpr, has_grad_lse: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """What these rows add to gradients. Grid: (blocks of rows, key heads, batch rows)."""
    first = tl.program_id(0) * block
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    places = load_rows(alone, 0, 0, row, kv_head, first, length, block, False, False)
    for turn in range(kv_group):
        head = kv_head * kv_group + turn
        is_alone = load_numbers(alone, lb, lh, ll, row, head, places, 0, False) > 0
        if tl.max(is_alone.to(tl.int32), 0) > 0:
            rows = tl.where(is_alone, places, -1)
            of_value = load_tile(
                grad_value, fb, fh, fl, row, kv_head, first, rows, block, value_dim, value_padded, False, False
            ).to(tl.float32)
            of_value += load_tile(
                grad_out, gb, gh, gl, row, head, first, rows, block, value_dim, value_padded, False, False
            )
            store_tile(grad_value, fb, fh, fl, row, kv_head, rows, of_value, value_dim, value_padded)
            if has_grad_lse:
                of_score = (load_numbers(grad_lse, lb, lh, ll, row, head, rows, 0.0, False) * scale)[:, None]
                q = load_tile(query, qb, qh, ql, row, head, first, rows, block, dim, padded, False, False)
                k = load_tile(key, kb, kh, kl, row, kv_head, first, rows, block, dim, padded, False, False)
                of_query = load_tile(grad_query, db, dh, dl, row, head, first, rows, block, dim, padded, False, False)
                of_key = load_tile(grad_key, eb, eh, el, row, kv_head, first, rows, block, dim, padded, False, False)
                of_query = of_query.to(tl.float32) + of_score * k.to(tl.float32)
                of_key = of_key.to(tl.float32) + of_score * q.to(tl.float32)
                store_tile(grad_query, db, dh, dl, row, head, rows, of_query, dim, padded)
                store_tile(grad_key, eb, eh, el, row, kv_head, rows, of_key, dim, padded)
        tl.debug_barrier()  # the next head may add to the same key
