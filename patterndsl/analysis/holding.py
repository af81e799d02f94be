"""What must a decoder hold that does not know how long it will run? The newest keys, and of older ones those that last.

The policy of a pattern says which keys step t still needs, for every t. Here it becomes a layout that needs no t: a
ring takes the newest keys in turns, and a key that some query attends even after it has left the ring lasts, in a list
that grows only by such keys. For `recent(w) | first(g)` the ring has w places, and g keys last.

The layout is exact whatever the length of the ring is; a good length makes it small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from patterndsl.analysis.pairs import Symbolic
from patterndsl.analysis.policy import CachePolicy, Policy, cache_policy
from patterndsl.analysis.proof import prove
from patterndsl.analysis.verdict import Proven, Refuted
from patterndsl.diagnostics import error, input_error
from patterndsl.ir.index import NK, NQ, Arithmetic, Const, Index, Read, Var
from patterndsl.ir.relation import Relation, indices, subexpressions
from patterndsl.sema.bind import Bound, bind, depends_on_length
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_SIZE, counted, sizes_of

Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
IsKept: TypeAlias = Callable[[Integers, Integers], Booleans]
"""Whether step t still needs key k <= t."""

MAX_POSITIONS = 1 << 30
"""Of a sequence whose length is not known."""
MAX_NEWEST = 1 << 20
"""A longer ring is none: such keys last."""
SAMPLE, FAR = 4096, 1 << 20
"""So many keys are looked at to choose the length of a ring, that far from the first; what is special about the first
keys is no matter of a ring."""


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """What heads that share keys hold: after step t the keys in (t - newest, t], and of older ones those that last.

    kind: "bounded" where their number does not grow with t, for every t; "growing" where it does, or nobody knows.
    """

    newest: int
    kind: Literal["bounded", "growing"]
    _is_kept: IsKept

    def lasting(self, start: int, stop: int) -> Integers:
        """The keys in [start, stop) that some query at least `newest` steps later may attend, ascending."""
        keys = np.arange(start, stop, dtype=np.int64)
        return keys[self._is_kept(keys, keys + self.newest)]


def bound_for_decoding(resolved: Resolved, n: int | None, heads: int, layer: int) -> Bound:
    """The pattern at the length n, or at any length where it does not depend on it.

    Raises PatternError (E406) where it does and none is given, (E505) where it cannot be decoded token by token.
    """
    if n is None and _depends_on_length(resolved):
        raise input_error("E406", "the pattern depends on N", "give n=, the length that the sequences will have")
    if resolved.num_keys is not None:
        raise error(
            "E505", "the pattern says how many keys there are, and a decoder has one for each token", None, _FORWARD
        )
    total = MAX_POSITIONS if n is None else counted("n", n, 0, MAX_SIZE)
    bound = bind(resolved, sizes_of(total, None, None, 0), heads, layer)
    if not bound.is_plain:
        what = "a fallback" if bound.fallback is not None else f"merge: {bound.merge}"
        raise error("E505", f"the pattern has {what}, which decoding does not know", None, _FORWARD)
    for shape in bound.inputs:
        if shape.found_by != "caller" or shape.selection is not None:
            what = f"`{shape.name}` is found from all keys at once, and decoding has them one by one"
            raise error("E505", what, None, _FORWARD)
        if shape.side == "table":
            what = f"`{shape.name}` is a table, and decoding takes inputs with their tokens"
            raise error("E505", what, None, _FORWARD)
    for index in indices(bound.relation):
        if isinstance(index, Read) and (index.facet == "rank" or not _is_past(index.index)):
            what = f"the pattern asks for `{index.name}` of later positions"
            raise error("E505", what, None, _FORWARD)
    for group in bound.groups:
        _check_causal(resolved, group.relation, n)
    return bound


def holding(relations: Iterable[Relation], n: int | None) -> Holding:
    """What heads of these relations hold together. n: the length, where the pattern depends on it.

    Where there is no policy every key lasts. Work: that of a policy for each relation.
    """
    policies = [_policy(relation) for relation in dict.fromkeys(relations)]
    total = MAX_POSITIONS if n is None else n
    is_kept = partial(_kept_by_some, policies, total)  # no closure: a cache may be pickled
    known = [policy for policy in policies if isinstance(policy, CachePolicy)]
    is_bounded = len(known) == len(policies) and all(item.kind == "bounded" for item in known)
    return Holding(_newest(is_kept, total), "bounded" if is_bounded else "growing", is_kept)


_FORWARD = "call patterndsl.attention on all tokens with q_start= of the newest"


def _depends_on_length(resolved: Resolved) -> bool:
    """Whether lengths decide anything but how many positions there are."""
    defaults = {item.name: item.default for item in resolved.params}

    def depends(index: Index) -> bool:
        if any(part in (NQ, NK) for part in subexpressions(index)):
            return True
        return depends_on_length(index, resolved)

    listed = (item for default in defaults.values() if isinstance(default, tuple) for item in default)
    has_grid = any(item.kind == "grid" for item in resolved.requirements)
    return has_grid or any(map(depends, listed)) or any(map(depends, indices(resolved.relation)))


def _is_past(index: Index) -> bool:
    """Whether a position is none after the query's, by its form; the key's is not, as the pattern is causal."""
    match index:
        case Var("q" | "k"):
            return True
        case Arithmetic("//", left, Const(number)):
            return number > 0 and _is_past(left)
        case Arithmetic("-", left, Const(number)):
            return number >= 0 and _is_past(left)
        case Arithmetic("+", left, Const(number)):
            return number <= 0 and _is_past(left)
    return False


def _check_causal(resolved: Resolved, relation: Relation, n: int | None) -> None:
    """Raises PatternError (E505) where a query attends a later key, or may."""
    alone = replace(resolved, relation=relation, params=(), requirements=(), labels=(), selections=(), fallback=None)
    match prove("causal", alone, n=n):
        case Proven():
            return
        case Refuted(witness=found):
            what = f"query {found.q} attends key {found.k}, a later one: the pattern cannot be decoded token by token"
        case unknown:
            what = f"whether a query attends a later key is not known ({unknown.reason})"
    raise error("E505", what, None, "add `causal &`")


def _policy(relation: Relation) -> Policy:
    """The policy of a bound relation, for every length."""
    typical, short = (tuple({"N": n, "Nk": n} for n in some) for some in ((1_000_003, 1 << 20), (64, 256)))
    return cache_policy(Symbolic(relation, (), typical, short))


def _kept_by_some(policies: Sequence[Policy], n: int, keys: Integers, steps: Integers) -> Booleans:
    found = np.zeros(keys.shape, dtype=bool)
    for policy in policies:
        found |= _kept_by(policy, keys, steps, n)
    return found


def _kept_by(policy: Policy, keys: Integers, steps: Integers, n: int) -> Booleans:
    if not isinstance(policy, CachePolicy):
        return np.ones(keys.shape, dtype=bool)
    none: Mapping[str, int] = {}
    return policy.keeps(steps, keys, none, n)


# ---- how long a ring ---------------------------------------------------------------------------------------


def _newest(is_kept: IsKept, n: int) -> int:
    """The length of a ring that holds the fewest keys far from the first."""
    far = min(FAR, n // 2)
    keys = far + np.arange(min(SAMPLE, n - far), dtype=np.int64)
    lives = np.sort(_lives(is_kept, keys))
    choices = np.unique(np.append(0, lives[lives <= MAX_NEWEST]))
    outliving = len(lives) - np.searchsorted(lives, choices, side="right")
    held = choices + outliving * far // max(1, len(lives))
    return int(choices[held.argmin()])


def _lives(is_kept: IsKept, keys: Integers) -> Integers:
    """For how many steps from its own on each key is needed, at most MAX_NEWEST + 1: by halving, as once a key is not
    needed it never is again."""
    low, high = np.zeros_like(keys), np.full_like(keys, MAX_NEWEST + 1)  # needed for `low` steps, and not for `high`
    while (low < high).any():
        middle = (low + high) // 2
        needed = is_kept(keys, keys + middle)
        low, high = np.where(needed, middle + 1, low), np.where(needed, high, middle)
    return low
