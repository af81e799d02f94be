"""Which pairs does a pattern keep at one length? All of them, listed: what advice about a pattern is counted from.

The work is bounded. What reads inputs, or would take too long, has no list; so nothing is said of it that was not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import NK, NQ, Arithmetic, Const, K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import And, Or, Random, Relation, children, direct_indices, indices, subexpressions
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound, HeadGroup, bind
from patterndsl.sema.fits import fitting
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import ParamValue, param_values, self_sizes

Integers: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LENGTHS = (4096, 1024)
"""Where a pattern is looked at if no length is asked for: the first that is not too much work."""
MAX_LENGTH = 16_384
MAX_WORK = 400_000_000
"""Comparisons of single numbers; four take some nanosecond on a core of 2026."""
ADDING, DIVIDING, DRAWING, LISTING = 2, 8, 480, 4
"""What a sum, a division, a candidate of a draw, and a pair that is looked for in a mask take, in comparisons."""
MAX_LISTED = 1 << 22
MAX_GROUPS = 4
"""Head groups that are looked at."""
BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the first of some heads keeps; they agree but for the keys that they draw, `same_heads` in these too.

    q_blks, kv_blks: the tiles that may hold some of it. row_lengths, later: int64 [n], the keys of each query, and how
    many of them come after it. pairs: the queries and the keys of all pairs, int64; None where they are too many to
    list, or fill half of the tiles.
    """

    heads: tuple[int, ...]
    same_heads: tuple[int, ...]
    relation: Relation
    q_blks: Integers
    kv_blks: Integers
    num_pairs: int
    row_lengths: Integers
    later: Integers
    pairs: tuple[Integers, Integers] | None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A pattern at the length n. `is_as_asked`: it is the length that was asked for, or none was."""

    n: int
    params: Mapping[str, int | tuple[int, ...]]
    num_heads: int
    layer: int
    groups: tuple[Kept, ...]
    lookup: Lookup
    is_as_asked: bool

    @property
    def is_too_long(self) -> bool:
        """Whether pairs are too many to list, and few for their tiles: a shorter text shows the same."""
        return all(
            group.pairs is None and 4 * group.num_pairs <= len(group.q_blks) * BLOCK * BLOCK for group in self.groups
        )

    def relations(self, resolved: Resolved) -> dict[int, Relation] | None:
        """Another pattern of the same parameters at the same sizes, by head; None where it does not fit them."""
        try:
            bound = bind(resolved, self_sizes(resolved, self.n), self.num_heads, self.layer, dict(self.params))
        except PatternError:
            return None
        return {head: group.relation for group in bound.groups for head in group.heads}

    def holds(self, relation: Relation, q: Integers, k: Integers) -> Integers:
        """bool: which pairs the relation holds."""
        return np.broadcast_to(member(relation, Point(q, k, 0, self.lookup)), np.broadcast_shapes(q.shape, k.shape))


def sample(resolved: Resolved, n: int | None, heads: int, layer: int, *, below: int | None = None) -> Sample | None:
    """The pattern at n, or where none is given at a length that it fits. None where it cannot be looked at.

    A length that would be too much work is halved, and the parameters keep the values that they have at n. below: so
    long it must not be either.
    """
    for length, params in _lengths(resolved, n):
        if below is not None and length >= below:
            continue
        try:
            bound = bind(resolved, self_sizes(resolved, length), heads, layer, params)
        except PatternError:
            continue
        if bound.inputs:
            return None
        if n not in (None, length) and not _is_alike(resolved.relation, bound.relation, length):
            return None
        lookup = Lookup()
        groups = _listed(bound, length, lookup)
        if groups is not None:
            values = param_values(resolved, params, bound.sizes)
            return Sample(length, values, heads, layer, groups, lookup, n in (None, length))
    return None


def _lengths(resolved: Resolved, n: int | None) -> Iterator[tuple[int, dict[str, ParamValue]]]:
    """Lengths to try, and the parameters that are not at their default there."""
    if n is None:
        lengths = (fitting(resolved, length, MAX_LENGTH) for length in LENGTHS)
        yield from ((length, {}) for length in dict.fromkeys(lengths) if length is not None)
        return
    if n <= MAX_LENGTH:
        yield n, {}
    values: dict[str, ParamValue] = {**param_values(resolved, {}, self_sizes(resolved, n))}
    yield from ((length, values) for length in (MAX_LENGTH, 8192, 4096, 2048, 1024) if length < n)


def _is_alike(symbolic: Relation, bound: Relation, length: int) -> bool:
    """Whether a shorter text shows the same pattern: what positions are divided by is fixed, and fits in many times."""
    moduli = [index.right for index in indices(symbolic) if isinstance(index, Arithmetic) and index.op in ("//", "%")]
    is_fixed = not any(part in (NQ, NK) for modulus in moduli for part in subexpressions(modulus))
    return is_fixed and all(divisor * 16 <= length for divisor in divisors(bound))


def divisors(relation: Relation) -> list[int]:
    """What positions are divided by, each once, in the order of the text."""
    found: dict[int, None] = {}
    for index in indices(relation):
        if isinstance(index, Arithmetic) and index.op in ("//", "%") and isinstance(index.right, Const):
            found[index.right.value] = None
    return list(found)


# ---- the pairs of each group --------------------------------------------------------------------------------


def _listed(bound: Bound, n: int, lookup: Lookup) -> tuple[Kept, ...] | None:
    """What each of the first groups keeps, or None where that is too much work."""
    spent = 0
    looked_at = []
    alike: dict[Relation, list[HeadGroup]] = {}
    for group in bound.groups:
        alike.setdefault(without_seeds(group.relation), []).append(group)
    members = list(alike.values())[:MAX_GROUPS]
    groups = [first for first, *_ in members]
    drawn = [node for group in groups for node in draws_of(group.relation)]
    drawing = DRAWING * sum(map(_num_candidates, drawn))
    if any(node.num_q == Const(n) for node in drawn):  # such draws reach every tile; half of them where it is causal
        drawing += n * n // 2 * sum(LISTING + _work(group.relation) for group in groups)
    if drawing > MAX_WORK:
        return None
    for group in groups:
        tiles = find_tiles(group.relation, bound.sizes, lookup, BLOCK, BLOCK, tell_full=False, effort=1 << 14)
        spent += tiles.num_tiles * BLOCK * BLOCK * (LISTING + _work(group.relation))
        looked_at.append(tiles)
    if spent > MAX_WORK:
        return None
    return tuple(
        _kept(tuple(head for each in same for head in each.heads), same[0], tiles, n, lookup, MAX_LISTED // len(groups))
        for same, tiles in zip(members, looked_at, strict=True)
    )


def without_seeds(relation: Relation) -> Relation:
    """Heads that only draw other keys are alike."""
    match relation:
        case And(terms):
            return And(tuple(map(without_seeds, terms)))
        case Or(terms):
            return Or(tuple(map(without_seeds, terms)))
        case Random():
            return replace(relation, seed=Const(0))
    return relation


def _work(relation: Relation) -> int:
    """Comparisons for one pair; what depends on one of the positions only is worked out once for many."""
    if isinstance(relation, Random):
        return 2 * relation.count.value if isinstance(relation.count, Const) else MAX_WORK
    sides = [item for index in direct_indices(relation) for item in subexpressions(index)]
    both = [item for item in sides if {Q, K} <= set(subexpressions(item))]
    divisions = sum(1 for item in both if isinstance(item, Arithmetic) and item.op in ("//", "%"))
    return 1 + ADDING * len(both) + DIVIDING * divisions + sum(map(_work, children(relation)))


def draws_of(relation: Relation) -> Iterator[Random]:
    """The draws of a relation, and those that they avoid."""
    if isinstance(relation, Random):
        yield relation
        yield from draws_of(relation.avoid)
    for child in children(relation):
        yield from draws_of(child)


def _num_candidates(node: Random) -> int:
    """About how many keys are looked at to draw, told from some rows."""
    match node.count, node.num_q, node.num_k:
        case Const(count), Const(num_q), Const(num_k):
            if not num_q or not num_k:
                return 0
            if any(True for _ in draws_of(node.avoid)):
                return num_q * num_k  # not looked into
            q, k = (np.arange(64)[:, None] * 2 + 1) * num_q // 128, np.arange(num_k)[None]
            avoided = np.broadcast_to(member(node.avoid, Point(q, k, 0, Lookup())), (64, num_k)).mean(axis=1)
            rows = np.minimum(num_k, 2 * count / np.maximum(1e-9, 1 - avoided))
            return int(rows.mean() * num_q)
    raise AssertionError("a draw is not bound")


def _kept(heads: tuple[int, ...], group: HeadGroup, tiles: Tiles, n: int, lookup: Lookup, most: int) -> Kept:
    relation, q_blks, kv_blks = group.relation, tiles.q_blks, tiles.kv_blks
    row_lengths, later = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    listed: list[tuple[Integers, Integers]] = []
    num_pairs, most = 0, min(most, len(q_blks) * BLOCK * BLOCK // 2)
    inside = np.arange(BLOCK, dtype=np.int64)
    starts = np.searchsorted(q_blks, np.arange(-(-n // BLOCK) + 1))
    for q_blk in np.unique(q_blks).tolist():
        q = np.arange(q_blk * BLOCK, min(n, (q_blk + 1) * BLOCK), dtype=np.int64)
        k = (kv_blks[starts[q_blk] : starts[q_blk + 1], None] * BLOCK + inside).ravel()
        k = k[k < n]
        keep = np.broadcast_to(member(relation, Point(q[:, None], k[None], 0, lookup)), (q.size, k.size))
        row_lengths[q] = keep.sum(axis=1, dtype=np.int32)
        ahead = k > q[0]
        later[q] = (keep[:, ahead] & (k[ahead] > q[:, None])).sum(axis=1, dtype=np.int32)
        num_pairs += int(row_lengths[q].sum())
        if num_pairs <= most:
            row, column = np.divmod(np.flatnonzero(keep).astype(np.int32), np.int32(k.size))
            listed.append((row + q[0], k[column]))
    queries, keys = (np.concatenate([np.zeros(0, dtype=np.int64), *(part[at] for part in listed)]) for at in range(2))
    pairs = (queries, keys) if num_pairs <= most else None
    return Kept(heads, group.heads, relation, q_blks, kv_blks, num_pairs, row_lengths, later, pairs)
