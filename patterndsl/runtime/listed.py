"""How do queries attend keys that each call lists for them? Small dense calls between gathered queries and keys.

A row of lists is a block of queries with the keys of its blocks; where these blocks of queries are small, a block of
keys is taken with many queries that list it. A route is its members among themselves. Calls of some rows at a time,
masked where the lists do not decide; only the pairs that are listed are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, Relation
from patterndsl.lower.hulls import Lists
from patterndsl.lower.lookup import Lookup
from patterndsl.runtime.data import DeviceData
from patterndsl.runtime.merge import merge_
from patterndsl.sema.parameters import Sizes

aten: Any = torch.ops.aten

MAX_PAIRS = 1 << 21
"""Pairs of a call, for one head."""
MAX_KEYS = 1 << 15
"""Gathered keys of a call: what is larger comes from fresh memory each time, and that takes longer than the copy."""
FEW_QUERIES = 16
"""With fewer queries in a block, it is blocks of keys that are taken with many."""
MANY_QUERIES = 64
"""So many of them."""
ROWS_AT_ONCE = 8192
"""Rows of lists whose blocks of keys are taken together."""


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
    """Blocks of queries q [n, a] and of keys k [n, b] that meet in n groups; -1 where there is none. Blocks of routes
    are single positions.

    keep: bool [n, queries, keys], None for all. counts: in how many calls a pair stands, each of which has its share of
    it; None for one. span: the blocks of queries that it may have. is_distinct: none of them twice.
    """

    q: Tensor
    k: Tensor
    keep: Tensor | None
    span: tuple[int, int]
    is_distinct: bool
    counts: Tensor | None = None


def calls(asked: Asked) -> Iterator[Call]:
    """All pairs of the lists, each once, but those of routes; see `Lists`."""
    if asked.lists.is_route:
        found = _of_routes(asked)
    elif asked.lists.per < FEW_QUERIES <= asked.lists.of:
        found = _of_blocks(asked)
    else:
        found = _of_rows(asked)
    yield from (call for call in found if len(call.q))


def _of_rows(asked: Asked) -> Iterator[Call]:
    """Each row of lists with its keys: those blocks of which all pairs count together, and the others one by one."""
    lists, table = asked.lists, asked.tables[0]
    rows, width = torch.arange(table.shape[0], device=table.device), table.shape[1]
    certain, possible = _verdicts(asked, rows[:, None], table)
    span = (0, table.shape[0])
    if lists.of == 1:  # single keys: a call for each would be many
        blocks = table.masked_fill(~possible, -1)
        is_sure = certain.all(1)
        for sure in (True, False):
            mine = (is_sure == sure).nonzero()[:, 0]
            for part in torch.split(mine, _at_once(lists.per, width)):
                keep = None if sure else _keep(asked, part[:, None], blocks[part])
                yield Call(part[:, None], blocks[part], keep, span, True)
        return
    # blocks that count as a whole stand first; rows with as many of them are one call
    number = certain.sum(1)
    ordered = table.gather(1, certain.to(torch.int8).argsort(dim=1, descending=True, stable=True))
    for count in range(1, width + 1):
        mine = (number == count).nonzero()[:, 0]
        for part in torch.split(mine, _at_once(lists.per, count * lists.of)):
            yield Call(part[:, None], ordered[part, :count], None, span, True)
    unsure = possible & ~certain
    turn = unsure.cumsum(1).masked_fill(~unsure, 0)
    for wave in range(1, int(turn.max()) + 1 if turn.numel() else 1):
        mine, place = (turn == wave).nonzero(as_tuple=True)
        chosen = table[mine, place]
        for at in torch.split(torch.arange(len(mine), device=mine.device), _at_once(lists.per, lists.of)):
            q, k = mine[at, None], chosen[at, None]
            yield Call(q, k, _keep(asked, q, k), span, True)


def _of_blocks(asked: Asked) -> Iterator[Call]:
    """Each block of keys with queries that list it, some queries at a time so that results add up in place."""
    lists, table = asked.lists, asked.tables[0]
    num_blocks = -(-asked.sizes.kv_len // lists.of)
    units = max(1, MANY_QUERIES // lists.per)
    for first in range(0, table.shape[0], ROWS_AT_ONCE):
        stop = min(first + ROWS_AT_ONCE, table.shape[0])
        rows = torch.arange(first, stop, device=table.device)
        certain, possible = _verdicts(asked, rows[:, None], table[rows])
        for sure in (True, False):
            item = ((certain if sure else possible & ~certain).flatten()).nonzero()[:, 0]
            block = table[rows].flatten()[item]
            order = block.sort(stable=True).indices
            row, block = rows[item[order] // lists.width], block[order]
            # tiles of a block follow one another, and the last one may be short
            counts = torch.bincount(block, minlength=num_blocks)
            tiles = -(-counts // units)
            place = torch.arange(len(item), device=item.device) - (counts.cumsum(0) - counts)[block]
            row_of = torch.full((int(tiles.sum()), units), -1, device=item.device)
            row_of[(tiles.cumsum(0) - tiles)[block] + place // units, place % units] = row
            block_of = torch.repeat_interleave(torch.arange(num_blocks, device=item.device), tiles)[:, None]
            at_once = _at_once(units * lists.per, lists.of)
            for q, k in zip(torch.split(row_of, at_once), torch.split(block_of, at_once), strict=True):
                # a missing query gives results that nobody takes
                yield Call(q, k, None if sure else _keep(asked, q, k), (first, stop), False)


def _of_routes(asked: Asked) -> Iterator[Call]:
    """Each route's members with each other; of pairs that count once, each by its share."""
    sizes, members = asked.sizes, asked.tables[:, 0]
    members = members.masked_fill(members >= sizes.kv_len, -1)
    is_member: Tensor | None = None
    if asked.lists.once:
        is_member = torch.zeros(sizes.kv_len + 1, len(members), device=members.device)  # the last is of no member
        routes = torch.arange(len(members), device=members.device)[:, None].expand_as(members)
        is_member[members, routes] = 1.0
    for part in torch.split(members, _at_once(members.shape[1], members.shape[1])):
        queries = part - sizes.q_start
        queries = queries.masked_fill((queries < 0) | (queries >= sizes.q_len), -1)
        counts = None
        if is_member is not None:
            mine = is_member[part]
            counts = (mine @ mine.transpose(1, 2)).clamp(min=1)
        keep = _keep(asked, queries, part)
        yield Call(queries, part, None if bool(keep.all()) else keep, (0, sizes.q_len), False, counts)


