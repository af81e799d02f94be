"""What is walked in a relation, and what stands in the place of its atoms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

import patterndsl
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import (
    Known,
    Random,
    Relation,
    atoms,
    draws_in,
    looks_nothing_up,
    narrowed,
    relation_in_words_of,
    widened,
)
from patterndsl.lower.hulls import hull_of
from patterndsl.lower.lookup import Lookup

N = 13
RELATIONS = (
    "causal",
    "causal & (window(2) | strided(3))",
    "~(causal & (window(2) | strided(3)))",
    "block(4) - (window(1) | ~(causal & strided(2)))",
    "~(~(window(3) & causal) & block(5)) | q == 7",
)


def relation_of(text: str) -> Relation:
    return patterndsl.parse(text).bind(N).relation


def those_of(known: Sequence[Relation]) -> Known:
    return lambda atom: atom if atom in known else None


def pairs(relation: Relation) -> np.ndarray:
    places = np.arange(N)
    return np.broadcast_to(np.asarray(member(relation, Point(places[:, None], places, 0, Lookup()))), (N, N))


@pytest.mark.parametrize("text", RELATIONS)
def test_less_known_is_never_less_than_the_relation_and_never_more_where_it_is_narrowed(text: str) -> None:
    relation = relation_of(text)
    parts = list(dict.fromkeys(atoms(relation)))
    for size in range(len(parts) + 1):
        for known in itertools.combinations(parts, size):
            found = [bound(relation, those_of(known)) for bound in (widened, narrowed)]
            assert (pairs(found[0]) >= pairs(relation)).all()
            assert (pairs(found[1]) <= pairs(relation)).all()
            assert size < len(parts) or found == [relation, relation]


@pytest.mark.parametrize("text", RELATIONS)
def test_words_are_said_of_all_atoms_or_of_none(text: str) -> None:
    relation = relation_of(text)
    first = next(atoms(relation))
    assert relation_in_words_of(relation, lambda atom: atom) == relation
    assert relation_in_words_of(relation, lambda atom: None if atom == first else atom) is None


def test_draws_are_found_beneath_all_that_joins() -> None:
    relation = relation_of("causal & ~(random(2) & window(3)) | random(1, seed = 4)")
    assert [type(node) for node in draws_in(relation)] == [Random, Random]
    assert not looks_nothing_up(relation) and looks_nothing_up(relation_of(RELATIONS[2]))


def test_a_hull_knows_what_a_complement_takes_away() -> None:
    """Whatever documents are, no later key is in `~(same(doc) | q < k)`."""
    inputs = {"doc": "int[N]"}
    relation = patterndsl.parse("window(3) - (same(doc) | q < k)", inputs=inputs).bind(N).relation
    assert (pairs(hull_of(relation, None)) == pairs(relation_of("window(3, 0)"))).all()
