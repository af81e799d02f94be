"""How do queries attend keys that each call lists for them? Small dense calls between gathered queries and keys.

A row of lists is a block of queries with the keys of its blocks; where these blocks of queries are small, a block of
keys is taken with many queries that list it. A route is its members among themselves. Calls of some rows at a time,
masked where the lists do not decide; only the pairs that are listed are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, Relation
from patterndsl.lower.hulls import Lists
from patterndsl.lower.lookup import Lookup
from patterndsl.runtime.data import DeviceData
from patterndsl.sema.parameters import Sizes

aten: Any = torch.ops.aten

MAX_PAIRS = 1 << 21
"""Pairs of a call, for one head."""
FEW_QUERIES = 16
"""With fewer queries in a block, it is blocks of keys that are taken with many."""
MANY_QUERIES = 64
"""So many of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The lists of one batch row, and what a pair must be besides being listed.

    tables: int64 [num_routes, rows, width], one route where they are lists; -1 lists nothing.
    """

    lists: Lists
    tables: Tensor
    rest: Relation
    data: DeviceData
    lookup: Lookup
    sizes: Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Queries q [n, T] and keys k [n, L] that meet, counted from the first of each, in groups; -1 where there is none.
    keep: bool [n, T, L], None for all. counts: [n, T, L], in how many calls a pair
    stands, each of which has its share of it; None for one."""

    q: Tensor
    k: Tensor
    keep: Tensor | None
    counts: Tensor | None = None


def calls(asked: Asked) -> Iterator[Call]:
    """All pairs of the lists, each once, but those of routes; see `Lists`."""
    if asked.lists.is_route:
        yield from _of_routes(asked)
    elif asked.lists.per < FEW_QUERIES <= asked.lists.of:
        yield from _of_blocks(asked)
    else:
        yield from _of_rows(asked)


