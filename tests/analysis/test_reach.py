"""Does content get as far as powers of the Boolean matrix say, layer by layer, and no further?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import patterndsl
from patterndsl import PatternError
from patterndsl.analysis import reach as module
from patterndsl.analysis.compose import composed
from patterndsl.analysis.reach import Alone, Reach
from patterndsl.analysis.sets import GaveUpError
from tests import brute
from tests.strategies import Case, cases, many

EXAMPLES = Path(__file__).parents[2] / "examples"
PERIOD = 3


@dataclass(frozen=True)
class Truth:
    """Powers of the layers' matrices: reached[l] is bool [n, n] after l layers, the last one closed."""

    layers: Sequence[Any]
    reached: Sequence[Any]

    @property
    def closure(self) -> Any:
        return self.reached[-1]


def truth_of(layers: Sequence[Any]) -> Truth:
    """layers: bool [n, n], the lowest first; after the last they begin again."""
    n = len(layers[0])
    layers = [layer | np.eye(n, dtype=bool) for layer in layers]
    reached, quiet = [np.eye(n, dtype=bool)], 0
    while quiet < len(layers):
        layer = layers[(len(reached) - 1) % len(layers)]
        reached.append((layer.astype(np.float32) @ reached[-1].astype(np.float32)) > 0)
        quiet = 0 if (reached[-1] & ~reached[-2]).any() else quiet + 1
    return Truth(layers, reached[: len(reached) - quiet])


def truth(case: Case, pattern: patterndsl.Pattern, period: int) -> Truth:
    sizes = case.lengths
    masks = [brute.keep(pattern.spec, sizes, case.heads, layer, case.inputs) for layer in range(period)]
    return truth_of([mask.any(axis=0) for mask in masks])


def reach_of(case: Case, pattern: patterndsl.Pattern) -> Reach:
    """At a length of self-attention; layer 0 to 2, then again."""
    assume(set(case.sizes) == {"n"})
    try:
        return pattern.reach(case.sizes["n"], heads=case.heads, layers=PERIOD, inputs=case.inputs)
    except PatternError as failed:  # valid in its own layer, and not in all three
        assume(failed.diagnostics[0].code not in ("E402", "E403", "E405", "E407"))
        raise


@contextmanager
def in_blocks(max_positions: int, max_blocks: int) -> Iterator[None]:
    """As if so few positions were many, and without formulas."""
    with (
        patch.object(module, "MAX_POSITIONS", max_positions),
        patch.object(module, "MAX_BLOCKS", max_blocks),
        patch.object(module, "_composed", lambda layers, n: None),
    ):
        yield


def counts(found: Any) -> tuple[float, float, float]:
    """The least, the mean and the greatest row."""
    rows = found.sum(axis=1)
    return float(rows.min()), float(rows.mean()), float(rows.max())


@pytest.mark.parametrize(
    "text",
    [
        "causal & k >= 5 & q - k < 3",
        "window(1) & (q < 30 | k > 29)",
        "q < 30 & (k == q + 1 | k == 40)",
        "causal & recent(2) & q % 7 != 3 | layer % 3 == 2 & q == 50 & k < 4",
        "q == k + 1 | q % 9 == 4 & k == 60 - q",
    ],
)
def test_the_end_of_many_layers_is_found_without_following_them(text: str) -> None:
    pattern = patterndsl.parse(text)
    expected = pattern.reach(64)
    assert expected.layers_to_connect.value > 2
    with patch.object(module, "MOST_SIZES", 2):
        found = pattern.reach(64)
    names = ("closure", "layers_to_connect", "unreachable", "example", "deaf", "unheard", "islands", "is_causal")
    assert [getattr(found, name) for name in names] == [getattr(expected, name) for name in names]
    assert found.fields[-1] == expected.fields[-1]
    assert found.fields[:-1] == expected.fields[: len(found.fields) - 1]
    assert str(found).splitlines()[0] == f"{pattern.title} at N = 64"


