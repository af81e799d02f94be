"""How does a pattern that reads inputs run on a GPU without finding tiles in each call? By FlexAttention on its hulls.

In the order by an input, queries, keys and values are permuted first and results put back; the tiles are those of the
hull, the same in each call, and each pair of them is asked for by its positions. PyTorch differentiates all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.device.graphs import on_device
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, NOTHING, Relation, inputs_read
from patterndsl.lower.hulls import BLOCK, FEWEST_KEYS, Hull, Lists, Said
from patterndsl.lower.shapes import Sparse
from patterndsl.runtime import flex, strips
from patterndsl.runtime.data import DeviceData, Inputs, data_of, device_data, place_of
from patterndsl.runtime.function import Recorded
from patterndsl.runtime.heads import Chosen, assembled, for_each_query_head
from patterndsl.runtime.joined import merged
from patterndsl.runtime.routes import Routes
from patterndsl.runtime.told import list_teller, read_in, teller, told
from patterndsl.sema.bind import Bound
from patterndsl.sema.parameters import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A hull made ready: its tiles, or what tells them in each call, and a compiled FlexAttention of its own."""

    hull: Hull
    mask: BlockMask | None
    attend: flex.Attend
    tell: Callable[..., Any] | None


class Placed:
    """The hulls of a pattern made ready for a GPU, by inputs that heads share."""

    def __init__(self, hulls: Sequence[Hull], bound: Bound, device: torch.device) -> None:
        self.bound = bound
        self.heads = tuple(dict.fromkeys(hull.heads for hull in hulls))
        self.ready = tuple(
            _Ready(hull, _mask(hull, bound, device), flex.compiled_flex(), _teller(hull)) for hull in hulls
        )

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Recorded:
        """One call with checked inputs: output in the tensors' dtype, lse in float32."""
        return Recorded(partial(self, given=given, scale=scale))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, Dv] and lse [B, Hq, Tq] of a call."""
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
        if item.hull.lists is not None:
            return self._listed(item, item.hull.lists, tensors, given, scale)
        if item.hull.in_call:
            mask = self._told(item, given)
            out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
            assert lse is not None
            return out, lse
        assert item.mask is not None
        asked = [part for term in item.hull.said for part in (term.places, term.rest)]
        data = data_of(asked, 1, given, query.device)
        order = None if item.hull.order is None else given[item.hull.order].argsort(stable=True, dim=-1)
        mask = copy(item.mask)
        mask.mask_mod = _mask_mod(item.hull.said, data, order, self.bound.sizes.q_start)
        if order is None:
            out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
        else:
            place = place_of(order)
            query, key, value = (_permuted(x, order, place) for x in (query, key, value))
            out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
            assert lse is not None
            out, lse = _permuted(out, place, order), _permuted(lse[..., None], place, order)[..., 0]
        assert lse is not None
        return out, lse

    def _told(self, item: _Ready, given: Inputs) -> BlockMask:
        """The tiles that are live and those that are full, told for all of them at once, for each batch row."""
        relation, sizes = item.hull.relation, self.bound.sizes
        assert item.tell is not None
        live, full = item.tell(relation, sizes, read_in(relation, given), BLOCK)
        mod = _relation_mod(relation, device_data(relation, 1, given, live.device), sizes)
        return flex.mask_of_tiles(told(live, full), BLOCK, (sizes.q_len, sizes.kv_len), mod)

    def _listed(
        self, item: _Ready, lists: Lists, tensors: tuple[Tensor, Tensor, Tensor], given: Inputs, scale: float
    ) -> tuple[Tensor, Tensor]:
        query, key, value = tensors
        rest, sizes = item.hull.said[0].rest, self.bound.sizes
        if lists.is_route:
            key, value = (for_each_query_head(x, query.shape[1]) for x in (key, value))
            return Routes(lists, rest, sizes).results(query, key, value, given, scale)
        table = given[lists.names[0]]
        table = table.view(-1, table.shape[-1] // lists.width, lists.width)
        if max(lists.of, lists.per) < FEWEST_KEYS:
            return self._by_keys(lists, rest, table, tensors, given, scale)
        train = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        block = BLOCK if train or min(lists.of, lists.per) >= BLOCK else FINE_BLOCK
        assert item.tell is not None
        beside = item.hull.relation if item.hull.in_call else NOTHING
        read = {**read_in(rest, given), **read_in(beside, given)}
        live, full, bits = item.tell(lists, rest, beside, sizes, table, read, block)
        mod = _listed_mod(lists, bits, rest, beside, data_of((rest, beside), 1, given, query.device), sizes)
        mask = flex.mask_of_tiles(told(live, full), block, (sizes.q_len, sizes.kv_len), mod)
        out, lse = flex.flex(item.attend, query, key, value, mask, scale=scale, want_lse=True)
        assert lse is not None
        return out, lse

    def _by_keys(
        self,
        lists: Lists,
        rest: Relation,
        table: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor],
        given: Inputs,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Rows of few keys here and there, which no tiles hold."""
        query, key, value = tensors
        sizes = self.bound.sizes
        key, value = (for_each_query_head(x, query.shape[1]) for x in (key, value))
        positions = torch.arange(sizes.q_start, sizes.q_start + sizes.q_len, device=query.device)
        blocks = table[:, positions // lists.per - lists.first_row]  # [rows, Tq, width]
        inside = torch.arange(lists.of, device=query.device)
        keys = (blocks[..., None] * lists.of + inside).where(blocks[..., None] >= 0, -1).flatten(2)
        keys = keys.masked_fill(keys >= sizes.kv_len, -1).expand(query.shape[0], -1, -1)
        data = device_data(rest, 1, given, query.device)
        row = torch.arange(keys.shape[0], device=query.device)[:, None, None]

        def keep(start: int, stop: int) -> Tensor:
            point = Point(positions[start:stop, None], keys[:, start:stop], 0, data.at_row(row))
            return on_device(member(rest, point), query.device).expand(keys[:, start:stop].shape)[:, None]

        return strips.attend(query, key, value, strips.Lists(keys[:, None], keep), scale)


# ---- tiles that each call tells


def _relation_mod(relation: Relation, data: DeviceData, sizes: Sizes) -> flex.MaskMod:
    def keep(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        holds: Tensor = (q_idx >= 0) & member(relation, Point(q_idx + sizes.q_start, kv_idx, 0, data.at_row(batch)))
        return holds

    return keep


# ---- what each call lists


FINE_BLOCK = 64
"""Queries and keys of a tile where blocks of lists are smaller than usual ones and no gradient is wanted: the backward
pass of FlexAttention has no kernel for so few on Hopper."""


def _listed_mod(
    lists: Lists, bits: Tensor, rest: Relation, beside: Relation, data: DeviceData, sizes: Sizes
) -> flex.MaskMod:
    """Whether a block is listed, and the rest holds, or what there is beside. bits: see `told.list_teller`."""
    num_rows = bits.shape[0]

    def keep(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        q = q_idx + sizes.q_start
        at = 0 if num_rows == 1 else batch
        holds: Tensor = bits[at, q // lists.per - lists.first_row, kv_idx // lists.of]
        if rest != EVERYTHING:
            holds = holds & member(rest, Point(q, kv_idx, 0, data.at_row(batch)))
        if beside != NOTHING:
            holds = holds | member(beside, Point(q, kv_idx, 0, data.at_row(batch)))
        return holds

    return keep


def _teller(hull: Hull) -> Callable[..., Any] | None:
    if hull.in_call and hull.lists is None:
        return teller()
    return list_teller() if hull.lists is not None and not hull.lists.is_route else None


# ---- tiles that stay


def _mask(hull: Hull, bound: Bound, device: torch.device) -> BlockMask | None:
    """The tiles of a hull, each of which is asked pair by pair, but full ones of what is static."""
    if hull.lists is not None or hull.in_call:
        return None
    (item,) = hull.passes
    assert isinstance(item.piece.shape, Sparse)
    tiles = item.piece.shape.tiles
    q_blks, kv_blks = (torch.as_tensor(part, device=device) for part in (tiles.q_blks, tiles.kv_blks))
    is_static = hull.order is None and not inputs_read(hull.relation)
    is_full = torch.as_tensor(tiles.is_full, device=device) & is_static
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
