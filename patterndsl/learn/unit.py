"""How do keys come to unit length? As torch.nn.functional.normalize has it, on a GPU in one launch and one for its
gradient: PyTorch's own take four and a dozen, each of which reads and writes all keys.
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


def unit(x: Tensor) -> Tensor:
    """x [B, H, T, D] by its lengths along D, in its dtype; 0 stays 0. By kernels it is computed in float32 and rounded
    once. Differentiable; what is no plain first derivative is PyTorch's."""
    if not _takes(x):
        return normalize(x, dim=-1)
    if torch.is_grad_enabled() and x.requires_grad:
        return _unit(x)
    from patterndsl.learn.unit_kernels import divided

    return divided(x)


def _takes(x: Tensor) -> bool:
    if not has_kernels(x.device) or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if cast("Any", torch._C)._are_functorch_transforms_active():
        return False
    is_narrow = x.dim() == 4 and x.shape[3] <= MOST_CHANNELS and x.stride(3) == 1
    return is_narrow and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class _Unit(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from patterndsl.learn.unit_kernels import divided

        ctx.save_for_backward(x)
        return divided(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates it again
            found: Tensor = torch.autograd.grad(normalize(x, dim=-1), x, grad, create_graph=True)[0]
            return found
        from patterndsl.learn import unit_kernels

        return unit_kernels.gradient(x, grad)


# torch declares `apply` without types
_unit: Callable[[Tensor], Tensor] = _Unit.apply
