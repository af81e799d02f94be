"""How is a decoding step launched? Over the pages of a store, once for all rows and heads, and once to merge splits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from patterndsl.runtime.decoding.gathered import Newest
from patterndsl.runtime.decoding.store import Store
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.calls import positive
from patterndsl.runtime.kernels.decode import decode_kernel
from patterndsl.runtime.kernels.launch import CHUNK, TWO_WARPS, merge, padded_widths, precision_of, strides_of
from patterndsl.runtime.kernels.launcher import Launcher

PROGRAMS = 1024
"""Pages are split until there are about so many programs: some for each processor of a large GPU, and a constant, so
that results are the same on all of them."""
MOST_ROWS = 64
"""Rows of a tile: query heads of a key head, times their positions."""
FOUR_WARPS = {"num_warps": 4}

_decode = Launcher(decode_kernel)


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
    splits = max(1, min(-(-PROGRAMS // (batch * heads)), pages.most_blocks))
    padded, value_padded = padded_widths(dim, value_dim)
    parts = batch * heads * splits * q_block if splits > 1 else 0
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
        joints = _joints(batch, heads, splits, query.device)
        merge(
            (batch * heads * q_block, 1, 1),
            (part_out, part_lse, out[:, :, first:], lse[:, :, first:], joints, joints),
            (*strides_of(out), *lse.stride(), 0, 0, num_rows, 0),
            {
                "value_dim": value_dim, "value_padded": value_padded, "q_block": q_block, "chunk": CHUNK,
                "ordered": False, "goes_on": False,
            },
            TWO_WARPS,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _joints(batch: int, heads: int, splits: int, device: torch.device) -> Tensor:
    """What `merge_kernel` joins: the splits of each tile."""
    at = torch.arange(batch * heads, device=device)
    none, all_of_it = torch.zeros_like(at), torch.full_like(at, splits)
    return torch.stack([at // heads, at % heads, none, at * splits, all_of_it], 1).to(torch.int32)
