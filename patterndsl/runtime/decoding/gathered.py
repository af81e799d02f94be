"""What does a query read of a store? Plain operations: ask the predicate at every place, and attend to what it keeps.

This is what the kernel is compared with, and what runs on a CPU. Where a row needs much of what its pages hold, they
are read where they lie; else what is needed is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation, depends_on
from patterndsl.runtime.data import DeviceData
from patterndsl.runtime.decoding.store import Store

MUCH = 0.2
"""Of the places of all rows: from here on it takes longer to gather what is needed than to read all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Newest:
    """Queries at the newest positions. query: [B, heads x kv_group, T, D], of the key heads of a store in turn.

    back: how many positions before the next token the first of them stands; T for the newest T. scale: of scores,
    above 0.
    """

    query: Tensor
    back: int
    kv_group: int
    scale: float


def positions_of(store: Store) -> Tensor:
    """int64 [B, places]: the position of the key at each place of the pages of a row, -1 where there is none, or where
    the same key is also in the ring."""
    pages = store.pages
    device, ring = store.device, pages.ring
    behind = -(-int(pages.older.max(initial=0)) // pages.page) * pages.page
    next_one = store.lengths[:, None]
    turn = torch.arange(pages.ring_pages * pages.page, device=device)
    newest = next_one - 1 - (next_one - 1 - turn) % max(1, ring)
    newest = torch.where(turn < ring, newest.clamp(min=-1), -1)
    rank = torch.arange(behind, device=device)
    lasting = store.lasting[rank.clamp(max=store.lasting.shape[0] - 1)] if behind else store.lasting[:0]
    return torch.cat([newest, torch.where(rank < store.older[:, None], lasting, -1)], 1)


def attend(store: Store, asked: Newest, relation: Relation, data: DeviceData) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, Dv] in the query's dtype and lse [B, Hq, T], in float32 at least.

    An empty row yields 0 and -inf, and so does a query before the first token. Work: the predicate at all places, and
    attention to those that any query of the row keeps, or to all places where these are not many more.
    """
    query, kv_group = asked.query, asked.kv_group
    batch, q_heads, q_len, dim = query.shape
    rows = batch, len(store.kv_heads), kv_group * q_len  # all queries of a key head, so that its keys are not repeated
    keep = _kept(store, asked, relation, data)
    is_needed = keep.flatten(1, 2).any(1)
    keep = keep.repeat(1, 1, kv_group, 1) if keep.shape[1] == 1 else keep.reshape(*rows, keep.shape[3])
    scaled = query.to(torch.promote_types(query.dtype, torch.float32)).reshape(*rows, dim) * asked.scale
    found = _read(store, scaled, keep) if is_needed.count_nonzero() >= MUCH * is_needed.numel() else None
    output, lse = _gathered(store, scaled, keep, is_needed) if found is None else found
    output = output.reshape(batch, q_heads, q_len, output.shape[3])
    return output.to(query.dtype), lse.reshape(batch, q_heads, q_len)


def _kept(store: Store, asked: Newest, relation: Relation, data: DeviceData) -> Tensor:
    """bool [B, Hq or 1, T, places]: what each query attends to."""
    batch, _, q_len, _ = asked.query.shape
    k = positions_of(store)
    q = (store.lengths[:, None] - asked.back + torch.arange(q_len, device=store.device))[:, None, :, None]
    head = torch.tensor(store.kv_heads, device=store.device)[:, None] * asked.kv_group
    head = (head + torch.arange(asked.kv_group, device=store.device)).flatten()[:, None, None]
    row = torch.arange(batch, device=store.device)[:, None, None, None]
    at = k[:, None, None, :]
    head = head if depends_on(relation, "head") else head[:1]
    keep = torch.as_tensor(member(relation, Point(q, at, head, data.at_row(row))), device=store.device)
    return (keep & (at >= 0) & (q >= 0)).expand(batch, -1, q_len, k.shape[1])


def _weights(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of what is kept, and its lse; 0 and -inf of a row of nothing."""
    scores = scores.masked_fill_(~keep, -torch.inf)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp_(), lse


# ---- all places of the pages, where they lie


def _read(store: Store, query: Tensor, keep: Tensor) -> tuple[Tensor, Tensor] | None:
    """query: [B, heads, rows, D], scaled. None where what no query attends is not finite: 0 x NaN is NaN."""
    (batch, heads, rows, _), num_places = query.shape, keep.shape[3]
    page, number = store.pages.page, store.pages.num_pages
    table = store.table[:, : num_places // page].long()
    row, column = (table >= 0).nonzero().unbind(1)
    held = table[row, column]
    owner = held.new_zeros(number).scatter_(0, held, row)  # a page that no row holds is as good as any
    keys, values = (x[:number].to(query.dtype) for x in (store.keys, store.values))
    by_page = query[owner] @ keys.mT  # [pages, heads, rows, page]
    scores = query.new_full((*table.shape, heads, rows, page), -torch.inf)
    scores[row, column] = by_page[held]
    weights, lse = _weights(scores.permute(0, 2, 3, 1, 4).reshape(batch, heads, rows, num_places), keep)
    of_page = weights.new_zeros(by_page.shape)
    of_page[held] = weights.view(batch, heads, rows, -1, page).permute(0, 3, 1, 2, 4)[row, column]
    output = weights.new_zeros(batch, heads, rows, values.shape[3]).index_add_(0, owner, of_page @ values)
    return (output, lse) if bool(output.isfinite().all()) else None


# ---- what is needed, gathered


def _gathered(store: Store, query: Tensor, keep: Tensor, is_needed: Tensor) -> tuple[Tensor, Tensor]:
    """query: [B, heads, rows, D], scaled; is_needed: bool [B, places]."""
    counts = is_needed.sum(1)
    most = int(counts.max()) if counts.numel() else 0
    order = is_needed.argsort(dim=1, descending=True, stable=True)[:, :most]
    place = torch.where(torch.arange(most, device=order.device) < counts[:, None], order, -1)
    key, value = (_rows_at(store, pool, place).to(query.dtype) for pool in (store.keys, store.values))
    kept = keep.gather(3, place.clamp(min=0)[:, None, None].expand(*keep.shape[:3], -1)) & (place >= 0)[:, None, None]
    weights, lse = _weights(query @ key.mT, kept)
    return _sums(weights, value, kept), lse


def _sums(weights: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """weights @ value, where the value of a key that a query does not attend, though another one does, may be anything:
    0 x NaN is NaN."""
    if bool(value.isfinite().all()):
        return weights @ value
    products = weights[..., None] * value[..., None, :, :]
    return products.masked_fill_(~keep[..., None], 0.0).sum(-2)


def _rows_at(store: Store, pool: Tensor, place: Tensor) -> Tensor:
    """[B, heads, places, width]: what is stored there, and 0 at -1."""
    size = store.pages.page
    page = store.table.long().gather(1, (place // size).clamp(min=0)).clamp(min=0)
    num_heads, rows = pool.shape[1], pool.flatten(0, 2)
    head = torch.arange(num_heads, device=pool.device)[:, None]
    where = (page[:, None] * num_heads + head) * size + (place % size)[:, None]
    found = rows.index_select(0, where.flatten()).view(*where.shape, rows.shape[1])
    return found.masked_fill_((place < 0)[:, None, :, None], 0.0)
