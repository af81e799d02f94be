"""Which tiles are live in a call? Told on the device for all tiles at once, by intervals.

What FlexAttention's create_block_mask asks of every pair, this asks of every tile: a tile that no pair can be in is
left out, and one that has all of its pairs is not masked. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.device.graphs import on_device
from patterndsl.ir.index import Facet
from patterndsl.ir.interval import Box, Interval, Verdict, verdict
from patterndsl.ir.relation import NOTHING, And, Listed, Or, Random, Relation, inputs_read, looks_nothing_up
from patterndsl.lower.hulls import Lists, hull_of
from patterndsl.lower.listings import Listing
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
    """Bounds of inputs over ranges of positions, with a dimension for batch rows first. inputs: [rows, length] or
    [length]. grids: of all queries' tiles, and of all keys'. listings: of tables that are asked; whole: whether no tile
    reaches over the end of a listed block."""

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        grids: tuple[Grid, ...] = (),
        listings: Mapping[str, Listing] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.inputs = {name: values[None] if values.dim() == 1 else values for name, values in inputs.items()}
        self.grids, self.listings, self.whole = grids, listings or {}, whole
        self._levels: dict[tuple[str, Facet], list[tuple[Tensor, Tensor]]] = {}

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        """See `ir.interval.BoxData`."""
        length = self.inputs[name].shape[1]
        for grid in self.grids:
            is_position = index[0] is grid.edges[0] and index[1] is grid.edges[1]  # as most are
            if is_position and grid.stop <= length:
                return grid.bounds(facet_of(self.inputs[name], facet))
        levels = self._of(name, facet)
        low, high = (on_device(end, levels[0][0].device) for end in index)
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

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        """See `ir.interval.BoxData`: where a tile is of several rows or blocks, by the number of blocks listed above
        and before each."""
        given = self.inputs[node.name]
        table = given.view(len(given), -1, self.listings[node.name].width)
        bits = _bits(table, self.listings[node.name].num_blocks)
        (first, last), (start, stop) = row, key
        if self.whole:
            found = bits[:, first, start]
            return found, found
        above = pad(bits.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))
        of_rows = (above[:, last + 1] - above[:, first]).squeeze(2)  # [.., q tiles, blocks]
        before = pad(of_rows.cumsum(2, dtype=torch.int32), (1, 0))
        number = (before[:, :, stop + 1] - before[:, :, start]).squeeze(2)
        return torch.eq(number, (last - first + 1) * (stop - start + 1)), number > 0

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


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The tiles of queries or of keys: `block` positions each of start..stop. edges: their first and last positions,
    along dimension `along` of two."""

    start: int
    stop: int
    block: int
    along: int
    edges: Interval

    @staticmethod
    def of(start: int, length: int, block: int, along: int, device: torch.device) -> Grid:
        """All tiles of so many positions."""
        first = torch.arange(start, start + length, block, device=device).unsqueeze(1 - along)
        return Grid(start, start + length, block, along, (first, (first + (block - 1)).clamp(max=start + length - 1)))

    @property
    def is_whole(self) -> Tensor:
        """Which tiles have all their positions."""
        return torch.eq(self.edges[1] - self.edges[0], self.block - 1)

    def bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest of values [rows, length] in each tile."""
        values = values[:, self.start : self.stop]
        short = -values.shape[1] % self.block
        if short:
            values = torch.cat((values, values[:, -1:].expand(-1, short)), 1)
        of_tiles = values.reshape(len(values), -1, self.block)
        return of_tiles.amin(2).unsqueeze(2 - self.along), of_tiles.amax(2).unsqueeze(2 - self.along)


def states(
    relation: Relation,
    sizes: Sizes,
    inputs: Inputs,
    blocks: tuple[int, int],
    device: torch.device,
    listings: Mapping[str, Listing] | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tiles of so many queries and keys may have a pair, and which have all of theirs and reach over no end: bool
    [rows, q tiles, kv tiles]. listings: of the tables that the relation asks.

    Work: O(nodes x tiles), and for each table its rows x all blocks."""
    q = Grid.of(sizes.q_start, sizes.q_len, blocks[0], 0, device)
    k = Grid.of(0, sizes.kv_len, blocks[1], 1, device)
    whole = all(listing.holds_tiles(blocks, sizes.q_start) for listing in (listings or {}).values())
    found = verdict(relation, Box(q.edges, k.edges, TileData(inputs, (q, k), listings, whole=whole)))
    rows = max([1, *[values.shape[0] for values in inputs.values() if values.dim() == 2]])
    shape = (rows, -(-sizes.q_len // blocks[0]), -(-sizes.kv_len // blocks[1]))
    certain, possible = (on_device(x, device).expand(shape) for x in found)
    return possible, certain & q.is_whole & k.is_whole


class Most(NamedTuple):
    """How many tiles can be live at most, whatever is given: of all of a batch row, and of a row of tiles."""

    in_all: int
    in_row: int


def most_live(relation: Relation, sizes: Sizes, blocks: tuple[int, int], listings: Mapping[str, Listing]) -> Most:
    """Of what `states` finds. On the host, O(nodes x tiles)."""
    live, _ = states(hull_of(relation, None), sizes, {}, blocks, torch.device("cpu"))
    bounds = [Most(int(live.sum()), int(live.sum(2).max()))]
    match relation:
        case And(terms):
            asked = [term for term in terms if isinstance(term, Listed | Or)]
            bounds += [most_live(term, sizes, blocks, listings) for term in asked]
        case Or(terms):
            found = [most_live(term, sizes, blocks, listings) for term in terms]
            bounds.append(Most(sum(most.in_all for most in found), sum(most.in_row for most in found)))
        case Listed(name):
            bounds.append(_most_listed(listings[name], sizes, blocks))
    return Most(min(most.in_all for most in bounds), min(most.in_row for most in bounds))


def _most_listed(listing: Listing, sizes: Sizes, blocks: tuple[int, int]) -> Most:
    """By how many tiles a listed block touches, and how many lists a row of tiles."""
    sides = (listing.per, blocks[0]), (listing.of, blocks[1]), (blocks[0], listing.per)
    down, across, lists = (-(-size // other) + 1 for size, other in sides)
    if listing.holds_tiles(blocks, sizes.q_start):
        down, across, lists = listing.per // blocks[0], listing.of // blocks[1], 1
    num_rows = -(-(sizes.q_start + sizes.q_len) // listing.per) - listing.first_row
    return Most(num_rows * listing.width * down * across, lists * listing.width * across)


def _bits(table: Tensor, num_blocks: int) -> Tensor:
    """Which blocks each row of a table [rows, num_rows, width] lists, bool [rows, num_rows, num_blocks + 1], of which
    the last says nothing."""
    bits = torch.zeros(*table.shape[:2], num_blocks + 1, dtype=torch.bool, device=table.device)
    return bits.scatter(2, table.where((table >= 0) & (table < num_blocks), num_blocks), True)


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
    return states(relation, sizes, inputs, (block, block), next(iter(inputs.values())).device)


def _tell_listed(
    lists: Lists, rest: Relation, beside: Relation, sizes: Sizes, table: Tensor, inputs: Inputs, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Live and full tiles of what is listed or beside, and which blocks of keys are listed by each row, bool [rows,
    num_rows, blocks + 1]."""
    name, num_blocks = lists.names[0], -(-sizes.kv_len // lists.of)
    listing = Listing(lists.width, num_blocks, lists.of, lists.per, lists.first_row)
    of_lists = {name: table.flatten(1)}
    live, full = states(listing.asked(name), sizes, of_lists, (block, block), table.device, {name: listing})
    if looks_nothing_up(rest):
        possible, certain = states(rest, sizes, inputs, (block, block), table.device)
        live, full = live & possible, full & certain
    else:
        full = torch.zeros_like(live)
    if beside != NOTHING:
        possible, certain = states(beside, sizes, inputs, (block, block), table.device)
        live, full = live | possible, full | certain
    return live, full, _bits(table, num_blocks)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled copy of a function; see `flex.compiled_flex` for why each program has its own."""
    copied = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    found: Callable[..., Any] = torch.compile(copied, dynamic=False, fullgraph=True)
    return found


def teller() -> Callable[..., tuple[Tensor, Tensor]]:
    """(relation, sizes, inputs, block) to the live and the full tiles of a relation; compiled for one program, as one
    of FlexAttention is."""
    return compiled(_tell)


def list_teller() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(lists, rest, beside, sizes, table, inputs, block) to the live and the full tiles of lists, and which blocks rows
    list; compiled for one program."""
    return compiled(_tell_listed)
