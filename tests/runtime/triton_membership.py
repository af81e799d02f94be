"""The mask that a generated predicate has, by a kernel of one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patterndsl import Program
from patterndsl.runtime.data import checked_inputs
from patterndsl.runtime.kernels.asked import Asked, asked_of, draws_for


@triton.jit(do_not_specialize=["q_start", "q_len", "kv_len", "head", "numbers"])
def mask_kernel(kept, q_start, q_len, kv_len, head, numbers, tables, keep: tl.constexpr, block: tl.constexpr):
    q = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    k = tl.program_id(1) * block + tl.arange(0, block)[None, :]
    holds = keep(q + q_start, k, q, k, head, 0, numbers, tables)
    tl.store(kept + q * kv_len + k, tl.where(holds, 1, 0).to(tl.int8), mask=(q < q_len) & (k < kv_len))


def membership(program: Program, inputs: dict[str, Tensor], head: int) -> Tensor:
    """bool [q_len, kv_len]"""
    sizes, block = program.bound.sizes, 64
    given = checked_inputs(program.bound, inputs, program.device)
    relation = program.bound.relation
    asked = asked_of(relation, sizes, given, draws_for(relation, program.bound.num_heads, program.device))
    kept = torch.full((sizes.q_len, sizes.kv_len), -1, dtype=torch.int8, device=program.device)
    grid = triton.cdiv(sizes.q_len, block), triton.cdiv(sizes.kv_len, block)
    mask_kernel[grid](
        kept, sizes.q_start, sizes.q_len, sizes.kv_len, head, asked.numbers, asked.tables, keep=asked.keep, block=block
    )
    assert not (kept == -1).any()
    return kept == 1


@triton.jit
def hidden_kernel(out, of_tiles, numbers, tables, q_start, hide: tl.constexpr, block: tl.constexpr):
    """A tile of ones, hidden as its state says. of_tiles: head, first query, first key and state of each."""
    tile = of_tiles + tl.program_id(0) * 4
    inside = tl.arange(0, block)
    q, k = tl.load(tile + 1) + inside[:, None], tl.load(tile + 2) + inside[None, :]
    x = tl.full([block, block], 1.0, tl.float32)
    x = hide(x, -1.0, tl.load(tile + 3), q + q_start, k, q, k, tl.load(tile), 0, numbers, tables)
    tl.store(out + tl.program_id(0) * block * block + inside[:, None] * block + inside[None, :], x)


def hidden_by(asked: Asked, of_tiles: Tensor, out: Tensor) -> None:
    """Runs it on tiles of the size of out [tiles, block, block]."""
    hidden_kernel[(len(of_tiles),)](out, of_tiles, asked.numbers, asked.tables, asked.q_start, asked.keep, out.shape[1])
