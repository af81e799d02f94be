"""How does a pattern run on a GPU whose tiles depend on a call's inputs? They are told and listed on the device.

Documents, paddings and tables bound what a tile may hold, and selections list it; with that the generated kernels run
the whole pattern in one launch. Nothing waits for the device, and nothing but the kernels is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import And, Listed, Relation, conjunction
from patterndsl.lower.listings import listings_of
from patterndsl.runtime.data import Inputs, facet_of
from patterndsl.runtime.function import Run
from patterndsl.runtime.heads import folded, has_heads
from patterndsl.runtime.kernels.asked import Asked, asked_by
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.predicate import Predicate, predicate_of
from patterndsl.runtime.kernels.shapes import usual_shapes
from patterndsl.runtime.kernels.told_lists import (
    Extent,
    States,
    ToldLists,
    Turned,
    has_list_kernels,
    work_of_states,
)
from patterndsl.runtime.kernels.told_tables import Form, Tables, tables_of
from patterndsl.runtime.kernels.verdicts import SIDES, verdicts_of
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.told import most_live, states
from patterndsl.runtime.views import make_room
from patterndsl.sema.bind import Bound

if TYPE_CHECKING:
    from patterndsl.runtime.kernels.told_kernels import Asking


class Telling:
    """A pattern made ready for a GPU. Its inputs may differ from row to row and from head to head; what depends on
    their forms alone is found once."""

    def __init__(self, bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device
        found = listings_of(bound)
        assert found is not None
        self.listings = found
        self._extents = dict[tuple[object, ...], Extent]()
        self._ready = dict[tuple[object, ...], _Ready]()
        self._predicates = dict[tuple[torch.dtype, int], Predicate]()

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32. Work: O(q tiles x kv tiles), and
        the pairs of live tiles."""
        lists, asked = self._asks(query, key, value, given)
        return Run("triton", partial(forward, lists, asked, scale), partial(gradients, lists, asked, scale))

    def _asks(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs) -> tuple[ToldLists, Asked]:
        call, kv_group = _Call(given), query.shape[1] // key.shape[1]
        predicate = self._predicate(query.dtype, max(query.shape[3], value.shape[3]))
        asked = asked_by(predicate, self.bound.sizes, {of: call.facet(*of) for of in predicate.facets}, {})
        return ToldLists(partial(self._work, call, query.shape[0], kv_group), kv_group), asked

    def _predicate(self, dtype: torch.dtype, width: int) -> Predicate:
        """What pairs of live tiles are asked: not whether they are listed, where no tile reaches out of a block."""
        if (dtype, width) not in self._predicates:
            relation, tiles = self.bound.relation, usual_shapes(dtype, width)
            blocks = [(tile.q_block, tile.kv_block) for tile in tiles]
            parts = relation.terms if isinstance(relation, And) else (relation,)

            def is_told(part: Relation) -> bool:
                return isinstance(part, Listed) and all(
                    self.listings[part.name].holds_tiles(tile, self.bound.sizes.q_start) for tile in blocks
                )

            asked = conjunction(part for part in parts if not is_told(part))
            self._predicates[dtype, width] = predicate_of(asked, self.bound.sizes)
        return self._predicates[dtype, width]

    def _work(self, call: _Call, batch: int, kv_group: int, blocks: tuple[int, int], *, by_key: bool) -> Work:
        extent, heads = self._extent(call, blocks), self.bound.num_heads
        turned = Turned.of_keys(extent, kv_group) if by_key else Turned.by_query(extent)
        heads = heads // kv_group if by_key else heads
        if has_list_kernels(self.device):
            from patterndsl.runtime.kernels.told_kernels import work_of

            return work_of(self._asking(call, blocks), turned, heads, batch)
        return work_of_states(self._states(call, blocks), turned, heads, batch)

    def _extent(self, call: _Call, blocks: tuple[int, int]) -> Extent:
        """Of the tiles of a call: one head for all where neither relations nor inputs differ."""
        known = call.rows, call.by_head, blocks
        if known not in self._extents:
            sizes, groups, heads = self.bound.sizes, self.bound.groups, self.bound.num_heads
            some = heads if call.by_head or len(groups) > 1 else 1
            bounds = [most_live(group.relation, sizes, blocks, self.listings) for group in groups]
            numbers = [len(group.heads) if some > 1 else 1 for group in groups]
            total = sum(most.in_all * number for most, number in zip(bounds, numbers, strict=True))
            num_q, num_kv = -(-sizes.q_len // blocks[0]), -(-sizes.kv_len // blocks[1])
            longest = max(most.in_row for most in bounds)
            self._extents[known] = Extent(call.rows, some, num_q, num_kv, call.rows * total, longest)
        return self._extents[known]

    # ---- by kernels

    def _asking(self, call: _Call, blocks: tuple[int, int]) -> Asking:
        """What tells these tiles: what it looks up is made anew, or was made for other tiles of the call."""
        from patterndsl.runtime.kernels.told_kernels import Asking, bounds_of, lists_of, ranges_of

        ready, sizes = self._ready_for(call, blocks), self.bound.sizes
        tables = ready.tables
        if blocks not in call.bounds:
            facets = {(job.name, job.facet): call.facet(job.name, job.facet) for job in tables.tile_jobs}
            call.bounds[blocks] = bounds_of(facets, tables.tile_jobs, tables.of_tiles, self.device)
        bounds, counters = call.bounds[blocks]
        if call.others is None:
            facets = {(job.name, job.facet): call.facet(job.name, job.facet) for job in tables.range_jobs}
            listed = {job.name: call.facet(job.name, "value") for job in tables.list_jobs}
            call.others = (
                ranges_of(facets, tables.range_jobs, tables.of_ranges, self.device) if facets else bounds,
                lists_of(listed, tables.list_jobs, tables.of_lists, self.device) if listed else bounds,
            )
        ends = sizes.q_start, sizes.q_start + sizes.q_len, sizes.kv_len
        return Asking(ready.tell, ready.numbers, tables.places, (bounds, *call.others), ends, blocks, counters)

    def _ready_for(self, call: _Call, blocks: tuple[int, int]) -> _Ready:
        known = *call.forms, blocks
        ready = self._ready.get(known)
        if ready is None:
            from patterndsl.runtime.kernels.source import function_of

            make_room(self._ready)
            sizes, forms = self.bound.sizes, dict(call.forms)
            ends = dict(zip(SIDES, (sizes.q_start + sizes.q_len, sizes.kv_len), strict=True))
            covers = frozenset((name, side) for name, form in forms.items() for side in SIDES if ends[side] <= form[-1])
            verdicts = verdicts_of(self.bound.groups, sizes, blocks, covers, tuple(self.listings.items()))
            tables = tables_of(verdicts, sizes, blocks, forms, self.listings)
            ready = self._ready[known] = _Ready(function_of(verdicts.text, "tell"), verdicts.numbers, tables)
        return ready

    # ---- in plain PyTorch: what kernels are compared with

    def _states(self, call: _Call, blocks: tuple[int, int]) -> States:
        """Each group's tiles, for its heads alike or for each."""
        extent, sizes = self._extent(call, blocks), self.bound.sizes
        shape = extent.rows, extent.some, extent.num_q, extent.num_kv
        live, full = torch.empty((2, *shape), dtype=torch.bool, device=self.device)
        for group in self.bound.groups:
            heads = group.heads if extent.some > 1 else (0,)
            mine = folded(call.given, group.heads, extent.rows) if call.by_head else call.given
            found = states(group.relation, sizes, mine, blocks, self.device, self.listings)
            for into, of in zip((live, full), found, strict=True):
                each = len(heads) if call.by_head and of.shape[0] > extent.rows else 1
                into[:, list(heads)] = of.view(of.shape[0] // each, each, *of.shape[1:])
        return States(live, full, extent)


@dataclass(frozen=True, slots=True)
class _Ready:
    """What tells tiles of inputs of some forms: a function of `verdicts`, its constants, and its tables."""

    tell: Any
    numbers: tuple[int, ...]
    tables: Tables


@dataclass(slots=True, eq=False)
class _Call:
    """The inputs of one call, and what was made of them. bounds: over tiles of some size, with counters; others: ranges
    and lists."""

    given: Inputs
    rows: int = field(init=False)
    by_head: bool = field(init=False)
    forms: tuple[tuple[str, Form], ...] = field(init=False)
    facets: dict[tuple[str, Facet], Tensor] = field(default_factory=dict)
    bounds: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    others: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.rows = max([1, *(values.shape[0] for values in self.given.values() if values.dim() > 1)])
        self.by_head = has_heads(self.given)
        self.forms = tuple((name, tuple(values.shape)) for name, values in self.given.items())

    def facet(self, name: str, facet: Facet) -> Tensor:
        """[..., length], one after the other in memory."""
        if (name, facet) not in self.facets:
            self.facets[name, facet] = facet_of(self.given[name], facet).contiguous()
        return self.facets[name, facet]
