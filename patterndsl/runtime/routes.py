"""How do the members of centroids attend each other? Route by route, gathered, dense, and put back where they stand.

Roy et al. 2020, Routing Transformer, section 4.1: a token may be in no route or in several. Their results are merged as
one softmax in which a key counts once for each route, or averaged, as released code does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.device.graphs import on_device
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.hulls import CAUSAL, Lists
from patterndsl.runtime.data import Inputs, device_data
from patterndsl.sema.parameters import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Pairs of members of a route of which `rest` holds, for some heads. sizes: of the sequence."""

    lists: Lists
    rest: Relation
    sizes: Sizes

    def results(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, H, Tq, Dv] and lse [B, H, Tq] of the sum of all routes; of their union where pairs count `once`.

        query: [B, H, Tq, D], key and value of as many heads. Differentiable in both. Work and memory: O(routes
        width^2) for a head.
        """
        met = self._met(query, key, value, given)
        scores = (met.query @ met.key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
        if self.lists.once:
            scores = scores - self._multiplicity(met).to(scores.dtype).clamp(min=1).log()
        scores = scores.masked_fill(~met.keep, -torch.inf)
        has = met.keep.any(-1)
        safe = scores.masked_fill(~has[..., None], 0.0)
        lse = safe.logsumexp(-1).masked_fill(~has, -torch.inf)
        out = safe.softmax(-1).to(value.dtype) @ met.value
        total = _log_sum(lse.flatten(2), met.q_places.flatten(2), query.shape[2])
        at = total.gather(2, met.q_places.clamp(min=0).flatten(2)).view(met.q_places.shape)
        weight = (lse.masked_fill(~has, 0.0) - at.masked_fill(~has, 0.0)).exp() * has
        return _put_back(out * weight[..., None], met.q_places, query.shape[2]).to(value.dtype), total

    def totals(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
        """The sum of the results of the routes, [B, H, Tq, Dv], and in how many of them a query has keys, [B, H, Tq].

        Each route is a softmax of its own. Differentiable in the first. Work: as above, memory as PyTorch's SDPA.
        """
        met = self._met(query, key, value, given)
        is_causal, keep = self._is_by_rank(met), None
        has = met.q_places >= 0 if is_causal else met.keep.any(-1)
        if not is_causal:
            keep = met.keep | ~has[..., None]  # a row without keys is taken out again, and must not be NaN
        q, k, v = (x.flatten(0, 2).unsqueeze(1) for x in (met.query, met.key, met.value))
        mask = None if keep is None else keep.flatten(0, 2).unsqueeze(1)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
        out = out.reshape(*met.q_places.shape, value.shape[3]).to(torch.promote_types(out.dtype, torch.float32))
        count = torch.zeros(query.shape[:3], dtype=out.dtype, device=out.device)
        count.scatter_add_(2, met.q_places.clamp(min=0).flatten(2), has.flatten(2).to(out.dtype))
        if not is_causal:  # or all have keys
            out = out * has[..., None]
        return _put_back(out, met.q_places, query.shape[2]), count

    def _is_by_rank(self, met: _Met) -> bool:
        """Whether causality is that of places in the lists, which ascend: all members are there, and nothing else is
        asked. A GPU would have to wait for the answer."""
        is_plain = self.rest == CAUSAL and self.sizes.q_start == 0 and met.members.device.type == "cpu"
        return is_plain and bool((met.q_places >= 0).all())

    def _met(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs) -> _Met:
        batch, heads, q_len, _ = query.shape
        lists, sizes = self.lists, self.sizes
        members = torch.stack([_by_head(given[name], batch, heads) for name in lists.names], dim=2)  # [B, H, C, w]
        members = members.masked_fill(members >= sizes.kv_len, -1)
        q_places = members - sizes.q_start
        q_places = q_places.masked_fill((q_places < 0) | (q_places >= q_len) | (members < 0), -1)
        others = {name: _by_head(x, batch, heads).flatten(0, 1) for name, x in given.items() if name not in lists.names}
        q, k, v = (_gathered(x, at) for x, at in ((query, q_places), (key, members), (value, members)))
        return _Met(q, k, v, members, q_places, partial(self._keep, members, q_places, others))

    def _keep(self, members: Tensor, q_places: Tensor, others: Inputs) -> Tensor:
        data = device_data(self.rest, 1, others, members.device)
        row = torch.arange(members.shape[0] * members.shape[1], device=members.device)
        row = row.view(*members.shape[:2], 1, 1, 1)
        point = Point(members[..., :, None], members[..., None, :], 0, data.at_row(row))
        holds = on_device(member(self.rest, point), members.device)
        return (q_places >= 0)[..., :, None] & (members >= 0)[..., None, :] & holds

    def _multiplicity(self, met: _Met) -> Tensor:
        """In how many routes the two members of each pair are, [B, H, C, w, w]."""
        batch, heads, routes, _ = met.members.shape
        places = met.members.where(met.members >= 0, self.sizes.kv_len)
        found = torch.zeros(batch, heads, self.sizes.kv_len + 1, routes, device=met.members.device)
        routed = torch.arange(routes, device=found.device)[:, None].expand_as(places)
        flat = (places * routes + routed).flatten(2)
        found = found.flatten(2).scatter_(2, flat, 1.0).view(batch, heads, -1, routes)
        at = places.flatten(2)[..., None].expand(-1, -1, -1, routes)
        mine = found.gather(2, at).view(*places.shape, routes)
        return mine @ mine.transpose(-1, -2)


@dataclass(frozen=True, eq=False)
class _Met:
    """Members of routes [B, H, C, w] as queries, keys and values [B, H, C, w, D], -1 where there is none. q_places: the
    members counted from the first query, -1 where they are none."""

    query: Tensor
    key: Tensor
    value: Tensor
    members: Tensor
    q_places: Tensor
    kept: Callable[[], Tensor]

    @cached_property
    def keep(self) -> Tensor:
        """Which pairs count, bool [B, H, C, w, w]."""
        return self.kept()


def _by_head(values: Tensor, batch: int, heads: int) -> Tensor:
    """[B, H, length] of inputs of any kind."""
    while values.dim() < 3:
        values = values.unsqueeze(values.dim() - 1)
    return values.expand(batch, heads, -1)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[3]).index_select(0, _row_numbers(places, x.shape[2]))
    return rows.view(*places.shape, x.shape[3])


def _row_numbers(places: Tensor, length: int) -> Tensor:
    """int64 [B H C w]: of places [B, H, C, w] among all rows of a tensor [B, H, length, D]: whole rows are copied and
    added in a half of the time that their channels take one by one."""
    batch, heads = places.shape[:2]
    first = torch.arange(0, batch * heads * length, length, device=places.device).view(batch, heads, 1, 1)
    return (places.clamp(min=0) + first).flatten()


def _put_back(x: Tensor, places: Tensor, length: int) -> Tensor:
    """The sums [B, H, length, D] of x [B, H, C, w, D] at places; what is nowhere is 0."""
    into = torch.zeros(x.shape[0] * x.shape[1] * length, x.shape[4], dtype=x.dtype, device=x.device)
    into = into.index_add(0, _row_numbers(places, length), x.flatten(0, 3))
    return into.view(*x.shape[:2], length, x.shape[4])


def _log_sum(lse: Tensor, places: Tensor, length: int) -> Tensor:
    """The log of the sums of exp(lse) [B, H, n] at places, [B, H, length]; -inf where there are none."""
    at = places.clamp(min=0)
    with torch.no_grad():
        largest = torch.full((*lse.shape[:2], length), -torch.inf, dtype=lse.dtype, device=lse.device)
        largest = largest.scatter_reduce(2, at, lse, "amax")
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = torch.zeros_like(largest).scatter_add(2, at, (lse - largest.gather(2, at)).exp())
    empty = sums == 0
    return torch.where(empty, -torch.inf, sums.masked_fill(empty, 1.0).log() + largest)


def averaged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean of parts given as sums [B, H, Tq, D] and counts [B, H, Tq], and the log of the counts; a query that is
    in none yields 0."""
    total = torch.stack([out for out, _ in parts]).sum(0)
    count = torch.stack([count for _, count in parts]).sum(0)
    return total / count.clamp(min=1)[..., None].to(total.dtype), count.log()
