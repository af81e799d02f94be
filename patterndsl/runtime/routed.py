"""How do members of centroids attend each other on a CPU, where a token's results are averaged? Some routes at a time.

To `runtime.chunk` the members of a route are a chunk of queries, and its keys. What is gathered for some routes stays
in the caches, and what they give is added where it stands; each route is a softmax of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import EVERYTHING, Random, Relation
from patterndsl.lower.hulls import Hull, Lists
from patterndsl.runtime.chunk import (
    WHOLE,
    Block,
    Places,
    attend,
    differentiate,
    heads_of,
    lag_of,
    of_head,
    power_of,
    taken,
)
from patterndsl.runtime.data import DeviceData, Inputs, draws_of, each_once, facets_of, whole_lists
from patterndsl.runtime.function import Run
from patterndsl.runtime.scratch import Scratch
from patterndsl.runtime.views import with_unit_stride
from patterndsl.sema.bind import Bound

aten: Any = torch.ops.aten

BLOCK_PAIRS = 1 << 20
"""Pairs of the routes that are attended together: with fewer, what it takes to call PyTorch shows; with more, scores
leave the caches."""
FEWEST_ROWS = 64
"""Of a step of the gradients: products of fewer rows take longer than is saved."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """Routes made ready. name: of the input that lists their members. by_rank: a mask of their pairs where members
    ascend and order is all that is asked; then steps are those of its blocks."""

    heads: frozenset[int]
    name: str
    lists: Lists
    rest: Relation
    lag: int | None
    by_rank: Tensor | None
    steps: tuple[tuple[slice, slice], ...]
    draws: Mapping[Random, Tensor]


class _Part(NamedTuple):
    """Some routes of a head: order: their members [routes * width], any for none. lse: of their rows, to write or to
    read. lag: the least distance in order from a member to a key of it, where members ascend and that is all that is
    asked."""

    block: Block
    places: Places
    order: Tensor
    lse: Tensor
    lag: int | None


@dataclass(slots=True, eq=False)
class _Call:
    """tables: the members of each input's routes, int64 [..., routes * width], -1 for none; has_none: whether
    there is one. lse: of each route's rows by batch row, head and routes, once they are known."""

    tables: Mapping[str, Tensor]
    has_none: Mapping[str, bool]
    facets: Mapping[tuple[str, Facet], Tensor]
    scale: float
    lse: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def parts(self, ready: Sequence[_Ready], row: int, head: int, dtype: torch.dtype) -> Iterator[_Part]:
        """Some routes of a head at a time."""
        for turn, item in enumerate(ready):
            if head not in item.heads:
                continue
            table, width = of_head(self.tables[item.name], row, head), item.lists.width
            lse = self.lse.setdefault((row, head, turn), torch.empty(table.numel(), dtype=dtype))
            facets = {name: of_head(x, row, head) for name, x in self.facets.items()} if item.lag is None else {}
            data = DeviceData(facets, item.draws)
            some = max(1, BLOCK_PAIRS // width**2) * width
            for members, of_rows in zip(torch.split(table, some), torch.split(lse, some), strict=True):
                number = len(members) // width
                if item.lag is not None and not self.has_none[item.name]:  # they ascend: see `each_once`
                    block = Block(number, 0, width, 0, width, item.by_rank, True, item.steps)
                    places = Places(members, None, EVERYTHING, None, members, data)
                    yield _Part(block, places, members, of_rows, item.lag)
                    continue
                block = Block(number, 0, width, 0, width, None, True)
                missing = members < 0 if self.has_none[item.name] else None
                order = members if missing is None else members.clamp(min=0)
                positions = order if item.lag is None else order.to(dtype)
                places = Places(order, None, item.rest, item.lag, positions, data, missing)
                yield _Part(block, places, order, of_rows, None)


class Routed:
    """Routes of a pattern made ready for a CPU; for finite tensors, and inputs that may differ from row to row and from
    head to head."""

    def __init__(self, hulls: Sequence[Hull], bound: Bound) -> None:
        self.length = bound.sizes.kv_len
        self.ready = tuple(_ready(hull, bound) for hull in hulls)

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: the mean over its routes of what a token gets in each, 0 where it is in none,
        and the log of how many routes these are. Memory beyond these: a number for each member of a route."""
        tables, has_none = dict[str, Tensor](), dict[str, bool]()
        for item in self.ready:
            flat = whole_lists(item.name, item.lists.names, given).to(torch.int64)
            table = each_once(flat.reshape(*flat.shape[:-1], -1, item.lists.width), self.length)
            tables[item.name] = table.flatten(-2)
            has_none[item.name] = bool((tables[item.name] < 0).any())
        facets = facets_of((item.rest for item in self.ready if item.lag is None), given)
        call = _Call(tables, has_none, facets, scale)
        return Run("masked", partial(self._results, call), partial(self._gradients, call))

    def _results(self, call: _Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = map(with_unit_stride, (query, key, value))
        dtype, kv_group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
        out = torch.zeros((*query.shape[:3], value.shape[3]), dtype=dtype)
        count = torch.zeros(query.shape[:3], dtype=dtype)
        made = Scratch(dtype, query.device)
        for row, head in heads_of(query):
            tensors = query[row, head], key[row, head // kv_group], value[row, head // kv_group]
            for part in call.parts(self.ready, row, head, dtype):
                lag, order, result = part.lag, part.order, made("out", len(part.order), value.shape[3])
                if lag is not None and lag < part.block.q_len:
                    order, result = _by_flash(part, lag, tensors, call.scale, made)
                else:
                    attend(part.block, part.places, tensors, call.scale, made, (result, part.lse))
                out[row, head].index_add_(0, order, result)
                count[row, head].index_add_(0, part.order, (part.lse > -torch.inf).to(dtype))
            out[row, head].div_(count[row, head].clamp(min=1)[:, None])
        return out.to(query.dtype), count.log_()

    def _gradients(
        self,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        log_count: Tensor,
        grad_out: Tensor,
        _: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not call.lse:
            self._results(call, query, key, value)
        query, key, value, grad_out = map(with_unit_stride, (query, key, value, grad_out))
        kv_group, made = query.shape[1] // key.shape[1], Scratch(log_count.dtype, query.device)
        found = tuple(torch.zeros(x.shape, dtype=log_count.dtype) for x in (query, key, value))
        for row, head in heads_of(query):
            of_key = head // kv_group
            tensors = query[row, head], key[row, of_key], value[row, of_key]
            totals = [x[row, at] for x, at in zip(found, (head, of_key, of_key), strict=True)]
            grad = made("averaged", *grad_out.shape[2:])
            torch.div(grad_out[row, head], log_count[row, head].exp().clamp_(min=1)[:, None], out=grad)
            for part in call.parts(self.ready, row, head, log_count.dtype):
                of_query = made("of query", len(part.order), query.shape[3])
                results = grad, power_of(part.lse)[:, None], None
                of_key_and_value = differentiate(part.block, part.places, tensors, results, call.scale, made, of_query)
                for total, some in zip(totals, (of_query, *of_key_and_value), strict=True):
                    total.index_add_(0, part.order, some.view(len(part.order), -1))
        grad_query, grad_key, grad_value = (
            x.to(like.dtype) for x, like in zip(found, (query, key, value), strict=True)
        )
        return grad_query, grad_key, grad_value


def _by_flash(
    part: _Part, lag: int, tensors: tuple[Tensor, Tensor, Tensor], scale: float, made: Scratch
) -> tuple[Tensor, Tensor]:
    """Where results belong [rows], and they [rows, D], of members that ascend; their lse is written. By PyTorch's flash
    kernel, whose scores stay in a core's caches: routes are its batch. Where members do not attend themselves, it goes
    without the first query and the last key of each, so that its causality is theirs."""
    q, k, v = (x.unsqueeze(1) for x in taken(part.block, part.places, tensors, made))
    last = part.block.kv_len - lag
    found, found_lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q[:, :, lag:], k[:, :, :last], v[:, :, :last], 0.0, True, scale=scale
    )
    lse = part.block.of_queries(part.lse)
    lse[:, :lag] = -torch.inf
    lse[:, lag:] = found_lse[:, 0]
    return part.block.of_queries(part.order)[:, lag:].flatten(), found.flatten(0, 2)


def _ready(hull: Hull, bound: Bound) -> _Ready:
    assert hull.lists is not None
    rest, width = hull.said[0].rest, hull.lists.width
    name = next(shape.name for shape in bound.inputs if shape.names == hull.lists.names)
    draws, lag = draws_of(rest, 1, torch.device("cpu")), lag_of(rest)
    by_rank = None if lag is None else torch.full((width, width), -torch.inf).triu_(1 - lag)
    return _Ready(frozenset(hull.heads), name, hull.lists, rest, lag, by_rank, _steps(width), draws)


def _steps(width: int) -> tuple[tuple[slice, slice], ...]:
    """The first half of a long route's rows goes alone, without the other half's keys, which come after all of them."""
    half = width // 2
    if half < FEWEST_ROWS:
        return (WHOLE,)
    return (slice(half, width), slice(width)), (slice(half), slice(half))
