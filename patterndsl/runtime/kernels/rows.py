"""How does a kernel reach a tile of rows, and join what several pieces of a row computed?

A tile is BLOCK rows of a tensor whose rows lie `stride` apart. Channels lie next to each other, and are filled up with
zeros to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    x, stride, rows, count, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, even: tl.constexpr
):
    """[block, padded] of x [.., width], whose first row is x; zeros from row count - rows on. even: there are none."""
    at = x + tl.arange(0, block)[:, None] * stride + tl.arange(0, padded)[None, :]
    if even and width == padded:
        return tl.load(at)
    live = (tl.arange(0, block)[:, None] < count - rows) & (tl.arange(0, padded)[None, :] < width)
    return tl.load(at, mask=live, other=0.0)


@triton.jit
def store_tile(
    x, stride, rows, count, tile, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    at = x + tl.arange(0, block)[:, None] * stride + tl.arange(0, padded)[None, :]
    live = (tl.arange(0, block)[:, None] < count - rows) & (tl.arange(0, padded)[None, :] < width)
    tl.store(at, tile.to(x.dtype.element_ty), mask=live)
