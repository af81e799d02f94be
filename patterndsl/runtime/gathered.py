"""How does block-sparse attention run in plain PyTorch? Gather the live blocks of keys, then small dense matmuls.

It runs wherever PyTorch does and trains: the backward pass recomputes the scores instead of storing them. Query blocks
are worked through in chunks that fit the cache, in memory that all chunks share; a long list of keys is cut into
segments whose results are merged. Powers are of 2, which are faster than those of e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import gcd, log
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.lower.segments import length_ranges, list_limit
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.finite import is_finite
from patterndsl.runtime.function import Run, attended
from patterndsl.runtime.merge import merge, wide
from patterndsl.runtime.scratch import Scratch

LN2 = log(2)
MAX_SCORES = 1 << 19
"""Scores computed at once (2 MB in float32): small enough to stay in the cache from one operation to the next."""
Keep: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""May query row q attend key k? int64 tensors that broadcast, to bool."""

MAX_KEYS = 512
"""Keys of a product of matrices: those of longer lists are parts of a batch, which each stay in the cache of a core."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Live tiles by query block: those of block i are kv_blks[offsets[i] : offsets[i + 1]].

    offsets: int64 [num_q_blocks + 1]; kv_blks: int64 [num_tiles], ascending in a row; is_full: bool [num_tiles], true
    where every pair of actual positions is kept.
    """

    q_block: int
    kv_block: int
    offsets: Tensor
    kv_blks: Tensor
    is_full: Tensor

    @cached_property
    def segments(self) -> tuple[_Segment, ...]:
        """How they are worked through; found once."""
        return tuple(_segments(self))

    @cached_property
    def has_every_row(self) -> bool:
        """Whether each query block has a tile."""
        return bool(self.offsets.diff().all())

    def masks(self, kv_len: int) -> bool:
        """Whether some of the pairs that are computed are masked."""
        return not all(segment.is_sure(self.kv_block, kv_len) for segment in self.segments)


def block_lists(tiles: Tiles, device: torch.device) -> BlockLists:
    """The tiles of one head as lists on a device."""
    q_blks, kv_blks, is_full = (
        torch.as_tensor(part, device=device) for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full)
    )
    offsets = torch.zeros(tiles.num_q_blocks + 1, dtype=torch.int64, device=device)
    offsets[1:] = torch.bincount(q_blks, minlength=tiles.num_q_blocks).cumsum(0)
    return BlockLists(tiles.q_block, tiles.kv_block, offsets, kv_blks, is_full)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Batch rows and query heads (None: all) that share one pattern.

    keep(q, k): may local query row q attend key k; int64 tensors that broadcast, to bool.
    """

    rows: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    lists: BlockLists
    keep: Keep


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the kept pairs, differentiable in both results.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], Hq a multiple of Hkv; the groups partition
    batch rows x heads. Returns out [B, Hq, Tq, Dv] in the inputs' dtype and lse [B, Hq, Tq] in float32 (float64 for
    float64). An empty row yields 0 and -inf. Computes in float32 at least; work O(live tiles x D), memory beyond
    inputs, outputs and gradients O(MAX_SCORES). Deterministic on the CPU; on CUDA gradients of key and value add in
    no fixed order.
    """
    return attended(query, key, value, run_of(groups, scale))


def run_of(groups: Sequence[Group], scale: float) -> Run:
    """One call of it."""
    how: dict[str, Any] = {"groups": groups, "scale": scale}
    return Run("gathered", partial(_forward_groups, **how), partial(gradients, **how))


