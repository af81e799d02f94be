"""Which keys must a decoder keep, where, and until when? The exact cache policy of a pattern at given sizes.

Step t computes query t and makes key t; keys before the first query come with the prefill. A key lives from then until
the last query that attends it, and not a step longer. What holds for every length is not said here: `kind` is evidence
at this length, `rule` is a description of it, and neither is a proof.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from patterndsl.diagnostics import input_error
from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import Relation, compare, conjunction
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.row import end_queries, first_query, last_query, row_keys
from patterndsl.lower.tiles import OnEvent
from patterndsl.sema.bind import Bound, HeadGroup, Sizes

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Kind: TypeAlias = Literal["bounded", "growing"]


@dataclass(frozen=True, slots=True)
class NotDecodable:
    """Query q attends key k > q, which does not exist yet when q is computed: the least such q, and its least such k.

    decodable_from: from this query on none looks ahead; the queries before it are computed together (prefill).
    """

    heads: tuple[int, ...]
    q: int
    k: int
    decodable_from: int


@dataclass(frozen=True, slots=True)
class Ring:
    """A regular layout: keys below first_ring_key stay where they are, in num_fixed slots, the others take turns.

    Key k >= first_ring_key is in slot num_fixed + (k - first_ring_key) % length.
    """

    first_ring_key: int
    num_fixed: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class CachePlan:
    """What to keep while queries [q_start, q_stop) are decoded one by one.

    num_slots: keys held at once in the worst step, the step's own key among them: so many slots suffice, and no
    policy that computes the same outputs has fewer.
    last_use: int64 [kv_len], the last query that attends the key; -1 for a key that no query attends.
    slot: int64 [kv_len], where the key is stored from its step on; -1 for a key that need not be stored at all. A slot
    is free for the key of step t when the last use of its key is before t.
    ring: the layout as arithmetic, where there is one of num_slots slots; else the least free slot was taken.
    kind: "bounded" where num_slots is less than num_keys, and either a rule says what is kept or no step holds more
    keys than some step of the first quarter did; "growing" otherwise. It is what this length shows, and no proof.
    most_held: the most keys held in a step of the first quarter, and in a later one.
    rule: the keys that step t holds, as a text, where a window or block beside fixed keys describes them exactly; it
    may say more of keys that only the end of the steps cuts short. None where there is no such text.
    """

    heads: tuple[int, ...]
    q_start: int
    q_stop: int
    num_slots: int
    kind: Kind
    most_held: tuple[int, int]
    last_use: Integers
    slot: Integers
    ring: Ring | None
    rule: str | None
    _by_last_use: Integers = field(repr=False)
    _evicted_starts: Integers = field(repr=False)

    @property
    def kv_len(self) -> int:
        return len(self.last_use)

    @property
    def num_keys(self) -> int:
        """Keys that exist in the end: the slots of a cache that keeps everything."""
        return min(self.kv_len, self.q_stop)

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        ring = self.ring
        layout = None if ring is None else {name: getattr(ring, name) for name in Ring.__dataclass_fields__}
        return {
            "heads": list(self.heads),
            "q_start": self.q_start,
            "q_stop": self.q_stop,
            "num_slots": self.num_slots,
            "num_keys": self.num_keys,
            "kind": self.kind,
            "most_held": list(self.most_held),
            "rule": self.rule,
            "ring": layout,
            "last_use": self.last_use.tolist(),
            "slot": self.slot.tolist(),
        }

    def held(self, t: int) -> Integers:
        """The keys that occupy slots during step t, its own included, ascending. Work: O(t)."""
        self._check_step(t, self.q_start)
        return np.flatnonzero(self.last_use[: t + 1] >= t)

    def alive(self, t: int) -> Integers:
        """The keys that must be kept after step t, ascending; t = q_start - 1 asks for what the prefill leaves."""
        self._check_step(t, self.q_start - 1)
        return np.flatnonzero(self.last_use[: t + 1] > t)

    def evictions(self, t: int) -> Integers:
        """The keys that die after step t, ascending: it was the last that attends them. Work: O(their number)."""
        self._check_step(t, self.q_start)
        at = t - self.q_start
        return self._by_last_use[self._evicted_starts[at] : self._evicted_starts[at + 1]]

    def _check_step(self, t: int, least: int) -> None:
        if not least <= t < self.q_stop:
            raise input_error("E406", f"there is no step {t}; the steps are {self.q_start} to {self.q_stop - 1}")


def cache_plans(
    bound: Bound, lookup: Lookup, *, on_event: OnEvent | None = None
) -> tuple[CachePlan | NotDecodable, ...]:
    """The plan of each head group. lookup: the inputs as NumPy arrays."""
    return tuple(cache_plan(group, bound.sizes, lookup, on_event=on_event) for group in bound.groups)


def cache_plan(
    group: HeadGroup, sizes: Sizes, lookup: Lookup, *, on_event: OnEvent | None = None
) -> CachePlan | NotDecodable:
    """The plan of some heads, or why there is none. Work: that of `end_queries`, twice, and O(kv_len log kv_len)."""
    ks = np.arange(sizes.kv_len, dtype=np.int64)
    ahead = conjunction((group.relation, compare("<", Q, K)))
    early = first_query(ahead, sizes, lookup, ks)
    if (early >= 0).any():
        return _not_decodable(group, ahead, sizes, lookup, early)
    last_use = end_queries(group.relation, sizes, lookup, ks, "last", on_event=on_event).queries
    return _plan(group.heads, last_use, sizes.q_start, sizes.q_start + sizes.q_len)


def merged(plans: Sequence[CachePlan]) -> CachePlan:
    """One plan for heads that share a cache, as query heads of one key head do: a key lives while any needs it."""
    first = plans[0]
    assert all((p.q_start, p.q_stop, p.kv_len) == (first.q_start, first.q_stop, first.kv_len) for p in plans)
    heads = tuple(sorted({head for plan in plans for head in plan.heads}))
    last_use = np.maximum.reduce([plan.last_use for plan in plans])
    return _plan(heads, last_use, first.q_start, first.q_stop)


def _not_decodable(group: HeadGroup, ahead: Relation, sizes: Sizes, lookup: Lookup, early: Integers) -> NotDecodable:
    q = int(early[early >= 0].min())
    late = last_query(ahead, sizes, lookup, np.flatnonzero(early >= 0))
    return NotDecodable(group.heads, q, int(row_keys(ahead, sizes, lookup, q)[0]), int(late.max()) + 1)


# ---- from the last uses to slots ----------------------------------------------------------------------------


def _plan(heads: tuple[int, ...], last_use: Integers, q_start: int, q_stop: int) -> CachePlan:
    num_steps = q_stop - q_start
    used = np.flatnonzero(last_use >= 0)
    born, dies = np.maximum(used, q_start) - q_start, last_use[used] - q_start
    changes = np.bincount(born, minlength=num_steps + 1) - np.bincount(dies + 1, minlength=num_steps + 1)
    num_held = np.cumsum(changes)[:num_steps]
    quarter = num_steps // 4
    most_held = int(num_held[:quarter].max(initial=0)), int(num_held[quarter:].max(initial=0))
    num_slots = max(most_held)
    ring = _ring(last_use, num_slots)
    rule = None if ring is None else _rule(last_use, ring, q_start, q_stop)
    is_steady = rule is not None or most_held[1] <= most_held[0]
    is_bounded = is_steady and num_slots < min(len(last_use), q_stop)
    slot = _least_free_slots(last_use, q_start) if ring is None else _ring_slots(last_use, ring)
    by_last_use = used[np.argsort(last_use[used], kind="stable")]
    return CachePlan(
        heads,
        q_start,
        q_stop,
        num_slots,
        "bounded" if is_bounded else "growing",
        most_held,
        last_use,
        slot,
        ring,
        rule,
        by_last_use,
        np.searchsorted(last_use[by_last_use], np.arange(q_start, q_stop + 1)),
    )


def _ring(last_use: Integers, num_slots: int) -> Ring | None:
    """The ring with the fewest fixed keys among those of num_slots slots.

    Key k may be overwritten `length` steps after its own, so the ring is as long as the longest life of its keys.
    """
    is_used = last_use >= 0
    life = np.where(is_used, last_use - np.arange(len(last_use)) + 1, 0)
    longest = np.append(np.maximum.accumulate(life[::-1])[::-1], 0)  # among the keys from here on
    num_fixed = np.append(0, np.cumsum(is_used))
    fits = np.flatnonzero(num_fixed + longest == num_slots)
    return Ring(int(fits[0]), int(num_fixed[fits[0]]), int(longest[fits[0]])) if len(fits) else None


def _ring_slots(last_use: Integers, ring: Ring) -> Integers:
    ks, is_used = np.arange(len(last_use), dtype=np.int64), last_use >= 0
    turn = ring.num_fixed + (ks - ring.first_ring_key) % max(1, ring.length)
    slot = np.where(ks < ring.first_ring_key, np.cumsum(is_used) - 1, turn)
    return np.where(is_used, slot, -1)


def _least_free_slots(last_use: Integers, q_start: int) -> Integers:
    """Each key takes the least slot that is free at its step; never more slots than keys held at once."""
    slot = np.full(len(last_use), -1, dtype=np.int64)
    free: list[int] = []
    taken: list[tuple[int, int]] = []  # (last use, slot)
    num_slots = 0
    used = np.flatnonzero(last_use >= 0)
    for k, stop in zip(used.tolist(), last_use[used].tolist(), strict=True):
        while taken and taken[0][0] < max(k, q_start):
            heapq.heappush(free, heapq.heappop(taken)[1])
        if not free:
            free, num_slots = [num_slots], num_slots + 1
        slot[k] = heapq.heappop(free)
        heapq.heappush(taken, (stop, int(slot[k])))
    return slot


def _rule(last_use: Integers, ring: Ring, q_start: int, q_stop: int) -> str | None:
    """What step t holds, where a sliding window or a block, beside fixed keys, says it for every key and step."""
    ks, length = np.arange(len(last_use), dtype=np.int64), ring.length
    if length and (last_use[:q_stop] == q_stop - 1).all():
        return "keep every key"
    fixed = ks < ring.first_ring_key
    is_last = fixed & (last_use == q_stop - 1)
    ends = {
        f"k > t - {length}": ks + length - 1,
        f"k // {length} == t // {length}": (ks // max(1, length) + 1) * length - 1,
    }
    for text, end in ends.items():
        dead = np.minimum(end, q_stop - 1) < np.maximum(ks, q_start)  # before the steps, behind them, or never alive
        cut = (end >= q_stop) & (2 * length <= q_stop - q_start)  # no evidence where most lives are cut short
        lives = (last_use == np.where(dead, -1, np.minimum(end, q_stop - 1))) | cut
        if np.where(fixed, is_last, lives).all():
            parts = [f"k < {ring.first_ring_key}"] * bool(ring.first_ring_key) + [text] * bool(length)
            return f"keep {' or '.join(parts)}" if parts else "keep nothing"
    return None
