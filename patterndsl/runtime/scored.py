"""How does a softmax run whose scores are more than products? Block by block over the live tiles, plainly.

A bias, a cap and made scores go between product and softmax, and PyTorch differentiates all of it. Chunks of
query blocks are computed again in the backward pass, so that scores are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patterndsl.diagnostics import input_error
from patterndsl.ir.index import Const, Read
from patterndsl.ir.meaning import Point
from patterndsl.ir.real import Entry, OfIndex, Real, RealFunction, parts, real_value
from patterndsl.ir.relation import Relation, compare, disjunction, subexpressions
from patterndsl.runtime.data import DeviceData, device_data
from patterndsl.runtime.gathered import Group
from patterndsl.runtime.heads import folded, has_heads
from patterndsl.sema.bind import Bound

MAX_SCORES = 1 << 22
"""Scores that are computed at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Met:
    """The queries and keys that meet: query [B, H, blocks, queries, D], key [B, H, blocks, keys, D], and the factor of
    their products."""

    query: Tensor
    key: Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Scalars:
    """numbers: [H, size], one of each head for each index."""

    numbers: Tensor

    def entry(self, at: Tensor, met: Met) -> Tensor:
        heads, size = self.numbers.shape
        head = torch.arange(heads, device=at.device)[:, None, None, None]
        return self.numbers[head, at.floor().long().clamp(0, size - 1)]


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """vectors: [H, size, D]: the query meets that of each index (Shaw et al. 2018, arXiv 1803.02155, equation 5)."""

    vectors: Tensor

    def entry(self, at: Tensor, met: Met) -> Tensor:
        products = torch.einsum("bhnqd,hsd->bhnqs", met.query, self.vectors.to(met.query.dtype)) * met.scale
        place = at.floor().long().clamp(0, self.vectors.shape[1] - 1)
        return products.gather(-1, place.expand(*products.shape[:-1], place.shape[-1]))


@dataclass(frozen=True, slots=True, eq=False)
class Sinusoids:
    """Terms b, c and d of Transformer-XL (Dai et al. 2019, arXiv 1901.02860, section 3.3): with r the sinusoid of a
    distance, (q + v) W r, and u k beside q k. weight: [H, D, dim]; u, v: [H, D]."""

    weight: Tensor
    u: Tensor
    v: Tensor

    def entry(self, at: Tensor, met: Met) -> Tensor:
        distance = at.floor().long()
        low, high = (int(distance.min()), int(distance.max())) if distance.numel() else (0, 0)
        r = sinusoids(torch.arange(low, high + 1, device=at.device), self.weight.shape[-1]).to(met.query.dtype)
        rows = torch.einsum("hdc,sc->hsd", self.weight.to(met.query.dtype), r)
        asked = met.query + self.v.to(met.query.dtype)[:, None, None]
        products = torch.einsum("bhnqd,hsd->bhnqs", asked, rows)
        found = products.gather(-1, (distance - low).expand(*products.shape[:-1], distance.shape[-1]))
        # of each query, though all say the same: its gradients cancel out along keys, and along queries they do not
        of_keys = self.u.to(met.query.dtype)[:, None, None].expand_as(met.query) @ met.key.mT
        return (found + of_keys) * met.scale


