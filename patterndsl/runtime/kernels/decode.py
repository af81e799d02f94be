"""The decoding kernel: attention of the newest queries to what a store holds, see `runtime.decoding`.

Grid: (splits, key heads, batch rows). A program has a span of a row's places: those of the ring's pages come first,
then those of keys that last. The query heads of a key head lie in one tile with their positions. What a kernel waits
for is memory, so that no program asks for more than two things in turn: which page, beside the lengths, and then keys
and values together. Splits leave parts. The last program of a head to come merges them, always in the same order, or
where that were too much for one program, a second kernel does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

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


@triton.jit
def normalised(top, total, acc):
    """Output and lse of a running softmax; 0 and -inf where nothing was kept."""
    empty = total == 0.0
    lse = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    return acc / tl.where(empty, 1.0, total)[:, None], lse


@triton.jit
def store_rows(
    out, lse, row, kv_at, inside, is_stored, found, norms, ob, oh, orow, lb, lh, lr,
    value_dim: tl.constexpr, value_padded: tl.constexpr,
):  # fmt: skip
    channels = tl.arange(0, value_padded)
    at = out + row.to(tl.int64) * ob + kv_at * oh + inside[:, None] * orow + channels[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=is_stored[:, None] & (channels < value_dim)[None, :])
    tl.store(lse + row.to(tl.int64) * lb + kv_at * lh + inside * lr, norms, mask=is_stored)


@triton.jit
def store_merged(
    part_out, part_lse, first, num_splits, num_rows, start_row, out, lse, row, kv_at, first_row,
    ob, oh, orow, lb, lh, lr,
    value_dim: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`rows` rows from start_row on, from parts: those of a head from `first` on, `block` splits at a time.

    They may just have been written by other processors, so they are read from where all of these meet.
    """
    inside = start_row + tl.arange(0, rows)
    channels = tl.arange(0, padded)
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, padded], tl.float32)
    for start in range(0, num_splits, block):
        split = start + tl.arange(0, block)
        parts = (first + split)[:, None] * num_rows + inside[None, :]
        is_there = (split < num_splits)[:, None] & (inside < num_rows)[None, :]
        at = part_out + parts[:, :, None] * padded + channels[None, None, :]
        tile = tl.load(at, mask=is_there[:, :, None], other=0.0, cache_modifier=".cg")
        norms = tl.load(part_lse + parts, mask=is_there, other=-float("inf"), cache_modifier=".cg") * LOG2E
        higher = tl.maximum(top, tl.max(norms, 0))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        shares = tl.exp2(norms - shift[None, :])
        shrink = tl.exp2(top - shift)
        acc = acc * shrink[:, None] + tl.sum(tile * shares[:, :, None], 0)
        total = total * shrink + tl.sum(shares, 0)
        top = higher
    found, norms = normalised(top, total, acc)
    store_rows(
        out, lse, row, kv_at, first_row + inside, inside < num_rows, found, norms, ob, oh, orow, lb, lh, lr,
        value_dim, padded,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("table_width", "ring", "ring_pages", "num_places", "span", "first_row", "num_rows", "back", "num_splits"),
        "numbers",
    ]
)
def decode_kernel(
    query, keys, values, out, lse, part_out, part_lse, tickets, table, lengths, older, lasting, kv_heads,
    numbers, tables,
    qb, qh, qr, ob, oh, orow, lb, lh, lr,
    num_heads, table_width, ring, ring_pages, num_places, span, first_row, num_rows, back, num_splits, scale,
    keep: tl.constexpr, kv_group: tl.constexpr, q_len: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, q_block: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    skips: tl.constexpr, is_cut: tl.constexpr, merge_rows: tl.constexpr, merge_block: tl.constexpr,
    starts_early: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """query: [B, heads, kv_group * q_len, D], of which num_rows rows from first_row on are attended, of at most a
    q_block; keys, values: pages of a store. num_places: of the row that has most; span: places of a split, a multiple
    of `tile`, which are read at once. back: how many positions before the next one the first query stands. skips:
    whether many tiles have nothing that is kept: then the predicate says first what is read. is_cut: whether there are
    several splits. merge_rows: a power of two, num_rows at least, where the last split merges them; else 0. tickets:
    int32 [B, heads], 0, which it is again afterwards."""
    split = tl.program_id(0)
    kv_at = tl.program_id(1)
    row = tl.program_id(2)
    begin = split * span
    stop = tl.minimum(begin + span, num_places)
    if starts_early:
        cuda.gdc_launch_dependents()
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
            k = load_tile(keys, page, place % rows, kv_at, num_heads, needed, rows, dim, padded)
            v = load_tile(values, page, place % rows, kv_at, num_heads, needed, rows, value_dim, value_padded)
            page = pages_at(pages, start + tile, stop, rows, tile)
            last = tl.load(lasting + rank, mask=is_older, other=-1)
            k_place = tl.where(rank < 0, in_ring, last)[None, :]
            kept = keep(q_place, k_place, q_place, k_place, head[:, None], row, numbers, tables)
            kept = kept & (is_newest | is_older)[None, :] & is_row[:, None]
            top, total, acc = attend_tile(q, k, v, kept, steps, top, total, acc, precision)
    found, norms = normalised(top, total, acc)
    if is_cut:
        first = (row.to(tl.int64) * num_heads + kv_at) * num_splits
        parts = (first + split) * num_rows + tl.arange(0, q_block)
        value_channels = tl.arange(0, value_padded)
        tl.store(part_out + parts[:, None] * value_padded + value_channels[None, :], found, mask=is_stored[:, None])
        tl.store(part_lse + parts, norms, mask=is_stored)
        if merge_rows:
            tl.debug_barrier()  # all threads have written before one of them says so
            ticket = tickets + row * num_heads + kv_at
            if tl.atomic_add(ticket, 1, sem="acq_rel") == num_splits - 1:
                store_merged(
                    part_out, part_lse, first, num_splits, num_rows, 0, out, lse, row, kv_at, first_row,
                    ob, oh, orow, lb, lh, lr, value_dim, value_padded, merge_rows, merge_block,
                )  # fmt: skip
                tl.store(ticket, 0)
    else:
        store_rows(
            out, lse, row, kv_at, inside, is_stored, found, norms, ob, oh, orow, lb, lh, lr, value_dim, value_padded,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "num_splits"])
def merge_splits_kernel(
    part_out, part_lse, out, lse, ob, oh, orow, lb, lh, lr, first_row, num_splits,
    value_dim: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, starts_early: tl.constexpr,
):  # fmt: skip
    """A row from its splits, `block` of them at a time. Grid: (rows, key heads, batch rows). starts_early: whether it
    may be launched while the kernel before it runs."""
    if starts_early:
        cuda.gdc_wait()
    at_row, kv_at, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_rows, num_heads = tl.num_programs(0), tl.num_programs(1)
    first = (row.to(tl.int64) * num_heads + kv_at) * num_splits
    store_merged(
        part_out, part_lse, first, num_splits, num_rows, at_row, out, lse, row, kv_at, first_row,
        ob, oh, orow, lb, lh, lr, value_dim, value_padded, 1, block,
    )  # fmt: skip
