"""What is affine and holds all pairs of a relation, or none but pairs of it? Bounds, where a relation itself is not.

What is shown of a larger relation, that none of its pairs looks ahead, holds of the relation as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TypeAlias

from patterndsl.analysis.budget import GaveUpError
from patterndsl.analysis.digits import affine
from patterndsl.analysis.pairs import LENGTHS
from patterndsl.analysis.radix import NotAffineError
from patterndsl.ir.relation import (
    EVERYTHING,
    NOTHING,
    And,
    Compare,
    Everything,
    Not,
    Nothing,
    Or,
    Relation,
    conjunction,
    disjunction,
    negation,
)

Test: TypeAlias = Callable[[Relation], bool]


def enclosing(relation: Relation, given: Sequence[Relation], hints: Mapping[str, int]) -> Relation:
    """A relation that holds every pair of this one: A & B is within A. Comparisons that are not affine are taken for
    true, under a negation for false."""
    return _bound(relation, EVERYTHING, _affine_test(given, hints))


def enclosed(relation: Relation, given: Sequence[Relation], hints: Mapping[str, int]) -> Relation:
    """A relation of which every pair is one of this: A is within A | B. The other way round."""
    return _bound(relation, NOTHING, _affine_test(given, hints))


def _bound(relation: Relation, put: Everything | Nothing, is_affine: Test) -> Relation:
    match relation:
        case And(terms):
            return conjunction(_bound(term, put, is_affine) for term in terms)
        case Or(terms):
            return disjunction(_bound(term, put, is_affine) for term in terms)
        case Not(term):
            return negation(_bound(term, NOTHING if put == EVERYTHING else EVERYTHING, is_affine))
        case Compare():
            return relation if is_affine(relation) else put
        case _:  # inputs and draws have flags, which are affine
            return relation


def _affine_test(given: Sequence[Relation], hints: Mapping[str, int]) -> Test:
    @cache
    def is_affine(relation: Relation) -> bool:
        for digits in (False, True):
            try:
                affine((relation,), given, lengths=LENGTHS, hints=hints, digits=digits)
            except (NotAffineError, GaveUpError):
                continue
            return True
        return False

    return is_affine
