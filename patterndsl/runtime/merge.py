"""How do partial results of attention combine? They form a commutative monoid (output, lse)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def wide(dtype: torch.dtype) -> torch.dtype:
    """What results are computed in, and their lse is left in: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the disjoint union of two key sets, from attention over each.

    out: [..., D], lse: [...]; lse = log(sum(exp(scores))). The empty row (0, -inf) is the identity, and two empty rows
    merge to an empty row. Work: O(size of out).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse == -torch.inf, 0.0, lse)  # exp(-inf - 0) = 0 where -inf - -inf would be NaN
    return out_a * torch.exp(lse_a - shift)[..., None] + out_b * torch.exp(lse_b - shift)[..., None], lse


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """`merge` in place, into out and lse; the parts may have another floating dtype."""
    # the share of the new part; of two empty rows it is -inf - -inf, and neither has any
    share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    out.lerp_(part_out.to(out.dtype), share.unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


def unmerge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """The inverse of `merge_`: takes keys out again that were counted twice.

    What is left is at least as much as what is taken, so at most a factor of two in precision is lost; a row without
    keys stays one.
    """
    share = torch.exp(part_lse - lse).nan_to_num_(0.0)
    rest = 1.0 - share
    out.lerp_(part_out.to(out.dtype), (-share / rest).unsqueeze(-1).to(out.dtype))
    lse.add_(rest.log())


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What all passes gave together, and its gradient: out, grad_out [B, H, Tq, Dv], lse [B, H, Tq].

    lse: +inf where a row is empty, so that its weights are 0. A gradient of lse stands in further channels, see
    `with_lse_gradient`.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor


def with_lse_gradient(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """query, key, value, out, grad_out with channels more, such that the sum of grad_out * out is less by grad_lse.

    That sum is what kernels subtract from each score's gradient, so the gradient of lse goes in with it. The other
    tensors are 0 in the new channels, and no score changes. Eight channels, as kernels want.
    """
    wide = [pad(x, (0, 8)) for x in (query, key, value, out, grad_out)]
    wide[3][..., -1] = -grad_lse
    wide[4][..., -1] = 1.0
    return tuple(wide)
