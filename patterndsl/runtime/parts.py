"""How does a pattern run that is more than one relation with the same inputs for all heads? As programs of its parts.

Terms of a multiset and heads with labels of their own each run by themselves: heads as batch rows, and terms merged by
their log-sum-exp, which is what counting a key for each of them means. PyTorch differentiates what joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patterndsl.device.graphs import remembered
from patterndsl.ir.relation import Relation, inputs_read
from patterndsl.lower.choice import is_own_key
from patterndsl.lower.lists import apart, listed_relation
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.finite import is_finite
from patterndsl.runtime.function import attended
from patterndsl.runtime.routes import Routes, averaged
from patterndsl.sema.bind import Bound, HeadGroup

if TYPE_CHECKING:
    from patterndsl.runtime.program import Program


def part_of(bound: Bound, relation: Relation, num_heads: int) -> Bound:
    """One relation of a pattern, the same for all of so many heads."""
    read = inputs_read(relation)
    inputs = tuple(shape for shape in bound.inputs if not read.isdisjoint(shape.names))
    groups = (HeadGroup(relation, tuple(range(num_heads))),)
    return Bound(relation, groups, inputs, bound.sizes, num_heads, bound.layer)


def read_by(bound: Bound, given: Inputs) -> dict[str, Tensor]:
    """Those of the inputs that a part reads."""
    names = {name for shape in bound.inputs for name in shape.names}
    return {name: values for name, values in given.items() if name in names}


# ---- heads with inputs of their own


def has_heads(given: Inputs) -> bool:
    """Whether some input differs from head to head."""
    return any(values.dim() == 3 for values in given.values())


def folded(given: Inputs, heads: Sequence[int], batch: int) -> dict[str, Tensor]:
    """The inputs of these heads of all batch rows, [batch * heads, length]; [length] or [1, length] where all agree."""
    found: dict[str, Tensor] = {}
    for name, values in given.items():
        if values.dim() == 3:
            mine = _of_heads(values, heads).expand(batch, -1, -1).flatten(0, 1)
        elif values.dim() == 2 and values.shape[0] > 1:
            mine = values.repeat_interleave(len(heads), 0)
        else:
            mine = values
        found[name] = mine
    return found


def only_heads(given: Inputs, heads: Sequence[int]) -> dict[str, Tensor]:
    """The inputs as these heads have them."""
    return {name: _of_heads(values, heads) if values.dim() == 3 else values for name, values in given.items()}


def _of_heads(values: Tensor, heads: Sequence[int]) -> Tensor:
    """Those of [rows, all heads, length]."""
    is_all = tuple(heads) == tuple(range(values.shape[1]))
    return values if is_all else values.index_select(1, _numbers(tuple(heads), values.device))


@remembered(256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, as a copy from the host waits for the device."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Some heads of query, key and value."""

    heads: tuple[int, ...]
    num_heads: int

    @property
    def is_all(self) -> bool:
        return self.heads == tuple(range(self.num_heads))

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, T, D] each; query heads that share a key head each have a copy of it unless all heads are here."""
        if self.is_all:
            return query, key, value
        heads, again = _numbers(self.heads, query.device), query.shape[1] // key.shape[1]
        kv_heads = heads // again
        return query.index_select(1, heads), key.index_select(1, kv_heads), value.index_select(1, kv_heads)

    def rows(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B * heads, 1, T, D] each: heads as batch rows."""
        query, key, value = self.take(query, key, value)
        again = query.shape[1] // key.shape[1]
        if again > 1:
            key, value = (x.repeat_interleave(again, dim=1) for x in (key, value))
        q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (query, key, value))
        return q, k, v

    def unfold(self, x: Tensor, batch: int) -> Tensor:
        """[B, heads, ...] of [B * heads, 1, ...]."""
        return x.reshape(batch, len(self.heads), *x.shape[2:])


