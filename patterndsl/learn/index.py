"""Which keys will attention look at? An index learns it: small heads whose scores predict the attention of large ones.

DeepSeek-V3.2, section 2.1 (sparse attention with a lightning indexer): the score of key s for query t is the sum over
index heads of w(t) relu(q(t) k(s)), and it is trained towards the attention itself, by a loss of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from patterndsl.device.graphs import on_device
from patterndsl.ir.draws import NoInputs
from patterndsl.ir.meaning import Point, member
from patterndsl.learn.topk import Choose, best, highest, pooled
from patterndsl.sema.bind import BoundSelection

SAMPLED = 64
"""Rows of lists that a loss looks at."""


class Index(nn.Module):
    """Scores of blocks of keys for blocks of queries, the same for all heads of attention.

    dim: of x. heads, head_dim: of the index. Its projections see x without gradient, so that only `loss` moves them,
    and only them.
    """

    def __init__(self, dim: int, heads: int = 4, head_dim: int = 32) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query_projection = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_projection = nn.Linear(dim, head_dim, bias=False)
        self.weight_projection = nn.Linear(dim, heads, bias=False)

    def forward(
        self, x: Tensor, context: Tensor, selection: BoundSelection, q_start: int, choose: Choose = highest
    ) -> Tensor:
        """int64 [B, 1, rows, width], as `learn.topk` lists them; x: [B, Tq, dim], context: [B, Tk, dim]. choose: as
        `best` has it. Without gradient. Work: O(rows blocks heads head_dim)."""
        with torch.no_grad():
            query, weight, key = self._projected(x, context, selection, q_start)

            def scores(at: slice) -> Tensor:
                return self._scores(query[:, at], weight[:, at], key)[:, None]

            return best(scores, selection, x.shape[0] * self.heads, x.device, choose)

    def loss(
        self,
        x: Tensor,
        context: Tensor,
        attention: tuple[Tensor, Tensor, float],
        lists: Tensor,
        selection: BoundSelection,
        q_start: int,
    ) -> Tensor:
        """How far its scores are from attention, a scalar: the divergence of their softmax from the mean weights of all
        heads, over the candidates that are listed, in up to SAMPLED rows evenly spaced.

        attention: query [B, H, Tq, D], key [B, H, Tk, D] and scale, seen without gradient. Rows with fewer than two
        candidates have no part in it.
        """
        query, weight, key = self._projected(x, context, selection, q_start)
        rows = torch.arange(0, selection.num_rows, max(1, selection.num_rows // SAMPLED), device=x.device)
        chosen = lists[:, 0, rows]  # [B, S, width]
        numbers = (rows + selection.first_row)[:, None]
        point = Point(numbers, chosen, 0, NoInputs())
        among, always = (on_device(member(part, point), x.device) for part in (selection.among, selection.always))
        keep = (chosen >= 0) & among & ~always
        keep = keep & (keep.sum(-1, keepdim=True) >= 2)
        target = self._target(attention, rows, chosen.clamp(min=0), keep, selection, q_start)
        scores = self._scores(query[:, rows], weight[:, rows], key).gather(-1, chosen.clamp(min=0))
        has = keep.any(-1)
        log_weights = log_softmax(scores.masked_fill(~keep & has[..., None], -torch.inf), dim=-1)
        found = kl_div(log_weights.masked_fill(~keep, 0.0), target, reduction="none").sum(-1)
        return found.sum() / has.sum().clamp(min=1)

    def _projected(
        self, x: Tensor, context: Tensor, selection: BoundSelection, q_start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, rows, heads, D], weights [B, rows, heads] and keys [B, blocks, D] of the index."""
        x, context = x.detach(), context.detach()
        query = pooled(self.query_projection(x)[:, None], selection.per, q_start % selection.per)[:, 0]
        weight = pooled(self.weight_projection(x)[:, None], selection.per, q_start % selection.per)[:, 0]
        key = pooled(self.key_projection(context)[:, None], selection.of, 0)[:, 0]
        return query.reshape(*query.shape[:2], self.heads, self.head_dim), weight, key

    def _scores(self, query: Tensor, weight: Tensor, key: Tensor) -> Tensor:
        """[B, rows, blocks]."""
        products = (query @ key[:, None].transpose(-1, -2)).relu()  # [B, rows, heads, blocks]
        return (products * weight[..., None]).sum(2)

    @torch.no_grad()
    def _target(
        self,
        attention: tuple[Tensor, Tensor, float],
        rows: Tensor,
        blocks: Tensor,
        keep: Tensor,
        selection: BoundSelection,
        q_start: int,
    ) -> Tensor:
        """The share of attention that each listed block has for the last query of a row, the mean of all heads."""
        query, key, scale = attention
        last = ((rows + selection.first_row + 1) * selection.per - 1 - q_start).clamp(max=query.shape[2] - 1)
        inside = torch.arange(selection.of, device=rows.device)
        places = (blocks * selection.of)[..., None] + inside  # [B, S, width, of]
        there = keep[..., None] & (places < key.shape[2])
        at = places.clamp(max=key.shape[2] - 1).flatten(1)[:, None, :, None]
        keys = key.gather(2, at.expand(-1, key.shape[1], -1, key.shape[3]))
        keys = keys.view(*key.shape[:2], *places.shape[1:], key.shape[3])
        scores = torch.einsum("bhsd,bhswid->bhswi", query[:, :, last], keys) * scale
        scores = scores.masked_fill(~there[:, None], -torch.inf).flatten(3)
        weights = scores.softmax(-1).nan_to_num(0.0)
        shares: Tensor = weights.view(*weights.shape[:3], -1, selection.of).sum(-1)
        return shares.mean(1)
