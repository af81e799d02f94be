"""Which tiles are live in a call? Told on the device for all tiles at once, by intervals, in a compiled function.

What FlexAttention's create_block_mask asks of every pair, this asks of every tile: a tile that no pair can be in is
left out, and one that has all of its pairs is not masked. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.interval import Box, Interval, verdict
from patterndsl.ir.relation import NOTHING, Listed, Random, Relation, inputs_read
from patterndsl.lower.hulls import Lists, is_told
from patterndsl.runtime.data import Inputs, facet_of
from patterndsl.sema.parameters import Sizes


class Told(NamedTuple):
    """Tiles [rows, 1, q tiles, kv tiles]: how many of a row are live but not full, and their columns first; the same of
    full ones; and both the other way round, as BlockMask holds them."""

    kv_num: Tensor
    kv_indices: Tensor
    full_kv_num: Tensor
    full_kv_indices: Tensor
    q_num: Tensor
    q_indices: Tensor
    full_q_num: Tensor
    full_q_indices: Tensor


class TileData:
    """Bounds of inputs over ranges of positions, with a dimension for batch rows first."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = {name: values[None] if values.dim() == 1 else values for name, values in inputs.items()}
        self._levels: dict[tuple[str, Facet], list[tuple[Tensor, Tensor]]] = {}

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        """See `ir.interval.BoxData`."""
        levels = self._of(name, facet)
        length = levels[0][0].shape[1]
        low, high = (torch.as_tensor(end, device=levels[0][0].device) for end in index)
        low, high = low + 0 * high, high + 0 * low
        if low.dim() < 2:
            low, high = low.reshape(1, 1), high.reshape(1, 1)
        if length == 0:
            return torch.full_like(low, -1), torch.full_like(low, -1)
        first, last = low.clamp(0, length - 1), high.clamp(0, length - 1)
        level = torch.zeros_like(first)
        for bit in range(len(levels) - 1):
            level = level + (last - first >= (1 << bit))
        least, most = _at(levels[0][0], first), _at(levels[0][1], last)
        for at, (lows, highs) in enumerate(levels):
            here = torch.eq(level, at)
            for end in (first >> at, last >> at):
                least = torch.where(here, torch.minimum(_at(lows, end), least), least)
                most = torch.where(here, torch.maximum(_at(highs, end), most), most)
        leaves = torch.logical_or(low < 0, high >= length)
        misses = torch.logical_or(high < 0, low >= length)
        least, most = torch.where(leaves, least.clamp(max=-1), least), torch.where(leaves, most.clamp(min=-1), most)
        return torch.where(misses, -1, least), torch.where(misses, -1, most)

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> Any:
        raise AssertionError("draws are not told in a call")

    def any_listed(self, node: Listed, row: Interval, key: Interval) -> Any:
        raise AssertionError("lists are not told by intervals")

    def _of(self, name: str, facet: Facet) -> list[tuple[Tensor, Tensor]]:
        """Minima and maxima [rows, blocks] of aligned blocks of 1, 2, 4, ... values."""
        if (name, facet) not in self._levels:
            values = facet_of(self.inputs[name], facet)
            levels = [(values, values)]
            while levels[-1][0].shape[1] > 1:
                least, most = levels[-1]
                if least.shape[1] % 2:
                    least, most = (torch.cat((x, x[:, -1:]), 1) for x in (least, most))
                levels.append(
                    (torch.minimum(least[:, ::2], least[:, 1::2]), torch.maximum(most[:, ::2], most[:, 1::2]))
                )
            self._levels[name, facet] = levels
        return self._levels[name, facet]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """[rows, ...] of values [rows, length] at an index [...], or [rows, ...]."""
    index = index.clamp(max=values.shape[1] - 1)
    if index.dim() < 3:
        return values[:, index]
    rows = torch.arange(index.shape[0], device=index.device).clamp(max=values.shape[0] - 1)
    return values[rows[:, None, None], index]


