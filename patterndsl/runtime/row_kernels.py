"""Which elementwise steps are worth a kernel of their own? Those over whole outputs on CUDA: memory is their cost.

Merging a pass into the result, and the share of a pass in the gradient, each read and write every row once. Their plain
twins in `runtime.merge` and `runtime.fused` say what is computed. Rows lie anywhere: four strides say where, so that
permuted positions need no copy.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS = 16


@triton.jit
def _row_offsets(rows, heads, groups, length, stride_b, stride_h, stride_g, stride_l):
    position = rows % length
    rest = rows // length
    group = rest % groups
    rest = rest // groups
    head = rest % heads
    row = rest // heads
    return row * stride_b + head * stride_h + group * stride_g + position * stride_l


@triton.jit
def _merge_kernel(
    out, lse, part_out, part_lse, num_rows, heads, groups, length,
    ob, oh, og, ol, sb, sh, sg, sl, pb, ph, pg, pl, tb, th, tg, tl_,
    width: tl.constexpr, padded: tl.constexpr, sign: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    channels = tl.arange(0, padded)
    live = rows < num_rows
    cells = live[:, None] & (channels < width)[None, :]
    lse_at = lse + _row_offsets(rows, heads, groups, length, sb, sh, sg, sl)
    known = tl.load(lse_at, mask=live, other=0.0)
    new = tl.load(part_lse + _row_offsets(rows, heads, groups, length, tb, th, tg, tl_), mask=live, other=0.0)
    neither = (known == float("-inf")) & (new == float("-inf"))
    if sign > 0:
        top = tl.maximum(known, new)
        low = tl.minimum(known, new)
        total = tl.where(neither, top, top + tl.log(1.0 + tl.exp(low - tl.where(neither, 0.0, top))))
        share = tl.where(neither, 0.0, tl.exp(new - tl.where(neither, 0.0, total)))
    else:
        taken = tl.where(neither, 0.0, tl.exp(new - tl.where(neither, 0.0, known)))
        total = known + tl.log(1.0 - taken)
        share = -taken / (1.0 - taken)
    out_at = out + _row_offsets(rows, heads, groups, length, ob, oh, og, ol)[:, None] + channels[None, :]
    part_at = part_out + _row_offsets(rows, heads, groups, length, pb, ph, pg, pl)[:, None] + channels[None, :]
    a = tl.load(out_at, mask=cells, other=0.0).to(tl.float32)
    b = tl.load(part_at, mask=cells, other=0.0).to(tl.float32)
    tl.store(out_at, (a + share[:, None] * (b - a)).to(out.dtype.element_ty), mask=cells)
    tl.store(lse_at, total, mask=live)


@triton.jit
def _share_kernel(
    out, lse, merged, merged_lse, grad, d_out, d_lse, num_rows, heads, groups, length,
    ob, oh, og, ol, sb, sh, sg, sl, mb, mh, mg, ml, nb, nh, ng, nl, gb, gh, gg, gl,
    width: tl.constexpr, wide: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    channels = tl.arange(0, padded)
    live = rows < num_rows
    own_cells = live[:, None] & (channels < width)[None, :]
    all_cells = live[:, None] & (channels < wide)[None, :]
    mine = tl.load(lse + _row_offsets(rows, heads, groups, length, sb, sh, sg, sl), mask=live, other=0.0)
    whole = tl.load(merged_lse + _row_offsets(rows, heads, groups, length, nb, nh, ng, nl), mask=live, other=0.0)
    share = tl.exp(mine - whole)
    here = _row_offsets(rows, heads, groups, length, ob, oh, og, ol)[:, None] + channels[None, :]
    there = _row_offsets(rows, heads, groups, length, mb, mh, mg, ml)[:, None] + channels[None, :]
    up = _row_offsets(rows, heads, groups, length, gb, gh, gg, gl)[:, None] + channels[None, :]
    a = tl.load(out + here, mask=own_cells, other=0.0).to(tl.float32)
    m = tl.load(merged + there, mask=all_cells, other=0.0).to(tl.float32)
    g = tl.load(grad + up, mask=all_cells, other=0.0).to(tl.float32)
    tl.store(d_out + here, (g * share[:, None]).to(d_out.dtype.element_ty), mask=own_cells)
    difference = share * tl.sum(g * (a - m), axis=1)
    tl.store(d_lse + _row_offsets(rows, heads, groups, length, sb, sh, sg, sl), difference, mask=live)


@triton.jit
def _add_kernel(
    into, part, num_rows, heads, groups, length,
    ob, oh, og, ol, pb, ph, pg, pl,
    width: tl.constexpr, padded: tl.constexpr, sign: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    channels = tl.arange(0, padded)
    cells = (rows < num_rows)[:, None] & (channels < width)[None, :]
    into_at = into + _row_offsets(rows, heads, groups, length, ob, oh, og, ol)[:, None] + channels[None, :]
    part_at = part + _row_offsets(rows, heads, groups, length, pb, ph, pg, pl)[:, None] + channels[None, :]
    total = tl.load(into_at, mask=cells, other=0.0).to(tl.float32)
    total += sign * tl.load(part_at, mask=cells, other=0.0).to(tl.float32)
    tl.store(into_at, total.to(into.dtype.element_ty), mask=cells)


def add_rows(into: Tensor, part: Tensor, sign: int) -> None:
    """Adds sign * part to into, both [B, H, G, L, D], in place."""
    _, heads, groups, length, width = part.shape
    num_rows = part.numel() // width
    _add_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        into, part, num_rows, heads, groups, length, *into.stride()[:4], *part.stride()[:4],
        width=width, padded=triton.next_power_of_2(width), sign=sign, block=BLOCK_ROWS,
    )  # fmt: skip


def merge_rows(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, sign: int) -> None:
    """Merges into out [B, H, G, L, D] and lse [B, H, G, L], float32, in place; sign -1 takes out again. The parts have
    the same sizes; channels are consecutive in memory."""
    _, heads, groups, length, width = out.shape
    num_rows = lse.numel()
    strides = (*out.stride()[:4], *lse.stride(), *part_out.stride()[:4], *part_lse.stride())
    _merge_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        out, lse, part_out, part_lse, num_rows, heads, groups, length, *strides,
        width=width, padded=triton.next_power_of_2(width), sign=sign, block=BLOCK_ROWS,
    )  # fmt: skip


def share_rows(
    out: Tensor, lse: Tensor, merged: Tensor, merged_lse: Tensor, grad: Tensor, d_out: Tensor, d_lse: Tensor
) -> None:
    """Writes d_out, d_lse, which lie in memory as out and lse do. All [B, H, G, L, ...]."""
    _, heads, groups, length, width = out.shape
    num_rows = lse.numel()
    wide = merged.shape[-1]
    tensors: tuple[Any, ...] = (out, lse, merged, merged_lse, grad, d_out, d_lse)
    strides = [step for x in tensors[:5] for step in x.stride()[:4]]
    _share_kernel[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        *tensors, num_rows, heads, groups, length, *strides,
        width=width, wide=wide, padded=triton.next_power_of_2(wide), block=BLOCK_ROWS,
    )  # fmt: skip
