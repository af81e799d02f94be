"""What does a predicate look up in a call? Its constants, and inputs and draws as tensors with their strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patterndsl.ir.index import Facet
from patterndsl.ir.relation import Random, Relation
from patterndsl.lower.rests import Rests
from patterndsl.runtime.data import Inputs, draws_of, facet_of
from patterndsl.runtime.kernels.predicate import Predicate, hiding_of, predicate_of
from patterndsl.sema.parameters import Sizes

Facets: TypeAlias = Mapping[tuple[str, Facet], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """Who stands where: the row of queries, and that of keys, at each place, int32 [batch or 1, Hq or 1, places].

    Places of -1 are empty; tiles that have one must not be full ones. No row stands at two places of a batch row and
    head, and what stands nowhere is left as it is. Keys too have an order for each head of queries. is_full: whether no
    place is empty.
    """

    query: Tensor
    key: Tensor
    is_full: bool = False

    @property
    def is_of_heads(self) -> bool:
        """Whether heads have orders of their own."""
        return self.key.shape[1] > 1


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a launch asks of pairs: the predicate as a function of Triton's, and its arguments. q_start: the absolute
    position of the first query. orders: who stands at the places that tiles are of, None where rows themselves do.
    by_rests: what `of_rests` gives, where the relation is known."""

    keep: Any
    numbers: tuple[int, ...]
    tables: tuple[Tensor, ...]
    q_start: int
    orders: Orders | None = None
    by_rests: Callable[[Rests | None], Asked] | None = None

    def of_rests(self, rests: Rests | None) -> Asked:
        """The same of tiles that leave these: `keep` is then a function `hide`, see `predicate.hiding_of`."""
        assert self.by_rests is not None, "who asks for rests knows the relation"
        return self.by_rests(rests)


def draws_for(relation: Relation, num_heads: int, device: torch.device) -> dict[Random, Tensor]:
    """What the relation draws, the same in each call: int32 [heads or 1, rows, count]."""
    draws = draws_of(relation, num_heads, device)
    return {node: keys.to(torch.int32).contiguous() for node, keys in draws.items()}


def asked_of(
    relation: Relation,
    sizes: Sizes,
    given: Inputs,
    draws: Mapping[Random, Tensor],
    orders: Orders | None = None,
) -> Asked:
    """The predicate of all heads. given: checked inputs, [length], [batch, length] or [batch, heads, length]."""

    def asked(predicate: Predicate) -> Asked:
        facets = {(name, facet): facet_of(given[name], facet) for name, facet in predicate.facets}
        return asked_by(predicate, sizes, facets, draws, orders)

    @cache
    def by_rests(rests: Rests | None) -> Asked:
        return asked(hiding_of(relation, rests.relations if rests else (), sizes))

    return replace(asked(predicate_of(relation, sizes)), by_rests=by_rests)


def asked_by(
    predicate: Predicate, sizes: Sizes, facets: Facets, draws: Mapping[Random, Tensor], orders: Orders | None = None
) -> Asked:
    """A predicate with what it looks up: of inputs as `data.facet_of` has it, of draws as `draws_for`. orders: whose
    places those are that a predicate asks for by a rank, see `predicate_of`."""
    from patterndsl.runtime.kernels.source import function_of

    numbers, tables = list(predicate.numbers), list[Tensor]()
    for table in predicate.tables:
        if isinstance(table, Random):
            keys = draws[table]
            tables.append(keys)
            numbers += keys.shape[1], 0, keys.stride(0) if keys.shape[0] > 1 else 0
        else:
            values = facets[table].contiguous()
            tables.append(values if table[1] == "value" else values.to(torch.int32))
            steps = [step if size > 1 else 0 for size, step in zip(values.shape, values.stride(), strict=True)]
            numbers += values.shape[-1], *(*steps[:-1], 0, 0)[:2]
    return Asked(function_of(predicate.text, predicate.name), tuple(numbers), tuple(tables), sizes.q_start, orders)
