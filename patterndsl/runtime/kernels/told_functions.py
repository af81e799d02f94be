"""What do generated verdicts call? Bounds and lists looked up for tiles, as `told.TileData` has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bounds_between(tree, half, leaves, length, low, high):
    """Bounds of a table over low..high, as int64: of the one or two blocks, aligned and of as many values, that hold
    its ends; -1 is among them where the range leaves the table.

    tree: minima of aligned blocks, those of 2^n values at leaves >> n; maxima lie `half` behind them.
    """
    low, high = low.to(tl.int64), high.to(tl.int64)
    low, high = low + 0 * high, high + 0 * low
    first = tl.maximum(tl.minimum(low, length - 1), 0)
    last = tl.maximum(tl.minimum(high, length - 1), 0)
    level = first * 0
    for bit in tl.static_range(31):
        level += ((last - first) >> bit > 0).to(tl.int64)
    near, far = (leaves + first) >> level, (leaves + last) >> level
    least = tl.minimum(tl.load(tree + near), tl.load(tree + far))
    most = tl.maximum(tl.load(tree + half + near), tl.load(tree + half + far))
    reaches_out = (low < 0) | (high >= length)
    least = tl.where(reaches_out, tl.minimum(least, -1), least)
    most = tl.where(reaches_out, tl.maximum(most, -1), most)
    misses = (high < 0) | (low >= length)
    return tl.where(misses, -1, least), tl.where(misses, -1, most)


@triton.jit
def lists_block(table, num_blocks, row, block):
    """Whether a row lists a block; a table has a byte for each of them."""
    return tl.load(table + row * num_blocks + block) != 0


@triton.jit
def num_listed(table, num_blocks, first, last, start, stop, down: tl.constexpr, across: tl.constexpr):
    """How many pairs of rows first..last and blocks start..stop are listed, at most down x across."""
    number = (first + start) * 0
    for turn in tl.static_range(down):
        for step in tl.static_range(across):
            row, block = first + turn, start + step
            number += tl.load(table + row * num_blocks + block, mask=(row <= last) & (block <= stop), other=0)
    return number
