"""How does a pattern that reads inputs run on a GPU without finding tiles in each call? By FlexAttention on its hulls.

In the order by an input, queries, keys and values are permuted first and results put back; the tiles are those of the
hull, the same in each call, and each pair of them is asked for by its positions. PyTorch differentiates all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import disjunction
from patterndsl.lower.hulls import Hull, Said
from patterndsl.lower.shapes import Sparse
from patterndsl.runtime import flex
from patterndsl.runtime.data import DeviceData, Inputs, device_data
from patterndsl.runtime.parts import Chosen, assembled, merged
from patterndsl.sema.bind import Bound


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A hull made ready: its tiles, and a compiled FlexAttention of its own."""

    hull: Hull
    mask: BlockMask
    attend: flex.Attend


class Placed:
    """The hulls of a pattern made ready for a GPU; call it with tensors and checked inputs that heads share."""

    def __init__(self, hulls: Sequence[Hull], bound: Bound, device: torch.device) -> None:
        self.bound = bound
        self.heads = tuple(dict.fromkeys(hull.heads for hull in hulls))
        self.ready = tuple(_Ready(hull, _mask(hull, bound, device), flex.compiled_flex()) for hull in hulls)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, Dv] in the inputs' dtype and lse [B, Hq, Tq] in float32; differentiable."""
        found = list[tuple[Sequence[int], tuple[Tensor, Tensor]]]()
        for heads in self.heads:
            tensors = Chosen(heads, self.bound.num_heads).take(query, key, value)
            parts = (self._attended(item, tensors, given, scale) for item in self.ready if item.hull.heads == heads)
            found.append((heads, merged(list(parts))))
        return assembled([(h, out) for h, (out, _) in found]), assembled([(h, lse) for h, (_, lse) in found])

    def _attended(
        self, item: _Ready, tensors: tuple[Tensor, Tensor, Tensor], given: Inputs, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = tensors
        asked = disjunction(term.rest for term in item.hull.said)
        data = device_data(asked, 1, given, query.device)
        order = None if item.hull.order is None else given[item.hull.order].argsort(stable=True, dim=-1)
        mask = copy(item.mask)
        mask.mask_mod = _mask_mod(item.hull.said, data, order, self.bound.sizes.q_start)
        if order is None:
            out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
        else:
            places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
            place = torch.empty_like(order).scatter_(-1, order, places)
            query, key, value = (_permuted(x, order, place) for x in (query, key, value))
            out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
            assert lse is not None
            out, lse = _permuted(out, place, order), _permuted(lse[..., None], place, order)[..., 0]
        assert lse is not None
        return out, lse


def _mask(hull: Hull, bound: Bound, device: torch.device) -> BlockMask:
    """The tiles of a hull, each of which is asked pair by pair."""
    (item,) = hull.passes
    assert isinstance(item.piece.shape, Sparse)
    tiles = item.piece.shape.tiles
    q_blks, kv_blks = (torch.as_tensor(part, device=device) for part in (tiles.q_blks, tiles.kv_blks))
    is_full = torch.zeros_like(q_blks, dtype=torch.bool)
    blocks, lengths = (tiles.q_block, tiles.kv_block), (bound.sizes.q_len, bound.sizes.kv_len)
    return flex.block_mask(
        [[(q_blks, kv_blks, is_full)]], blocks, (tiles.num_q_blocks, tiles.num_kv_blocks), lengths, None
    )


def _mask_mod(said: Sequence[Said], data: DeviceData, order: Tensor | None, q_start: int) -> flex.MaskMod:
    """Membership of what stands at two places; positions are only looked up for what places do not say."""

    def position(batch: Tensor, place: Tensor) -> Tensor:
        if order is None:
            return place
        return order[place] if order.dim() == 1 else order[0 if order.shape[0] == 1 else batch, place]

    def keep(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q_place, here = q_idx + q_start, data.at_row(batch)
        q, k = position(batch, q_idx) + q_start, position(batch, kv_idx)
        holds = q_idx < 0
        for term in said:
            held = member(term.places, Point(q_place, kv_idx, 0, here))
            holds = holds | ((q_idx >= 0) & held & member(term.rest, Point(q, k, 0, here)))
        return holds

    return keep


class _Permute(Function):
    """x [B, H, T, D] by an order of its positions, [T] or [B or 1, T]; the gradient is taken back by the inverse, where
    PyTorch would add to memory that it clears first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return _taken(x, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _permuted(grads[0], inverse, order), None, None


def _taken(x: Tensor, order: Tensor) -> Tensor:
    # a gather takes one element a thread: by eight bytes it takes half the time that it takes by two, and a third or
    # fifth of what whole rows take that are selected (H100, PyTorch 2.11)
    wide = x.contiguous()
    if wide.shape[3] * wide.element_size() % 8 == 0:
        wide = wide.view(torch.int64)
    at = order.reshape(-1, 1, order.shape[-1], 1).expand(x.shape[0], x.shape[1], -1, wide.shape[3])
    return wide.gather(2, at).view(x.dtype)


# torch declares `apply` without types
_permuted: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permute.apply
