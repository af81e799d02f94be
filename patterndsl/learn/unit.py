"""How do keys come to unit length? As torch.nn.functional.normalize has it, on a GPU in one launch and one for its
gradient: PyTorch's own take four and a dozen, each of which reads and writes all keys. On a CPU the gradient is made of
some keys at a time, which stay in its caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn.functional import normalize

from patterndsl.learn.kmeans import has_kernels

MOST_CHANNELS = 256
AT_ONCE = 1 << 18
"""Numbers of the keys whose gradient a CPU makes at a time: a megabyte."""
SHORTEST = 1e-12
"""Length that shorter keys are divided by, as `normalize` has it."""


def unit(x: Tensor) -> Tensor:
    """x [B, H, T, D] by its lengths along D, in its dtype; 0 stays 0. By kernels it is computed in float32 and rounded
    once. Differentiable; what is no plain first derivative is PyTorch's."""
    if not _takes(x):
        return normalize(x, dim=-1)
    if torch.is_grad_enabled() and x.requires_grad:
        return _unit(x)
    return _divided(x)


def _takes(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if cast("Any", torch._C)._are_functorch_transforms_active():
        return False
    if not has_kernels(x.device):
        return x.device.type == "cpu" and x.dim() == 4 and x.dtype in (torch.float32, torch.float64)
    is_narrow = x.dim() == 4 and x.shape[3] <= MOST_CHANNELS and x.stride(3) == 1
    return is_narrow and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _divided(x: Tensor) -> Tensor:
    if not has_kernels(x.device):
        return normalize(x, dim=-1, eps=SHORTEST)
    from patterndsl.learn.unit_kernels import divided

    return divided(x)


def _gradient(x: Tensor, grad: Tensor) -> Tensor:
    if has_kernels(x.device):
        from patterndsl.learn import unit_kernels

        return unit_kernels.gradient(x, grad)
    found = torch.empty_like(x)
    step = max(1, AT_ONCE * x.shape[2] // max(1, x.numel()))
    for some, of_some, into in zip(*(torch.split(part, step, 2) for part in (x, grad, found)), strict=True):
        length = torch.linalg.vector_norm(some, dim=-1, keepdim=True)
        longer = length.clamp(min=SHORTEST)
        along = torch.mul(some, of_some, out=into).sum(-1, keepdim=True).div_(longer).div_(longer)
        along.masked_fill_(length < SHORTEST, 0.0)  # what they are divided by does not depend on them
        torch.addcmul(of_some, some, along, value=-1, out=into).div_(longer)
    return found


class _Unit(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _divided(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates it again
            found: Tensor = torch.autograd.grad(normalize(x, dim=-1), x, grad, create_graph=True)[0]
            return found
        return _gradient(x, grad)


# torch declares `apply` without types
_unit: Callable[[Tensor], Tensor] = _Unit.apply
