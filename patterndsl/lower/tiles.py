"""Which tiles of a pattern are live, and which of them are full? Three-valued interval descent.

The predicate is evaluated on whole boxes: all, none or some. None is pruned, all is full, some is split, level by level
and vectorised, down to the tile; a tile that is still undecided is looked into until both a kept and a dropped pair
are seen or every pair is accounted for. The result is exact, and the work follows the live tiles and not N^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from patterndsl.diagnostics import error
from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Array, Lookup
from patterndsl.sema.bind import Sizes

OnEvent: TypeAlias = Callable[[str, int, int], None]
"""Called as (what, done, total) while something takes long."""

MAX_TILES = 1 << 27
"""Lists of more tiles (some 2 GB) are refused."""
CHUNK = 1 << 16
"""Boxes evaluated at once: the working set stays in the cache, and memory beside the result stays small."""
PARTS = 1 << 16
"""Of the side of a tile: points in it are counted in these."""
FEW = 256
"""Tiles, of many, that are looked into first where they may be too hard."""
NUM_SCATTERED = 24
"""Points of an undecided tile that are looked at one by one before it is searched."""
SCATTER = (0.7548776662466927, 0.5698402909980532)
"""Steps of the points, as shares of a side: multiples of these fill a square evenly (the R2 sequence, Roberts 2018)."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Live tiles of one head: cells of q_block queries (from q_start on) by kv_block keys, ordered by (q_blk, kv_blk).

    q_blks, kv_blks: int64 [num_tiles]; is_full: bool [num_tiles], true where every pair of actual positions is kept
    (a ragged last tile is full when all that exists of it is). num_visited counts the boxes that were looked at,
    num_guessed the tiles that `effort` left undecided: they stand here as live and partial.
    """

    q_block: int
    kv_block: int
    num_q_blocks: int
    num_kv_blocks: int
    q_blks: Array
    kv_blks: Array
    is_full: Array
    num_visited: int
    num_guessed: int = 0

    @property
    def num_tiles(self) -> int:
        return int(self.q_blks.shape[0])


def find_tiles(
    relation: Relation,
    sizes: Sizes,
    lookup: Lookup,
    q_block: int,
    kv_block: int,
    *,
    tell_full: bool = True,
    effort: int | None = None,
    each: int | None = None,
    on_event: OnEvent | None = None,
) -> Tiles:
    """The live tiles of a bound relation.

    tell_full: False spares the work of telling full from partial tiles (is_full is then only a lower bound).
    effort: at most about this many boxes are spent on undecided tiles, and what is still undecided then counts as a
    live, partial tile; None decides everything exactly. each: where undecided tiles take more boxes than this, on
    average, it is given up, and TooHard raised.
    """
    descent = _Descent(relation, sizes, lookup, q_block, kv_block, tell_full, effort, each, on_event)
    return descent.run()


class TooHard(Exception):
    """What is asked of tiles is not seen of boxes, and would be asked pair by pair."""


def _ceildiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass
class _Descent:
    relation: Relation
    sizes: Sizes
    lookup: Lookup
    q_block: int
    kv_block: int
    tell_full: bool
    effort: int | None
    each: int | None
    on_event: OnEvent | None
    visited: int = 0
    settled: int = 0
    total: int = 0
    listed: int = 0
    guessed: int = 0
    found: list[tuple[Array, Array, Array]] = field(default_factory=list)  # q_blks, kv_blks, is_full

    def run(self) -> Tiles:
        sizes, xp = self.sizes, self.lookup.xp
        num_q_blocks, num_kv_blocks = (
            _ceildiv(sizes.q_len, self.q_block),
            _ceildiv(sizes.kv_len, self.kv_block),
        )
        if num_q_blocks and num_kv_blocks:
            self.descend(num_q_blocks, num_kv_blocks)
        empty = self.lookup.integers(0, 0)
        parts = self.found or [(empty, empty, empty > 0)]
        q_blks, kv_blks, is_full = (xp.concat([part[at] for part in parts]) for at in range(3))
        order = xp.argsort(q_blks * max(1, num_kv_blocks) + kv_blks, stable=True)
        return Tiles(
            self.q_block,
            self.kv_block,
            num_q_blocks,
            num_kv_blocks,
            q_blks[order],
            kv_blks[order],
            is_full[order],
            self.visited,
            self.guessed,
        )

    # ---- from the whole plane down to tiles -----------------------------------------------------------------

    def descend(self, num_q_blocks: int, num_kv_blocks: int) -> None:
        """Depth first over chunks of boxes of 2^q_level x 2^k_level tiles, so that memory stays bounded."""
        zero = self.lookup.integers(0, 1)
        q_level, k_level = (num_q_blocks - 1).bit_length(), (num_kv_blocks - 1).bit_length()
        self.total = 1 << (q_level + k_level)
        stack = [(zero, zero, q_level, k_level)]
        while stack:
            q_at, k_at, q_level, k_level = stack.pop()
            if q_at.shape[0] > CHUNK:
                stack += [(q_at[at], k_at[at], q_level, k_level) for at in _halves(q_at.shape[0])]
                continue
            q_size, k_size = self.q_block << q_level, self.kv_block << k_level
            certain, possible = self.verdict(*self.edges(q_at, k_at, q_size, k_size))
            self.add_full(q_at[certain], k_at[certain], q_level, k_level, num_q_blocks, num_kv_blocks)
            popped = q_at.shape[0] << (q_level + k_level)
            rest = possible & ~certain
            q_at, k_at = q_at[rest], k_at[rest]
            if q_level == k_level == 0 or not q_at.shape[0]:
                self.decide(q_at, k_at)
                self.report(popped)
                continue
            # halve the longer side first, so that boxes become square in tokens
            halve_q = q_level > 0 and (q_size >= k_size or k_level == 0)
            halve_k = k_level > 0 and (k_size >= q_size or q_level == 0)
            q_level, k_level = q_level - halve_q, k_level - halve_k
            q_at, k_at = self.split(q_at, k_at, halve_q, halve_k)
            inside = (q_at < _ceildiv(num_q_blocks, 1 << q_level)) & (k_at < _ceildiv(num_kv_blocks, 1 << k_level))
            q_at, k_at = q_at[inside], k_at[inside]
            self.report(popped - (q_at.shape[0] << (q_level + k_level)))
            stack.append((q_at, k_at, q_level, k_level))

    def report(self, settled: int) -> None:
        """Progress in tiles of the plane that are settled, one by one or many at once."""
        self.settled += settled
        if self.on_event is not None:
            self.on_event("finding tiles", self.settled, self.total)

    def split(self, q_at: Array, k_at: Array, halve_q: bool, halve_k: bool) -> tuple[Array, Array]:
        xp = self.lookup.xp
        if halve_q:
            q_at, k_at = xp.concat((q_at * 2, q_at * 2 + 1)), xp.concat((k_at, k_at))
        if halve_k:
            q_at, k_at = xp.concat((q_at, q_at)), xp.concat((k_at * 2, k_at * 2 + 1))
        return q_at, k_at

    def edges(self, q_at: Array, k_at: Array, q_size: int, k_size: int) -> tuple[Array, Array, Array, Array]:
        """Inclusive absolute bounds of boxes, cut to the positions that exist."""
        sizes = self.sizes
        q_low, k_low = q_at * q_size + sizes.q_start, k_at * k_size
        q_high = (q_low + (q_size - 1)).clip(max=sizes.q_start + sizes.q_len - 1)
        return q_low, q_high, k_low, (k_low + (k_size - 1)).clip(max=sizes.kv_len - 1)

    def verdict(self, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> tuple[Array, Array]:
        self.visited += int(q_low.shape[0])
        certain, possible = verdict(self.relation, Box((q_low, q_high), (k_low, k_high), self.lookup))
        return self.spread(certain, q_low), self.spread(possible, q_low)

    def spread(self, truths: Any, like: Array) -> Array:
        if isinstance(truths, bool):
            return self.lookup.xp.full(like.shape, truths, dtype=self.lookup.xp.bool, device=self.lookup.device)
        return self.lookup.xp.broadcast_to(truths, like.shape)

    def add_full(
        self, q_at: Array, k_at: Array, q_level: int, k_level: int, num_q_blocks: int, num_kv_blocks: int
    ) -> None:
        """Every tile of boxes that are full."""
        if not q_at.shape[0]:
            return
        self.listed += q_at.shape[0] << (q_level + k_level)
        if self.listed > 2 * MAX_TILES:  # boxes at the border reach over it, by less than twice
            raise error(
                "E504",
                f"more than {MAX_TILES:,} tiles of {self.q_block} x {self.kv_block} are live",
                None,
                "ask for larger blocks; gather_indices() lists single keys, block_mask() lists blocks",
            )
        xp = self.lookup.xp
        q_inside, k_inside = self.lookup.integers(0, 1 << q_level), self.lookup.integers(0, 1 << k_level)
        shape = (q_at.shape[0], 1 << q_level, 1 << k_level)
        q_blks = xp.broadcast_to((q_at * (1 << q_level))[:, None, None] + q_inside[:, None], shape)
        kv_blks = xp.broadcast_to((k_at * (1 << k_level))[:, None, None] + k_inside, shape)
        q_blks, kv_blks = xp.reshape(q_blks, (-1,)), xp.reshape(kv_blks, (-1,))
        if q_level or k_level:
            inside = (q_blks < num_q_blocks) & (kv_blks < num_kv_blocks)
            q_blks, kv_blks = q_blks[inside], kv_blks[inside]
        self.found.append((q_blks, kv_blks, q_blks >= 0))

    # ---- inside undecided tiles -----------------------------------------------------------------------------

    def decide(self, q_blks: Array, kv_blks: Array) -> None:
        """Adds the tiles of these that are live, partial or full. Whether all are too hard, a few of them say first."""
        number = int(q_blks.shape[0])
        if not number:
            return
        if self.each is not None and number > 2 * FEW:
            few = slice(None, None, number // FEW)
            self.decided(q_blks[few], kv_blks[few])
        kept, dropped = self.decided(q_blks, kv_blks)
        self.found.append((q_blks[kept], kv_blks[kept], self.lookup.xp.logical_not(dropped)[kept]))

    def decided(self, q_blks: Array, kv_blks: Array) -> tuple[Array, Array]:
        """Looks into tiles until each is known to be empty, partial or full: whether some pair of it is kept, and
        whether some is dropped."""
        q_low, q_high, k_low, k_high = self.edges(q_blks, kv_blks, self.q_block, self.kv_block)
        kept, dropped = self.corners(q_low, q_high, k_low, k_high)
        if not self.tell_full:
            dropped = dropped | True
        boxes = (self.lookup.integers(0, int(q_blks.shape[0])), q_low, q_high, k_low, k_high)
        boxes = self.sample(boxes, kept, dropped)
        stack = [boxes]
        spent = 0
        while stack:
            tile, q_low, q_high, k_low, k_high = stack.pop()
            undecided = ~(kept & dropped)[tile]
            tile, *edges = (part[undecided] for part in (tile, q_low, q_high, k_low, k_high))
            if tile.shape[0] > CHUNK:
                stack += [tuple(part[at] for part in (tile, *edges)) for at in _halves(tile.shape[0])]
                continue
            if not tile.shape[0]:
                continue
            if self.effort is not None and spent > self.effort:
                self.guessed += int(self.lookup.xp.unique_values(tile).shape[0])
                kept[tile], dropped[tile] = True, True
                continue
            spent += 4 * int(tile.shape[0])
            if self.each is not None and spent > self.each * int(q_blks.shape[0]):
                raise TooHard
            tile, *edges = self.quarters(tile, *edges)
            certain, possible = self.verdict(*edges)
            kept[tile[certain]] = True
            dropped[tile[~possible]] = True
            rest = possible & ~certain
            tile, *edges = (part[rest] for part in (tile, *edges))
            sampled = self.points(edges[0], edges[2])
            kept[tile[sampled]] = True
            dropped[tile[~sampled]] = True
            stack.append((tile, *edges))
        return kept, dropped

    def corners(self, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> tuple[Array, Array]:
        """Whether some corner is kept, whether some is dropped: enough to decide most partial tiles."""
        corners = [self.points(q, k) for q in (q_low, q_high) for k in (k_low, k_high)]
        some = corners[0] | corners[1] | corners[2] | corners[3]
        every = corners[0] & corners[1] & corners[2] & corners[3]
        return some, ~every

    def sample(self, boxes: tuple[Array, ...], kept: Array, dropped: Array) -> tuple[Array, ...]:
        """The boxes that scattered points leave open; what these show is written down in kept and dropped. Residues are
        what corners miss: they lie a power of two apart."""
        for number in range(1, NUM_SCATTERED + 1):
            tile = boxes[0]
            is_open = ~(kept & dropped)[tile]
            tile, q_low, q_high, k_low, k_high = boxes = tuple(part[is_open] for part in boxes)
            if not tile.shape[0]:
                break
            at = [int(PARTS * (number * step % 1.0)) for step in SCATTER]
            q = q_low + (q_high - q_low + 1) * at[0] // PARTS
            sampled = self.points(q, k_low + (k_high - k_low + 1) * at[1] // PARTS)
            kept[tile[sampled]] = True
            dropped[tile[~sampled]] = True
        return boxes

    def points(self, q: Array, k: Array) -> Array:
        return self.spread(member(self.relation, Point(q, k, 0, self.lookup)), q)

    def quarters(self, tile: Array, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> tuple[Array, ...]:
        """Each box cut in the middle of both sides; a side of one position is not cut."""
        xp = self.lookup.xp
        q_middle, k_middle = (q_low + q_high) // 2, (k_low + k_high) // 2
        quarters = [
            (tile, *q_side, *k_side)
            for q_side in ((q_low, q_middle), (q_middle + 1, q_high))
            for k_side in ((k_low, k_middle), (k_middle + 1, k_high))
        ]
        parts = tuple(xp.concat([quarter[at] for quarter in quarters]) for at in range(5))
        inside = (parts[1] <= parts[2]) & (parts[3] <= parts[4])
        return tuple(part[inside] for part in parts)


def _halves(length: int) -> tuple[slice, slice]:
    return slice(0, length // 2), slice(length // 2, None)
