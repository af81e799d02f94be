"""Which piece of work does each program of a launch have? Lists of tiles, cut where they are long, longest first.

A launch is over all heads and batch rows at once, whatever tiles each of them has. What it knows of no kernel: lists
are of owners (blocks of queries, or of keys where they are transposed) and entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterndsl.lower.tiles import Tiles

SHORTEST = 16
"""Entries that a part of a cut list has at least."""
PARTS = 2048
"""All work is cut as if into so many equal parts: a list of more than two of them is cut. Some sixteen for each
processor of a large GPU, and a constant, so that results are the same on all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The entries of all owners of one head, in order of owners. counts: int64 [num_owners], entries: int32 [sum]."""

    counts: Tensor
    entries: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the programs of a launch do.

    pieces: int32 [num_pieces, 6], entries: int32, joints: int32 [num_joints, 5], as `forward` reads them; num_slots:
    parts of cut lists, of one batch row where rows share them. is_shared: whether all batch rows do the same.
    """

    pieces: Tensor
    entries: Tensor
    joints: Tensor
    num_slots: int
    is_shared: bool

    @property
    def num_pieces(self) -> int:
        return int(self.pieces.shape[0])

    @property
    def num_joints(self) -> int:
        return int(self.joints.shape[0])


def lists_of(tiles: Tiles, kv_len: int, device: torch.device) -> Lists:
    """Blocks of keys by blocks of queries. A ragged last block of keys is masked, as there is something behind it."""
    q_blks, kv_blks, is_full = _parts(tiles, device)
    if kv_len % tiles.kv_block:
        is_full = is_full & (kv_blks != tiles.num_kv_blocks - 1)
    return Lists(torch.bincount(q_blks, minlength=tiles.num_q_blocks), _entries(kv_blks, is_full))


def transposed(of_heads: Sequence[Tiles | None], one: Tiles, device: torch.device) -> Lists:
    """Blocks of queries by blocks of keys, through the query heads that share a head of keys, but for those without
    tiles. one: any of the launch, which are of as many blocks. Nothing is masked for being ragged: no row behind the
    last one has weights, and no key there is written."""
    with_tiles = [(at, tiles) for at, tiles in enumerate(of_heads) if tiles is not None]
    parts = [_parts(tiles, device) for _, tiles in with_tiles]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    kv_blks = torch.cat([none, *(part[1] for part in parts)])
    blocks = torch.cat(
        [none, *(part[0] + at * one.num_q_blocks for (at, _), part in zip(with_tiles, parts, strict=True))]
    )
    order = kv_blks.argsort(stable=True)
    entries = _entries(blocks, torch.cat([none.bool(), *(part[2] for part in parts)]))[order]
    return Lists(torch.bincount(kv_blks, minlength=one.num_kv_blocks), entries)


def _parts(tiles: Tiles, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    q_blks, kv_blks, is_full = (
        torch.as_tensor(part, device=device) for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full)
    )
    return q_blks, kv_blks, is_full


def _entries(blocks: Tensor, is_full: Tensor) -> Tensor:
    return (2 * blocks + ~is_full).to(torch.int32)


def work_of(lists: Sequence[tuple[Lists, Sequence[tuple[int, int]]]], *, is_shared: bool, copies: int = 1) -> Work:
    """The work of a launch. lists: with the (batch row, head) that have each; is_shared: all rows do as row 0, and
    there are about `copies` of them."""
    total = copies * sum(len(found.entries) * len(places) for found, places in lists)
    longest = max(SHORTEST, total // PARTS)
    pieces, joints, num_slots, base = list[Tensor](), list[Tensor](), 0, 0
    for found, places in lists:
        cut, cut_joints, slots = _cut(found.counts, longest)
        cut[:, 1:3] += base
        base += len(found.entries)
        for row, head in places:
            pieces.append(_placed(cut, row, head, 3, num_slots))
            joints.append(_placed(cut_joints, row, head, 1, num_slots))
            num_slots += slots
    all_pieces = torch.cat(pieces)
    lengths = all_pieces[:, 4] - all_pieces[:, 3]
    # by powers of two, so that pieces of about one length stay in order: neighbours read the same keys
    order = (lengths + 1).log2().ceil().argsort(descending=True, stable=True)
    return Work(
        all_pieces[order].to(torch.int32).contiguous(),
        torch.cat([found.entries for found, _ in lists]),
        torch.cat(joints).to(torch.int32).contiguous(),
        num_slots,
        is_shared,
    )


def _cut(counts: Tensor, longest: int) -> tuple[Tensor, Tensor, int]:
    """Pieces [.., (owner, begin, stop, slot)] of one head's lists, joints [.., (owner, first slot, slots)], and the
    number of slots."""
    parts = torch.where(counts > 2 * longest, -(-counts // longest), 1)
    owners = torch.arange(len(counts), device=counts.device).repeat_interleave(parts)
    turns = torch.arange(len(owners), device=counts.device) - (parts.cumsum(0) - parts)[owners]
    starts = (counts.cumsum(0) - counts)[owners]
    begin, stop = (starts + counts[owners] * turn // parts[owners] for turn in (turns, turns + 1))
    is_cut = parts[owners] > 1
    slots = torch.where(is_cut, is_cut.cumsum(0) - 1, -1)
    joined = (parts > 1).nonzero().flatten()
    num_parts = parts[joined]
    joints = torch.stack([joined, num_parts.cumsum(0) - num_parts, num_parts], 1)
    return torch.stack([owners, begin, stop, slots], 1), joints, int(is_cut.sum())


def _placed(items: Tensor, row: int, head: int, slot_at: int, first_slot: int) -> Tensor:
    """The items of one batch row and head, with these in front and slots counted on."""
    where = torch.tensor([[row, head]], device=items.device).expand(len(items), 2)
    moved = items.clone()
    moved[:, slot_at] += first_slot * (items[:, slot_at] >= 0)
    return torch.cat([where, moved], 1)
