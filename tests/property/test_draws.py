"""Do random keys keep their promise? Distinct, allowed, as many as asked for, the same each time, and spread evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl.ir.draws import draw
from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import NOTHING, Random, Relation
from patterndsl.lower.lookup import Lookup
from tests import brute
from tests.strategies import many

AVOID = ["none", "all", "causal", "window(2)", "k % 3 == q % 3", "k < 5 | q == 2", "k != 0", "random(2, seed = 9)"]


def node(count: int, seed: int, num_q: int, num_k: int, avoid: Relation = NOTHING) -> Random:
    return Random(Const(count), Const(seed), avoid, Q, K, Const(num_q), Const(num_k))


def avoided(text: str, num_q: int, num_k: int) -> tuple[Relation, Any]:
    """A predicate in a frame of these lengths, and its mask [num_q, num_k]."""
    relation = patterndsl.parse(text).bind(q_len=num_q, kv_len=num_k).relation
    holds = member(relation, Point(np.arange(num_q)[:, None], np.arange(num_k), 0, Lookup()))
    return relation, np.broadcast_to(np.asarray(holds), (num_q, num_k))


@many(2)
@given(
    count=st.integers(0, 20),
    seed=st.integers(-(2**62), 2**62),
    num_q=st.integers(0, 40),
    num_k=st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 63, 64, 65, 127))),
    text=st.sampled_from(AVOID),
)
def test_each_row_draws_distinct_allowed_keys(count: int, seed: int, num_q: int, num_k: int, text: str) -> None:
    avoid, barred = avoided(text, num_q, num_k)
    keys = draw(node(count, seed, num_q, num_k, avoid))
    assert keys.dtype == np.int64
    for q, row in enumerate(keys.tolist()):
        drawn = [key for key in row if key >= 0]
        assert drawn == sorted(set(drawn)), "ascending and distinct"
        assert row == drawn + [-1] * (len(row) - len(drawn)), "padded behind"
        assert all(key < num_k and not barred[q, key] for key in drawn)
        assert len(drawn) == min(count, num_k - int(barred[q].sum()))


@given(count=st.integers(1, 10), seed=st.integers(0, 2**40), num_k=st.integers(1, 130))
def test_the_same_each_time(count: int, seed: int, num_k: int) -> None:
    first = draw(node(count, seed, 20, num_k)).copy()
    draw.cache_clear()
    np.testing.assert_array_equal(draw(node(count, seed, 20, num_k)), first)


@given(count=st.integers(1, 6), seed=st.integers(0, 2**40), num_k=st.integers(7, 130), num_q=st.integers(1, 300))
def test_a_row_does_not_depend_on_how_many_rows_there_are(count: int, seed: int, num_k: int, num_q: int) -> None:
    alone, among = draw(node(count, seed, num_q, num_k)), draw(node(count, seed, num_q + 17, num_k))
    np.testing.assert_array_equal(alone, among[:num_q])


@given(count=st.integers(1, 9), seed=st.integers(0, 2**40), num_k=st.integers(10, 130))
def test_a_draw_of_more_keys_keeps_those_of_fewer(count: int, seed: int, num_k: int) -> None:
    fewer, more = draw(node(count, seed, 20, num_k)), draw(node(count + 1, seed, 20, num_k))
    assert all(set(a) < set(b) for a, b in zip(fewer.tolist(), more.tolist(), strict=True))


@many(0.3)
@given(count=st.integers(1, 9), seed=st.integers(0, 2**40), num_k=st.integers(10, 65))
def test_avoiding_keeps_the_order_of_what_is_left(count: int, seed: int, num_k: int) -> None:
    """Which the second reading of specs relies on: the first keys of the order that are not avoided. In the order, the
    n-th key is the one that n draws have and one less have not."""
    avoid, barred = avoided("k % 3 == 1", 20, num_k)
    order = [draw(node(length, seed, 20, num_k)) for length in range(1, num_k + 1)]
    kept = draw(node(count, seed, 20, num_k, avoid))
    for q in range(20):
        walk = [next(iter(set(b[q]) - set(a[q]))) for a, b in zip([np.full((20, 1), -1), *order], order, strict=False)]
        assert walk == brute.key_order(seed, 20, num_k)[q]
        free = [key for key in walk if not barred[q, key]]
        assert sorted(free[:count]) == [key for key in kept[q] if key >= 0]


def chi_square(counts: Any) -> float:
    """How many standard deviations the statistic is above what even chances give (Wilson and Hilferty 1931)."""
    expected = counts.mean()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.size - 1
    return float(((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))


SEEDS = [0, 1, 2, 7, 12345]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_k", [2, 3, 5, 7, 16, 17, 31, 63, 65, 127])
def test_every_key_is_as_likely(num_k: int, seed: int) -> None:
    keys = draw(node(1, seed, 40_000, num_k))[:, 0]
    assert chi_square(np.bincount(keys, minlength=num_k)) < 4.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_k", [3, 4, 5, 7, 9, 16, 17, 21])
def test_every_pair_of_keys_is_as_likely(num_k: int, seed: int) -> None:
    keys = draw(node(2, seed, 60_000, num_k))
    pairs = np.bincount(keys[:, 0] * num_k + keys[:, 1], minlength=num_k * num_k).reshape(num_k, num_k)
    assert chi_square(pairs[np.triu_indices(num_k, 1)]) < 4.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_k", [5, 7, 16, 31])
def test_neighbouring_rows_draw_independently(num_k: int, seed: int) -> None:
    keys = draw(node(1, seed, 60_000, num_k))[:, 0]
    pairs = np.bincount(keys[:-1] * num_k + keys[1:], minlength=num_k * num_k)
    assert chi_square(pairs) < 4.5


@pytest.mark.parametrize("num_k", [5, 16, 31])
def test_neighbouring_seeds_draw_independently(num_k: int) -> None:
    columns = [draw(node(1, seed, 30_000, num_k))[:, 0] for seed in (0, 1)]
    assert chi_square(np.bincount(columns[0] * num_k + columns[1], minlength=num_k * num_k)) < 4.5


@pytest.mark.parametrize("num_k", [16, 31])
def test_avoided_keys_leave_the_others_as_likely(num_k: int) -> None:
    avoid, _ = avoided("k < 5", 40_000, num_k)
    keys = draw(node(1, 3, 40_000, num_k, avoid))[:, 0]
    assert chi_square(np.bincount(keys, minlength=num_k)[5:]) < 4.5


def test_the_judge_sees_a_bias() -> None:
    counts = np.full(16, 2500)
    assert chi_square(counts) < 0
    counts[3] += 500
    assert chi_square(counts) > 4.5


@pytest.mark.parametrize("text", ["random(2)", "random(2, avoid = causal)", "blocks(4, random(1, seed = 3))"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_membership_is_the_table(text: str, library: str) -> None:
    program = patterndsl.parse(text).compile(33)
    relation = program.bound.groups[0].relation
    lookup = Lookup()
    holds = member(relation, Point(np.arange(33)[:, None], np.arange(33), 0, lookup))
    found = program.mask()[0].numpy() if library == "torch" else holds
    assert isinstance(relation, Random)
    step = 4 if text.startswith("blocks") else 1
    table = draw(relation)
    expected = [[k // step in table[q // step].tolist() for k in range(33)] for q in range(33)]
    np.testing.assert_array_equal(found, expected)
