"""How does a block-sparse piece of a plan run? On its tiles, gathered in plain PyTorch or by FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.geometry import Geometry
from patterndsl.lower.order import Order
from patterndsl.lower.shapes import Sparse
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime import flex, gathered
from patterndsl.runtime.data import DeviceData, device_data
from patterndsl.runtime.function import Recorded, without_autocast
from patterndsl.runtime.fused import share_of_gradient
from patterndsl.runtime.merge import Merged
from patterndsl.runtime.views import Launch, OneLaunch, by_group, from_groups, is_everything
from patterndsl.sema.parameters import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Ordered:
    """Positions in another order. places: int64 [length], the position at each place; back: the place of each."""

    places: Tensor
    back: Tensor

    @staticmethod
    def of(order: Order, device: torch.device) -> Ordered:
        positions = order.positions()
        back = np.empty_like(positions)
        back[positions] = np.arange(order.length)
        return Ordered(torch.as_tensor(positions, device=device), torch.as_tensor(back, device=device))


@dataclass(frozen=True, slots=True, eq=False)
class InOrder:
    """Where tiles are of queries and keys in another order: a kernel takes copies in that order, put back after."""

    q: Ordered
    k: Ordered

    @staticmethod
    def of(shape: Sparse, device: torch.device) -> InOrder | None:
        """None where positions stay as they lie."""
        return None if shape.orders is None else InOrder(*(Ordered.of(order, device) for order in shape.orders))


def _queries(orders: InOrder | None, x: Tensor) -> Tensor:
    """[rows, 1, Tq, ...] as the kernel takes it."""
    return x if orders is None else x.index_select(2, orders.q.places)


def _keys(orders: InOrder | None, x: Tensor) -> Tensor:
    return x if orders is None else x.index_select(2, orders.k.places)


def _queries_back(orders: InOrder | None, x: Tensor) -> Tensor:
    """The inverse of `_queries`."""
    return x if orders is None else x.index_select(2, orders.q.back)


def _keys_back(orders: InOrder | None, x: Tensor) -> Tensor:
    return x if orders is None else x.index_select(2, orders.k.back)


@dataclass(frozen=True, slots=True)
class Keep:
    """Membership in local positions, of places where these are in another order."""

    relation: Relation
    data: DeviceData
    orders: InOrder | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        if self.orders is not None:
            q, k = self.orders.q.places[q], self.orders.k.places[k]
        return torch.as_tensor(member(self.relation, Point(q, k, 0, self.data)), device=q.device)


class GatheredPass(OneLaunch):
    """Tiles whose keys are gathered; the groups are so many more rows of the batch."""

    def __init__(self, geometry: Geometry, shape: Sparse, device: torch.device) -> None:
        super().__init__(geometry)
        self.lists = gathered.block_lists(shape.tiles, device)
        self.orders = InOrder.of(shape, device)
        self.keep = Keep(shape.relation, device_data(shape.relation, 1, {}, device), self.orders)

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`."""
        q = _queries(self.orders, _as_rows(launch.queries.grouped(query)))
        k, v = (_keys(self.orders, _as_rows(launch.keys.grouped(x))) for x in (key, value))
        found = gathered.forward(q, k, v, self.lists, self.keep, scale)
        out, lse = (_queries_back(self.orders, x) for x in found)
        rows = (query.shape[0] * query.shape[1], -1, launch.queries.side.length)
        return out.reshape(*rows, out.shape[-1]), lse.reshape(rows), None

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, _: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`."""
        rows = (query, merged.out, merged.grad_out, merged.lse)
        q, out, grad_out, lse = (_queries(self.orders, _as_rows(launch.queries.grouped(x))) for x in rows)
        k, v = (_keys(self.orders, _as_rows(launch.keys.grouped(x))) for x in (key, value))
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        found = gathered.backward(q, k, v, grad_out, lse, delta, self.lists, self.keep, scale)
        back = _queries_back(self.orders, found[0]), *(_keys_back(self.orders, x) for x in found[1:])
        shape = (query.shape[0] * query.shape[1], -1)
        grad_q, grad_k, grad_v = (x.reshape(*shape, *x.shape[2:]) for x in back)
        return grad_q, grad_k, grad_v


def _as_rows(x: Tensor) -> Tensor:
    """[B * H, groups, L, ...] to [B * H * groups, 1, L, ...]."""
    return x.reshape(-1, 1, *x.shape[2:])


class FlexPass(OneLaunch):
    """Tiles that FlexAttention runs; the groups are its heads."""

    def __init__(self, geometry: Geometry, shape: Sparse, device: torch.device) -> None:
        super().__init__(geometry)
        self.shape = shape
        self.device = device
        self.orders = InOrder.of(shape, device)
        self.sizes = Sizes(geometry.q.length, geometry.k.length, 0, geometry.q.length)
        self.attend = flex.compiled_flex()

    @cached_property
    def training_mask(self) -> BlockMask:
        """The tiles with the generated mask_mod, [1, 1, ...]. FlexAttention's backward wants blocks of 128."""
        return self._mask(self.shape.tiles)

    @cached_property
    def inference_mask(self) -> BlockMask:
        """The same by smaller blocks, where that saves."""
        return self.training_mask if self.shape.finer is None else self._mask(self.shape.finer)

    def _mask(self, tiles: Tiles) -> BlockMask:
        listed = [torch.as_tensor(part, device=self.device) for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full)]
        return flex.block_mask(
            [[(listed[0], listed[1], listed[2])]],
            (tiles.q_block, tiles.kv_block),
            (tiles.num_q_blocks, tiles.num_kv_blocks),
            (self.sizes.q_len, self.sizes.kv_len),
            None if self._is_all_full(tiles) else self._keep(),
        )

    def _is_all_full(self, tiles: Tiles) -> bool:
        """Whether nothing is masked, so that kernels need not know how: what decides takes registers from them."""
        is_ragged = self.sizes.q_len % tiles.q_block or self.sizes.kv_len % tiles.kv_block
        return bool(tiles.is_full.all()) and not is_ragged

    def _keep(self) -> flex.MaskMod:
        data = device_data(self.shape.relation, 1, {}, self.device)
        keep = Keep(self.shape.relation, data, self.orders)

        def mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return keep(q_idx, kv_idx)

        return mod

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`. In training the graph of the pass is kept for its backward."""
        q = launch.queries.grouped(query)
        k, v = launch.keys.grouped(key), launch.keys.grouped(value)
        if not train:
            return *self._run(q, k, v, self.inference_mask, scale), None
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out, lse = self._run(leaves[0], leaves[1], leaves[2], self.training_mask, scale)
        return out.detach(), lse.detach(), (leaves, out, lse)

    def alone(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Recorded | None:
        """How a plan of this pass alone runs, whose heads are all there are; None where its groups are no plain views.
        Nothing is merged then."""
        (launch,) = self.launches
        groups, side = launch.queries.groups, launch.queries.side
        if (groups, side) != (launch.keys.groups, launch.keys.side):
            return None
        is_whole = is_everything(groups, side, query.shape[2]) and query.shape[2] == key.shape[2]
        has_views = query.shape[1] == key.shape[1] and all(
            by_group(x, groups, side) is not None for x in (query, key, value)
        )
        return Recorded(partial(self._alone, scale=scale, is_whole=is_whole)) if is_whole or has_views else None

    def _alone(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, is_whole: bool
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of all heads, [B, Hq, Tq, ...]."""
        train = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        mask = self.training_mask if train else self.inference_mask
        with without_autocast(query.device.type):
            if is_whole:
                return self._run(query, key, value, mask, scale)
            (launch,) = self.launches
            groups, side = launch.queries.groups, launch.queries.side
            q, k, v = (by_group(x, groups, side) for x in (query, key, value))
            assert q is not None and k is not None and v is not None
            out, lse = self._run(q, k, v, mask, scale)
            return from_groups(out, groups, query.shape[:2]), from_groups(lse, groups, query.shape[:2])

    def _run(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        """Copies in another order are of PyTorch's operations, which have derivatives."""
        q, k, v = _queries(self.orders, q), _keys(self.orders, k), _keys(self.orders, v)
        out, lse = flex.flex(self.attend, q, k, v, mask, scale=scale, want_lse=True)
        assert lse is not None
        return _queries_back(self.orders, out), _queries_back(self.orders, lse)

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`. The pass has a softmax of its own, whose share in the merged one is
        exp(lse - merged lse): so the gradients of its output and lse follow from those of the merged output."""
        if saved is None:
            with flex.with_derivatives():
                saved = self.forward(launch, query, key, value, scale, True)[2]
        leaves, out, lse = saved
        rows = (merged.out, merged.grad_out, merged.lse)
        whole, grad_out, whole_lse = map(launch.queries.grouped, rows)
        d_out, d_lse = share_of_gradient(out.detach(), lse.detach(), whole, whole_lse, grad_out)
        found = torch.autograd.grad((out, lse), leaves, (d_out, d_lse), retain_graph=True)
        return found[0], found[1], found[2]
