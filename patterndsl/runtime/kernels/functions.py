"""What do generated predicates call? Floored division, roots and lookups, on vectors of positions.

Each is the meaning that `ir.meaning` gives it, and equal to it on every argument inside its domain.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_div(x, y):
    """x // y for y > 0."""
    return x // y - tl.where(x % y < 0, 1, 0)


@triton.jit
def floor_mod(x, y):
    """x % y for y > 0."""
    rest = x % y
    return tl.where(rest < 0, rest + y, rest)


@triton.jit
def inside(x, stop):
    """0 <= x and x < stop, for 0 <= stop < 2^31: what is negative is large as an unsigned number."""
    if x.dtype == tl.int64:
        unsigned = x.to(tl.uint64)
    else:
        unsigned = x.to(tl.uint32)
    return unsigned < stop


@triton.jit
def integer_root(x):
    """floor(sqrt(x)) for 0 <= x < 2^62, bit by bit."""
    wide = x.to(tl.int64)
    root = wide * 0
    for turn in tl.static_range(31):
        trial = root + (1 << (30 - turn))
        root = tl.where(trial * trial <= wide, trial, root)
    return root


@triton.jit
def integer_log2(x):
    """floor(log2(x)) for 1 <= x < 2^62."""
    wide = x.to(tl.int64)
    found = wide * 0
    for bit in tl.static_range(1, 62):
        found += tl.where((wide >> bit) > 0, 1, 0)
    return found


@triton.jit
def read(table, length, first, index):
    """table[first + index]; -1 where the index is outside 0..length."""
    inside = (index >= 0) & (index < length)
    return tl.load(table + first + tl.where(inside, index, 0), mask=inside, other=-1)


@triton.jit
def drawn(table, num_rows, first, q, k, count: tl.constexpr):
    """Whether k is among the keys of row q of a table [num_rows, count]."""
    found = (k < 0) & (q < 0)
    for turn in tl.static_range(count):
        inside = (q >= 0) & (q < num_rows)
        key = tl.load(table + first + tl.where(inside, q, 0) * count + turn, mask=inside, other=-1)
        found |= key == k
    return found & (k >= 0)


@triton.jit
def listed(table, length, first, row, key, width: tl.constexpr):
    """Whether the key is among the values of a row of a table of rows of this width."""
    found = (key < 0) & (row < 0)
    for turn in tl.static_range(width):
        found |= read(table, length, first, row * width + turn) == key
    return found & (row >= 0) & (key >= 0)


@triton.jit
def is_first(bits, words, row_stride, head_stride, row, head, q, k, route):
    """Whether no route before `route` has both positions. bits: of each position so many words, in which bit r % 32 of
    word r // 32 says whether it is in route r; nothing is said of positions below 0."""
    first = bits + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    route = route.to(tl.int32)
    one = route * 0 + 1
    both = ((q + k) * 0).to(tl.int32)
    for word in range(words):
        before = tl.where(word < route // 32, -1, tl.where(word == route // 32, (one << (route % 32)) - 1, 0))
        of_q = tl.load(first + q.to(tl.int64) * words + word, mask=q >= 0, other=0)
        of_k = tl.load(first + k.to(tl.int64) * words + word, mask=k >= 0, other=0)
        both |= of_q & of_k & before
    return both == 0
