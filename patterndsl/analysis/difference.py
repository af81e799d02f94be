"""What has one pattern that another lacks, at one length? Every pair is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from patterndsl.diagnostics import error
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound

CELLS = ("none", "both", "first", "second", "mixed")
"""What a square of pairs can have: nothing, only what both have, something that only one has, that each lacks."""

MAX_PAIRS = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Counts of pairs, the first pair of each side, and the two masks, bool [queries, keys], of head 0."""

    both: int
    only_first: int
    only_second: int
    first_example: tuple[int, int] | None
    second_example: tuple[int, int] | None
    masks: tuple[Any, Any]

    @property
    def differs(self) -> bool:
        return bool(self.only_first or self.only_second)

    def cells(self, cell: int) -> Any:
        """What is in each square of `cell` positions: uint8, the index into CELLS."""
        first, second = self.masks
        has = [_any(mask, cell) for mask in (first & second, first & ~second, second & ~first)]
        found = np.where(has[0], CELLS.index("both"), CELLS.index("none")).astype(np.uint8)
        found[has[1]] = CELLS.index("first")
        found[has[2]] = CELLS.index("second")
        found[has[1] & has[2]] = CELLS.index("mixed")
        return found

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


def difference(first: Bound, second: Bound, lookups: tuple[Lookup, Lookup] | None = None) -> Difference:
    """The difference of two patterns of as many queries and keys, head 0. lookups: what each reads.

    Raises PatternError (E504) where there are too many pairs.
    """
    known = lookups or (Lookup(), Lookup())
    masks = (_mask(first, known[0]), _mask(second, known[1]))
    only_first, only_second = masks[0] & ~masks[1], masks[1] & ~masks[0]
    return Difference(
        int((masks[0] & masks[1]).sum()),
        int(only_first.sum()),
        int(only_second.sum()),
        _first_pair(only_first),
        _first_pair(only_second),
        masks,
    )


def _mask(bound: Bound, lookup: Lookup) -> Any:
    shape = (bound.sizes.q_len, bound.sizes.kv_len)
    if shape[0] * shape[1] > MAX_PAIRS:
        message = f"{shape[0]:,} x {shape[1]:,} pairs are too many to look at"
        raise error("E504", message, None, "give a smaller length, -n 4096")
    q, k = (np.arange(length, dtype=np.int64) for length in shape)
    return np.broadcast_to(member(bound.groups[0].relation, Point(q[:, None], k[None], 0, lookup)), shape)


def _first_pair(mask: Any) -> tuple[int, int] | None:
    at = int(mask.argmax()) if mask.size else 0
    return divmod(at, mask.shape[1]) if mask.size and mask.flat[at] else None


def _any(mask: Any, cell: int) -> Any:
    """Whether each square of `cell` positions has a true pair; the last ones may be smaller."""
    if not mask.size:
        return mask
    rows, columns = (np.arange(0, length, cell) for length in mask.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows, axis=0), columns, axis=1)
