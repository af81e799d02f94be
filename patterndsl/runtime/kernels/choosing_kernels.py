"""The kernels of choosing: blocks become rows of numbers, and a tile of rows keeps the best of all blocks.

A candidate is one integer, its score above its place, so that the greater of two is always the one to list: scores in
the order of numbers, equal ones from the first block on. Blocks pass in strips, the best stay in registers, and nothing
is written but lists. A strip that has nothing better costs one look at it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import head_offset

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Of float32: what is no number stands there, above what is no candidate."""
NOWHERE = tl.constexpr(-(2**63))
EVERYWHERE = tl.constexpr(2**63 - 1)
PLACES = tl.constexpr(2**31 - 1)
"""The last block there could be; `block ^ PLACES` counts down from it."""


# ---- blocks as rows of numbers


@triton.jit
def _block(x, start, stride, length, offset, blocks, turn, size, positions: tl.constexpr, dim, padded: tl.constexpr):
    """[blocks, positions, padded] of some positions of each of some blocks, and which of them are there."""
    inside = turn + tl.arange(0, positions)
    at = blocks[:, None] * size + inside[None, :] - offset
    there = (inside < size)[None, :] & (at >= 0) & (at < length)
    channels = tl.arange(0, padded)
    place = start + (at.to(tl.int64) * stride)[:, :, None] + channels[None, None, :]
    live = there[:, :, None] & (channels < dim)[None, None, :]
    return tl.load(x + place, mask=live, other=0.0).to(tl.float32), there


@triton.jit
def _store_blocks(into, first, blocks, num_blocks, tile, dim: tl.constexpr, padded: tl.constexpr):
    channels = tl.arange(0, padded)
    at = (first + blocks).to(tl.int64) * dim
    live = (blocks < num_blocks)[:, None] & (channels < dim)[None, :]
    tl.store(into + at[:, None] + channels[None, :], tile, mask=live)


