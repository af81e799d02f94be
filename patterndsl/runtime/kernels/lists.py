"""Whose tiles does each piece of work have? Those of batch rows and heads, put into lists for each size of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch

from patterndsl.ir.relation import Relation
from patterndsl.lower.blocks import ROWS, Blocks, Length, Pipeline
from patterndsl.lower.rests import Rests, rests_of
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.kernels.work import (
    Lists,
    Placed,
    Work,
    lists_of,
    shared_lists_of,
    shared_transposed,
    transposed,
    work_of,
)
from patterndsl.sema.parameters import Sizes

Found: TypeAlias = Sequence[Sequence[Tiles]]
"""Tiles of each batch row, or of one for all: those of heads or of groups of heads."""


SQUARE = Blocks(ROWS, ROWS, 4, 1)
LONG = 32
"""Square tiles of a list, from which on it is long."""
NOBODY = -1
"""The place of tiles of a head that has none."""


@dataclass(frozen=True, eq=False)
class WorkLists:
    """The work over some tiles, made when it is asked for and kept.

    find: the tiles of so many queries by so many keys. group_of: for each head the place of its tiles, in every batch
    row, or NOBODY. kv_group: query heads that share a head of keys. copies: about how many batch rows share one row's
    tiles. is_kept: whether they serve further calls. relations: of each group, where the tiles are of positions and
    nothing else decides them; sizes: of these.
    """

    find: Callable[[int, int], Found]
    group_of: Sequence[int]
    kv_group: int
    kv_len: int
    device: torch.device
    copies: int = 1
    is_kept: bool = True
    relations: Sequence[Relation] = ()
    sizes: Sizes | None = None
    _made: dict[tuple[object, ...], Work] = field(default_factory=dict)

    def rows(self, blocks: Blocks | Pipeline) -> Work:
        """Lists of keys for each block of queries, or for each group of blocks that read keys together."""
        if isinstance(blocks, Blocks):
            return self._kept(blocks, "rows", lambda: self._rows(lists_of, self._found(blocks)))
        lists = partial(shared_lists_of, sharers=blocks.consumers, kv_block=blocks.kv_block)
        return self._kept(blocks, "shared", lambda: self._rows(lists, *self._squares))

    @cached_property
    def length(self) -> Length:
        """Of the lists of keys by square tiles, on average."""
        return "long" if self.rows(SQUARE).mean_length > LONG else "short"

    def columns(self, blocks: Blocks | Pipeline) -> Work:
        """Lists of queries for each block of keys, or for each group of blocks that read queries together."""
        if isinstance(blocks, Blocks):
            return self._kept(blocks, "columns", lambda: self._columns(transposed, self._found(blocks)))
        assert blocks.kv_block == ROWS, "heads may be of any number of square tiles"
        lists = partial(shared_transposed, sharers=blocks.consumers)
        return self._kept(blocks, "shared columns", lambda: self._columns(lists, *self._squares))

    def columns_of(self, blocks: Blocks, turn: int) -> Work:
        """The same through one query head of each group alone, the `turn`-th. Heads of keys that have none are in the
        lists all the same, where another turn has some."""
        return self._kept(blocks, turn, lambda: self._columns(transposed, self._found(blocks), turn=turn))

    def _kept(self, blocks: Blocks | Pipeline, kind: object, make: Callable[[], Work]) -> Work:
        known = blocks.q_block, blocks.kv_block, kind
        if known not in self._made:
            self._made[known] = make()
        return self._made[known]

    def _found(self, blocks: Blocks) -> Found:
        tile = blocks.q_block, blocks.kv_block
        return self._found_squares if tile == (ROWS, ROWS) else self.find(*tile)

    @cached_property
    def _found_squares(self) -> Found:
        return self.find(ROWS, ROWS)

    @cached_property
    def _squares(self) -> tuple[Sequence[Sequence[Placed]], Rests | None]:
        """Square tiles, as `_found` has them, and the rests that they leave."""
        found = self._found_squares
        if not self.relations or self.sizes is None:
            return [[Placed(tiles) for tiles in groups] for groups in found], None
        rests = rests_of(list(zip(self.relations, found[0], strict=True)), self.sizes)
        return [[Placed(*each) for each in zip(found[0], rests.places, strict=True)]], rests

    def _rows(
        self,
        lists_of_tiles: Callable[[Any, int, torch.device], Lists],
        found: Sequence[Sequence[Any]],
        rests: Rests | None = None,
    ) -> Work:
        lists = list[tuple[Lists, Sequence[tuple[int, int]]]]()
        for row, groups in enumerate(found):
            for at, tiles in enumerate(groups):
                places = [(row, head) for head, group in enumerate(self.group_of) if group == at]
                lists.append((lists_of_tiles(tiles, self.kv_len, self.device), places))
        return work_of(lists, is_shared=len(found) == 1, copies=self.copies, rests=rests)

    def _columns(
        self,
        lists_of_tiles: Callable[..., Lists],
        found: Sequence[Sequence[Any]],
        rests: Rests | None = None,
        *,
        turn: int | None = None,
    ) -> Work:
        """Heads of keys whose query heads have the same tiles, each in its turn, share lists. turn: the only one."""
        heads_of = dict[tuple[int, ...], list[int]]()
        for kv_head in range(len(self.group_of) // self.kv_group):
            mine = tuple(self.group_of[kv_head * self.kv_group : (kv_head + 1) * self.kv_group])
            if any(group != NOBODY for group in mine):
                heads_of.setdefault(mine, []).append(kv_head)
        lists = list[tuple[Lists, Sequence[tuple[int, int]]]]()
        for row, groups in enumerate(found):
            for mine, heads in heads_of.items():
                of_heads = [
                    None if group == NOBODY or turn not in (None, at) else groups[group]
                    for at, group in enumerate(mine)
                ]
                of_tiles = lists_of_tiles(of_heads, groups[0], self.device)
                lists.append((of_tiles, [(row, head) for head in heads]))
        return work_of(lists, is_shared=len(found) == 1, copies=self.copies, rests=rests)
