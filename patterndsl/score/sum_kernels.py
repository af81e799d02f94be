"""How are causal sums computed on a GPU, forward and backward, each tensor read as seldom as possible?

The sequence is cut into segments, and these into chunks. One kernel sums up each segment, a scan makes of these the
state before each, and another kernel goes through a segment's chunks with that state in registers: no state of a chunk
is ever written. The backward pass goes twice through the keys: forward again for the gradient of queries, and from the
end for that of keys and values, by the sums of what later queries ask, which fade as states do. Features of one channel
each are made where a tensor was read.

A program is a segment of a batch row and head. All sums are in float32; `mm` is what products of matrices are made of:
bfloat16, or else float32, as sums of half precision would overflow. No number that depends on a later key goes into a
row, but times 0. The plain twin is `causal`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.score.features import RELU_FLOOR

FLOOR = tl.constexpr(RELU_FLOOR)


@triton.jit
def _load(x, first, stride, count, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """[block, padded]: rows from `first` on of x [.., width], zeros behind `count` of them."""
    rows, channels = tl.arange(0, block), tl.arange(0, padded)
    live = (rows < count)[:, None] & (channels < width)[None, :]
    at = x + first.to(tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    return tl.load(at, mask=live, other=0.0)


@triton.jit
def _store(x, first, stride, count, tile, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr):
    """Writes what `_load` would read."""
    rows, channels = tl.arange(0, block), tl.arange(0, padded)
    live = (rows < count)[:, None] & (channels < width)[None, :]
    at = x + first.to(tl.int64) * stride + rows[:, None] * stride + channels[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=live)


@triton.jit
def _numbers(x, first, count, block: tl.constexpr):
    """[block] of x, which is contiguous, zeros behind `count` of them."""
    rows = tl.arange(0, block)
    return tl.load(x + first + rows, mask=rows < count, other=0.0)


@triton.jit
def _features(tile, count, phi: tl.constexpr, block: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
              mm: tl.constexpr):  # fmt: skip
    """phi of a tile in mm, zeros behind `count` rows and `width` channels; see `features`."""
    if phi == "linear":
        made = tile.to(mm)
    else:
        wide = tile.to(tl.float32)
        if phi == "elu":
            wide = tl.where(wide > 0.0, wide + 1.0, tl.exp(wide))
        else:
            wide = tl.maximum(wide, 0.0) + FLOOR
        live = (tl.arange(0, block) < count)[:, None] & (tl.arange(0, padded) < width)[None, :]
        made = tl.where(live, wide, 0.0).to(mm)
    return made


@triton.jit
def _through_features(grad, tile, phi: tl.constexpr):
    """The gradient of a tile of that of its features."""
    if phi == "linear":
        found = grad
    else:
        wide = tile.to(tl.float32)
        if phi == "elu":
            found = grad * tl.where(wide > 0.0, 1.0, tl.exp(wide))
        else:
            found = tl.where(wide > 0.0, grad, 0.0)
    return found


@triton.jit
def _sum_of_row(total):
    """1 / total, 0 where a row's weights sum to 0: such rows are 0, and so are their gradients."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _state_at(states, shares, place, dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr,
              value_padded: tl.constexpr):  # fmt: skip
    """Sums [padded, value_padded] and [padded] of states [.., dim, value_dim] and shares [.., dim]."""
    rows, channels = tl.arange(0, padded), tl.arange(0, value_padded)
    live = (rows < dim)[:, None] & (channels < value_dim)[None, :]
    start = place.to(tl.int64) * (dim * value_dim)
    state = tl.load(states + start + rows[:, None] * value_dim + channels[None, :], mask=live, other=0.0)
    return state, tl.load(shares + place.to(tl.int64) * dim + rows, mask=rows < dim, other=0.0)


