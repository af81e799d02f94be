"""How is a decoding step launched? Over the pages of a store, once for all rows and heads, and once to merge splits."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.learn.launcher import Launcher
from patterndsl.runtime.decoding.gathered import Newest
from patterndsl.runtime.decoding.store import Store
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.calls import positive
from patterndsl.runtime.kernels.decode import decode_kernel, merge_splits_kernel
from patterndsl.runtime.kernels.launch import padded_widths, precision_of, strides_of

PROGRAMS = 512
"""Pages are split until there are about so many programs: some for each processor of a large GPU, and a constant, so
that results are the same on all of them."""
MOST_AT_ONCE = 64
"""Splits whose results are read at once."""
MOST_ROWS = 64
"""Rows of a tile: query heads of a key head, times their positions."""
FOUR_WARPS = {"num_warps": 4}

_decode, _merge = Launcher(decode_kernel), Launcher(merge_splits_kernel)


def attend(store: Store, step: Newest, asked: Asked) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, Dv] in the query's dtype and lse [B, Hq, T] in float32. Empty rows yield 0 and -inf.

    Work: what is kept is read once, and the predicate is asked at all places.
    """
    query, scale = positive(step.query, step.scale)
    batch, q_heads, q_len, dim = query.shape
    heads, value_dim = len(store.kv_heads), store.values.shape[3]
    rows = step.kv_group * q_len
    query = query.contiguous().view(batch, heads, rows, dim)
    out = query.new_empty(batch, q_heads, q_len, value_dim)
    lse = torch.empty(batch, q_heads, q_len, dtype=torch.float32, device=query.device)
    for first in range(0, rows, MOST_ROWS):
        into = out.view(batch, heads, rows, value_dim), lse.view(batch, heads, rows)
        _attend_rows(store, query, into, first, min(MOST_ROWS, rows - first), step, scale, asked)
    return out, lse


def _attend_rows(
    store: Store,
    query: Tensor,
    into: tuple[Tensor, Tensor],
    first: int,
    num_rows: int,
    step: Newest,
    scale: float,
    asked: Asked,
) -> None:
    """The rows [first, first + num_rows) of all tiles."""
    pages, (out, lse) = store.pages, into
    batch, heads, _, dim = query.shape
    value_dim = out.shape[3]
    q_block = max(16, 1 << (num_rows - 1).bit_length())
    splits = _num_splits(pages.most_blocks, batch * heads)
    padded, value_padded = padded_widths(dim, value_dim)
    parts = batch * heads * splits * num_rows if splits > 1 else 0
    part_out, part_lse = query.new_empty(parts * value_padded, dtype=torch.float32), lse.new_empty(parts)
    _decode(
        (splits, heads, batch),
        (
            query, store.keys, store.values, out, lse, part_out, part_lse,
            store.table, store.lengths, store.older, store.lasting, store.heads,
        ),
        (
            *strides_of(query, out), *lse.stride(),
            heads, store.table.shape[1], pages.ring, pages.ring_pages, first, num_rows, step.back, splits,
        ),
        {
            "keep": asked.keep, "kv_group": step.kv_group, "q_len": step.query.shape[2], "dim": dim,
            "value_dim": value_dim, "padded": padded, "value_padded": value_padded, "q_block": q_block,
            "rows": pages.page, "skips": pages.holding.kind == "growing", "is_cut": splits > 1,
            "precision": precision_of(query),
        },
        FOUR_WARPS, asked=asked, scale=scale,
    )  # fmt: skip
    if splits > 1:
        _merge(
            (num_rows, heads, batch),
            (part_out, part_lse, out, lse),
            (*strides_of(out), *lse.stride(), first, splits),
            {
                "value_dim": value_dim, "value_padded": value_padded,
                "block": min(MOST_AT_ONCE, 1 << (splits - 1).bit_length()),
            },
            FOUR_WARPS,
        )  # fmt: skip


def _num_splits(num_pages: int, tiles: int) -> int:
    """Into how many splits so many pages are cut, for each of so many tiles: all as long, but for the last one."""
    wanted = max(1, min(-(-PROGRAMS // tiles), num_pages))
    return -(-num_pages // -(-num_pages // wanted)) if num_pages else 1
