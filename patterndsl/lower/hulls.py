"""Where can a pattern that reads inputs have pairs, whatever their values? There it runs dense, masked by each call.

A hull is a relation without inputs that holds wherever the pattern does: conditions on inputs are dropped, or, in the
order of positions by an input, read as conditions on places in that order. `chunks(label, m, back)` is then a band, and
`recent(w) & same(doc)` the window. The layout of a hull is static, so nothing is found again in a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from patterndsl.ir.index import Index, K, Param, Q, Read, Var, in_words_of
from patterndsl.ir.relation import (
    EVERYTHING,
    And,
    Compare,
    Everything,
    Nothing,
    Relation,
    atoms,
    compare,
    conjunction,
    disjunction,
    indices,
    inputs_read,
    looks_nothing_up,
    negation,
    widened,
)
from patterndsl.lower.devices import Machine
from patterndsl.lower.geometry import whole
from patterndsl.lower.inside import Inside, inside
from patterndsl.lower.lists import Lists, apart, listed_relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.plan import Pass, dense_option, pass_of
from patterndsl.lower.shapes import Piece, Sparse
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound, HeadGroup
from patterndsl.sema.parameters import Sizes

MAX_SHARE = 0.25
"""Of all pairs, that hulls may compute; where they hold more, tiles are found in each call instead."""
SMALL, SMALL_ON_GPU = 1 << 20, 1 << 28
"""Pairs of a head up to which all of them may be computed; on a GPU that takes some milliseconds at most, and to find
tiles takes twenty (H100, 16 heads, N = 16,384)."""
BLOCK = 128
"""Queries and keys of a tile on a GPU."""
MAX_CELLS = 1 << 22
"""Tiles, live or not, up to which a GPU tells in each call which are live: 262,144 positions."""


@dataclass(frozen=True, slots=True)
class Said:
    """A term: `places` of the order, and positions there of which `rest` holds."""

    places: Relation
    rest: Relation


@dataclass(frozen=True, slots=True)
class Hull:
    """Passes whose pairs hold those of `relation`, for some heads. order: the input by whose stable order positions are
    placed, None for their own; the relation is of positions in any case. said: the same, term by term, in the words of
    the order as far as they go; of hulls on the CPU it is one term, whose places the passes hold exactly.

    runs: the relation is that of positions with one value of `order`, all of them or causally, or, "masked", those of
    which said[0].rest holds besides. Runs of equal values in that order are then dense, and no pass is needed. inside:
    the passes of such a run, where `rest` is a matter of places in it and the run is unbroken in the row.
    lists: pairs are where each call lists them, and there no pass is needed either; `rest` of said[0] is what they must
    be besides. in_call: nor where tiles are told from all tiles in each call; with lists, `relation` is what there is
    beside them, for the same kernel.
    """

    heads: tuple[int, ...]
    order: str | None
    passes: tuple[Pass, ...]
    relation: Relation
    said: tuple[Said, ...]
    runs: Literal["full", "causal", "masked"] | None = None
    lists: Lists | None = None
    in_call: bool = False
    inside: Inside | None = None


def hulls(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    """Hulls that hold each pair of the pattern once; None where they compute too much, or on the CPU one is not dense.

    Terms of a union are taken apart, and later ones are without the pairs of those before them. A GPU takes tiles, and
    the terms of one order together. Without torch.
    """
    found = tiled(bound, machine) if machine.is_gpu else _dense(bound, machine)
    if found is None or share(found, bound, SMALL_ON_GPU if machine.is_gpu else SMALL) > MAX_SHARE:
        return None if machine.is_gpu else _in_runs(bound, machine)
    return found


def hulls_of_summands(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    """`hulls` of a pattern whatever its fallback, or of each term of a multiset; None where a term has none."""
    if bound.merge == "mean":
        return None
    found = [hulls(part, machine) for part in summands(bound)]
    return None if None in found else tuple(hull for some in found if some is not None for hull in some)


def share(found: Sequence[Hull], bound: Bound, small: int) -> float:
    """Of all pairs, what hulls compute; 0 for less than `small` in a head. Lists are what is asked for, no wider."""
    computed = sum(len(hull.heads) * item.piece.num_computed for hull in found for item in hull.passes)
    pairs = bound.num_heads * bound.sizes.q_len * bound.sizes.kv_len
    return computed / pairs if computed > bound.num_heads * small else 0.0


def summands(bound: Bound) -> Iterator[Bound]:
    """The pattern, or each term of a multiset, as one relation."""
    if bound.merge == "set":
        yield replace(bound, fallback=None)
        return
    for group in bound.groups:
        terms, listed = apart(group.relation, bound)
        terms.extend(listed_relation(lists, rest, bound) for lists, rest in listed.items())
        for term in terms:
            yield replace(bound, relation=term, groups=(HeadGroup(term, group.heads),), merge="set", fallback=None)


def tiled(bound: Bound, machine: Machine, *, in_call: bool = True) -> tuple[Hull, ...]:
    """For each order the tiles of the terms that have fewest in it. in_call: or what tells them in each call."""
    found = list[Hull]()
    for group in bound.groups:
        by_order: dict[str | None, tuple[list[Relation], list[Said]]] = {}
        terms, listed = apart(group.relation, bound)
        before = list[Relation]()
        for term in sorted(terms, key=lambda term: bool(inputs_read(term))):  # what is static stays so
            orders = _orders(term, bound.sizes)
            if len(orders) > 1:
                number = {order: _tiles(hull_of(term, order), bound).num_tiles for order in orders}
                orders.sort(key=number.__getitem__)
            order = orders[0]
            parts, said = by_order.setdefault(order, ([], []))
            parts.append(conjunction((term, *map(negation, before))))
            said.append(Said(hull_of(term, order), _rest(term, before, order)))
            before.append(term)
        for order, (parts, said) in by_order.items():
            union = disjunction(parts)
            is_small = in_call and order is None and _num_cells(bound.sizes) <= MAX_CELLS and looks_nothing_up(union)
            if is_small and len(listed) == len(by_order) == 1:
                ((lists, beside),) = listed.items()
                if _fits_tiles(lists) and looks_nothing_up(beside):
                    rest = (Said(EVERYTHING, beside),)
                    found.append(Hull(group.heads, None, (), union, rest, lists=lists, in_call=True))
                    listed = {}
                    continue
            if is_small and inputs_read(union):
                found.append(Hull(group.heads, None, (), union, tuple(said), in_call=True))
                continue
            places = disjunction(term.places for term in said)
            shape = Sparse(_tiles(places, bound), places)
            item = pass_of(Piece(whole(bound.sizes.q_len, bound.sizes.kv_len), shape), group.heads, machine)
            found.append(Hull(group.heads, order, (item,), union, tuple(said)))
        found.extend(_listed(listed, before, group.heads, bound))
    return tuple(found)


FEWEST_KEYS = 16
"""Blocks of fewer queries and of fewer keys are gathered by a GPU, and not looked for in tiles."""


def _fits_tiles(lists: Lists) -> bool:
    return not lists.is_route and max(lists.of, lists.per) >= FEWEST_KEYS


def _num_cells(sizes: Sizes) -> int:
    return -(-sizes.q_len // BLOCK) * -(-sizes.kv_len // BLOCK)


def _tiles(hull: Relation, bound: Bound) -> Tiles:
    return find_tiles(hull, bound.sizes, Lookup(), BLOCK, BLOCK)


def _dense(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    found = list[Hull]()
    for group in bound.groups:
        terms, listed = apart(group.relation, bound)
        before = list[Relation]()
        # runs are dense as long as nothing is taken out of them
        for term in sorted(terms, key=lambda term: _runs_of(term, bound.sizes) is None):
            hull = _runs(term, before, group.heads, bound.sizes)
            hull = hull or _best(term, before, group.heads, bound.sizes, machine)
            if hull is None:
                return None
            before.append(term)
            found.append(hull)
        found.extend(_listed(listed, before, group.heads, bound))
    return tuple(found)


# ---- hulls of what each call lists


def _listed(
    listed: Mapping[Lists, Relation], before: list[Relation], heads: tuple[int, ...], bound: Bound
) -> Iterator[Hull]:
    """Hulls of lists; each is without the pairs of the terms before it, those of other lists among them."""
    for lists, said in listed.items():
        rest = conjunction((said, *map(negation, before)))
        yield Hull(heads, None, (), listed_relation(lists, rest, bound), (Said(EVERYTHING, rest),), lists=lists)
        before.append(listed_relation(lists, said, bound))


def num_listed(hull: Hull, sizes: Sizes) -> int:
    """Pairs of a head that are computed for the lists of a hull, at most."""
    lists = hull.lists
    if lists is None:
        return 0
    if lists.is_route:
        return len(lists.names) * lists.width**2
    return sizes.q_len * min(sizes.kv_len, lists.width * lists.of)


# ---- dense layouts


def _runs(term: Relation, before: Sequence[Relation], heads: tuple[int, ...], sizes: Sizes) -> Hull | None:
    part = conjunction((term, *map(negation, before)))
    found = _runs_of(part, sizes)
    return None if found is None else Hull(heads, found[0], (), part, (), found[1])


def _in_runs(bound: Bound, machine: Machine) -> tuple[Hull, ...] | None:
    """Runs of the input whose equal values all of a pattern asks for, and what else it asks as a mask; None where it
    asks for none. How long runs are a call says: one run alone is dense attention."""
    if bound.sizes.q_start or bound.sizes.q_len != bound.sizes.kv_len:
        return None
    found = list[Hull]()
    for group in bound.groups:
        parts = group.relation.terms if isinstance(group.relation, And) else (group.relation,)
        name = next((name for part in parts if (name := _shared(part)) is not None), None)
        if name is None or not looks_nothing_up(group.relation):
            return None
        rest = conjunction(part for part in parts if _shared(part) != name)
        passes = inside(rest, name, len(group.heads), bound.sizes, machine)
        found.append(Hull(group.heads, name, (), group.relation, (Said(EVERYTHING, rest),), "masked", inside=passes))
    return tuple(found)


def _shared(relation: Relation) -> str | None:
    """The input of which the relation says that both positions have one value."""
    match relation:
        case Compare("==", Read(name, "value", first), Read(other, "value", second)) if name == other:
            return name if {first, second} == {Q, K} else None
        case _:
            return None


def _rest(term: Relation, before: Sequence[Relation], order: str | None) -> Relation:
    """What the term says beyond its hull in an order, and that terms before it have no part in it."""
    said = (part for part in (term.terms if isinstance(term, And) else (term,)) if not _is_exact(part, order))
    return conjunction((*said, *map(negation, before)))


def _is_exact(relation: Relation, order: str | None) -> bool:
    """Whether its hull is no larger than itself."""
    return all(_by_place(atom, order) is not None for atom in atoms(relation))


def _runs_of(relation: Relation, sizes: Sizes) -> tuple[str, Literal["full", "causal"]] | None:
    """The input whose equal values the relation asks for, alone or with causality; None where it is anything else."""
    parts = set(relation.terms if isinstance(relation, And) else (relation,))
    is_causal = CAUSAL in parts
    if len(parts - {CAUSAL}) != 1 or sizes.q_start or sizes.q_len != sizes.kv_len:
        return None
    name = _shared(next(iter(parts - {CAUSAL})))
    return None if name is None else (name, "causal" if is_causal else "full")


CAUSAL = Compare("<=", K, Q)


def _best(
    term: Relation, before: Sequence[Relation], heads: tuple[int, ...], sizes: Sizes, machine: Machine
) -> Hull | None:
    """The cheapest hull of a term, in the order of positions or in that by an input that it ranks by."""
    part = conjunction((term, *map(negation, before)))
    ways = []
    for order in _orders(term, sizes):
        option = dense_option(hull_of(term, order), heads, sizes, Lookup(), machine)
        if option is not None:
            said = Said(hull_of(term, order), _rest(term, before, order))
            hull = Hull(heads, order, option.passes, part, (said,))
            ways.append((option.cost.of(train=True), hull))
    return min(ways, key=lambda way: way[0])[1] if ways else None


def _orders(term: Relation, sizes: Sizes) -> list[str | None]:
    """That of positions, and those by the inputs that the term ranks by."""
    orders: list[str | None] = [None]
    if sizes.q_start == 0 and sizes.q_len == sizes.kv_len:
        ranks = (index.name for index in indices(term) if isinstance(index, Read) and index.facet == "rank")
        orders.extend(dict.fromkeys(ranks))
    return orders


def hull_of(relation: Relation, order: str | None) -> Relation:
    """A relation without inputs that holds wherever this one does, between positions or places in the order."""
    return widened(relation, lambda atom: _by_place(atom, order))


def _by_place(atom: Relation, order: str | None) -> Relation | None:
    """The same of places in the order; None where it says anything else."""
    match atom:
        case Everything() | Nothing():
            return atom
        case Compare(op, left, right):
            sides = _placed(left, order), _placed(right, order)
            return None if sides[0] is None or sides[1] is None else compare(op, sides[0], sides[1])
        case _:
            return None if order is not None or inputs_read(atom) else atom


def _placed(index: Index, order: str | None) -> Index | None:
    """The expression in what the order counts by; None where it has anything else in it."""

    def known(part: Index) -> Index | None:
        match part:
            case Read(name, "rank", Var() as position) if name == order:
                return position
            case Var() | Param() if order is None:
                return part
            case _:
                return None

    return in_words_of(index, known)


__all__ = [
    "Hull",
    "Lists",
    "hull_of",
    "hulls",
    "hulls_of_summands",
    "num_listed",
    "share",
    "summands",
    "tiled",
]
