"""Do passes that are cut at a length hold the pairs below it, each once, and stay few? Written out as masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import patterndsl
from patterndsl.lower.clip import can_clip, clipped
from patterndsl.lower.devices import CPU
from patterndsl.lower.inside import SHORT, Inside, inside
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.plan import Pass, dense_options, pass_of
from patterndsl.lower.shapes import Masked
from patterndsl.sema.bind import Bound
from tests.lower.test_plan import times_held
from tests.strategies import Case, cases, many


def cut_to(passes: tuple[Pass, ...], length: int) -> list[Pass]:
    return [pass_of(piece, item.heads, CPU) for item in passes for piece in clipped(item.piece, length)]


@many(2)
@given(case=cases(max_length=150), length=st.integers(0, 150))
def test_random_patterns(case: Case, length: int) -> None:
    pattern = case.pattern()
    bound, keep = case.bound(pattern), case.keep(pattern)
    assume(not bound.inputs and not bound.sizes.q_start and keep.size)
    group, lookup = bound.groups[0], Lookup()
    for option in dense_options(group.relation, group.heads, bound.sizes, lookup, CPU):
        if all(can_clip(item.piece) for item in option.passes):
            held = times_held(cut_to(option.passes, length), keep.shape[1:], lookup)
            wanted = keep[group.heads[0]].copy()
            wanted[length:], wanted[:, length:] = False, False
            assert (held == wanted).all()


PATTERNS = (
    "causal & (first(4) | recent(32) | strided(32))",
    "window(40) | global(5)",
    "window(3, 70)",
    "block(16) | k == q + 100",
    "k >= q",
    "dilated(15, 4) & block(120)",
    "q % 4 == k % 4 & recent(90)",
    "q % 8 <= k % 8 & q // 8 == k // 8",
)


def bound_at(text: str, n: int) -> Bound:
    return patterndsl.parse(text).bind(n)


@pytest.mark.parametrize("text", PATTERNS)
def test_every_length(text: str) -> None:
    bound, lookup = bound_at(text, 300), Lookup()
    keep = patterndsl.parse(text).compile(300).mask().numpy().reshape(300, 300)
    seen = 0
    for option in dense_options(bound.relation, (0,), bound.sizes, lookup, CPU):
        if not all(can_clip(item.piece) for item in option.passes):
            continue
        seen += 1
        for length in (*range(0, 300, 7), 299, 300):
            cut = cut_to(option.passes, length)
            assert all(item.piece.geometry.num_pairs for item in cut)
            held = times_held(cut, (300, 300), lookup)
            assert held[:length, :length].sum() == held.sum()
            assert (held[:length, :length] == keep[:length, :length]).all()
    assert seen


def test_at_full_length_nothing_changes() -> None:
    bound = bound_at(PATTERNS[0], 300)
    for option in dense_options(bound.relation, (0,), bound.sizes, Lookup(), CPU):
        assert [item.piece for item in cut_to(option.passes, 300)] == [item.piece for item in option.passes]


@pytest.mark.parametrize("text", PATTERNS[:3])
def test_passes_stay_few_and_compute_what_the_length_asks_for(text: str) -> None:
    """Not what the row would: the pieces of a document are no more than a few for each pass of the row."""
    bound = bound_at(text, 1 << 14)
    option = min(
        dense_options(bound.relation, (0,), bound.sizes, Lookup(), CPU), key=lambda option: option.cost.of(train=True)
    )
    assert all(can_clip(item.piece) for item in option.passes)
    for length in (100, 1000, 1023, 5000):
        cut = cut_to(option.passes, length)
        own = patterndsl.parse(text).compile(length, backend="planned").plan.training[0].passes
        assert len(cut) <= 3 * len(option.passes)
        assert sum(item.piece.num_computed for item in cut) <= 2 * sum(item.piece.num_computed for item in own)


# ---- what is inside documents


def inside_of(text: str, n: int = 4096) -> Inside | None:
    bound = patterndsl.parse(text, inputs={"doc": "int[N]"}).bind(n)
    return inside(bound.relation, "doc", 1, bound.sizes, CPU)


@pytest.mark.parametrize("length", [1, 2, 33, 200, SHORT, SHORT + 1, 2000])
def test_a_document_has_the_pattern_of_its_places(length: int) -> None:
    local = "causal & (first(4) | recent(32) | strided(32))"
    found = inside_of(f"({local}) at (q - q.doc.start, k - k.doc.start)")
    assert found is not None
    keep = patterndsl.parse(local).compile(length).mask().numpy().reshape(length, length)
    assert (times_held(found.at(length), keep.shape, Lookup()) == keep).all()


def test_a_short_document_is_one_mask_and_a_long_one_is_not() -> None:
    found = inside_of("(causal & (first(4) | recent(32) | strided(32))) at (q - q.doc.start, k - k.doc.start)")
    assert found is not None
    (only,) = found.at(100)
    assert isinstance(only.piece.shape, Masked)
    long = found.at(4000)
    assert sum(item.piece.num_computed for item in long) < 0.15 * 4000**2
    assert np.array_equal(found.corner, patterndsl.parse(PATTERNS[0]).compile(SHORT).mask().numpy()[0])


def test_only_a_matter_of_places_is_inside() -> None:
    """Distances are as long in a document as in the row; positions are not the same, nor do other inputs help."""
    assert inside_of("causal & strided(16) & recent(32) at (q - q.doc.start, k - k.doc.start)") is not None
    for text in (
        "first(4) & recent(32)",
        "recent(32) at (q - q.doc.start, k)",
        "recent(32) at (q - k.doc.start, k - q.doc.start)",
        "recent(32) & q.doc % 2 == 0",
        "recent(32) & q.doc.rank < 9",
        "blocks(64, random(2)) at (q - q.doc.start, k - k.doc.start)",
    ):
        assert inside_of(text) is None, text


def test_what_is_dense_stays_a_mask() -> None:
    """Passes that compute most pairs would save nothing."""
    assert inside_of("((q + k) % 3 > 0) at (q - q.doc.start, k - k.doc.start)") is None
