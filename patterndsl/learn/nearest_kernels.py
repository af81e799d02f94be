"""The kernels of k-means: labels and members of centroids, and the commitment to them, without scores in memory.

Members are found by bounds. A chunk is some tokens in a row. The w chunks whose highest scores are highest hold the w
tokens that score highest, since any token elsewhere has w before it, one in each of these chunks. That is exact with
ties too, if both the chunks and the tokens before others of the same score are the earlier ones. So scores are made
twice, but the second time of w chunks only.

The second scores are sums in another order, and may round otherwise. They are compared with each other alone: there are
always w members, and if every score is off by e at most, none that is left out scores more than 4 e above one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHORTEST = tl.constexpr(1e-12)
"""Lengths are divided by this at least, as torch.nn.functional.normalize does it."""
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def split_kernel(x, parts, count, is_brief: tl.constexpr, block: tl.constexpr):
    """Writes float32 numbers as sums: of three in bfloat16, or of two that TF32 holds; parts: [3 or 2, count]."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = at < count
    number = tl.load(x + at, mask=there, other=0.0)
    if is_brief:
        for turn in tl.static_range(3):
            part = number.to(tl.bfloat16)
            tl.store(parts + at + turn * count, part, mask=there)
            number -= part.to(tl.float32)
    else:
        high = high_bits(number)
        tl.store(parts + at, high, mask=there)
        tl.store(parts + at + count, number - high, mask=there)