def forward(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, keep: Keep, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, Dv] and lse [B, H, Tq] of one pattern for all rows and heads, without gradients.

    query: [B, H, Tq, D], key: [B, H, Tk, D], value: [B, H, Tk, Dv]. Computes in float32 at least.
    """
    return _forward_group(_Selection(None, None, None, 1), Group(None, None, lists, keep), query, key, value, scale)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    lists: BlockLists,
    keep: Keep,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value where `forward` was one of several passes.

    lse: [B, H, Tq] of all passes together; delta: [B, H, Tq], the sum of grad_out times their merged output.
    """
    grads = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value))
    saved = (query, key, value, grad_out, lse, delta)
    selection = _Selection(None, None, None, 1)
    _backward_group(selection, Group(None, None, lists, keep), saved, scale, (grads[0], grads[1], grads[2]))
    return grads[0], grads[1], grads[2]


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """Query blocks with as many kv blocks each: q_blks [n], kv_blks [n, width], is_full and exists [n, width].

    is_first: no segment before has these query blocks; first_q_blk: of query blocks that follow each other, else None;
    full_to: the key block behind the last one if all tiles are full, else None. alike: so many query blocks, one after
    the other, have the same kv blocks, and are taken as one; first_kv_blk: of kv blocks that follow each other and are
    those of all, else None.
    """

    q_blks: Tensor
    kv_blks: Tensor
    is_full: Tensor
    exists: Tensor
    is_first: bool
    first_q_blk: int | None
    full_to: int | None
    alike: int
    first_kv_blk: int | None

    @staticmethod
    def of(
        q_blks: Tensor, kv_blks: Tensor, is_full: Tensor, exists: Tensor, is_first: bool, most_alike: int
    ) -> _Segment:
        """most_alike: query blocks that may be taken as one."""
        changes = (kv_blks[1:] != kv_blks[:-1]).any(1).nonzero()[:, 0] + 1
        alike = gcd(q_blks.shape[0], *changes.tolist())
        alike = max(number for number in range(1, min(alike, most_alike) + 1) if alike % number == 0)
        return _Segment(
            q_blks,
            kv_blks,
            is_full,
            exists,
            is_first,
            int(q_blks[0]) if bool((q_blks.diff() == 1).all()) else None,
            int(kv_blks.max()) + 1 if bool(is_full.all()) else None,
            alike,
            int(kv_blks[0, 0]) if not changes.numel() and bool((kv_blks[0].diff() == 1).all()) else None,
        )

    def is_sure(self, kv_block: int, kv_len: int) -> bool:
        """Whether every pair is kept: the padding behind the last key belongs to none."""
        return self.full_to is not None and self.full_to * kv_block <= kv_len

    def places(self, at: slice) -> slice | Tensor:
        """Query blocks `at`, as an index."""
        first = self.first_q_blk
        return self.q_blks[at] if first is None else slice(first + at.start, first + at.stop)


def _segments(lists: BlockLists) -> Iterator[_Segment]:
    """The lists cut to `MAX_SEGMENT` keys, those of similar length together, padded to the longest.

    A query block has at most one piece in each wave, so a wave merges into distinct rows.
    """
    width_limit = list_limit(lists.kv_block)
    starts, counts = lists.offsets[:-1], lists.offsets.diff()
    wave = 0
    while True:
        left = (counts - wave * width_limit).clamp(0, width_limit)
        for low, high in length_ranges(left.bincount().tolist(), lists.q_block * lists.kv_block):
            q_blks = ((left > low) & (left <= high)).nonzero()[:, 0]
            width = int(left[q_blks].max())
            slot = torch.arange(width, device=left.device)
            exists = slot < left[q_blks, None]
            place = torch.where(exists, starts[q_blks, None] + wave * width_limit + slot, 0)
            kv_blks, is_full = lists.kv_blks[place].long() * exists, lists.is_full[place] & exists
            most_alike = max(1, MAX_SCORES // (lists.q_block * width * lists.kv_block))
            yield _Segment.of(q_blks, kv_blks, is_full, exists, wave == 0, most_alike)
        if not left.any():
            return
        wave += 1


@dataclass(frozen=True, slots=True, eq=False)
class _Blocked:
    """One group's tensors by block. query: [R, num_q_blocks, G * q_block, D], key and value: [R, num_kv_blocks,
    kv_block, D]; R runs over batch rows and key heads, G over the query heads of a key head."""

    query: Tensor
    key: Tensor
    value: Tensor
    num_rows: int
    num_kv_heads: int
    kv_group: int


def _by_block(x: Tensor, block: int) -> Tensor:
    """[B, H, T, D] to [B * H, ceil(T / block), block, D], zeros behind T."""
    short = -x.shape[2] % block
    x = pad(x, (0, 0, 0, short)) if short else x
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2] // block, block, x.shape[3])


