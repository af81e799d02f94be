"""How does a pattern that places positions by its inputs run on a GPU? On generated kernels, in each call's orders.

Tiles are of places, and the same in each call; kernels reach the rows that stand there, so nothing is permuted. Each
hull is a launch for all its heads that goes on from the results of those before it: rounds of hashing, and windows
beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import EVERYTHING, Random, Relation, disjunction
from patterndsl.lower.hulls import Hull
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.runtime.data import Inputs, facet_of, place_of
from patterndsl.runtime.function import Run
from patterndsl.runtime.kernels.asked import Asked, Orders, asked_by, draws_for
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.lists import NOBODY, Found, WorkLists
from patterndsl.runtime.kernels.predicate import Predicate, predicate_of
from patterndsl.sema.bind import Bound

MOST_COUNTED = 2048
"""Labels up to which keys are sorted by counting: what is counted is then no more than two numbers for each key."""


@dataclass(frozen=True, slots=True)
class _Where:
    """Tiles of some heads. is_exact: whether every pair of places there is the pattern's."""

    places: Relation
    heads: tuple[int, ...]
    is_exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A hull made ready: its tiles, what is asked of pairs there, the input that orders places, and what is drawn.
    lists: the work over its tiles by how many heads share keys, which rounds have together."""

    where: _Where
    predicate: Predicate
    order: str | None
    draws: Mapping[Random, Tensor]
    lists: dict[int, WorkLists]


@dataclass(slots=True, eq=False)
class _Call:
    """What a call launches, one after the other. alone: rows without keys that attended their own, once it is known."""

    launches: Sequence[tuple[WorkLists, Asked]]
    scale: float
    alone: Tensor | None = None


class Ordered:
    """The hulls of a pattern made ready for a GPU.

    Inputs may differ from row to row and from head to head. They are int64 but for labels that the call has found: of
    these is known how many there are. hulls: those of all heads first. A fallback can only be that of each query to its
    own key.
    """

    def __init__(self, hulls: Sequence[Hull], bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device
        lists = dict[_Where, dict[int, WorkLists]]()
        self.ready = tuple(_ready(hull, bound, device, lists) for hull in hulls)
        self.orders = tuple(dict.fromkeys(item.order for item in self.ready if item.order is not None))
        self.tables = tuple(dict.fromkeys(table for item in self.ready for table in item.predicate.facets))
        self.labels = _numbers_of_labels(bound)
        self.is_begun = len(hulls[0].heads) < bound.num_heads  # whether there must be results to go on from
        self.or_own_key = bound.fallback is not None

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32. Memory beyond these: what orders
        take, a number for each place of each round."""
        call = _Call(self._launches(query, key, given), scale)
        return Run("masked", partial(self._results, call), partial(self._gradients, call))

    def _results(self, call: _Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        results = None
        if self.is_begun:
            out = query.new_zeros(*query.shape[:3], value.shape[3])
            results = out, query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        for lists, asked in call.launches:
            goes_on = results is not None
            results = forward(lists, asked, call.scale, query, key, value, results, goes_on=goes_on)
        assert results is not None
        if self.or_own_key:
            from patterndsl.runtime.kernels.own import attend_own

            call.alone = attend_own(query, key, value, *results, call.scale)
        return results

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
        found = None
        if self.is_begun:
            found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for lists, asked in call.launches:
            adds = found is not None
            tensors = query, key, value, out, lse, grad_out, grad_lse
            found = gradients(lists, asked, call.scale, *tensors, found, adds=(adds, adds))
        assert found is not None
        if call.alone is not None:
            from patterndsl.runtime.kernels.own import add_own_gradients

            add_own_gradients(query, key, call.alone, grad_out, grad_lse, found, call.scale)
        return found

    # ---- what a call's inputs say

    def _launches(self, query: Tensor, key: Tensor, given: Inputs) -> Sequence[tuple[WorkLists, Asked]]:
        orders = {name: self._order(name, given[name]) for name in self.orders}
        facets = {(name, facet): _facet(name, facet, given, orders) for name, facet in self.tables}
        of_name = {name: Orders(order, order, True) for name, order in orders.items()}
        kv_group, sizes = query.shape[1] // key.shape[1], self.bound.sizes
        return [
            (
                self._lists_of(item, kv_group),
                asked_by(
                    item.predicate, sizes, facets, item.draws, None if item.order is None else of_name[item.order]
                ),
            )
            for item in self.ready
        ]

    def _order(self, name: str, values: Tensor) -> Tensor:
        """`order_of` an input, by counting where that is possible."""
        if values.dtype == torch.int64 or name not in self.labels:
            return order_of(values)
        from patterndsl.runtime.kernels.sorting import order_by_label

        return order_by_label(values if values.dim() == 3 else values.unsqueeze(1), self.labels[name]).order

    def _lists_of(self, item: _Ready, kv_group: int) -> WorkLists:
        if kv_group not in item.lists:
            sizes, where = self.bound.sizes, item.where

            def find(q_block: int, kv_block: int) -> Found:
                tiles = find_tiles(where.places, sizes, Lookup(), q_block, kv_block, tell_full=where.is_exact)
                return ((tiles if where.is_exact else replace(tiles, is_full=tiles.is_full & False),),)

            group_of = [0 if head in where.heads else NOBODY for head in range(self.bound.num_heads)]
            item.lists[kv_group] = WorkLists(find, group_of, kv_group, sizes.kv_len, self.device)
        return item.lists[kv_group]


def _ready(hull: Hull, bound: Bound, device: torch.device, lists: dict[_Where, dict[int, WorkLists]]) -> _Ready:
    """lists: of the hulls that were made ready before."""
    places = disjunction(term.places for term in hull.said)
    where = _Where(places, hull.heads, all(term.rest == EVERYTHING for term in hull.said))
    return _Ready(
        where,
        predicate_of(hull.relation, bound.sizes, hull.order),
        hull.order,
        draws_for(hull.relation, 1, device),
        lists.setdefault(where, {}),
    )


def _numbers_of_labels(bound: Bound) -> dict[str, int]:
    """How many labels there can be, of those that calls find and that are few enough to be counted."""
    learned = [(shape, shape.learner) for shape in bound.inputs if shape.learner and shape.found_by == "call"]
    numbers = {name: learner.setting("buckets", 0) for shape, learner in learned for name in shape.names}
    return {name: number for name, number in numbers.items() if 0 < number <= MOST_COUNTED}


def order_of(values: Tensor) -> Tensor:
    """int32 [batch or 1, heads or 1, length]: positions in the stable order by a checked input. Sorting takes as long
    as its integers are wide."""
    order = values.argsort(stable=True, dim=-1).to(torch.int32)
    return order.view(1, 1, -1) if order.dim() == 1 else order.unsqueeze(1) if order.dim() == 2 else order


def _facet(name: str, facet: Facet, given: Inputs, orders: Mapping[str, Tensor]) -> Tensor:
    """What is looked up of an input; its ranks are there already where it is ordered by."""
    if facet == "rank" and name in orders:
        return place_of(orders[name])
    return facet_of(given[name].to(torch.int64), facet)
