"""The decoding kernel: attention of the newest queries to what a store holds, see `runtime.decoding`.

Grid: (splits, key heads, batch rows). A program has a span of a row's places: those of the ring's pages come first,
then those of keys that last. The query heads of a key head lie in one tile with their positions. What a kernel waits
for is memory, so that a program first asks for all that says where keys and values are, and then for these. Splits
leave parts, which a second kernel merges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import LN2, LOG2E


@triton.jit
def pages_at(table, start, num_places, rows: tl.constexpr, tile: tl.constexpr):
    """int32 [tile]: in which pages the places from `start` on are, of `rows` places each; -1 where there is none."""
    if tile <= rows:
        page = tl.load(table + start // rows, mask=start < num_places, other=-1) + tl.zeros([tile], tl.int32)
    else:
        place = start + tl.arange(0, tile)
        page = tl.load(table + place // rows, mask=place < num_places, other=-1)
    return page


@triton.jit
def load_tile(
    pool, page, inside, kv_head, num_heads, needed, rows: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Rows of a pool [pages, heads, rows, width], one of each page; 0 where they are not needed, and may be NaN."""
    channels = tl.arange(0, padded)
    first = (page.to(tl.int64) * num_heads + kv_head) * (rows * width)
    at = (first + inside * width)[:, None] + channels[None, :]
    return tl.load(pool + at, mask=needed[:, None] & (channels < width)[None, :], other=0.0)


@triton.jit
def attend_tile(q, k, v, kept, steps, top, total, acc, precision: tl.constexpr):
    """The running softmax with what is kept of one tile."""
    scores = tl.where(kept, tl.dot(q, tl.trans(k), input_precision=precision), -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * steps)
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * steps - shift[:, None])
    shrink = tl.exp2(top - shift)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return higher, total, acc


