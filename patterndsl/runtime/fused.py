"""How are whole outputs merged, and gradients shared among passes? One kernel on CUDA, plain PyTorch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.runtime.merge import merge_, unmerge_


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, sign: int) -> None:
    """`merge_`, or `unmerge_` for sign -1. out: [B, H, ..., D], lse: [B, H, ...]."""
    if _has_kernel(out, part_out) and lse.dim() <= 4:
        from patterndsl.runtime.row_kernels import merge_rows

        shape = _four(lse)
        merge_rows(_as(out, shape), _as(lse, shape), _as(part_out, shape), _as(part_lse, shape), sign)
        return
    (merge_ if sign > 0 else unmerge_)(out, lse, part_out, part_lse)


def add_into(total: Tensor, part: Tensor, sign: int) -> None:
    """total += sign * part, both [B, H, ..., D], in float32 at least before it is rounded."""
    if _has_kernel(total, part) and part.dim() <= 5 and part.numel():
        from patterndsl.runtime.row_kernels import add_rows

        shape = [*part.shape[:2], *[1] * (5 - part.dim()), *part.shape[2:-1]]
        add_rows(_as(total, shape), _as(part, shape), sign)
        return
    total.add_(part.to(total.dtype), alpha=sign)


def share_of_gradient(
    out: Tensor, lse: Tensor, merged_out: Tensor, merged_lse: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one pass's own output and lse from that of the merged output.

    Its share in the merged softmax is exp(lse - merged_lse). merged_out and grad_out may have channels more than out,
    which carry the gradient of the merged lse. out: [B * H, groups, L, D], lse: [B * H, groups, L].
    """
    if _has_kernel(out, merged_out, grad_out):
        from patterndsl.runtime.row_kernels import share_rows

        d_out, d_lse = torch.empty_like(out), torch.empty_like(lse)
        share_rows(*(x.unsqueeze(0) for x in (out, lse, merged_out, merged_lse, grad_out, d_out, d_lse)))
        return d_out, d_lse
    width = out.shape[-1]
    share = torch.exp(lse - merged_lse)
    wide = grad_out.to(lse.dtype)
    own = (wide[..., :width] * out.to(lse.dtype)).sum(-1)
    whole = (wide * merged_out.to(lse.dtype)).sum(-1)
    return (wide[..., :width] * share[..., None]).to(out.dtype), share * (own - whole)


def _has_kernel(*tensors: Tensor) -> bool:
    return all(x.is_cuda and x.dtype != torch.float64 and x.stride(-1) == 1 for x in tensors)


def _four(lse: Tensor) -> list[int]:
    """[B, H, groups, L] of [B, H, L] too."""
    return [*lse.shape[:2], *[1] * (4 - lse.dim()), *lse.shape[2:]]


def _as(x: Tensor, shape: list[int]) -> Tensor:
    """x [B, H, ..., (D)] with its rows in four dimensions."""
    return x if x.dim() >= 4 and list(x.shape[:4]) == shape else x.unsqueeze(2)
