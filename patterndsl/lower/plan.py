"""Which passes does a pattern run as? Unions are split, each part takes its best layout, and the cheapest plan wins.

Parts are made disjoint before they are laid out: what earlier parts hold is taken out of later ones, exactly, so
results merge without anything to subtract. Plans are data: frozen, and the same everywhere for the same constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import factorial, prod
from typing import Literal, NamedTuple, overload

from patterndsl.ir.relation import NOTHING, And, Or, Relation, conjunction, disjunction, indices, negation
from patterndsl.lower.costs import NO_COST, Cost, cost, kernel_of
from patterndsl.lower.devices import Kernel, Machine
from patterndsl.lower.geometry import Geometry, Side
from patterndsl.lower.layout import Cell, Chain, cells, chains
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.order import Order
from patterndsl.lower.patches import patches_of
from patterndsl.lower.shapes import Band, Full, Keys, Masked, Piece, Sparse, Triangle, Wanted, in_order, pieces, tiled
from patterndsl.lower.tiles import OnEvent, TooHard
from patterndsl.sema.bind import Bound, HeadGroup
from patterndsl.sema.parameters import Sizes

MAX_TERMS = 8
"""Parts that a union is split into; a larger one is left whole."""
MAX_ORDERS = 6
MAX_MASK_PAIRS = 1 << 26
"""Pairs of the masks of scattered relations, over all head groups."""
SMALL = 1 << 20
"""Finest tiles of the whole square, up to which block-sparse layouts are counted even where a dense one was found."""
SCATTERED = 1 << 16
"""The same where keys are taken one by one otherwise: the most of these tiles would hold some of them."""


HEAD_DIM = 64
"""Channels of a head that plans are made for, whatever the tensors of a call have."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A piece for some heads, the kernel that runs it, and what that costs. sign: -1 for pairs that other passes hold
    twice, and which are taken out again."""

    heads: tuple[int, ...]
    piece: Piece
    kernel: Kernel
    cost: Cost
    sign: int = 1

    @property
    def text(self) -> str:
        """What it computes, in a line."""
        taken = "less " if self.sign < 0 else ""
        return f"{taken}{_shape_text(self.piece)}, {_groups_text(self.piece.geometry)}"


def pass_of(piece: Piece, heads: tuple[int, ...], machine: Machine, head_dim: int = HEAD_DIM) -> Pass:
    """A piece with its kernel and what it costs."""
    price = cost(piece, machine, num_heads=len(heads), head_dim=head_dim)
    return Pass(heads, piece, kernel_of(piece, machine), price)


def runs_first(passes: Sequence[Pass]) -> Pass:
    """The pass of some heads that the others are merged into: the one with the most queries."""
    return min(passes, key=lambda item: (item.sign < 0, -item.piece.geometry.num_rows))


@dataclass(frozen=True, slots=True)
class Option:
    """One way to run a head group: its passes, and how it was made."""

    text: str
    passes: tuple[Pass, ...]

    @property
    def cost(self) -> Cost:
        """Of all its passes, as the machine is predicted to take them."""
        return sum((item.cost for item in self.passes), NO_COST)

    @property
    def size(self) -> int:
        """How much there is to decide in its tiles, in nodes of their relations: of equal plans the simplest runs."""
        shapes = (item.piece.shape for item in self.passes)
        return sum(len(list(indices(shape.relation))) for shape in shapes if isinstance(shape, Sparse))

    @property
    def is_dense(self) -> bool:
        """Whether nothing in it is block-sparse."""
        return not any(isinstance(item.piece.shape, Sparse) for item in self.passes)

    @property
    def has_single_keys(self) -> bool:
        """Whether some keys are taken one by one."""
        return any(isinstance(item.piece.shape, Keys) for item in self.passes)


@dataclass(frozen=True)
class Plan:
    """The options of each head group, the cheapest forward pass first, and which of them runs.

    choice: the place of an option that is asked for; None takes the cheapest for the purpose, `forward` for inference
    and `training` for both passes.
    """

    machine: Machine
    options: tuple[tuple[Option, ...], ...]
    choice: int | None = None

    @cached_property
    def forward(self) -> tuple[Option, ...]:
        """An option for each head group; a group with fewer options than asked for takes its last."""
        return tuple(group[min(self.choice or 0, len(group) - 1)] for group in self.options)

    @cached_property
    def training(self) -> tuple[Option, ...]:
        """The same for training."""
        if self.choice is not None:
            return self.forward
        return tuple(min(group, key=lambda option: option.cost.of(train=True)) for group in self.options)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those of a forward pass, over all head groups."""
        return passes_of(self.forward)

    @property
    def cost(self) -> Cost:
        """Of a forward pass over all head groups, as the machine is predicted to take it."""
        return sum((option.cost for option in self.forward), NO_COST)

    @property
    def num_choices(self) -> int:
        """How many different plans there are."""
        return max((len(group) for group in self.options), default=1)


