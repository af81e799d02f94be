"""The kernels of hashing: the directions that keys are nearest to, in all rounds, without projections in memory.

A program has a block of keys of one head, and reads them once. Directions of a seed on the device are drawn there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import load_rows, load_tile


@triton.jit
def nearest_direction(
    x, directions, dim: tl.constexpr, padded: tl.constexpr, number: tl.constexpr, number_padded: tl.constexpr,
):  # fmt: skip
    """For each row of x the direction of [dim, number] that is nearest to it; `number` more where its opposite is."""
    channels = tl.arange(0, padded)
    columns = tl.arange(0, number_padded)
    there = (channels < dim)[:, None] & (columns < number)[None, :]
    rotation = tl.load(directions + channels[:, None] * number + columns[None, :], mask=there, other=0.0)
    products = tl.dot(x, rotation, input_precision="tf32x3")
    lengths = tl.where(products != products, float("inf"), tl.abs(products))  # NaN counts as the largest
    best = tl.argmax(tl.where((columns < number)[None, :], lengths, -1.0), 1)
    of_best = tl.sum(tl.where(columns[None, :] == best[:, None], products, 0.0), 1)
    return best + tl.where(of_best < 0, number, 0)


@triton.jit(do_not_specialize=["length", "rounds"])
def hash_kernel(
    key, first_directions, second_directions, label, kb, kh, kl, length, rounds,
    dim: tl.constexpr, padded: tl.constexpr, first_number: tl.constexpr, second_number: tl.constexpr,
    first_padded: tl.constexpr, second_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys, heads, batch rows). second_number: 0 where one rotation is all."""
    first = tl.program_id(0) * block
    head = tl.program_id(1)
    row = tl.program_id(2)
    rows = load_rows(label, 0, 0, row, head, first, length, block, False, False)
    x = load_tile(key, kb, kh, kl, row, head, first, rows, block, dim, padded, False, False).to(tl.float32)
    of_head = (row.to(tl.int64) * tl.num_programs(1) + head) * rounds
    for turn in range(rounds):
        rotation = head * rounds + turn
        found = nearest_direction(
            x, first_directions + rotation * (dim * first_number), dim, padded, first_number, first_padded
        )
        if second_number > 0:
            found = found * (2 * second_number) + nearest_direction(
                x, second_directions + rotation * (dim * second_number), dim, padded, second_number, second_padded
            )
        at = label + (of_head + turn) * length + rows
        tl.store(at, found.to(label.dtype.element_ty), mask=rows >= 0)


@triton.jit
def _mixed(x):
    x += -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(bits):
    """In (0, 1), of 53 bits."""
    return (((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) + 0.5) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["turn", "number"])
def draw_kernel(seed, into, turn, number, block: tl.constexpr):
    """So many normal numbers of 2 * seed + turn, as `learn.lsh.normal` draws them. Grid: (blocks)."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    start = _mixed(tl.load(seed) * 2 + turn)
    first, second = _uniform(_mixed(start + at)), _uniform(_mixed(start + at + number))
    found = tl.sqrt(-2.0 * tl.log(first)) * tl.cos(6.283185307179586 * second)
    tl.store(into + at, found.to(tl.float32), mask=at < number)