def _query_by_block(x: Tensor, block: int, kv_group: int) -> Tensor:
    """[B, Hkv * G, T, D] to [B * Hkv, num_q_blocks, G * block, D]."""
    blocks = _by_block(x, block)  # [B * Hkv * G, nq, block, D]
    if kv_group == 1:
        return blocks
    rows, num_q_blocks, dim = blocks.shape[0] // kv_group, blocks.shape[1], blocks.shape[3]
    return (
        blocks.reshape(rows, kv_group, num_q_blocks, block, dim)
        .transpose(1, 2)
        .reshape(rows, num_q_blocks, kv_group * block, dim)
    )


def _query_from_blocks(blocks: Tensor, blocked: _Blocked, kv_group: int, length: int) -> Tensor:
    """The inverse of `_query_by_block`: [B * Hkv, num_q_blocks, G * block, ...] to [B, Hkv * G, length, ...]."""
    rows, num_q_blocks, tall, *rest = blocks.shape
    block = tall // kv_group
    x = blocks.reshape(rows, num_q_blocks, kv_group, block, *rest).transpose(1, 2)
    return x.reshape(blocked.num_rows, blocked.num_kv_heads * kv_group, num_q_blocks * block, *rest)[:, :, :length]


@dataclass(frozen=True, slots=True)
class _Selection:
    """Which rows and heads a group takes out of the batch, and how its query heads share key heads."""

    rows: Tensor | None
    q_heads: Tensor | None
    kv_heads: Tensor | None
    kv_group: int

    @staticmethod
    def of(group: Group, num_q_heads: int, num_kv_heads: int, device: torch.device) -> _Selection:
        kv_group = num_q_heads // num_kv_heads
        rows = None if group.rows is None else torch.tensor(group.rows, device=device)
        if group.heads is None or group.heads == tuple(range(num_q_heads)):
            return _Selection(rows, None, None, kv_group)
        # heads that do not fill whole key heads each take their own copy of their key head
        q_heads = torch.tensor(group.heads, device=device)
        return _Selection(rows, q_heads, q_heads // kv_group, 1)

    def take(self, x: Tensor, heads: Tensor | None) -> Tensor:
        x = x if self.rows is None else x.index_select(0, self.rows)
        return x if heads is None else x.index_select(1, heads)

    def put(self, into: Tensor, x: Tensor) -> None:
        """Writes the group's part of a query-shaped tensor."""
        rows = torch.arange(into.shape[0], device=into.device) if self.rows is None else self.rows
        if self.rows is None and self.q_heads is None:
            into.copy_(x)
        elif self.q_heads is None:
            into[rows] = x.to(into.dtype)
        else:
            into[rows[:, None], self.q_heads] = x.to(into.dtype)

    def add(self, into: Tensor, x: Tensor) -> None:
        """Adds the group's part of a key-shaped gradient; key heads may repeat."""
        if self.kv_heads is not None:
            spread = x.new_zeros(x.shape[0], into.shape[1], *x.shape[2:])
            x = spread.index_add_(1, self.kv_heads, x)
        if self.rows is None:
            into.add_(x)
        else:
            into.index_add_(0, self.rows, x)


def _blocked(selection: _Selection, lists: BlockLists, query: Tensor, key: Tensor, value: Tensor) -> _Blocked:
    q = selection.take(query, selection.q_heads)
    k, v = selection.take(key, selection.kv_heads), selection.take(value, selection.kv_heads)
    return _Blocked(
        _query_by_block(q, lists.q_block, selection.kv_group),
        _by_block(k, lists.kv_block),
        _by_block(v, lists.kv_block),
        q.shape[0],
        k.shape[1],
        selection.kv_group,
    )


def _chunks(segment: _Segment, num_rows: int, tall: int, kv_block: int) -> Iterator[tuple[slice, list[slice]]]:
    """Query blocks of the segment, and rows of R to take with these one after the other, such that at most MAX_SCORES
    scores are computed at once."""
    per_block, num_blocks, alike = tall * segment.kv_blks.shape[1] * kv_block, segment.q_blks.shape[0], segment.alike
    blocks_at_once = max(alike, min(num_blocks, MAX_SCORES // per_block // alike * alike))
    rows_at_once = max(1, min(num_rows, MAX_SCORES // (per_block * blocks_at_once)))
    rows = [slice(row, min(row + rows_at_once, num_rows)) for row in range(0, num_rows, rows_at_once)]
    for block in range(0, num_blocks, blocks_at_once):
        yield slice(block, min(block + blocks_at_once, num_blocks)), rows


def _kept(segment: _Segment, at: slice, group: Group, q_len: int, kv_len: int) -> Tensor | None:
    """bool [n, 1, q_block, width * kv_block]; None where everything is kept. Only partial tiles are asked."""
    lists = group.lists
    if segment.is_sure(lists.kv_block, kv_len):
        return None
    is_full, q_blks, kv_blks = segment.is_full[at], segment.q_blks[at], segment.kv_blks[at]
    # the padding behind the last key belongs to no pair, so a full tile that reaches over it is masked too
    inside = (kv_blks + 1) * lists.kv_block <= kv_len
    sure = is_full & inside
    if bool(sure.all()):
        return None
    n, width = kv_blks.shape
    kept = sure[:, None, :, None].expand(n, lists.q_block, width, lists.kv_block).contiguous()
    item, slot = (segment.exists[at] & ~sure).nonzero(as_tuple=True)
    q = q_blks[item, None, None] * lists.q_block + torch.arange(lists.q_block, device=q_blks.device)[:, None]
    k = kv_blks[item, slot][:, None, None] * lists.kv_block + torch.arange(lists.kv_block, device=q_blks.device)
    asked = group.keep(q.clamp(max=max(0, q_len - 1)), k.clamp(max=max(0, kv_len - 1)))
    kept[item, :, slot] = (asked & (k < kv_len)).expand(item.shape[0], lists.q_block, lists.kv_block)
    return kept.view(n, 1, lists.q_block, width * lists.kv_block)


def _scores(q: Tensor, k: Tensor, kept: Tensor | None, kv_group: int, scale: float, made: Scratch) -> Tensor:
    """[items, alike * G * q_block, keys] for powers of 2; pairs that are not kept get -inf."""
    scores = made("scores", q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(scores, q, k.mT, beta=0, alpha=scale / LN2, out=scores)
    if kept is not None:
        by_head = scores.view(-1, kept.shape[0], kv_group, kept.shape[2], scores.shape[2])
        by_head.masked_fill_(~kept, -torch.inf)
    return scores


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """What is computed at once: query blocks `at` of a segment, of some rows of R. An item is as many query blocks of a
    row as are alike."""

    segment: _Segment
    at: slice
    rows: slice

    @property
    def places(self) -> slice | Tensor:
        """The query blocks, as an index."""
        return self.segment.places(self.at)

    @property
    def kv_blks(self) -> Tensor:
        """int64 [items of a row, width]."""
        return self.segment.kv_blks[self.at][:: self.segment.alike]

    def of_queries(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """[items, alike * tall, ...] of [R, num_q_blocks, tall, ...]; a view where that can be."""
        return self.by_item(blocks[self.rows, self.places]).to(dtype)

    def by_item(self, x: Tensor) -> Tensor:
        """[items, alike * tall, ...] of [rows, query blocks, tall, ...]."""
        alike = self.segment.alike
        return x.reshape(x.shape[0] * x.shape[1] // alike, alike * x.shape[2], *x.shape[3:])

    def by_block(self, x: Tensor, tall: int) -> Tensor:
        """The inverse: [rows, query blocks, tall, ...]."""
        return x.reshape(self.rows.stop - self.rows.start, self.at.stop - self.at.start, tall, *x.shape[2:])

    def of_keys(self, name: str, blocks: Tensor, made: Scratch) -> Tensor:
        """[items, width * kv_block, D] of [R, num_kv_blocks, kv_block, D]; a view where that can be."""
        kv_blks, num_blocks, first = self.kv_blks, blocks.shape[1], self.segment.first_kv_blk
        num_items, width = kv_blks.shape
        if first is not None and num_items == 1:
            return blocks[self.rows, first : first + width].flatten(1, 2).to(made.dtype)
        places = kv_blks.flatten()
        if blocks.shape[0] > 1:
            rows = torch.arange(self.rows.start, self.rows.stop, device=places.device) * num_blocks
            places = (rows[:, None] + places).flatten()
        flat = blocks.reshape(-1, blocks.shape[2] * blocks.shape[3])
        into = made(name, places.shape[0], flat.shape[1])
        if blocks.dtype == made.dtype:
            torch.index_select(flat, 0, places, out=into)
        else:
            into.copy_(flat.index_select(0, places))
        return into.view(places.shape[0] // width, width * blocks.shape[2], blocks.shape[3])

    def into(self, blocks: Tensor) -> Tensor | None:
        """[items, alike * tall, ...] of new memory [R, num_q_blocks, tall, ...], to write into; None where no view has
        that form."""
        is_view = isinstance(self.places, slice) and self.rows.stop - self.rows.start == 1
        return self.by_item(blocks[self.rows, self.places]) if is_view else None

    def put(self, into: Tensor, x: Tensor) -> None:
        """Writes [items, alike * tall, ...] where it belongs in [R, num_q_blocks, tall, ...]."""
        into[self.rows, self.places] = self.by_block(x, into.shape[2])

    def add_to_queries(self, into: Tensor, x: Tensor) -> None:
        """Adds the same there."""
        into[self.rows, self.places] += self.by_block(x, into.shape[2])

    def add_to_keys(self, into: Tensor, x: Tensor) -> None:
        """Adds [items, width * kv_block, D] to the listed blocks of [R, num_kv_blocks, kv_block, D]; a block may be
        listed many times."""
        places, mine = self.kv_blks.flatten(), into[self.rows]
        mine.index_add_(1, places, x.view(mine.shape[0], places.shape[0], *into.shape[2:]))


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    groups: Sequence[Group],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; out, lse: what `gathered_attention` returned."""
    dtype = lse.dtype
    grad_query = torch.zeros_like(query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=key.device)
    # the softmax's own correction, and what comes through lse itself
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    for group in groups:
        selection = _Selection.of(group, query.shape[1], key.shape[1], query.device)
        saved = (query, key, value, grad_out, lse, delta)
        _backward_group(selection, group, saved, scale, (grad_query, grad_key, grad_value))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _forward_groups(
    query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    batch, num_heads, q_len, _ = query.shape
    out = query.new_zeros(batch, num_heads, q_len, value.shape[-1])
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=wide(query.dtype), device=query.device)
    for group in groups:
        selection = _Selection.of(group, num_heads, key.shape[1], query.device)
        group_out, group_lse = _forward_group(selection, group, query, key, value, scale)
        selection.put(out, group_out)
        selection.put(lse, group_lse)
    return out, lse


def _forward_group(
    selection: _Selection, group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse of a group's rows and heads, [B, H, Tq, ...]."""
    lists, dtype, device = group.lists, wide(query.dtype), query.device
    q_len, kv_len = query.shape[2], key.shape[2]
    blocked = _blocked(selection, lists, query, key, value)
    num_rows, num_q_blocks, tall, _ = blocked.query.shape
    out = torch.empty(num_rows, num_q_blocks, tall, value.shape[-1], dtype=dtype, device=device)
    lse = torch.empty(num_rows, num_q_blocks, tall, dtype=dtype, device=device)
    if not lists.has_every_row:
        out.zero_()
        lse.fill_(-torch.inf)
    made, kv_group = Scratch(dtype, device), blocked.kv_group
    careful = lists.masks(kv_len) and not is_finite(value)
    for segment in lists.segments:
        for at, parts in _chunks(segment, num_rows, tall, lists.kv_block):
            kept = _kept(segment, at, group, q_len, kv_len)
            for rows in parts:
                chunk = _Chunk(segment, at, rows)
                q, k = chunk.of_queries(blocked.query, dtype), chunk.of_keys("listed", blocked.key, made)
                cuts = _cuts(k.shape[1]) if kept is None else 1
                q, k = q.repeat_interleave(cuts, 0) if cuts > 1 else q, _cut(k, cuts)
                weights, total, part_lse = _weights(_scores(q, k, kept, kv_group, scale, made))
                v = _cut(chunk.of_keys("listed", blocked.value, made), cuts)  # in the place of the keys
                place = chunk.into(out) if segment.is_first and cuts == 1 else None
                part = made("mixed", *q.shape[:2], v.shape[2]) if place is None else place
                pairs = _pairs(kept, weights, kv_group) if careful and kept is not None else None
                _multiply(weights, v, part, pairs).div_(total)
                part, part_lse = _united(part, part_lse, cuts)
                if not segment.is_first:
                    before = chunk.of_queries(out, dtype), chunk.of_queries(lse, dtype)
                    part, part_lse = merge(*before, part, part_lse)
                if place is None:
                    chunk.put(out, part)
                chunk.put(lse, part_lse)
    return _query_from_blocks(out, blocked, kv_group, q_len), _query_from_blocks(lse, blocked, kv_group, q_len)


def _cuts(num_keys: int) -> int:
    """Into how many parts of the same length keys are cut, a power of 2."""
    cuts = 1
    while num_keys > cuts * MAX_KEYS and num_keys % (2 * cuts) == 0:
        cuts *= 2
    return cuts


def _cut(x: Tensor, cuts: int) -> Tensor:
    """[items * cuts, keys / cuts, D] of [items, keys, D]."""
    return x.reshape(x.shape[0] * cuts, x.shape[1] // cuts, x.shape[2])


def _united(out: Tensor, lse: Tensor, cuts: int) -> tuple[Tensor, Tensor]:
    """Results [items, tall, Dv] and [items, tall] from those of parts of the keys, [items * cuts, ...]."""
    while cuts > 1:
        out, lse = merge(out[::2], lse[::2], out[1::2], lse[1::2])
        cuts //= 2
    return out, lse


def _weights(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, in the memory of the scores; what their sum with values is to be divided by, [items, tall, 1]; and lse
    [items, tall]."""
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # an empty row's is -inf
    weights = scores.sub_(peak).exp2_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log2().add_(peak).mul_(LN2).squeeze(-1)
    return weights, total.clamp_(min=1.0), lse  # the largest weight is 1, so a total below 1 is an empty row's 0


def _pairs(kept: Tensor, scores: Tensor, kv_group: int) -> Tensor:
    """bool of the shape of scores, see `_kept`."""
    num_blocks, _, q_block, num_keys = kept.shape
    num_rows = scores.numel() // (num_blocks * kv_group * q_block * num_keys)
    return kept.expand(num_rows, num_blocks, kv_group, q_block, num_keys).reshape(scores.shape)


def _multiply(a: Tensor, b: Tensor, out: Tensor, kept: Tensor | None, scale: float = 1.0) -> Tensor:
    """a @ b times scale, into out. kept: bool of the shape of a, outside of which a is 0, where b may not be finite:
    then 0 x NaN must not reach a row that keeps nothing of it."""
    if kept is None:
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
    finite = torch.isfinite(b)
    torch.baddbmm(out, a, torch.where(finite, b, 0.0), beta=0, alpha=scale, out=out)
    return out.masked_fill_(kept.to(b.dtype) @ (~finite).to(b.dtype) > 0, torch.nan)


def _backward_group(
    selection: _Selection,
    group: Group,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value, grad_out, lse, delta = saved
    lists, dtype = group.lists, lse.dtype
    q_len, kv_len = query.shape[2], key.shape[2]
    blocked = _blocked(selection, lists, query, key, value)
    num_rows, _, tall, _ = blocked.query.shape
    heads, kv_group = selection.q_heads, selection.kv_group
    out_blocks = _query_by_block(selection.take(grad_out, heads), lists.q_block, kv_group)
    # exp(score - inf) = 0 where a row is empty
    safe_lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    lse_blocks = _query_by_block(selection.take(safe_lse[..., None], heads), lists.q_block, kv_group) / LN2
    delta_blocks = _query_by_block(selection.take(delta[..., None], heads), lists.q_block, kv_group)
    grad_q = torch.zeros(blocked.query.shape, dtype=dtype, device=query.device)
    grad_k = torch.zeros(blocked.key.shape, dtype=dtype, device=query.device)
    grad_v = torch.zeros(blocked.value.shape, dtype=dtype, device=query.device)
    made = Scratch(dtype, query.device)
    careful = lists.masks(kv_len) and not is_finite(query, key, value, grad_out)
    for segment in lists.segments:
        for at, parts in _chunks(segment, num_rows, tall, lists.kv_block):
            kept = _kept(segment, at, group, q_len, kv_len)
            for rows in parts:
                chunk = _Chunk(segment, at, rows)
                q, d_out, of_lse, of_delta = (
                    chunk.of_queries(x, dtype) for x in (blocked.query, out_blocks, lse_blocks, delta_blocks)
                )
                k, v = chunk.of_keys("keys", blocked.key, made), chunk.of_keys("values", blocked.value, made)
                weights = _scores(q, k, kept, kv_group, scale, made).sub_(of_lse).exp2_()
                d_scores = torch.bmm(d_out, v.mT, out=made("of scores", *weights.shape))
                d_scores.sub_(of_delta).mul_(weights)
                pairs = _pairs(kept, weights, kv_group) if careful and kept is not None else None
                if pairs is not None:  # what is NaN in a row, or in a column, is so outside of its pairs, too
                    weights.masked_fill_(~pairs, 0.0)
                    d_scores.masked_fill_(~pairs, 0.0)
                by_key = None if pairs is None else pairs.mT
                d_v = _multiply(weights.mT, d_out, made("of values", *v.shape), by_key)
                chunk.add_to_keys(grad_v, d_v)
                d_q = _multiply(d_scores, k, made("of queries", *q.shape), pairs, scale)
                chunk.add_to_queries(grad_q, d_q)
                d_k = _multiply(d_scores.mT, q, made("of keys", *k.shape), by_key, scale)
                chunk.add_to_keys(grad_k, d_k)
    grad_query, grad_key, grad_value = grads
    selection.put(grad_query, _query_from_blocks(grad_q, blocked, kv_group, q_len))
    selection.add(grad_key, _query_from_blocks(grad_k, blocked, 1, kv_len))
    selection.add(grad_value, _query_from_blocks(grad_v, blocked, 1, kv_len))
