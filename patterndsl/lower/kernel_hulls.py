"""Where can a pattern with inputs have pairs, for kernels of our own? In the orders of a call, or by slots for queries.

Hulls as in `hulls`, of tiles; what these kernels cannot take, or would compute too much of, has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from patterndsl.ir.index import HEAD, Const, Read
from patterndsl.ir.relation import (
    EVERYTHING,
    Relation,
    compare,
    conjunction,
    disjunction,
    indices,
    inputs_read,
    lists_in,
)
from patterndsl.lower.devices import Machine
from patterndsl.lower.hulls import MAX_SHARE, SMALL, SMALL_ON_GPU, Hull, Said, share, summands, tiled
from patterndsl.lower.listings import can_tell
from patterndsl.lower.lists import apart, listed_relation
from patterndsl.sema.bind import Bound, HeadGroup


def ordered_hulls(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    """Hulls for kernels that take positions in the orders of a call: of each term of a multiset, whatever its fallback.

    None where nothing is placed by an input; where calls list keys, or tell tiles, as others than these kernels do; and
    where they compute too much. Those that all heads have come first.
    """
    if bound.merge == "mean" or not any(isinstance(i, Read) and i.facet == "rank" for i in indices(bound.relation)):
        return None
    found = [hull for part in summands(bound) for hull in tiled(part, machine, in_call=False)]
    if any(hull.lists is not None for hull in found) or all(hull.order is None for hull in found):
        return None
    # in an order a call would tell no fewer tiles; beside it, documents and the like may leave few of many
    beside = [hull for hull in found if hull.order is None and inputs_read(hull.relation)]
    if share(found, bound, SMALL_ON_GPU) > MAX_SHARE or share(beside, bound, SMALL) > MAX_SHARE:
        return None
    return tuple(sorted(found, key=lambda hull: len(hull.heads), reverse=True))


FEWEST_TOGETHER = 16
"""Queries and keys of the smallest tiles: where as many queries list blocks together, tiles of positions hold them; of
fewer keys in a block, no tile is full."""


@dataclass(frozen=True, slots=True)
class SlotHulls:
    """Hulls of lists that kernels take with slots for queries, see `runtime.slotted`, and of what is beside them; told:
    the latter as a pattern of its own, where each call tells its tiles."""

    listed: tuple[Hull, ...]
    beside: tuple[Hull, ...]
    told: Bound | None = None


def slot_hulls(bound: Bound, machine: Machine) -> SlotHulls | None:
    """Hulls of routes, and of blocks of `FEWEST_TOGETHER` keys or more that fewer queries list; and of other terms,
    whatever the fallback.

    None where nothing is listed so; where something is listed in another way, or by a route that another term leaves
    out, which would be asked pair by pair; where other terms compute too much; and where a mean has terms in an order
    by an input, or lists for queries, which are one softmax of it and not one for each block.
    """
    if not any(shape.selection is not None for shape in bound.inputs):
        return None
    if bound.merge == "set":
        found = list(tiled(replace(bound, fallback=None), machine, in_call=False))
    else:
        found = []
        for group in bound.groups:
            terms, listed = apart(group.relation, bound)
            for lists, rest in listed.items():
                relation = listed_relation(lists, rest, bound)
                found.append(Hull(group.heads, None, (), relation, (Said(EVERYTHING, rest),), lists=lists))
            for term in terms:
                alone = HeadGroup(term, group.heads)
                part = replace(bound, relation=term, groups=(alone,), merge="set", fallback=None)
                found.extend(tiled(part, machine, in_call=False))
    listed_hulls, beside = (
        tuple(hull for hull in found if (hull.lists is None) == is_other) for is_other in (False, True)
    )
    if not listed_hulls or not all(_has_slots(hull, bound) for hull in listed_hulls):
        return None
    if any(node for hull in beside for node in lists_in(hull.relation)):
        return None
    is_mean = bound.merge == "mean"
    if is_mean and not all(hull.lists.is_route if hull.lists else hull.order is None for hull in found):
        return None
    told = _told(beside, bound)
    if told is not None:
        return SlotHulls(listed_hulls, beside, told)
    unordered = [hull for hull in beside if hull.order is None and inputs_read(hull.relation)]
    if share(beside, bound, SMALL_ON_GPU) > MAX_SHARE or share(unordered, bound, SMALL) > MAX_SHARE:
        return None
    return SlotHulls(listed_hulls, tuple(sorted(beside, key=lambda hull: len(hull.heads), reverse=True)))


def _told(beside: Sequence[Hull], bound: Bound) -> Bound | None:
    """What is beside lists as one pattern, where it reads inputs and its tiles can be told in a call."""
    is_one = bound.merge == "set" or (bound.merge == "multiset" and len(beside) == 1)
    if not is_one or not any(inputs_read(hull.relation) for hull in beside):
        return None
    groups = tuple(
        HeadGroup(disjunction(hull.relation for hull in beside if hull.heads == group.heads), group.heads)
        for group in bound.groups
    )
    relation = groups[0].relation if len(groups) == 1 else disjunction(map(_at_heads, groups))
    read = inputs_read(relation)
    inputs = tuple(shape for shape in bound.inputs if not read.isdisjoint(shape.names))
    found = replace(bound, relation=relation, groups=groups, inputs=inputs, merge="set", fallback=None)
    return found if can_tell(found) else None


def _at_heads(group: HeadGroup) -> Relation:
    """The relation of some heads, and nothing for others."""
    return conjunction((disjunction(compare("==", HEAD, Const(head)) for head in group.heads), group.relation))


def _has_slots(hull: Hull, bound: Bound) -> bool:
    """Whether the lists of a hull are taken so, and no more is asked of any route."""
    assert hull.lists is not None
    routes = {name for item in bound.inputs if item.selection and item.selection.label for name in item.names}
    if any(node.name in routes for node in lists_in(hull.said[0].rest)):
        return False
    return hull.lists.is_route or hull.lists.per < FEWEST_TOGETHER <= hull.lists.of
