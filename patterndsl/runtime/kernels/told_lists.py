"""Which work is there over tiles that a call tells? Lists made on the device, in tensors of sizes known before.

What `lists` and `work` do for tiles that stay, of tiles that are only known to the device: nothing waits for it. Where
there are fewer pieces than there is room for, the others do nothing: they leave an empty part where nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.runtime.kernels.shapes import Blocks
from patterndsl.runtime.kernels.work import PARTS, SHORTEST, Work


class States(NamedTuple):
    """Of tiles [rows, heads or 1, q tiles, kv tiles]: whether one may have a pair, and whether it has all of its pairs
    and reaches over no end. most: how many can be live at most; longest: in a row of tiles."""

    live: Tensor
    full: Tensor
    most: int
    longest: int


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

    def rows(self, blocks: Blocks) -> Work:
        """Lists of keys for each block of queries."""
        known = blocks.q_block, blocks.kv_block, False
        if known not in self._made:
            self._made[known] = work_of_states(self.tell(blocks.q_block, blocks.kv_block), self.heads, self.batch)
        return self._made[known]

    def columns(self, blocks: Blocks) -> Work:
        """Lists of queries for each block of keys, through all query heads that share it."""
        known = blocks.q_block, blocks.kv_block, True
        if known not in self._made:
            told = self.tell(blocks.q_block, blocks.kv_block)
            live, full = (self._by_key(x) for x in told[:2])
            most = told.most * (self.kv_group if told.live.shape[1] == 1 else 1)
            turned = States(live, full, most, live.shape[3])
            self._made[known] = work_of_states(turned, self.heads // self.kv_group, self.batch)
        return self._made[known]

    def _by_key(self, states: Tensor) -> Tensor:
        """[rows, heads of keys or 1, kv tiles, heads of a group * q tiles]."""
        rows, heads, num_q, num_kv = states.shape
        if heads == 1:
            return states.mT.repeat(1, 1, 1, self.kv_group)
        grouped = states.view(rows, -1, self.kv_group, num_q, num_kv)
        return grouped.permute(0, 1, 4, 2, 3).flatten(3)


def work_of_states(told: States, heads: int, batch: int) -> Work:
    """The work of a launch over `heads` heads; of states [rows, heads or 1, owners, entries] one row stands for all of
    a batch. Work: O(rows owners entries); memory beside the states: O(most)."""
    rows, some, owners, _ = told.live.shape
    counts = told.live.sum(-1)
    first = counts.flatten().cumsum(0).view_as(counts) - counts
    count, begin = (x.expand(rows, heads, owners).flatten() for x in (counts, first))
    if told.longest <= 2 * SHORTEST:  # none is cut
        pieces = _whole(rows, heads, owners, count.device).clone()
        pieces[:, 3] = begin
        pieces[:, 4] = begin + count
        return Work(pieces, _entries(told), pieces.new_empty(0, 5), 0, rows == 1)
    copies = batch if rows == 1 else 1
    longest = (-(-count.sum() * copies // PARTS)).clamp(min=SHORTEST)
    # slots: a list is cut where it is more than twice as long as a part, so at most half as many lists as parts, each
    # of which has one that is not full
    whole = min(-(-PARTS // copies), told.most * heads // some // SHORTEST)
    most = whole + whole // 2 + 2
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
    joint = torch.arange(1, most // 3 + 1, device=count.device)  # of three parts at least
    found = torch.searchsorted(is_cut.cumsum(0), joint)
    there, owner = found < len(parts), found.clamp(max=len(parts) - 1)
    row, head, block = _placed(owner, heads, owners)
    joints = torch.stack([row, head, block.where(there, owners), first_slot[owner], parts[owner] * there], 1)
    return Work(pieces[order].int(), _entries(told), joints.int(), most + 1, rows == 1)


def _entries(told: States) -> Tensor:
    """int32 [most]: the live ones of all owners, one after the other."""
    place = torch.nonzero_static(told.live.flatten(), size=told.most, fill_value=0).flatten()
    return (2 * (place % told.live.shape[-1]) + ~told.full.flatten()[place]).int()


@lru_cache(maxsize=64)
def _whole(rows: int, heads: int, owners: int, device: torch.device) -> Tensor:
    """Pieces of lists that are not cut, but for where their entries lie."""
    owner = torch.arange(rows * heads * owners, device=device)
    none = torch.zeros_like(owner)
    return torch.stack([*_placed(owner, heads, owners), none, none, none - 1], 1).int()


def _placed(owner: Tensor, heads: int, owners: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, head and block of an owner."""
    return owner // (heads * owners), owner // owners % heads, owner % owners
