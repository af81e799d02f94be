"""What does a query read of a store? Plain operations: ask the predicate at every place, gather what it keeps, attend.

This is what the kernel is compared with, and what runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation, depends_on
from patterndsl.runtime.data import DeviceData
from patterndsl.runtime.decoding.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class Newest:
    """Queries at the newest positions. query: [B, heads x kv_group, T, D], of the key heads of a store in turn.

    back: how many positions before the next token the first of them stands; T for the newest T. scale: of scores.
    """

    query: Tensor
    back: int
    kv_group: int
    scale: float


def positions_of(store: Store) -> Tensor:
    """int64 [B, places]: the position of the key at each place, -1 where there is none, or where the same key is also
    in the ring."""
    pages = store.pages
    device, ring = store.device, pages.ring
    behind = int(pages.older.max(initial=0))
    next_one = store.lengths[:, None]
    turn = torch.arange(ring, device=device)
    newest = next_one - 1 - (next_one - 1 - turn) % max(1, ring)
    rank = torch.arange(behind, device=device)
    lasting = torch.where(rank < store.older[:, None], store.lasting[:behind], -1)
    return torch.cat([newest.clamp(min=-1), lasting], 1)


def attend(store: Store, asked: Newest, relation: Relation, data: DeviceData) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, Dv] in the query's dtype and lse [B, Hq, T], in float32 at least.

    An empty row yields 0 and -inf, and so does a query before the first token. Work: the predicate at all places, and
    attention to those that any query of the row keeps.
    """
    query, kv_group = asked.query, asked.kv_group
    batch, heads, q_len, _ = query.shape
    k = positions_of(store)
    q = (store.lengths[:, None] - asked.back + torch.arange(q_len, device=store.device))[:, None, :, None]
    head = torch.tensor(store.kv_heads, device=store.device)[:, None] * kv_group
    head = (head + torch.arange(kv_group, device=store.device)).flatten()[:, None, None]
    row = torch.arange(batch, device=store.device)[:, None, None, None]
    at = k[:, None, None, :]
    head = head if depends_on(relation, "head") else head[:1]
    keep = torch.as_tensor(member(relation, Point(q, at, head, data.at_row(row))), device=store.device)
    keep = (keep & (at >= 0) & (q >= 0)).expand(batch, -1, q_len, k.shape[1])
    place = _needed(keep.flatten(1, 2).any(1))
    key, value = (_gathered(store, pool, place) for pool in (store.keys, store.values))
    keep = keep.gather(3, place.clamp(min=0)[:, None, None].expand(*keep.shape[:3], -1)) & (place >= 0)[:, None, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    tile = batch, len(store.kv_heads), kv_group * q_len  # all queries of a key head, so that its keys are not repeated
    scores = query.to(wide).reshape(*tile, query.shape[3]) @ key.to(wide).mT * asked.scale
    keep = keep.reshape(*tile, place.shape[1]) if keep.shape[1] > 1 else keep.repeat(1, 1, kv_group, 1)
    scores = scores.masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1) if place.shape[1] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    output = _sums(weights, value.to(wide), keep)
    return output.reshape(batch, heads, q_len, value.shape[3]).to(query.dtype), lse.reshape(batch, heads, q_len)


def _sums(weights: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """weights @ value, where the value of a key that a query does not attend, though another one does, may be anything:
    0 x NaN is NaN."""
    if bool(value.isfinite().all()):
        return weights @ value
    products = weights[..., None] * value[..., None, :, :]
    return products.masked_fill_(~keep[..., None], 0.0).sum(-2)


def _needed(is_needed: Tensor) -> Tensor:
    """int64 [B, most]: the places that are needed, of each row, filled up with -1."""
    counts = is_needed.sum(1)
    most = int(counts.max()) if counts.numel() else 0
    order = is_needed.argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(torch.arange(most, device=order.device) < counts[:, None], order, -1)


def _gathered(store: Store, pool: Tensor, place: Tensor) -> Tensor:
    """[B, heads, places, width]: what is stored there, and 0 at -1."""
    pages = store.pages
    ring = place < pages.ring
    rank = place - pages.ring
    at = torch.where(ring, place // pages.page, pages.ring_pages + rank // pages.page).clamp(min=0)
    inside = torch.where(ring, place, rank) % pages.page
    page = store.table.long().gather(1, at).clamp(min=0)
    num_heads, rows = pool.shape[1], pool.flatten(0, 2)
    head = torch.arange(num_heads, device=pool.device)[:, None]
    where = (page[:, None] * num_heads + head) * pages.page + inside[:, None]
    found = rows.index_select(0, where.flatten()).view(*where.shape, rows.shape[1])
    return found.masked_fill_((place < 0)[:, None, :, None], 0.0)
