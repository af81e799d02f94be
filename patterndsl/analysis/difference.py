"""What has one pattern that another lacks, at one length? Every pair is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np

from patterndsl.diagnostics import error
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound

Cell: TypeAlias = Literal["none", "both", "first", "second", "mixed"]

MAX_PAIRS = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Counts of pairs, the first pair of each side, and the two masks, bool [N, N], over all heads united."""

    both: int
    only_first: int
    only_second: int
    first_example: tuple[int, int] | None
    second_example: tuple[int, int] | None
    masks: tuple[Any, Any]

    @property
    def differs(self) -> bool:
        return bool(self.only_first or self.only_second)

    def cells(self, side: int) -> list[list[Cell]]:
        """The difference as a square of at most `side` cells: what is in a cell."""
        first, second = self.masks
        n = first.shape[0]
        edges = np.unique(np.linspace(0, n, min(side, n) + 1).astype(np.int64))
        rows: list[list[Cell]] = []
        for top, bottom in pairwise(edges):
            row: list[Cell] = []
            for left, right in pairwise(edges):
                a, b = first[top:bottom, left:right], second[top:bottom, left:right]
                row.append(_cell(bool((a & ~b).any()), bool((b & ~a).any()), bool((a & b).any())))
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "n": int(self.masks[0].shape[0]),
            "both": self.both,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "first_example": self.first_example,
            "second_example": self.second_example,
        }


def difference(first: Bound, second: Bound) -> Difference:
    """The difference of two patterns of one length, head 0. Raises PatternError (E501, E504)."""
    masks = (_mask(first), _mask(second))
    only_first, only_second = masks[0] & ~masks[1], masks[1] & ~masks[0]
    return Difference(
        int((masks[0] & masks[1]).sum()),
        int(only_first.sum()),
        int(only_second.sum()),
        _first_pair(only_first),
        _first_pair(only_second),
        masks,
    )


def _mask(bound: Bound) -> Any:
    n = bound.sizes.total
    if bound.inputs:
        name = bound.inputs[0].name
        raise error("E501", f"the pattern reads the input `{name}`", None, "compare patterns that read no inputs")
    if n * n > MAX_PAIRS:
        raise error("E504", f"{n:,} x {n:,} pairs are too many to look at", None, "give a smaller length, -n 4096")
    every = np.arange(n, dtype=np.int64)
    return np.broadcast_to(member(bound.groups[0].relation, Point(every[:, None], every[None], 0, Lookup())), (n, n))


def _first_pair(mask: Any) -> tuple[int, int] | None:
    at = int(mask.argmax()) if mask.size else 0
    return divmod(at, mask.shape[1]) if mask.size and mask.flat[at] else None


def _cell(first: bool, second: bool, both: bool) -> Cell:
    if first and second:
        return "mixed"
    if first or second:
        return "first" if first else "second"
    return "both" if both else "none"
