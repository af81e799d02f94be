"""How does a pattern run that is more than one relation with the same inputs for all heads? As programs of its parts.

Terms of a multiset and heads with labels of their own each run by themselves: heads as batch rows, and terms merged by
their log-sum-exp, which is what counting a key for each of them means. PyTorch differentiates what joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from patterndsl.ir.relation import Relation, inputs_read
from patterndsl.lower.choice import is_own_key
from patterndsl.lower.lists import apart, listed_relation
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.finite import is_finite
from patterndsl.runtime.function import Attends, attended
from patterndsl.runtime.heads import Chosen, assembled, folded, for_each_query_head, only_heads, rows_of
from patterndsl.runtime.joined import merged, or_own_key, otherwise
from patterndsl.runtime.routes import Routes, averaged
from patterndsl.sema.bind import Bound, HeadGroup


class Part(Attends, Protocol):
    """What is asked of the program of a part."""

    bound: Bound

    def counted(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """How often each key counts, [rows, heads, len(positions), kv_len]."""
        ...

    def counted_apart(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The same of each softmax that a mean averages, [softmaxes, ...]."""
        ...


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


class Parts:
    """A pattern as programs of its parts, each made when it is first asked for. program_of: makes one. takes_routes:
    whether all routes of a selection are one part, and not a program each.

    A multiset is the sum of its terms, a fallback stands in for rows that have no keys, and heads whose inputs differ
    are batch rows of a program of one head.
    """

    def __init__(self, bound: Bound, program_of: Callable[[Bound], Part], *, takes_routes: bool) -> None:
        self.bound, self.program_of, self.takes_routes = bound, program_of, takes_routes

    @cached_property
    def by_head(self) -> tuple[tuple[Chosen, Part], ...]:
        """The heads that agree, with the program of one of them."""
        groups, total = self.bound.groups, self.bound.num_heads
        found = ((Chosen(group.heads, total), part_of(self.bound, group.relation, 1)) for group in groups)
        return tuple((chosen, self.program_of(bound)) for chosen, bound in found)

    @cached_property
    def summed(self) -> tuple[tuple[Chosen, tuple[Part | Routes, ...]], ...]:
        """Heads that agree, with the programs of terms whose keys add up, or all routes of a selection; of a set that
        is one, for all heads."""
        return self._summed(with_routes=self.takes_routes)

    @cached_property
    def terms(self) -> tuple[tuple[Chosen, tuple[Part, ...]], ...]:
        """The same with a program of each route."""
        found = self._summed(with_routes=False)
        return tuple((chosen, tuple(x for x in parts if not isinstance(x, Routes))) for chosen, parts in found)

    def _summed(self, *, with_routes: bool) -> tuple[tuple[Chosen, tuple[Part | Routes, ...]], ...]:
        total = self.bound.num_heads
        found: list[tuple[Chosen, tuple[Part | Routes, ...]]] = []
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
    def otherwise(self) -> tuple[Part, Part] | None:
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
        parts: Sequence[Part | Routes],
        tensors: tuple[Tensor, Tensor, Tensor],
        given: Inputs,
        scale: float,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse of all parts of some heads; of a mean the lse is the log of how many parts have keys."""
        is_mean, results = self.bound.merge == "mean", list[tuple[Tensor, Tensor]]()
        query, key, value = tensors
        for part in parts:
            if isinstance(part, Routes):
                k, v = (for_each_query_head(x, query.shape[1]) for x in (key, value))
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
        num_rows = rows_of(given)
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
        num_rows = rows_of(given)
        parts = list[tuple[Sequence[int], list[Tensor]]]()
        for chosen, programs in self.terms:
            mine = given if chosen.is_all else only_heads(given, chosen.heads)
            terms = (program.counted(positions, read_by(program.bound, mine)) for program in programs)
            parts.append((chosen.heads, [term.long().expand(num_rows, len(chosen.heads), -1, -1) for term in terms]))
        most = max(len(terms) for _, terms in parts)
        filled = [(heads, [*terms, *[torch.zeros_like(terms[0])] * (most - len(terms))]) for heads, terms in parts]
        return torch.stack([assembled([(heads, terms[at]) for heads, terms in filled]) for at in range(most)])


def _run(
    program: Part, tensors: tuple[Tensor, Tensor, Tensor], given: dict[str, Tensor], scale: float, train: bool
) -> tuple[Tensor, Tensor]:
    out, lse = attended(*tensors, program.attending(*tensors, given, scale, train=train, want_lse=True))
    assert lse is not None
    return out, lse


def _assembled(parts: Sequence[tuple[Sequence[int], tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    outs, lses = ([(heads, results[at]) for heads, results in parts] for at in range(2))
    return assembled(outs), assembled(lses)
