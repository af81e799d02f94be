"""How do chunks in the orders of a call run on a CPU? Some chunks at a time, head by head.

All hulls of a pattern, such as rounds of hashing, meet in one log-sum-exp, with which each gives its part of the
gradients. What a hull gives is made in its own order and put back once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import Random, Relation
from patterndsl.lower.chunks import chunks_of
from patterndsl.lower.hulls import Hull
from patterndsl.lower.shapes import Piece
from patterndsl.runtime.chunk import (
    Block,
    Places,
    attend,
    by_position,
    differentiate,
    heads_of,
    lag_of,
    of_head,
    power_of,
    put_back,
)
from patterndsl.runtime.data import DeviceData, Inputs, draws_of, facets_of, place_of
from patterndsl.runtime.function import Run
from patterndsl.runtime.merge import merge_
from patterndsl.runtime.scratch import Scratch
from patterndsl.runtime.views import with_unit_stride
from patterndsl.sema.bind import Bound

BLOCK_PAIRS = 1 << 19
"""Pairs of a block: with fewer, what it takes to call PyTorch shows; with more, scores leave the caches."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A hull made ready. is_total: each query is in a block that is the first to have any of its queries."""

    heads: frozenset[int]
    order: str | None
    rest: Relation
    lag: int | None
    blocks: tuple[Block, ...]
    draws: Mapping[Random, Tensor]
    is_total: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What a call's inputs say: the orders by those that hulls are ordered by, where positions stand in them, and
    facets; int64 [T], [B or 1, T] or [B or 1, H, T]."""

    orders: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    facets: Mapping[tuple[str, Facet], Tensor]

    def of_head(self, item: _Ready, row: int, head: int, dtype: torch.dtype, length: int) -> Places:
        """Those of a hull and a head."""
        order, back = None, None
        if item.order is not None:
            order, back = (of_head(x[item.order], row, head) for x in (self.orders, self.places))
        positions = torch.arange(length) if order is None else order
        if item.lag is not None:
            return Places(order, back, item.rest, item.lag, positions.to(dtype), DeviceData({}, {}))
        facets = {name: of_head(x, row, head) for name, x in self.facets.items()}
        return Places(order, back, item.rest, None, positions, DeviceData(facets, item.draws))


@dataclass(slots=True, eq=False)
class _Call:
    """alone: rows without keys that attended their own, int64 [number, 3] of batch row, head and position, once it is
    known."""

    given: _Given
    scale: float
    alone: Tensor | None = None


class Chunked:
    """Hulls of chunks made ready for a CPU; call it with finite tensors and checked inputs, which may differ from row
    to row and from head to head. A fallback can only be that of each query to its own key."""

    def __init__(self, hulls: Sequence[Hull], bound: Bound) -> None:
        self.ready = tuple(_ready(hull, bound.sizes.q_len) for hull in hulls)
        self.or_own_key = bound.fallback is not None
        self.has_all_heads = all(any(head in item.heads for item in self.ready) for head in range(bound.num_heads))

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32 at least. Memory beyond these: the
        orders, and results of one head."""
        call = _Call(self._given(given), scale)
        return Run("masked", partial(self._results, call), partial(self._gradients, call))

    def _given(self, inputs: Inputs) -> _Given:
        names = dict.fromkeys(item.order for item in self.ready if item.order is not None)
        orders = {name: inputs[name].argsort(stable=True, dim=-1) for name in names}
        asked = (item.rest for item in self.ready if item.lag is None)
        return _Given(orders, {name: place_of(order) for name, order in orders.items()}, facets_of(asked, inputs))

    def _of_head(self, given: _Given, row: int, head: int, lse: Tensor) -> Iterator[tuple[_Ready, Places]]:
        mine = (item for item in self.ready if head in item.heads)
        return ((item, given.of_head(item, row, head, lse.dtype, lse.shape[2])) for item in mine)

    def _results(self, call: _Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = map(with_unit_stride, (query, key, value))
        dtype, kv_group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
        out = torch.empty((*query.shape[:3], value.shape[3]), dtype=dtype)
        lse = torch.empty(query.shape[:3], dtype=dtype)
        if not self.has_all_heads:
            out.zero_()
            lse.fill_(-torch.inf)
        made = Scratch(dtype, query.device)
        part, part_lse = made("out", *out.shape[2:]), made("lse", lse.shape[2])
        for row, head in heads_of(query):
            tensors = query[row, head], key[row, head // kv_group], value[row, head // kv_group]
            mine, mine_lse = out[row, head], lse[row, head]
            for turn, (item, places) in enumerate(self._of_head(call.given, row, head, lse)):
                if not item.is_total:
                    part.zero_()
                    part_lse.fill_(-torch.inf)
                for block in item.blocks:
                    attend(block, places, tensors, call.scale, made, (part, part_lse))
                if not turn:
                    put_back(part, mine, places.back)
                    put_back(part_lse, mine_lse, places.back)
                    continue
                for rows, some in by_position((part, part_lse), places.back, made):
                    merge_(mine[rows], mine_lse[rows], *some)
        if self.or_own_key:
            call.alone = (lse == -torch.inf).nonzero()
            at, at_key = _rows_of(call.alone, kv_group)
            out[at] = value[at_key].to(dtype)
            lse[at] = (query[at].to(dtype) * key[at_key].to(dtype)).sum(-1) * call.scale
        return out.to(query.dtype), lse

    def _gradients(
        self,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.or_own_key and call.alone is None:
            self._results(call, query, key, value)
        query, key, value, out, grad_out = map(with_unit_stride, (query, key, value, out, grad_out))
        kv_group, made = query.shape[1] // key.shape[1], Scratch(lse.dtype, query.device)
        new = torch.empty if self.has_all_heads else torch.zeros
        found = tuple(new(x.shape, dtype=lse.dtype) for x in (query, key, value))
        parts = [made(f"total {at}", *x.shape[2:]) for at, x in enumerate(found)]
        for row, head in heads_of(query):
            of_key = head // kv_group
            delta = _row_products(grad_out[row, head], out[row, head], made)
            if grad_lse is not None:
                delta.sub_(grad_lse[row, head])
            power = power_of(lse[row, head])
            tensors = query[row, head], key[row, of_key], value[row, of_key]
            totals = [x[row, at] for x, at in zip(found, (head, of_key, of_key), strict=True)]
            is_begun = [not self.has_all_heads, *[not self.has_all_heads or head % kv_group > 0] * 2]
            for item, places in self._of_head(call.given, row, head, lse):
                results = grad_out[row, head], places.by_place(power)[:, None], places.by_place(delta)[:, None]
                for part in parts[1:] if item.is_total else parts:
                    part.zero_()
                for block in item.blocks:
                    of_query = parts[0][block.queries]
                    grads = differentiate(block, places, tensors, results, call.scale, made, of_query)
                    for part, grad in zip(parts[1:], grads, strict=True):
                        block.add_keys(part, grad)
                for total, part, goes_on in zip(totals, parts, is_begun, strict=True):
                    if not goes_on:
                        put_back(part, total, places.back)
                        continue
                    for rows, (some,) in by_position((part,), places.back, made):
                        total[rows].add_(some)
                is_begun = [True] * 3
        if call.alone is not None:
            _add_own(query, key, grad_out, grad_lse, found, call.alone, call.scale)
        grad_query, grad_key, grad_value = (
            x.to(like.dtype) for x, like in zip(found, (query, key, value), strict=True)
        )
        return grad_query, grad_key, grad_value


def _row_products(a: Tensor, b: Tensor, made: Scratch) -> Tensor:
    """[T] of [T, D] each."""
    found = made("products", a.shape[0])
    for some in zip(*(torch.split(x, 1024) for x in (a, b, found)), strict=True):
        torch.sum(some[0].to(made.dtype) * some[1], -1, out=some[2])
    return found


# ---- rows without keys that attend their own


def _rows_of(alone: Tensor, kv_group: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where queries lie, and their keys."""
    row, head, position = alone.unbind(1)
    return (row, head, position), (row, head // kv_group, position)


def _add_own(
    query: Tensor,
    key: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    found: Sequence[Tensor],
    alone: Tensor,
    scale: float,
) -> None:
    """Adds their gradients: the output is the value itself, and the lse the only score."""
    at, at_key = _rows_of(alone, query.shape[1] // key.shape[1])
    dtype = found[0].dtype
    found[2].index_put_(at_key, grad_out[at].to(dtype), accumulate=True)
    if grad_lse is not None:
        share = (grad_lse[at] * scale)[:, None].to(dtype)
        found[0].index_put_(at, share * key[at_key], accumulate=True)
        found[1].index_put_(at_key, share * query[at], accumulate=True)


# ---- what is made ready


def _ready(hull: Hull, length: int) -> _Ready:
    rest, seen = hull.said[0].rest, torch.zeros(length, dtype=torch.bool)
    blocks = tuple(block for item in hull.passes for block in _blocks(item.piece, seen))
    draws = draws_of(rest, 1, torch.device("cpu"))
    is_total = sum(block.number * block.q_len for block in blocks if block.is_first) == length
    return _Ready(frozenset(hull.heads), hull.order, rest, lag_of(rest), blocks, draws, is_total)


def _blocks(piece: Piece, seen: Tensor) -> Iterator[Block]:
    """seen: the places whose queries were in blocks before, which this adds to."""
    found = chunks_of(piece)
    assert found is not None
    for chunks in found:
        mask = (
            None
            if chunks.mask is None
            else torch.zeros(chunks.q_len, chunks.kv_len).masked_fill_(~torch.tensor(chunks.mask), -torch.inf)
        )
        most = max(1, BLOCK_PAIRS // (chunks.q_len * chunks.kv_len))
        for first in range(0, chunks.number, most):
            moved, some = first * chunks.q_len, min(most, chunks.number - first)
            places = slice(chunks.q_start + moved, chunks.q_start + moved + some * chunks.q_len)
            is_first = not seen[places].any()
            seen[places] = True
            yield Block(some, places.start, chunks.q_len, chunks.k_start + moved, chunks.kv_len, mask, is_first)
