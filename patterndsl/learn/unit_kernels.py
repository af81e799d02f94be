"""The kernels of unit length: rows divided by their lengths, and the gradient of that. Each program has some rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patterndsl.device.launcher import Launcher

NUMBERS = 4096
"""Numbers that a program has."""
SHORTEST = tl.constexpr(1e-12)
"""Lengths are divided by this at least, as torch.nn.functional.normalize does it."""


@triton.jit
def _tile_of(x, row_stride, head_stride, stride, rows, padded: tl.constexpr):
    start = x + tl.program_id(2).to(tl.int64) * row_stride + tl.program_id(1).to(tl.int64) * head_stride
    return start + (rows.to(tl.int64) * stride)[:, None] + tl.arange(0, padded)[None, :]


@triton.jit(do_not_specialize=["length"])
def unit_kernel(
    x, into, xb, xh, xl, ib, ih, il, length, dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of rows, heads, batch rows)."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    there = (rows < length)[:, None] & (tl.arange(0, padded) < dim)[None, :]
    found = tl.load(_tile_of(x, xb, xh, xl, rows, padded), mask=there, other=0.0).to(tl.float32)
    lengths = tl.maximum(tl.sqrt(tl.sum(found * found, 1)), SHORTEST, propagate_nan=tl.PropagateNan.ALL)
    found = found / lengths[:, None]
    tl.store(_tile_of(into, ib, ih, il, rows, padded), found.to(into.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["length"])
def unit_gradient_kernel(
    x, grad, into, xb, xh, xl, gb, gh, gl, ib, ih, il, length,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The same grid."""
    rows = tl.program_id(0) * block + tl.arange(0, block)
    there = (rows < length)[:, None] & (tl.arange(0, padded) < dim)[None, :]
    found = tl.load(_tile_of(x, xb, xh, xl, rows, padded), mask=there, other=0.0).to(tl.float32)
    of_unit = tl.load(_tile_of(grad, gb, gh, gl, rows, padded), mask=there, other=0.0).to(tl.float32)
    exact = tl.sqrt(tl.sum(found * found, 1))
    lengths = tl.maximum(exact, SHORTEST, propagate_nan=tl.PropagateNan.ALL)
    unit = found / lengths[:, None]
    along = tl.where(exact < SHORTEST, 0.0, tl.sum(unit * of_unit, 1))  # what is shorter is not made longer
    found = (of_unit - unit * along[:, None]) / lengths[:, None]
    tl.store(_tile_of(into, ib, ih, il, rows, padded), found.to(into.dtype.element_ty), mask=there)


_unit, _unit_gradient = Launcher(unit_kernel), Launcher(unit_gradient_kernel)


def divided(x: Tensor) -> Tensor:
    """x [B, H, T, D] by its lengths along D; D lies together."""
    into = torch.empty_like(x)
    _launch(_unit, x, into)
    return into


def gradient(x: Tensor, grad: Tensor) -> Tensor:
    """That of x, from the one of `divided`."""
    into = torch.empty_like(x)
    _launch(_unit_gradient, x, grad if grad.stride(3) == 1 else grad.contiguous(), into)
    return into


def _launch(kernel: Launcher, *tensors: Tensor) -> None:
    batch, heads, length, dim = tensors[0].shape
    padded = max(16, 1 << (dim - 1).bit_length())
    block = NUMBERS // padded
    strides = [step for x in tensors for step in x.stride()[:3]]
    constants = {"dim": dim, "padded": padded, "block": block}
    kernel((-(-length // block), heads, batch), tensors, (*strides, length), constants)
