"""How is a decoding step launched? Over the pages of a store, once for all rows and heads, and once to merge splits."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.decoding.gathered import Newest
from patterndsl.runtime.decoding.store import Store
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.decode import decode_kernel, merge_splits_kernel
from patterndsl.runtime.kernels.memory import padded_widths, precision_of, strides_of

PROGRAMS = 528
"""Places are split until there are so many programs at most: four for each processor of a large GPU, which has room for
all of them at a time. A constant, so that results are the same on every GPU."""
TILE_BYTES = 16 << 10
"""Of keys that a program reads at once, and as many of values. Memory is busy where some 40 KB are on their way to each
processor."""
MERGED_SPLITS = 128
"""Splits that are merged at once. A second block of them would be waited for in turn."""
MERGED_NUMBERS = 4096
"""Of the parts that a program merges at once; with many splits, several programs share the channels of a row."""
MOST_ROWS = 64
"""Rows of a tile: query heads of a key head, times their positions."""
FEW_ROWS = 16
"""The fewest of a tile, as matrix units want them."""
OPTIONS = {"num_warps": 4, "num_stages": 2}
"""In two stages keys and values are copied to shared memory together, and beside that a program makes ready for the
tile that follows."""
FEW_OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 128}
"""With few rows in half precision that takes longer than to wait for keys first; so few registers, which then are
enough, leave room for all programs."""
MERGE_OPTIONS = {"num_warps": 4}

_decode, _merge = Launcher(decode_kernel), Launcher(merge_splits_kernel)


def attend(store: Store, step: Newest, asked: Asked) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, Dv] in the query's dtype and lse [B, Hq, T] in float32. Empty rows yield 0 and -inf.

    Work: what is kept is read once, and of a bounded store all that lasts; the predicate is asked at all places.
    """
    batch, q_heads, q_len, dim = step.query.shape
    heads, value_dim = len(store.kv_heads), store.values.shape[3]
    rows = step.kv_group * q_len
    query = step.query.contiguous().view(batch, heads, rows, dim)
    out = query.new_empty(batch, q_heads, q_len, value_dim)
    lse = torch.empty(batch, q_heads, q_len, dtype=torch.float32, device=query.device)
    for first in range(0, rows, MOST_ROWS):
        into = out.view(batch, heads, rows, value_dim), lse.view(batch, heads, rows)
        _attend_rows(store, query, into, first, min(MOST_ROWS, rows - first), step, asked)
    return out, lse


def _attend_rows(
    store: Store,
    query: Tensor,
    into: tuple[Tensor, Tensor],
    first: int,
    num_rows: int,
    step: Newest,
    asked: Asked,
) -> None:
    """The rows [first, first + num_rows) of all tiles."""
    pages, (out, lse) = store.pages, into
    batch, heads, _, dim = query.shape
    value_dim = out.shape[3]
    q_block = max(FEW_ROWS, 1 << (num_rows - 1).bit_length())
    padded, value_padded = padded_widths(dim, value_dim)
    tile = _tile(max(padded, value_padded) * query.element_size())
    num_places = pages.most_columns * pages.page
    splits, span, shorter = cut(num_places, tile, batch * heads)
    parts = batch * heads * splits * num_rows if splits > 1 else 0
    part_out, part_lse = query.new_empty(parts * value_padded, dtype=torch.float32), lse.new_empty(parts)
    _decode(
        (splits, heads, batch),
        (
            query, store.keys, store.values, out, lse, part_out, part_lse,
            store.table, store.lengths, store.older, store.lasting, store.heads,
        ),
        (
            *strides_of(query, out), *lse.stride(), heads, store.table.shape[1],
            pages.ring, pages.ring_pages, num_places, span, shorter, first, num_rows, step.back, splits,
        ),
        {
            "keep": asked.keep, "kv_group": step.kv_group, "q_len": step.query.shape[2], "dim": dim,
            "value_dim": value_dim, "padded": padded, "value_padded": value_padded, "q_block": q_block,
            "rows": pages.page, "tile": tile, "skips": pages.holding.kind == "growing", "is_cut": splits > 1,
            "precision": precision_of(query),
        },
        FEW_OPTIONS if q_block == FEW_ROWS and query.element_size() == 2 else OPTIONS, asked=asked, scale=step.scale,
    )  # fmt: skip
    if splits > 1:
        block, width = _at_once(splits, value_padded)
        _merge(
            (num_rows * (value_padded // width), heads, batch),
            (part_out, part_lse, out, lse),
            (*strides_of(out), *lse.stride(), first, splits),
            {"value_dim": value_dim, "value_padded": value_padded, "block": block, "width": width},
            MERGE_OPTIONS,
        )


def _tile(row_bytes: int) -> int:
    """How many places are read at once."""
    return max(16, min(128, TILE_BYTES // row_bytes))


def cut(num_places: int, tile: int, heads: int) -> tuple[int, int, int]:
    """How many splits, the places of a shorter one, and how many are shorter, by one tile. These come first, since the
    last tile of all is seldom full."""
    num_tiles = -(-num_places // tile)
    splits = max(1, min(PROGRAMS // heads, num_tiles))
    span, longer = divmod(num_tiles, splits)
    return splits, span * tile, splits - longer


def _at_once(splits: int, value_padded: int) -> tuple[int, int]:
    """Splits and channels that a program merges at once, powers of two."""
    block = min(MERGED_SPLITS, 1 << (splits - 1).bit_length())
    return block, min(value_padded, MERGED_NUMBERS // block)
