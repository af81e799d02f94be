"""How does a block-sparse piece of a plan run on generated kernels? In place: groups are heads of strided views.

Results are written where the plan collects them, and merged with those of other passes by going on from these.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from patterndsl.lower.geometry import Geometry
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.shapes import Sparse
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.runtime.function import Run
from patterndsl.runtime.kernels.asked import Asked, asked_of, draws_for
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.lists import Found, WorkLists
from patterndsl.runtime.merge import Merged
from patterndsl.runtime.views import Launch, OneLaunch, is_everything
from patterndsl.sema.parameters import Sizes


class ListedPass(OneLaunch):
    """Tiles of one group, the same for every group of every head."""

    def __init__(self, geometry: Geometry, shape: Sparse, num_heads: int, device: torch.device) -> None:
        super().__init__(geometry)
        self.relation, self.tiles, self.device = shape.relation, shape.tiles, device
        self.sizes = Sizes(geometry.q.length, geometry.k.length, 0, geometry.q.length)
        groups = [0] * geometry.num_groups  # as heads; heads are batch rows
        self.lists = WorkLists(self._find, groups, 1, geometry.k.length, device, num_heads)
        self._of_heads = dict[tuple[int, int], WorkLists]()

    def _find(self, q_block: int, kv_block: int) -> Found:
        known: Tiles = self.tiles
        if (q_block, kv_block) != (known.q_block, known.kv_block):
            known = find_tiles(self.relation, self.sizes, Lookup(), q_block, kv_block)
        return ((known,),)

    @cached_property
    def asked(self) -> Asked:
        """The predicate in local positions."""
        return asked_of(self.relation, self.sizes, {}, draws_for(self.relation, 1, self.device))

    def alone(self, query: Tensor, key: Tensor, scale: float) -> Run | None:
        """How a plan of this pass alone runs for all heads, those of keys shared as they are; None where its positions
        are not all there are in their order. Nothing is merged then."""
        (launch,) = self.launches
        lengths = ((launch.queries, query.shape[2]), (launch.keys, key.shape[2]))
        if not all(is_everything(places.groups, places.side, length) for places, length in lengths):
            return None
        heads, kv_group = query.shape[1], query.shape[1] // key.shape[1]
        if (heads, kv_group) not in self._of_heads:
            lists = WorkLists(self._find, [0] * heads, kv_group, key.shape[2], self.device)
            self._of_heads[heads, kv_group] = lists
        of_heads = self._of_heads[heads, kv_group]
        parts = partial(forward, of_heads, self.asked, scale), partial(gradients, of_heads, self.asked, scale)
        return Run("planned", *parts)

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`."""
        q, k, v = launch.queries.grouped(query), launch.keys.grouped(key), launch.keys.grouped(value)
        return *forward(self.lists, self.asked, scale, q, k, v), None

    def write(
        self,
        launch: Launch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        into: tuple[Tensor, Tensor],
        *,
        goes_on: bool,
    ) -> None:
        """The same into views of the result, [B * H, groups, length, ...]; goes_on: merged with what is there."""
        q, k, v = launch.queries.grouped(query), launch.keys.grouped(key), launch.keys.grouped(value)
        forward(self.lists, self.asked, scale, q, k, v, into, goes_on=goes_on)

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`."""
        return self._gradients(launch, query, key, value, merged, scale, None, adds=(False, False))

    def add_gradients(
        self,
        launch: Launch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        merged: Merged,
        scale: float,
        into: tuple[Tensor, Tensor, Tensor],
        *,
        adds: tuple[bool, bool],
    ) -> None:
        """The same into views of the sums, [B * H, groups, length, D]; adds: whether those of queries, and those of
        keys and values, are added to what is there."""
        self._gradients(launch, query, key, value, merged, scale, into, adds=adds)

    def _gradients(
        self,
        launch: Launch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        merged: Merged,
        scale: float,
        into: tuple[Tensor, Tensor, Tensor] | None,
        *,
        adds: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = launch.queries.grouped(query), launch.keys.grouped(key), launch.keys.grouped(value)
        out, lse, grad_out = map(launch.queries.grouped, (merged.out, merged.lse, merged.grad_out))
        return gradients(self.lists, self.asked, scale, q, k, v, out, lse, grad_out, None, into, adds=adds)
