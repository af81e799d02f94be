"""How is a decoding step launched? Over the pages of a store, for all rows and heads at once; splits are merged."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.decoding.gathered import Newest
from patterndsl.runtime.decoding.store import Store
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.calls import positive
from patterndsl.runtime.kernels.decode import decode_kernel, merge_splits_kernel
from patterndsl.runtime.kernels.launch import padded_widths, precision_of, strides_of
from patterndsl.runtime.kernels.tickets import tickets

PROGRAMS = 528
"""Places are split until there are about so many programs: four for each processor of a large GPU, and a constant, so
that results are the same on all of them."""
TILE_BYTES = 16 << 10
"""Of keys that a program reads at once, and as many of values. Memory is busy where some 40 KB are on their way to each
processor."""
MERGED_BYTES = 64 << 10
"""Of a head's parts: the most that the last of its programs merges, while all others are idle."""
MERGED_AT_ONCE = 8192
"""Numbers of parts that a program reads at once."""
MOST_ROWS = 64
"""Rows of a tile: query heads of a key head, times their positions."""
OPTIONS = {"num_warps": 4, "num_stages": 2}
"""In two stages tiles are copied to shared memory: in registers they would leave room for fewer programs."""
MERGE_OPTIONS = {"num_warps": 4}
EARLY_OPTIONS = MERGE_OPTIONS | {"launch_pdl": True}

_decode, _merge = Launcher(decode_kernel), Launcher(merge_splits_kernel)


def attend(store: Store, step: Newest, asked: Asked) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, T, Dv] in the query's dtype and lse [B, Hq, T] in float32. Empty rows yield 0 and -inf.

    Work: what is kept is read once, and of a bounded store all that lasts; the predicate is asked at all places.
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
    padded, value_padded = padded_widths(dim, value_dim)
    tile = _tile(max(padded, value_padded) * query.element_size())
    num_places = pages.most_columns * pages.page
    span, splits = _cut(num_places, tile, batch * heads)
    parts = batch * heads * splits * num_rows if splits > 1 else 0
    part_out, part_lse = query.new_empty(parts * value_padded, dtype=torch.float32), lse.new_empty(parts)
    merge_rows = 1 << (num_rows - 1).bit_length()
    is_joined = splits > 1 and splits * merge_rows * value_padded * 4 <= MERGED_BYTES
    starts_early = can_start_early(query.device)
    _decode(
        (splits, heads, batch),
        (
            query, store.keys, store.values, out, lse, part_out, part_lse,
            tickets(query.device, batch * heads) if is_joined else part_lse,
            store.table, store.lengths, store.older, store.lasting, store.heads,
        ),
        (
            *strides_of(query, out), *lse.stride(), heads, store.table.shape[1],
            pages.ring, pages.ring_pages, num_places, span, first, num_rows, step.back, splits,
        ),
        {
            "keep": asked.keep, "kv_group": step.kv_group, "q_len": step.query.shape[2], "dim": dim,
            "value_dim": value_dim, "padded": padded, "value_padded": value_padded, "q_block": q_block,
            "rows": pages.page, "tile": tile, "skips": pages.holding.kind == "growing", "is_cut": splits > 1,
            "merge_rows": merge_rows if is_joined else 0,
            "merge_block": _at_once(splits, merge_rows * value_padded) if is_joined else 0,
            "starts_early": splits > 1 and not is_joined and starts_early, "precision": precision_of(query),
        },
        OPTIONS, asked=asked, scale=scale,
    )  # fmt: skip
    if splits > 1 and not is_joined:
        _merge(
            (num_rows, heads, batch),
            (part_out, part_lse, out, lse),
            (*strides_of(out), *lse.stride(), first, splits),
            {
                "value_dim": value_dim, "value_padded": value_padded,
                "block": _at_once(splits, value_padded), "starts_early": starts_early,
            },
            EARLY_OPTIONS if starts_early else MERGE_OPTIONS,
        )  # fmt: skip


@cache
def can_start_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it runs, and wait for it: from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _tile(row_bytes: int) -> int:
    """How many places are read at once."""
    return max(16, min(128, TILE_BYTES // row_bytes))


def _cut(num_places: int, tile: int, heads: int) -> tuple[int, int]:
    """Places of a split, and how many splits: all as long, but for the last one."""
    num_tiles = -(-num_places // tile)
    wanted = max(1, min(-(-PROGRAMS // heads), num_tiles))
    span = max(1, -(-num_tiles // wanted)) * tile
    return span, max(1, -(-num_places // span))


def _at_once(splits: int, numbers: int) -> int:
    """Splits that are merged at once, where each has so many numbers; a power of two."""
    return min(max(1, MERGED_AT_ONCE // numbers), 1 << (splits - 1).bit_length())
