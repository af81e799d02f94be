"""Which positions can have pairs at all? Those between the first and the last that conditions on one side allow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from patterndsl.ir.index import Symbol
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import And, Relation, conjunction, depends_on, inputs_read
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound


def queries_needed(bound: Bound) -> range:
    """Rows, counted from the first query, outside of which no query has a key. Work: O(queries)."""
    start, rows = bound.sizes.q_start, np.arange(bound.sizes.q_len, dtype=np.int64)
    return _hull(bound, "k", rows.size, lambda head: Point(start + rows, 0, head, Lookup({})))


def keys_needed(bound: Bound) -> range:
    """Keys outside of which none is attended. Work: O(keys)."""
    keys = np.arange(bound.sizes.kv_len, dtype=np.int64)
    return _hull(bound, "q", keys.size, lambda head: Point(0, keys, head, Lookup({})))


def _hull(bound: Bound, other_side: Symbol, size: int, point: Callable[[int], Point]) -> range:
    """A range that holds all places where the conditions that are not of the other side, nor of inputs, hold."""
    places = []
    for group in bound.groups:
        holds = member(_of_one_side(group.relation, other_side), point(group.heads[0]))
        places.append(np.flatnonzero(np.broadcast_to(holds, (size,))))
    found = np.concatenate(places)
    return range(int(found.min()), int(found.max()) + 1) if found.size else range(0)


def _of_one_side(relation: Relation, other_side: Symbol) -> Relation:
    terms = relation.terms if isinstance(relation, And) else (relation,)
    return conjunction(term for term in terms if not depends_on(term, other_side) and not inputs_read(term))
