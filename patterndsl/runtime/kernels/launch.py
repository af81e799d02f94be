"""How do kernels meet tensors? Results are made, and each kernel is launched once over all heads and batch rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.backward import key_kernel, query_kernel, sum_kernel
from patterndsl.runtime.kernels.forward import attend_kernel, merge_kernel
from patterndsl.runtime.kernels.shapes import Blocks
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.views import with_unit_stride

CHUNK = 16
"""Slots of a row that are read at once."""


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(attend_kernel, triton.JITFunction)


def forward(
    query: Tensor, key: Tensor, value: Tensor, work: Work, blocks: Blocks, asked: Asked, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, Dv] in the query's dtype and lse [B, Hq, Tq] in float32. Empty rows yield 0 and -inf.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv]. Work: O(entries x block^2 x D), in one launch,
    and a second one where long rows were cut. scale: above 0.
    """
    query, key, value = map(with_unit_stride, (query, key, value))
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    out, lse = _like(query, value_dim), torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    rows, padded = _rows(work, batch), _padded(value_dim)
    slots = rows * work.num_slots * blocks.q_block
    part_out, part_lse = _floats(query, slots * padded), _floats(query, slots)
    attend_kernel[(work.num_pieces, rows)](
        query, key, value, out, lse, part_out, part_lse, work.pieces, work.entries, asked.numbers, asked.tables,
        *_strides(query, key, value, out), *lse.stride(),
        q_len, kv_len, asked.q_start, work.num_slots, scale,
        keep=asked.keep, kv_group=heads // key.shape[1], dim=dim, value_dim=value_dim,
        padded=_padded(dim), value_padded=padded, q_block=blocks.q_block, kv_block=blocks.kv_block,
        even=kv_len % blocks.kv_block == 0, precision=_precision(query), stages=blocks.stages,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    if work.num_joints:
        merge_kernel[(work.num_joints * blocks.q_block, rows)](
            part_out, part_lse, out, lse, work.joints, *_strides(out), *lse.stride(), q_len, work.num_slots,
            value_dim=value_dim, value_padded=padded, q_block=blocks.q_block, chunk=CHUNK, num_warps=2,
        )  # fmt: skip
    return out, lse


def gradient_of_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    work: Work,
    blocks: Blocks,
    asked: Asked,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of queries [B, Hq, Tq, D], and delta [B, Hq, Tq] for `gradients_of_keys`. work: as for `forward`."""
    query, key, value, out, grad_out = map(with_unit_stride, (query, key, value, out, grad_out))
    lse = lse.contiguous()
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    grad_query, delta = _like(query, dim), torch.empty_like(lse)
    rows, padded = _rows(work, batch), _padded(dim)
    part = _floats(query, rows * work.num_slots * blocks.q_block * padded)
    query_kernel[(work.num_pieces, rows)](
        query, key, value, out, grad_out, lse, lse if grad_lse is None else grad_lse.float().contiguous(), delta,
        grad_query, part, work.pieces, work.entries, asked.numbers, asked.tables,
        *_strides(query, key, value, out, grad_out), *lse.stride(), *_strides(grad_query),
        q_len, kv_len, asked.q_start, work.num_slots, scale,
        keep=asked.keep, kv_group=heads // key.shape[1], dim=dim, value_dim=value_dim,
        padded=padded, value_padded=_padded(value_dim), q_block=blocks.q_block, kv_block=blocks.kv_block,
        even=kv_len % blocks.kv_block == 0, has_grad_lse=grad_lse is not None, precision=_precision(query),
        stages=blocks.stages, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    _add_up(part, grad_query, work, rows, blocks.q_block)
    return grad_query, delta


def gradients_of_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    work: Work,
    blocks: Blocks,
    asked: Asked,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys [B, Hkv, Tk, D] and values [B, Hkv, Tk, Dv]. work: of transposed lists."""
    query, key, value, grad_out = map(with_unit_stride, (query, key, value, grad_out))
    lse = lse.contiguous()
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    grad_key, grad_value = _like(key, dim), _like(value, value_dim)
    rows, padded, value_padded = _rows(work, batch), _padded(dim), _padded(value_dim)
    slots = rows * work.num_slots * blocks.kv_block
    part_key, part_value = _floats(query, slots * padded), _floats(query, slots * value_padded)
    key_kernel[(work.num_pieces, rows)](
        query, key, value, grad_out, lse, delta, grad_key, grad_value, part_key, part_value,
        work.pieces, work.entries, asked.numbers, asked.tables,
        *_strides(query, key, value, grad_out), *lse.stride(), *_strides(grad_key, grad_value),
        q_len, kv_len, asked.q_start, work.num_slots, triton.cdiv(q_len, blocks.q_block), scale,
        keep=asked.keep, kv_group=heads // key.shape[1], dim=dim, value_dim=value_dim,
        padded=padded, value_padded=value_padded, q_block=blocks.q_block, kv_block=blocks.kv_block,
        even=q_len % blocks.q_block == 0, precision=_precision(query), stages=blocks.stages,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    _add_up(part_key, grad_key, work, rows, blocks.kv_block)
    _add_up(part_value, grad_value, work, rows, blocks.kv_block)
    return grad_key, grad_value


def _add_up(part: Tensor, into: Tensor, work: Work, rows: int, block: int) -> None:
    if work.num_joints:
        sum_kernel[(work.num_joints * block, rows)](
            part, into, work.joints, *_strides(into), into.shape[2], work.num_slots,
            width=into.shape[3], padded=_padded(into.shape[3]), block=block, chunk=CHUNK, num_warps=2,
        )  # fmt: skip


def _rows(work: Work, batch: int) -> int:
    """Batch rows that share the work."""
    return batch if work.is_shared else 1


def _strides(*tensors: Tensor) -> Sequence[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def _like(x: Tensor, width: int) -> Tensor:
    """A tensor [B, H, T, width] that lies in memory as x does, heads inside positions or around them."""
    if x.shape[3] == width and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return torch.empty_like(x)
    return torch.empty((*x.shape[:3], width), dtype=x.dtype, device=x.device)


def _floats(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def _padded(width: int) -> int:
    """Channels of a tile, a power of two: matrix units want 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


def _precision(x: Tensor) -> str:
    """Float32 stays float32: TF32 would be another attention than the one that was asked for."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