@many(2)
@given(cases(max_length=130))
def test_everything_is_as_matrix_powers_say(case: Case) -> None:
    pattern = case.pattern()
    found = reach_of(case, pattern)
    expected = truth(case, pattern, found.period)
    n, ahead = found.n, np.triu(expected.closure, 1).any()
    last = len(expected.reached) - 1
    shown = [field.layers for field in found.fields]
    assert shown == [*range(len(shown) - 1), last]
    assert len(shown) == last + 1 or len(shown) > module.MOST_SIZES - PERIOD
    for field in found.fields:
        sizes = field.least.value, field.mean.value, field.most.value
        assert sizes == pytest.approx(counts(expected.reached[field.layers]))
        assert {field.least.certainty, field.mean.certainty, field.most.certainty} == {"Exact"}
    assert (found.layers_to_connect.value, found.layers_to_connect.certainty) == (last, "Exact")
    assert found.is_causal == (not ahead)
    allowed = np.ones((n, n), dtype=bool) if ahead else np.tri(n, dtype=bool)
    assert (found.unreachable.value, found.unreachable.certainty) == ((allowed & ~expected.closure).sum(), "Exact")
    assert found.is_complete == (found.unreachable.value == 0)
    assert found.closure == ("part" if not found.is_complete else "all" if ahead or n == 1 else "causal")
    assert (found.example is None) == found.is_complete
    assert found.example is None or not expected.closure[found.example]
    assert (found.islands.value, found.islands.certainty) == (num_islands(expected.closure), "Exact")
    assert found.deaf is not None and found.unheard is not None
    if not found.is_complete:
        alone = expected.closure.sum(axis=1) == 1
        heard = expected.closure.sum(axis=0) == 1
        assert found.deaf.number == alone[0 if ahead else 1 :].sum()
        assert found.unheard.number == heard[: n if ahead else n - 1].sum()
        assert all(alone[at] for at in found.deaf.examples)
        assert all(heard[at] for at in found.unheard.examples)


def num_islands(closure: Any) -> int:
    """Rows of the symmetric closure that differ."""
    joined = (closure | closure.T).astype(np.float32)
    for _ in range(len(joined).bit_length()):
        joined = ((joined @ joined) > 0).astype(np.float32)
    return len(np.unique(joined, axis=0))


@given(case=cases(max_length=80), seed=st.integers(0, 2**32 - 1))
def test_one_query_and_one_path(case: Case, seed: int) -> None:
    pattern = case.pattern()
    found = reach_of(case, pattern)
    expected = truth(case, pattern, found.period)
    random = np.random.default_rng(seed)
    for q, k in random.integers(0, found.n, (5, 2)).tolist():
        num_layers = int(random.integers(0, len(expected.reached) + 1))
        at = min(num_layers, len(expected.reached) - 1)
        np.testing.assert_array_equal(found.field(q, num_layers), np.flatnonzero(expected.reached[at][q]))
        check_path(found.path(q, k), q, k, expected)


def check_path(hops: tuple[int, ...] | None, q: int, k: int, expected: Truth) -> None:
    """It is a way, and there is no shorter one."""
    if hops is None:
        assert not expected.closure[q, k]
        return
    assert (hops[0], hops[-1]) == (k, q)
    for layer in range(len(hops) - 1):
        assert expected.layers[layer % len(expected.layers)][hops[layer + 1], hops[layer]]
    shortest = next(number for number, reached in enumerate(expected.reached) if reached[q, k])
    assert len(hops) - 1 == shortest


