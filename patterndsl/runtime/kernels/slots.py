"""What is a pass over slots? Who stands where, what is asked of pairs, and which work there is, without Triton.

A slot is a place where a query stands, and one may stand at several, with a result at each: once in each of its routes,
or once for each block of keys that it lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.shapes import Shapes
from patterndsl.runtime.kernels.work import Work

Sure = Literal["never", "always", "behind"]
"""Where all pairs of a listed block count: nowhere, where the block is whole, or where the query is not before it."""


class Slots(NamedTuple):
    """Who stands where, and where each row stands.

    query: int32 [rows, heads, slots], the query in each slot, -1 for nobody. Rows and heads are 1 where all agree.
    places: int32, the slots of all positions in ascending order, one after the other: [1, 1, ..] of all lists, where
    those of position p begin at begins[.., p], [rows, heads, keys], and end where those of the next begin; or [rows,
    heads, ..] with `width` of each query, -1 for none, where begins is None.
    """

    query: Tensor
    places: Tensor
    begins: Tensor | None
    width: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """What is attended in slots. key: int32 [rows, heads, places], which key stands where, None where keys lie so; of
    routes the places of keys are slots, too.

    rows: the work over tiles of slots; columns: that over blocks of keys, of routes through one query head of each
    group, the `turn`-th.
    """

    slots: Slots
    key: Tensor | None
    is_route: bool
    asked: Asked
    shapes: Shapes
    rows: Work
    columns: Callable[[int], Work]


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Of slots: out [B, Hq, slots, Dv], lse [B, Hq, slots]."""

    out: Tensor
    lse: Tensor
