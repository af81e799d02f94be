"""Where does a claim fail first? The least point of a set of isl, and one pair or row looked at there.

isl knows the set in digits; whether a point is a counterexample is decided in the pattern's own terms, and no mask of
all pairs is made. Short lengths are looked at as a whole, with some inputs and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from patterndsl.analysis.budget import check_time
from patterndsl.analysis.digits import Affine
from patterndsl.analysis.radix import plain_name
from patterndsl.analysis.sets import dim_names
from patterndsl.ir.index import Const
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound, InputShape, bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE, self_sizes

if TYPE_CHECKING:
    import islpy

Claim: TypeAlias = Literal["causal", "rows_nonempty", "equals", "within", "symmetric"]

Truths: TypeAlias = Any
"""A boolean array."""

CHUNK, MAX_KEYS = 1 << 20, 1 << 26
"""Keys of a row that are looked at in one go, and in all: of the keys after them isl's word is taken."""

MAX_INPUTS = 256
"""Inputs of one short length that are looked at: all with values below NUM_VALUES, where they are no more."""
NUM_VALUES = 3
UNLIMITED = 2**62
COUNTS = ("buckets", "clusters")
"""The settings of learners that say how many labels there are."""


@dataclass(frozen=True, slots=True)
class Place:
    """A pair of a pattern at some sizes; k is None where a whole row is meant."""

    n: int
    params: Mapping[str, int]
    head: int
    layer: int
    q: int
    k: int | None


def allowed(points: islpy.Set, form: Affine) -> islpy.Set:
    """The points at lengths, heads and layers that there can be."""
    import islpy

    kind = islpy.dim_type.param
    for name, most in (("N", MAX_SIZE), ("head", MAX_HEADS - 1), ("layer", MAX_LAYER)):
        if name in form.params:
            at = dim_names(points, kind).index(name)
            points = points.upper_bound_val(kind, at, islpy.Val(most, context=points.get_ctx()))
    return points


def least_point(points: islpy.Set, form: Affine) -> Place:
    """The first point of a set that has some: by length, parameters, layer, head, query and key, one after the other.

    Where the length has digits, they come after the parameters, and it need not be the least of all.
    """
    import islpy

    kind, part = islpy.dim_type.set, points
    for place, name in enumerate(sorted(form.params, key=lambda name: _turn(name, form))):
        part = part.move_dims(kind, place, islpy.dim_type.param, dim_names(part, islpy.dim_type.param).index(name), 1)
    first = part.lexmin().sample_point()
    digits = {name: int(str(first.get_coordinate_val(kind, place))) for place, name in enumerate(dim_names(part, kind))}
    found = {
        name if name in ("q", "k") else plain_name(name): int(value.at(digits))
        for name, value in form.values.items()
        if value.symbols <= digits.keys()
    }
    n, head, layer, q, k = (found.pop(name, None) for name in ("N", "head", "layer", "q", "k"))
    assert n is not None and q is not None
    return Place(n, found, head or 0, layer or 0, q, k)


def _turn(name: str, form: Affine) -> tuple[int, str]:
    """When a symbol has its turn to be as small as it can be; the positions come after all of them."""
    if name in form.values["N"].symbols:
        return (0 if name == "N" else 2), name
    return {"layer": 3, "head": 4}.get(name, 1), name


def failure(claim: Claim, relations: Sequence[Relation], place: Place, num_keys: int) -> str | None:
    """How the claim fails at a place, None where it does not. relations: bound there, and without inputs or draws."""
    q, k = place.q, place.k
    if claim == "rows_nonempty":
        return None if _has_keys(relations[0], place, num_keys) else "the query attends no key"
    assert k is not None
    first = _holds(relations[0], q, k, place.head)
    match claim:
        case "causal":
            return "the query attends a later key" if first and k > q else None
        case "symmetric":
            is_turned = first and not _holds(relations[0], k, q, place.head)
            return "the pair is there, its mirror image is not" if is_turned else None
    second = _holds(relations[1], q, k, place.head)
    if claim == "within":
        return "only the first has the pair" if first and not second else None
    return None if first == second else f"only the {'first' if first else 'second'} has the pair"


