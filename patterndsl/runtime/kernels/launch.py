"""How do kernels meet tensors? Results are made, and each kernel is launched once over all heads and batch rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from patterndsl.device.launcher import Launcher
from patterndsl.lower.blocks import ROWS, Blocks, Pipeline
from patterndsl.runtime.kernels.asked import Asked, Orders
from patterndsl.runtime.kernels.backward import key_kernel, query_kernel, sum_kernel
from patterndsl.runtime.kernels.forward import attend_kernel, merge_kernel
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.views import make_room, with_unit_stride

CHUNK = 16
"""Slots of a row that are read at once."""

TWO_WARPS = {"num_warps": 2}

_attend, _merge = Launcher(attend_kernel), Launcher(merge_kernel)
_of_queries, _of_keys, _sum = Launcher(query_kernel), Launcher(key_kernel), Launcher(sum_kernel)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(attend_kernel, triton.JITFunction)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    goes_on: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, Dv] in the query's dtype and lse [B, Hq, Tq] in float32. Empty rows yield 0 and -inf.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], in any order in memory. into: where output
    and lse are written; goes_on: whether they are merged with those of other keys that are there. scale: above 0. Work:
    O(entries x block^2 x D), in one launch, and a second one where long rows were cut.
    """
    query, key, value = map(with_unit_stride, (query, key, value))
    batch, heads, q_len, dim = query.shape
    value_dim = value.shape[3]
    if into is None:
        out, lse = _like(query, value_dim), torch.empty((batch, heads, q_len), dtype=torch.float32, device=query.device)
    else:
        out, lse = into
    rows, (_, padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block = _owned(blocks, blocks.q_block)
    slots = rows * work.num_slots * q_block
    part_out, part_lse = _floats(lse, slots * padded), _floats(lse, slots)
    sides = _sides(asked.orders, work, q_len, key.shape[2])
    asks = query, key, value, out, lse, part_out, part_lse, work, rows, asked, scale
    if isinstance(blocks, Pipeline):
        _forward_on_hopper(*asks, blocks, goes_on=goes_on)
    else:
        _forward(*asks, blocks, sides, goes_on=goes_on)
    if work.num_joints:
        _merge(
            (work.num_joints * q_block, rows, 1),
            (part_out, part_lse, out, lse, work.joints, sides.query.order),
            (*strides_of(out), *lse.stride(), *sides.query.strides, sides.query.number, work.num_slots),
            {
                "value_dim": value_dim, "value_padded": padded, "q_block": q_block, "chunk": CHUNK,
                "ordered": sides.ordered, "goes_on": goes_on,
            },
            TWO_WARPS,
        )  # fmt: skip
    return out, lse


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Blocks,
    sides: _Sides,
    *,
    goes_on: bool,
) -> None:
    """Whole lists into out and lse, parts of lists into their slots."""
    heads, dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    padded, value_padded = padded_widths(dim, value_dim)
    q_block, kv_block = blocks.q_block, blocks.kv_block
    blocks_of = (query, q_block, padded), (key, kv_block, padded), (value, kv_block, value_padded)
    seen = _seen(*blocks_of, ordered=sides.ordered)
    _attend(
        (work.num_pieces, rows, 1),
        (*seen.tensors, out, lse, part_out, part_lse, work.pieces, work.entries, *sides.orders),
        (
            *strides_of(query, key, value, out), *lse.stride(), *sides.strides,
            *sides.numbers, asked.q_start, work.num_slots,
        ),
        {
            "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
            "even": sides.key.is_whole(kv_block), "described": seen.described, "ordered": sides.ordered,
            "goes_on": goes_on, "precision": precision_of(query), "stages": blocks.stages,
        },
        _options(blocks), asked=asked, scale=scale,
    )  # fmt: skip


