"""How are causal sums of features computed on a GPU that are given as logarithms, of any size?

As in `sum_kernels`, but each state has a shift for each feature, the largest logarithm of its keys, and chunks are
short. A row sees the state before its chunk by a product of matrices, and the keys of its chunk one by one, with the
largest exponent that it has seen as its own shift: so no number that depends on a later key goes into a row, but times
0, and no weight is lost beside another. In the backward pass each exponent is of a weight divided by its row's sum, so
at most 0: rows keep the logarithms of their sums, and what later rows ask of a feature has a shift too.

Behind the last row and feature logarithms are read as -inf. The plain twin is `causal`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.score.sum_kernels import _leave_state, _load, _numbers, _state_at, _store


@triton.jit
def _finite(x):
    """x, and 0 where it is -inf: -inf less -inf would be no number."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _logs(x, first, stride, count, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """[block, padded] in float32, of rows from `first` on."""
    rows, channels = tl.arange(0, block), tl.arange(0, padded)
    live = (rows < count)[:, None] & (channels < width)[None, :]
    at = x + first.to(tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    return tl.load(at, mask=live, other=-float("inf")).to(tl.float32)


@triton.jit
def _row(x, place, stride, other: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """[padded] in float32: one row."""
    channels = tl.arange(0, padded)
    at = x + place.to(tl.int64) * stride + channels
    return tl.load(at, mask=channels < width, other=other).to(tl.float32)


@triton.jit
def _shift_at(shifts, place, dim: tl.constexpr, padded: tl.constexpr):
    rows = tl.arange(0, padded)
    return tl.load(shifts + place.to(tl.int64) * dim + rows, mask=rows < dim, other=-float("inf"))


@triton.jit
def _leave_shift(shifts, place, shift, dim: tl.constexpr, padded: tl.constexpr):
    rows = tl.arange(0, padded)
    tl.store(shifts + place.to(tl.int64) * dim + rows, shift, mask=rows < dim)


@triton.jit
def _added(state, share, shift, logs, values, weights, precision: tl.constexpr):
    """A state with rows of logarithms [block, M], values [block, Dv], and what is added to the shares [block]."""
    higher = tl.maximum(shift, tl.max(logs, 0))
    base = _finite(higher)
    shrink = tl.exp(shift - base)
    made = tl.exp(logs - base[None, :])
    state = tl.dot(tl.trans(made), values, state * shrink[:, None], input_precision=precision)
    return state, share * shrink + tl.sum(made * weights[:, None], 0), higher


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def segment_log_kernel(
    key, value, states, shares, shifts, kb, kh, kl, vb, vh, vl, length, chunks, num_segments, heads,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The state of each segment by itself."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    key += row * kb + head * kh
    value += row * vb + head * vh
    state = tl.zeros([padded, value_padded], tl.float32)
    share = tl.zeros([padded], tl.float32)
    shift = tl.full([padded], -float("inf"), tl.float32)
    ones = tl.full([block], 1.0, tl.float32)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block))):
        first = chunk * block
        count = tl.minimum(length - first, block)
        k = _logs(key, first, kl, count, block, dim, padded)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(tl.float32)
        state, share, shift = _added(state, share, shift, k, v, ones, precision)
    _leave_state(states, shares, tl.program_id(0), state, share, dim, value_dim, padded, value_padded)
    _leave_shift(shifts, tl.program_id(0), shift, dim, padded)


@triton.jit(do_not_specialize=["num_segments"])
def scan_log_kernel(
    states, shares, shifts, start, start_share, start_shift, whole, whole_share, whole_shift, num_segments,
    starts: tl.constexpr, is_backward: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Makes of the states [B * H, segments, M, Dv] those of all segments before each, or behind it, in place.

    start: what comes before the first, whole: that with all. A program takes `block` features.
    """
    place = tl.program_id(0)
    features = tl.program_id(1) * block + tl.arange(0, block)
    channels = tl.arange(0, value_padded)
    live = features < dim
    cells = live[:, None] & (channels < value_dim)[None, :]
    inside = features[:, None] * value_dim + channels[None, :]
    known = tl.zeros([block, value_padded], tl.float32)
    share = tl.zeros([block], tl.float32)
    shift = tl.full([block], -float("inf"), tl.float32)
    mine = place.to(tl.int64) * dim
    if starts:
        known = tl.load(start + mine * value_dim + inside, mask=cells, other=0.0)
        share = tl.load(start_share + mine + features, mask=live, other=0.0)
        shift = tl.load(start_shift + mine + features, mask=live, other=-float("inf"))
    for turn in tl.range(0, num_segments):
        segment = turn
        if is_backward:
            segment = num_segments - 1 - turn
        at = (place.to(tl.int64) * num_segments + segment) * dim
        own = tl.load(states + at * value_dim + inside, mask=cells, other=0.0)
        own_share = tl.load(shares + at + features, mask=live, other=0.0)
        own_shift = tl.load(shifts + at + features, mask=live, other=-float("inf"))
        tl.debug_barrier()  # threads that hold the same number have all read it before one of them writes
        tl.store(states + at * value_dim + inside, known, mask=cells)
        tl.store(shares + at + features, share, mask=live)
        tl.store(shifts + at + features, shift, mask=live)
        higher = tl.maximum(shift, own_shift)
        shrink = tl.exp(shift - _finite(higher))
        own_shrink = tl.exp(own_shift - _finite(higher))
        known = known * shrink[:, None] + own * own_shrink[:, None]
        share = share * shrink + own_share * own_shrink
        shift = higher
    tl.store(whole + mine * value_dim + inside, known, mask=cells)
    tl.store(whole_share + mine + features, share, mask=live)
    tl.store(whole_shift + mine + features, shift, mask=live)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def row_log_kernel(
    query, key, value, out, norms, states, shares, shifts, qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol,
    length, chunks, num_segments, heads,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The output of each row. norms: [B * H, T], the logarithm of its sum of weights, +inf where there is no key."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    query += row * qb + head * qh
    key += row * kb + head * kh
    value += row * vb + head * vh
    out += row * ob + head * oh
    norms += place.to(tl.int64) * length
    state, share = _state_at(states, shares, tl.program_id(0), dim, value_dim, padded, value_padded)
    shift = _shift_at(shifts, tl.program_id(0), dim, padded)
    ones = tl.full([block], 1.0, tl.float32)
    rows = tl.arange(0, block)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block))):
        first = chunk * block
        count = tl.minimum(length - first, block)
        q = _logs(query, first, ql, count, block, dim, padded)
        exponents = q + shift[None, :]
        top = tl.max(exponents, 1)
        asked = tl.exp(exponents - _finite(top)[:, None])
        acc = tl.dot(asked, state, input_precision=precision)
        total = tl.sum(asked * share[None, :], 1)
        for turn in range(count):
            k_row = _row(key, first + turn, kl, -float("inf"), dim, padded)
            v_row = _row(value, first + turn, vl, 0.0, value_dim, value_padded)
            exponents = tl.where((rows >= turn)[:, None], q + k_row[None, :], -float("inf"))
            higher = tl.maximum(top, tl.max(exponents, 1))
            base = _finite(higher)
            weight = tl.sum(tl.exp(exponents - base[:, None]), 1)
            shrink = tl.exp(top - base)
            acc = acc * shrink[:, None] + weight[:, None] * v_row[None, :]
            total = total * shrink + weight
            top = higher
        empty = total == 0.0
        safe = tl.where(empty, 1.0, total)
        _store(out, first, ol, count, acc / safe[:, None], block, value_dim, value_padded)
        tl.store(norms + first + rows, tl.where(empty, float("inf"), top + tl.log(safe)), mask=rows < count)
        k = _logs(key, first, kl, count, block, dim, padded)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(tl.float32)
        state, share, shift = _added(state, share, shift, k, v, ones, precision)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def query_log_kernel(
    query, key, value, out, grad_out, grad_query, norms, deltas, states, shares, shifts,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, gb, gh, gl, db, dh, dl, length, chunks, num_segments, heads,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries' logarithms. deltas: [B * H, T], of output and its gradient, written for others."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    query += row * qb + head * qh
    key += row * kb + head * kh
    value += row * vb + head * vh
    out += row * ob + head * oh
    grad_out += row * gb + head * gh
    grad_query += row * db + head * dh
    norms += place.to(tl.int64) * length
    deltas += place.to(tl.int64) * length
    state, share = _state_at(states, shares, tl.program_id(0), dim, value_dim, padded, value_padded)
    shift = _shift_at(shifts, tl.program_id(0), dim, padded)
    ones = tl.full([block], 1.0, tl.float32)
    rows = tl.arange(0, block)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block))):
        first = chunk * block
        count = tl.minimum(length - first, block)
        q = _logs(query, first, ql, count, block, dim, padded) - _numbers(norms, first, count, block)[:, None]
        grad = _load(grad_out, first, gl, count, block, value_dim, value_padded).to(tl.float32)
        known = _load(out, first, ol, count, block, value_dim, value_padded).to(tl.float32)
        delta = tl.sum(grad * known, 1)
        tl.store(deltas + first + rows, delta, mask=rows < count)
        found = tl.dot(grad, tl.trans(state), input_precision=precision) - delta[:, None] * share[None, :]
        found = found * tl.exp(q + shift[None, :])
        for turn in range(count):
            k_row = _row(key, first + turn, kl, -float("inf"), dim, padded)
            v_row = _row(value, first + turn, vl, 0.0, value_dim, value_padded)
            of_weight = tl.where(rows >= turn, tl.sum(grad * v_row[None, :], 1) - delta, 0.0)
            exponents = tl.where((rows >= turn)[:, None], q + k_row[None, :], -float("inf"))
            found += tl.exp(exponents) * of_weight[:, None]
        _store(grad_query, first, dl, count, found, block, dim, padded)
        k = _logs(key, first, kl, count, block, dim, padded)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(tl.float32)
        state, share, shift = _added(state, share, shift, k, v, ones, precision)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def asked_log_kernel(
    query, grad_out, norms, deltas, states, shares, shifts, qb, qh, ql, gb, gh, gl, length, chunks, num_segments, heads,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """What the rows of each segment ask of each feature, divided by their sums of weights."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    query += row * qb + head * qh
    grad_out += row * gb + head * gh
    norms += place.to(tl.int64) * length
    deltas += place.to(tl.int64) * length
    state = tl.zeros([padded, value_padded], tl.float32)
    share = tl.zeros([padded], tl.float32)
    shift = tl.full([padded], -float("inf"), tl.float32)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block))):
        first = chunk * block
        count = tl.minimum(length - first, block)
        q = _logs(query, first, ql, count, block, dim, padded) - _numbers(norms, first, count, block)[:, None]
        grad = _load(grad_out, first, gl, count, block, value_dim, value_padded).to(tl.float32)
        delta = _numbers(deltas, first, count, block)
        state, share, shift = _added(state, share, shift, q, grad, -delta, precision)
    _leave_state(states, shares, tl.program_id(0), state, share, dim, value_dim, padded, value_padded)
    _leave_shift(shifts, tl.program_id(0), shift, dim, padded)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def key_log_kernel(
    query, key, value, grad_out, grad_key, grad_value, norms, deltas, states, shares, shifts,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, gb, gh, gl, db, dh, dl, eb, eh, el, length, chunks, num_segments, heads,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys' logarithms and of values, chunk by chunk from the end."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    query += row * qb + head * qh
    key += row * kb + head * kh
    value += row * vb + head * vh
    grad_out += row * gb + head * gh
    grad_key += row * db + head * dh
    grad_value += row * eb + head * eh
    norms += place.to(tl.int64) * length
    deltas += place.to(tl.int64) * length
    state, share = _state_at(states, shares, tl.program_id(0), dim, value_dim, padded, value_padded)
    shift = _shift_at(shifts, tl.program_id(0), dim, padded)
    rows = tl.arange(0, block)
    start = segment * chunks
    stop = tl.minimum(start + chunks, tl.cdiv(length, block))
    for turn_of_chunk in tl.range(start, stop):
        first = (stop - 1 - (turn_of_chunk - start)) * block
        count = tl.minimum(length - first, block)
        k = _logs(key, first, kl, count, block, dim, padded)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(tl.float32)
        made = tl.exp(k + shift[None, :])
        of_keys = (tl.dot(v, tl.trans(state), input_precision=precision) + share[None, :]) * made
        of_values = tl.dot(made, state, input_precision=precision)
        for turn in range(count):
            norm = tl.load(norms + first + turn)
            q_row = _row(query, first + turn, ql, -float("inf"), dim, padded) - norm
            grad_row = _row(grad_out, first + turn, gl, 0.0, value_dim, value_padded)
            delta = tl.load(deltas + first + turn)
            of_weight = tl.where(rows <= turn, tl.sum(v * grad_row[None, :], 1) - delta, 0.0)
            weights = tl.exp(tl.where((rows <= turn)[:, None], k + q_row[None, :], -float("inf")))
            of_keys += weights * of_weight[:, None]
            of_values += tl.sum(weights, 1)[:, None] * grad_row[None, :]
        _store(grad_key, first, dl, count, of_keys, block, dim, padded)
        _store(grad_value, first, el, count, of_values, block, value_dim, value_padded)
        q = _logs(query, first, ql, count, block, dim, padded) - _numbers(norms, first, count, block)[:, None]
        grad = _load(grad_out, first, gl, count, block, value_dim, value_padded).to(tl.float32)
        state, share, shift = _added(
            state, share, shift, q, grad, -_numbers(deltas, first, count, block), precision
        )  # fmt: skip
