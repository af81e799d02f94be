"""How does a pattern run on a GPU whose tiles depend on a call's inputs? They are told and listed on the device.

Documents, paddings and tables bound what a tile may hold, and selections list it; with that the generated kernels run
the whole pattern in one launch. Nothing waits for the device, and nothing but the kernels is compiled.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from patterndsl.ir.relation import And, Listed, Relation, conjunction
from patterndsl.lower.listings import listings_of
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.function import Run, attended
from patterndsl.runtime.kernels.asked import Asked, asked_of
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.shapes import usual_shapes
from patterndsl.runtime.kernels.told_lists import States, ToldLists
from patterndsl.runtime.parts import folded, has_heads
from patterndsl.runtime.told import Most, most_live, states
from patterndsl.sema.bind import Bound


class Telling:
    """A pattern made ready for a GPU; call it with tensors and checked inputs, which may differ from row to row and
    from head to head."""

    def __init__(self, bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device
        found = listings_of(bound)
        assert found is not None
        self.listings = found
        self._bounds = dict[tuple[Relation, tuple[int, int]], Most]()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, Dv] in the inputs' dtype and lse [B, Hq, Tq] in float32; differentiable in both. Work:
        O(q tiles x kv tiles) beside the pairs of live tiles."""
        lists, asked = self._lists(query, key, given), self._asked(query, value, given)
        run = Run("triton", partial(forward, lists, asked, scale), partial(gradients, lists, asked, scale))
        return attended(query, key, value, run)

    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        given: Inputs,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of query, key and value, from what a forward pass gave."""
        lists, asked = self._lists(query, key, given), self._asked(query, value, given)
        return gradients(lists, asked, scale, query, key, value, out, lse, grad_out, grad_lse)

    def _asked(self, query: Tensor, value: Tensor, given: Inputs) -> Asked:
        """What pairs of live tiles are asked: not whether they are listed, where no tile reaches out of a block."""
        relation, sizes = self.bound.relation, self.bound.sizes
        tiles = usual_shapes(query.dtype, max(query.shape[3], value.shape[3]))
        parts = relation.terms if isinstance(relation, And) else (relation,)

        def is_told(part: Relation) -> bool:
            return isinstance(part, Listed) and all(
                self.listings[part.name].holds_tiles((tile.q_block, tile.kv_block), sizes.q_start) for tile in tiles
            )

        return asked_of(conjunction(part for part in parts if not is_told(part)), sizes, given, {})

    def _lists(self, query: Tensor, key: Tensor, given: Inputs) -> ToldLists:
        kv_group = query.shape[1] // key.shape[1]
        return ToldLists(partial(self._tell, given), query.shape[0], query.shape[1], kv_group)

    def _tell(self, given: Inputs, q_block: int, kv_block: int) -> States:
        """The states of tiles, for all heads alike or for each."""
        groups, blocks = self.bound.groups, (q_block, kv_block)
        by_head = has_heads(given)
        if not by_head and len(groups) == 1:
            live, full = (x[:, None] for x in self._states(groups[0].relation, given, blocks))
            most = self._most(groups[0].relation, blocks)
            return States(live, full, most.in_all * live.shape[0], most.in_row)
        rows = max([1, *(values.shape[0] for values in given.values() if values.dim() > 1)])
        if len(groups) == 1:
            found = self._states(groups[0].relation, folded(given, groups[0].heads, rows), blocks)
            live, full = (x.view(rows, -1, *x.shape[1:]) for x in found)
            most = self._most(groups[0].relation, blocks)
            return States(live, full, most.in_all * rows * live.shape[1], most.in_row)
        of_heads, bounds = dict[int, tuple[Tensor, Tensor]](), dict[int, Most]()
        for group in groups:
            number = len(group.heads) if by_head else 1
            mine = folded(given, group.heads, rows) if by_head else given
            found = self._states(group.relation, mine, blocks)
            lives, fulls = (x.expand(rows * number, -1, -1).view(rows, number, *x.shape[1:]) for x in found)
            for at, head in enumerate(group.heads):
                of_heads[head] = lives[:, at % number], fulls[:, at % number]
                bounds[head] = self._most(group.relation, blocks)
        ordered = [of_heads[head] for head in range(self.bound.num_heads)]
        live, full = (torch.stack(part, 1) for part in zip(*ordered, strict=True))
        total = sum(most.in_all for most in bounds.values())
        longest = max(most.in_row for most in bounds.values())
        return States(live, full, rows * total, longest)

    def _states(self, relation: Relation, given: Inputs, blocks: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return states(relation, self.bound.sizes, given, blocks, self.device, self.listings)

    def _most(self, relation: Relation, blocks: tuple[int, int]) -> Most:
        """Found once."""
        if (relation, blocks) not in self._bounds:
            self._bounds[relation, blocks] = most_live(relation, self.bound.sizes, blocks, self.listings)
        return self._bounds[relation, blocks]
