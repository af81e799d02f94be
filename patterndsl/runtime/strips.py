"""How do queries on a GPU attend single keys that each call lists for them? Gathered for some queries at a time.

No tile of a block-sparse kernel is emptier than one whose keys are chosen one by one, so keys are copied row by row; a
strip of queries at a time, so that little is held, and without a wait for the device. Backward gathers again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patterndsl.runtime.function import Run, attended

MAX_ELEMENTS = 1 << 27
"""Of the keys that are gathered at once, over batch and heads."""


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """keys: int64 [B, H or 1, Tq, width], -1 for none. keep: which of the keys of queries `start..stop` count, bool
    that broadcasts to [B, H, stop - start, width]."""

    keys: Tensor
    keep: Callable[[int, int], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, Dv] in the inputs' dtype and lse [B, H, Tq] in float32 at least, of query [B, H, Tq, D], key
    and value of as many heads; differentiable. Rows without keys yield 0 and -inf. Work: O(B H Tq width D)."""
    run = Run("masked", partial(_forward, lists=lists, scale=scale), partial(_gradients, lists=lists, scale=scale))
    return attended(query, key, value, run)


def _strips(query: Tensor, lists: Lists) -> Iterator[tuple[int, int]]:
    size = query.shape[0] * query.shape[1] * lists.keys.shape[-1] * query.shape[3]
    step = max(1, MAX_ELEMENTS // max(1, size))
    for start in range(0, query.shape[2], step):
        yield start, min(start + step, query.shape[2])


def _taken(x: Tensor, lists: Lists, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """[B, H, rows, width, D] of x [B, H, T, D], and where from."""
    places = lists.keys[:, :, start:stop].clamp(min=0).expand(x.shape[0], x.shape[1], -1, -1)
    at = places.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, at).view(*places.shape, x.shape[3]), at


def _scores(query: Tensor, keys: Tensor, lists: Lists, start: int, stop: int, scale: float) -> Tensor:
    products = (keys @ query[:, :, start:stop, :, None]).squeeze(-1)
    keep = (lists.keys[:, :, start:stop] >= 0) & lists.keep(start, stop)
    return (products.to(torch.promote_types(query.dtype, torch.float32)) * scale).masked_fill(~keep, -torch.inf)


def _forward(query: Tensor, key: Tensor, value: Tensor, lists: Lists, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device), []
    for start, stop in _strips(query, lists):
        scores = _scores(query, _taken(key, lists, start, stop)[0], lists, start, stop, scale)
        lse.append(scores.logsumexp(-1))
        weights = (scores - lse[-1].masked_fill(lse[-1] == -torch.inf, 0.0)[..., None]).exp().to(value.dtype)
        out[:, :, start:stop] = (weights[..., None, :] @ _taken(value, lists, start, stop)[0]).squeeze(-2)
    return out, torch.cat(lse, dim=2)


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lists: Lists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (key, value))
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # weights of an empty row are 0
    for start, stop in _strips(query, lists):
        rows = slice(start, stop)
        (keys, at), (values, at_value) = (_taken(x, lists, start, stop) for x in (key, value))
        weights = (_scores(query, keys, lists, start, stop, scale) - lse[:, :, rows, None]).exp()
        grad = grad_out[:, :, rows, None]
        grad_weights = (values @ grad.transpose(-1, -2)).squeeze(-1).to(lse.dtype)
        grad_scores = (weights * (grad_weights - delta[:, :, rows, None])) * scale
        grad_query[:, :, rows] = (grad_scores[..., None, :].to(keys.dtype) @ keys).squeeze(-2)
        part = grad_scores[..., None] * query[:, :, rows, None].to(lse.dtype)
        grad_key.scatter_add_(2, at, part.flatten(2, 3))
        grad_value.scatter_add_(2, at_value, (weights[..., None] * grad.to(lse.dtype)).flatten(2, 3))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
