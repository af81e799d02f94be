"""How are packed and padded batches said? As inputs: the document of each position, and which positions are there."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.diagnostics import InputError, input_error
from patterndsl.sema.parameters import MAX_SIZE, counted


def documents(cu_seqlens: Tensor, n: int) -> Tensor:
    """int64 [n], or [B, n]: the number of the document that each position is in, for `same(doc)`.

    cu_seqlens: int [documents + 1] or [B, documents + 1], where documents start and the last one ends, from 0 on, as
    FlashAttention's varlen functions take them; equal neighbours are documents without tokens. Positions behind the end
    are one more document, which nothing else attends. Raises InputError (E502) on another shape or dtype, and on starts
    that do not ascend from 0 or end behind n, which is not looked at on a GPU: it would have to wait.
    Work: O(n log documents).
    """
    n = counted("n", n, 0, MAX_SIZE)
    starts = _checked("cu_seqlens", cu_seqlens, "[documents + 1] or [B, documents + 1], from 0 on and ascending")
    if starts.device.type == "cpu" and bool((starts[..., 0] != 0).any() | (starts.diff() < 0).any()):
        raise _misfit("cu_seqlens", "does not ascend from 0", "[0, length, length + length, ...]")
    if starts.device.type == "cpu" and bool((starts[..., -1] > n).any()):
        last = int(starts[..., -1].max())
        raise _misfit(
            "cu_seqlens", f"ends at {last:,}, behind the {n:,} positions", f"whose rows end at {n:,} or before"
        )
    positions = torch.arange(n, device=starts.device).expand(*starts.shape[:-1], n).contiguous()
    return torch.searchsorted(starts.contiguous(), positions, right=True) - 1


def present(lengths: Tensor, n: int) -> Tensor:
    """bool [B, n]: which positions are before the end of their row, for `k.there` of an input `bool[Nk]`.

    lengths: int [B], the number of tokens of each row that are no padding. Raises InputError (E502), also on lengths
    below 0 or above n, which are not looked at on a GPU: it would have to wait.
    """
    n = counted("n", n, 0, MAX_SIZE)
    found = _checked("lengths", lengths, "[B]")
    if found.dim() != 1:
        raise _misfit("lengths", f"has shape {list(found.shape)}", "[B]")
    if found.device.type == "cpu" and bool(((found < 0) | (found > n)).any()):
        wrong = int(found[(found < 0) | (found > n)][0])
        raise _misfit("lengths", f"has {wrong:,}, of {n:,} positions", f"[B] of numbers from 0 to {n:,}")
    return torch.arange(n, device=found.device) < found[:, None]


def _checked(name: str, values: Tensor, form: str) -> Tensor:
    if not isinstance(values, Tensor):
        raise _misfit(name, f"is {type(values).__name__}", form)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise _misfit(name, f"has dtype {str(values.dtype).removeprefix('torch.')}", form)
    if values.dim() not in (1, 2) or not values.shape[-1]:
        raise _misfit(name, f"has shape {list(values.shape)}", form)
    return values.long()


def _misfit(name: str, problem: str, form: str) -> InputError:
    return input_error("E502", f"{name} {problem}", f"give an integer tensor {form}")
