"""How are slots attended? As places that have an order, with a result each, and the results of a query's slots joined.

Gradients are those of slots, too, and are summed in a fixed order: nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.lower.blocks import Blocks
from patterndsl.runtime.kernels.backward import key_kernel, query_kernel, sum_kernel
from patterndsl.runtime.kernels.forward import attend_kernel, merge_kernel
from patterndsl.runtime.kernels.launch import CHUNK, TWO_WARPS
from patterndsl.runtime.kernels.memory import (
    as_laid_out,
    numbers_beside,
    padded_widths,
    precision_of,
    strides_of,
)
from patterndsl.runtime.kernels.rows import APART, BY_SLOT, ORDERED, PLAIN_KEYS
from patterndsl.runtime.kernels.slot_kernels import add_kernel, join_kernel, share_kernel
from patterndsl.runtime.kernels.slots import Pass, Results, Slots
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.views import with_unit_stride

ROWS, LANES = 16, 256
"""Rows of a program that joins slots, and slots of one that has a number for each."""

_attend, _merge, _sum = Launcher(attend_kernel), Launcher(merge_kernel), Launcher(sum_kernel)
_of_queries, _of_keys = Launcher(query_kernel), Launcher(key_kernel)
_join, _share, _add = Launcher(join_kernel), Launcher(share_kernel), Launcher(add_kernel)


def attend(item: Pass, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Results:
    """The results of slots, each a softmax of its own; those of nobody are undefined. scale: above 0."""
    query, key, value = map(with_unit_stride, (query, key, value))
    batch, heads, _, dim = query.shape
    value_dim, number = value.shape[3], item.slots.query.shape[2]
    padded, value_padded = padded_widths(dim, value_dim)
    out = torch.empty((batch, heads, number, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, number), dtype=torch.float32, device=query.device)
    work, blocks = item.rows, item.shapes.forward
    assert isinstance(blocks, Blocks), "slots are for Triton's kernels"
    rows = batch if work.is_shared else 1
    parts = rows * work.num_slots * blocks.q_block
    part_out, part_lse = _room(lse, parts * value_padded), _room(lse, parts)
    _attend(
        (work.num_pieces, rows, 1),
        (query, key, value, out, lse, part_out, part_lse, work.pieces, work.entries, *_orders(item)),
        (
            *strides_of(query, key, value, out), *lse.stride(), *_order_strides(item),
            number, _num_keys(item, key), item.asked.q_start, work.num_slots,
        ),
        {
            "keep": item.asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": blocks.q_block, "kv_block": blocks.kv_block,
            "even": _is_even(item, key, blocks), "described": False, "ordered": _ordered(item), "goes_on": False,
            "precision": precision_of(query), "stages": blocks.stages,
        },
        _options(blocks), asked=item.asked, scale=scale,
    )  # fmt: skip
    if work.num_joints:
        _merge(
            (work.num_joints * blocks.q_block, rows, 1),
            (part_out, part_lse, out, lse, work.joints, work.joints),
            (*strides_of(out), *lse.stride(), 0, 0, number, work.num_slots),
            {
                "value_dim": value_dim, "value_padded": value_padded, "q_block": blocks.q_block, "chunk": CHUNK,
                "ordered": False, "goes_on": False,
            },
            TWO_WARPS,
        )  # fmt: skip
    return Results(out, lse)


def join(item: Pass, results: Results, into: tuple[Tensor, Tensor], *, mean: bool, goes_on: bool) -> None:
    """Writes the results of queries into output [B, Hq, Tq, Dv] and lse [B, Hq, Tq]; 0 and -inf where none of its slots
    has keys. mean: their average instead of one softmax, and the log of how many have keys. goes_on: whether they are
    joined with what is there."""
    out, lse = into
    batch, heads, length, value_dim = out.shape
    (value_padded,) = padded_widths(value_dim)
    slots = item.slots
    _join(
        (-(-length // ROWS), heads, batch),
        (results.out, results.lse, *_places(slots), out, lse),
        (
            *strides_of(results.out), *results.lse.stride()[:2], *_place_strides(slots), *strides_of(out),
            *lse.stride(), item.asked.q_start, length,
        ),
        {
            "width": slots.width, "mean": mean, "goes_on": goes_on, "value_dim": value_dim,
            "value_padded": value_padded, "block": ROWS,
        },
    )  # fmt: skip


def shares(item: Pass, results: Results, lse: Tensor) -> Results:
    """The same results with the lse that weights of a mean follow from. lse: the log of how many are averaged."""
    batch, heads, number = results.lse.shape
    norm = numbers_beside(results.lse, torch.float32)
    _share(
        (-(-number // LANES), heads, batch),
        (results.lse, lse, item.slots.query, norm),
        (*norm.stride()[:2], *lse.stride(), *_steps(item.slots.query), number),
        {"block": LANES},
    )
    return Results(results.out, norm)


def gradients(
    item: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
    *,
    apart: bool,
    adds: bool,
) -> None:
    """Writes the gradients of query, key and value, or adds them to what is there. out, lse: of queries; or of slots
    where each is a softmax of its own (apart), and then lse has no gradient."""
    query, key, value, grad_out = map(with_unit_stride, (query, key, value, grad_out))
    tensors, told = (query, key, value), (out, lse)
    slot_grad, delta = _query_gradients(item, *tensors, *told, grad_out, grad_lse, scale, apart=apart)
    _add_slots(item, slot_grad, into[0], item.asked.q_start, 1, adds=adds)
    kv_group = query.shape[1] // key.shape[1]
    if not item.is_route:
        _key_gradients(item, *tensors, lse, grad_out, delta, scale, into[1:], 0, apart=apart, adds=adds)
        return
    shape = (*query.shape[:2], item.slots.query.shape[2])
    of_key, of_value = (torch.empty((*shape, x.shape[3]), dtype=x.dtype, device=x.device) for x in (key, value))
    for turn in range(kv_group):
        of_heads = of_key[:, turn::kv_group], of_value[:, turn::kv_group]
        _key_gradients(item, *tensors, lse, grad_out, delta, scale, of_heads, turn, apart=apart, adds=False)
    for part, total in ((of_key, into[1]), (of_value, into[2])):
        _add_slots(item, part, total, 0, kv_group, adds=adds)


def _query_gradients(
    item: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    scale: float,
    *,
    apart: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient in each slot [B, Hq, slots, D], and delta as lse lies in memory."""
    out = with_unit_stride(out)
    batch, heads, _, dim = query.shape
    value_dim, number = value.shape[3], item.slots.query.shape[2]
    padded, value_padded = padded_widths(dim, value_dim)
    grad = torch.empty((batch, heads, number, dim), dtype=query.dtype, device=query.device)
    delta = numbers_beside(lse, torch.float32)
    work, blocks = item.rows, item.shapes.queries
    rows = batch if work.is_shared else 1
    part = _room(lse, rows * work.num_slots * blocks.q_block * padded)
    of_lse = lse if grad_lse is None else as_laid_out(grad_lse, lse)
    _of_queries(
        (work.num_pieces, rows, 1),
        (
            query, key, value, out, grad_out, lse, of_lse, delta, grad, part, work.pieces, work.entries,
            *_orders(item),
        ),
        (
            *strides_of(query, key, value, out, grad_out), *lse.stride(), *strides_of(grad), *_order_strides(item),
            number, _num_keys(item, key), item.asked.q_start, work.num_slots,
        ),
        {
            "keep": item.asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": blocks.q_block, "kv_block": blocks.kv_block,
            "even": _is_even(item, key, blocks), "described": False, "ordered": _ordered(item, apart=apart),
            "has_grad_lse": grad_lse is not None, "adds": False, "precision": precision_of(query),
            "stages": blocks.stages,
        },
        _options(blocks), asked=item.asked, scale=scale,
    )  # fmt: skip
    _add_up(part, grad, padded, work, rows, blocks.q_block)
    return grad, delta