@triton.jit
def _pool_means(
    x, into, row_stride, head_stride, stride, turn, heads, length, offset, size, num_blocks,
    at_once: tl.constexpr, positions: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """The mean of each of some blocks of a batch row and head, of those positions that are there."""
    tiles = tl.cdiv(num_blocks, at_once)
    list_of = turn // tiles
    blocks = (turn % tiles) * at_once + tl.arange(0, at_once)
    start = head_offset(row_stride, head_stride, list_of // heads, list_of % heads)
    total = tl.zeros([at_once, padded], tl.float32)
    for step in range(0, size, positions):
        tile, _ = _block(x, start, stride, length, offset, blocks, step, size, positions, dim, padded)
        total += tl.sum(tile, 1)
    first = blocks * size - offset
    number = tl.minimum(first + size, length) - tl.maximum(first, 0)
    means = tl.div_rn(total, tl.maximum(number, 1).to(tl.float32)[:, None] + tl.zeros_like(total))
    _store_blocks(into, list_of * num_blocks, blocks, num_blocks, means, dim, padded)


@triton.jit
def _pool_bounds(
    x, into, row_stride, head_stride, stride, turn, heads, length, size, num_blocks, apart,
    at_once: tl.constexpr, positions: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """The greatest and, `apart` numbers behind it, the least of each channel; what is no number is the greatest."""
    tiles = tl.cdiv(num_blocks, at_once)
    list_of = turn // tiles
    blocks = (turn % tiles) * at_once + tl.arange(0, at_once)
    start = head_offset(row_stride, head_stride, list_of // heads, list_of % heads)
    most = tl.full([at_once, padded], -float("inf"), tl.float32)
    least = tl.full([at_once, padded], float("inf"), tl.float32)
    strange = tl.zeros([at_once, padded], tl.int32)
    for step in range(0, size, positions):
        tile, there = _block(x, start, stride, length, 0, blocks, step, size, positions, dim, padded)
        most = tl.maximum(most, tl.max(tl.where(there[:, :, None], tile, -float("inf")), 1))
        least = tl.minimum(least, tl.min(tl.where(there[:, :, None], tile, float("inf")), 1))
        strange = tl.maximum(strange, tl.max((tile != tile).to(tl.int32), 1))
    first = list_of * num_blocks
    _store_blocks(into, first, blocks, num_blocks, tl.where(strange > 0, float("nan"), most), dim, padded)
    _store_blocks(into + apart, first, blocks, num_blocks, least, dim, padded)


@triton.jit(
    do_not_specialize=[
        "q_heads", "kv_heads", "q_len", "kv_len", "q_offset", "per", "of", "num_rows", "num_blocks", "of_queries",
    ]
)  # fmt: skip
def pool_kernel(
    query, key, rows, blocks, qb, qh, ql, kb, kh, kl,
    q_heads, kv_heads, q_len, kv_len, q_offset, per, of, num_rows, num_blocks, of_queries, apart,
    by_bounds: tl.constexpr, q_at_once: tl.constexpr, q_positions: tl.constexpr, k_at_once: tl.constexpr,
    k_positions: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Blocks of queries in the first `of_queries` programs, of keys in the others; float32 [B, H, blocks, dim]."""
    turn = tl.program_id(0)
    if turn < of_queries:
        _pool_means(
            query, rows, qb, qh, ql, turn, q_heads, q_len, q_offset, per, num_rows, q_at_once, q_positions, dim, padded
        )  # fmt: skip
    else:
        turn -= of_queries
        if by_bounds:
            _pool_bounds(
                key, blocks, kb, kh, kl, turn, kv_heads, kv_len, of, num_blocks, apart, k_at_once, k_positions, dim,
                padded,
            )  # fmt: skip
        else:
            _pool_means(
                key, blocks, kb, kh, kl, turn, kv_heads, kv_len, 0, of, num_blocks, k_at_once, k_positions, dim, padded
            )  # fmt: skip


# ---- the best of all blocks


@triton.jit
def _begun(row_block: tl.constexpr, kept: tl.constexpr, width):
    """Nothing yet in `width` places, each other than the others; what is behind them is never the least."""
    places = tl.arange(0, kept).to(tl.int64)
    empty = tl.where(places < width, places + (NOWHERE + 1), EVERYWHERE)
    return tl.zeros([row_block, kept], tl.int64) + empty[None, :]


@triton.jit
def _asked(keep: tl.constexpr, units, blocks, inside, numbers, tables):
    """Where a predicate holds, of those pairs that there are. units: of queries, counted from the first of all."""
    q, k = units[:, None], blocks[None, :]
    return keep(q, k, q, k, 0, 0, numbers, tables) & inside


@triton.jit
def _improved(best, scores, may, must, blocks):
    """The best of what was and of a strip of scores."""
    scores = tl.where(scores != scores, LOWEST, scores)
    scores = tl.where(scores == 0, 0.0, scores)  # of either sign
    scores = tl.where(must, float("inf"), tl.where(may, scores, -float("inf")))
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    strip = (ordered.to(tl.int64) << 32) + (blocks ^ PLACES).to(tl.int64)[None, :]
    strip = tl.where(scores == -float("inf"), NOWHERE, strip)
    is_better = 1
    while is_better > 0:
        most, least = tl.max(strip, 1), tl.min(best, 1)
        best = tl.where(best == least[:, None], tl.maximum(most, least)[:, None], best)
        strip = tl.where(strip == most[:, None], NOWHERE, strip)
        is_better = tl.max((most > least).to(tl.int32), 0)
    return best


@triton.jit
def _store_lists(lists, best, rows, num_rows, width, row, head, heads, copies, kept: tl.constexpr):
    """Blocks in ascending order, -1 for none before them, for each of `copies` heads of lists."""
    places = tl.arange(0, kept)
    block = (best & PLACES).to(tl.int32) ^ PLACES
    block = tl.where(best < NOWHERE + 1 + kept, (places - kept)[None, :], block)
    block = tl.where((places < width)[None, :], block, PLACES)
    for place in range(width):
        least = tl.min(block, 1)
        block = tl.where(block == least[:, None], PLACES, block)
        for copy in range(copies):
            first = ((row * heads + head) * copies + copy).to(tl.int64) * num_rows
            at = lists + (first + rows) * width + place
            tl.store(at, tl.maximum(least, -1).to(lists.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def _query_rows(
    query, qb, qh, ql, row, group, summed, rows, num_rows, channels, dim: tl.constexpr,
    sign: tl.constexpr,
):  # fmt: skip
    """[rows, channels] in float32: the sum of a group of `summed` heads. sign: 1 or -1 where only such numbers count,
    else 0."""
    total = tl.zeros([rows.shape[0], channels.shape[0]], tl.float32)
    live = (rows < num_rows)[:, None] & (channels < dim)[None, :]
    for turn in range(summed):
        start = query + head_offset(qb, qh, row, group * summed + turn)
        tile = tl.load(start + (rows.to(tl.int64) * ql)[:, None] + channels[None, :], mask=live, other=0.0)
        tile = tile.to(tl.float32)
        if sign > 0:
            tile = tl.where(tile < 0, 0.0, tile)
        elif sign < 0:
            tile = tl.where(tile > 0, 0.0, tile)
        total += tile
    return total


@triton.jit
def _key_columns(key, kb, kh, kl, row, head, blocks, num_blocks, channels, dim: tl.constexpr):
    """[channels, blocks] in float32."""
    live = (blocks < num_blocks)[:, None] & (channels < dim)[None, :]
    start = key + head_offset(kb, kh, row, head)
    tile = tl.load(start + (blocks.to(tl.int64) * kl)[:, None] + channels[None, :], mask=live, other=0.0)
    return tl.trans(tile.to(tl.float32))


@triton.jit(
    do_not_specialize=["num_rows", "num_blocks", "first_row", "width", "copies", "groups", "summed", "shared"]
)  # fmt: skip
def choose_kernel(
    query, most, least, lists, may_numbers, may_tables, must_numbers, must_tables, qb, qh, ql, kb, kh, kl,
    num_rows, num_blocks, first_row, width, copies, groups, summed, shared,
    may: tl.constexpr, must: tl.constexpr, by_bounds: tl.constexpr, dim: tl.constexpr,
    chunk: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of rows, heads of lists, batch rows), the last rows first. query: [B, H, rows, dim]; most: of keys
    [B, Hkv, blocks, dim], means where there are no bounds. A list is of `groups` groups of `summed` heads of queries;
    `shared` groups have one head of keys."""
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * row_block + tl.arange(0, row_block)
    head = tl.program_id(1)
    row = tl.program_id(2)
    best = _begun(row_block, kept, width)
    chunks: tl.constexpr = (dim + chunk - 1) // chunk
    for first in range(0, num_blocks, column_block):
        blocks = first + tl.arange(0, column_block)
        inside = (rows < num_rows)[:, None] & (blocks < num_blocks)[None, :]
        is_may = _asked(may, rows + first_row, blocks, inside, may_numbers, may_tables)
        is_must = _asked(must, rows + first_row, blocks, inside, must_numbers, must_tables)
        if tl.max(tl.max((is_may | is_must).to(tl.int32), 1), 0) > 0:
            scores = tl.zeros([row_block, column_block], tl.float32)
            for turn in range(groups * chunks):
                channels = (turn % chunks) * chunk + tl.arange(0, chunk)
                group = head * groups + turn // chunks
                kv_head = group // shared
                if by_bounds:
                    y = _key_columns(most, kb, kh, kl, row, kv_head, blocks, num_blocks, channels, dim)
                    x = _query_rows(query, qb, qh, ql, row, group, summed, rows, num_rows, channels, dim, 1)
                    scores = tl.dot(x, y, scores, input_precision="tf32x3")
                    y = _key_columns(least, kb, kh, kl, row, kv_head, blocks, num_blocks, channels, dim)
                    x = _query_rows(query, qb, qh, ql, row, group, summed, rows, num_rows, channels, dim, -1)
                    scores = tl.dot(x, y, scores, input_precision="tf32x3")
                else:
                    y = _key_columns(most, kb, kh, kl, row, kv_head, blocks, num_blocks, channels, dim)
                    x = _query_rows(query, qb, qh, ql, row, group, summed, rows, num_rows, channels, dim, 0)
                    scores = tl.dot(x, y, scores, input_precision="tf32x3")
            best = _improved(best, scores, is_may, is_must, blocks)
    _store_lists(lists, best, rows, num_rows, width, row, head, tl.num_programs(1), copies, kept)


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "first_row", "width"])
def pick_kernel(
    given, lists, may_numbers, may_tables, must_numbers, must_tables, sb, sh, sl,
    num_rows, num_blocks, first_row, width,
    may: tl.constexpr, must: tl.constexpr, row_block: tl.constexpr, column_block: tl.constexpr, kept: tl.constexpr,
):  # fmt: skip
    """The same of scores [B, H, rows, blocks] that are there."""
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * row_block + tl.arange(0, row_block)
    head = tl.program_id(1)
    row = tl.program_id(2)
    best = _begun(row_block, kept, width)
    start = given + head_offset(sb, sh, row, head)
    for first in range(0, num_blocks, column_block):
        blocks = first + tl.arange(0, column_block)
        inside = (rows < num_rows)[:, None] & (blocks < num_blocks)[None, :]
        is_may = _asked(may, rows + first_row, blocks, inside, may_numbers, may_tables)
        is_must = _asked(must, rows + first_row, blocks, inside, must_numbers, must_tables)
        at = start + (rows.to(tl.int64) * sl)[:, None] + blocks[None, :]
        scores = tl.load(at, mask=is_may, other=0.0).to(tl.float32)
        best = _improved(best, scores, is_may, is_must, blocks)
    _store_lists(lists, best, rows, num_rows, width, row, head, tl.num_programs(1), 1, kept)