def assembled(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """[B, H, ...] of the parts of disjoint heads, [B, heads, ...] each."""
    if len(parts) == 1:
        return parts[0][1]
    order = [head for heads, _ in parts for head in heads]
    places = _numbers(tuple(sorted(range(len(order)), key=order.__getitem__)), parts[0][1].device)
    return torch.cat([x for _, x in parts], dim=1).index_select(1, places)


# ---- results


def merged(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and lse of the sum of several parts' keys; differentiable, also where rows are empty.

    parts: out [B, H, Tq, D], lse [B, H, Tq].
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    empty = (lses == -torch.inf).all(0)
    safe = lses.masked_fill(empty, 0.0)
    weights = safe.softmax(0)
    out = torch.stack([(out * weight[..., None]) for (out, _), weight in zip(parts, weights, strict=True)]).sum(0)
    return out.to(parts[0][0].dtype), safe.logsumexp(0).masked_fill(empty, -torch.inf)


def otherwise(main: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The results of another pattern in rows that have no keys."""
    empty = main[1] == -torch.inf
    return torch.where(empty[..., None], other[0], main[0]), torch.where(empty, other[1], main[1])


def or_own_key(
    main: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor, scale: float, *, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """`otherwise` where the other pattern is `q == k`: its output is the value itself, so nothing is attended."""
    out, lse = main
    again = query.shape[1] // key.shape[1]
    if again > 1:
        key, value = (x.repeat_interleave(again, dim=1) for x in (key, value))
    empty = lse == -torch.inf
    out = torch.where(empty[..., None], value, out)
    if not want_lse:
        return out, None
    # the gradient of what is not asked for is 0, and 0 x NaN is NaN
    query, key = (torch.where(empty[..., None], x.to(lse.dtype), 0.0) for x in (query, key))
    scores = (query * key).sum(-1) * scale
    return out, torch.where(empty, scores, lse)


# ---- programs


class Parts:
    """A pattern as programs of its parts, each made when it is first asked for. program_of: makes one. takes_routes:
    whether all routes of a selection are one part, and not a program each.

    A multiset is the sum of its terms, a fallback stands in for rows that have no keys, and heads whose inputs differ
    are batch rows of a program of one head.
    """

    def __init__(self, bound: Bound, program_of: Callable[[Bound], Program], *, takes_routes: bool) -> None:
        self.bound, self.program_of, self.takes_routes = bound, program_of, takes_routes

    @cached_property
    def by_head(self) -> tuple[tuple[Chosen, Program], ...]:
        """The heads that agree, with the program of one of them."""
        groups, total = self.bound.groups, self.bound.num_heads
        found = ((Chosen(group.heads, total), part_of(self.bound, group.relation, 1)) for group in groups)
        return tuple((chosen, self.program_of(bound)) for chosen, bound in found)

    @cached_property
    def summed(self) -> tuple[tuple[Chosen, tuple[Program | Routes, ...]], ...]:
        """Heads that agree, with the programs of terms whose keys add up, or all routes of a selection; of a set that
        is one, for all heads."""
        return self._summed(with_routes=self.takes_routes)

    @cached_property
    def terms(self) -> tuple[tuple[Chosen, tuple[Program, ...]], ...]:
        """The same with a program of each route."""
        found = self._summed(with_routes=False)
        return tuple((chosen, tuple(x for x in parts if not isinstance(x, Routes))) for chosen, parts in found)

    def _summed(self, *, with_routes: bool) -> tuple[tuple[Chosen, tuple[Program | Routes, ...]], ...]:
        total = self.bound.num_heads
        found: list[tuple[Chosen, tuple[Program | Routes, ...]]] = []
        for group in self.bound.groups:
            terms, listed = apart(group.relation, self.bound)
            routes = list[Routes]()
            for lists, rest in listed.items():
                if lists.is_route and with_routes:
                    routes.append(Routes(lists, rest, self.bound.sizes))
                elif lists.is_route:
                    each = (replace(lists, names=(name,)) for name in lists.names)
                    terms.extend(listed_relation(one, rest, self.bound) for one in each)
                else:
                    terms.append(listed_relation(lists, rest, self.bound))
            programs = (self.program_of(part_of(self.bound, term, len(group.heads))) for term in terms)
            found.append((Chosen(group.heads, total), (*programs, *routes)))
        return tuple(found)

    @cached_property
    def otherwise(self) -> tuple[Program, Program] | None:
        """What rows attend, and those of them without keys."""
        fallback = self.bound.fallback
        return (
            None
            if fallback is None
            else (self.program_of(replace(self.bound, fallback=None)), self.program_of(fallback))
        )

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: dict[str, Tensor],
        scale: float,
        *,
        train: bool,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and lse of a call; see `Program.attend`."""
        if self.otherwise is not None:
            main, fallback = self.otherwise
            results = _run(main, (query, key, value), given, scale, train)
            if is_own_key(fallback.bound):
                return or_own_key(results, query, key, value, scale, want_lse=want_lse)
            other = read_by(fallback.bound, given)
            return otherwise(results, _run(fallback, (query, key, value), other, scale, train))
        found = list[tuple[Sequence[int], tuple[Tensor, Tensor]]]()
        if self.bound.is_plain:
            batch = query.shape[0]
            for chosen, program in self.by_head:
                rows = chosen.rows(query, key, value)
                out, lse = _run(program, rows, folded(given, chosen.heads, batch), scale, train)
                found.append((chosen.heads, (chosen.unfold(out, batch), chosen.unfold(lse, batch))))
            return _assembled(found)
        # a route's dense call multiplies what it masks by 0, which is NaN for what is not finite
        careful = self.takes_routes and query.device.type == "cpu" and not is_finite(query, key, value)
        for chosen, programs in self.terms if careful else self.summed:
            tensors = chosen.take(query, key, value)
            mine = given if chosen.is_all else only_heads(given, chosen.heads)
            found.append((chosen.heads, self._joined(programs, tensors, mine, scale, train)))
        return _assembled(found)

    def _joined(
        self,
        parts: Sequence[Program | Routes],
        tensors: tuple[Tensor, Tensor, Tensor],
        given: Inputs,
        scale: float,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of all parts of some heads; of a mean the lse is the log of how many parts have keys."""
        is_mean, results = self.bound.merge == "mean", list[tuple[Tensor, Tensor]]()
        query, key, value = tensors
        again = query.shape[1] // key.shape[1]
        for part in parts:
            if isinstance(part, Routes):
                k, v = (x.repeat_interleave(again, dim=1) if again > 1 else x for x in (key, value))
                results.append((part.totals if is_mean else part.results)(query, k, v, given, scale))
                continue
            out, lse = _run(part, tensors, read_by(part.bound, given), scale, train)
            results.append((out, (lse > -torch.inf).to(out.dtype)) if is_mean else (out, lse))
        if not is_mean:
            return merged(results)
        out, count = averaged(results)
        return out.to(value.dtype), count

    def counts(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """See `Program.counted`."""
        if self.otherwise is not None:
            main, fallback = self.otherwise
            counts = main.counted(positions, given)
            other = fallback.counted(positions, read_by(fallback.bound, given))
            return torch.where((counts > 0).any(-1, keepdim=True), counts, other.to(counts.dtype))
        num_rows = max((values.shape[0] for values in given.values() if values.dim() > 1), default=1)
        parts = list[tuple[Sequence[int], Tensor]]()
        if self.bound.is_plain:
            for chosen, program in self.by_head:
                rows = program.counted(positions, folded(given, chosen.heads, num_rows))
                parts.append(
                    (chosen.heads, chosen.unfold(rows.expand(num_rows * len(chosen.heads), -1, -1, -1), num_rows))
                )
            return assembled(parts)
        for chosen, programs in self.terms:
            mine = given if chosen.is_all else only_heads(given, chosen.heads)
            terms = [program.counted(positions, read_by(program.bound, mine)) for program in programs]
            terms = [term.long().expand(num_rows, len(chosen.heads), -1, -1) for term in terms]
            parts.append((chosen.heads, torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]))
        return assembled(parts)

    def averaged_counts(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The softmaxes that a mean averages, [softmaxes, rows, heads, len(positions), kv_len]: those without keys are
        left out of it, in each row."""
        if self.otherwise is not None:
            main, fallback = self.otherwise
            counts = main.counted_apart(positions, given)
            other = fallback.counted(positions, read_by(fallback.bound, given)).to(counts.dtype)
            has = (counts > 0).any(-1, keepdim=True).any(0)
            return torch.cat([torch.where(has, counts[0], other)[None], counts[1:]])
        num_rows = max((values.shape[0] for values in given.values() if values.dim() > 1), default=1)
        parts = list[tuple[Sequence[int], list[Tensor]]]()
        for chosen, programs in self.terms:
            mine = given if chosen.is_all else only_heads(given, chosen.heads)
            terms = (program.counted(positions, read_by(program.bound, mine)) for program in programs)
            parts.append((chosen.heads, [term.long().expand(num_rows, len(chosen.heads), -1, -1) for term in terms]))
        most = max(len(terms) for _, terms in parts)
        filled = [(heads, [*terms, *[torch.zeros_like(terms[0])] * (most - len(terms))]) for heads, terms in parts]
        return torch.stack([assembled([(heads, terms[at]) for heads, terms in filled]) for at in range(most)])


def _run(
    program: Program, tensors: tuple[Tensor, Tensor, Tensor], given: dict[str, Tensor], scale: float, train: bool
) -> tuple[Tensor, Tensor]:
    out, lse = attended(*tensors, program.attending(*tensors, given, scale, train=train, want_lse=True))
    assert lse is not None
    return out, lse


def _assembled(parts: Sequence[tuple[Sequence[int], tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    outs, lses = ([(heads, results[at]) for heads, results in parts] for at in range(2))
    return assembled(outs), assembled(lses)
