"""How do kernels meet tensors? Results are made, and each kernel is launched once over all heads and batch rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.lower.blocks import ROWS, Blocks, Pipeline
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.backward import key_kernel, query_kernel, sum_kernel
from patterndsl.runtime.kernels.descriptors import as_seen
from patterndsl.runtime.kernels.forward import attend_kernel, merge_kernel
from patterndsl.runtime.kernels.memory import (
    as_laid_out,
    floats_beside,
    like_of_width,
    numbers_beside,
    padded_widths,
    precision_of,
    strides_of,
)
from patterndsl.runtime.kernels.places import Side, Sides, sides_of
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.views import with_unit_stride

CHUNK = 16
"""Slots of a row that are read at once."""

TWO_WARPS = {"num_warps": 2}

_attend, _merge = Launcher(attend_kernel), Launcher(merge_kernel)
_of_queries, _of_keys, _sum = Launcher(query_kernel), Launcher(key_kernel), Launcher(sum_kernel)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(attend_kernel, triton.JITFunction)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    goes_on: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, Dv] in the query's dtype and lse [B, Hq, Tq] in float32. Empty rows yield 0 and -inf.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], in any order in memory. into: where output
    and lse are written; goes_on: whether they are merged with those of other keys that are there. scale: above 0. Work:
    O(entries x block^2 x D), in one launch, and a second one where long rows were cut.
    """
    query, key, value = map(with_unit_stride, (query, key, value))
    batch, heads, q_len, dim = query.shape
    value_dim = value.shape[3]
    if into is None:
        out, lse = (
            like_of_width(query, value_dim),
            torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device),
        )
    else:
        out, lse = into
    rows, (_, padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block = _owned(blocks, blocks.q_block)
    slots = rows * work.num_slots * q_block
    part_out, part_lse = floats_beside(lse, slots * padded), floats_beside(lse, slots)
    sides = sides_of(asked.orders, work, q_len, key.shape[2])
    asks = query, key, value, out, lse, part_out, part_lse, work, rows, asked, scale
    if isinstance(blocks, Pipeline):
        from patterndsl.runtime.kernels import launch_hopper

        launch_hopper.forward(*asks, blocks, goes_on=goes_on)
    else:
        _forward(*asks, blocks, sides, goes_on=goes_on)
    if work.num_joints:
        _merge(
            (work.num_joints * q_block, rows, 1),
            (part_out, part_lse, out, lse, work.joints, sides.query.order),
            (*strides_of(out), *lse.stride(), *sides.query.strides, sides.query.number, work.num_slots),
            {
                "value_dim": value_dim, "value_padded": padded, "q_block": q_block, "chunk": CHUNK,
                "ordered": sides.ordered, "goes_on": goes_on,
            },
            TWO_WARPS,
        )  # fmt: skip
    return out, lse


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Blocks,
    sides: Sides,
    *,
    goes_on: bool,
) -> None:
    """Whole lists into out and lse, parts of lists into their slots."""
    heads, dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    padded, value_padded = padded_widths(dim, value_dim)
    q_block, kv_block = blocks.q_block, blocks.kv_block
    blocks_of = (query, q_block, padded), (key, kv_block, padded), (value, kv_block, value_padded)
    seen = as_seen(*blocks_of, ordered=sides.ordered)
    _attend(
        (work.num_pieces, rows, 1),
        (*seen.tensors, out, lse, part_out, part_lse, work.pieces, work.entries, *sides.orders),
        (
            *strides_of(query, key, value, out), *lse.stride(), *sides.strides,
            *sides.numbers, asked.q_start, work.num_slots,
        ),
        {
            "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
            "even": sides.key.is_whole(kv_block), "described": seen.described, "ordered": sides.ordered,
            "goes_on": goes_on, "precision": precision_of(query), "stages": blocks.stages,
        },
        _options(blocks), asked=asked, scale=scale,
    )  # fmt: skip


