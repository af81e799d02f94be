"""How do tensors lie in memory for kernels? Their strides, room for what kernels write, and widths of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def strides_of(*tensors: Tensor) -> Sequence[int]:
    """Of batch rows, heads and positions."""
    found = list[int]()
    for x in tensors:
        found += x.stride()[:3]
    return found


def like_of_width(x: Tensor, width: int) -> Tensor:
    """A tensor [B, H, T, width] that lies in memory as x does, heads inside positions or around them."""
    if x.shape[3] == width and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return torch.empty_like(x)
    return torch.empty((*x.shape[:3], width), dtype=x.dtype, device=x.device)


def numbers_beside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for as many numbers, each where x has one. Most are next to each other, which takes no other operator than
    all else does: to call one for the first time after other work takes the host longer than ten times more."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of x in float32, where those of `like` lie."""
    return torch.empty_strided(like.shape, like.stride(), dtype=torch.float32, device=x.device).copy_(x)


def floats_beside(like: Tensor, size: int) -> Tensor:
    """Room for numbers; where none are needed any tensor of float32 will do, and `like` is one."""
    return torch.empty(size, dtype=torch.float32, device=like.device) if size else like


@cache
def padded_widths(*widths: int) -> Sequence[int]:
    """Channels of tiles of these widths, powers of two: matrix units want 16 at least, and no less than half of the
    widest. (Halves of 128 channels beside values of 16 came out wrong on an H100 with Triton 3.6, of 64 right.)"""
    least = [max(16, 1 << (width - 1).bit_length()) for width in widths]
    return [max(width, max(least) // 2) for width in least]


def precision_of(x: Tensor) -> str:
    """Float32 stays float32: TF32 would be another attention than the one that was asked for."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
