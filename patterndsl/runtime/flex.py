"""How does a pattern run on FlexAttention? Tiles become a BlockMask, membership becomes its mask_mod.

On CUDA it trains; on the CPU PyTorch offers inference only, without lse, which is refused here and not worked around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from patterndsl.diagnostics import input_error
from patterndsl.ir.meaning import Point, member
from patterndsl.runtime.data import DeviceData
from patterndsl.runtime.told import Told
from patterndsl.sema.bind import Bound

MAX_DENSE_BLOCKS = 1 << 24
"""Up to this many cells a BlockMask stores all columns, as create_block_mask does; above, only the live ones, which
`to_dense` and slicing of BlockMask do not understand."""


MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(bound: Bound, data: DeviceData, *, by_head: bool = False) -> MaskMod:
    """The predicate as FlexAttention's mask_mod(batch, head, q_idx, kv_idx), with q_idx local to the queries.

    by_head: the data has a row for each head of each batch row.
    """
    relation, q_start, num_heads = bound.relation, bound.sizes.q_start, bound.num_heads

    def keep(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        holds = member(
            relation, Point(q_idx + q_start, kv_idx, head, data.at_row(batch * num_heads + head if by_head else batch))
        )
        if isinstance(holds, bool):
            return (q_idx >= 0) if holds else (q_idx < 0)
        return cast("Tensor", holds)

    return keep


def block_mask(
    tiles: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]],
    block: tuple[int, int],
    num_blocks: tuple[int, int],
    lengths: tuple[int, int],
    mod: MaskMod | None,
) -> BlockMask:
    """A BlockMask from tile lists, without an N x N evaluation.

    tiles: per batch row, per head, (q_blks, kv_blks, is_full) of the live tiles, ordered by (q_blk, kv_blk). As in
    create_block_mask a ragged last tile counts as partial, since its padding is not kept. mod: None where no tile is
    partial.
    """
    flat = [(q, k, full & ~_ragged(q, k, block, lengths)) for row in tiles for q, k, full in row]
    shape = (len(tiles), len(tiles[0]))
    dense = shape[0] * shape[1] * num_blocks[0] * num_blocks[1] <= MAX_DENSE_BLOCKS
    parts = [[(q[full == wanted], k[full == wanted]) for q, k, full in flat] for wanted in (False, True)]
    if dense:
        ordered = [_dense_lists(part, num_blocks, shape) for part in parts]
        transposed = [_dense_lists([(k, q) for q, k in part], num_blocks[::-1], shape) for part in parts]
    else:
        # PyTorch 2.11 reads partial and full lists with one stride: give both one width
        ordered = _compact_lists(parts, num_blocks[0], shape)
        transposed = _compact_lists([[_transposed(q, k) for q, k in part] for part in parts], num_blocks[1], shape)
    mask = BlockMask.from_kv_blocks(
        *ordered[0],
        *ordered[1],
        BLOCK_SIZE=block,
        mask_mod=mod,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )
    (mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices) = transposed
    return mask


def mask_of_tiles(found: Told, block: int, lengths: tuple[int, int], mod: MaskMod) -> BlockMask:
    """The BlockMask of tiles that were told on the device."""
    mask = BlockMask.from_kv_blocks(
        *found[:4],
        BLOCK_SIZE=(block, block),
        mask_mod=mod,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )
    mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices = found[4:]
    return mask


def _ragged(q_blks: Tensor, kv_blks: Tensor, block: tuple[int, int], lengths: tuple[int, int]) -> Tensor:
    return ((q_blks + 1) * block[0] > lengths[0]) | ((kv_blks + 1) * block[1] > lengths[1])


def _transposed(q_blks: Tensor, kv_blks: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.argsort(kv_blks, stable=True)
    return kv_blks[order], q_blks[order]


def _dense_lists(
    part: Sequence[tuple[Tensor, Tensor]], num_blocks: tuple[int, int], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Counts [B, H, rows] and columns [B, H, rows, cols]: live columns first, then the others, both ascending."""
    live = torch.zeros(len(part), *num_blocks, dtype=torch.int8, device=part[0][0].device)
    for place, (rows, columns) in enumerate(part):
        live[place, rows, columns] = 1
    counts = live.sum(-1, dtype=torch.int32)
    columns = torch.argsort(live, dim=-1, descending=True, stable=True).to(torch.int32)
    return counts.reshape(*shape, -1), columns.reshape(*shape, *num_blocks).contiguous()