def _key_gradients(
    item: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    scale: float,
    into: tuple[Tensor, Tensor],
    turn: int,
    *,
    apart: bool,
    adds: bool,
) -> None:
    """Writes what one query head of each group, or all of them, give keys and values where these stand."""
    batch, heads, _, dim = query.shape
    value_dim, number = value.shape[3], item.slots.query.shape[2]
    padded, value_padded = padded_widths(dim, value_dim)
    work, blocks = item.columns(turn), item.shapes.keys
    rows = batch if work.is_shared else 1
    parts = rows * work.num_slots * blocks.kv_block
    part_key, part_value = _room(lse, parts * padded), _room(lse, parts * value_padded)
    _of_keys(
        (work.num_pieces, rows, 1),
        (
            query, key, value, grad_out, lse, delta, *into, part_key, part_value, work.pieces, work.entries,
            *_orders(item),
        ),
        (
            *strides_of(query, key, value, grad_out), *lse.stride(), *strides_of(*into), *_order_strides(item),
            number, _num_keys(item, key), item.asked.q_start, work.num_slots, -(-number // blocks.q_block), turn,
        ),
        {
            "keep": item.asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": blocks.q_block, "kv_block": blocks.kv_block,
            "even": False, "described": False, "ordered": _ordered(item, apart=apart, of_keys=True), "adds": adds,
            "precision": precision_of(query), "stages": blocks.stages,
        },
        _options(blocks), asked=item.asked, scale=scale,
    )  # fmt: skip
    order = None if item.is_route else item.key
    _add_up(part_key, into[0], padded, work, rows, blocks.kv_block, order, adds=adds)
    _add_up(part_value, into[1], value_padded, work, rows, blocks.kv_block, order, adds=adds)


def _add_up(
    part: Tensor,
    into: Tensor,
    padded: int,
    work: Work,
    rows: int,
    block: int,
    order: Tensor | None = None,
    *,
    adds: bool = False,
) -> None:
    """The parts of what was cut, added up where it lies. order: that of keys that do not stand where they lie."""
    if work.num_joints:
        number = into.shape[2] if order is None else order.shape[2]
        _sum(
            (work.num_joints * block, rows, 1),
            (part, into, work.joints, work.joints if order is None else order),
            (*strides_of(into), 0, 0, number, work.num_slots, 1, 0),
            {
                "width": into.shape[3], "padded": padded, "block": block, "chunk": CHUNK,
                "ordered": order is not None, "adds": adds,
            },
            TWO_WARPS,
        )  # fmt: skip


def _add_slots(item: Pass, part: Tensor, into: Tensor, first: int, group: int, *, adds: bool) -> None:
    """Sums of what slots have, of rows from position `first` on, through a group of query heads."""
    batch, heads, length, dim = into.shape
    (padded,) = padded_widths(dim)
    _add(
        (-(-length // ROWS), heads, batch),
        (part, *_places(item.slots), into),
        (*strides_of(part), *_place_strides(item.slots), *strides_of(into), first, length, group),
        {"width": item.slots.width, "adds": adds, "dim": dim, "padded": padded, "block": ROWS},
    )


# ---- arguments


def _ordered(item: Pass, *, apart: bool = False, of_keys: bool = False) -> int:
    """What kernels are told of orders; `of_keys`: whether results are those of keys."""
    by_slot = BY_SLOT.value if item.is_route or not of_keys else 0
    plain = PLAIN_KEYS.value if item.key is None else 0
    return int(ORDERED.value + by_slot + plain + (APART.value if apart else 0))


def _orders(item: Pass) -> tuple[Tensor, Tensor]:
    return item.slots.query, item.slots.query if item.key is None else item.key


def _order_strides(item: Pass) -> tuple[int, int, int, int]:
    return *_steps(item.slots.query), *((0, 0) if item.key is None else _steps(item.key))


def _num_keys(item: Pass, key: Tensor) -> int:
    return key.shape[2] if item.key is None else item.key.shape[2]


def _places(slots: Slots) -> tuple[Tensor, Tensor]:
    return slots.places, slots.places if slots.begins is None else slots.begins


def _place_strides(slots: Slots) -> tuple[int, int, int, int]:
    return *_steps(slots.places), *((0, 0) if slots.begins is None else _steps(slots.begins))


def _steps(x: Tensor) -> tuple[int, int]:
    """From batch row to batch row and from head to head, of which there may be one for all."""
    rows, heads = (step if size > 1 else 0 for size, step in zip(x.shape[:2], x.stride()[:2], strict=True))
    return rows, heads


def _is_even(item: Pass, key: Tensor, blocks: Blocks) -> bool:
    """Whether every block of keys is whole."""
    return item.key is None and key.shape[2] % blocks.kv_block == 0


def _room(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device) if size else like


def _options(blocks: Blocks) -> dict[str, Any]:
    found = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return found if blocks.registers is None else {**found, "maxnreg": blocks.registers}
