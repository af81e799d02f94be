"""How do routes, and blocks that each query lists, run on a GPU? On generated kernels, with a slot for each appearance.

A query stands in a slot for each route that it is in, or for each block of keys that it lists: so slots are dense tiles
of queries that meet the same keys. Keys are reached where they lie. The results of a query's slots are joined by one
kernel, as one softmax or as their mean. Windows beside them are launched before, and it goes on from their results; in
a mean they have a slot for each query.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from patterndsl.ir.index import Const, K, Q, Read, arithmetic
from patterndsl.ir.relation import EVERYTHING, And, Random, Relation, compare, conjunction, disjunction
from patterndsl.lower.blocks import Blocks, Pipeline
from patterndsl.lower.hulls import CAUSAL, Hull, Lists
from patterndsl.lower.kernel_hulls import SlotHulls
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.runtime.data import Inputs, facet_of, whole_lists
from patterndsl.runtime.function import Run
from patterndsl.runtime.kernels.asked import Asked, asked_by, draws_for
from patterndsl.runtime.kernels.lists import NOBODY, Found, WorkLists
from patterndsl.runtime.kernels.predicate import Predicate, of_first_routes, predicate_of
from patterndsl.runtime.kernels.shapes import Shapes, usual_shapes
from patterndsl.runtime.kernels.slots import Pass, Results, Slots, Sure
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.ordered import Ordered
from patterndsl.runtime.parts import read_by
from patterndsl.runtime.telling import Telling
from patterndsl.sema.bind import Bound
from patterndsl.sema.parameters import Sizes

SMALLEST = 16
"""Keys of a tile."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """Lists made ready: by the name of their table, what a pair must be besides being listed, and what is drawn for it.

    mixed: the same predicate where a tile is of several routes; sure: where it holds of all pairs of a block. mine:
    bool [heads, 1], the heads that have these lists, None where all do. work: of routes, by how many heads share keys.
    """

    name: str
    lists: Lists
    predicate: Predicate
    mixed: Predicate
    sure: Sure
    places: Relation
    heads: tuple[int, ...]
    mine: Tensor | None
    draws: Mapping[Random, Tensor]
    work: dict[int, WorkLists]


@dataclass(frozen=True, slots=True, eq=False)
class _Term:
    """What a mean has beside lists, made ready: a slot for each query, its tiles, and what is asked of pairs there."""

    slots: Slots
    places: Relation
    heads: tuple[int, ...]
    is_exact: bool
    predicate: Predicate
    draws: Mapping[Random, Tensor]
    work: dict[int, WorkLists]


class Slotted:
    """The lists of a pattern made ready for a GPU.

    Inputs may differ from row to row and from head to head; lists are as they came. A fallback can only be that of each
    query to its own key.
    """

    def __init__(self, hulls: SlotHulls, bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device
        self.ready = tuple(_ready(hull, bound, device) for hull in hulls.listed)
        self.is_mean = bound.merge == "mean"
        self.terms = tuple(_term(hull, bound, device) for hull in hulls.beside if self.is_mean)
        self.told = None if hulls.told is None else Telling(hulls.told, device)
        is_placed = bool(hulls.beside) and not self.is_mean and hulls.told is None
        self.placed = Ordered(hulls.beside, replace(bound, fallback=None), device) if is_placed else None
        self.or_own_key = bound.fallback is not None

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32; of a mean the lse is the log of
        how many softmaxes have keys, and has no gradient. Memory beyond these: a query, a key and a value, or the
        gradients of these, for each slot."""
        call = _Call(self, query, key, value, given, scale)
        return Run("masked", call.results, call.gradients)

    def beside(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run | None:
        """How what is beside lists is attended, before these; None where it has slots, too, or there is nothing."""
        if self.told is not None:
            return self.told.run(query, key, value, read_by(self.told.bound, given), scale)
        return None if self.placed is None else self.placed.run(query, key, value, given, scale)

    def passes(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs) -> list[Pass]:
        """Who stands in the slots of each of the lists, and what they meet."""
        kv_group = query.shape[1] // key.shape[1]
        found = list[Pass]()
        for item in self.ready:
            shapes = _shapes(item.lists, query.dtype, max(query.shape[3], value.shape[3]))
            table = self._table(item, given)
            if item.lists.is_route:
                found.append(self._routes(item, table, shapes, kv_group, given))
            else:
                found.append(self._blocks(item, table, shapes, kv_group, query.shape[0], given))
        shapes = _shapes(None, query.dtype, max(query.shape[3], value.shape[3]))
        found.extend(self._alone(item, shapes, kv_group, given) for item in self.terms)
        return found

    def _alone(self, item: _Term, shapes: Shapes, kv_group: int, given: Inputs) -> Pass:
        sizes = self.bound.sizes
        find = partial(_tiles, item.places, sizes, is_exact=item.is_exact)
        lists = self._work(item, find, sizes.kv_len, kv_group)
        asked = self._asked(item.predicate, item.draws, given)
        return Pass(
            item.slots, None, False, asked, shapes, lists.rows(shapes.forward), lambda _: lists.columns(shapes.keys)
        )

    def _routes(self, item: _Ready, table: Tensor, shapes: Shapes, kv_group: int, given: Inputs) -> Pass:
        from patterndsl.runtime.kernels.slot_tables import routed, routes_of

        width, sizes = item.lists.width, self.bound.sizes
        slots, key = routed(table, width, sizes)
        tiles = {size for blocks in shapes for size in (blocks.q_block, blocks.kv_block)}
        is_mixed = any(width % size for size in tiles)
        asked = self._asked(item.mixed if is_mixed else item.predicate, item.draws, given)
        if item.lists.once:
            bits = routes_of(key, width, sizes.kv_len)
            steps = (step if size > 1 else 0 for size, step in zip(bits.shape[:2], bits.stride()[:2], strict=True))
            asked = replace(
                asked, tables=(*asked.tables, bits), numbers=(*asked.numbers, bits.shape[3], *steps)
            )  # fmt: skip
        number = key.shape[2]
        find = partial(_tiles, item.places, Sizes(number, number, 0, number), is_exact=False)  # places may be empty
        lists = self._work(item, find, number, kv_group)

        def columns(turn: int) -> Work:
            return lists.columns(shapes.keys) if kv_group == 1 else lists.columns_of(shapes.keys, turn)

        return Pass(slots, key, True, asked, shapes, lists.rows(shapes.forward), columns)

    def _work(self, item: _Ready | _Term, find: Callable[[int, int], Found], number: int, kv_group: int) -> WorkLists:
        """The work over tiles that stay, found once."""
        if kv_group not in item.work:
            group_of = [0 if head in item.heads else NOBODY for head in range(self.bound.num_heads)]
            item.work[kv_group] = WorkLists(find, group_of, kv_group, number, self.device)
        return item.work[kv_group]

    def _blocks(self, item: _Ready, table: Tensor, shapes: Shapes, kv_group: int, batch: int, given: Inputs) -> Pass:
        from patterndsl.runtime.kernels.slot_tables import turned

        sizes, heads, tile = self.bound.sizes, self.bound.num_heads, shapes.forward.q_block
        found = turned(table, item.lists, sizes, item.sure, heads, tile, shapes.keys.kv_block)
        asked = self._asked(item.predicate, item.draws, given)

        def columns(_: int) -> Work:
            return found.columns(kv_group, shapes.keys.q_block, batch)

        return Pass(found.slots, found.keys.order, False, asked, shapes, found.rows, columns)

    def _asked(self, predicate: Predicate, draws: Mapping[Random, Tensor], given: Inputs) -> Asked:
        facets = {(name, facet): facet_of(given[name], facet) for name, facet in predicate.facets}
        return asked_by(predicate, self.bound.sizes, facets, draws)

    def _table(self, item: _Ready, given: Inputs) -> Tensor:
        """Lists [rows or 1, heads or 1, length], as they came or route by route; of heads that have none, -1."""
        table = _by_list(whole_lists(item.name, item.lists.names, given))
        return table if item.mine is None else table.where(item.mine, -1)


class _Call:
    """One call of it. parts: what the slots of each pass gave, kept where gradients need it; alone: rows without keys
    that attended their own, once it is known."""

    def __init__(
        self, slotted: Slotted, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float
    ) -> None:
        self.slotted, self.scale = slotted, scale
        self.passes = slotted.passes(query, key, value, given)
        self.beside = slotted.beside(query, key, value, given, scale)
        self.parts = list[Results]()
        self.alone: Tensor | None = None

    def results(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        from patterndsl.runtime.kernels.slot_passes import attend, join

        is_mean, goes_on = self.slotted.is_mean, self.beside is not None
        if self.beside is None:
            out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype, device=query.device)
            lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        else:
            out, lse = self.beside.forward(query, key, value)
        self.parts.clear()
        for item in self.passes:
            part = attend(item, query, key, value, self.scale)
            join(item, part, (out, lse), mean=is_mean, goes_on=goes_on)
            goes_on = True
            if is_mean:
                self.parts.append(part)
        if self.slotted.or_own_key:
            from patterndsl.runtime.kernels.own import attend_own

            self.alone = attend_own(query, key, value, out, lse, self.scale)
        return out, lse

    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from patterndsl.runtime.kernels.slot_passes import gradients, shares

        is_mean, adds = self.slotted.is_mean, self.beside is not None
        if (is_mean and not self.parts) or (self.slotted.or_own_key and self.alone is None):
            self.results(query, key, value)
        tensors = query, key, value
        if self.beside is None:
            of_query, of_key, of_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
            found = of_query, of_key, of_value
        else:
            found = self.beside.gradients(*tensors, out, lse, grad_out, grad_lse)
        for turn, item in enumerate(self.passes):
            told, of_lse = (out, lse), grad_lse
            if is_mean:
                part = shares(item, self.parts[turn], lse)
                told, of_lse = (part.out, part.lse), None  # a mean has no lse
            gradients(item, *tensors, *told, grad_out, of_lse, self.scale, found, apart=is_mean, adds=adds)
            adds = True
        if self.alone is not None:
            from patterndsl.runtime.kernels.own import add_own_gradients

            add_own_gradients(query, key, self.alone, grad_out, grad_lse, found, self.scale)
        return found


def _ready(hull: Hull, bound: Bound, device: torch.device) -> _Ready:
    lists, rest, sizes = hull.lists, hull.said[0].rest, bound.sizes
    assert lists is not None
    name = next(shape.name for shape in bound.inputs if shape.names == lists.names)
    asked = set(rest.terms if isinstance(rest, And) else (rest,))
    # places of a route and those of the same route, in which positions ascend
    width, placed = Const(lists.width), (Read(lists.names[0], "rank", Q), Read(lists.names[0], "rank", K))
    together, of_places = (
        compare("==", *(arithmetic("//", place, width) for place in pair)) for pair in (placed, (Q, K))
    )
    predicate = predicate_of(rest, sizes)
    mixed = predicate_of(conjunction((together, rest)), sizes, lists.names[0]) if lists.is_route else predicate
    if lists.is_route and lists.once:
        predicate, mixed = (of_first_routes(item, lists.width) for item in (predicate, mixed))
    return _Ready(
        name,
        lists,
        predicate,
        mixed,
        "always" if rest == EVERYTHING else "behind" if rest == CAUSAL else "never",
        conjunction((of_places, *(asked & {CAUSAL}))),
        hull.heads,
        _mine(hull, bound, device),
        draws_for(rest, 1, device),
        {},
    )


def _term(hull: Hull, bound: Bound, device: torch.device) -> _Term:
    query = torch.arange(bound.sizes.q_len, dtype=torch.int32, device=device).view(1, 1, -1)
    mine = _mine(hull, bound, device)
    query = query if mine is None else query.where(mine, -1)
    return _Term(
        Slots(query, query, None, 1),
        disjunction(term.places for term in hull.said),
        hull.heads,
        all(term.rest == EVERYTHING for term in hull.said),
        predicate_of(hull.relation, bound.sizes),
        draws_for(hull.relation, 1, device),
        {},
    )


def _mine(hull: Hull, bound: Bound, device: torch.device) -> Tensor | None:
    """bool [heads, 1], the heads of a hull; None where these are all."""
    if len(hull.heads) == bound.num_heads:
        return None
    return torch.tensor([head in hull.heads for head in range(bound.num_heads)], device=device)[:, None]


def _tiles(places: Relation, sizes: Sizes, q_block: int, kv_block: int, *, is_exact: bool) -> Found:
    """The tiles of what all heads have alike. is_exact: whether every pair of places there is the pattern's."""
    tiles = find_tiles(places, sizes, Lookup(), q_block, kv_block, tell_full=is_exact)
    return ((tiles if is_exact else replace(tiles, is_full=tiles.is_full & False),),)


def _shapes(lists: Lists | None, dtype: torch.dtype, head_dim: int) -> Shapes:
    """Blocks of one size for results and gradients of queries, as slots are put in tiles once; keys of a listed block
    fill their tiles."""
    usual = usual_shapes(dtype, head_dim)
    queries, keys = usual.queries, usual.keys
    forward = usual.forward if _size(usual.forward) == _size(queries) else queries
    assert isinstance(forward, Blocks)
    kv_block = queries.kv_block
    if lists is not None and not lists.is_route:
        kv_block = min(kv_block, max(SMALLEST, 1 << (lists.of - 1).bit_length()))
    return Shapes(*(replace(blocks, kv_block=kv_block) for blocks in (forward, queries, keys)))


def _size(blocks: Blocks | Pipeline) -> tuple[int, int | None]:
    return blocks.q_block, blocks.kv_block


def _by_list(table: Tensor) -> Tensor:
    """[rows or 1, heads or 1, length] of lists [length], [batch, length] or [batch, heads, length]."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    return table.view(1, 1, -1) if table.dim() == 1 else table.unsqueeze(1) if table.dim() == 2 else table
