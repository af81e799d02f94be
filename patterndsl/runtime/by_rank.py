"""How do members of routes attend each other on a CPU where they ascend and order is all that is asked? By rank.

Pairs are taken by tiles, of which those above the diagonal are left out. A route is cut into pieces, and first pieces
of all routes lie together, then second ones: so the tiles of each diagonal are one batch, whose rows, keys and
gradients each lie in one piece of memory. Powers of scores are taken as they are; where their sums become too small or
too large for that, or results are not finite, routes go forward once more as a batch of PyTorch's flash kernel. What
plain code says of the same pairs is `runtime.chunk`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patterndsl.runtime.chunk import LN2
from patterndsl.runtime.scratch import Scratch

aten: Any = torch.ops.aten

FEWEST_ROWS = 64
"""Of a piece: products of fewer rows take longer than is saved."""
MOST_PIECES = 4
"""Of a route: of more, each diagonal is asked for by itself and saves less."""
LEAST, MOST = 2.0**-30, 2.0**60
"""Sums of powers that stand: with smaller ones products with small values would be 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Routes of so many members, each of which attends those at least `lag` before it, 0 or 1. mask: float32
    [piece, piece], 0 for pairs of a piece that count, -inf for the others."""

    width: int
    lag: int
    mask: Tensor

    @property
    def pieces(self) -> int:
        return self.width // self.mask.shape[0]

    def by_piece(self, x: Tensor) -> Tensor:
        """[pieces, routes * piece] of what is by route, [routes * width]."""
        return x.view(-1, self.pieces, self.mask.shape[0]).transpose(0, 1).reshape(self.pieces, -1)

    def cut(self, x: Tensor) -> Tensor:
        """[pieces, routes, piece, D] of what is by piece, [pieces * routes * piece, D]."""
        return x.view(self.pieces, -1, self.mask.shape[0], x.shape[1])


def ranked(width: int, lag: int) -> Ranked:
    number = max((n for n in range(1, MOST_PIECES + 1) if width % n == 0 and width // n >= FEWEST_ROWS), default=1)
    piece = width // number
    return Ranked(width, lag, torch.full((piece, piece), -torch.inf).triu_(1 - lag))


def attend(
    routes: Ranked, order: Tensor, tensors: tuple[Tensor, Tensor, Tensor], scale: float, made: Scratch, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Where results belong [rows], and they [rows, Dv], of members `order` [routes * width] of query and key [T, D] and
    value [T, Dv]; writes their lse [routes * width]. A row without keys gives 0 and -inf."""
    at = routes.by_piece(order).flatten()
    q, k = (routes.cut(_rows(x, at, made, name)) for name, x in zip(("query", "key"), tensors[:2], strict=True))
    v = routes.cut(_rows(tensors[2], at, made, "value"))
    out, total = made("out", *v.shape), torch.zeros_like(q[..., :1])
    for back in range(routes.pieces):  # from a piece of rows to one of keys
        rows, keys = slice(back, None), slice(routes.pieces - back)
        weights = made("weights 0", q[rows].shape[0] * q.shape[1], *routes.mask.shape)
        if not back:
            weights.copy_(routes.mask)
        weights.baddbmm_(q[rows].flatten(0, 1), k[keys].flatten(0, 1).mT, beta=1 - min(back, 1), alpha=scale / LN2)
        total[rows].flatten(0, 1).add_(weights.exp2_().sum(-1, keepdim=True))
        out[rows].flatten(0, 1).baddbmm_(weights, v[keys].flatten(0, 1), beta=min(back, 1))
    total[0, :, : routes.lag] = 1.0  # rows without keys
    least, most = (float(bound) for bound in total.aminmax())
    if not (least >= LEAST and most <= MOST and out.sum().isfinite()):
        return _by_flash(routes, order, tensors, scale, made, lse)
    out.div_(total)
    lse.view(-1, *total.shape[:1], routes.mask.shape[0]).transpose(0, 1).copy_(total[..., 0].log2_().mul_(LN2))
    lse.view(-1, routes.width)[:, : routes.lag] = -torch.inf
    return at, out.flatten(0, 2)


