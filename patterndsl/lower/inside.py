"""What of a pattern inside documents does a document of some length run? Passes planned once, cut off where it ends.

`within(doc, R)` is R between positions that count from a document's first one, wherever that lies in the row. How long
documents are, a call's inputs say: so R is laid out once, for a document as long as the row, and clipped to each. Short
ones take fewer calls as one mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from patterndsl.ir.index import Arithmetic, Index, K, Q, Read, Var, in_words_of
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Compare, Everything, Nothing, Relation, compare, relation_in_words_of
from patterndsl.lower.clip import can_clip, clipped
from patterndsl.lower.costs import NO_COST
from patterndsl.lower.devices import Machine
from patterndsl.lower.geometry import whole
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.plan import Pass, dense_options, pass_of
from patterndsl.lower.shapes import Band, Masked, Piece, Truths
from patterndsl.sema.parameters import Sizes

MAX_SHARE = 0.25
"""Of all pairs of a document as long as the row, that its passes may compute: where there are more, masks will do."""
MAX_MASKS = 1 << 20
"""Pairs of the masks of all passes, which each length has of its own."""
SHORT = 512
"""Positions of the longest document that may be one mask."""


@dataclass(frozen=True, slots=True, eq=False)
class Inside:
    """passes: those of a document as long as the row, for heads from 0 on. corner: the pairs of a short document, bool
    [SHORT, SHORT] or less."""

    passes: tuple[Pass, ...]
    corner: Truths
    machine: Machine

    def at(self, length: int) -> tuple[Pass, ...]:
        """The passes of a document of so many positions."""
        heads = self.passes[0].heads if self.passes else ()
        cut = tuple(
            pass_of(piece, heads, self.machine) for item in self.passes for piece in clipped(item.piece, length)
        )
        mask = self.corner[:length, :length]
        if len(mask) < length or not mask.any():
            return cut
        one = (pass_of(Piece(whole(length, length), Masked(mask)), heads, self.machine),)
        return min(cut, one, key=_seconds)


def _seconds(passes: Iterable[Pass]) -> float:
    return sum((item.cost for item in passes), NO_COST).of(train=True)


def inside(relation: Relation, name: str, num_heads: int, sizes: Sizes, machine: Machine) -> Inside | None:
    """The passes of what a pattern asks beside one value of an input at both positions. None where that is more than a
    matter of places in the document, or where dense passes hold much more than it. Work: that of planning."""
    local = _local(relation, name)
    if local is None:
        return None
    options = dense_options(local, tuple(range(num_heads)), sizes, Lookup(), machine)
    fitting = [option.passes for option in options if all(can_clip(item.piece) for item in option.passes)]
    passes = min(fitting, key=_seconds, default=None)
    if passes is None or sum(item.piece.num_computed for item in passes) > MAX_SHARE * sizes.q_len * sizes.kv_len:
        return None
    if sum(item.piece.shape.mask.size for item in passes if isinstance(item.piece.shape, Band | Masked)) > MAX_MASKS:
        return None
    places = np.arange(min(SHORT, sizes.q_len))
    corner = member(local, Point(places[:, None], places, 0, Lookup()))
    return Inside(passes, np.broadcast_to(corner, (len(places), len(places))), machine)


# ---- places in a document


def _local(relation: Relation, name: str) -> Relation | None:
    """The relation between places in a document, of positions in one; None where it is of anything else."""

    def known(atom: Relation) -> Relation | None:
        match atom:
            case Everything() | Nothing():
                return atom
            case Compare(_, left, right) if {left, right} == {Q, K}:
                return atom
            case Compare(op, left, right):
                sides = _place(left, name), _place(right, name)
                return None if sides[0] is None or sides[1] is None else compare(op, sides[0], sides[1])
            case _:
                return None

    return relation_in_words_of(relation, known)


def _place(index: Index, name: str) -> Index | None:
    """The expression by places; None where it has anything else in it, such as positions in the row."""

    def known(part: Index) -> Index | None:
        match part:
            case Arithmetic("-", Var() as position, Read(read, "start", at)) if (read, at) == (name, position):
                return position
            case Arithmetic("-", left, right) if {left, right} == {Q, K}:
                return part  # a distance
            case _:
                return None

    return in_words_of(index, known)