Table: TypeAlias = Scalars | Vectors | Sinusoids
"""What a bias looks up. `entry(at, met)` is what is added to scores [B, H, blocks, queries, keys], of real indices that
broadcast to them."""


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """[n, dim] of positions [n]: sines, then cosines, of frequencies 10000^(-2i / dim)."""
    steps = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.to(torch.float64)[:, None] * 10_000.0 ** (-steps / dim)
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :dim]


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """What scores are beside products. bias: of local rows, with all sizes and parameters put in. tables: what it looks
    up. made: scores instead of products, [B or 1, H, Tq, Tk or more]."""

    bias: Real | None = None
    softcap: float | None = None
    tables: Mapping[str, Table] | None = None
    made: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """Arrays of a bias; see `ir.real.Numbers`."""

    tables: Mapping[str, Table]
    met: Met

    def number(self, integers: Any) -> Tensor:
        return torch.as_tensor(integers, device=self.met.query.device).to(torch.float64)

    def call(self, name: RealFunction, arguments: tuple[Any, ...]) -> Any:
        wide = [torch.as_tensor(x, dtype=torch.float64, device=self.met.query.device) for x in arguments]
        match name:
            case "min":
                return reduce(torch.minimum, wide)
            case "max":
                return reduce(torch.maximum, wide)
            case _:
                functions = {
                    "floor": torch.floor,
                    "log": torch.log,
                    "exp": torch.exp,
                    "sqrt": torch.sqrt,
                    "abs": torch.abs,
                }
                return functions[name](wide[0])

    def entry(self, table: str, at: Any) -> Tensor:
        place = torch.as_tensor(at, dtype=torch.float64, device=self.met.query.device)
        return self.tables[table].entry(place.reshape((1,) * (4 - place.dim()) + place.shape), self.met)


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    bound: Bound,
    given: Mapping[str, Tensor],
    scoring: Scoring,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Tq, Dv] and lse [B, Hq, Tq] of softmax(cap(scale q k) + bias) over the pairs of the groups.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv]. given: inputs that the bias reads, as
    `checked_inputs` returns them. Computes in float32 at least, lse is in float32 (float64 for float64). An empty row
    yields 0 and -inf, gradient 0. Differentiable, also in tables and made scores. Work: O(live tiles x D); memory
    beyond the tensors O(MAX_SCORES).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    read = ReadByBias.of(scoring.bias, given, bound.num_heads, query)
    out = query.new_zeros((*query.shape[:3], value.shape[-1]), dtype=dtype)
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
    for group in groups:
        rows, heads = (
            None if part is None else torch.tensor(part, device=query.device) for part in (group.rows, group.heads)
        )
        at_rows = torch.arange(query.shape[0], device=query.device) if rows is None else rows
        at_heads = torch.arange(query.shape[1], device=query.device) if heads is None else heads
        one = _One(group, bound, read.at(at_rows, at_heads), scoring, scale, rows, heads)
        part_out, part_lse = one.attend(query, key, value, dtype)
        if rows is None and heads is None:
            out, lse = part_out, part_lse
            continue
        place = (at_rows[:, None], at_heads[None])
        out, lse = out.index_put(place, part_out), lse.index_put(place, part_lse)
    return out.to(query.dtype), lse


def relation_of(bias: Real | None) -> Relation:
    """A relation that reads what a bias reads."""
    leaves = () if bias is None else parts(bias)
    integers = (leaf.index for leaf in leaves if isinstance(leaf, OfIndex))
    return disjunction(
        compare("<", index, Const(0)) for index in integers if any(isinstance(p, Read) for p in subexpressions(index))
    )


@dataclass(frozen=True, slots=True, eq=False)
class ReadByBias:
    """What a bias looks up of inputs. by_head: it has a row for each head of each batch row, of so many heads."""

    data: DeviceData
    num_heads: int
    by_head: bool

    @staticmethod
    def of(bias: Real | None, given: Mapping[str, Tensor], num_heads: int, query: Tensor) -> ReadByBias:
        """given: as `checked_inputs` returns them."""
        by_head = has_heads(given)
        looked_up = folded(given, range(num_heads), query.shape[0]) if by_head else given
        data = device_data(relation_of(bias), num_heads, looked_up, query.device)
        return ReadByBias(data, num_heads, by_head)

    def at(self, rows: Tensor, heads: Tensor) -> DeviceData:
        """Asked for by scores [batch rows, heads, blocks, queries, keys]."""
        told = rows[:, None] * self.num_heads + heads if self.by_head else rows[:, None]
        return self.data.at_row(told[..., None, None, None])