@triton.jit
def high_bits(x):
    """What TF32 holds of float32 numbers."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(
    key, row_stride, head_stride, stride, row, head, rows, live, dim: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """[rows, padded] of key [B, H, T, dim], zeros where no row is live."""
    channels = tl.arange(0, padded)
    start = key + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
    at = start + (rows.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(at, mask=live[:, None] & (channels < dim)[None, :], other=0.0)


@triton.jit
def inverse_lengths(x):
    """1 / length of rows of float32, and of which rows that is a number: NaN, infinity and overflow have none."""
    square = tl.sum(x * x, 1)
    has_length = square < float("inf")
    return 1 / tl.maximum(tl.sqrt(tl.where(has_length, square, 0.0)), SHORTEST), has_length


@triton.jit
def nearest_kernel(
    key, parts, labels, maxima, row_stride, head_stride, stride, length, clusters, num_chunks,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, tile: tl.constexpr, chunk: tl.constexpr,
    is_brief: tl.constexpr, is_whole: tl.constexpr, even: tl.constexpr, wants_maxima: tl.constexpr,
):  # fmt: skip
    """The label of each of a block of keys, and the highest score of each of its chunks for each centroid.

    Grid: (blocks of keys, heads, batch rows). parts: of the centroids [H, clusters, dim], by `split_kernel`. maxima:
    float32 [B, H, clusters, num_chunks]. is_brief: keys are bfloat16; is_whole: they are float32, and split here.
    even: clusters are whole tiles.
    """
    first = tl.program_id(0) * block
    head = tl.program_id(1)
    row = tl.program_id(2)
    rows = first + tl.arange(0, block)
    there = rows < length
    x = load_keys(key, row_stride, head_stride, stride, row, head, rows, there, dim, padded)
    inverse, has_length = inverse_lengths(x.to(tl.float32))
    x = tl.where(has_length[:, None], x, 0.0)
    if not is_brief:
        x = x.to(tl.float32)
    x = tl.trans(x)
    if is_whole:
        rest = x - high_bits(x)
        x = high_bits(x)
    of_rest = tl.where(there, 0.0, -float("inf"))
    best = tl.full([tile, block], -float("inf"), tl.float32)
    of_best = tl.zeros([tile, block], tl.int32)
    numbers = tl.arange(0, tile)
    channels = tl.arange(0, padded)
    part_size = tl.num_programs(1).to(tl.int64) * clusters * dim
    of_head = row.to(tl.int64) * tl.num_programs(1) + head
    for start in range(0, clusters, tile):
        live = start + numbers < clusters
        at = parts + (head.to(tl.int64) * clusters + start + numbers)[:, None] * dim + channels[None, :]
        mask = live[:, None] & (channels < dim)[None, :]
        c0 = load_part(at, mask, even and dim == padded)
        c1 = load_part(at + part_size, mask, even and dim == padded)
        if is_brief:
            c2 = load_part(at + 2 * part_size, mask, even and dim == padded)
            scores = tl.dot(c0, x, tl.dot(c1, x, tl.dot(c2, x)))
        elif is_whole:
            scores = tl.dot(c1, x, tl.dot(c0, rest, input_precision="tf32"), input_precision="tf32")
            scores = tl.dot(c0, x, scores, input_precision="tf32")
        else:
            scores = tl.dot(c0, x, tl.dot(c1, x, input_precision="tf32"), input_precision="tf32")
        if not even:
            scores = tl.where(live[:, None], scores, -float("inf"))
        is_better = scores > best
        best = tl.where(is_better, scores, best)
        of_best = tl.where(is_better, start, of_best)
        if wants_maxima:
            scores = scores * inverse[None, :] + of_rest[None, :]
            highest = tl.max(tl.reshape(scores, [tile, block // chunk, chunk]), 2)
            chunks = tl.program_id(0) * (block // chunk) + tl.arange(0, block // chunk)
            into = maxima + (of_head * clusters + start + numbers)[:, None] * num_chunks + chunks[None, :]
            tl.store(into, highest, mask=live[:, None] & (chunks < num_chunks)[None, :])
    among = tl.where(best == tl.max(best, 0)[None, :], of_best + numbers[:, None], clusters)
    label = tl.minimum(tl.min(among, 0), clusters - 1)  # a centroid of NaN is nearest to nothing
    tl.store(labels + of_head * length + rows, label.to(tl.int64), mask=there)


@triton.jit
def load_part(at, mask, even: tl.constexpr):
    if even:
        part = tl.load(at)
    else:
        part = tl.load(at, mask=mask, other=0.0)
    return part


@triton.jit
def in_order(x, live):
    """int32 that are ordered as float32 numbers are, equal where these are; the lowest of all where none is live, and
    NaN next to it."""
    x = tl.where(x == x, x, -float("inf"))
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(live, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), LOWEST)


@triton.jit
def highest_places(x, live, number):
    """Which of x [n] are its `number` highest, the earlier of equal ones, and how many of them are before each. live:
    what counts, `number` at least. n: below 2^15."""
    order = in_order(x, live)
    high = tl.max(order, 0) + 1  # fewer than `number` are as high
    low = tl.min(tl.where(live, order, high), 0)  # so many are at least
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)
        count = tl.sum((order >= middle).to(tl.int32), 0)
        low = tl.where(count > number, middle, tl.where(count == number, middle - 1, low))
        high = tl.where(count > number, high, middle)
    is_above = (order >= high).to(tl.int32)
    is_equal = (order == low).to(tl.int32)
    missing = number - tl.sum(is_above, 0)
    both = is_above + (is_equal << 16)
    before = tl.cumsum(both, 0) - both
    equal_before = before >> 16
    keep = (is_above > 0) | ((is_equal > 0) & (equal_before < missing))
    return keep, (before & 0xFFFF) + tl.minimum(equal_before, missing)


@triton.jit
def members_kernel(
    key, centroids, maxima, chosen, scores, members, row_stride, head_stride, stride,
    length, clusters, num_chunks, num_chosen, top,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, chunk: tl.constexpr,
    chunks_padded: tl.constexpr, scores_padded: tl.constexpr,
):  # fmt: skip
    """The tokens that point most to a centroid, int64 [B, H, clusters, top], ascending.

    Grid: (centroids, heads, batch rows). maxima: of `nearest_kernel`. num_chosen: chunks that hold them, `top` or all.
    chosen, scores: room for these chunks, int32 [B, H, clusters, num_chosen], and for the scores in them.
    """
    head = tl.program_id(1)
    row = tl.program_id(2)
    centroid = (row.to(tl.int64) * tl.num_programs(1) + head) * clusters + tl.program_id(0)
    chosen += centroid * num_chosen
    scores += centroid * num_chosen * chunk

    chunks = tl.arange(0, chunks_padded)
    is_chunk = chunks < num_chunks
    highest = tl.load(maxima + centroid * num_chunks + chunks, mask=is_chunk, other=0.0)
    keep, place = highest_places(highest, is_chunk, num_chosen)
    tl.store(chosen + place, chunks, mask=keep)
    tl.debug_barrier()  # threads read what others wrote

    channels = tl.arange(0, padded)
    c = tl.load(
        centroids + (head.to(tl.int64) * clusters + tl.program_id(0)) * dim + channels, mask=channels < dim, other=0.0
    )
    number = num_chosen * chunk
    for start in range(0, number, block):
        at = start + tl.arange(0, block)
        rows = tl.load(chosen + at // chunk, mask=at < number, other=0) * chunk + at % chunk
        there = (at < number) & (rows < length)
        x = load_keys(key, row_stride, head_stride, stride, row, head, rows, there, dim, padded).to(tl.float32)
        inverse, has_length = inverse_lengths(x)
        score = tl.sum(tl.where(has_length[:, None], x, 0.0) * c[None, :], 1) * inverse
        tl.store(scores + at, score, mask=there)
    tl.debug_barrier()

    at = tl.arange(0, scores_padded)
    rows = tl.load(chosen + at // chunk, mask=at < number, other=0) * chunk + at % chunk
    there = (at < number) & (rows < length)
    keep, place = highest_places(tl.load(scores + at, mask=there, other=0.0), there, top)
    tl.store(members + centroid * top + place, rows.to(tl.int64), mask=keep)


@triton.jit
def commitment_kernel(
    key, centroids, labels, sums, row_stride, head_stride, stride, length, clusters, weight,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The squared distances of a block of unit keys to their centroids, times weight; their sum in float32, one for a
    program. Grid: (blocks of keys, heads, batch rows)."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    x, _, inverse, c = load_committed(
        key, centroids, labels, row_stride, head_stride, stride, row, head, rows, length, clusters, dim, padded
    )
    away = x * inverse[:, None] - c
    program = (row * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + program, tl.sum(tl.sum(away * away, 1), 0) * weight)


@triton.jit
def commitment_gradient_kernel(
    key, centroids, labels, grad, grad_key, row_stride, head_stride, stride,
    grad_row_stride, grad_head_stride, grad_stride, length, clusters, weight,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradient of the keys. grad: float32, of the commitment, a scalar. Grid: as above."""
    head = tl.program_id(1)
    row = tl.program_id(2)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    x, length_of, inverse, c = load_committed(
        key, centroids, labels, row_stride, head_stride, stride, row, head, rows, length, clusters, dim, padded
    )
    unit = x * inverse[:, None]
    of_unit = (unit - c) * (2 * weight * tl.load(grad))
    along = tl.where(length_of < SHORTEST, 0.0, tl.sum(unit * of_unit, 1))  # what is shorter is not made longer
    of_key = (of_unit - unit * along[:, None]) * inverse[:, None]
    channels = tl.arange(0, padded)
    start = grad_key + row.to(tl.int64) * grad_row_stride + head.to(tl.int64) * grad_head_stride
    at = start + (rows.to(tl.int64) * grad_stride)[:, None] + channels[None, :]
    tl.store(at, of_key.to(grad_key.dtype.element_ty), mask=(rows < length)[:, None] & (channels < dim)[None, :])


@triton.jit
def load_committed(
    key, centroids, labels, row_stride, head_stride, stride, row, head, rows, length, clusters,
    dim: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Keys in float32, their lengths, the factors that make them unit ones, and their centroids; zeros behind the
    last. NaN and infinity stay."""
    there = rows < length
    x = load_keys(key, row_stride, head_stride, stride, row, head, rows, there, dim, padded).to(tl.float32)
    length_of = tl.sqrt(tl.sum(x * x, 1))
    inverse = 1 / tl.where(length_of < SHORTEST, SHORTEST, length_of)
    label = tl.load(labels + (row.to(tl.int64) * tl.num_programs(1) + head) * length + rows, mask=there, other=0)
    channels = tl.arange(0, padded)
    at = centroids + (head.to(tl.int64) * clusters + label)[:, None] * dim + channels[None, :]
    c = tl.load(at, mask=there[:, None] & (channels < dim)[None, :], other=0.0)
    return x, length_of, inverse, c
