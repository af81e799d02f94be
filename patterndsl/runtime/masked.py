"""How does a pattern that reads inputs run without finding tiles in each call? Dense on the views of its hulls.

Each call makes the masks of the hulls' tiles from its inputs, a part of the tiles at a time. In the order by an input,
queries, keys and values are permuted first, and results put back. Positions with one value of an input, such as those
of a document, are runs in its order, and each is dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, Random, Relation
from patterndsl.lower.geometry import Axis, Geometry, Side
from patterndsl.lower.hulls import Hull, Lists
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.shapes import Band, Shape, Triangle
from patterndsl.lower.shapes import Masked as MaskedShape
from patterndsl.runtime import documents, listed
from patterndsl.runtime.data import DeviceData, Inputs, draws_of, facets_of
from patterndsl.runtime.documents import Documents, Span, spans_of
from patterndsl.runtime.function import Run
from patterndsl.runtime.merge import merge_, with_lse_gradient
from patterndsl.runtime.sdpa import launches
from patterndsl.runtime.views import Launch, with_unit_stride
from patterndsl.sema.parameters import Sizes

aten: Any = torch.ops.aten

MASK_PAIRS = 1 << 21
"""Pairs of the masks that are made at once, for all heads."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A part of a hull's tiles. q_places [groups, length, 1], k_places [groups, 1, length]: where they lie, counted
    from the first query and from key 0; None for a run of equal values that is not masked. kept: bool [length of q,
    length of k], pairs of every group that are the hull's; None for all. is_first: no call before has its queries."""

    launch: Launch
    q_places: Tensor | None = None
    k_places: Tensor | None = None
    kept: Tensor | None = None
    is_first: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A hull made ready. heads: None where they are all; rest: see `Said`; runs, lists: see `Hull`, whose calls are
    made of each call's values where it has some. is_total: each query is in some call. inside: of unbroken runs."""

    order: str | None
    heads: Tensor | None
    rest: Relation
    runs: str | None
    lists: Lists | None
    calls: tuple[_Call, ...]
    draws: Mapping[Random, Tensor]
    is_total: bool
    inside: Documents | None


class Masked:
    """The hulls of a pattern made ready for the CPU."""

    def __init__(self, hulls: Sequence[Hull], num_heads: int, sizes: Sizes, device: torch.device) -> None:
        self.sizes = sizes
        self.hulls = tuple(_ready(hull, num_heads, sizes.q_len, device) for hull in hulls)
        self.is_one = len(self.hulls) == 1 and self.hulls[0].heads is None  # then there is nothing to merge

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: Inputs, scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32 at least."""
        how: dict[str, Any] = {"masked": self, "given": Given.of(self, given), "scale": scale}
        return Run("masked", partial(forward, **how), partial(gradients, **how))


def _ready(hull: Hull, num_heads: int, q_len: int, device: torch.device) -> _Ready:
    rest = hull.said[0].rest if hull.said else EVERYTHING
    seen = np.zeros(q_len, dtype=np.bool_)
    return _Ready(
        hull.order,
        None if len(hull.heads) == num_heads else torch.tensor(hull.heads, device=device),
        rest,
        hull.runs,
        hull.lists,
        tuple(_calls(hull, seen, device)),
        draws_of(rest, 1, device),
        bool(hull.runs) or (hull.lists is None and bool(seen.all())),
        None if hull.inside is None else Documents(hull.inside, device),
    )


def _kept(shape: Shape, geometry: Geometry, device: torch.device) -> Tensor | None:
    """Pairs of a group that are its piece's."""
    match shape:
        case Band(_, mask) | MaskedShape(mask):
            return None if mask.all() else torch.tensor(mask, device=device)
        case Triangle():
            return torch.ones(geometry.q.length, geometry.k.length, dtype=torch.bool, device=device).tril()
        case _:
            return None