@triton.jit
def _leave_state(states, shares, place, state, share, dim: tl.constexpr, value_dim: tl.constexpr,
                 padded: tl.constexpr, value_padded: tl.constexpr):  # fmt: skip
    """Writes what `_state_at` would read."""
    rows, channels = tl.arange(0, padded), tl.arange(0, value_padded)
    live = (rows < dim)[:, None] & (channels < value_dim)[None, :]
    start = place.to(tl.int64) * (dim * value_dim)
    tl.store(states + start + rows[:, None] * value_dim + channels[None, :], state, mask=live)
    tl.store(shares + place.to(tl.int64) * dim + rows, share, mask=rows < dim)


@triton.jit
def _added(state, share, k, v, rate, count, decays: tl.constexpr, block: tl.constexpr, mm: tl.constexpr,
           precision: tl.constexpr):  # fmt: skip
    """A state with the keys of a chunk, of which `count` are tokens, as the last of them would see it."""
    if decays:
        ahead = tl.maximum(count - 1 - tl.arange(0, block), 0)
        k = (k.to(tl.float32) * tl.exp(rate * ahead)[:, None]).to(mm)
        fade = tl.exp(rate * count)
        state = state * fade
        share = share * fade
    state = tl.dot(tl.trans(k), v, state, input_precision=precision)
    return state, share + tl.sum(k.to(tl.float32), 0)


@triton.jit
def _seen(weights, rate, decays: tl.constexpr, block: tl.constexpr, of_keys: tl.constexpr):
    """Weights [rows, keys] of a chunk as they are seen: decayed, 0 where the key is later. of_keys: [keys, rows]."""
    if of_keys:
        distance = tl.arange(0, block)[None, :] - tl.arange(0, block)[:, None]
    else:
        distance = tl.arange(0, block)[:, None] - tl.arange(0, block)[None, :]
    if decays:
        weights = weights * tl.exp(rate * tl.maximum(distance, 0))
    return tl.where(distance >= 0, weights, 0.0)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def segment_kernel(
    key, value, states, shares, rates, kb, kh, kl, vb, vh, vl, length, chunks, num_segments, kv_heads,
    phi: tl.constexpr, decays: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr,
    value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The state of each segment of `chunks` chunks, by itself: states [B * Hkv, segments, M, Dv]."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // kv_heads).to(tl.int64), (place % kv_heads).to(tl.int64)
    rate = 0.0
    if decays:
        rate = tl.load(rates + head)
    key += row * kb + head * kh
    value += row * vb + head * vh
    state = tl.zeros([padded, value_padded], tl.float32)
    share = tl.zeros([padded], tl.float32)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block)), num_stages=stages):
        first = chunk * block
        count = tl.minimum(length - first, block)
        k = _features(_load(key, first, kl, count, block, dim, padded), count, phi, block, dim, padded, mm)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(mm)
        state, share = _added(state, share, k, v, rate, count, decays, block, mm, precision)
    _leave_state(states, shares, tl.program_id(0), state, share, dim, value_dim, padded, value_padded)


@triton.jit
def _segment(sums, turn, num_segments, at, size, is_backward: tl.constexpr, block: tl.constexpr):
    """The sums of the segment that is met at a turn, zeros behind the last one."""
    segment = turn
    if is_backward:
        segment = num_segments - 1 - turn
    live = at < tl.where(turn < num_segments, size, 0)
    return tl.load(sums + segment.to(tl.int64) * size + at, mask=live, other=0.0)


