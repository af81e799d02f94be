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


class States(NamedTuple):
    """Of tiles [rows, heads or 1, q tiles, kv tiles]: whether one may have a pair, and whether it has all of its pairs
    and reaches over no end. most: how many can be live at most; longest: in a row of tiles."""

    live: Tensor
    full: Tensor
    most: int
    longest: int


class Turned(NamedTuple):
    """How lists are read of states: `some` lists for each row, of `owners` owners with `width` entries each, in groups
    of `inner`. strides: of a list, an owner, an entry and a group. most, longest: entries of all lists, and of one, at
    most."""

    rows: int
    some: int
    owners: int
    width: int
    inner: int
    strides: tuple[int, int, int, int]
    most: int
    longest: int

    @staticmethod
    def by_query(told: States) -> Turned:
        """Keys of each block of queries."""
        rows, some, num_q, num_kv = told.live.shape
        strides = (num_q * num_kv, num_kv, 1, 0)
        return Turned(rows, some, num_q, num_kv, num_kv, strides, told.most, told.longest)

    @staticmethod
    def by_key(told: States, kv_group: int) -> Turned:
        """Queries of each block of keys, through so many heads that share it."""
        rows, heads, num_q, num_kv = told.live.shape
        size, width = num_q * num_kv, kv_group * num_q
        if heads == 1:
            return Turned(rows, 1, num_kv, width, num_q, (size, 1, num_kv, 0), told.most * kv_group, width)
        strides = (kv_group * size, 1, num_kv, size)
        return Turned(rows, heads // kv_group, num_kv, width, num_q, strides, told.most, width)

    def of(self, states: Tensor) -> Tensor:
        """bool [rows, some, owners, width] of states."""
        of_list, of_owner, of_entry, of_group = self.strides
        size = (self.rows * self.some, self.owners, self.width // max(1, self.inner), self.inner)
        seen = states.contiguous().as_strided(size, (of_list, of_owner, of_group, of_entry))
        return seen.reshape(self.rows, self.some, self.owners, self.width)


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

    tell: the states of tiles of so many queries by so many keys; rows: one where all batch rows agree. batch, heads: of
    the queries, of which kv_group share a head of keys.
    """

    tell: Callable[[int, int], States]
    batch: int
    heads: int
    kv_group: int
    _made: dict[tuple[int, int, bool], Work] = field(default_factory=dict)

    def rows(self, blocks: Blocks | Pipeline) -> Work:
        """Lists of keys for each block of queries."""
        assert isinstance(blocks, Blocks), "such lists are for Triton's kernels"
        known = blocks.q_block, blocks.kv_block, False
        if known not in self._made:
            told = self.tell(blocks.q_block, blocks.kv_block)
            self._made[known] = _work(told, Turned.by_query(told), self.heads, self.batch)
        return self._made[known]

    def columns(self, blocks: Blocks) -> Work:
        """Lists of queries for each block of keys, through all query heads that share it."""
        known = blocks.q_block, blocks.kv_block, True
        if known not in self._made:
            told = self.tell(blocks.q_block, blocks.kv_block)
            turned = Turned.by_key(told, self.kv_group)
            self._made[known] = _work(told, turned, self.heads // self.kv_group, self.batch)
        return self._made[known]


def _work(told: States, turned: Turned, heads: int, batch: int) -> Work:
    if has_list_kernels(told.live.device):
        from patterndsl.runtime.kernels.told_kernels import work_of

        return work_of(told, turned, heads, batch)
    return work_of_states(told, turned, heads, batch)


def has_list_kernels(device: torch.device) -> bool:
    """Whether lists are made by kernels: PyTorch's steps take longer than what they do."""
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
