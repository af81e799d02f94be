"""How do the kernels of Hopper meet tensors? As Triton's do in `launch`. All can be described, and are of one width.

Imported where `shapes` chooses these kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patterndsl.lower.blocks import ROWS, Pipeline
from patterndsl.runtime.kernels import hopper, hopper_backward
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.descriptors import as_seen
from patterndsl.runtime.kernels.memory import strides_of
from patterndsl.runtime.kernels.pipeline import descriptor
from patterndsl.runtime.kernels.work import Work


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    part_out: Tensor,
    part_lse: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    goes_on: bool,
) -> None:
    """Whole lists into out and lse, parts of lists into their slots."""
    q_len, dim = query.shape[2:]
    q, o, k, v = _described((query, out), (key, value), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper.attend(
        grid,
        (q, k, v, o, lse, part_out, part_lse, pieces, work.entries, borders),
        (*lse.stride(), q_len, key.shape[2], asked.q_start, query.shape[1] // key.shape[1]),
        {
            "hide": asked.keep, "kv_block": blocks.kv_block, "dim": dim, "consumers": blocks.consumers,
            "ring": blocks.ring, "ahead": blocks.ahead, "even": key.shape[2] % blocks.kv_block == 0,
            "goes_on": goes_on, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def _check_ring(blocks: Pipeline) -> None:
    assert blocks.ring >= hopper_backward.LEAST_RING, "a smaller ring would wait for itself"


def _dealt(
    work: Work, rows: int, blocks: Pipeline, device: torch.device
) -> tuple[tuple[int, int, int], Tensor, Tensor]:
    """As many programs as run at once, if there are so many pieces, and what each of them takes, see `Work.dealt`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = min(work.num_pieces * rows, blocks.programs * processors)
    return (programs, 1, 1), *work.dealt(rows, programs)


def gradient_of_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    delta: Tensor,
    grad_query: Tensor,
    part: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    has_grad_lse: bool,
    adds: bool,
) -> None:
    """Of whole lists into grad_query, of parts of lists into their slots."""
    _check_ring(blocks)
    q_len, dim = query.shape[2:]
    q, o, do, dq, k, v = _described((query, out, grad_out, grad_query), (key, value), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper_backward.of_queries(
        grid,
        (q, k, v, o, do, dq, lse, grad_lse, delta, grad_query, part, pieces, work.entries, borders),
        (
            *strides_of(grad_query), *lse.stride(), q_len, key.shape[2], asked.q_start,
            query.shape[1] // key.shape[1],
        ),
        {
            "hide": asked.keep, "kv_block": blocks.kv_block, "dim": dim, "consumers": blocks.consumers,
            "ring": blocks.ring, "ahead": blocks.ahead, "even": key.shape[2] % blocks.kv_block == 0,
            "has_grad_lse": has_grad_lse, "adds": adds, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def gradients_of_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    part_key: Tensor,
    part_value: Tensor,
    work: Work,
    rows: int,
    asked: Asked,
    scale: float,
    blocks: Pipeline,
    *,
    adds: bool,
) -> None:
    """The same of transposed lists, into grad_key and grad_value."""
    _check_ring(blocks)
    q_len, dim = query.shape[2:]
    k, v, dk, dv, q, do = _described((key, value, grad_key, grad_value), (query, grad_out), blocks)
    asked = asked.of_rests(work.rests)
    grid, pieces, borders = _dealt(work, rows, blocks, query.device)
    hopper_backward.of_keys(
        grid,
        (
            q, k, v, do, dk, dv, lse, delta, grad_key, grad_value, part_key, part_value, pieces, work.entries,
            borders,
        ),
        (
            *strides_of(grad_key, grad_value), *lse.stride(), q_len, key.shape[2], asked.q_start,
            -(-q_len // blocks.kv_block),
        ),
        {
            "hide": asked.keep, "kv_group": query.shape[1] // key.shape[1], "q_block": blocks.kv_block, "dim": dim,
            "consumers": blocks.consumers, "ring": blocks.ring, "ahead": blocks.ahead,
            "even": q_len % blocks.kv_block == 0, "adds": adds, "registers": blocks.of_consumers,
        },
        {"num_warps": 4, "maxnreg": blocks.registers}, asked=asked, scale=scale,
    )  # fmt: skip


def _described(owned: Sequence[Tensor], shared: Sequence[Tensor], blocks: Pipeline) -> Sequence[Any]:
    """Tensors of which consumers have tiles of their own, then those whose tiles they share, all of one width."""
    width = owned[0].shape[3]
    sizes = *((x, ROWS, width) for x in owned), *((x, blocks.kv_block, width) for x in shared)
    seen = as_seen(*sizes, make=descriptor)
    assert seen.described, "who chooses this kernel looks at its tensors"
    return seen.tensors