def _forward_on_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    goes_on: bool,
) -> None:
    """The same; the tensors can be described."""
    from patterndsl.runtime.kernels import hopper

    q_len, dim = query.shape[2:]
    q, o, k, v = _described_on_hopper((query, out), (key, value), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper.attend(
        grid,
        (q, k, v, o, lse, part_out, part_lse, pieces, work.entries, borders),
        (*lse.stride(), q_len, key.shape[2], asked.q_start, query.shape[1] // key.shape[1]),
        {
            "hide": asked.keep, "kv_block": blocks.kv_block, "dim": dim, "consumers": blocks.consumers,
            "ring": blocks.ring, "ahead": blocks.ahead, "even": key.shape[2] % blocks.kv_block == 0,
            "goes_on": goes_on, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def _dealt(
    work: Work, rows: int, blocks: Pipeline, device: torch.device
) -> tuple[tuple[int, int, int], Tensor, Tensor]:
    """As many programs as run at once, if there are so many pieces, and what each of them takes, see `Work.dealt`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = min(work.num_pieces * rows, blocks.programs * processors)
    return (programs, 1, 1), *work.dealt(rows, programs)


def gradient_of_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: Tensor | None = None,
    *,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradient of queries [B, Hq, Tq, D], and delta [B, Hq, Tq] for `gradients_of_keys`.

    out, lse: of all keys, of which these may be a part; grad_lse: that of lse, None where it has none. work: as for
    `forward`. into: where the gradient is written; adds: whether it is added to what is there.
    """
    query, key, value, out, grad_out = map(with_unit_stride, (query, key, value, out, grad_out))
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    delta = numbers_beside(lse, torch.float32)
    grad_query = _like(query, dim) if into is None else into
    rows, (padded, value_padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block, kv_block = _owned(blocks, blocks.q_block), blocks.kv_block
    part = _floats(lse, rows * work.num_slots * q_block * padded)
    sides = _sides(asked.orders, work, q_len, kv_len)
    grad_of_lse = lse if grad_lse is None else as_laid_out(grad_lse, lse)
    if isinstance(blocks, Pipeline):
        tensors = query, key, value, out, grad_out, lse, grad_of_lse, delta, grad_query, part
        has_grad_lse = grad_lse is not None
        _gradient_of_queries_on_hopper(*tensors, work, rows, asked, scale, blocks, has_grad_lse=has_grad_lse, adds=adds)
        _add_up(part, grad_query, padded, work, rows, q_block, sides.query, ordered=False, adds=adds)
        return grad_query, delta
    seen = _seen(
        *((query, q_block, padded), (key, kv_block, padded), (value, kv_block, value_padded)),
        *((out, q_block, value_padded), (grad_out, q_block, value_padded)),
        ordered=sides.ordered,
    )
    _of_queries(
        (work.num_pieces, rows, 1),
        (*seen.tensors, lse, grad_of_lse, delta, grad_query, part, work.pieces, work.entries, *sides.orders),
        (
            *strides_of(query, key, value, out, grad_out), *lse.stride(), *strides_of(grad_query), *sides.strides,
            *sides.numbers, asked.q_start, work.num_slots,
        ),
        {
            "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
            "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
            "even": sides.key.is_whole(kv_block), "described": seen.described, "ordered": sides.ordered,
            "has_grad_lse": grad_lse is not None, "adds": adds, "precision": precision_of(query),
            "stages": blocks.stages,
        },
        _options(blocks), asked=asked, scale=scale,
    )  # fmt: skip
    _add_up(part, grad_query, padded, work, rows, q_block, sides.query, ordered=sides.ordered, adds=adds)
    return grad_query, delta


def gradients_of_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    delta: Tensor,
    work: Work,
    blocks: Blocks | Pipeline,
    asked: Asked,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    turn: int = 0,
    adds: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of keys [B, Hkv, Tk, D] and values [B, Hkv, Tk, Dv]. work: of transposed lists. delta: of
    `gradient_of_queries`, which lies in memory as lse does. into, adds: see there. turn: where heads have orders of
    their own, the one query head of each group whose pairs these are."""
    query, key, value, grad_out = map(with_unit_stride, (query, key, value, grad_out))
    batch, heads, q_len, dim = query.shape
    value_dim, kv_len = value.shape[3], key.shape[2]
    grad_key, grad_value = (_like(key, dim), _like(value, value_dim)) if into is None else into
    rows, (padded, value_padded) = _rows(work, batch), padded_widths(dim, value_dim)
    q_block, kv_block = blocks.q_block, _owned(blocks, blocks.kv_block)
    slots = rows * work.num_slots * kv_block
    part_key, part_value = _floats(lse, slots * padded), _floats(lse, slots * value_padded)
    sides = _sides(asked.orders, work, q_len, kv_len)
    how: Any = {"group": heads // key.shape[1], "turn": turn, "ordered": sides.ordered, "adds": adds}
    if isinstance(blocks, Pipeline):
        tensors = query, key, value, grad_out, lse, delta, grad_key, grad_value, part_key, part_value
        _gradients_of_keys_on_hopper(*tensors, work, rows, asked, scale, blocks, adds=adds)
    else:
        seen = _seen(
            *((query, q_block, padded), (key, kv_block, padded)),
            *((value, kv_block, value_padded), (grad_out, q_block, value_padded)),
            ordered=sides.ordered,
        )
        _of_keys(
            (work.num_pieces, rows, 1),
            (
                *seen.tensors, lse, delta, grad_key, grad_value, part_key, part_value, work.pieces, work.entries,
                *sides.orders,
            ),
            (
                *strides_of(query, key, value, grad_out), *lse.stride(), *strides_of(grad_key, grad_value),
                *sides.strides, *sides.numbers, asked.q_start, work.num_slots, -(-sides.query.number // q_block), turn,
            ),
            {
                "keep": asked.keep, "kv_group": heads // key.shape[1], "dim": dim, "value_dim": value_dim,
                "padded": padded, "value_padded": value_padded, "q_block": q_block, "kv_block": kv_block,
                "even": sides.query.is_whole(q_block), "described": seen.described, "ordered": sides.ordered,
                "adds": adds, "precision": precision_of(query), "stages": blocks.stages,
            },
            _options(blocks), asked=asked, scale=scale,
        )  # fmt: skip
    _add_up(part_key, grad_key, padded, work, rows, kv_block, sides.key, **how)
    _add_up(part_value, grad_value, value_padded, work, rows, kv_block, sides.key, **how)
    return grad_key, grad_value


def _gradient_of_queries_on_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    part: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    has_grad_lse: bool,
    adds: bool,
) -> None:
    """Of whole lists into grad_query, of parts of lists into their slots; the tensors can be described."""
    from patterndsl.runtime.kernels import hopper_backward

    q_len, dim = query.shape[2:]
    q, o, do, dq, k, v = _described_on_hopper((query, out, grad_out, grad_query), (key, value), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper_backward.of_queries(
        grid,
        (q, k, v, o, do, dq, lse, grad_lse, delta, grad_query, part, pieces, work.entries, borders),
        (
            *strides_of(grad_query), *lse.stride(), q_len, key.shape[2], asked.q_start,
            query.shape[1] // key.shape[1],
        ),
        {
            "hide": asked.keep, "kv_block": blocks.kv_block, "dim": dim, "consumers": blocks.consumers,
            "ring": blocks.ring, "ahead": blocks.ahead, "even": key.shape[2] % blocks.kv_block == 0,
            "has_grad_lse": has_grad_lse, "adds": adds, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def _gradients_of_keys_on_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    part_key: Tensor,
    part_value: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    adds: bool,
) -> None:
    """The same of transposed lists, into grad_key and grad_value."""
    from patterndsl.runtime.kernels import hopper_backward

    q_len, dim = query.shape[2:]
    k, v, dk, dv, q, do = _described_on_hopper((key, value, grad_key, grad_value), (query, grad_out), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper_backward.of_keys(
        grid,
        (
            q, k, v, do, dk, dv, lse, delta, grad_key, grad_value, part_key, part_value, pieces, work.entries,
            borders,
        ),
        (
            *strides_of(grad_key, grad_value), *lse.stride(), q_len, key.shape[2], asked.q_start,
            -(-q_len // blocks.kv_block),
        ),
        {
            "hide": asked.keep, "kv_group": query.shape[1] // key.shape[1], "q_block": blocks.kv_block, "dim": dim,
            "consumers": blocks.consumers, "ring": blocks.ring, "ahead": blocks.ahead,
            "even": q_len % blocks.kv_block == 0, "adds": adds, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def _add_up(
    part: Tensor,
    into: Tensor,
    padded: int,
    work: Work,
    rows: int,
    block: int,
    side: _Side,
    *,
    group: int = 1,
    turn: int = 0,
    ordered: bool,
    adds: bool,
) -> None:
    if work.num_joints:
        _sum(
            (work.num_joints * block, rows, 1),
            (part, into, work.joints, side.order),
            (*strides_of(into), *side.strides, side.number, work.num_slots, group, turn),
            {
                "width": into.shape[3], "padded": padded, "block": block, "chunk": CHUNK, "ordered": ordered,
                "adds": adds,
            },
            TWO_WARPS,
        )  # fmt: skip


def _owned(blocks: Blocks | Pipeline, block: int) -> int:
    """Rows that leave one part in one slot: a block of Triton's kernels, those of one consumer of Hopper's."""
    return block if isinstance(blocks, Blocks) else ROWS


def _options(blocks: Blocks) -> dict[str, int]:
    """How a kernel is compiled."""
    found = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return found if blocks.registers is None else {**found, "maxnreg": blocks.registers}


# ---- places


class _Side(NamedTuple):
    """The places of queries or of keys. order: who stands there, or any integers where rows themselves do; strides: of
    its batch rows and heads; is_full: whether no place is empty."""

    order: Tensor
    strides: tuple[int, int]
    number: int
    is_full: bool

    def is_whole(self, block: int) -> bool:
        """Whether there is a row at every place of every block."""
        return self.is_full and self.number % block == 0


class _Sides(NamedTuple):
    query: _Side
    key: _Side
    ordered: bool

    @property
    def orders(self) -> tuple[Tensor, Tensor]:
        return self.query.order, self.key.order

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return *self.query.strides, *self.key.strides

    @property
    def numbers(self) -> tuple[int, int]:
        return self.query.number, self.key.number


def _sides(orders: Orders | None, work: Work, q_len: int, kv_len: int) -> _Sides:
    if orders is None:
        query, key = (_Side(work.pieces, (0, 0), length, True) for length in (q_len, kv_len))
        return _Sides(query, key, False)
    query = _side(orders.query, orders.is_full)
    return _Sides(query, query if orders.key is orders.query else _side(orders.key, orders.is_full), True)


def _side(order: Tensor, is_full: bool) -> _Side:
    (num_rows, num_heads, number), (row, head, _) = order.shape, order.stride()
    return _Side(order, (row if num_rows > 1 else 0, head if num_heads > 1 else 0), number, is_full)


# ---- tensors as kernels see them


class _Seen(NamedTuple):
    """What loads take, see `rows`: descriptors of blocks where all tensors can be described, or the tensors."""

    tensors: Sequence[Any]
    described: bool


_KNOWN: dict[object, list[Any] | None] = {}
"""Descriptors of tensors of some forms, without these; None where some cannot be described. Making them takes as long
as the launch itself."""


def _seen(
    *tensors: tuple[Tensor, int, int], ordered: bool = False, make: Callable[..., Any] = TensorDescriptor
) -> _Seen:
    """Tensors with the rows and channels of their blocks. ordered: whether rows of a block lie apart. make: of a
    tensor, its sizes and strides, and a block."""
    if ordered:
        return _Seen([x for x, _, _ in tensors], False)
    form = make, *((x.shape, x.stride(), x.dtype, x.data_ptr() % 16, block, width) for x, block, width in tensors)
    asked = tensors[0][0].device, *form
    if asked not in _KNOWN:
        make_room(_KNOWN)
        fit = all(can_be_described(x, width) for x, _, width in tensors)
        _KNOWN[asked] = [_described(x, block, make) for x, block, _ in tensors] if fit else None
    known = _KNOWN[asked]
    if known is None:
        return _Seen([x for x, _, _ in tensors], False)
    return _Seen([_of(like, x) for like, (x, _, _) in zip(known, tensors, strict=True)], True)


def _described_on_hopper(owned: Sequence[Tensor], shared: Sequence[Tensor], blocks: Pipeline) -> Sequence[Any]:
    """Tensors of which consumers have tiles of their own, then those whose tiles they share, all of one width."""
    from patterndsl.runtime.kernels.pipeline import descriptor

    width = owned[0].shape[3]
    sizes = *((x, ROWS, width) for x in owned), *((x, blocks.kv_block, width) for x in shared)
    seen = _seen(*sizes, make=descriptor)
    assert seen.described, "who chooses this kernel looks at its tensors"
    return seen.tensors


def _of(like: Any, x: Tensor) -> Any:
    """The descriptor of another tensor of the same form."""
    found = object.__new__(type(like))  # not checked again, which takes long
    found.__dict__.update(like.__dict__, base=x)
    return found


def can_be_described(x: Tensor, width: int) -> bool:
    """Whether the copying engine of Hopper and later takes it: it wants starts and steps of whole 16 bytes."""
    return x.data_ptr() % 16 == 0 and _has_engine(x.device) and _takes(x.shape, x.stride(), x.element_size(), width)


@cache
def _has_engine(device: torch.device) -> bool:
    """The interpreter has one, too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=4096)
def _takes(shape: tuple[int, ...], strides: tuple[int, ...], size: int, width: int) -> bool:
    steps = (step * size for length, step in zip(shape[:3], strides[:3], strict=True) if length > 1)
    return shape[3] == width and strides[3] == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def _described(x: Tensor, block: int, make: Callable[..., Any]) -> Any:
    width = x.shape[3]
    # the step of a dimension of one is never taken, and may be anything: one that is allowed
    strides = [step if length > 1 else width for length, step in zip(x.shape, x.stride(), strict=True)]
    found = make(x, list(x.shape), [*strides[:3], 1], [1, 1, block, width])
    found.base = None  # what is remembered keeps no tensor
    found.form = f"{x.dtype} {found.block_shape} {getattr(found, 'layout', None)}"  # what `launcher` asks
    return found


def _rows(work: Work, batch: int) -> int:
    """Batch rows that share the work."""
    return batch if work.is_shared else 1


def strides_of(*tensors: Tensor) -> Sequence[int]:
    """Of batch rows, heads and positions."""
    found = list[int]()
    for x in tensors:
        found += x.stride()[:3]
    return found


def _like(x: Tensor, width: int) -> Tensor:
    """A tensor [B, H, T, width] that lies in memory as x does, heads inside positions or around them."""
    if x.shape[3] == width and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return torch.empty_like(x)
    return torch.empty((*x.shape[:3], width), dtype=x.dtype, device=x.device)


def numbers_beside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for as many numbers, each where x has one. Most are next to each other, which takes no other operator than
    all else does: to call one for the first time after other work takes the host longer than ten times more."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """The numbers of x in float32, where those of `like` lie."""
    return torch.empty_strided(like.shape, like.stride(), dtype=torch.float32, device=x.device).copy_(x)


def _floats(like: Tensor, size: int) -> Tensor:
    """Room for numbers; where none are needed any tensor of float32 will do, and `like` is one."""
    return torch.empty(size, dtype=torch.float32, device=like.device) if size else like


@cache
def padded_widths(*widths: int) -> Sequence[int]:
    """Channels of tiles of these widths, powers of two: matrix units want 16 at least, and no less than half of the
    widest. (Halves of 128 channels beside values of 16 came out wrong on an H100 with Triton 3.6, of 64 right.)"""
    least = [max(16, 1 << (width - 1).bit_length()) for width in widths]
    return [max(width, max(least) // 2) for width in least]


def precision_of(x: Tensor) -> str:
    """Float32 stays float32: TF32 would be another attention than the one that was asked for."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
