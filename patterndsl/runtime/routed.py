"""How do members of centroids attend each other on a CPU, where a token's results are averaged? Some routes at a time.

To `runtime.chunk` the members of a route are a chunk of queries, and its keys. What is gathered for some routes stays
in the caches, and what they give is added where it stands; each route is a softmax of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import Random, Relation
from patterndsl.lower.hulls import Hull, Lists
from patterndsl.runtime import by_rank
from patterndsl.runtime.by_rank import Ranked
from patterndsl.runtime.chunk import Block, Places, attend, differentiate, heads_of, lag_of, of_head, power_of
from patterndsl.runtime.data import DeviceData, Inputs, draws_of, each_once, facets_of, whole_lists
from patterndsl.runtime.function import Run
from patterndsl.runtime.scratch import Scratch
from patterndsl.runtime.views import with_unit_stride
from patterndsl.sema.bind import Bound

BLOCK_PAIRS = 1 << 20
"""Pairs of the routes that are attended together: with fewer, what it takes to call PyTorch shows; with more, scores
leave the caches."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """Routes made ready. name: of the input that lists their members. lag: see `chunk.lag_of`; where there is one, and
    members ascend, they attend as `in_order` says."""

    heads: frozenset[int]
    name: str
    lists: Lists
    rest: Relation
    lag: int | None
    in_order: Ranked | None
    draws: Mapping[Random, Tensor]


class _Part(NamedTuple):
    """Some routes of a head: order: their members [routes * width], any for none. lse: of their rows, to write or to
    read. pairs: which count."""

    order: Tensor
    lse: Tensor
    pairs: Ranked | tuple[Block, Places]


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
                if item.in_order is not None and not self.has_none[item.name]:  # they ascend: see `each_once`
                    yield _Part(members, of_rows, item.in_order)
                    continue
                block = Block(len(members) // width, 0, width, 0, width, None, True)
                missing = members < 0 if self.has_none[item.name] else None
                order = members if missing is None else members.clamp(min=0)
                positions = order if item.lag is None else order.to(dtype)
                places = Places(order, None, item.rest, item.lag, positions, data, missing)
                yield _Part(order, of_rows, (block, places))


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
                if isinstance(part.pairs, Ranked):
                    order, result = by_rank.attend(part.pairs, part.order, tensors, call.scale, made, part.lse)
                else:
                    order, result = part.order, made("out", len(part.order), value.shape[3])
                    attend(*part.pairs, tensors, call.scale, made, (result, part.lse))
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
        grads = tuple(torch.zeros(x.shape, dtype=log_count.dtype) for x in (query, key, value))
        for row, head in heads_of(query):
            of_key = head // kv_group
            tensors = query[row, head], key[row, of_key], value[row, of_key]
            totals = [x[row, at] for x, at in zip(grads, (head, of_key, of_key), strict=True)]
            of_sum, count = grad_out[row, head], log_count[row, head].exp().clamp_(min=1)
            of_mean: Tensor | None = None
            for part in call.parts(self.ready, row, head, log_count.dtype):
                lse = power_of(part.lse)
                if isinstance(part.pairs, Ranked):
                    order, found = by_rank.differentiate(
                        part.pairs, part.order, tensors, (of_sum, count, lse), call.scale, made
                    )
                else:
                    if of_mean is None:
                        of_mean = torch.div(of_sum, count[:, None], out=made("of mean", *of_sum.shape))
                    order, found = _differentiated(part, part.pairs, tensors, (of_mean, lse), call.scale, made)
                for total, some in zip(totals, found, strict=True):
                    total.index_add_(0, order, some)
        grad_query, grad_key, grad_value = (
            x.to(like.dtype) for x, like in zip(grads, (query, key, value), strict=True)
        )
        return grad_query, grad_key, grad_value


def _differentiated(
    part: _Part,
    pairs: tuple[Block, Places],
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    scale: float,
    made: Scratch,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Where gradients belong, and those of query, key and value, [routes * width, D]."""
    of_query = made("of query", len(part.order), tensors[0].shape[1])
    of_key, of_value = differentiate(*pairs, tensors, (results[0], results[1][:, None], None), scale, made, of_query)
    return part.order, (of_query, of_key.flatten(0, 1), of_value.flatten(0, 1))


def _ready(hull: Hull, bound: Bound) -> _Ready:
    assert hull.lists is not None
    rest, width = hull.said[0].rest, hull.lists.width
    name = next(shape.name for shape in bound.inputs if shape.names == hull.lists.names)
    draws, lag = draws_of(rest, 1, torch.device("cpu")), lag_of(rest)
    in_order = None if lag is None else by_rank.ranked(width, lag)
    return _Ready(frozenset(hull.heads), name, hull.lists, rest, lag, in_order, draws)
