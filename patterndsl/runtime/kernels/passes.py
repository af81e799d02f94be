"""How do block-sparse pieces of a plan run on kernels of our own? In place: groups are heads of strided views.

Results of tiles are written where the plan collects them, and merged with those of other passes by going on from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterndsl.ir.index import HEAD, Const
from patterndsl.ir.relation import Relation, compare, conjunction, disjunction
from patterndsl.lower import shapes
from patterndsl.lower.geometry import Geometry
from patterndsl.lower.shapes import Keys, Sparse
from patterndsl.runtime.function import Run
from patterndsl.runtime.kernels.asked import Asked, Orders, asked_of, draws_for
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.lists import NOBODY, WorkLists
from patterndsl.runtime.merge import Merged
from patterndsl.runtime.views import Launch, OneLaunch, Places, with_unit_stride
from patterndsl.sema.parameters import Sizes

Into = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """Heads that attend alike."""

    heads: tuple[int, ...]
    shape: Sparse


def _orders(shape: Sparse, device: torch.device) -> Orders | None:
    """Who stands at the places that the tiles are of, for all batch rows and heads."""
    if shape.orders is None:
        return None
    rows = (torch.as_tensor(order.positions(), dtype=torch.int32, device=device) for order in shape.orders)
    q, k = (row[None, None] for row in rows)
    return Orders(q, k, is_full=True)


class WholePass:
    """Tiles of whole sequences, in one launch for all heads that have some, however many kinds of these there are. All
    are of positions in one order."""

    def __init__(self, geometry: Geometry, members: Sequence[Member], device: torch.device) -> None:
        self.geometry, self.members, self.device = geometry, tuple(members), device
        self.sizes = Sizes(geometry.q.length, geometry.k.length, 0, geometry.q.length)
        self.launches = (Launch.of(geometry),)
        self._lists = dict[tuple[int, int], WorkLists]()

    def gradient_launches(self, row_bytes: int) -> tuple[Launch, ...]:
        """See `runtime.planned.Kernel`."""
        return self.launches

    @property
    def orders(self) -> shapes.Orders | None:
        """Those that the tiles are of."""
        return self.members[0].shape.orders

    @property
    def draws(self) -> bool:
        """Whether pairs are drawn."""
        return any(draws_for(member.shape.relation, 1, self.device) for member in self.members)

    @cached_property
    def asked(self) -> Asked:
        """Who asks for a pair by its head, where not all attend alike."""
        relations = [member.shape.relation for member in self.members]
        if len(relations) > 1:
            relations = [conjunction((_is_one_of(item.heads), item.shape.relation)) for item in self.members]
        relation = disjunction(relations)
        orders = _orders(self.members[0].shape, self.device)
        return asked_of(relation, self.sizes, {}, draws_for(relation, 1, self.device), orders)

    def lists(self, query: Tensor, key: Tensor) -> WorkLists:
        """The work for so many heads."""
        heads, kv_group = query.shape[1], query.shape[1] // key.shape[1]
        if (heads, kv_group) not in self._lists:
            member_of = {head: at for at, member in enumerate(self.members) for head in member.heads}
            self._lists[heads, kv_group] = WorkLists(
                lambda q, k: ([member.shape.tiles_by(self.sizes, q, k) for member in self.members],),
                [member_of.get(head, NOBODY) for head in range(heads)],
                kv_group,
                key.shape[2],
                self.device,
                relations=() if self.orders else [member.shape.relation for member in self.members],
                sizes=self.sizes,
            )
        return self._lists[heads, kv_group]

    def alone(self, query: Tensor, key: Tensor, scale: float) -> Run:
        """How a plan of this pass alone runs, whose heads are all there are."""
        lists = self.lists(query, key)
        parts = partial(forward, lists, self.asked, scale), partial(gradients, lists, self.asked, scale)
        return Run("planned", *parts)

    def write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        into: tuple[Tensor, Tensor],
        *,
        goes_on: bool,
    ) -> None:
        """Output and lse of its heads into those of all; goes_on: merged with what is there."""
        forward(self.lists(query, key), self.asked, scale, query, key, value, into, goes_on=goes_on)

    def add_gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        merged: Merged,
        scale: float,
        into: Into,
        *,
        adds: tuple[bool, bool],
    ) -> None:
        """Gradients of its heads into those of all; adds: see `calls.gradients`."""
        results = merged.out, merged.lse, merged.grad_out
        gradients(self.lists(query, key), self.asked, scale, query, key, value, *results, None, into, adds=adds)


def _is_one_of(heads: Sequence[int]) -> Relation:
    return disjunction(compare("==", HEAD, Const(head)) for head in heads)


class ListedPass(OneLaunch):
    """Tiles of one group, the same for every group of every head."""

    def __init__(self, geometry: Geometry, shape: Sparse, num_heads: int, device: torch.device) -> None:
        super().__init__(geometry)
        self.shape, self.device = shape, device
        self.sizes = Sizes(geometry.q.length, geometry.k.length, 0, geometry.q.length)
        groups = [0] * geometry.num_groups  # as heads; heads are batch rows
        self.lists = WorkLists(
            lambda q, k: ((shape.tiles_by(self.sizes, q, k),),),
            groups,
            1,
            geometry.k.length,
            device,
            num_heads,
            relations=() if shape.orders else (shape.relation,),
            sizes=self.sizes,
        )
        self._of_heads = dict[tuple[int, int], WorkLists]()

    @cached_property
    def asked(self) -> Asked:
        """The predicate in local positions."""
        relation, orders = self.shape.relation, _orders(self.shape, self.device)
        return asked_of(relation, self.sizes, {}, draws_for(relation, 1, self.device), orders)

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
        into: Into,
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
        into: Into | None,
        *,
        adds: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = launch.queries.grouped(query), launch.keys.grouped(key), launch.keys.grouped(value)
        out, lse, grad_out = map(launch.queries.grouped, (merged.out, merged.lse, merged.grad_out))
        return gradients(self.lists, self.asked, scale, q, k, v, out, lse, grad_out, None, into, adds=adds)


class KeysPass(OneLaunch):
    """Queries with a few keys each, the same for every head."""

    def __init__(self, geometry: Geometry, shape: Keys, device: torch.device) -> None:
        super().__init__(geometry)
        query, turn = np.nonzero(shape.keys >= 0)
        key = shape.keys[query, turn]
        starts = np.append(0, np.bincount(key, minlength=geometry.k.length).cumsum())
        lists = (shape.keys.T.copy(), starts, query[np.argsort(key, kind="stable")])
        self.table, self.starts, self.queries = (torch.tensor(x, dtype=torch.int32, device=device) for x in lists)

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`."""
        from patterndsl.runtime.kernels import keys

        q, k, v = (_of_group(launch.queries, query), _of_group(launch.keys, key), _of_group(launch.keys, value))
        out, lse = keys.attend(q, k, v, self.table, scale)
        return out[:, None], lse[:, None], None

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`."""
        from patterndsl.runtime.kernels import keys

        q, k, v = (_of_group(launch.queries, query), _of_group(launch.keys, key), _of_group(launch.keys, value))
        out, lse, grad_out = (_of_group(launch.queries, x) for x in (merged.out, merged.lse, merged.grad_out))
        found = keys.gradients(q, k, v, out, lse, grad_out, self.table, self.starts, self.queries, scale)
        return found[0][:, None], found[1][:, None], found[2][:, None]


def _of_group(places: Places, x: Tensor) -> Tensor:
    """[B * H, length, ...] of the one group there is."""
    found = places.grouped(x)[:, 0]
    return found if x.dim() == 3 else with_unit_stride(found)