def passes_of(options: Sequence[Option]) -> tuple[Pass, ...]:
    """The passes of all options in order."""
    return tuple(item for option in options for item in option.passes)


def plan(
    bound: Bound,
    lookup: Lookup,
    machine: Machine,
    *,
    head_dim: int = HEAD_DIM,
    choice: int | None = None,
    on_event: OnEvent | None = None,
) -> Plan:
    """The plans of a pattern without inputs. Work: O(live tiles) of the options that are looked at."""
    wanted = replace(machine.wanted, mask_pairs=MAX_MASK_PAIRS // len(bound.groups))
    planner = _Planner(bound.sizes, lookup, machine, wanted, head_dim, _Steps(len(bound.groups), on_event))
    return Plan(machine, tuple(tuple(planner.options(at, group)) for at, group in enumerate(bound.groups)), choice)


@dataclass
class _Steps:
    """How far planning is: head groups done, and of the next one the share of orders and digit systems."""

    num_groups: int
    on_event: OnEvent | None
    group: int = 0
    done: int = 0
    total: int = 1

    def begin(self, group: int, total: int) -> None:
        self.group, self.done, self.total = group, 0, max(1, total)

    def step(self) -> None:
        """One way more was looked at."""
        self.done = min(self.done + 1, self.total)
        if self.on_event is not None:
            at = PARTS * self.group + PARTS * self.done // self.total
            self.on_event("planning", at, PARTS * self.num_groups)


PARTS = 100
"""Of a head group, in what is said of progress."""


SEARCHED = 64
"""Boxes that an undecided tile in patches may take. Where they fit the relation it is less than that, and thousands
where tiles would be searched pair by pair."""


class _LaidOut(NamedTuple):
    """A relation in one layout. text: of which, as an option has it."""

    text: str
    pieces: Sequence[Piece]


@dataclass
class _Planner:
    """takes_sparse: whether tiles are looked at where no layout is seen to be dense."""

    sizes: Sizes
    lookup: Lookup
    machine: Machine
    wanted: Wanted
    head_dim: int
    steps: _Steps
    takes_sparse: bool = True
    known: dict[tuple[Relation, tuple[int, ...], bool], list[Option]] = field(default_factory=dict)
    looked_at: dict[tuple[Relation, bool], list[_LaidOut]] = field(default_factory=dict)

    def options(self, at: int, group: HeadGroup) -> list[Option]:
        """Every way that was found, the cheapest first."""
        found: list[Option] = []
        terms = terms_of(group.relation)
        self.steps.begin(at, _num_steps(group.relation, terms, self.sizes))
        if 1 < len(terms) <= MAX_TERMS:
            dense = [term for term in terms if self.best(term, group.heads, sparse=False) is not None]
            dense_first = (*dense, *(term for term in terms if term not in dense))
            tried = [(order, False) for order in itertools.islice(_orders(terms, dense_first), MAX_ORDERS)]
            if self.has_own_kernel:
                tried.append((dense_first, True))
            for order, apart in tried:
                option = self.split(order, group.heads, apart=apart)
                if option is not None and all(_texts(option) != _texts(other) for other in found):
                    found.append(option)
        is_alone = not any(option.is_dense for option in found)
        if self.num_tiles <= SCATTERED or not any(option.has_single_keys for option in found):
            found.extend(self.whole(group.relation, group.heads, is_alone=is_alone))
        found.extend([tiles for option in found if (tiles := self.in_tiles(option, group.heads)) is not None])
        return sorted(found, key=lambda option: (option.cost.forward, option.size))

    @property
    def has_own_kernel(self) -> bool:
        """Whether tiles are taken by a kernel of our own, which goes on from what is there."""
        return self.machine.sparse_kernel == "triton"

    @property
    def num_tiles(self) -> float:
        """Finest tiles of the whole square."""
        return self.sizes.q_len * self.sizes.kv_len / prod(self.machine.blocks[-1])

    def split(self, terms: Sequence[Relation], heads: tuple[int, ...], *, apart: bool) -> Option | None:
        """Each term without those before it, in its best layout; what stays block-sparse as written is one pass. None
        where all of it is that. apart: whether a term that has a dense layout is in that, for `in_tiles`, even where it
        would be cheaper block-sparse."""
        passes: list[Pass] = []
        left: list[Relation] = []
        before: list[Relation] = []
        for term in terms:
            part = conjunction((term, *map(negation, before)))
            best = (self.best(part, heads, sparse=False) if apart else None) or self.best(part, heads)
            if not best.is_dense and before and (twice := self.counted_twice(term, before, heads)) is not None:
                best = min(best, twice, key=lambda option: option.cost.forward)
            before.append(term)
            if any(isinstance(item.piece.shape, Sparse) and not item.piece.geometry.groups for item in best.passes):
                left.append(part)
            else:
                passes.extend(best.passes)
        if left:
            passes.extend(self.best(disjunction(left), heads).passes)
        return self.option(f"{len(terms)} terms apart", passes) if len(left) < len(terms) else None

    def dense_split(self, terms: Sequence[Relation], heads: tuple[int, ...]) -> Option | None:
        """Each term without those before it, in its best dense layout; None where one has none."""
        passes, before = list[Pass](), list[Relation]()
        for term in terms:
            best = self.best(conjunction((term, *map(negation, before))), heads, sparse=False)
            if best is None:
                return None
            passes.extend(best.passes)
            before.append(term)
        return self.option(f"{len(terms)} terms apart", passes)

    def counted_twice(self, term: Relation, before: Sequence[Relation], heads: tuple[int, ...]) -> Option | None:
        """The whole term, and what it shares with those before it taken out again; None unless both are dense."""
        whole = self.best(term, heads, sparse=False)
        shared = self.best(conjunction((term, disjunction(before))), heads, sparse=False)
        if whole is None or shared is None:
            return None
        passes = (*whole.passes, *(replace(item, sign=-1) for item in shared.passes))
        return Option("", passes)

    def in_tiles(self, option: Option, heads: tuple[int, ...]) -> Option | None:
        """The same with what is dense in short groups as tiles too, which a kernel of our own adds to what is there;
        None where nothing is that, or the kernel is another's."""
        if not self.has_own_kernel:
            return None
        pieces = [tiled(item.piece, self.wanted.blocks[0]) for item in option.passes]
        if not any(pieces):
            return None
        passes = (
            item if piece is None else pass_of(piece, heads, self.machine, self.head_dim)
            for item, piece in zip(option.passes, pieces, strict=True)
        )
        return self.option(f"{option.text}, in tiles", passes)

    @overload
    def best(self, relation: Relation, heads: tuple[int, ...]) -> Option: ...

    @overload
    def best(self, relation: Relation, heads: tuple[int, ...], *, sparse: Literal[False]) -> Option | None: ...

    def best(self, relation: Relation, heads: tuple[int, ...], *, sparse: bool = True) -> Option | None:
        found = self.whole(relation, heads, is_alone=True)
        fitting = [option for option in found if sparse or option.is_dense]
        return min(fitting, key=lambda option: option.cost.forward, default=None)

    def whole(self, relation: Relation, heads: tuple[int, ...], *, is_alone: bool) -> list[Option]:
        """The relation undivided, in every layout that fits. Where a layout is all dense, block-sparse ones are only
        counted if that is quick; nor are they where something else was found."""
        asked = (relation, heads, is_alone)
        if asked not in self.known:
            self.known[asked] = [
                self.option(text, (pass_of(piece, heads, self.machine, self.head_dim) for piece in parts))
                for text, parts in self.layouts(relation, is_alone=is_alone)
            ]
        return self.known[asked]

    def layouts(self, relation: Relation, *, is_alone: bool) -> list[_LaidOut]:
        """The same for any heads, looked at once: the orders of a union share most of their parts, and so do heads that
        differ in one term."""
        asked = (relation, is_alone)
        if asked not in self.looked_at:
            self.looked_at[asked] = list(self.look_at(relation, is_alone=is_alone))
        return self.looked_at[asked]

    def look_at(self, relation: Relation, *, is_alone: bool) -> Iterator[_LaidOut]:
        rest, seen, is_dense = [], set[tuple[Cell, ...]](), False
        for chain in chains(relation, self.sizes):
            self.steps.step()
            found = cells(relation, self.sizes, chain)
            if found is None or tuple(found) in seen:  # digits that are not needed change nothing
                continue
            seen.add(tuple(found))
            parts = self.pieces(found, sparse=False)
            if parts is None:
                rest.append((chain, self.unnarrowed(relation) if not chain else found))
            else:
                is_dense = True
                yield _LaidOut(_chain_text(chain), parts)
        if not self.takes_sparse or ((is_dense or not is_alone) and self.num_tiles > SMALL):
            return
        for chain, found in rest:
            yield _LaidOut(_chain_text(chain), self.pieces(found, sparse=True) or [])
        if rest:
            yield from self.patched(relation)

    def patched(self, relation: Relation) -> Iterator[_LaidOut]:
        """The relation undivided, by patches of the grid that it is of."""
        sizes = self.sizes
        for patches in patches_of(relation, sizes, self.lookup):
            orders = Order(patches, sizes.q_start, sizes.q_len), Order(patches, 0, sizes.kv_len)
            try:
                piece = in_order(relation, sizes, orders, self.wanted, SEARCHED)
            except TooHard:
                continue
            if piece.num_computed:
                yield _LaidOut(patches.text, [piece])

    def unnarrowed(self, relation: Relation) -> list[Cell]:
        """The relation as written, with rows that it leaves without keys: a block-sparse kernel passes over them for
        nothing, and results of all rows need no place found for them."""
        found = cells(relation, self.sizes, (), narrow=False)
        assert found is not None, "the identity fits every relation"
        return found

    def pieces(self, found: Sequence[Cell], *, sparse: bool) -> list[Piece] | None:
        """The pieces of all cells; None where some are block-sparse and that is not wanted."""
        parts = list[Piece]()
        for cell in found:
            inside = pieces(cell, self.lookup, self.wanted, sparse=sparse)
            if inside is None:
                return None
            parts.extend(inside)
        return parts

    def option(self, text: str, passes: Iterable[Pass]) -> Option:
        """The passes as an option, of which the first merges with nothing."""
        found = tuple(passes)
        if not found:
            return Option(text, ())
        first, num_heads = runs_first(found), len(found[0].heads)

        def priced(item: Pass) -> Pass:
            price = cost(item.piece, self.machine, num_heads=num_heads, head_dim=self.head_dim, is_first=item is first)
            return replace(item, cost=price)

        return Option(text, tuple(map(priced, found)))


def dense_option(
    relation: Relation, heads: tuple[int, ...], sizes: Sizes, lookup: Lookup, machine: Machine
) -> Option | None:
    """The cheapest way to run a relation for some heads, undivided and with nothing block-sparse in it."""
    return _Planner(sizes, lookup, machine, machine.wanted, HEAD_DIM, _Steps(1, None)).best(
        relation, heads, sparse=False
    )


def dense_options(
    relation: Relation, heads: tuple[int, ...], sizes: Sizes, lookup: Lookup, machine: Machine
) -> list[Option]:
    """Ways to run a relation undivided or with its terms apart, of those that are seen to be dense without a look at
    tiles: quick at any length."""
    planner = _Planner(sizes, lookup, machine, machine.wanted, HEAD_DIM, _Steps(1, None), takes_sparse=False)
    found, terms = list(planner.whole(relation, heads, is_alone=True)), terms_of(relation)
    if 1 < len(terms) <= MAX_TERMS:
        orders = itertools.islice(_orders(terms, terms), MAX_ORDERS)
        found.extend(option for order in orders if (option := planner.dense_split(order, heads)) is not None)
    return found


def terms_of(relation: Relation, *, most: int = MAX_TERMS) -> list[Relation]:
    """The relation as a union of different terms: A & (B | C) is A & B | A & C, if that makes no more than `most`."""
    match relation:
        case Or(terms):
            return list(dict.fromkeys(part for term in terms for part in terms_of(term, most=most)))
        case And(terms):
            choices = [terms_of(term, most=most) for term in terms]
            number = 1
            for choice in choices:
                number *= len(choice)
            if number > most:
                return [relation]
            found = (conjunction(chosen) for chosen in itertools.product(*choices))
            return [term for term in dict.fromkeys(found) if term != NOTHING]
        case _:
            return [relation]


def _num_steps(relation: Relation, terms: Sequence[Relation], sizes: Sizes) -> int:
    """About how many digit systems are tried: those of the whole, and fewer for each term of each order."""
    whole = len(chains(relation, sizes))
    if not 1 < len(terms) <= MAX_TERMS:
        return whole
    return whole + (1 + len(terms)) * min(MAX_ORDERS, factorial(len(terms))) * max(1, whole // 2)


def _orders(terms: Sequence[Relation], promising: Sequence[Relation]) -> Iterator[Sequence[Relation]]:
    """Orders to take terms out in: as written, the promising one, backwards, then the others."""
    first = dict.fromkeys((tuple(terms), tuple(promising), tuple(terms[::-1])))
    yield from first
    yield from (order for order in itertools.permutations(terms) if order not in first)


def _texts(option: Option) -> list[str]:
    return [item.text for item in option.passes]


# ---- texts


def _chain_text(chain: Chain) -> str:
    return "as written" if not chain else f"positions by {', '.join(map(str, chain))}"


def _shape_text(piece: Piece) -> str:
    match piece.shape:
        case Full():
            return "every pair"
        case Triangle():
            return "causal"
        case Band(tile, mask):
            return f"a band of {int(mask.sum(axis=1).max())} keys in tiles of {tile} queries"
        case Masked():
            return "masked"
        case Keys(keys):
            return f"{keys.shape[1]} keys of each query, one by one"
        case Sparse(tiles, orders=orders):
            found = f"{tiles.num_tiles:,} tiles of {tiles.q_block} x {tiles.kv_block}"
            return found if orders is None else f"{found} in {orders[0].patches.text}"


def _groups_text(geometry: Geometry) -> str:
    sides = f"{_side_text(geometry.q)} queries x {_side_text(geometry.k)} keys"
    return f"{geometry.num_groups:,} groups of {sides}" if geometry.num_groups > 1 else sides


def _side_text(side: Side) -> str:
    step = side.axes[-1].stride
    return f"{side.length:,}" + (f" in steps of {step}" if len(side.axes) == 1 and step > 1 else "")
