"""How are blocks of keys chosen on a GPU? In two launches, or one where nothing is pooled; the plain twin is
`learn.topk`.

Scores are of float32 and never lie in memory. Of equal ones the first block is listed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
from torch import Tensor

from patterndsl.device.graphs import remembered
from patterndsl.device.launcher import Launcher
from patterndsl.ir.relation import Relation
from patterndsl.learn import topk
from patterndsl.runtime.kernels.asked import Asked, asked_of, draws_for
from patterndsl.runtime.kernels.choosing_kernels import choose_kernel, pick_kernel, pool_kernel
from patterndsl.runtime.kernels.memory import strides_of
from patterndsl.runtime.views import with_unit_stride
from patterndsl.sema.bind import BoundSelection
from patterndsl.sema.parameters import Sizes

MOST_WIDTH = 64
"""Of a list, which stays in registers while any number of blocks passes; longer ones are left to the plain twin."""
ROWS, COLUMNS, CHANNELS = 64, 64, 64
"""Of a tile of scores, and of what is multiplied at once."""
POOLED = 4096
"""Numbers that a program pools at once."""
DTYPES = torch.float32, torch.bfloat16, torch.float16
OPTIONS = {"num_warps": 4, "num_stages": 1}

_pool, _choose, _pick = map(Launcher, (pool_kernel, choose_kernel, pick_kernel))


def topk_lists(query: Tensor, key: Tensor, selection: BoundSelection, q_start: int) -> Tensor:
    """What the plain twin lists, but for the rounding of scores. Without gradient. Work: O(num_rows num_blocks D)."""
    if not _takes(selection, query, key):
        return topk.topk_lists(query, key, selection, q_start)
    batch, q_heads, _, dim = query.shape
    kv_heads = key.shape[1]
    query, key = (with_unit_stride(x.detach()) for x in (query, key))
    rows, most, least = pooled_blocks(query, key, selection, q_start)
    kv_group = q_heads // kv_heads
    match selection.heads:
        case "each":
            heads, copies, groups, summed, shared = q_heads, 1, 1, 1, kv_group
        case "group":
            heads, copies, groups, summed, shared = kv_heads, kv_group, 1, kv_group, 1
        case "all":
            heads, copies, groups, summed, shared = 1, 1, kv_heads, kv_group, 1
    lists = torch.empty(
        (batch, heads * copies, selection.num_rows, selection.width), dtype=torch.int64, device=query.device
    )
    may, must = _asked(selection, query.device)
    _choose.of(
        (triton.cdiv(selection.num_rows, ROWS), heads, batch),
        (
            rows, most, least, lists, may.numbers, may.tables, must.numbers, must.tables, *strides_of(rows, most),
            selection.num_rows, selection.num_blocks, selection.first_row, selection.width, copies, groups,
            summed, shared,
        ),
        {
            "may": may.keep, "must": must.keep, "by_bounds": selection.by == "max", "dim": dim,
            "chunk": min(CHANNELS, _padded(dim)), "row_block": ROWS, "column_block": COLUMNS,
            "kept": triton.next_power_of_2(selection.width),
        },
        OPTIONS,
    )  # fmt: skip
    return lists


def highest(scores: Tensor, selection: BoundSelection, first_row: int) -> Tensor:
    """The same of scores that are made already; see the plain twin. Work: O(scores)."""
    if not _takes(selection, scores):
        return topk.highest(scores, selection, first_row)
    scores = with_unit_stride(scores.detach())
    batch, heads, num_rows, num_blocks = scores.shape
    lists = torch.empty((batch, heads, num_rows, selection.width), dtype=torch.int64, device=scores.device)
    may, must = _asked(selection, scores.device)
    _pick.of(
        (triton.cdiv(num_rows, ROWS), heads, batch),
        (
            scores, lists, may.numbers, may.tables, must.numbers, must.tables, *strides_of(scores),
            num_rows, num_blocks, first_row, selection.width,
        ),
        {
            "may": may.keep, "must": must.keep, "row_block": ROWS, "column_block": COLUMNS,
            "kept": triton.next_power_of_2(selection.width),
        },
        OPTIONS,
    )  # fmt: skip
    return lists


def _takes(selection: BoundSelection, *tensors: Tensor) -> bool:
    """Whether the kernels are for these. Traced by torch.compile or transformed by torch.func, tensors have no memory
    that they could read."""
    if torch.compiler.is_compiling() or cast("Any", torch._C)._are_functorch_transforms_active():
        return False
    return selection.width <= MOST_WIDTH and all(x.dtype in DTYPES and x.numel() for x in tensors)


def pooled_blocks(query: Tensor, key: Tensor, selection: BoundSelection, q_start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, Hq, num_rows, D], and of blocks of keys [B, Hkv, num_blocks, D] the means, twice, or what is most and
    what is least: float32, or as they came where a block is one position."""
    per, of, by_bounds = selection.per, selection.of, selection.by == "max"
    (batch, q_heads, q_len, dim), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    rows, blocks = query, key[None].expand(2, *key.shape)
    if per > 1:
        rows = query.new_empty((batch, q_heads, selection.num_rows, dim), dtype=torch.float32)
    if of > 1:
        blocks = query.new_empty((1 + by_bounds, batch, kv_heads, selection.num_blocks, dim), dtype=torch.float32)
    q_tile, k_tile = _tile(per, dim), _tile(of, dim)
    of_queries = triton.cdiv(selection.num_rows, q_tile[0]) * q_heads * batch if per > 1 else 0
    of_keys = triton.cdiv(selection.num_blocks, k_tile[0]) * kv_heads * batch if of > 1 else 0
    if of_queries + of_keys:
        _pool.of(
            (of_queries + of_keys, 1, 1),
            (
                query, key, rows, blocks, *strides_of(query, key), q_heads, kv_heads, q_len, kv_len, q_start % per,
                per, of, selection.num_rows, selection.num_blocks, of_queries, blocks.stride(0),
            ),
            {
                "by_bounds": by_bounds, "q_at_once": q_tile[0], "q_positions": q_tile[1], "k_at_once": k_tile[0],
                "k_positions": k_tile[1], "dim": dim, "padded": _padded(dim),
            },
            OPTIONS,
        )  # fmt: skip
    return rows, blocks[0], blocks[-1]


def _tile(size: int, dim: int) -> tuple[int, int]:
    """Blocks of this size that a program pools, and positions of each that it reads at once."""
    at_once = max(1, POOLED // _padded(dim))
    positions = min(triton.next_power_of_2(size), at_once)
    return at_once // positions, positions


def _padded(dim: int) -> int:
    """Channels of a tile: matrix units want 16 at least."""
    found: int = max(16, triton.next_power_of_2(dim))
    return found


@remembered(256)
def _asked(selection: BoundSelection, device: torch.device) -> tuple[Asked, Asked]:
    """What makes a block a candidate, and what lists it before all others."""
    rows, blocks = selection.num_rows, selection.num_blocks
    sizes = Sizes(rows, blocks, selection.first_row, selection.first_row + rows)

    def asked(relation: Relation) -> Asked:
        return asked_of(relation, sizes, {}, draws_for(relation, 1, device))

    return asked(selection.among), asked(selection.always)