def gradient_of_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: Tensor | None = None,
    *,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of queries [B, Hq, Tq, D], and delta [B, Hq, Tq] for `gradients_of_keys`.

    out, lse: of all keys, of which these may be a part; grad_lse: that of lse, None where it has none. work: as for
    `forward`. into: where the gradient is written; adds: whether it is added to what is there.
    """
    query, key, value, out, grad_out = map(with_unit_stride, (query, key, value, out, grad_out))
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    delta = numbers_beside(lse, torch.float32)
    grad_query = like_of_width(query, dim) if into is None else into
    rows, (padded, value_padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block, kv_block = _owned(blocks, blocks.q_block), blocks.kv_block
    part = floats_beside(lse, rows * work.num_slots * q_block * padded)
    sides = sides_of(asked.orders, work, q_len, kv_len)
    grad_of_lse = lse if grad_lse is None else as_laid_out(grad_lse, lse)
    if isinstance(blocks, Pipeline):
        from patterndsl.runtime.kernels import launch_hopper

        tensors = query, key, value, out, grad_out, lse, grad_of_lse, delta, grad_query, part
        has_grad_lse = grad_lse is not None
        launch_hopper.gradient_of_queries(
            *tensors, work, rows, asked, scale, blocks, has_grad_lse=has_grad_lse, adds=adds
        )
        _add_up(part, grad_query, padded, work, rows, q_block, sides.query, ordered=False, adds=adds)
        return grad_query, delta
    seen = as_seen(
        *((query, q_block, padded), (key, kv_block, padded), (value, kv_block, value_padded)),
        *((out, q_block, value_padded), (grad_out, q_block, value_padded)),
        ordered=sides.ordered,
    )
    _of_queries(
        (work.num_pieces, rows, 1),
        (*seen.tensors, lse, grad_of_lse, delta, grad_query, part, work.pieces, work.entries, *sides.orders),
        (
            *strides_of(query, key, value, out, grad_out), *lse.stride(), *strides_of(grad_query), *sides.strides,
            *sides.numbers, asked.q_start, work.num_slots,
        ),
        {
            "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
            "even": sides.key.is_whole(kv_block), "described": seen.described, "ordered": sides.ordered,
            "has_grad_lse": grad_lse is not None, "adds": adds, "precision": precision_of(query),
            "stages": blocks.stages,
        },
        _options(blocks), asked=asked, scale=scale,
    )  # fmt: skip
    _add_up(part, grad_query, padded, work, rows, q_block, sides.query, ordered=sides.ordered, adds=adds)
    return grad_query, delta


def gradients_of_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    turn: int = 0,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys [B, Hkv, Tk, D] and values [B, Hkv, Tk, Dv]. work: of transposed lists. delta: of
    `gradient_of_queries`, which lies in memory as lse does. into, adds: see there. turn: where heads have orders of
    their own, the one query head of each group whose pairs these are."""
    query, key, value, grad_out = map(with_unit_stride, (query, key, value, grad_out))
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    grad_key, grad_value = (like_of_width(key, dim), like_of_width(value, value_dim)) if into is None else into
    rows, (padded, value_padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block, kv_block = blocks.q_block, _owned(blocks, blocks.kv_block)
    slots = rows * work.num_slots * kv_block
    part_key, part_value = floats_beside(lse, slots * padded), floats_beside(lse, slots * value_padded)
    sides = sides_of(asked.orders, work, q_len, kv_len)
    how: Any = {"group": heads // key.shape[1], "turn": turn, "ordered": sides.ordered, "adds": adds}
    if isinstance(blocks, Pipeline):
        from patterndsl.runtime.kernels import launch_hopper

        tensors = query, key, value, grad_out, lse, delta, grad_key, grad_value, part_key, part_value
        launch_hopper.gradients_of_keys(*tensors, work, rows, asked, scale, blocks, adds=adds)
    else:
        seen = as_seen(
            *((query, q_block, padded), (key, kv_block, padded)),
            *((value, kv_block, value_padded), (grad_out, q_block, value_padded)),
            ordered=sides.ordered,
        )
        _of_keys(
            (work.num_pieces, rows, 1),
            (
                *seen.tensors, lse, delta, grad_key, grad_value, part_key, part_value, work.pieces, work.entries,
                *sides.orders,
            ),
            (
                *strides_of(query, key, value, grad_out), *lse.stride(), *strides_of(grad_key, grad_value),
                *sides.strides, *sides.numbers, asked.q_start, work.num_slots, -(-sides.query.number // q_block), turn,
            ),
            {
                "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
                "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
                "even": sides.query.is_whole(q_block), "described": seen.described, "ordered": sides.ordered,
                "adds": adds, "precision": precision_of(query), "stages": blocks.stages,
            },
            _options(blocks), asked=asked, scale=scale,
        )  # fmt: skip
    _add_up(part_key, grad_key, padded, work, rows, kv_block, sides.key, **how)
    _add_up(part_value, grad_value, value_padded, work, rows, kv_block, sides.key, **how)
    return grad_key, grad_value


def _add_up(
    part: Tensor,
    into: Tensor,
    padded: int,
    work: Work,
    rows: int,
    block: int,
    side: Side,
    *,
    group: int = 1,
    turn: int = 0,
    ordered: bool,
    adds: bool,
) -> None:
    if work.num_joints:
        _sum(
            (work.num_joints * block, rows, 1),
            (part, into, work.joints, side.order),
            (*strides_of(into), *side.strides, side.number, work.num_slots, group, turn),
            {
                "width": into.shape[3], "padded": padded, "block": block, "chunk": CHUNK, "ordered": ordered,
                "adds": adds,
            },
            TWO_WARPS,
        )  # fmt: skip


def _owned(blocks: Blocks | Pipeline, block: int) -> int:
    """Rows that leave one part in one slot: a block of Triton's kernels, those of one consumer of Hopper's."""
    return block if isinstance(blocks, Blocks) else ROWS


def _options(blocks: Blocks) -> dict[str, int]:
    """How a kernel is compiled."""
    found = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return found if blocks.registers is None else {**found, "maxnreg": blocks.registers}


def _rows(work: Work, batch: int) -> int:
    """Batch rows that share the work."""
    return batch if work.is_shared else 1
