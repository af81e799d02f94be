"""Which keys matter to a query? The candidates with the highest scores, block by block or token by token.

Scores are those of MoBA (Lu et al. 2025, arXiv 2502.13189, section 2.2: the product with a block's mean key), of Quest
(Tang et al. 2024, arXiv 2406.10774, section 3.2: the largest product that a key within a block's bounds could have), or
what a layer has learned (DeepSeek-V3.2: an index of its own).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from patterndsl.device.graphs import on_device
from patterndsl.ir.draws import NoInputs
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.sema.bind import BoundSelection

MAX_SCORES = 1 << 25
"""Scores that are held at once, over batch and heads."""

Scores: TypeAlias = Callable[[slice], Tensor]
"""[B, H, rows, num_blocks] of some rows."""
Choose: TypeAlias = Callable[[Tensor, BoundSelection, int], Tensor]
"""What `highest` does."""


def topk_lists(query: Tensor, key: Tensor, selection: BoundSelection, q_start: int) -> Tensor:
    """int64 [B, Hq or 1, num_rows, width] of query [B, Hq, Tq, D], key [B, Hkv, Tk, D]: blocks of keys in
    ascending order, and before them -1 where a row has fewer candidates; one list for all heads where they share it.

    Blocks of `always` are chosen first, then the highest scores; NaN is the lowest. Which of equal scores is listed may
    differ from device to device. Without gradient; no scores of all rows are held. Work: O(num_rows num_blocks D).
    """
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        rows = pooled(query, selection.per, q_start % selection.per)
        kv_group = query.shape[1] // key.shape[1]
        rows = rows.view(rows.shape[0], key.shape[1], kv_group, *rows.shape[2:])  # [B, Hkv, G, rows, D]

        def of_heads(products: Tensor) -> Tensor:
            match selection.heads:
                case "each":
                    return products.flatten(1, 2)
                case "group":
                    return products.sum(2)
                case "all":
                    return products.sum((1, 2))[:, None]

        scores: Scores
        if selection.by == "max":
            most, least = (
                _blocks(key, selection.of, -torch.inf).amax(3),
                _blocks(key, selection.of, torch.inf).amin(3),
            )
            most, least = (x.to(rows.dtype).transpose(-1, -2)[:, :, None] for x in (most, least))

            def scores(at: slice) -> Tensor:
                part = rows[..., at, :]
                return of_heads(part.clamp(min=0) @ most + part.clamp(max=0) @ least)
        else:
            means = pooled(key, selection.of, 0).transpose(-1, -2)[:, :, None]

            def scores(at: slice) -> Tensor:
                return of_heads(rows[..., at, :] @ means)

        found = best(scores, selection, query.shape[0] * query.shape[1], key.device)
        return found.repeat_interleave(kv_group, dim=1) if selection.heads == "group" else found


def highest(scores: Tensor, selection: BoundSelection, first_row: int) -> Tensor:
    """int64 [B, H, rows, width] of scores [B, H, rows, num_blocks], which it writes over: as `topk_lists` has them.
    first_row: the number of the first of these rows."""
    width = min(selection.width, selection.num_blocks)
    rows = torch.arange(first_row, first_row + scores.shape[2], device=scores.device)[:, None]
    blocks = torch.arange(selection.num_blocks, device=scores.device)
    among, always = (_held(part, rows, blocks) for part in (selection.among, selection.always))
    scores.masked_fill_(scores.isnan(), torch.finfo(scores.dtype).min)  # above what is no candidate
    scores.masked_fill_(~among, -torch.inf).masked_fill_(always, torch.inf)
    value, block = scores.topk(width, sorted=False)
    lists = block.masked_fill(value == -torch.inf, -1).sort(-1).values
    missing = selection.width - width
    return torch.nn.functional.pad(lists, (missing, 0), value=-1) if missing else lists


def best(
    scores: Scores, selection: BoundSelection, num_heads: int, device: torch.device, choose: Choose = highest
) -> Tensor:
    """The lists of `topk_lists` from scores, strip by strip. num_heads: of all batch rows, that scores are made for.
    choose: `highest`, or what does the same."""
    at_once = max(1, MAX_SCORES // max(1, num_heads * selection.num_blocks))
    strips = []
    for start in range(0, selection.num_rows, at_once):
        at = slice(start, min(start + at_once, selection.num_rows))
        strips.append(choose(scores(at), selection, selection.first_row + start))
    if not strips:  # no queries
        return torch.full((*scores(slice(0, 0)).shape[:3], selection.width), -1, device=device)
    return strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)


def _held(relation: Relation, rows: Tensor, blocks: Tensor) -> Tensor:
    holds = on_device(member(relation, Point(rows, blocks, 0, NoInputs())), blocks.device)
    return holds.expand(rows.shape[0], blocks.shape[0])


def _blocks(x: Tensor, size: int, filler: float) -> Tensor:
    """[B, H, blocks, size, D], the last block filled up."""
    short = -x.shape[2] % size
    x = torch.nn.functional.pad(x, (0, 0, 0, short), value=filler) if short else x
    return x.reshape(*x.shape[:2], x.shape[2] // size, size, x.shape[3])


def pooled(x: Tensor, size: int, offset: int) -> Tensor:
    """[B, H, blocks, D] in float32 at least: the mean of each block, of those of its positions that are there; the
    first has `offset` positions before x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if size == 1:
        return x.to(dtype)
    short = -(x.shape[2] + offset) % size
    if short or offset:
        x = torch.nn.functional.pad(x, (0, 0, offset, short))
    sums = x.reshape(*x.shape[:2], x.shape[2] // size, size, x.shape[3]).sum(3, dtype=dtype)
    there = torch.ones(sums.shape[2] * size, dtype=dtype, device=x.device)
    there[:offset], there[there.shape[0] - short :] = 0, 0
    return sums / there.view(-1, size).sum(1)[:, None]
