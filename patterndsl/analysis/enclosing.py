"""What is affine and holds all pairs of a relation, or none but pairs of it? Bounds, where a relation itself is not.

What is shown of a larger relation, that none of its pairs looks ahead, holds of the relation as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from patterndsl.analysis.budget import GaveUpError
from patterndsl.analysis.digits import affine
from patterndsl.analysis.pairs import LENGTHS
from patterndsl.analysis.radix import NotAffineError
from patterndsl.ir.relation import Compare, Known, Relation, narrowed, widened


def enclosing(relation: Relation, given: Sequence[Relation], hints: Mapping[str, int]) -> Relation:
    """A relation that holds every pair of this one: A & B is within A. Comparisons that are not affine are taken for
    true, under a negation for false."""
    return widened(relation, _affine_atoms(given, hints))


def enclosed(relation: Relation, given: Sequence[Relation], hints: Mapping[str, int]) -> Relation:
    """A relation of which every pair is one of this: A is within A | B. The other way round."""
    return narrowed(relation, _affine_atoms(given, hints))


def _affine_atoms(given: Sequence[Relation], hints: Mapping[str, int]) -> Known:
    @cache
    def affine_only(atom: Relation) -> Relation | None:
        if not isinstance(atom, Compare):  # inputs and draws have flags, which are affine
            return atom
        for digits in (False, True):
            try:
                affine((atom,), given, lengths=LENGTHS, hints=hints, digits=digits)
            except (NotAffineError, GaveUpError):
                continue
            return atom
        return None

    return affine_only