def _at_once(num_queries: int, num_keys: int) -> int:
    """Groups of a call."""
    return max(1, min(MAX_PAIRS // max(1, num_queries * num_keys), MAX_KEYS // max(1, num_keys)))


def _verdicts(asked: Asked, rows: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Whether all pairs of these rows and blocks are there and count, and whether one may; bool like the blocks."""
    lists, sizes = asked.lists, asked.sizes
    first, start = (rows + lists.first_row) * lists.per, blocks.clamp(min=0) * lists.of
    q_stop, k_stop = sizes.q_start + sizes.q_len, sizes.kv_len
    q = first.clamp(min=sizes.q_start), (first + lists.per).clamp(max=q_stop) - 1
    found = verdict(asked.rest, Box(q, (start, (start + lists.of).clamp(max=k_stop) - 1), asked.lookup))
    certain, possible = (torch.as_tensor(item, device=blocks.device).expand_as(blocks) for item in found)
    is_whole = (first >= sizes.q_start) & (first + lists.per <= q_stop) & (start + lists.of <= k_stop)
    there = (blocks >= 0) & (start < k_stop)
    return certain & is_whole & there, possible & there


def _keep(asked: Asked, q: Tensor, k: Tensor) -> Tensor:
    """bool [n, queries, keys] of blocks q [n, a] and k [n, b]."""
    lists, sizes = asked.lists, asked.sizes
    offset = 0 if lists.is_route else sizes.q_start - lists.first_row * lists.per
    q_at, k_at = _places(q, lists.per) - offset, _places(k, lists.of)
    there = (q_at >= 0) & (q_at < sizes.q_len) & _is_there(q, lists.per)
    there = there[:, :, None] & ((k_at < sizes.kv_len) & _is_there(k, lists.of))[:, None, :]
    if asked.rest == EVERYTHING:
        return there
    point = Point((q_at + sizes.q_start)[:, :, None], k_at[:, None, :], 0, asked.data)
    return there & torch.as_tensor(member(asked.rest, point), device=q.device)


def _places(blocks: Tensor, size: int) -> Tensor:
    """[n, a * size], the positions of blocks [n, a]."""
    return (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(1)


def _is_there(blocks: Tensor, size: int) -> Tensor:
    return (blocks >= 0).repeat_interleave(size, dim=1)


# ---- attention


def _blocked(x: Tensor, size: int, offset: int) -> Tensor:
    """[H, blocks, size, D] of x [H, T, D], which starts at `offset` of the first block, zeros around it."""
    short = -(offset + x.shape[1]) % size
    x = pad(x, (0, 0, offset, short)) if offset or short else x
    return x.reshape(x.shape[0], -1, size, x.shape[2])


def _taken(blocks: Tensor, at: Tensor) -> Tensor:
    """[n, H, a * size, D] of [H, blocks, size, D] at [n, a]."""
    num_heads, _, size, width = blocks.shape
    at = at.clamp(min=0)
    if num_heads == 1:  # rows of a matrix are copied half as fast again
        found = blocks[0].flatten(1).index_select(0, at.flatten())
        return found.view(at.shape[0], 1, at.shape[1] * size, width)
    found = blocks.index_select(1, at.flatten())
    return found.view(num_heads, at.shape[0], at.shape[1] * size, width).transpose(0, 1)


def _bias(call: Call, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, [n, 1, queries, keys]."""
    if call.keep is None and call.counts is None:
        return None
    if call.counts is None:
        assert call.keep is not None
        bias = torch.zeros(call.keep.shape, dtype=dtype, device=call.keep.device)
    else:
        bias = -call.counts.to(dtype).log()
    return (bias if call.keep is None else bias.masked_fill_(~call.keep, -torch.inf))[:, None]


def _offset(asked: Asked) -> int:
    """Positions of the first block of queries that are before the first query."""
    return 0 if asked.lists.is_route else asked.sizes.q_start - asked.lists.first_row * asked.lists.per


def forward(query: Tensor, key: Tensor, value: Tensor, asked: Asked, scale: float) -> tuple[Tensor, Tensor]:
    """Output [H, Tq, Dv] and lse [H, Tq], in float32 at least, of query [H, Tq, D], key and value [H, Tk, D]; pairs of
    several calls add up. Rows without keys yield 0 and -inf."""
    dtype, lists, offset = torch.promote_types(query.dtype, torch.float32), asked.lists, _offset(asked)
    q, k, v = _blocked(query, lists.per, offset), _blocked(key, lists.of, 0), _blocked(value, lists.of, 0)
    out = torch.zeros((*q.shape[:3], value.shape[2]), dtype=dtype, device=query.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    for call in calls(asked):
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _taken(q, call.q),
            _taken(k, call.k),
            _taken(v, call.k),
            0.0,
            False,
            attn_mask=_bias(call, query.dtype),
            scale=scale,
        )
        if call.keep is not None:  # the kernel says 0 of a row without keys
            part_lse = part_lse.masked_fill(~call.keep.any(-1).unsqueeze(1), -torch.inf)
        at = call.q.flatten()
        part, part_lse = (
            x.transpose(0, 1).to(dtype).reshape(x.shape[1], len(at), lists.per, *x.shape[3:]) for x in (part, part_lse)
        )
        _add(out, lse, call, part, part_lse)
    inside = slice(offset, offset + query.shape[1])
    return out.flatten(1, 2)[:, inside], lse.flatten(1, 2)[:, inside]


def _add(out: Tensor, lse: Tensor, call: Call, part: Tensor, part_lse: Tensor) -> None:
    """Merges results [H, blocks, size, D] of a call, where a block may stand several times."""
    at = call.q.flatten()
    if call.is_distinct:
        mine, mine_lse = out.index_select(1, at), lse.index_select(1, at)
        merge_(mine, mine_lse, part, part_lse)
        out.index_copy_(1, at, mine)
        lse.index_copy_(1, at, mine_lse)
        return
    there = (at >= 0).nonzero()[:, 0]
    if len(there) < len(at):
        at, part, part_lse = at[there], part.index_select(1, there), part_lse.index_select(1, there)
    first, stop = call.span
    out, lse, at = out[:, first:stop], lse[:, first:stop], at - first
    to = at[None, :, None].expand_as(part_lse)
    largest = lse.scatter_reduce(1, to, part_lse, "amax").clamp(min=torch.finfo(lse.dtype).min)
    share, total = (part_lse - largest.gather(1, to)).exp(), (lse - largest).exp()
    out.mul_(total[..., None])
    out.index_add_(1, at, part * share[..., None])
    total.scatter_add_(1, to, share)
    out.div_(total.masked_fill(total == 0, 1.0)[..., None])
    torch.add(largest, total.log(), out=lse)


def gradients(
    query: Tensor, key: Tensor, value: Tensor, results: tuple[Tensor, Tensor, Tensor], asked: Asked, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. results: grad_out and out [H, Tq, D], lse [H, Tq], of all passes together."""
    lists, offset, dtype = asked.lists, _offset(asked), results[2].dtype
    q, grad_out, out = (_blocked(x, lists.per, offset) for x in (query, *results[:2]))
    lse = _blocked(results[2][..., None], lists.per, offset)
    k, v = _blocked(key, lists.of, 0), _blocked(value, lists.of, 0)
    totals = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)]
    for call in calls(asked):
        there = _is_there(call.q, lists.per)[:, None, :, None]
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _taken(grad_out, call.q) * there,
            _taken(q, call.q),
            _taken(k, call.k),
            _taken(v, call.k),
            _taken(out, call.q) * there,
            _taken(lse, call.q)[..., 0].masked_fill(~there[..., 0], torch.inf),
            0.0,
            False,
            attn_mask=_bias(call, query.dtype),
            scale=scale,
        )
        for total, grad, at in zip(totals, grads, (call.q, call.k, call.k), strict=True):
            by_block = grad.transpose(0, 1).to(dtype).reshape(total.shape[0], -1, *total.shape[2:])
            total.index_add_(1, at.clamp(min=0).flatten(), by_block)
    grad_query, grad_key, grad_value = (x.flatten(1, 2) for x in totals)
    return grad_query[:, offset : offset + query.shape[1]], grad_key[:, : key.shape[1]], grad_value[:, : key.shape[1]]