@triton.jit(do_not_specialize=["length", "tokens", "num_segments"])
def scan_kernel(
    states, shares, start, start_share, whole, whole_share, rates, length, tokens, num_segments, heads,
    decays: tl.constexpr, starts: tl.constexpr, is_backward: tl.constexpr, state_size: tl.constexpr,
    share_size: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Makes of the sums of segments those of all segments before each, or behind it, in place.

    states: [B * H, segments, state_size], of which `blocks` programs take `block` numbers each, as these do not meet;
    shares: [B * H, segments, share_size], which one more takes. start: what comes before the first; whole: the same
    with all. A segment has `tokens` tokens, the last one the rest. Four segments are read ahead.
    """
    place = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    size = state_size
    sums, first, last = states, start, whole
    if tl.program_id(1) == blocks:
        at = tl.arange(0, block)
        size = share_size
        sums, first, last = shares, start_share, whole_share
    live = at < size
    rate = 0.0
    if decays:
        rate = tl.load(rates + place % heads)
    sums += place.to(tl.int64) * num_segments * size
    known = tl.zeros([block], tl.float32)
    if starts:
        known = tl.load(first + place.to(tl.int64) * size + at, mask=live, other=0.0)
    none = tl.program_id(0) * 0
    a = _segment(sums, none, num_segments, at, size, is_backward, block)
    b = _segment(sums, none + 1, num_segments, at, size, is_backward, block)
    c = _segment(sums, none + 2, num_segments, at, size, is_backward, block)
    d = _segment(sums, none + 3, num_segments, at, size, is_backward, block)
    for turn in tl.range(0, num_segments):
        segment = turn
        if is_backward:
            segment = num_segments - 1 - turn
        ahead = _segment(sums, turn + 4, num_segments, at, size, is_backward, block)
        tl.store(sums + segment.to(tl.int64) * size + at, known, mask=live)
        if decays:
            known = known * tl.exp(rate * tl.minimum(length - segment * tokens, tokens))
        known += a
        a, b, c, d = b, c, d, ahead
    tl.store(last + place.to(tl.int64) * size + at, known, mask=live)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def row_kernel(
    query, key, value, out, totals, states, shares, rates,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, length, chunks, num_segments, heads, kv_group,
    phi: tl.constexpr, key_phi: tl.constexpr, decays: tl.constexpr, normalise: tl.constexpr, dim: tl.constexpr,
    value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr,
    precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The output of each row, from the states before segments. totals: [B * Hq, T], the weights of each row summed."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    kv_head = head // kv_group
    rate = 0.0
    if decays:
        rate = tl.load(rates + kv_head)
    query += row * qb + head * qh
    key += row * kb + kv_head * kh
    value += row * vb + kv_head * vh
    out += row * ob + head * oh
    totals += place.to(tl.int64) * length
    of_keys = (row * (heads // kv_group) + kv_head) * num_segments + segment
    state, share = _state_at(states, shares, of_keys, dim, value_dim, padded, value_padded)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block)), num_stages=stages):
        first = chunk * block
        count = tl.minimum(length - first, block)
        q = _features(_load(query, first, ql, count, block, dim, padded), count, phi, block, dim, padded, mm)
        k = _features(_load(key, first, kl, count, block, dim, padded), count, key_phi, block, dim, padded, mm)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(mm)
        weights = tl.dot(q, tl.trans(k), input_precision=precision)
        weights = _seen(weights, rate, decays, block, False)
        asked = q
        if decays:
            asked = (q.to(tl.float32) * tl.exp(rate * (1 + tl.arange(0, block)))[:, None]).to(mm)
        found = tl.dot(asked, state.to(mm), input_precision=precision)
        found = tl.dot(weights.to(mm), v, found, input_precision=precision)
        if normalise:
            total = tl.sum(weights, 1) + tl.sum(asked.to(tl.float32) * share[None, :], 1)
            found = found * _sum_of_row(total)[:, None]
            rows = tl.arange(0, block)
            tl.store(totals + first + rows, total, mask=rows < count)
        _store(out, first, ol, count, found, block, value_dim, value_padded)
        state, share = _added(state, share, k, v, rate, count, decays, block, mm, precision)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def query_kernel(
    query, key, value, out, grad_out, grad_query, totals, deltas, states, shares, rates,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, ob, oh, ol, gb, gh, gl, db, dh, dl,
    length, chunks, num_segments, heads, kv_group,
    phi: tl.constexpr, key_phi: tl.constexpr, decays: tl.constexpr, normalise: tl.constexpr, dim: tl.constexpr,
    value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr,
    precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The gradient of queries. deltas: [B * Hq, T], that of each row's sum of weights, which is written for others."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    kv_head = head // kv_group
    rate = 0.0
    if decays:
        rate = tl.load(rates + kv_head)
    query += row * qb + head * qh
    key += row * kb + kv_head * kh
    value += row * vb + kv_head * vh
    out += row * ob + head * oh
    grad_out += row * gb + head * gh
    grad_query += row * db + head * dh
    totals += place.to(tl.int64) * length
    deltas += place.to(tl.int64) * length
    of_keys = (row * (heads // kv_group) + kv_head) * num_segments + segment
    state, share = _state_at(states, shares, of_keys, dim, value_dim, padded, value_padded)
    start = segment * chunks
    for chunk in tl.range(start, tl.minimum(start + chunks, tl.cdiv(length, block)), num_stages=stages):
        first = chunk * block
        count = tl.minimum(length - first, block)
        k = _features(_load(key, first, kl, count, block, dim, padded), count, key_phi, block, dim, padded, mm)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(mm)
        grad = _load(grad_out, first, gl, count, block, value_dim, value_padded).to(mm)
        of_weights = tl.dot(grad, tl.trans(v), input_precision=precision)
        of_state = tl.dot(grad, tl.trans(state.to(mm)), input_precision=precision)
        if normalise:
            known = _load(out, first, ol, count, block, value_dim, value_padded)
            part = _sum_of_row(_numbers(totals, first, count, block))
            delta = -tl.sum(grad.to(tl.float32) * known.to(tl.float32), 1)
            of_weights = (of_weights + delta[:, None]) * part[:, None]
            of_state = (of_state + delta[:, None] * share[None, :]) * part[:, None]
            rows = tl.arange(0, block)
            tl.store(deltas + first + rows, delta * part, mask=rows < count)
        if decays:
            of_state = of_state * tl.exp(rate * (1 + tl.arange(0, block)))[:, None]
        of_weights = _seen(of_weights, rate, decays, block, False)
        found = tl.dot(of_weights.to(mm), k, of_state, input_precision=precision)
        if phi != "linear":
            found = _through_features(found, _load(query, first, ql, count, block, dim, padded), phi)
        _store(grad_query, first, dl, count, found, block, dim, padded)
        state, share = _added(state, share, k, v, rate, count, decays, block, mm, precision)


@triton.jit
def _asked(
    query, grad_out, totals, deltas, first, ql, gl, count, rate,
    phi: tl.constexpr, decays: tl.constexpr, normalise: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr,
):  # fmt: skip
    """Of a chunk's rows the features, those features faded since the end of the chunk before, and the gradients of what
    they sum up: of values and of weights alone."""
    q = _features(_load(query, first, ql, count, block, dim, padded), count, phi, block, dim, padded, mm)
    grad = _load(grad_out, first, gl, count, block, value_dim, value_padded)
    delta = tl.zeros([block], tl.float32)
    if normalise:
        part = _sum_of_row(_numbers(totals, first, count, block))
        grad = grad.to(tl.float32) * part[:, None]
        delta = _numbers(deltas, first, count, block)
    faded = q
    if decays:
        faded = (q.to(tl.float32) * tl.exp(rate * (1 + tl.arange(0, block)))[:, None]).to(mm)
    return q, faded, grad.to(mm), delta


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def asked_kernel(
    query, grad_out, totals, deltas, states, shares, rates, qb, qh, ql, gb, gh, gl,
    length, chunks, num_segments, kv_heads, kv_group,
    phi: tl.constexpr, decays: tl.constexpr, normalise: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr, precision: tl.constexpr,
    stages: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each segment, as far as the segment's own rows ask it, of all query heads."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, kv_head = (place // kv_heads).to(tl.int64), (place % kv_heads).to(tl.int64)
    rate = 0.0
    if decays:
        rate = tl.load(rates + kv_head)
    state = tl.zeros([padded, value_padded], tl.float32)
    share = tl.zeros([padded], tl.float32)
    start = segment * chunks
    stop = tl.minimum(start + chunks, tl.cdiv(length, block))
    for turn in tl.range(start * kv_group, stop * kv_group, num_stages=stages):
        chunk = stop - 1 - (turn // kv_group - start)
        head = kv_head * kv_group + turn % kv_group
        first = chunk * block
        count = tl.minimum(length - first, block)
        sums_at = (row * (kv_heads * kv_group) + head) * length
        _, faded, grad, delta = _asked(
            query + row * qb + head * qh, grad_out + row * gb + head * gh, totals + sums_at, deltas + sums_at,
            first, ql, gl, count, rate, phi, decays, normalise, dim, value_dim, padded, value_padded, block, mm,
        )  # fmt: skip
        if decays:
            fade = tl.exp(rate * tl.where(turn % kv_group == 0, count, 0))
            state = state * fade
            share = share * fade
        state = tl.dot(tl.trans(faded), grad, state, input_precision=precision)
        share += tl.sum(faded.to(tl.float32) * delta[:, None], 0)
    _leave_state(states, shares, tl.program_id(0), state, share, dim, value_dim, padded, value_padded)


@triton.jit(do_not_specialize=["length", "chunks", "num_segments"])
def key_kernel(
    query, key, value, grad_out, grad_key, grad_value, totals, deltas, states, shares, rates,
    qb, qh, ql, kb, kh, kl, vb, vh, vl, gb, gh, gl, db, dh, dl, eb, eh, el,
    length, chunks, num_segments, kv_heads, kv_group,
    phi: tl.constexpr, key_phi: tl.constexpr, decays: tl.constexpr, normalise: tl.constexpr, dim: tl.constexpr,
    value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr, mm: tl.constexpr,
    precision: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, from those of the states behind segments, chunk by chunk from the end."""
    segment, place = tl.program_id(0) % num_segments, tl.program_id(0) // num_segments
    row, kv_head = (place // kv_heads).to(tl.int64), (place % kv_heads).to(tl.int64)
    rate = 0.0
    if decays:
        rate = tl.load(rates + kv_head)
    key += row * kb + kv_head * kh
    value += row * vb + kv_head * vh
    grad_key += row * db + kv_head * dh
    grad_value += row * eb + kv_head * eh
    state, share = _state_at(states, shares, tl.program_id(0), dim, value_dim, padded, value_padded)
    start = segment * chunks
    stop = tl.minimum(start + chunks, tl.cdiv(length, block))
    for turn in tl.range(start, stop, num_stages=stages):
        first = (stop - 1 - (turn - start)) * block
        count = tl.minimum(length - first, block)
        held = _load(key, first, kl, count, block, dim, padded)
        k = _features(held, count, key_phi, block, dim, padded, mm)
        v = _load(value, first, vl, count, block, value_dim, value_padded).to(mm)
        of_keys = tl.dot(v, tl.trans(state.to(mm)), input_precision=precision) + share[None, :]
        of_values = tl.dot(k, state.to(mm), input_precision=precision)
        if decays:
            ahead = tl.exp(rate * tl.maximum(count - 1 - tl.arange(0, block), 0))[:, None]
            fade = tl.exp(rate * count)
            of_keys = of_keys * ahead
            of_values = of_values * ahead
            state = state * fade
            share = share * fade
        for turn_of_head in range(kv_group):
            head = kv_head * kv_group + turn_of_head
            sums_at = (row * (kv_heads * kv_group) + head) * length
            q, faded, grad, delta = _asked(
                query + row * qb + head * qh, grad_out + row * gb + head * gh, totals + sums_at, deltas + sums_at,
                first, ql, gl, count, rate, phi, decays, normalise, dim, value_dim, padded, value_padded, block, mm,
            )  # fmt: skip
            weights = tl.dot(k, tl.trans(q), input_precision=precision)
            weights = _seen(weights, rate, decays, block, True)
            of_values = tl.dot(weights.to(mm), grad, of_values, input_precision=precision)
            of_weights = tl.dot(v, tl.trans(grad), input_precision=precision) + delta[None, :]
            of_weights = _seen(of_weights, rate, decays, block, True)
            of_keys = tl.dot(of_weights.to(mm), q, of_keys, input_precision=precision)
            state = tl.dot(tl.trans(faded), grad, state, input_precision=precision)
            share += tl.sum(faded.to(tl.float32) * delta[:, None], 0)
        _store(grad_key, first, dl, count, _through_features(of_keys, held, key_phi), block, dim, padded)
        _store(grad_value, first, el, count, of_values, block, value_dim, value_padded)