@dataclass(frozen=True, slots=True, eq=False)
class _One:
    """Batch rows and heads that share a pattern. rows, heads: which they are, None for all."""

    group: Group
    bound: Bound
    data: DeviceData
    scoring: Scoring
    scale: float
    rows: Tensor | None
    heads: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        again = query.shape[1] // max(1, key.shape[1])
        if self.heads is not None:
            kv_heads = self.heads // again
            query, key, value = query[:, self.heads], key[:, kv_heads], value[:, kv_heads]
        elif again > 1:
            key, value = (x.repeat_interleave(again, dim=1) for x in (key, value))
        if self.rows is not None:
            query, key, value = query[self.rows], key[self.rows], value[self.rows]
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        lists = self.group.lists
        counts = lists.offsets.diff()
        num_blocks = len(counts) if key.shape[2] and query.shape[2] else 0
        found: list[tuple[Tensor, Tensor]] = []
        start = 0
        while start < num_blocks:
            stop = start + 1
            widest = int(counts[start])
            while stop < num_blocks:
                wider = max(widest, int(counts[stop]))
                area = query.shape[0] * query.shape[1] * (stop + 1 - start) * lists.q_block * wider * lists.kv_block
                if area > MAX_SCORES:
                    break
                widest, stop = wider, stop + 1
            places = self.places(start, stop, widest)
            run: Callable[..., tuple[Tensor, Tensor]] = self.chunk
            train = torch.is_grad_enabled()
            found.append(
                checkpoint(run, query, key, value, places, start, use_reentrant=False)
                if train
                else run(query, key, value, places, start)
            )
            start = stop
        if not found:
            # zeros that depend on the tensors, and on no number of them: a gradient is 0 and not missing
            reached = sum(x[..., :0].sum() for x in (query, key, value))
            empty = query.new_zeros((*query.shape[:3], value.shape[-1])) + reached
            return empty, query.new_full(query.shape[:3], -torch.inf) + reached
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs, 2)[:, :, : query.shape[2]], torch.cat(lses, 2)[:, :, : query.shape[2]]

    def places(self, start: int, stop: int, widest: int) -> Tensor:
        """The keys of each block of queries, int64 [blocks, keys], -1 where there are fewer."""
        lists = self.group.lists
        turn = torch.arange(max(1, widest), device=lists.offsets.device)
        begins, ends = lists.offsets[start:stop, None], lists.offsets[start + 1 : stop + 1, None]
        at = begins + turn
        blocks = (
            lists.kv_blks[at.clamp(max=max(0, len(lists.kv_blks) - 1))] if len(lists.kv_blks) else torch.zeros_like(at)
        )
        inside = torch.arange(lists.kv_block, device=at.device)
        keys = blocks[..., None] * lists.kv_block + inside
        keys = keys.masked_fill((at >= ends)[..., None] | (keys >= self.bound.sizes.kv_len), -1)
        return keys.flatten(1)

    def chunk(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Output [B, H, rows, Dv] and lse [B, H, rows] of some blocks of queries, the last filled up."""
        lists = self.group.lists
        num_blocks, width = places.shape
        rows = start * lists.q_block + torch.arange(num_blocks * lists.q_block, device=query.device)
        local = rows.clamp(max=max(0, query.shape[2] - 1)).view(num_blocks, lists.q_block)
        there = places.clamp(min=0)
        q = query[:, :, local]
        k, v = (x[:, :, there] for x in (key, value))
        keep = self.group.keep(local[:, :, None], there[:, None, :]) & (places >= 0)[:, None, :]
        scores = self.scores(q, k, local, there)
        scores = torch.where(keep, scores, -torch.inf)
        lse = scores.logsumexp(-1) if width else scores.new_full(scores.shape[:-1], -torch.inf)
        empty = (lse == -torch.inf)[..., None]
        # softmax and not exp(scores - lse), which rounds once more
        weights = torch.where(empty, 0.0, scores.masked_fill(empty, 0.0).softmax(-1)) if width else scores
        out = weights @ v
        return out.flatten(2, 3), lse.flatten(2, 3)

    def scores(self, q: Tensor, k: Tensor, local: Tensor, there: Tensor) -> Tensor:
        scoring, made = self.scoring, None
        if scoring.made is not None:
            made = scoring.made if self.rows is None or scoring.made.shape[0] == 1 else scoring.made[self.rows]
            made = made if self.heads is None else made[:, self.heads]
            made = made[:, :, local[:, :, None], there[:, None, :]].to(q.dtype).expand(q.shape[0], -1, -1, -1, -1)
        heads = torch.arange(q.shape[1], device=q.device) if self.heads is None else self.heads
        point = Point(
            local[:, :, None] + self.bound.sizes.q_start, there[:, None, :], heads[:, None, None, None], self.data
        )
        tables = _of_heads(scoring.tables or {}, self.heads)
        return scores_of(Met(q, k, self.scale), made, replace(scoring, tables=tables), point)


def scores_of(met: Met, made: Tensor | None, scoring: Scoring, point: Point) -> Tensor:
    """Scores [B, H, blocks, queries, keys] of what meets: products, or what is made up, capped, and the bias. point:
    where they stand, which broadcasts to them, with what the bias reads."""
    found = met.query @ met.key.transpose(-1, -2) * met.scale if made is None else made
    if scoring.softcap is not None:
        found = scoring.softcap * torch.tanh(found / scoring.softcap)
    if scoring.bias is None:
        return found
    bias = real_value(scoring.bias, point, _Numbers(scoring.tables or {}, met))
    return found + torch.as_tensor(bias, device=found.device).to(found.dtype)


def kind_of(table: Table) -> str:
    """What a spec calls it."""
    return {Scalars: "scalars", Vectors: "vectors", Sinusoids: "sinusoids"}[type(table)]


def tensors_of(table: Table) -> tuple[Tensor, ...]:
    """What it is made of: each tensor [H, ...]."""
    return tuple(getattr(table, item.name) for item in fields(table))


def table_of(kind: str, tensors: Sequence[Tensor]) -> tuple[Table, Sequence[Tensor]]:
    """The table made of the first of the tensors, and the others."""
    match kind:
        case "scalars":
            return Scalars(tensors[0]), tensors[1:]
        case "vectors":
            return Vectors(tensors[0]), tensors[1:]
        case _:
            return Sinusoids(*tensors[:3]), tensors[3:]


def _of_heads(tables: Mapping[str, Table], heads: Tensor | None) -> Mapping[str, Table]:
    """The tables of some heads."""
    if heads is None:
        return tables
    return {name: type(table)(*(x[heads] for x in tensors_of(table))) for name, table in tables.items()}


def tables_read(bias: Real | None) -> list[str]:
    """The tables that a bias looks up."""
    return [] if bias is None else list(dict.fromkeys(part.table for part in parts(bias) if isinstance(part, Entry)))


def as_table(name: str, kind: str, size: int | None, given: object, query: Tensor) -> Table:
    """A table as a caller gives it: a tensor [heads, size] of scalars, [heads, size, D] of vectors; of sinusoids weight
    [heads, D, dim], u and v [heads, D]; or one that is made already.

    kind, size: as declared. Raises InputError (E502) on anything else.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    forms: dict[str, tuple[tuple[int | None, ...], ...]] = {
        "scalars": ((heads, size),),
        "vectors": ((heads, size, head_dim),),
        "sinusoids": ((heads, head_dim, None), (heads, head_dim), (heads, head_dim)),
    }
    form = forms[kind]
    if isinstance(given, Scalars | Vectors | Sinusoids):
        tensors: tuple[object, ...] = tensors_of(given) if kind_of(given) == kind else (given,)
    else:
        tensors = tuple(given) if isinstance(given, tuple | list) else (given,)
    fitting = [
        x
        for x, wanted in zip(tensors, form, strict=False)
        if isinstance(x, Tensor) and _fits(x, wanted) and x.is_floating_point() and x.device == query.device
    ]
    if len(fitting) == len(form) == len(tensors):
        return table_of(kind, fitting)[0]
    wanted = ", ".join(f"[{', '.join('any' if n is None else str(n) for n in sizes)}]" for sizes in form)
    help = f"give {wanted} of floating point on {query.device}"
    raise input_error("E502", f"table `{name}` of {kind} is {', '.join(map(_shown, tensors))}", help)


def _fits(x: Tensor, sizes: Sequence[int | None]) -> bool:
    return x.dim() == len(sizes) and all(size in (None, found) for size, found in zip(sizes, x.shape, strict=True))


def _shown(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{list(x.shape)}, {x.dtype} on {x.device}"
