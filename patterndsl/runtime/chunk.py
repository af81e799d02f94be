"""How is a block of chunks attended on a CPU? In memory that all blocks share, so that it stays in the caches.

Queries are chunks one behind the other; keys are in one piece and move along with them. A mask of causality alone is
made by arithmetic: a CPU compares and chooses one number after the other, and subtracts eight at once. Powers are of 2,
which are faster than those of e. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import log

import torch
from torch import Tensor

from patterndsl.ir.index import K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, And, Relation, compare
from patterndsl.runtime.data import DeviceData
from patterndsl.runtime.merge import merge_
from patterndsl.runtime.scratch import Scratch

ROWS = 4096
"""Rows that are put back at a time."""
LN2 = log(2)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Chunks of queries from place `q_start` on, one behind the other, each of `q_len`; the keys of the first are
    `kv_len` from place `k_start` on, those of the next one `q_len` further. mask: float32 [q_len, kv_len], 0 for pairs
    of each that count, -inf for the others; None where all count. is_first: no block before has its queries."""

    number: int
    q_start: int
    q_len: int
    k_start: int
    kv_len: int
    mask: Tensor | None
    is_first: bool

    @property
    def queries(self) -> slice:
        """Their places."""
        return slice(self.q_start, self.q_start + self.number * self.q_len)

    @property
    def keys(self) -> slice:
        """The places of all keys."""
        return slice(self.k_start, self.k_start + (self.number - 1) * self.q_len + self.kv_len)

    def of_queries(self, x: Tensor) -> Tensor:
        """[number, q_len, ...] of the queries' [places, ...]."""
        return x.view(self.number, self.q_len, *x.shape[1:])

    def of_keys(self, x: Tensor) -> Tensor:
        """[number, kv_len, ...] of the keys' [places, ...]; those of neighbours overlap."""
        step, *rest = x.stride()
        shape = (self.number, self.kv_len, *x.shape[1:])
        return x.as_strided(shape, (self.q_len * step, step, *rest), x.storage_offset())

    def add_keys(self, total: Tensor, grad: Tensor) -> None:
        """Adds [number, kv_len, D] to total [all places, D], in strips that hold no place twice."""
        step, channel = total.stride()
        for first in range(0, self.kv_len, self.q_len):
            size = min(self.q_len, self.kv_len - first)
            start = total.storage_offset() + (self.k_start + first) * step
            strip = total.as_strided((self.number, size, total.shape[1]), (self.q_len * step, step, channel), start)
            strip.add_(grad[:, first : first + size])


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where the positions of a head stand: the position at each place and the place of each position, int64 [T]; None
    where these are the same. rest: what a pair must be besides being in a block, as `data` says; lag: see `lag_of`,
    which positions [T] are for, by place: in the dtype of scores where there is one. missing: bool [T], places where
    nothing stands; None where there are none."""

    order: Tensor | None
    back: Tensor | None
    rest: Relation
    lag: int | None
    positions: Tensor
    data: DeviceData
    missing: Tensor | None = None

    def by_place(self, x: Tensor) -> Tensor:
        """What is by position, [T, ...]."""
        return x if self.order is None else x.index_select(0, self.order)


STRICT, OR_ITSELF, NOT_ITSELF = compare("<", K, Q), compare("<=", K, Q), compare("!=", Q, K)


def lag_of(rest: Relation) -> int | None:
    """The least q - k of its pairs, where that is all that a relation says: of k <= q it is 0, of k < q and of
    k <= q & q != k it is 1."""
    parts = set(rest.terms if isinstance(rest, And) else (rest,))
    if parts == {OR_ITSELF}:
        return 0
    is_strict = STRICT in parts or {OR_ITSELF, NOT_ITSELF} <= parts
    return 1 if is_strict and parts <= {STRICT, OR_ITSELF, NOT_ITSELF} else None


def attend(
    block: Block,
    places: Places,
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    made: Scratch,
    results: tuple[Tensor, Tensor],
) -> None:
    """Puts what a block gives to results [T, Dv] and [T], by place, or merges it into what is there. tensors: query and
    key [T, D], value [T, Dv], by position. A row without keys gives 0 and -inf."""
    q, k, v = _taken(block, places, tensors, made)
    scores = _scores(block, places, q, k, None, scale, made)
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
    lse = total.log2().add_(top).mul_(LN2).flatten()
    mine, mine_lse = (x[block.queries] for x in results)
    out = mine if block.is_first else made("part", *mine.shape)
    torch.bmm(scores, v, out=block.of_queries(out)).div_(total.clamp_(min=1.0))  # it is 0 of such a row, or at least 1
    if block.is_first:
        mine_lse.copy_(lse)
    else:
        merge_(mine, mine_lse, out, lse)


def differentiate(
    block: Block,
    places: Places,
    tensors: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor | None],
    scale: float,
    made: Scratch,
    of_query: Tensor,
) -> tuple[Tensor, Tensor]:
    """Puts gradients of the block's queries into of_query [number * q_len, D], or adds them to what is there; returns
    those of its keys [number, kv_len, D] and values. results: the gradient of the output [T, Dv] by position; by place
    lse [T, 1], see `power_of`, and what is subtracted from each weight's gradient [T, 1], None where it is to be found
    as no other block has these rows."""
    q, k, v = _taken(block, places, tensors, made)
    grad = block.of_queries(_rows(results[0], places, block.queries, made, "grad"))
    lse = block.of_queries(results[1][block.queries])
    weights = _scores(block, places, q, k, lse, scale, made).exp2_()
    of_values = torch.bmm(weights.mT, grad, out=made("of values", block.number, block.kv_len, v.shape[2]))
    of_scores = torch.bmm(grad, v.mT, out=made("of scores", *weights.shape))
    if results[2] is None:
        of_scores.mul_(weights)
        of_scores.addcmul_(weights, of_scores.sum(-1, keepdim=True), value=-1)
    else:
        of_scores.sub_(block.of_queries(results[2][block.queries])).mul_(weights)
    block.of_queries(of_query).baddbmm_(of_scores, k, beta=0 if block.is_first else 1, alpha=scale)
    of_keys = made("of keys", block.number, block.kv_len, q.shape[2])
    return of_keys.baddbmm_(of_scores.mT, q, beta=0, alpha=scale), of_values


def _scores(
    block: Block, places: Places, q: Tensor, k: Tensor, lse: Tensor | None, scale: float, made: Scratch
) -> Tensor:
    """Scores less lse [number, q_len, 1], for powers of 2; -inf where a pair does not count."""
    scores = made("scores", block.number, block.q_len, block.kv_len)
    if block.mask is not None and places.rest == EVERYTHING and places.missing is None:
        scores = scores.copy_(block.mask) if lse is None else torch.sub(block.mask, lse, out=scores)
        return scores.baddbmm_(q, k.mT, beta=1, alpha=scale / LN2)
    is_begun = _masked(scores, block, places)
    if lse is not None:
        scores = scores.sub_(lse) if is_begun else torch.neg(lse.expand_as(scores), out=scores)
    return scores.baddbmm_(q, k.mT, beta=1 if is_begun or lse is not None else 0, alpha=scale / LN2)


def _masked(scores: Tensor, block: Block, places: Places) -> bool:
    """Makes scores 0 where a pair counts, else -inf, if there is any that does not; says whether it did."""
    if places.rest == EVERYTHING and block.mask is None and places.missing is None:
        return False
    q = block.of_queries(places.positions[block.queries]).unsqueeze(2)
    k = block.of_keys(places.positions[block.keys]).unsqueeze(1)
    if places.rest == EVERYTHING:
        scores.zero_()
    elif places.lag is not None:
        torch.sub(q, k, out=scores)
        torch.threshold_(scores, places.lag - 1, -torch.inf).clamp_(max=0)
    else:
        keep = torch.as_tensor(member(places.rest, Point(q, k, 0, places.data)))
        counts, not_at_all = (torch.tensor(x, dtype=scores.dtype) for x in (0.0, -torch.inf))
        torch.where(keep.expand_as(scores), counts, not_at_all, out=scores)
    if block.mask is not None:
        scores.add_(block.mask)
    if places.missing is not None:
        of_queries, of_keys = block.of_queries(places.missing[block.queries]), block.of_keys(places.missing[block.keys])
        scores.masked_fill_(of_queries.unsqueeze(2) | of_keys.unsqueeze(1), -torch.inf)
    return True


def _taken(
    block: Block, places: Places, tensors: tuple[Tensor, Tensor, Tensor], made: Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of query, key and value, [number, length, D]."""
    query, key, value = tensors
    return (
        block.of_queries(_rows(query, places, block.queries, made, "query")),
        block.of_keys(_rows(key, places, block.keys, made, "key")),
        block.of_keys(_rows(value, places, block.keys, made, "value")),
    )


