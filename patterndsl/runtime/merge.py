"""How do partial results of attention combine? They form a commutative monoid (output, lse)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the disjoint union of two key sets, from attention over each.

    out: [..., D], lse: [...]; lse = log(sum(exp(scores))). The empty row (0, -inf) is the identity, and two empty rows
    merge to an empty row. Work: O(size of out).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    shift = torch.where(lse == -torch.inf, 0.0, lse)  # exp(-inf - 0) = 0 where -inf - -inf would be NaN
    return out_a * torch.exp(lse_a - shift)[..., None] + out_b * torch.exp(lse_b - shift)[..., None], lse