@given(case=cases(max_length=130), limits=st.sampled_from([(1, 7), (8, 16), (0, 64), (3, 2)]))
def test_blocks_bound_what_positions_say(case: Case, limits: tuple[int, int]) -> None:
    pattern = case.pattern()
    with in_blocks(*limits):
        found = reach_of(case, pattern)
    expected = truth(case, pattern, found.period)
    for field in found.fields:
        least, mean, most = counts(expected.reached[min(field.layers, len(expected.reached) - 1)])
        for figure, exact in ((field.least, least), (field.mean, mean), (field.most, most)):
            near = figure.value == pytest.approx(exact)
            assert near or (figure.certainty == "UpperBound" and figure.value > exact)
    number = len(expected.reached) - 1
    assert found.layers_to_connect.value <= number
    assert found.layers_to_connect.value == number or found.layers_to_connect.certainty == "LowerBound"
    allowed = np.tri(found.n, dtype=bool) if found.is_causal else np.ones((found.n, found.n), dtype=bool)
    missing = int((allowed & ~expected.closure).sum())
    assert found.unreachable.value <= missing
    assert found.unreachable.value == missing or found.unreachable.certainty == "LowerBound"
    assert found.is_complete in (None, missing == 0)
    assert found.example is None or not expected.closure[found.example]
    assert found.islands.value <= num_islands(expected.closure)


@given(cases(max_length=60))
def test_composed_formulas_agree_with_matrix_powers(case: Case) -> None:
    assume(set(case.sizes) == {"n"} and not case.inputs)
    pattern = case.pattern()
    relations = [group.relation for group in case.bound(pattern).groups][:1]
    expected = truth_of([brute.keep(pattern.spec, case.lengths, case.heads, case.layer, {})[0]])
    try:
        found = composed(relations, case.sizes["n"])
    except GaveUpError:
        return
    assert found.layers == len(expected.reached) - 1
    assert (found.closure == "all") == bool(expected.closure.all())


@pytest.mark.parametrize(
    "text",
    [
        "k // 5 % 4 in {-4, abs(k), min(k, q)}",  # isl crashes when it coalesces the third square
        "abs(q - k) <= k",  # numbers that double in length with each square
        "-q // 25 <= q - k <= 2",  # a floor more with each square
    ],
)
def test_what_grows_too_large_is_given_up(text: str) -> None:
    bound = patterndsl.parse(text).bind(4096)
    with pytest.raises(GaveUpError):
        composed([bound.relation], None)