def _by_flash(
    routes: Ranked, order: Tensor, tensors: tuple[Tensor, Tensor, Tensor], scale: float, made: Scratch, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `attend`. Where members do not attend themselves, the kernel gets neither the first query nor the last key of
    each route, so that its causality is theirs."""
    lag, shape = routes.lag, (-1, routes.width)
    q, k, v = (
        _rows(x, order, made, name).view(*shape, x.shape[1]).unsqueeze(1)
        for name, x in zip(("query", "key", "value"), tensors, strict=True)
    )
    last = routes.width - lag
    if not last:  # nobody comes before a single member
        lse.fill_(-torch.inf)
        return order, made("out", len(order), v.shape[3]).zero_()
    out, out_lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, :, lag:], k[:, :, :last], v[:, :, :last], 0.0, True, scale=scale
    )
    lse = lse.view(shape)
    lse[:, :lag] = -torch.inf
    lse[:, lag:] = out_lse[:, 0]
    return order.view(shape)[:, lag:].flatten(), out.flatten(0, 2)


def differentiate(
    routes: Ranked,
    order: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    scale: float,
    made: Scratch,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Where gradients belong [rows], and those of query, key and value [rows, D]. results: the gradient of the sum of a
    token's routes, [T, Dv]; the number of these [T], by which that is divided; and lse [routes * width] as a power of
    2, see `chunk.power_of`.

    Weights are divided by the number instead of gradients: that is a logarithm that is added to lse.
    """
    grad_out, count, lse = results
    pieces, piece = routes.pieces, routes.mask.shape[0]
    at = routes.by_piece(order).flatten()
    q, k, v, grad = (
        routes.cut(_rows(x, at, made, name))
        for name, x in zip(("query", "key", "value", "grad"), (*tensors, grad_out), strict=True)
    )
    times = routes.cut(count.index_select(0, at)[:, None])
    less = routes.cut(routes.by_piece(lse).view(-1, 1)) + times.log2()
    number = q.shape[1]
    tiles, delta = list[tuple[Tensor, Tensor]](), torch.zeros_like(less)
    for back in range(pieces):  # from a piece of rows to one of keys
        rows, keys = slice(back, None), slice(pieces - back)
        size = ((pieces - back) * number, piece, piece)
        weights, of_scores = made(f"weights {back}", *size), made(f"of scores {back}", *size)
        if back:
            weights.copy_(less[rows].flatten(0, 1)).neg_()
        else:
            torch.sub(routes.mask, less.flatten(0, 1), out=weights)
        weights.baddbmm_(q[rows].flatten(0, 1), k[keys].flatten(0, 1).mT, alpha=scale / LN2).exp2_()
        torch.bmm(grad[rows].flatten(0, 1), v[keys].flatten(0, 1).mT, out=of_scores).mul_(weights)
        delta[rows] += of_scores.sum(-1).view(*delta[rows].shape)
        tiles.append((weights, of_scores))
    delta *= times
    of_query, of_key, of_value = (made(f"of {name}", *x.shape) for name, x in (("query", q), ("key", k), ("value", v)))
    for back, (weights, of_scores) in enumerate(tiles):
        rows, keys, beta = slice(back, None), slice(pieces - back), min(back, 1)
        of_scores.addcmul_(weights, delta[rows].flatten(0, 1), value=-1)
        into = of_query[rows], of_key[keys], of_value[keys]
        factors = (of_scores, k[keys], scale), (of_scores.mT, q[rows], scale), (weights.mT, grad[rows], 1.0)
        for total, (a, b, alpha) in zip(into, factors, strict=True):
            total.flatten(0, 1).baddbmm_(a, b.flatten(0, 1), beta=beta, alpha=alpha)
    return at, (of_query.flatten(0, 2), of_key.flatten(0, 2), of_value.flatten(0, 2))


def _rows(x: Tensor, order: Tensor, made: Scratch, name: str) -> Tensor:
    if x.dtype != made.dtype:
        return x.index_select(0, order).to(made.dtype)
    return torch.index_select(x, 0, order, out=made(name, len(order), x.shape[1]))
