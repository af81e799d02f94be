"""How does a kernel reach a tile of rows, and join what several pieces of a row computed?

A tile is some rows of a tensor, which lie `stride` apart. Channels lie next to each other, and are filled up with zeros
to a power of two. Where a GPU has an engine that copies tiles by a description of the tensor, that is left to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    x, row_stride, head_stride, stride, row, head, first, count,
    block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, even: tl.constexpr, described: tl.constexpr,
):  # fmt: skip
    """[block, padded] of x [.., .., count, width]: rows from `first` on of a batch row and head, zeros behind the last.

    x: a pointer, or a descriptor of such blocks where it is described. even: whether all blocks are whole.
    """
    if described:
        tile = tl.reshape(x.load([row, head, first, 0]), [block, padded])
    else:
        start = x + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * stride
        at = start + tl.arange(0, block)[:, None] * stride + tl.arange(0, padded)[None, :]
        if even and width == padded:
            tile = tl.load(at)
        else:
            live = (tl.arange(0, block)[:, None] < count - first) & (tl.arange(0, padded)[None, :] < width)
            tile = tl.load(at, mask=live, other=0.0)
    return tile


@triton.jit
def store_tile(
    x, row_stride, head_stride, stride, row, head, first, count, tile,
    block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Writes what `load_tile` would read; x: a pointer."""
    start = x + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * stride
    at = start + tl.arange(0, block)[:, None] * stride + tl.arange(0, padded)[None, :]
    live = (tl.arange(0, block)[:, None] < count - first) & (tl.arange(0, padded)[None, :] < width)
    tl.store(at, tile.to(x.dtype.element_ty), mask=live)


@triton.jit
def store_part(parts, slot, tile, block: tl.constexpr, padded: tl.constexpr):
    """Leaves a part of a row of tiles in its slot of [.., block, padded]."""
    at = parts + slot * (block * padded) + tl.arange(0, block)[:, None] * padded + tl.arange(0, padded)[None, :]
    tl.store(at, tile)


@triton.jit
def row_offset(row_stride, head_stride, stride, row, head, first):
    """Where the first number of some rows of a batch row and head lies."""
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + first.to(tl.int64) * stride


@triton.jit
def load_norm(lse, at, stride, first, count, block: tl.constexpr, even: tl.constexpr):
    """Log-sum-exps of some rows in units of log2; +inf where a row is empty or behind the last, so that its weights
    are 0. at: the offset of the first."""
    norm = load_numbers(lse, at, stride, first, count, -float("inf"), block, even)
    return tl.where(norm == -float("inf"), float("inf"), norm * LOG2E)


@triton.jit
def load_numbers(x, at, stride, first, count, other: tl.constexpr, block: tl.constexpr, even: tl.constexpr):
    """A number of each of some rows, `other` behind the last one."""
    steps = tl.arange(0, block)
    if even:
        found = tl.load(x + at + steps * stride)
    else:
        found = tl.load(x + at + steps * stride, mask=steps < count - first, other=other)
    return found
