"""Which tiles of a pattern live, and what is made of them? Block masks, gather indices, groups that share a list.

Those of a pattern without inputs are found once and kept; those of a pattern that reads inputs are found for the inputs
of each call, on their device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.diagnostics import input_error
from patterndsl.ir.relation import Relation
from patterndsl.lower.gather import gather_tiles
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import OnEvent, Tiles, find_tiles
from patterndsl.runtime import flex
from patterndsl.runtime.data import DeviceData, Inputs, device_data
from patterndsl.runtime.gathered import Group
from patterndsl.runtime.groups import groups_of_row, lookups_of_heads, lookups_of_rows
from patterndsl.runtime.heads import folded, has_heads, num_rows_of
from patterndsl.sema.bind import Bound

MAX_GATHERED = 1 << 28


class GatherIndices(NamedTuple):
    """Keys per query block: indices int64 [heads or 1, num_q_blocks, width], ascending, padded with -1, the exact
    union over the block's rows; counts int64 [heads or 1, num_q_blocks]. Batched inputs put a batch dimension first."""

    indices: Tensor
    counts: Tensor


class Tilings:
    """The tiles of a pattern on a device. given: checked inputs, of a call or none."""

    def __init__(self, bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device
        self._tiles = dict[tuple[int, int], tuple[Tiles, ...]]()
        self._block_masks = dict[int, BlockMask]()

    def of(self, blocks: tuple[int, int], given: Inputs, on_event: OnEvent | None = None) -> list[tuple[Tiles, ...]]:
        """The live tiles per batch row and head group; each head is a group where inputs differ so."""
        if has_heads(given):
            relation_of = {head: group.relation for group in self.bound.groups for head in group.heads}
            return [
                tuple(self._found(blocks, relation_of[head], lookup) for head, lookup in enumerate(row))
                for row in lookups_of_heads(given, self.bound.num_heads)
            ]
        if given:
            return [self._of_groups(blocks, lookup, on_event) for lookup in lookups_of_rows(given)]
        if blocks not in self._tiles:
            self._tiles[blocks] = self._of_groups(blocks, self.lookup, on_event)
        return [self._tiles[blocks]]

    def _of_groups(
        self, blocks: tuple[int, int], lookup: Lookup, on_event: OnEvent | None = None, *, tell_full: bool = True
    ) -> tuple[Tiles, ...]:
        groups = self.bound.groups
        return tuple(self._found(blocks, group.relation, lookup, on_event, tell_full=tell_full) for group in groups)

    def _found(
        self,
        blocks: tuple[int, int],
        relation: Relation,
        lookup: Lookup,
        on_event: OnEvent | None = None,
        *,
        tell_full: bool = True,
    ) -> Tiles:
        return find_tiles(relation, self.bound.sizes, lookup, *blocks, tell_full=tell_full, on_event=on_event)

    @cached_property
    def lookup(self) -> Lookup:
        """Of patterns without inputs; it keeps what was drawn."""
        return Lookup()

    def data(self, given: Inputs) -> DeviceData:
        """What membership looks up."""
        return (
            device_data(self.bound.relation, self.bound.num_heads, given, self.device) if given else self._static_data
        )

    @cached_property
    def _static_data(self) -> DeviceData:
        return device_data(self.bound.relation, self.bound.num_heads, {}, self.device)

    # ---- as FlexAttention takes them

    def block_mask(self, block: int, given: Inputs) -> BlockMask:
        """See `Program.block_mask`."""
        if not given and block in self._block_masks:
            return self._block_masks[block]
        sizes = self.bound.sizes
        tiles = self.of((block, block), given)
        if not tiles:
            raise input_error("E505", "a block mask of a batch without rows", "use backend='gathered', or give a row")
        some = tiles[0][0]
        by_head = has_heads(given)
        flat = folded(given, range(self.bound.num_heads), len(tiles)) if by_head else given
        mask = flex.block_mask(
            [self._per_head(row) for row in tiles],
            (block, block),
            (some.num_q_blocks, some.num_kv_blocks),
            (sizes.q_len, sizes.kv_len),
            flex.mask_mod(self.bound, self.data(flat), by_head=by_head),
        )
        if not given:
            self._block_masks[block] = mask
        return mask

    def _per_head(self, groups: tuple[Tiles, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The tiles of each head, or of one head where all agree."""
        on_device = [tuple(self._tensor(part) for part in (t.q_blks, t.kv_blks, t.is_full)) for t in groups]
        heads = range(len(groups)) if len(groups) in (1, self.bound.num_heads) else self._group_of_heads
        return [(on_device[at][0], on_device[at][1], on_device[at][2]) for at in heads]

    @cached_property
    def _group_of_heads(self) -> list[int]:
        group_of = {head: at for at, group in enumerate(self.bound.groups) for head in group.heads}
        return [group_of[head] for head in range(self.bound.num_heads)]

    # ---- key by key

    def gather_indices(self, q_block: int, given: Inputs) -> GatherIndices:
        """See `Program.gather_indices`."""
        blocks = q_block, 1
        if has_heads(given):
            rows = self.of(blocks, given)
        else:
            lookups = lookups_of_rows(given) if given else [self.lookup]
            rows = [self._of_groups(blocks, lookup, tell_full=False) for lookup in lookups]
        per_row = [[(self._tensor(tiles.q_blks), self._tensor(tiles.kv_blks)) for tiles in row] for row in rows]
        num_q_blocks = -(-self.bound.sizes.q_len // q_block)
        counts = torch.stack(
            [torch.stack([torch.bincount(q, minlength=num_q_blocks) for q, _ in groups]) for groups in per_row]
        )
        width = int(counts.max()) if counts.numel() else 0
        if counts.numel() * width > MAX_GATHERED:
            message = f"{counts.numel() * width:,} gather indices are above the limit of {MAX_GATHERED:,}"
            raise input_error("E504", message, "use block_mask(), whose cost follows tiles and not keys")
        indices = torch.full((*counts.shape, width), -1, device=self.device)
        starts = counts.cumsum(-1) - counts
        for row, groups in enumerate(per_row):
            for group, (q_blks, keys) in enumerate(groups):
                place = torch.arange(len(keys), device=self.device) - starts[row, group, q_blks]
                indices[row, group, q_blks, place] = keys
        if len(self.bound.groups) > 1 and not has_heads(given):
            indices, counts = indices[:, self._group_of_heads], counts[:, self._group_of_heads]
        if num_rows_of(given) is None:
            indices, counts = indices[0], counts[0]
        return GatherIndices(indices, counts)

    def _tensor(self, array: object) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    # ---- as the gathered backend takes them

    def groups(self, given: Inputs) -> tuple[Group, ...]:
        """Batch rows and heads that share tiles."""
        return tuple(self._groups(given)) if given else self._static_groups

    @cached_property
    def _static_groups(self) -> tuple[Group, ...]:
        return tuple(groups_of_row(self.bound, self.to_gather, {}, None, self.device))

    def _groups(self, given: Inputs) -> Iterator[Group]:
        lookups = lookups_of_rows(given)
        for row, lookup in enumerate(lookups):
            tiles = self._to_gather(lookup)
            yield from groups_of_row(self.bound, tiles, given, row if len(lookups) > 1 else None, self.device)

    @cached_property
    def to_gather(self) -> tuple[Tiles, ...]:
        """The tiles of each head group that keys are gathered by, of a pattern without inputs; a plan's file has
        them."""
        return self._to_gather(self.lookup)

    def _to_gather(self, lookup: Lookup) -> tuple[Tiles, ...]:
        return tuple(gather_tiles(group.relation, self.bound.sizes, lookup) for group in self.bound.groups)
