"""What is the right answer? Dense attention straight from membership: slow, plain, and the truth for every other path.

It shares no code with lowering: the mask is the predicate asked at every pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.ir.meaning import Point, member
from patterndsl.runtime.data import DeviceData
from patterndsl.sema.bind import Bound

MAX_PAIRS = 1 << 28
"""Dense masks of more pairs (over batch and heads) are refused."""
_PAIRS_AT_ONCE = 1 << 22


def check_pairs(bound: Bound, num_positions: int, num_rows: int) -> None:
    """Raises InputError (E504) above MAX_PAIRS."""
    heads = bound.num_heads if len(bound.groups) > 1 else 1
    num_pairs = num_rows * heads * num_positions * bound.sizes.kv_len
    if num_pairs > MAX_PAIRS:
        raise input_error(
            "E504",
            f"a dense mask of {num_pairs:,} pairs is above the limit of {MAX_PAIRS:,}",
            "use block_mask() or gather_indices(), or rows() for fewer queries; compile for a smaller n",
        )


def membership_rows(bound: Bound, data: DeviceData, positions: Tensor, num_rows: int) -> Tensor:
    """bool [rows or 1, heads or 1, len(positions), kv_len]: the dense mask at some absolute query positions.

    Raises InputError (E504) above MAX_PAIRS.
    """
    check_pairs(bound, len(positions), num_rows)
    heads = bound.num_heads if len(bound.groups) > 1 else 1
    kv_len = bound.sizes.kv_len
    keep = torch.zeros(num_rows, heads, len(positions), kv_len, dtype=torch.bool, device=positions.device)
    key = torch.arange(kv_len, device=positions.device)[None, :]
    step = max(1, _PAIRS_AT_ONCE // max(1, kv_len))
    for row in range(num_rows):
        for head in range(heads):
            for start in range(0, len(positions), step):
                point = Point(positions[start : start + step, None], key, head, data.at_row(row))
                keep[row, head, start : start + step] = member(bound.relation, point)
    return keep


def attend(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T) value over the kept pairs, in float64, differentiable.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], keep: bool broadcastable to [B, Hq, Tq, Tk],
    or whole numbers, how often each key counts.
    Returns the output [B, Hq, Tq, Dv] and lse [B, Hq, Tq], both float64; an empty row yields 0 and -inf. A value that
    is not finite reaches exactly the rows that attend it, and a query or a key only gradients of its pairs. Work and
    memory: O(B Hq Tq Tk).
    """
    kv_group = query.shape[1] // max(1, key.shape[1])
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(kv_group, dim=1), v.repeat_interleave(kv_group, dim=1)
    scale = max(1, query.shape[-1]) ** -0.5 if scale is None else scale
    scores = _products(q, k) * scale
    if keep.dtype != torch.bool:
        scores, keep = scores + keep.clamp(min=1).log(), keep > 0
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    empty = lse == -torch.inf
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None]).masked_fill(~keep, 0.0)  # of NaN, too
    finite = torch.isfinite(v)
    output = weights @ torch.where(finite, v, 0.0)
    if not bool(finite.all()):
        kept = keep.expand(scores.shape).to(v.dtype)
        output = output + torch.where(kept @ (~finite).to(v.dtype) > 0, torch.nan, 0.0)
    return output, lse


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q @ k^T. Those that are not finite have no gradient: of pairs that do not count it would be 0 x NaN."""
    products = q @ k.transpose(-1, -2)
    finite = products.isfinite()
    if bool(finite.all()):
        return products
    q, k = (torch.where(x.isfinite(), x, 0.0) for x in (q, k))
    return torch.where(finite, q @ k.transpose(-1, -2), products.detach())


def rounded(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in the dtype of the query, the lse in float32 at least."""
    output, lse = attend(query, key, value, keep, scale)
    return output.to(query.dtype), lse if query.dtype == torch.float64 else lse.float()