# ---- what is known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 63, 65, 127, 1000])
@pytest.mark.parametrize("w", [2, 3, 64])
def test_a_causal_window_connects_by_its_steps(n: int, w: int) -> None:
    found = patterndsl.parse("recent(w)", {"w": w}).reach(n)
    assert found.layers_to_connect.value == -(-(n - 1) // (w - 1))
    assert found.closure == ("all" if n == 1 else "causal")
    assert found.at_every_length is None


@pytest.mark.parametrize(
    ("name", "layers", "closure"),
    [
        ("sparse-transformer-strided", 2, "causal"),
        ("sparse-transformer-fixed", 2, "causal"),
        ("axial", 2, "all"),
        ("longformer", 2, "all"),
        ("etc", 2, "all"),
        ("bigbird", 2, "all"),
        ("neighborhood-plus-axial", 2, "all"),
        ("gemma", 6, "causal"),
        ("blockwise", 1, "part"),
        ("longnet", 3, "part"),
    ],
)
def test_examples_connect_after_as_many_layers_as_their_papers_say(name: str, layers: int, closure: str) -> None:
    found = patterndsl.load(EXAMPLES / f"{name}.yaml").reach(1024, heads=8)
    assert (found.layers_to_connect.value, found.layers_to_connect.certainty) == (layers, "Exact")
    assert found.closure == closure


@pytest.mark.parametrize("n", [1 << 16, 1 << 20, (1 << 30) + 1])
def test_formulas_know_any_length(n: int) -> None:
    found = patterndsl.parse("causal & (recent(1024) | strided(1024))").reach(n)
    assert (found.layers_to_connect.value, found.closure) == (2, "causal")
    assert (found.fields[-1].layers, found.fields[-1].mean.value) == (2, (n + 1) / 2)
    assert patterndsl.parse("window(1)").reach(n).layers_to_connect.value == n - 1


@pytest.mark.parametrize(
    ("text", "layers", "closure"),
    [
        ("window(64) | global(2)", 2, "all"),
        ("causal & (recent(64) | strided(64))", 2, "causal"),
        ("block(64)", 1, "part"),
        ("causal & (recent(8) | layer % 6 == 5)", 6, "causal"),
        ("q == k", 0, "part"),
    ],
)
def test_one_answer_for_every_length(text: str, layers: int, closure: str) -> None:
    every = patterndsl.parse(text).reach(1000, layers=6).at_every_length
    assert every is not None
    assert (every.layers, every.closure) == (layers, closure)


def test_no_answer_for_every_length_where_parameters_grow() -> None:
    assert patterndsl.parse("window(w) | global(1)", {"w": "N // 4"}).reach(100).at_every_length is None


@pytest.mark.parametrize("n", [256, 1 << 16])
def test_blocks_never_connect(n: int) -> None:
    found = patterndsl.parse("block(64)").reach(n)
    assert (found.layers_to_connect.value, found.closure) == (1, "part")
    assert (found.unreachable.value, found.unreachable.certainty) == (n * n - 64 * n, "Exact")
    assert found.example == (0, 64)
    assert (found.islands.value, found.islands.certainty) == (n // 64, "Exact")
    assert found.path(64, 63) is None


def test_blocks_of_positions_are_exact_where_tiles_are_full() -> None:
    with in_blocks(64, 16):
        found = patterndsl.parse("blocks(64, window(1))").reach(1024)
    assert found.block == 64
    assert (found.layers_to_connect.value, found.layers_to_connect.certainty) == (15, "Exact")
    assert found.closure == "all"


def test_dilated_heads_alone_leave_islands() -> None:
    found = patterndsl.parse("dilated(4, 3)").reach(100)
    assert found.islands.value == 3
    assert patterndsl.parse("dilated(4, 3) | head == 1 & window(1)").reach(100, heads=2).islands.value == 1


def test_documents_are_islands_and_inputs_are_arrays() -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    found = pattern.reach(8, inputs={"doc": np.array([0, 0, 0, 1, 1, 2, 2, 2])})
    assert found.islands.value == 3
    assert (found.deaf, found.unheard) == (Alone(2, (3, 5)), Alone(2, (2, 4)))
    assert found.field(4, 1).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("inputs", "code"),
    [({}, "E501"), ({"doc": [0] * 7}, "E502"), ({"doc": [[0] * 8] * 2}, "E502"), ({"doc": [0.5] * 8}, "E502")],
)
def test_inputs_that_do_not_fit(inputs: dict[str, Any], code: str) -> None:
    with pytest.raises(PatternError) as caught:
        patterndsl.parse("same(doc)", inputs={"doc": "int[N]"}).reach(8, inputs=inputs)
    assert [found.code for found in caught.value.diagnostics] == [code]


def test_what_cannot_be_asked() -> None:
    found = patterndsl.parse("causal").reach(8)
    for ask in (lambda: found.field(8, 1), lambda: found.path(0, -1), lambda: found.field(0, -1)):
        with pytest.raises(PatternError, match="E406"):
            ask()
    with pytest.raises(PatternError, match="layers is 0"):
        patterndsl.parse("causal").reach(8, layers=0)


def test_nothing_at_length_zero() -> None:
    found = patterndsl.parse("causal").reach(0)
    assert (found.layers_to_connect.value, found.closure, found.islands.value) == (0, "all", 0)
    with pytest.raises(PatternError, match="there are none"):
        found.field(0, 1)


def test_progress_is_told() -> None:
    told: list[str] = []
    patterndsl.parse("window(3)").reach(300, on_event=lambda what, done, total: told.append(what))
    assert {"finding tiles", "composing layer 1", "composing layer 2"} <= set(told)
