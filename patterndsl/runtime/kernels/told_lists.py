"""Which work is there over tiles that a call tells? Lists made on the device, in tensors of sizes known before.

What `lists` and `work` do for tiles that stay, of tiles that are only known to the device: nothing waits for it. Where
there are fewer pieces than there is room for, the others do nothing: they leave an empty part where nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.lower.blocks import Blocks, Pipeline
from patterndsl.runtime.kernels.work import PARTS, SHORTEST, Work


class Extent(NamedTuple):
    """Of tiles [rows, some, num_q, num_kv], of which some is the number of heads, or 1 where these agree. most: how
    many can be live at most; longest: in a row of tiles."""

    rows: int
    some: int
    num_q: int
    num_kv: int
    most: int
    longest: int


class States(NamedTuple):
    """Of tiles as `extent` says: whether one may have a pair, and whether it has all of its pairs and reaches over no
    end."""

    live: Tensor
    full: Tensor
    extent: Extent


class Turned(NamedTuple):
    """How lists are read of states: `some` lists for each row, of `owners` owners with `width` entries each, in turns
    of `inner`. by_key: whether owners are blocks of keys. most, longest: entries of all lists, and of one, at most."""

    rows: int
    some: int
    owners: int
    width: int
    inner: int
    by_key: bool
    most: int
    longest: int

    @staticmethod
    def by_query(told: Extent) -> Turned:
        """Keys of each block of queries."""
        return Turned(told.rows, told.some, told.num_q, told.num_kv, told.num_kv, False, told.most, told.longest)

    @staticmethod
    def of_keys(told: Extent, kv_group: int) -> Turned:
        """Queries of each block of keys, through so many heads that share it."""
        some, most, width = told.some // kv_group, told.most, kv_group * told.num_q
        if told.some == 1:
            some, most = 1, told.most * kv_group
        return Turned(told.rows, some, told.num_kv, width, told.num_q, True, most, width)

    @property
    def turns(self) -> int:
        """Heads of which a list has entries."""
        return self.width // max(1, self.inner)

    def of(self, states: Tensor) -> Tensor:
        """bool [rows, some, owners, width] of states [rows, heads or 1, q tiles, kv tiles]."""
        if not self.by_key:
            return states
        rows, heads, num_q, num_kv = states.shape
        by_turn = states.view(rows, self.some, heads // self.some, num_q, num_kv)
        return by_turn.expand(-1, -1, self.turns, -1, -1).flatten(2, 3).mT


class Room(NamedTuple):
    """For how many parts of lists that are cut there is room, and for how many such lists; none where none is cut.
    parts, shortest: see `work`."""

    slots: int
    joints: int
    parts: int
    shortest: int


def room_of(turned: Turned, heads: int, copies: int) -> Room:
    """A list is cut where it is more than twice as long as a part, so at most half as many lists as parts, each of
    which has one that is not full."""
    if turned.longest <= 2 * SHORTEST:
        return Room(0, 0, PARTS, SHORTEST)
    whole = min(-(-PARTS // copies), turned.most * heads // turned.some // SHORTEST)
    slots = whole + whole // 2 + 2
    return Room(slots, slots // 3, PARTS, SHORTEST)


@dataclass(frozen=True, slots=True, eq=False)
class ToldLists:
    """The work over the tiles of a call, as `WorkLists` has it; made when it is asked for and kept.

    make: (blocks, by_key) to the lists over tiles of so many queries by so many keys: of keys for each block of
    queries, or the other way round. kv_group: heads of queries that share one of keys.
    """

    make: Callable[..., Work]
    kv_group: int
    _made: dict[tuple[tuple[int, int], bool], Work] = field(default_factory=dict)

    def rows(self, blocks: Blocks | Pipeline) -> Work:
        """Lists of keys for each block of queries."""
        return self._kept(blocks, by_key=False)

    def columns(self, blocks: Blocks | Pipeline) -> Work:
        """Lists of queries for each block of keys, through all query heads that share it."""
        return self._kept(blocks, by_key=True)

    def _kept(self, blocks: Blocks | Pipeline, *, by_key: bool) -> Work:
        assert isinstance(blocks, Blocks), "such lists are for Triton's kernels"
        tile = blocks.q_block, blocks.kv_block
        if (tile, by_key) not in self._made:
            self._made[tile, by_key] = self.make(tile, by_key=by_key)
        return self._made[tile, by_key]


def has_list_kernels(device: torch.device) -> bool:
    """Whether tiles are told and listed by kernels: PyTorch's steps take longer than what they do."""
    return device.type == "cuda"


def work_of_states(told: States, turned: Turned, heads: int, batch: int) -> Work:
    """The work of a launch over `heads` heads, of which one row stands for all of a batch: what kernels are compared
    with. Work: O(lists owners entries); memory beside the states: O(most)."""
    live, full = turned.of(told.live), turned.of(told.full)
    rows, _, owners, _ = live.shape
    counts = live.sum(-1)
    first = counts.flatten().cumsum(0).view_as(counts) - counts
    count, begin = (x.expand(rows, heads, owners).flatten() for x in (counts, first))
    copies = batch if rows == 1 else 1
    most, num_joints, num_parts, shortest = room_of(turned, heads, copies)
    if not most:  # none is cut
        owner = torch.arange(len(count), device=count.device)
        pieces = torch.stack([*_placed(owner, heads, owners), begin, begin + count, owner * 0 - 1], 1).int()
        return Work(pieces, _entries(live, full, turned), pieces.new_empty(0, 5), 0, rows == 1)
    longest = (-(-count.sum() * copies // num_parts)).clamp(min=shortest)
    parts = torch.where(count > 2 * longest, -(-count // longest), 1)
    is_cut = parts > 1
    slots = parts * is_cut
    first_slot = slots.cumsum(0) - slots

    # pieces
    ends = parts.cumsum(0)
    piece = torch.arange(len(parts) + most, device=count.device)
    found = torch.searchsorted(ends, piece, right=True)
    there = found < len(parts)
    owner = found.clamp(max=len(parts) - 1)
    turn, of = piece - (ends - parts)[owner], parts[owner]
    start, stop = (begin[owner] + count[owner] * at // of for at in (turn, turn + 1))
    slot = torch.where(is_cut[owner], first_slot[owner] + turn, -1)
    lengths = (stop - start) * there
    start, slot = start.where(there, 0), slot.where(there, most)
    pieces = torch.stack([*_placed(owner, heads, owners), start, start + lengths, slot], 1)
    # by powers of two, so that pieces of about one length stay in order: neighbours read the same keys
    order = (lengths + 1).log2().ceil().argsort(descending=True, stable=True)

    # joints: those that there are not are of a block behind the last
    joint = torch.arange(1, num_joints + 1, device=count.device)
    found = torch.searchsorted(is_cut.cumsum(0), joint)
    there, owner = found < len(parts), found.clamp(max=len(parts) - 1)
    row, head, block = _placed(owner, heads, owners)
    joints = torch.stack([row, head, block.where(there, owners), first_slot[owner], parts[owner] * there], 1)
    return Work(pieces[order].int(), _entries(live, full, turned), joints.int(), most + 1, rows == 1)


def _entries(live: Tensor, full: Tensor, turned: Turned) -> Tensor:
    """int32 [most]: the live ones of all owners, one after the other."""
    place = torch.nonzero_static(live.flatten(), size=turned.most, fill_value=0).flatten()
    return (2 * (place % turned.width) + ~full.flatten()[place]).int()


def _placed(owner: Tensor, heads: int, owners: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and block of an owner."""
    return owner // (heads * owners), owner // owners % heads, owner % owners