def _compact_lists(
    parts: Sequence[Sequence[tuple[Tensor, Tensor]]], num_rows: int, shape: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """Counts and columns of the live tiles alone, all of one width; unused places hold column 0."""
    counts = [[torch.bincount(rows, minlength=num_rows) for rows, _ in part] for part in parts]
    width = max(1, *(int(count.max()) for part in counts for count in part))
    lists = []
    for part, part_counts in zip(parts, counts, strict=True):
        columns = torch.zeros(len(part), num_rows, width, dtype=torch.int32, device=part[0][0].device)
        for place, ((rows, kv_blks), count) in enumerate(zip(part, part_counts, strict=True)):
            starts = count.cumsum(0) - count
            columns[place, rows, torch.arange(len(rows), device=rows.device) - starts[rows]] = kv_blks.to(torch.int32)
        counted = torch.stack(list(part_counts)).to(torch.int32)
        lists.append((counted.reshape(*shape, -1), columns.reshape(*shape, num_rows, width)))
    return lists


Attend: TypeAlias = Callable[..., Any]


def compiled_flex() -> Attend:
    """A compiled flex_attention of its own for one program.

    torch.compile counts recompilations per code object and, past its limit, would silently run the dense eager path;
    a copy of the code keeps programs from using up each other's limit, and fullgraph turns what is left into an error.
    """
    copied = FunctionType(_attend.__code__.replace(), globals(), "attend")
    compiled: Attend = torch.compile(copied, dynamic=False, fullgraph=True)
    return compiled


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    gqa: bool,
    lse: bool,
    options: dict[str, int] | None,
    score_mod: ScoreMod | None = None,
) -> Any:
    attend: Any = flex_attention  # its overloads take no plain bool
    return attend(
        query, key, value, score_mod, mask, scale=scale, enable_gqa=gqa, return_lse=lse, kernel_options=options
    )


_EVERYDAY: Any = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


@contextmanager
def with_derivatives() -> Iterator[None]:
    """Records what FlexAttention does, inside an operator too: there autograd is switched off below `enable_grad`."""
    with torch._C._ForceDispatchKeyGuard(*_EVERYDAY), torch.enable_grad():
        yield


def _options(mask: BlockMask) -> dict[str, int] | None:
    """Kernel tiles that divide the blocks of the mask; PyTorch's own choice where those are large."""
    small = min(mask.BLOCK_SIZE)
    return None if small >= 128 else {f"fwd_{name}": small for name in ("BLOCK_M", "BLOCK_N")}


def flex(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    *,
    scale: float,
    want_lse: bool,
    score_mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, Tq, Dv] and lse [B, Hq, Tq] (None unless wanted). Empty rows yield 0.

    attend: the program's `compiled_flex()`. Raises InputError (E505) for what FlexAttention cannot do: gradients and
    lse on the CPU, float64, tensors without elements.
    """
    if query.dtype == torch.float64:
        raise input_error("E505", "FlexAttention has no float64", "use backend='gathered'")
    if not query.numel() * key.numel() * value.numel():
        raise input_error("E505", "FlexAttention has no tensors without elements", "use backend='gathered'")
    if query.device.type == "cpu":
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise input_error("E505", "FlexAttention has no gradients on the CPU", "use backend='gathered'")
        if want_lse:
            raise input_error("E505", "FlexAttention returns no lse on the CPU", "use backend='gathered'")
        # it refuses parameters there, gradients or not
        query, key, value = query.detach(), key.detach(), value.detach()
    with torch.autocast(query.device.type, enabled=False):
        shared = query.shape[1] != key.shape[1]
        options = _options(mask) if query.device.type == "cuda" else None
        result = attend(query, key, value, mask, scale, shared, want_lse, options, score_mod)
    if not want_lse:
        return cast("Tensor", result), None
    output, lse = result
    return output, lse