def _of_rows(asked: Asked) -> Iterator[Call]:
    """Each row of lists with its keys."""
    lists, table = asked.lists, asked.tables[0]
    rows = torch.arange(table.shape[0], device=table.device)
    certain, possible = _verdicts(asked, rows[:, None], table)
    block = table.masked_fill(~possible, -1)
    is_sure = (certain & (block >= 0)).all(1) & _is_whole(asked, rows)
    pairs = lists.per * lists.width * lists.of
    for sure in (True, False):
        mine = (is_sure == sure).nonzero()[:, 0]
        for part in torch.split(mine, max(1, MAX_PAIRS // pairs)):
            q, k = _queries(asked, part), _keys(asked, block[part])
            yield Call(q, k, None if sure else _keep(asked, q, k))


def _of_blocks(asked: Asked) -> Iterator[Call]:
    """Each block of keys with queries that list it, some queries at a time so that little is held."""
    lists, table = asked.lists, asked.tables[0]
    at_once = max(MANY_QUERIES, MAX_PAIRS // max(1, lists.width * lists.per))
    for first in range(0, table.shape[0], at_once):
        rows = torch.arange(first, min(first + at_once, table.shape[0]), device=table.device)
        certain, possible = _verdicts(asked, rows[:, None], table[rows])
        block = table[rows].masked_fill(~possible, -1)
        item = (block >= 0).flatten().nonzero()[:, 0]
        item = item[block.flatten()[item].sort(stable=True).indices]
        row, block, sure = rows[item // lists.width], block.flatten()[item], certain.flatten()[item]
        units = max(1, MANY_QUERIES // lists.per)
        counts = torch.bincount(block, minlength=-(-asked.sizes.kv_len // lists.of))
        tiles = -(-counts // units)
        # the place of each item in its tile: tiles of a block follow one another, the last one may be short
        first_tile, first_item = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts
        place = torch.arange(len(item), device=item.device) - first_item[block]
        tile, slot = first_tile[block] + place // units, place % units
        num_tiles = int(tiles.sum())
        row_of = torch.full((num_tiles, units), -1, device=item.device)
        row_of[tile, slot] = row
        block_of = torch.repeat_interleave(torch.arange(len(tiles), device=item.device), tiles)
        unsure = torch.zeros(num_tiles, dtype=torch.bool, device=item.device)
        unsure[tile[~sure]] = True
        unsure |= (row_of < 0).any(1) | (block_of == len(tiles) - 1)
        for is_sure in (True, False):
            mine = (unsure != is_sure).nonzero()[:, 0]
            for part in torch.split(mine, max(1, MAX_PAIRS // (units * lists.per * lists.of))):
                q, k = _queries(asked, row_of[part]), _keys(asked, block_of[part, None])
                yield Call(q, k, None if is_sure and bool((q >= 0).all()) else _keep(asked, q, k))


def _of_routes(asked: Asked) -> Iterator[Call]:
    """Each route's members with each other; of pairs that count once, each by its share."""
    members = asked.tables[:, 0]
    members = members.masked_fill(members >= asked.sizes.kv_len, -1)
    is_member: Tensor | None = None
    if asked.lists.once:
        length = asked.sizes.kv_len + 1  # the last for what is no member
        is_member = torch.zeros(length, len(members), device=members.device)
        routes = torch.arange(len(members), device=members.device)[:, None].expand_as(members)
        is_member[members.clamp(min=-1), routes] = 1.0
    for part in torch.split(members, max(1, MAX_PAIRS // max(1, members.shape[1] ** 2))):
        queries = part - asked.sizes.q_start
        queries = queries.masked_fill((queries < 0) | (queries >= asked.sizes.q_len), -1)
        counts = None
        if is_member is not None:
            mine = is_member[part]
            counts = (mine @ mine.transpose(1, 2)).clamp(min=1)
        keep = _keep(asked, queries, part)
        yield Call(queries, part, None if bool(keep.all()) else keep, counts)


def _verdicts(asked: Asked, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all pairs of these rows and blocks count, and whether one may; bool like the blocks."""
    lists, sizes = asked.lists, asked.sizes
    first = (rows + lists.first_row) * lists.per
    q = first.clamp(min=sizes.q_start), (first + lists.per).clamp(max=sizes.q_start + sizes.q_len) - 1
    start = blocks.clamp(min=0) * lists.of
    k = start, (start + lists.of).clamp(max=sizes.kv_len) - 1
    found = verdict(asked.rest, Box(q, k, asked.lookup))
    certain, possible = (torch.as_tensor(item, device=blocks.device).expand_as(blocks) for item in found)
    return certain, possible & (blocks >= 0)


def _is_whole(asked: Asked, rows: Tensor) -> Tensor:
    """Whether the rows' blocks of queries and, as far as one can say, of keys reach beyond no end."""
    lists, sizes = asked.lists, asked.sizes
    first = (rows + lists.first_row) * lists.per
    inside = (first >= sizes.q_start) & (first + lists.per <= sizes.q_start + sizes.q_len)
    if sizes.kv_len % lists.of == 0:
        return inside
    return inside & ~(asked.tables[0][rows] == sizes.kv_len // lists.of).any(1)


def _queries(asked: Asked, rows: Tensor) -> Tensor:
    """[n, T] of rows [n] or [n, units]."""
    lists, sizes = asked.lists, asked.sizes
    inside = torch.arange(lists.per, device=rows.device)
    q = ((rows + lists.first_row) * lists.per)[..., None] + inside - sizes.q_start
    q = q.masked_fill((rows[..., None] < 0) | (q < 0) | (q >= sizes.q_len), -1)
    return q.flatten(1)


def _keys(asked: Asked, blocks: Tensor) -> Tensor:
    """[n, L] of blocks [n, width]."""
    inside = torch.arange(asked.lists.of, device=blocks.device)
    k = (blocks * asked.lists.of)[..., None] + inside
    return k.masked_fill((blocks[..., None] < 0) | (k >= asked.sizes.kv_len), -1).flatten(1)


def _keep(asked: Asked, q: Tensor, k: Tensor) -> Tensor:
    there = (q >= 0)[:, :, None] & (k >= 0)[:, None, :]
    if asked.rest == EVERYTHING:
        return there
    point = Point((q + asked.sizes.q_start)[:, :, None], k[:, None, :], 0, asked.data)
    return there & torch.as_tensor(member(asked.rest, point), device=q.device)


# ---- attention


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """[n, H, T, ...] of [H, length, ...] at places [n, T]."""
    found = x.index_select(1, places.clamp(min=0).flatten())
    return found.view(x.shape[0], *places.shape, *x.shape[2:]).transpose(0, 1)


def _bias(call: Call, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, [n, 1, T, L]."""
    if call.keep is None and call.counts is None:
        return None
    if call.counts is None:
        assert call.keep is not None
        bias = torch.zeros(call.keep.shape, dtype=dtype, device=call.keep.device)
    else:
        bias = -call.counts.to(dtype).log()
    return (bias if call.keep is None else bias.masked_fill_(~call.keep, -torch.inf))[:, None]


def forward(query: Tensor, key: Tensor, value: Tensor, found: Iterable[Call], scale: float) -> tuple[Tensor, Tensor]:
    """Output [H, Tq, Dv] and lse [H, Tq], in float32 at least, of query [H, Tq, D], key and value [H, Tk, D]; pairs of
    several calls add up. Rows without keys yield 0 and -inf."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros((*query.shape[:2], value.shape[2]), dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=dtype, device=query.device)
    for call in found:
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _taken(query, call.q),
            _taken(key, call.k),
            _taken(value, call.k),
            0.0,
            False,
            attn_mask=_bias(call, query.dtype),
            scale=scale,
        )
        if call.keep is not None:  # the kernel says 0 of a row without keys
            part_lse = part_lse.masked_fill(~call.keep.any(-1).unsqueeze(1), -torch.inf)
        _add(out, lse, call.q, part.transpose(0, 1).to(dtype), part_lse.transpose(0, 1).to(dtype))
    return out, lse


def _add(out: Tensor, lse: Tensor, places: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges results [H, n, T, D] of queries at places [n, T], where a query may stand several times."""
    at = places.flatten()
    part, part_lse = part.flatten(1, 2), part_lse.flatten(1, 2)
    if bool((at < 0).any()):
        there = (at >= 0).nonzero()[:, 0]
        at, part, part_lse = at[there], part.index_select(1, there), part_lse.index_select(1, there)
    by_head = at.expand(lse.shape[0], -1)
    largest = lse.scatter_reduce(1, by_head, part_lse, "amax").clamp(min=torch.finfo(lse.dtype).min)
    share = (part_lse - largest.gather(1, by_head)).exp()
    total = (lse - largest).exp()
    out.mul_(total[..., None])
    out.index_add_(1, at, part * share[..., None])
    total.scatter_add_(1, by_head, share)
    out.div_(total.masked_fill(total == 0, 1.0)[..., None])
    torch.add(largest, total.log(), out=lse)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    found: Iterable[Call],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. results: grad_out and out [H, Tq, D], lse [H, Tq], of all passes together."""
    dtype = results[2].dtype
    totals = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (query, key, value)]
    for call in found:
        grad_out, out, lse = (_taken(x, call.q) for x in results)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out.masked_fill((call.q < 0)[:, None, :, None], 0.0),
            _taken(query, call.q),
            _taken(key, call.k),
            _taken(value, call.k),
            out,
            lse,
            0.0,
            False,
            attn_mask=_bias(call, query.dtype),
            scale=scale,
        )
        for total, grad, places in zip(totals, grads, (call.q, call.k, call.k), strict=True):
            _sum_up(total, grad.transpose(0, 1).to(dtype), places)
    return totals[0], totals[1], totals[2]


def _sum_up(total: Tensor, grad: Tensor, places: Tensor) -> None:
    """Adds gradients [H, n, T, D] at places [n, T]; what is nowhere has none."""
    total.index_add_(1, places.clamp(min=0).flatten(), grad.flatten(1, 2))