def _rows(x: Tensor, places: Places, part: slice, made: Scratch, name: str) -> Tensor:
    """The rows of x [T, ...] that stand at some places."""
    if places.order is None:
        return x[part].to(made.dtype)
    if x.dtype != made.dtype:
        return x.index_select(0, places.order[part]).to(made.dtype)
    return torch.index_select(x, 0, places.order[part], out=made(name, part.stop - part.start, *x.shape[1:]))


def heads_of(query: Tensor) -> Iterator[tuple[int, int]]:
    """Batch rows and heads of query [B, H, T, D], one after the other."""
    return product(range(query.shape[0]), range(query.shape[1]))


def of_head(x: Tensor, row: int, head: int) -> Tensor:
    """[T] of a checked input [T], [B or 1, T] or [B or 1, H or 1, T]."""
    if x.dim() == 1:
        return x
    x = x[row % x.shape[0]]
    return x if x.dim() == 1 else x[head % x.shape[0]]


def power_of(lse: Tensor) -> Tensor:
    """An lse as a power of 2, +inf where a row is empty: its weights are then 0."""
    found = lse / LN2
    return found.masked_fill_(found == -torch.inf, torch.inf)


def put_back(x: Tensor, into: Tensor, back: Tensor | None) -> None:
    """Writes by position what is by place, [T, ...]. back: the place of each position."""
    if back is None:
        into.copy_(x)
    else:
        torch.index_select(x, 0, back, out=into)


def by_position(xs: Sequence[Tensor], back: Tensor | None, made: Scratch) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same some rows at a time, of several tensors: which rows, and they."""
    for start in range(0, xs[0].shape[0], ROWS):
        rows = slice(start, min(start + ROWS, xs[0].shape[0]))
        if back is None:
            yield rows, [x[rows] for x in xs]
            continue
        some = [made(f"back {at}", rows.stop - start, *x.shape[1:]) for at, x in enumerate(xs)]
        yield rows, [torch.index_select(x, 0, back[rows], out=into) for x, into in zip(xs, some, strict=True)]
