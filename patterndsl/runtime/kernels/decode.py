"""The decoding kernel: attention of the newest queries to what a store holds, see `runtime.decoding`.

Grid: (splits, key heads, batch rows). A program has some of a row's pages: those of the ring come first, then those of
keys that last. The query heads of a key head lie in one tile with their positions. What the predicate drops is not
read, and a page without anything that is kept costs the asking alone. Splits leave parts, which a second kernel merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import LN2, LOG2E


@triton.jit
def place_of_tile(
    page, kv_head, num_heads, rows: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Offsets of the rows of a page of [pages, heads, rows, width]."""
    first = (page * num_heads + kv_head) * (rows * width)
    return first + tl.arange(0, rows)[:, None] * width + tl.arange(0, padded)[None, :]


@triton.jit
def attend_page(
    q, keys, values, page, kv_head, num_heads, kept, needed, steps, top, total, acc,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr,
    rows: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The running softmax with what is kept of one page. needed: the rows that are read; others may be anything."""
    k_at = place_of_tile(page, kv_head, num_heads, rows, dim, padded)
    k = tl.load(keys + k_at, mask=needed[:, None] & (tl.arange(0, padded) < dim)[None, :], other=0.0)
    v_at = place_of_tile(page, kv_head, num_heads, rows, value_dim, value_padded)
    v = tl.load(values + v_at, mask=needed[:, None] & (tl.arange(0, value_padded) < value_dim)[None, :], other=0.0)
    scores = tl.where(kept, tl.dot(q, tl.trans(k), input_precision=precision), -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * steps)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * steps - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return higher, total, acc


@triton.jit(
    do_not_specialize=["table_width", "ring", "ring_pages", "first_row", "num_rows", "back", "num_splits", "numbers"]
)
def decode_kernel(
    query, keys, values, out, lse, part_out, part_lse, table, lengths, older, lasting, kv_heads, numbers, tables,
    qb, qh, qr, ob, oh, orow, lb, lh, lr,
    num_heads, table_width, ring, ring_pages, first_row, num_rows, back, num_splits, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, q_len: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, rows: tl.constexpr,
    skips: tl.constexpr, is_cut: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """query: [B, heads, kv_group * q_len, D], of which num_rows rows from first_row on are attended, of at most a
    q_block; keys, values: pages of a store. back: how many positions before the next one the first query stands.
    skips: whether many pages have nothing that is kept; is_cut: whether there are several splits."""
    split = tl.program_id(0)
    kv_at = tl.program_id(1)
    row = tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    num_older = tl.load(older + row).to(tl.int32)
    in_ring = (tl.minimum(length, ring) + rows - 1) // rows
    num_blocks = in_ring + (num_older + rows - 1) // rows
    begin = (num_blocks.to(tl.int64) * split // num_splits).to(tl.int32)
    stop = (num_blocks.to(tl.int64) * (split + 1) // num_splits).to(tl.int32)
    inside = first_row + tl.arange(0, q_block)
    head = tl.load(kv_heads + kv_at) * kv_group + inside // q_len
    places = length - back + inside % q_len
    is_row = (inside < first_row + num_rows) & (places >= 0)
    channels = tl.arange(0, padded)
    q_at = query + row.to(tl.int64) * qb + kv_at * qh + inside[:, None] * qr + channels[None, :]
    q = tl.load(q_at, mask=is_row[:, None] & (channels < dim)[None, :], other=0.0)
    steps = scale * LOG2E
    top = tl.full([q_block], -float("inf"), tl.float32)
    total = tl.zeros([q_block], tl.float32)
    acc = tl.zeros([q_block, value_padded], tl.float32)
    pages = table + row.to(tl.int64) * table_width
    turns = tl.maximum(ring, 1)
    for at in tl.range(begin, stop):
        is_ring = at < in_ring
        page = tl.load(pages + tl.where(is_ring, at, ring_pages + at - in_ring)).to(tl.int64)
        place = at * rows + tl.arange(0, rows)
        behind = (length - 1 - place) % turns  # how far behind the newest: of a place that is not taken yet, too far
        newest = length - 1 - tl.where(behind < 0, behind + turns, behind)
        rank = (at - in_ring) * rows + tl.arange(0, rows)
        is_older = (rank >= 0) & (rank < num_older)
        last = tl.load(lasting + rank, mask=is_older, other=-1)
        k_places = tl.where(is_ring, tl.where(place < ring, newest, -1), last)
        q_place, k_place = places[:, None], k_places[None, :]
        kept = keep(q_place, k_place, q_place, k_place, head[:, None], row, numbers, tables)
        kept = kept & (k_places >= 0)[None, :] & is_row[:, None]
        needed = tl.max(kept.to(tl.int32), 0) > 0
        if skips:
            if tl.max(needed.to(tl.int32), 0) > 0:
                top, total, acc = attend_page(
                    q, keys, values, page, kv_at, num_heads, kept, needed, steps, top, total, acc,
                    dim, value_dim, padded, value_padded, rows, precision,
                )  # fmt: skip
        else:
            top, total, acc = attend_page(
                q, keys, values, page, kv_at, num_heads, kept, needed, steps, top, total, acc,
                dim, value_dim, padded, value_padded, rows, precision,
            )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    is_stored = inside < first_row + num_rows
    value_channels = tl.arange(0, value_padded)
    if is_cut:
        parts = ((row.to(tl.int64) * num_heads + kv_at) * num_splits + split) * num_rows + tl.arange(0, q_block)
        tl.store(part_out + parts[:, None] * value_padded + value_channels[None, :], acc, mask=is_stored[:, None])
        tl.store(part_lse + parts, found, mask=is_stored)
    else:
        out_at = out + row.to(tl.int64) * ob + kv_at * oh + inside[:, None] * orow + value_channels[None, :]
        is_written = is_stored[:, None] & (value_channels < value_dim)[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_written)
        tl.store(lse + row.to(tl.int64) * lb + kv_at * lh + inside * lr, found, mask=is_stored)


@triton.jit(do_not_specialize=["first_row", "num_splits"])
def merge_splits_kernel(
    part_out, part_lse, out, lse, ob, oh, orow, lb, lh, lr, first_row, num_splits,
    value_dim: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A row from its splits, `block` of them at a time. Grid: (rows, key heads, batch rows)."""
    inside, kv_at, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_rows, num_heads = tl.num_programs(0), tl.num_programs(1)
    channels = tl.arange(0, value_padded)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([value_padded], tl.float32)
    for start in range(0, num_splits, block):
        split = start + tl.arange(0, block)
        parts = ((row * num_heads + kv_at) * num_splits + split) * num_rows + inside
        is_there = split < num_splits
        norms = tl.load(part_lse + parts, mask=is_there, other=-float("inf")) * LOG2E
        at = part_out + parts[:, None] * value_padded + channels[None, :]
        tile = tl.load(at, mask=is_there[:, None], other=0.0)
        higher = tl.maximum(top, tl.max(norms, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        shares = tl.exp2(norms - shift)
        shrink = tl.exp2(top - shift)
        acc = acc * shrink + tl.sum(tile * shares[:, None], 0)
        total = total * shrink + tl.sum(shares, 0)
        top = higher
    empty = total == 0.0
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    merged = acc / tl.where(empty, 1.0, total)
    place = first_row + inside
    out_at = out + row * ob + kv_at * oh + place * orow + channels
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=channels < value_dim)
    tl.store(lse + row * lb + kv_at * lh + place * lr, found)
