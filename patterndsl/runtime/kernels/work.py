"""Which piece of work does each program of a launch have? Lists of tiles, cut where they are long, longest first.

A launch is over all heads and batch rows at once, whatever tiles each of them has. What it knows of no kernel: lists
are of owners (blocks of queries, or of keys where they are transposed) and entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patterndsl.lower.rests import Places, Rests
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.kernels.dealing import classes_of, deal
from patterndsl.runtime.kernels.predicate import WHOLE

SHORTEST = 16
"""Entries that a part of a cut list has at least."""
LONG = 4
"""Times the mean, from which on a list is too long for sharers to wait for each other."""
PARTS = 2048
"""All work is cut as if into so many equal parts: a list of more than two of them is cut. Some sixteen for each
processor of a large GPU, and a constant, so that results are the same on all of them, but for what Hopper's forward
kernel does again."""
STATE_BITS, BLOCK_BITS = 3, 12
"""Of a shared entry: the state of a sharer, and all of them, behind which is the block. 0: nothing is needed, 1: all of
a tile is kept, WHOLE: the predicate is asked, others: the rest that such a tile leaves, see `lower.rests`."""
FULL = 1
MOST_BLOCKS = 1 << (31 - BLOCK_BITS)
OVERHEAD, LEAVING = 1.5, 1.0
"""What a piece costs beside its entries, and a part of a cut list more than that, in entries."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Tiles, and where among some rests that of each is, see `lower.rests`; None where all are asked as a whole."""

    tiles: Tiles
    places: Places | None = None

    def states(self, device: torch.device) -> Tensor:
        """int64 [num_tiles]."""
        is_full = torch.as_tensor(self.tiles.is_full, device=device)
        if self.places is None:
            return torch.where(is_full, FULL, WHOLE)
        return torch.where(is_full, FULL, WHOLE + 1 + torch.as_tensor(self.places, device=device).long())


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The entries of all owners of one head, in order of owners. counts: int64 [num_owners], entries: int32 [sum].

    An owner is a block; or of so many `sharers`, which read its entries together, each with a block of its own. blocks:
    int64 [num_owners], the first of them. is_alone: bool [num_owners], where the sharers have one block and each some
    of the entries.
    """

    counts: Tensor
    entries: Tensor
    blocks: Tensor
    is_alone: Tensor
    sharers: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the programs of a launch do.

    pieces: int32 [num_pieces, 6], or 8 of shared lists, entries: int32, joints: int32 [num_joints, 5], as `forward`
    reads them; num_slots: parts of cut lists, of one batch row where rows share them. is_shared: whether all batch rows
    do the same.
    mean_length: entries of a list, as it was before it was cut. costs: float32 [num_pieces], on the CPU, of pieces that
    are dealt to programs; None where each has a program. rests: what tiles of shared lists leave undecided.
    """

    pieces: Tensor
    entries: Tensor
    joints: Tensor
    num_slots: int
    is_shared: bool
    mean_length: float = 0.0
    costs: Tensor | None = None
    rests: Rests | None = None
    _dealt: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def num_pieces(self) -> int:
        return int(self.pieces.shape[0])

    @property
    def num_joints(self) -> int:
        return int(self.joints.shape[0])

    def dealt(self, rows: int, programs: int) -> tuple[Tensor, Tensor]:
        """The pieces of so many batch rows as programs take them, int32 [num_pieces * rows, 8], and where in these the
        ones of each program begin and the last ones stop, int32 [programs + 1].

        Those of a piece follow each other, each with its batch row, and its slot among those of all rows. Made when it
        is asked for and kept.
        """
        if (rows, programs) not in self._dealt:
            assert self.costs is not None
            borders, order = (x.to(self.pieces.device) for x in deal(self.costs.repeat_interleave(rows), programs))
            pieces, row = self.pieces[order // rows], order % rows
            leaves = pieces[:, 5] >= 0
            pieces[:, 0] += row
            pieces[:, 5] += leaves * row * self.num_slots
            pieces[:, 7] *= leaves
            self._dealt[rows, programs] = pieces, borders.to(torch.int32)
        return self._dealt[rows, programs]


def lists_of(tiles: Tiles, kv_len: int, device: torch.device) -> Lists:
    """Blocks of keys by blocks of queries. A ragged last block of keys is masked, as there is something behind it."""
    q_blks, kv_blks, is_full = _parts(tiles, device)
    if kv_len % tiles.kv_block:
        is_full = is_full & (kv_blks != tiles.num_kv_blocks - 1)
    return _of_blocks(torch.bincount(q_blks, minlength=tiles.num_q_blocks), _entries(kv_blks, is_full))


def shared_lists_of(placed: Placed, kv_len: int, device: torch.device, sharers: int, kv_block: int) -> Lists:
    """The same for blocks of queries that follow each other and share blocks of keys, which may be of several tiles."""
    tiles, states = placed.tiles, placed.states(device)
    q_blks, kv_blks, _ = _parts(tiles, device)
    if kv_len % tiles.kv_block:
        states = torch.where(kv_blks == tiles.num_kv_blocks - 1, states.clamp_min(WHOLE), states)
    sides = (q_blks, tiles.num_q_blocks), (kv_blks, tiles.num_kv_blocks)
    return _shared(*sides, states, sharers, kv_block // tiles.kv_block)


def _shared(
    owned: tuple[Tensor, int], shared: tuple[Tensor, int], states: Tensor, sharers: int, width: int = 1
) -> Lists:
    """Tiles of blocks that are owned and blocks that are shared, of which there are so many, by `width` of the latter.

    An entry is the shared block and the state of each of four sharers, `STATE_BITS` each, the first one's last. A block
    with many more tiles than others has all sharers for itself, which take turns.
    """
    (own_blks, num_own), (other_blks, num_other), device = owned, shared, states.device
    num_groups, num_blocks = -(-num_own // sharers), -(-num_other // width)
    lengths = torch.bincount(own_blks, minlength=num_own)
    long = (lengths > LONG * max(SHORTEST, len(own_blks) // max(1, num_own))).nonzero().flatten()
    owner_of = torch.arange(num_own, device=device) // sharers
    owner_of[long] = num_groups + torch.arange(len(long), device=device)
    num_owners = num_groups + len(long)
    cells, cell = torch.unique(owner_of[own_blks] * num_blocks + other_blks // width, return_inverse=True)
    owners, is_alone = cells // num_blocks, torch.arange(num_owners, device=device) >= num_groups
    counts = torch.bincount(owners, minlength=num_owners)
    turns = torch.arange(len(cells), device=device) - (counts.cumsum(0) - counts)[owners]
    sharer = torch.where(is_alone[owners[cell]], turns[cell], own_blks) % sharers
    # tiles that are one block here are asked as one: those of one state by this, others as a whole
    place = cell * sharers + sharer
    of_states = torch.bincount(place << STATE_BITS | states, minlength=len(cells) * sharers << STATE_BITS)
    most, state = of_states.view(len(cells), sharers, 1 << STATE_BITS).max(2)
    state = torch.where(most == width, state, torch.where(most > 0, WHOLE, 0))
    shifts = STATE_BITS * torch.arange(sharers, device=device)
    entries = (cells % num_blocks << BLOCK_BITS | (state << shifts).sum(1)).to(torch.int32)
    blocks = torch.cat([sharers * torch.arange(num_groups, device=device), long])
    return Lists(counts, entries, blocks, is_alone, sharers)


def _of_blocks(counts: Tensor, entries: Tensor) -> Lists:
    """Lists of all blocks, each for itself."""
    blocks = torch.arange(len(counts), device=counts.device)
    return Lists(counts, entries, blocks, blocks < 0)


def transposed(of_heads: Sequence[Tiles | None], one: Tiles, device: torch.device) -> Lists:
    """Blocks of queries by blocks of keys, through the query heads that share a head of keys, but for those without
    tiles. one: any of the launch, which are of as many blocks. Nothing is masked for being ragged: no row behind the
    last one has weights, and no key there is written."""
    blocks, kv_blks, is_full = _through_heads(of_heads, one, device)
    order = kv_blks.argsort(stable=True)
    entries = _entries(blocks, is_full)[order]
    return _of_blocks(torch.bincount(kv_blks, minlength=one.num_kv_blocks), entries)


def shared_transposed(of_heads: Sequence[Placed | None], one: Placed, device: torch.device, sharers: int) -> Lists:
    """The same for blocks of keys that follow each other and share blocks of queries."""
    blocks, kv_blks, _ = _through_heads(
        [None if placed is None else placed.tiles for placed in of_heads], one.tiles, device
    )
    states = [placed.states(device) for placed in of_heads if placed is not None]
    sides = (kv_blks, one.tiles.num_kv_blocks), (blocks, len(of_heads) * one.tiles.num_q_blocks)
    return _shared(*sides, torch.cat([blocks[:0], *states]), sharers)


def _through_heads(of_heads: Sequence[Tiles | None], one: Tiles, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of queries, counted on from head to head, their blocks of keys, and whether all pairs are kept."""
    with_tiles = [(at, tiles) for at, tiles in enumerate(of_heads) if tiles is not None]
    parts = [_parts(tiles, device) for _, tiles in with_tiles]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    kv_blks = torch.cat([none, *(part[1] for part in parts)])
    blocks = torch.cat(
        [none, *(part[0] + at * one.num_q_blocks for (at, _), part in zip(with_tiles, parts, strict=True))]
    )
    return blocks, kv_blks, torch.cat([none.bool(), *(part[2] for part in parts)])


def _parts(tiles: Tiles, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    q_blks, kv_blks, is_full = (
        torch.as_tensor(part, device=device) for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full)
    )
    return q_blks, kv_blks, is_full


def _entries(blocks: Tensor, is_full: Tensor) -> Tensor:
    return (2 * blocks + ~is_full).to(torch.int32)


def work_of(
    lists: Sequence[tuple[Lists, Sequence[tuple[int, int]]]],
    *,
    is_shared: bool,
    copies: int = 1,
    rests: Rests | None = None,
) -> Work:
    """The work of a launch. lists: with the (batch row, head) that have each; is_shared: all rows do as row 0, and
    there are about `copies` of them."""
    num_entries = sum(len(found.entries) * len(places) for found, places in lists)
    num_lists = sum(len(found.counts) * len(places) for found, places in lists)
    sharers = lists[0][0].sharers if lists else 1  # whose pieces are so many times larger
    longest = max(SHORTEST, copies * num_entries * sharers // PARTS)
    pieces, joints, ordered, num_slots, base = list[Tensor](), list[Tensor](), list[Tensor](), 0, 0
    for found, places in lists:
        cut, cut_joints, slots = _cut(found, longest)
        ordered.append(_fullest_first(found.entries, cut[:, 1], cut[:, 2], sharers) if sharers > 1 else found.entries)
        cut[:, 1:3] += base
        base += len(found.entries)
        for row, head in places:
            pieces.append(_placed(cut, row, head, 3, num_slots))
            joints.append(_placed(cut_joints, row, head, 1, num_slots))
            num_slots += slots
    all_pieces = torch.cat(pieces)
    entries = torch.cat(ordered)
    costs = _costs(all_pieces, entries, sharers)
    order = classes_of(costs).argsort(descending=True, stable=True)
    return Work(
        all_pieces[order].to(torch.int32).contiguous(),
        entries,
        torch.cat(joints).to(torch.int32).contiguous(),
        num_slots,
        is_shared,
        num_entries / max(1, num_lists),
        costs[order].cpu() if sharers > 1 else None,
        rests,
    )


def _costs(pieces: Tensor, entries: Tensor, sharers: int) -> Tensor:
    """float32 [num_pieces]: of the sharer that needs the most entries of a piece, in entries."""
    begin, stop, leaves = pieces[:, 3], pieces[:, 4], pieces[:, 5] >= 0
    needed = stop - begin
    if sharers > 1:
        needs = (states_of(entries, sharers) > 0).int()
        before = torch.cat([needs.new_zeros(1, sharers), needs.cumsum(0)])
        needed = (before[stop] - before[begin]).amax(1)
    return needed + OVERHEAD + LEAVING * leaves


def states_of(entries: Tensor, sharers: int) -> Tensor:
    """[len(entries), sharers]: the state of each sharer of a shared entry."""
    shifts = STATE_BITS * torch.arange(sharers, device=entries.device)
    return (entries[:, None] >> shifts) & ((1 << STATE_BITS) - 1)


def _fullest_first(entries: Tensor, begin: Tensor, stop: Tensor, sharers: int) -> Tensor:
    """With the entry that most sharers keep all of in front of each piece, in its place the one that was there.

    The forward kernel of Hopper counts weights from scores of the first tile, which then has keys for as many rows as
    it can.
    """
    begin, lengths = begin[stop > begin], (stop - begin)[stop > begin]
    piece = torch.repeat_interleave(lengths)  # of each entry, as pieces follow each other
    places = torch.arange(len(entries), device=entries.device)
    value = (states_of(entries, sharers) == FULL).sum(1) * len(entries) + places.flip(0)
    best = len(entries) - 1 - torch.zeros_like(begin).scatter_reduce(0, piece, value, "amax") % len(entries)
    places[begin], places[best] = best, begin
    return entries[places]


def _cut(lists: Lists, longest: int) -> tuple[Tensor, Tensor, int]:
    """Pieces [.., (block, begin, stop, slot; steps of blocks and of slots from sharer to sharer)] of one head's lists,
    joints [.., (block, first slot, slots)], and the number of slots."""
    counts, device, sharers = lists.counts, lists.counts.device, lists.sharers
    parts = torch.where(counts > 2 * longest, -(-counts // longest), 1)
    is_cut = (parts > 1) | lists.is_alone
    slots = torch.where(is_cut, sharers * parts, 0)
    first_slots = slots.cumsum(0) - slots
    owners = torch.arange(len(counts), device=device).repeat_interleave(parts)
    turns = torch.arange(len(owners), device=device) - (parts.cumsum(0) - parts)[owners]
    starts, mine = (counts.cumsum(0) - counts)[owners], parts[owners]
    begin, stop = (starts + counts[owners] * turn // mine for turn in (turns, turns + 1))
    # parts of a block lie next to each other, whoever of the sharers leaves them
    is_alone = lists.is_alone[owners]
    slot = torch.where(is_cut[owners], first_slots[owners] + turns * torch.where(is_alone, sharers, 1), -1)
    steps = (~is_alone).long(), torch.where(is_alone, 1, mine)
    pieces = torch.stack([lists.blocks[owners], begin, stop, slot, *(steps if sharers > 1 else ())], 1)
    together, alone = ((is_cut & which).nonzero().flatten() for which in (~lists.is_alone, lists.is_alone))
    joints = [
        torch.stack([lists.blocks[together] + at, first_slots[together] + at * parts[together], parts[together]], 1)
        for at in range(sharers)
    ]
    of_many = torch.cat(joints)
    of_many = of_many[~torch.isin(of_many[:, 0], lists.blocks[alone])]
    of_one = torch.stack([lists.blocks[alone], first_slots[alone], slots[alone]], 1)
    return pieces, torch.cat([of_many, of_one]), int(slots.sum())


def _placed(items: Tensor, row: int, head: int, slot_at: int, first_slot: int) -> Tensor:
    """The items of one batch row and head, with these in front and slots counted on."""
    where = torch.tensor([[row, head]], device=items.device).expand(len(items), 2)
    moved = items.clone()
    moved[:, slot_at] += first_slot * (items[:, slot_at] >= 0)
    return torch.cat([where, moved], 1)