def states(relation: Relation, sizes: Sizes, inputs: Inputs, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tiles may have a pair, and which have all of theirs and reach over no end: bool [rows, q tiles, kv tiles].

    Work: O(nodes x tiles)."""
    num_q, num_kv = -(-sizes.q_len // block), -(-sizes.kv_len // block)
    first = torch.arange(num_q, device=device)[:, None] * block
    start = torch.arange(num_kv, device=device)[None] * block
    q = first + sizes.q_start, (first + block).clamp(max=sizes.q_len) - 1 + sizes.q_start
    found = verdict(relation, Box(q, (start, (start + block).clamp(max=sizes.kv_len) - 1), TileData(inputs)))
    rows = max([1, *[values.shape[0] for values in inputs.values() if values.dim() == 2]])
    certain, possible = (torch.as_tensor(x, device=device).expand(rows, num_q, num_kv) for x in found)
    return possible, certain & (first + block <= sizes.q_len) & (start + block <= sizes.kv_len)


def listed(lists: Lists, table: Tensor, sizes: Sizes, block: int) -> Tensor:
    """The tiles that lists [rows, num_rows, width] touch, bool [rows, q tiles, kv tiles]. Work: O(blocks + tiles)."""
    num_q, num_kv = -(-sizes.q_len // block), -(-sizes.kv_len // block)
    row = torch.arange(table.shape[1], device=table.device)[:, None]
    first = ((row + lists.first_row) * lists.per - sizes.q_start).clamp(min=0)
    last = ((row + lists.first_row + 1) * lists.per - 1 - sizes.q_start).clamp(max=sizes.q_len - 1)
    start = table.clamp(min=0) * lists.of
    stop = (start + lists.of - 1).clamp(max=sizes.kv_len - 1)
    live = torch.zeros(table.shape[0], num_q * num_kv + 1, dtype=torch.bool, device=table.device)
    is_aligned = sizes.q_start == lists.first_row * lists.per
    for down in range(_most_tiles(lists.per, block, is_aligned=is_aligned)):
        q_tile = torch.minimum(first // block + down, last // block)
        for right in range(_most_tiles(lists.of, block, is_aligned=True)):
            cell = q_tile * num_kv + torch.minimum(start // block + right, stop // block)
            live = live.scatter(1, cell.where(table >= 0, num_q * num_kv).flatten(1), True)
    return live[:, :-1].reshape(-1, num_q, num_kv)


def _most_tiles(size: int, block: int, *, is_aligned: bool) -> int:
    """How many tiles a block of this size can touch. is_aligned: the first one starts with a tile."""
    return 1 if block % size == 0 and is_aligned else (size - 2) // block + 2


def ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles a row has, int32 [rows, 1, q tiles], and their columns first, [rows, 1, q tiles, kv tiles]."""
    tiles = tiles.to(torch.int8).contiguous()  # a kernel reads the lists as if nothing lay between them
    columns = torch.argsort(tiles, dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None]


def told(live: Tensor, full: Tensor) -> Told:
    """The lists of tiles [rows, q tiles, kv tiles]."""
    partial, full = live & ~full, live & full
    return Told(*ordered(partial), *ordered(full), *ordered(partial.mT), *ordered(full.mT))


def read_in(relation: Relation, given: Inputs) -> Inputs:
    """What the relation reads of the inputs."""
    names = inputs_read(relation)
    return {name: values for name, values in given.items() if name in names}


def _tell(relation: Relation, sizes: Sizes, inputs: Inputs, block: int) -> tuple[Tensor, Tensor]:
    return states(relation, sizes, inputs, block, next(iter(inputs.values())).device)


def _tell_listed(
    lists: Lists, rest: Relation, beside: Relation, sizes: Sizes, table: Tensor, inputs: Inputs, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Live and full tiles of what is listed or beside, and which blocks of keys are listed by each row, bool [rows,
    num_rows, blocks + 1]."""
    live = listed(lists, table, sizes, block)
    full = torch.zeros_like(live)
    if is_told(rest):
        possible, certain = states(rest, sizes, inputs, block, table.device)
        live = live & possible
        if lists.per % block == 0 and lists.of % block == 0 and sizes.q_start % block == 0:  # tiles listed as a whole
            full = live & certain
    if beside != NOTHING:
        possible, certain = states(beside, sizes, inputs, block, table.device)
        live, full = live | possible, full | certain
    num_blocks = -(-sizes.kv_len // lists.of)
    bits = torch.zeros(*table.shape[:2], num_blocks + 1, dtype=torch.bool, device=table.device)
    return live, full, bits.scatter(2, table.where(table >= 0, num_blocks), True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled copy of a function; see `flex.compiled_flex` for why each program has its own."""
    copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    found: Callable[..., Any] = torch.compile(copied, dynamic=False, fullgraph=True)
    return found


def teller() -> Callable[..., tuple[Tensor, Tensor]]:
    """(relation, sizes, inputs, block) to the live and the full tiles of a relation; compiled for one program."""
    return compiled(_tell)


def list_teller() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(lists, rest, beside, sizes, table, inputs, block) to the live and the full tiles of lists, and which blocks rows
    list; compiled for one program."""
    return compiled(_tell_listed)
