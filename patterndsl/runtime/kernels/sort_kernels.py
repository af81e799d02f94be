"""The kernels of sorting by labels: how often each is in a block, where those of a block begin, and who stands there.

Counts are int32 [batch rows, heads, labels, blocks], so that a sum over all that comes before, in this order, is where
the first key of a block with a label belongs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import head_offset


@triton.jit(do_not_specialize=["length"])
def count_kernel(
    label, counts, lower, lb, lh, length, labels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks, heads, batch rows). lower: how many of a block have a lower label, where counts have its own."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    at = number * block + tl.arange(0, block)
    # behind the last key stand keys of the last label, which are not counted
    found = tl.load(label + head_offset(lb, lh, row, head) + at, mask=at < length, other=labels - 1).to(tl.int32)
    values = tl.arange(0, labels)
    count = tl.histogram(found, labels)
    missing = tl.maximum(number * block + block - length, 0)
    count -= tl.where(values == labels - 1, missing, 0)
    of_head = (row.to(tl.int64) * tl.num_programs(1) + head) * labels
    into = (of_head + values) * tl.num_programs(0) + number
    tl.store(counts + into, count)
    tl.store(lower + into, tl.cumsum(count, 0) - count)


@triton.jit(do_not_specialize=["number"])
def begin_kernel(counts, number, chunk: tl.constexpr):
    """The sum of all counts of a head before each of its `number`, in their place. Grid: (heads of all batch rows)."""
    first = counts + tl.program_id(0).to(tl.int64) * number
    before = tl.full([], 0, tl.int32)
    for start in range(0, number, chunk):
        at = start + tl.arange(0, chunk)
        count = tl.load(first + at, mask=at < number, other=0)
        tl.store(first + at, before + tl.cumsum(count, 0) - count, mask=at < number)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["length"])
def place_kernel(
    label, begins, lower, order, lb, lh, length, labels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Who stands at each place, int32 [batch rows, heads, length]. Grid: that of `count_kernel`."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    inside = tl.arange(0, block)
    at = number * block + inside
    found = tl.load(label + head_offset(lb, lh, row, head) + at, mask=at < length, other=labels).to(tl.int32)
    ordered = tl.sort(found * block + inside)
    found = ordered // block
    of_head = row.to(tl.int64) * tl.num_programs(1) + head
    there = (of_head * labels + found) * tl.num_programs(0) + number
    is_key = found < labels
    begin = tl.load(begins + there, mask=is_key, other=0)
    place = begin + inside - tl.load(lower + there, mask=is_key, other=0)
    tl.store(order + of_head * length + place, number * block + ordered % block, mask=is_key)