def first_failure(claim: Claim, mask: Truths, other: Truths = None) -> tuple[int, int | None, str] | None:
    """(q, k, how it fails) of the first pair or row against the claim. mask, other: bool [N, keys], at one size."""
    n = mask.shape[0]
    match claim:
        case "causal":
            bad, why = mask & (np.arange(n)[:, None] < np.arange(mask.shape[1])), "the query attends a later key"
        case "rows_nonempty":
            rows = np.flatnonzero(~mask.any(axis=1))
            return (int(rows[0]), None, "the query attends no key") if rows.size else None
        case "within":
            bad, why = mask & ~other, "only the first has the pair"
        case "equals":
            bad, why = mask != other, "only one has the pair"
        case "symmetric":
            bad, why = mask & ~mask.T, "the pair is there, its mirror image is not"
    places = np.argwhere(bad)
    if not places.size:
        return None
    q, k = map(int, places[0])
    if claim == "equals":
        why = f"only the {'first' if mask[q, k] else 'second'} has the pair"
    return q, k, why


def _holds(relation: Relation, q: int, k: int, head: int) -> bool:
    return bool(member(relation, Point(q, k, head, Lookup({}))))


def _has_keys(relation: Relation, place: Place, num_keys: int) -> bool:
    """Whether the query attends one of the first keys."""
    for start in range(0, min(num_keys, MAX_KEYS), CHUNK):
        check_time()
        keys = np.arange(start, min(start + CHUNK, num_keys), dtype=np.int64)
        if np.any(member(relation, Point(place.q, keys, place.head, Lookup({})))):
            return True
    return False


# ---- one short length


def least_length(pattern: Resolved) -> int:
    """The length below which there are more labels than positions, as far as it is a number."""
    sizes = [size for label in pattern.labels for name, size in label.settings if name in COUNTS]
    return max((size.value for size in sizes if isinstance(size, Const)), default=0)


def bound_at(resolved: Resolved, n: int, values: Mapping[str, int], heads: int, layer: int) -> Bound:
    """A self-attention of n positions. values: of parameters, some of them perhaps another pattern's.

    Raises PatternError (E4xx) where the sizes do not fit.
    """
    known = {item.name for item in resolved.params}
    overrides = {name: value for name, value in values.items() if name in known}
    return bind(resolved, self_sizes(resolved, n, overrides), heads, layer, overrides)


def attended(bound: Bound, head: int, rows: Sequence[int], lookup: Lookup) -> Any:
    """bool [rows, N]: the keys that these queries attend, of the fallback where they have no others."""
    relation = next(group.relation for group in bound.groups if head in group.heads)
    q, k = np.array(rows, dtype=np.int64)[:, None], np.arange(bound.sizes.kv_len, dtype=np.int64)[None]
    found: Any = np.broadcast_to(member(relation, Point(q, k, head, lookup)), (q.shape[0], k.shape[1]))
    if bound.fallback is None:
        return found
    return np.where(found.any(axis=1, keepdims=True), found, attended(bound.fallback, head, rows, lookup))


def input_shapes(bounds: Iterable[Bound]) -> dict[str, InputShape]:
    """The inputs and labels of patterns at one size, by their names."""
    parts = (part for bound in bounds for part in (bound, bound.fallback) if part is not None)
    return {item.name: item for part in parts for item in part.inputs}


def lookup_of(inputs: Mapping[str, Any], shapes: Mapping[str, InputShape]) -> Lookup:
    """The inputs as the relations read them. A label has the same values in all of its rounds: the union over the
    rounds is then that of one."""
    return Lookup({name: values for item, values in inputs.items() for name in shapes[item].names})


def num_values(shape: InputShape) -> int:
    """How many values an input can have, from 0 on."""
    if shape.dtype == "bool":
        return 2
    return UNLIMITED if shape.learner is None else min(shape.learner.setting(name, UNLIMITED) for name in COUNTS)


def small_inputs(shapes: Mapping[str, InputShape]) -> Iterator[dict[str, Any]]:
    """Every input of few values where that are few enough; else some: constant, all different, in runs, mixed."""
    if not shapes:
        yield {}
        return
    lengths = {name: 4 if shape.length is None else shape.length for name, shape in shapes.items()}
    values = {name: range(min(num_values(shape), NUM_VALUES)) for name, shape in shapes.items()}
    if prod(len(values[name]) ** min(length, 16) for name, length in lengths.items()) <= MAX_INPUTS:
        every = (product(values[name], repeat=length) for name, length in lengths.items())
        for found in product(*every):
            yield {name: np.array(item, dtype=np.int64) for name, item in zip(shapes, found, strict=True)}
        return
    random = np.random.default_rng(0)
    makers: tuple[Callable[[int], Any], ...] = (
        lambda length: np.zeros(length, dtype=np.int64),
        lambda length: np.arange(length, dtype=np.int64),
        lambda length: np.arange(length, dtype=np.int64) // 2,
        *[lambda length: random.integers(0, 3, length)] * 5,
    )
    for make in makers:
        yield {name: make(lengths[name]) % num_values(shapes[name]) for name in shapes}