def _calls(hull: Hull, seen: np.ndarray[Any, np.dtype[np.bool_]], device: torch.device) -> Iterator[_Call]:
    """The calls of a hull; seen: the queries of those before, which this adds to."""
    for item in hull.passes:
        kept = _kept(item.piece.shape, item.piece.geometry, device)
        for launch in launches(item.piece, None):
            q_len, kv_len = launch.queries.side.length, launch.keys.side.length
            at_once = max(1, MASK_PAIRS // (q_len * kv_len))
            for part in launch.split(at_once * (q_len + 2 * kv_len)):
                rows = part.queries.rows()
                q_places, k_places = (torch.from_numpy(x).to(device) for x in (rows, part.keys.rows()))
                is_first = not seen[rows].any()
                seen[rows] = True
                yield _Call(part, q_places.view(-1, q_len, 1), k_places.view(-1, 1, kv_len), kept, is_first)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a call's inputs say: facets, and of the inputs that hulls are ordered by, per batch row or one for all, the
    sorted values and their positions, None where these are in order. spans: see `documents.spans_of`, of the inputs
    whose documents have passes."""

    inputs: Inputs
    facets: Mapping[tuple[str, Facet], Tensor]
    values: Mapping[str, Sequence[Tensor]]
    orders: Mapping[str, Sequence[Tensor | None]]
    spans: Mapping[str, Sequence[Sequence[Span] | None]]

    @staticmethod
    def of(masked: Masked, inputs: Inputs) -> Given:
        facets = facets_of((hull.rest for hull in masked.hulls), inputs)
        values, orders = dict[str, list[Tensor]](), dict[str, list[Tensor | None]]()
        for name in {hull.order for hull in masked.hulls if hull.order is not None}:
            rows = inputs[name].reshape(-1, inputs[name].shape[-1])
            found = [row.sort(stable=True) for row in rows]
            values[name] = [by_value.values for by_value in found]
            pairs = zip(rows, found, strict=True)
            orders[name] = [None if torch.equal(row, by_value.values) else by_value.indices for row, by_value in pairs]
        inside = {hull.order for hull in masked.hulls if hull.order is not None and hull.inside is not None}
        spans = {name: list(map(spans_of, inputs[name].reshape(-1, inputs[name].shape[-1]))) for name in inside}
        return Given(inputs, facets, values, orders, spans)

    def order(self, name: str | None, row: int) -> Tensor | None:
        """The positions of a batch row by place; None for their own order."""
        return None if name is None else self.orders[name][row % len(self.orders[name])]

    def documents(self, hull: _Ready, row: int) -> Sequence[Span] | None:
        """The documents of a batch row, where each is unbroken and the hull has passes for them."""
        if hull.order is None or hull.inside is None:
            return None
        return self.spans[hull.order][row % len(self.spans[hull.order])]

    def asked(self, hull: _Ready, lists: Lists, row: int, data: DeviceData, sizes: Sizes) -> listed.Asked:
        """What is listed in a batch row."""
        mine = {name: x if x.dim() == 1 else x[row % x.shape[0]] for name, x in self.inputs.items()}
        tables = torch.stack([mine[name] for name in lists.names]).view(len(lists.names), -1, lists.width)
        return listed.Asked(lists, tables, hull.rest, data, Lookup(mine), sizes)

    def runs(self, name: str, row: int, is_masked: bool) -> Iterator[_Call]:
        """The runs of equal values in their order; masked ones in strips of queries."""
        values = self.values[name][row % len(self.values[name])]
        start = 0
        for count in torch.unique_consecutive(values, return_counts=True)[1].tolist():
            keys = Side(start, (Axis(count, 1),))
            if not is_masked:
                yield _Call(Launch((), (), keys, keys))
            places, step = torch.arange(start, start + count), max(1, MASK_PAIRS // count)
            for first in range(0, count, step) if is_masked else ():
                strip = places[first : first + step]
                queries = Side(start + first, (Axis(len(strip), 1),))
                yield _Call(Launch((), (), queries, keys), strip.view(1, -1, 1), places.view(1, 1, -1))
            start += count


# ---- one hull of one batch row


@dataclass(frozen=True, slots=True)
class _Turn:
    """A hull of a batch row: what its kernels see. spans: the documents that run by passes, which are in their own
    order; then there is no call."""

    hull: _Ready
    calls: Sequence[_Call]
    row: int
    order: Tensor | None
    heads: Tensor | None
    kv_heads: Tensor | None
    data: DeviceData
    asked: listed.Asked | None
    spans: Sequence[Span] | None = None


def _taken(x: Tensor, heads: Tensor | None, order: Tensor | None) -> Tensor:
    """[1, heads, T, ...] of [H, T, ...], by place."""
    x = x if heads is None else x.index_select(0, heads)
    return (x if order is None else x.index_select(1, order)).unsqueeze(0)


def _keep(turn: _Turn, call: _Call, q_start: int) -> Tensor | None:
    """Which pairs count, bool [groups or 1, length, width]; None where all do."""
    if call.q_places is None or call.k_places is None:
        return None
    if turn.hull.rest == EVERYTHING:
        return None if call.kept is None else call.kept[None]
    q, k = call.q_places, call.k_places
    q, k = (q + q_start, k) if turn.order is None else (turn.order[q], turn.order[k])
    keep = torch.as_tensor(member(turn.hull.rest, Point(q, k, 0, turn.data)), device=q.device)
    keep = keep if call.kept is None else keep & call.kept
    return keep.expand(keep.shape[0] if keep.dim() == 3 else 1, q.shape[1], k.shape[2])


def _bias(keep: Tensor | None, num_groups: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores, [groups, 1, length, width]: 0 or -inf."""
    if keep is None:
        return None
    counts, not_at_all = (torch.tensor(x, dtype=dtype, device=keep.device) for x in (0.0, -torch.inf))
    return torch.where(keep, counts, not_at_all).unsqueeze(1).expand(num_groups, -1, -1, -1)


def _by_group(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[groups, heads, length, D] each, so that heads share a mask."""
    q = call.launch.queries.grouped(query).transpose(0, 1)
    k, v = (call.launch.keys.grouped(x).transpose(0, 1) for x in (key, value))
    return q, k, v


def _hull_forward(
    turn: _Turn, tensors: tuple[Tensor, Tensor, Tensor], q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [1, heads, Tq, D] and lse [1, heads, Tq], by place."""
    if turn.asked is not None:
        q, k, v = (x[0] for x in tensors)
        found, found_lse = listed.forward(q, k, v, turn.asked, scale)
        return found[None], found_lse[None]
    if turn.hull.inside is not None and turn.spans is not None:
        return documents.forward(*tensors, turn.hull.inside, turn.spans, scale)
    query = tensors[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty((*query.shape[:3], tensors[2].shape[3]), dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    if not turn.hull.is_total:
        out.zero_()
        lse.fill_(-torch.inf)
    for call in turn.calls:
        keep = _keep(turn, call, q_start)
        bias = _bias(keep, call.launch.queries.num_groups, query.dtype)
        found, found_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_group(call, *tensors), 0.0, turn.hull.runs == "causal", attn_mask=bias, scale=scale
        )
        if keep is not None:  # the kernel says 0 of a row without keys
            found_lse = found_lse.masked_fill(~keep.any(-1).unsqueeze(1), -torch.inf)
        places = call.launch.queries
        into, lse_into = places.into(out), places.into(lse)
        part, part_lse = places.fit(found.transpose(0, 1), into), places.fit(found_lse.transpose(0, 1), lse_into)
        if call.is_first:
            into.copy_(part)
            lse_into.copy_(part_lse)
        else:
            merge_(into, lse_into, part, part_lse)
    return out, lse


def _hull_backward(
    turn: _Turn,
    tensors: tuple[Tensor, Tensor, Tensor],
    results: Sequence[Tensor],
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tensors, by place. results: grad_out and out [1, heads, Tq, D], lse [1, heads, Tq], of all."""
    if turn.asked is not None:
        (q, k, v), (grad_out, out, lse) = ([x[0] for x in part] for part in (tensors, results))
        found = listed.gradients(q, k, v, (grad_out, out, lse), turn.asked, scale)
        return found[0][None], found[1][None], found[2][None]
    if turn.hull.inside is not None and turn.spans is not None:
        return documents.gradients(*tensors, results, turn.hull.inside, turn.spans, scale)
    totals = tuple(torch.zeros(x.shape, dtype=results[2].dtype, device=x.device) for x in tensors)
    for call in turn.calls:
        bias = _bias(_keep(turn, call, q_start), call.launch.queries.num_groups, tensors[0].dtype)
        grad_out, out, lse = (call.launch.queries.grouped(x).transpose(0, 1) for x in results)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out,
            *_by_group(call, *tensors),
            out,
            lse,
            0.0,
            turn.hull.runs == "causal",
            attn_mask=bias,
            scale=scale,
        )
        grads = [grad.transpose(0, 1).to(lse.dtype) for grad in found]
        into = call.launch.queries.into(totals[0])
        into.add_(call.launch.queries.fit(grads[0], into))
        for total, grad in zip(totals[1:], grads[1:], strict=True):
            for places, part in call.launch.key_gradients(grad):
                into = places.into(total)
                into.add_(places.fit(part, into))
    return totals[0], totals[1], totals[2]


# ---- all of them


def _turns(masked: Masked, given: Given, query: Tensor, key: Tensor) -> Iterator[_Turn]:
    kv_group = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for hull in masked.hulls:
            heads = torch.arange(query.shape[1], device=query.device) if hull.heads is None else hull.heads
            kv_heads = hull.heads if kv_group == 1 else heads // kv_group
            data = DeviceData(given.facets, hull.draws, row)
            spans = given.documents(hull, row)
            if spans is not None:
                yield _Turn(hull, (), row, None, hull.heads, kv_heads, data, None, spans)
                continue
            runs = tuple(given.runs(hull.order, row, hull.runs == "masked")) if hull.runs and hull.order else ()
            asked = None if hull.lists is None else given.asked(hull, hull.lists, row, data, masked.sizes)
            yield _Turn(hull, runs or hull.calls, row, given.order(hull.order, row), hull.heads, kv_heads, data, asked)


def _put_back(x: Tensor, order: Tensor | None) -> Tensor:
    """By position what is by place: [1, heads, T, ...]."""
    return x if order is None else torch.empty_like(x).index_copy_(2, order, x)


def forward(
    query: Tensor, key: Tensor, value: Tensor, masked: Masked, given: Given, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse of all hulls together."""
    query, key, value = map(with_unit_stride, (query, key, value))
    found = (
        (turn, *_turn_forward(turn, query, key, value, masked.sizes.q_start, scale))
        for turn in _turns(masked, given, query, key)
    )
    if masked.is_one:
        _, outs, lses = zip(*found, strict=True)
        return _rows(outs).to(query.dtype), _rows(lses)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros((*query.shape[:3], value.shape[3]), dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
    for turn, (part_out,), (part_lse,) in found:
        if turn.heads is None:
            merge_(out[turn.row], lse[turn.row], part_out, part_lse)
        else:
            mine, mine_lse = out[turn.row, turn.heads], lse[turn.row, turn.heads]
            merge_(mine, mine_lse, part_out, part_lse)
            out[turn.row, turn.heads], lse[turn.row, turn.heads] = mine, mine_lse
    return out.to(query.dtype), lse


def _turn_forward(
    turn: _Turn, query: Tensor, key: Tensor, value: Tensor, q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [1, heads, Tq, D] and lse [1, heads, Tq] of a hull, by position."""
    out, lse = _hull_forward(turn, _tensors(turn, query, key, value), q_start, scale)
    return _put_back(out, turn.order), _put_back(lse, turn.order)


def _rows(parts: tuple[Tensor, ...]) -> Tensor:
    """Batch rows [1, ...] as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tensors(turn: _Turn, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = _taken(query[turn.row], turn.heads, turn.order)
    k, v = (_taken(x[turn.row], turn.kv_heads, turn.order) for x in (key, value))
    return q, k, v


def _turn_backward(
    turn: _Turn, tensors: tuple[Tensor, Tensor, Tensor], results: Sequence[Tensor], q_start: int, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of a hull's queries, keys and values, [1, heads, T, D], by position."""
    mine = [_taken(x[turn.row], turn.heads, turn.order) for x in results]
    found = _hull_backward(turn, _tensors(turn, *tensors), mine, q_start, scale)
    return tuple(_put_back(grad, turn.order) for grad in found)


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    masked: Masked,
    given: Given,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what all hulls gave together."""
    width = query.shape[3]
    query, key, value, out, grad_out = map(with_unit_stride, (query, key, value, out, grad_out))
    if grad_lse is not None:
        query, key, value, out, grad_out = with_lse_gradient(query, key, value, out, grad_out, grad_lse)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # weights of an empty row are 0
    tensors, results = (query, key, value), (grad_out, out, lse)
    found = (
        (turn, _turn_backward(turn, tensors, results, masked.sizes.q_start, scale))
        for turn in _turns(masked, given, query, key)
    )
    if masked.is_one and query.shape[1] == key.shape[1]:
        totals = tuple(map(_rows, zip(*(grads for _, grads in found), strict=True)))
    else:
        totals = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in tensors)
        for turn, grads in found:
            for total, (grad,), heads in zip(totals, grads, (turn.heads, turn.kv_heads, turn.kv_heads), strict=True):
                if heads is None:
                    total[turn.row].add_(grad)
                else:
                    total[turn.row].index_add_(0, heads, grad)
    pairs = zip(totals, tensors, strict=True)
    grad_query, grad_key, grad_value = (total[..., :width].to(x.dtype) for total, x in pairs)
    return grad_query, grad_key, grad_value
