"""Rows, columns and ends of columns: equal to the second reading, at a cost that follows what is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl import PatternError
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.row import (
    column_queries,
    column_runs,
    end_queries,
    first_query,
    last_query,
    row_keys,
    row_runs,
)
from tests.strategies import Case, cases, many

WINDOW_AND_SINKS = "causal & (first(4) | recent(512))"


def lookup_of(case: Case, bound: Any) -> Lookup:
    return Lookup({shape.name: np.array(case.inputs[shape.name], dtype=np.int64) for shape in bound.inputs})


def bound_of(text: str, n: int) -> Any:
    return patterndsl.parse(text).bind(n)


def brute_end(keep: np.ndarray, q_start: int, last: bool) -> np.ndarray:
    """[kv_len]: the last or first query of each column of bool [q_len, kv_len]; -1 where there is none."""
    order = keep[::-1] if last else keep
    at = order.argmax(axis=0) if keep.shape[0] else np.zeros(keep.shape[1], dtype=np.int64)
    at = keep.shape[0] - 1 - at if last else at
    return np.where(keep.any(axis=0), at + q_start, -1)


@many(2)
@given(case=cases(), place=st.floats(0, 1, exclude_max=True))
def test_rows_and_columns_are_those_of_the_second_reading(case: Case, place: float) -> None:
    pattern = case.pattern()
    bound, keep, sizes = case.bound(pattern), case.keep(pattern), case.lengths
    lookup = lookup_of(case, bound)
    for group in bound.groups:
        rows = {0, sizes.q_len - 1, *(int(place * sizes.q_len) + turn for turn in range(3))}
        for row in sorted(row for row in rows if row < sizes.q_len):
            keys = row_keys(group.relation, bound.sizes, lookup, sizes.q_start + row)
            assert keys.dtype == np.int64
            assert keys.tolist() == np.flatnonzero(keep[group.heads[0], row]).tolist()
        k = int(place * sizes.kv_len)
        queries = column_queries(group.relation, bound.sizes, lookup, k)
        assert queries.tolist() == (np.flatnonzero(keep[group.heads[0], :, k]) + sizes.q_start).tolist()


@many(2)
@given(case=cases(), seed=st.integers(0, 1000))
def test_ends_of_columns_are_those_of_the_second_reading(case: Case, seed: int) -> None:
    pattern = case.pattern()
    bound, keep, sizes = case.bound(pattern), case.keep(pattern), case.lengths
    lookup, random = lookup_of(case, bound), np.random.default_rng(seed)
    every = np.arange(sizes.kv_len)
    some = random.integers(0, sizes.kv_len, random.integers(0, 2 * sizes.kv_len + 1))  # any order, and repeated
    for group in bound.groups:
        head = keep[group.heads[0]]
        for find, last in ((last_query, True), (first_query, False)):
            expected = brute_end(head, sizes.q_start, last)
            assert find(group.relation, bound.sizes, lookup, every).tolist() == expected.tolist()
            assert find(group.relation, bound.sizes, lookup, some).tolist() == expected[some].tolist()


def test_torch_inputs_give_torch_rows() -> None:
    bound = patterndsl.parse("inputs:\n  doc: int[N]\nattend: same(doc) & (causal | random(3))").bind(67)
    doc = torch.arange(67) // 20
    on_torch, on_numpy = Lookup({"doc": doc}), Lookup({"doc": doc.numpy()})
    relation = bound.groups[0].relation
    found = row_keys(relation, bound.sizes, on_torch, 45)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.int64
    assert found.tolist() == row_keys(relation, bound.sizes, on_numpy, 45).tolist()
    ends = last_query(relation, bound.sizes, on_torch, torch.arange(67))
    assert ends.tolist() == last_query(relation, bound.sizes, on_numpy, np.arange(67)).tolist()


@pytest.mark.parametrize("q_len", [0, 1])
@pytest.mark.parametrize("kv_len", [0, 1])
def test_nothing_to_find(q_len: int, kv_len: int) -> None:
    bound = patterndsl.parse("q != k").bind(q_len=q_len, kv_len=kv_len)
    ks = np.arange(kv_len)
    assert last_query(bound.groups[0].relation, bound.sizes, Lookup(), ks).tolist() == [-1] * kv_len
    if q_len:
        assert row_keys(bound.groups[0].relation, bound.sizes, Lookup(), 0).tolist() == []
    if kv_len:
        assert column_queries(bound.groups[0].relation, bound.sizes, Lookup(), 0).tolist() == []


def test_runs_are_joined() -> None:
    bound = bound_of("k in 3..90 | k in 100..101", 127)
    runs = row_runs(bound.groups[0].relation, bound.sizes, Lookup(), 5)
    assert (runs.starts.tolist(), runs.stops.tolist(), runs.num_positions) == ([3, 100], [90, 101], 88)


# ---- the program's row --------------------------------------------------------------------------------------


def test_the_row_of_a_program_is_that_of_its_mask() -> None:
    pattern = patterndsl.parse("inputs:\n  doc: int[N]\nattend: same(doc) & causal & (head == 0 | recent(5))")
    program = pattern.compile(n=65, q_start=9, heads=3)
    inputs = {"doc": torch.arange(65) // 20}
    mask = program.mask(inputs)
    for head in range(3):
        for q in range(9, 65):
            assert torch.equal(program.row(q, head, inputs), mask[head, q - 9].nonzero().flatten())
    assert torch.equal(program.row(20, inputs={"doc": inputs["doc"][None]}), program.row(20, inputs=inputs))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({"q": 8}, "E406"), ({"q": 65}, "E406"), ({"q": True}, "E406"), ({"q": 9, "head": 3}, "E406")],
)
def test_rows_that_are_not_there(arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(PatternError) as caught:
        patterndsl.parse("causal").compile(n=65, q_start=9, heads=3).row(**arguments)
    assert [found.code for found in caught.value.diagnostics] == [code]


def test_a_row_of_a_batch_is_refused() -> None:
    program = patterndsl.parse("inputs:\n  doc: int[N]\nattend: same(doc)").compile(n=8)
    with pytest.raises(PatternError, match="2 batch rows"):
        program.row(3, inputs={"doc": torch.zeros(2, 8, dtype=torch.int64)})


# ---- counters, not clocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["recent(512)", "causal & first(64)", "window(256) | global(64)", WINDOW_AND_SINKS])
def test_a_local_row_visits_a_hundred_boxes_at_any_length(text: str) -> None:
    for n in (2**12, 2**16, 2**20):
        bound = bound_of(text, n)
        for q in (n - 1, n // 2 + 1, 70):
            assert row_runs(bound.groups[0].relation, bound.sizes, Lookup(), q).num_visited <= 130, (n, q)


def test_a_strided_row_visits_boxes_in_proportion_to_its_keys() -> None:
    bound = bound_of("strided(64)", 2**20)
    relation = bound.groups[0].relation
    runs = row_runs(relation, bound.sizes, Lookup(), 2**19 + 5)
    assert runs.num_positions == 2**14
    assert runs.num_visited <= 14 * 2**14
    assert column_runs(relation, bound.sizes, Lookup(), 77).num_visited <= 14 * 2**14


def test_a_dense_row_is_not_split() -> None:
    bound = bound_of("causal", 2**20)
    runs = row_runs(bound.groups[0].relation, bound.sizes, Lookup(), 2**19)
    assert (runs.stops.tolist(), runs.num_visited <= 50) == ([2**19 + 1], True)


@pytest.mark.parametrize(
    ("text", "per_key"),
    [
        ("causal", 0.01),
        ("causal & first(64)", 0.01),
        ("causal & (block(128) | columns(128, 8))", 1.5),
        (WINDOW_AND_SINKS, 6),
        ("causal & strided(64)", 6),
        ("window(256) | global(64)", 6),
        ("blocks(64, window(1) | global(1) | random(3))", 0.5),
        ("causal & random(3)", 25),
    ],
)
def test_last_queries_visit_few_boxes_per_key_at_any_length(text: str, per_key: float) -> None:
    for n in (2**13, 2**15) if "random" in text else (2**13, 2**17):
        bound = bound_of(text, n)
        found = end_queries(bound.groups[0].relation, bound.sizes, Lookup(), np.arange(n), "last")
        assert found.num_visited <= per_key * n + 500, n


def test_progress_ends_with_every_key() -> None:
    bound, seen = bound_of(WINDOW_AND_SINKS, 2**10), []
    end_queries(
        bound.groups[0].relation,
        bound.sizes,
        Lookup(),
        np.arange(2**10),
        "first",
        on_event=lambda what, done, total: seen.append((what, done, total)),
    )
    assert seen[-1] == ("finding first queries", 2**10, 2**10)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
