"""How does a query without keys attend its own? In place, behind all else; the plain twin is `joined.or_own_key`."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.kernels.memory import as_laid_out, numbers_beside, padded_widths, strides_of
from patterndsl.runtime.kernels.own_kernels import attend_own_kernel, own_gradients_kernel
from patterndsl.runtime.views import with_unit_stride

BLOCK = 64

_attend, _add_gradients = Launcher(attend_own_kernel), Launcher(own_gradients_kernel)


def attend_own(query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Writes output and lse of rows whose lse is -inf into out [B, Hq, T, Dv] and lse [B, Hq, T]; which rows these are,
    int8 [B, Hq, T]."""
    query, key, value = map(with_unit_stride, (query, key, value))
    batch, heads, length, dim = query.shape
    value_dim = value.shape[3]
    padded, value_padded = padded_widths(dim, value_dim)
    alone = numbers_beside(lse, torch.int8)
    _attend(
        (-(-length // BLOCK), heads, batch),
        (query, key, value, out, lse, alone),
        (*strides_of(query, key, value, out), *lse.stride(), length),
        {
            "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim, "padded": padded,
            "value_padded": value_padded, "block": BLOCK,
        },
        scale=scale,
    )  # fmt: skip
    return alone


def add_own_gradients(
    query: Tensor,
    key: Tensor,
    alone: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Adds what the rows of `attend_own` give to gradients of query, key and value."""
    query, key, grad_out = map(with_unit_stride, (query, key, grad_out))
    batch, heads, length, dim = query.shape
    value_dim, kv_heads = grad_out.shape[3], key.shape[1]
    padded, value_padded = padded_widths(dim, value_dim)
    of_lse = alone if grad_lse is None else as_laid_out(grad_lse, alone)
    _add_gradients(
        (-(-length // BLOCK), kv_heads, batch),
        (query, key, grad_out, of_lse, alone, *grads),
        (*strides_of(query, key, grad_out), *alone.stride(), *strides_of(*grads), length),
        {
            "kv_group": heads // kv_heads, "dim": dim, "value_dim": value_dim, "padded": padded,
            "value_padded": value_padded, "has_grad_lse": grad_lse is not None, "block": BLOCK,
        },
        scale=scale,
    )  # fmt: skip
