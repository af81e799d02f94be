"""How do queries on a GPU attend single keys here and there? Row by row of keys, as many at a time as there are queries
in a block: no tile is emptier than one whose keys are drawn one by one.

Forward and the gradient of queries follow the list of each query; those of keys and values follow the transposed lists,
so that each is a sum in one order and nothing is added atomically. Products are sums of float32, not of tensor cores:
what a pair costs is reading its key and value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.kernels.memory import padded_widths
from patterndsl.runtime.kernels.rows import LN2, LOG2E, load_norm, load_rows, load_tile, store_numbers, store_tile

BLOCK = 32
"""Queries, or keys, of a program."""


@triton.jit(do_not_specialize=["q_len", "num_keys"])
def _attend_kernel(
    query, key, value, out, lse, table, qr, ql, kr, kl, vr, vl, outr, outl, lr, ll, q_len, num_keys, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of queries of one batch row and head. table: [num_keys, q_len], -1 for none."""
    row, first = tl.program_id(1), tl.program_id(0) * block
    places = first + tl.arange(0, block)
    rows = load_rows(table, 0, 0, row, row, first, q_len, block, False, False)
    q = load_tile(query, qr, 0, ql, row, row, first, rows, block, dim, padded, False, False).to(tl.float32)
    q = q * (scale * LOG2E)
    top = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    acc = tl.zeros([block, value_padded], tl.float32)
    listed = table + places
    for _ in range(num_keys):
        at = tl.load(listed, mask=places < q_len, other=-1)
        listed += q_len
        k = load_tile(key, kr, 0, kl, row, row, first, at, block, dim, padded, False, False).to(tl.float32)
        score = tl.where(at >= 0, tl.sum(q * k, 1), -float("inf"))
        higher = tl.maximum(top, score)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weight, shrink = tl.exp2(score - shift), tl.exp2(top - shift)
        v = load_tile(value, vr, 0, vl, row, row, first, at, block, value_dim, value_padded, False, False)
        v = v.to(tl.float32)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    store_tile(out, outr, 0, outl, row, row, rows, acc, value_dim, value_padded)
    store_numbers(lse, lr, 0, ll, row, row, rows, found)


