"""How does block-sparse attention run in plain PyTorch? Gather the live blocks of keys, then small dense matmuls.

It runs wherever PyTorch does and trains: the backward pass recomputes the scores instead of storing them. Query blocks
are worked through in chunks that fit the cache; a long list of keys is cut into segments whose results are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.function import Run, attended
from patterndsl.runtime.merge import merge

MAX_SCORES = 1 << 20
"""Scores computed at once (4 MB in float32): small enough to stay in the cache from one operation to the next."""
Keep: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""May query row q attend key k? int64 tensors that broadcast, to bool."""

MAX_SEGMENT = 4096
"""Keys of one query block handled at once; longer lists are merged segment by segment."""


@dataclass(frozen=True, slots=True, eq=False)
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
    dtype = _compute_dtype(query.dtype)
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    group = Group(None, None, lists, keep)
    selection = _Selection(None, None, None, 1)
    careful = not bool(torch.isfinite(value).all())
    _forward_group(selection, group, query, key, value, scale, careful, out, lse)
    return out, lse


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
    """Query blocks with as many kv blocks each: q_blks [n], kv_blks [n, width], is_full and exists [n, width]."""

    q_blks: Tensor
    kv_blks: Tensor
    is_full: Tensor
    exists: Tensor
    is_first: bool


