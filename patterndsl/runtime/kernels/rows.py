"""How does a kernel reach a tile of rows, and join what several pieces of a row computed?

A tile is some rows of a tensor, which lie `stride` apart. Channels lie next to each other, and are filled up with zeros
to a power of two. Where a GPU has an engine that copies tiles by a description of the tensor, that is left to it.

A launch may have orders, of its queries and of its keys: tables int32 [batch rows, heads, places] of the row that
stands at each place, -1 where nobody does. Tiles are of places, and each row is read and written where it lies. Where
rows stand at several places, each of which has a result of its own, places are called slots, and results are written
where the slots are.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# what `ordered` says, added up; True says that there are orders, and no more
ORDERED = tl.constexpr(1)
BY_SLOT = tl.constexpr(2)  # results are those of slots
APART = tl.constexpr(
    4
)  # so are the output, lse and delta that gradients follow from: each slot is a softmax of its own
PLAIN_KEYS = tl.constexpr(8)  # keys stand where they lie, and have a result each


@triton.jit
def load_rows(
    order, row_stride, head_stride, row, head, first, count,
    block: tl.constexpr, even: tl.constexpr, ordered: tl.constexpr,
):  # fmt: skip
    """Which rows stand at the places from `first` on: these themselves, or those that an order names; -1 behind the
    last of `count` places, and where nobody stands. even: whether there is a row at every place of every block."""
    rows = first + tl.arange(0, block)
    if ordered:
        at = order + head_offset(row_stride, head_stride, row, head) + rows
        if even:
            rows = tl.load(at)
        else:
            rows = tl.load(at, mask=rows < count, other=-1)
    elif not even:
        rows = tl.where(rows < count, rows, -1)
    return rows


@triton.jit
def by_place(rows, places, slots: tl.constexpr):
    """Where numbers of some rows lie: where these do, or where their places are; -1 where nobody stands."""
    if slots:
        rows = tl.where(rows >= 0, places, -1)
    return rows


@triton.jit
def row_at(order, row_stride, head_stride, row, head, place, count, ordered: tl.constexpr):
    """The row of one place, as `load_rows` finds those of a block."""
    found = tl.where(place < count, place, -1)
    if ordered:
        at = order + head_offset(row_stride, head_stride, row, head) + place
        found = tl.load(at, mask=place < count, other=-1)
    return found


@triton.jit
def load_tile(
    x, row_stride, head_stride, stride, row, head, first, rows,
    block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, even: tl.constexpr, described: tl.constexpr,
):  # fmt: skip
    """[block, padded] of x [.., .., count, width]: some rows of a batch row and head, zeros for rows of -1.

    x: a pointer, or a descriptor of such blocks where it is described: then rows are those from `first` on. even:
    whether no row of any block is -1.
    """
    if described:
        tile = tl.reshape(x.load([row, head, first, 0]), [block, padded])
    else:
        start = x + head_offset(row_stride, head_stride, row, head)
        at = start + (rows.to(tl.int64) * stride)[:, None] + tl.arange(0, padded)[None, :]
        if even and width == padded:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=(rows >= 0)[:, None] & (tl.arange(0, padded)[None, :] < width), other=0.0)
    return tile


@triton.jit
def store_tile(
    x, row_stride, head_stride, stride, row, head, rows, tile, width: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Writes what `load_tile` would read; x: a pointer."""
    start = x + head_offset(row_stride, head_stride, row, head)
    at = start + (rows.to(tl.int64) * stride)[:, None] + tl.arange(0, padded)[None, :]
    live = (rows >= 0)[:, None] & (tl.arange(0, padded)[None, :] < width)
    tl.store(at, tile.to(x.dtype.element_ty), mask=live)


@triton.jit
def store_part(parts, slot, tile, block: tl.constexpr, padded: tl.constexpr):
    """Leaves a part of a row of tiles in its slot of [.., block, padded]."""
    at = parts + slot * (block * padded) + tl.arange(0, block)[:, None] * padded + tl.arange(0, padded)[None, :]
    tl.store(at, tile)


@triton.jit
def head_offset(row_stride, head_stride, row, head):
    """Where the first row of a batch row and head lies."""
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit
def load_norm(lse, row_stride, head_stride, stride, row, head, rows, even: tl.constexpr):
    """Log-sum-exps of some rows in units of log2; +inf where a row is empty or -1, so that its weights are 0."""
    norm = load_numbers(lse, row_stride, head_stride, stride, row, head, rows, -float("inf"), even)
    return tl.where(norm == -float("inf"), float("inf"), norm * LOG2E)


@triton.jit
def load_numbers(
    x, row_stride, head_stride, stride, row, head, rows, other: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """A number of each of some rows of a batch row and head, `other` for rows of -1."""
    at = x + head_offset(row_stride, head_stride, row, head) + rows.to(tl.int64) * stride
    if even:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=rows >= 0, other=other)
    return found


@triton.jit
def store_numbers(x, row_stride, head_stride, stride, row, head, rows, numbers):
    """Writes what `load_numbers` would read."""
    at = x + head_offset(row_stride, head_stride, row, head) + rows.to(tl.int64) * stride
    tl.store(at, numbers, mask=rows >= 0)