@triton.jit(do_not_specialize=["q_len", "num_keys"])
def _query_kernel(
    query, key, value, out, grad_out, lse, delta, grad_query, table,
    qr, ql, kr, kl, vr, vl, outr, outl, dor, dol, lr, ll, gr, gl, q_len, num_keys, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries, and delta [rows, q_len], the sum of out * grad_out."""
    row, first = tl.program_id(1), tl.program_id(0) * block
    places = first + tl.arange(0, block)
    rows = load_rows(table, 0, 0, row, row, first, q_len, block, False, False)
    q = load_tile(query, qr, 0, ql, row, row, first, rows, block, dim, padded, False, False).to(tl.float32)
    o = load_tile(out, outr, 0, outl, row, row, first, rows, block, value_dim, value_padded, False, False)
    do = load_tile(grad_out, dor, 0, dol, row, row, first, rows, block, value_dim, value_padded, False, False)
    do = do.to(tl.float32)
    mine = tl.sum(o.to(tl.float32) * do, 1)
    store_numbers(delta, q_len, 0, 1, row, row, rows, mine)
    norm = load_norm(lse, lr, 0, ll, row, row, rows, False)
    acc = tl.zeros([block, padded], tl.float32)
    listed = table + places
    for _ in range(num_keys):
        at = tl.load(listed, mask=places < q_len, other=-1)
        listed += q_len
        k = load_tile(key, kr, 0, kl, row, row, first, at, block, dim, padded, False, False).to(tl.float32)
        v = load_tile(value, vr, 0, vl, row, row, first, at, block, value_dim, value_padded, False, False)
        v = v.to(tl.float32)
        weight = tl.exp2(tl.sum(q * k, 1) * (scale * LOG2E) - norm)
        score = tl.where(at >= 0, weight * (tl.sum(do * v, 1) - mine), 0.0)
        acc += score[:, None] * k
    store_tile(grad_query, gr, 0, gl, row, row, rows, acc * scale, dim, padded)


@triton.jit(do_not_specialize=["q_len", "kv_len"])
def _key_kernel(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, starts, queries,
    qr, ql, kr, kl, vr, vl, dor, dol, lr, ll, gkr, gkl, gvr, gvl, q_len, kv_len, scale,
    dim: tl.constexpr, value_dim: tl.constexpr, padded: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values. Key i has the queries [starts[i], starts[i + 1])."""
    row, first = tl.program_id(1), tl.program_id(0) * block
    places = first + tl.arange(0, block)
    inside = places < kv_len
    rows = tl.where(inside, places, -1)
    begin = tl.load(starts + places, mask=inside, other=0)
    stop = tl.load(starts + places + 1, mask=inside, other=0)
    k = load_tile(key, kr, 0, kl, row, row, first, rows, block, dim, padded, False, False).to(tl.float32)
    v = load_tile(value, vr, 0, vl, row, row, first, rows, block, value_dim, value_padded, False, False)
    v = v.to(tl.float32)
    k_acc = tl.zeros([block, padded], tl.float32)
    v_acc = tl.zeros([block, value_padded], tl.float32)
    for turn in range(tl.max(stop - begin, 0)):
        live = begin + turn < stop
        at = tl.load(queries + begin + turn, mask=live, other=-1)
        q = load_tile(query, qr, 0, ql, row, row, first, at, block, dim, padded, False, False).to(tl.float32)
        do = load_tile(grad_out, dor, 0, dol, row, row, first, at, block, value_dim, value_padded, False, False)
        do = do.to(tl.float32)
        norm = tl.load(lse + row.to(tl.int64) * lr + at.to(tl.int64) * ll, mask=live, other=0.0) * LOG2E
        known = tl.load(delta + row.to(tl.int64) * q_len + at, mask=live, other=0.0)
        weight = tl.where(live, tl.exp2(tl.sum(q * k, 1) * (scale * LOG2E) - norm), 0.0)
        v_acc += weight[:, None] * do
        k_acc += (weight * (tl.sum(do * v, 1) - known))[:, None] * q
    store_tile(grad_key, gkr, 0, gkl, row, row, rows, k_acc * scale, dim, padded)
    store_tile(grad_value, gvr, 0, gvl, row, row, rows, v_acc, value_dim, value_padded)


_attend, _of_queries, _of_keys = Launcher(_attend_kernel), Launcher(_query_kernel), Launcher(_key_kernel)


def attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [R, Tq, Dv] in the query's dtype and lse [R, Tq] in float32; a query without keys yields 0 and -inf.

    query: [R, Tq, D], key: [R, Tk, D], value: [R, Tk, Dv]. table: int32 [width, Tq], the keys of each query, -1 for
    none. Work: O(R pairs D).
    """
    out = torch.empty((*query.shape[:2], value.shape[2]), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    tensors = (query, key, value, out, lse)
    steps = (*_strides(*tensors), query.shape[1], len(table))
    _attend(_grid(query), (*tensors, table), steps, _widths(query, value), scale=scale)
    return out, lse


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    table: Tensor,
    starts: Tensor,
    queries: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. out, lse: of all keys, of which these may be a part. starts, queries: int32,
    those of key i are queries[starts[i] : starts[i + 1]]."""
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    delta = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    widths, (q_len, kv_len) = _widths(query, value), (query.shape[1], key.shape[1])
    seen: tuple[Tensor, ...] = (query, key, value, out, grad_out, lse)
    steps = (*_strides(*seen, grad_query), q_len, len(table))
    _of_queries(_grid(query), (*seen, delta, grad_query, table), steps, widths, scale=scale)
    seen, grads = (query, key, value, grad_out, lse), (grad_key, grad_value)
    steps = (*_strides(*seen, *grads), q_len, kv_len)
    _of_keys(_grid(key), (*seen, delta, *grads, starts, queries), steps, widths, scale=scale)
    return grad_query, grad_key, grad_value


def _grid(x: Tensor) -> tuple[int, int, int]:
    return -(-x.shape[1] // BLOCK), x.shape[0], 1


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:2]]


def _widths(query: Tensor, value: Tensor) -> dict[str, int]:
    dim, value_dim = query.shape[2], value.shape[2]
    padded, value_padded = padded_widths(dim, value_dim)
    return {"dim": dim, "value_dim": value_dim, "padded": padded, "value_padded": value_padded, "block": BLOCK}