@triton.jit(
    do_not_specialize=[
        *("table_width", "ring", "ring_pages", "num_places", "span", "shorter", "first_row", "num_rows", "back"),
        *("num_splits", "numbers"),
    ]
)
def decode_kernel(
    query, keys, values, out, lse, part_out, part_lse, table, lengths, older, lasting, kv_heads, numbers, tables,
    qb, qh, qr, ob, oh, orow, lb, lh, lr,
    num_heads, table_width, ring, ring_pages, num_places, span, shorter, first_row, num_rows, back, num_splits, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, q_len: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    skips: tl.constexpr, is_cut: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """query: [B, heads, kv_group * q_len, D], of which num_rows rows from first_row on are attended, of at most a
    q_block; keys, values: pages of a store. num_places: of the row that has most. tile: places that are read at once.
    span: places of each of the first `shorter` splits, a multiple of `tile`; others have a tile more. back: how many
    positions before the next one the first query stands. skips: whether many tiles have nothing that is kept: then the
    predicate says first what is read. is_cut: whether there are several splits."""
    split = tl.program_id(0)
    kv_at = tl.program_id(1)
    row = tl.program_id(2)
    begin = split * span + tl.maximum(split - shorter, 0) * tile
    stop = tl.minimum(begin + span + tl.where(split < shorter, 0, tile), num_places)
    pages = table + row.to(tl.int64) * table_width
    page = pages_at(pages, begin, num_places, rows, tile)  # first of all, since keys and values wait for it
    length = tl.load(lengths + row).to(tl.int32)
    num_older = tl.load(older + row).to(tl.int32)
    inside = first_row + tl.arange(0, q_block)
    is_stored = inside < first_row + num_rows
    channels = tl.arange(0, padded)
    q_at = query + row.to(tl.int64) * qb + kv_at * qh + inside[:, None] * qr + channels[None, :]
    q = tl.load(q_at, mask=is_stored[:, None] & (channels < dim)[None, :], other=0.0)
    head = tl.load(kv_heads + kv_at) * kv_group + inside // q_len
    places = length - back + inside % q_len
    is_row = is_stored & (places >= 0)
    ring_places = ring_pages * rows
    if skips:  # rows that have less do not look at what they lack
        stop = tl.minimum(stop, tl.where(num_older > 0, ring_places + num_older, tl.minimum(length, ring)))
    turns = tl.maximum(ring, 1)
    newest = (length - 1) % turns  # where in the ring
    steps = scale * LOG2E
    top = tl.full([q_block], -float("inf"), tl.float32)
    total = tl.zeros([q_block], tl.float32)
    acc = tl.zeros([q_block, value_padded], tl.float32)
    for start in tl.range(begin, stop, tile):
        place = start + tl.arange(0, tile)
        behind = newest - place  # how far behind the newest: of a place that is not taken yet, too far
        in_ring = tl.where(place < ring, length - 1 - tl.where(behind < 0, behind + turns, behind), -1)
        rank = place - ring_places
        is_older = (rank >= 0) & (rank < num_older)
        if skips:
            last = tl.load(lasting + rank, mask=is_older, other=-1)
            k_places = tl.where(rank < 0, in_ring, last)
            q_place, k_place = places[:, None], k_places[None, :]
            kept = keep(q_place, k_place, q_place, k_place, head[:, None], row, numbers, tables)
            kept = kept & (k_places >= 0)[None, :] & is_row[:, None]
            needed = tl.max(kept.to(tl.int32), 0) > 0
            if tl.max(needed.to(tl.int32), 0) > 0:
                k = load_tile(keys, page, place % rows, kv_at, num_heads, needed, rows, dim, padded)
                v = load_tile(values, page, place % rows, kv_at, num_heads, needed, rows, value_dim, value_padded)
                top, total, acc = attend_tile(q, k, v, kept, steps, top, total, acc, precision)
            page = pages_at(pages, start + tile, stop, rows, tile)
        else:
            q_place = places[:, None]
            is_newest = (rank < 0) & (in_ring >= 0)
            kept = keep(q_place, in_ring[None, :], q_place, in_ring[None, :], head[:, None], row, numbers, tables)
            kept = kept & is_newest[None, :] & is_row[:, None]
            needed = (tl.max(kept.to(tl.int32), 0) > 0) | is_older  # which does not wait for where the older ones are
            last = tl.load(lasting + rank, mask=is_older, other=-1)
            k = load_tile(keys, page, place % rows, kv_at, num_heads, needed, rows, dim, padded)
            v = load_tile(values, page, place % rows, kv_at, num_heads, needed, rows, value_dim, value_padded)
            page = pages_at(pages, start + tile, stop, rows, tile)
            k_place = tl.where(rank < 0, in_ring, last)[None, :]
            kept = keep(q_place, k_place, q_place, k_place, head[:, None], row, numbers, tables)
            kept = kept & (is_newest | is_older)[None, :] & is_row[:, None]
            top, total, acc = attend_tile(q, k, v, kept, steps, top, total, acc, precision)
    empty = total == 0.0
    found = acc / tl.where(empty, 1.0, total)[:, None]
    norms = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    value_channels = tl.arange(0, value_padded)
    if is_cut:
        parts = ((row.to(tl.int64) * num_heads + kv_at) * num_splits + split) * num_rows + tl.arange(0, q_block)
        tl.store(part_out + parts[:, None] * value_padded + value_channels[None, :], found, mask=is_stored[:, None])
        tl.store(part_lse + parts, norms, mask=is_stored)
    else:
        at = out + row.to(tl.int64) * ob + kv_at * oh + inside[:, None] * orow + value_channels[None, :]
        is_written = is_stored[:, None] & (value_channels < value_dim)[None, :]
        tl.store(at, found.to(out.dtype.element_ty), mask=is_written)
        tl.store(lse + row.to(tl.int64) * lb + kv_at * lh + inside * lr, norms, mask=is_stored)


@triton.jit(do_not_specialize=["first_row", "num_splits"])
def merge_splits_kernel(
    part_out, part_lse, out, lse, ob, oh, orow, lb, lh, lr, first_row, num_splits,
    value_dim: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`width` channels of a row from its splits, `block` of them at once, always in the same order.

    Grid: (rows times pieces of the channels, key heads, batch rows).
    """
    pieces: tl.constexpr = value_padded // width
    piece, inside = tl.program_id(0) % pieces, tl.program_id(0) // pieces
    kv_at, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_rows, num_heads = tl.num_programs(0) // pieces, tl.num_programs(1)
    channels = piece * width + tl.arange(0, width)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([width], tl.float32)
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
    merged = acc / tl.where(empty, 1.0, total)
    place = first_row + inside
    at = out + row * ob + kv_at * oh + place * orow + channels
    tl.store(at, merged.to(out.dtype.element_ty), mask=channels < value_dim)
    if piece == 0:
        norm = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
        tl.store(lse + row * lb + kv_at * lh + place * lr, norm)
