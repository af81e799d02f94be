"""How do results of several parts become one where PyTorch differentiates? In operations that it records.

The same sums in place, for passes that know their own gradients, are in `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patterndsl.runtime.heads import for_each_query_head


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and lse of the sum of several parts' keys; differentiable, also where rows are empty.

    parts: out [B, H, Tq, D], lse [B, H, Tq].
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    empty = (lses == -torch.inf).all(0)
    safe = lses.masked_fill(empty, 0.0)
    weights = safe.softmax(0)
    out = torch.stack([(out * weight[..., None]) for (out, _), weight in zip(parts, weights, strict=True)]).sum(0)
    return out.to(parts[0][0].dtype), safe.logsumexp(0).masked_fill(empty, -torch.inf)


def otherwise(main: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The results of another pattern in rows that have no keys."""
    empty = main[1] == -torch.inf
    return torch.where(empty[..., None], other[0], main[0]), torch.where(empty, other[1], main[1])


def or_own_key(
    main: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float, *, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`otherwise` where the other pattern is `q == k`: its output is the value itself, so nothing is attended."""
    out, lse = main
    key, value = (for_each_query_head(x, query.shape[1]) for x in (key, value))
    empty = lse == -torch.inf
    out = torch.where(empty[..., None], value, out)
    if not want_lse:
        return out, None
    # the gradient of what is not asked for is 0, and 0 x NaN is NaN
    query, key = (torch.where(empty[..., None], x.to(lse.dtype), 0.0) for x in (query, key))
    scores = (query * key).sum(-1) * scale
    return out, torch.where(empty, scores, lse)
