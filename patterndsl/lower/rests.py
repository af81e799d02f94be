"""What does a tile leave undecided? Most comparisons of a pattern are decided in a tile that is cut by its border.

Of `recent(512) | causal & first(4)` a tile at the diagonal decides all but `k <= q`, and one of the first keys all but
`k < 4`: a kernel that asks for the rest alone computes a fraction of the predicate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from patterndsl.ir.index import Arithmetic, Const, Function
from patterndsl.ir.interval import Box, verdict
from patterndsl.ir.relation import (
    EVERYTHING,
    NOTHING,
    And,
    Compare,
    Or,
    Relation,
    conjunction,
    depends_on,
    disjunction,
    draws_in,
    inputs_read,
)
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles
from patterndsl.sema.parameters import Sizes

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Places: TypeAlias = np.ndarray[Any, np.dtype[np.int8]]

MOST = 5
"""Rests that are told from each other. Tiles with any other one ask for the whole predicate."""
RARE = 1 / 32
"""The share of partial tiles below which a rest is not worth the code."""
OTHER = -1
"""The place of any other one."""
MOST_TERMS = 31
"""Comparisons of a pattern; one of more is asked as a whole. Two bits for each make one number."""
MOST_TILES = 1 << 22
"""Partial tiles of a pattern; with more, to tell their rests takes seconds, and they are asked for as a whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Rests:
    """relations: the rests that many tiles have. places: of each group of tiles, int8 [num_tiles], where in these the
    rest of each tile is, or OTHER; a tile that is full may have any."""

    relations: tuple[Relation, ...]
    places: tuple[Places, ...]


def rests_of(groups: Sequence[tuple[Relation, Tiles]], sizes: Sizes) -> Rests:
    """The rests of tiles of bound relations without `head` in them, which hold in a tile just where these do. None of
    them looks anything up.

    Work: O(comparisons x partial tiles), vectorised.
    """
    found = [_of_group(relation, tiles, sizes) for relation, tiles in groups]
    number = Counter[Relation]()
    for rests, turns in found:
        number.update(dict(zip(rests, np.bincount(turns[turns >= 0], minlength=len(rests)).tolist(), strict=True)))
    least = RARE * sum(int(np.count_nonzero(~_on_host(tiles.is_full))) for _, tiles in groups)
    kept = tuple(relation for relation, count in number.most_common(MOST) if count >= least)
    places = list[Places]()
    for rests, turns in found:
        place = np.array([kept.index(rest) if rest in kept else OTHER for rest in rests] + [OTHER], dtype=np.int8)
        places.append(place[turns])
    return Rests(kept, tuple(places))


def _of_group(relation: Relation, tiles: Tiles, sizes: Sizes) -> tuple[list[Relation], Integers]:
    """The rests of partial tiles that are less than the whole, each with equal ones once, and which of them each tile
    has; -1 for others."""
    turns = np.full(tiles.num_tiles, -1, dtype=np.int64)
    relation = _apart(relation)
    terms = list(dict.fromkeys(_terms(relation)))
    partial = np.flatnonzero(~_on_host(tiles.is_full))
    if not 0 < len(partial) <= MOST_TILES or not 1 < len(terms) <= MOST_TERMS:
        return [], turns
    q_low = sizes.q_start + _on_host(tiles.q_blks)[partial] * tiles.q_block
    k_low = _on_host(tiles.kv_blks)[partial] * tiles.kv_block
    q_high = np.minimum(q_low + tiles.q_block, sizes.q_start + sizes.q_len) - 1
    k_high = np.minimum(k_low + tiles.kv_block, sizes.kv_len) - 1
    box = Box((q_low, q_high), (k_low, k_high), Lookup())
    states = np.zeros(len(partial), dtype=np.int64)
    for at, term in enumerate(terms):
        certain, possible = (False, True) if _looks_up(term) else verdict(term, box)
        states |= (np.where(possible, 1, 0) + np.where(certain, 1, 0)) << 2 * at
    different, of_tile = np.unique(states, return_inverse=True)
    rests = dict[Relation, int]()
    place_of = list[int]()
    for state in different.tolist():
        put = {term: (NOTHING, term, EVERYTHING)[state >> 2 * at & 3] for at, term in enumerate(terms)}
        rest = _with_terms(relation, put.__getitem__)
        is_whole = rest == relation or _looks_up(rest)  # by tables of the pattern of all heads
        place_of.append(-1 if is_whole else rests.setdefault(rest, len(rests)))
    turns[partial] = np.array(place_of)[of_tile]
    return list(rests), turns


def _on_host(x: Any) -> Integers:
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def _terms(relation: Relation) -> Iterator[Relation]:
    """What conjunctions and disjunctions join."""
    if isinstance(relation, And | Or):
        for term in relation.terms:
            yield from _terms(term)
    else:
        yield relation


def _with_terms(relation: Relation, put: Callable[[Relation], Relation]) -> Relation:
    if not isinstance(relation, And | Or):
        return put(relation)
    join: Callable[[Iterable[Relation]], Relation] = conjunction if isinstance(relation, And) else disjunction
    return join(_with_terms(term, put) for term in relation.terms)


def _apart(relation: Relation) -> Relation:
    """Both sides of a distance apart, of which a tile meets one."""

    def put(term: Relation) -> Relation:
        match term:
            case Compare("<" | "<=" as op, Function("abs", (x,)), bound):
                return conjunction((Compare(op, x, bound), Compare(op, Arithmetic("-", Const(0), x), bound)))
        return term

    return _with_terms(relation, put)


def _looks_up(term: Relation) -> bool:
    """Whether more than positions decide it."""
    return bool(depends_on(term, "head") or inputs_read(term) or any(draws_in(term)))