def _segments(lists: BlockLists) -> Iterator[_Segment]:
    """The lists cut to MAX_SEGMENT keys, those of similar length together, padded to the longest.

    A query block has at most one piece in each wave, so a wave merges into distinct rows.
    """
    width_limit = max(1, MAX_SEGMENT // lists.kv_block)
    starts, counts = lists.offsets[:-1], lists.offsets.diff()
    wave = 0
    while True:
        left = (counts - wave * width_limit).clamp(0, width_limit)
        longest = int(left.max()) if left.numel() else 0
        if longest == 0:
            return
        low = 0
        while low < longest:
            high = low + max(1, low // 4) if low else 1  # widths within a quarter of each other share a bucket
            high = min(high, longest)
            q_blks = ((left > low) & (left <= high)).nonzero()[:, 0]
            low = high
            if not q_blks.numel():
                continue
            width = int(left[q_blks].max())
            slot = torch.arange(width, device=left.device)
            exists = slot < left[q_blks, None]
            place = torch.where(exists, starts[q_blks, None] + wave * width_limit + slot, 0)
            yield _Segment(
                q_blks, lists.kv_blks[place].long() * exists, lists.is_full[place] & exists, exists, wave == 0
            )
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


def _chunks(segment: _Segment, num_rows: int, tall: int, kv_block: int) -> Iterator[tuple[slice, slice]]:
    """(rows of R, query blocks of the segment) such that at most MAX_SCORES scores are computed at once."""
    per_block = tall * segment.kv_blks.shape[1] * kv_block
    rows_at_once = max(1, min(num_rows, MAX_SCORES // per_block))
    blocks_at_once = max(1, MAX_SCORES // (per_block * rows_at_once))
    for row in range(0, num_rows, rows_at_once):
        for block in range(0, segment.q_blks.shape[0], blocks_at_once):
            yield slice(row, row + rows_at_once), slice(block, block + blocks_at_once)


def _kept(segment: _Segment, at: slice, group: Group, q_len: int, kv_len: int, always: bool) -> Tensor | None:
    """bool [n, 1, q_block, width * kv_block]; None where everything is kept. Only partial tiles are asked."""
    lists = group.lists
    is_full, q_blks, kv_blks = segment.is_full[at], segment.q_blks[at], segment.kv_blks[at]
    # the padding behind the last key belongs to no pair, so a full tile that reaches over it is masked too
    inside = (kv_blks + 1) * lists.kv_block <= kv_len
    sure = is_full & inside
    if not always and bool(sure.all()):
        return None
    n, width = kv_blks.shape
    kept = sure[:, None, :, None].expand(n, lists.q_block, width, lists.kv_block).contiguous()
    item, slot = (segment.exists[at] & ~sure).nonzero(as_tuple=True)
    q = q_blks[item, None, None] * lists.q_block + torch.arange(lists.q_block, device=q_blks.device)[:, None]
    k = kv_blks[item, slot][:, None, None] * lists.kv_block + torch.arange(lists.kv_block, device=q_blks.device)
    asked = group.keep(q.clamp(max=max(0, q_len - 1)), k.clamp(max=max(0, kv_len - 1)))
    kept[item, :, slot] = (asked & (k < kv_len)).expand(item.shape[0], lists.q_block, lists.kv_block)
    return kept.view(n, 1, lists.q_block, width * lists.kv_block)


def _scores(q: Tensor, k: Tensor, kept: Tensor | None, kv_group: int) -> Tensor:
    """[R, n, G * q_block, keys]; pairs that are not kept get -inf."""
    scores = q @ k.transpose(-1, -2)
    if kept is not None:
        by_head = scores.view(*scores.shape[:2], kv_group, -1, scores.shape[-1])
        by_head.masked_fill_(~kept, -torch.inf)
    return scores


def _gather(blocks: Tensor, rows: slice, kv_blks: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, n, width * kv_block, D] of the listed blocks."""
    picked = blocks[rows].index_select(1, kv_blks.reshape(-1)).to(dtype)
    return picked.view(picked.shape[0], kv_blks.shape[0], kv_blks.shape[1] * blocks.shape[2], blocks.shape[3])


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    lse = torch.full((batch, num_heads, q_len), -torch.inf, dtype=_compute_dtype(query.dtype), device=query.device)
    careful = not bool(torch.isfinite(value).all())
    for group in groups:
        selection = _Selection.of(group, num_heads, key.shape[1], query.device)
        _forward_group(selection, group, query, key, value, scale, careful, out, lse)
    return out, lse


def _forward_group(
    selection: _Selection,
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    careful: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    lists, dtype = group.lists, lse.dtype
    q_len, kv_len = query.shape[2], key.shape[2]
    blocked = _blocked(selection, lists, query, key, value)
    num_rows, num_q_blocks, tall, _ = blocked.query.shape
    group_out = torch.zeros(num_rows, num_q_blocks, tall, value.shape[-1], dtype=dtype, device=query.device)
    group_lse = torch.full((num_rows, num_q_blocks, tall), -torch.inf, dtype=dtype, device=query.device)
    for segment in _segments(lists):
        for rows, at in _chunks(segment, num_rows, tall, lists.kv_block):
            q_blks, kv_blks = segment.q_blks[at], segment.kv_blks[at]
            kept = _kept(segment, at, group, q_len, kv_len, careful)
            q = blocked.query[rows].index_select(1, q_blks).to(dtype) * scale
            scores = _scores(q, _gather(blocked.key, rows, kv_blks, dtype), kept, blocked.kv_group)
            part_out, part_lse = _attend(scores, _gather(blocked.value, rows, kv_blks, dtype), kept, careful)
            if not segment.is_first:
                before = group_out[rows, q_blks], group_lse[rows, q_blks]
                part_out, part_lse = merge(*before, part_out, part_lse)
            group_out[rows, q_blks] = part_out
            group_lse[rows, q_blks] = part_lse
    selection.put(out, _query_from_blocks(group_out, blocked, blocked.kv_group, q_len))
    selection.put(lse, _query_from_blocks(group_lse, blocked, blocked.kv_group, q_len))


def _attend(scores: Tensor, value: Tensor, kept: Tensor | None, careful: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension times value, and its lse; consumes the scores.

    careful: values may not be finite; then 0 x NaN must not reach a row that does not attend the key.
    """
    peak = scores.amax(-1, keepdim=True)
    peak = peak.masked_fill_(peak == -torch.inf, 0.0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    if careful:
        assert kept is not None
        finite = torch.isfinite(value)
        mixed = weights @ torch.where(finite, value, 0.0)
        by_head = mixed.view(*mixed.shape[:2], -1, kept.shape[2], mixed.shape[-1])
        spoiled = kept.to(value.dtype) @ (~finite).to(value.dtype)[:, :, None] > 0
        mixed = torch.where(spoiled, torch.nan, by_head).view(mixed.shape)
    else:
        mixed = weights @ value
    # the largest weight is 1, so a total below 1 is an empty row's 0
    return mixed.div_(total.clamp_min(1.0)), (peak + total.log()).squeeze(-1)


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
    lse_blocks = _query_by_block(selection.take(safe_lse[..., None], heads), lists.q_block, kv_group)
    delta_blocks = _query_by_block(selection.take(delta[..., None], heads), lists.q_block, kv_group)
    grad_q = torch.zeros(blocked.query.shape, dtype=dtype, device=query.device)
    grad_k = torch.zeros(blocked.key.shape, dtype=dtype, device=query.device)
    grad_v = torch.zeros(blocked.value.shape, dtype=dtype, device=query.device)
    for segment in _segments(lists):
        for rows, at in _chunks(segment, num_rows, tall, lists.kv_block):
            q_blks, kv_blks = segment.q_blks[at], segment.kv_blks[at]
            kept = _kept(segment, at, group, q_len, kv_len, False)
            q = blocked.query[rows].index_select(1, q_blks).to(dtype) * scale
            k = _gather(blocked.key, rows, kv_blks, dtype)
            v = _gather(blocked.value, rows, kv_blks, dtype)
            d_out = out_blocks[rows].index_select(1, q_blks).to(dtype)
            weights = _scores(q, k, kept, kv_group).sub_(lse_blocks[rows].index_select(1, q_blks)).exp_()
            _add_blocks(grad_v, rows, kv_blks, weights.transpose(-1, -2) @ d_out)
            d_scores = (d_out @ v.transpose(-1, -2)).sub_(delta_blocks[rows].index_select(1, q_blks)).mul_(weights)
            grad_q[rows, q_blks] += (d_scores @ k).mul_(scale)
            _add_blocks(grad_k, rows, kv_blks, d_scores.transpose(-1, -2) @ q)
    grad_query, grad_key, grad_value = grads
    selection.put(grad_query, _query_from_blocks(grad_q, blocked, kv_group, q_len))
    selection.add(grad_key, _query_from_blocks(grad_k, blocked, 1, kv_len))
    selection.add(grad_value, _query_from_blocks(grad_v, blocked, 1, kv_len))


def _add_blocks(into: Tensor, rows: slice, kv_blks: Tensor, parts: Tensor) -> None:
    """Adds [R, n, width * kv_block, D] to the listed blocks; a block may be listed many times."""
    flat = parts.reshape(parts.shape[0], kv_blks.numel(), *into.shape[2:])
    into[rows].index_add_(1, kv_blks.reshape(-1), flat)
