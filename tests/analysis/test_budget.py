"""Nothing hangs: questions end when their time is over, and large formulas are given up before isl reads them."""

from __future__ import annotations

import time

import pytest

import patterndsl
from patterndsl.analysis.budget import GaveUpError, check_time, within
from patterndsl.analysis.compose import composed
from patterndsl.analysis.pairs import NoFormula
from patterndsl.analysis.proof import Proven, Unknown
from patterndsl.analysis.redundancy import redundancy

REMAINDERS, QUOTIENTS = "q", "q"
for divisor in (101, 97, 89, 83, 79, 73, 71, 67):
    REMAINDERS = f"(({REMAINDERS}) * 3 + k) % {divisor}"
    QUOTIENTS = f"(({QUOTIENTS}) + 1) // {divisor}"
TERMS = "causal & (" + " | ".join(f"block({at + 2}) & k % {at + 3} >= {at // 2}" for at in range(40)) + ")"
XORS = "(q % 2 == 0)"
for divisor in (3, 5, 7, 11, 13):
    XORS = f"(({XORS} & (q - k) % {divisor} != 0) | ((q - k) % {divisor} == 0 & ~{XORS}))"


def test_an_inner_question_has_no_more_time_than_the_outer() -> None:
    check_time()
    with within(-1), within(10), pytest.raises(GaveUpError, match="gave up after -1 s"):
        check_time()
    check_time()


def test_over_time_everything_has_an_answer() -> None:
    pattern = patterndsl.parse("causal & recent(w)", params={"w": 4})
    with within(0):
        time.sleep(0.001)
        assert isinstance(pattern.prove("causal"), Unknown)
        found = pattern.report(64)
        assert isinstance(found.formula, NoFormula)
        assert found.formula.reason == "gave up after 0 s"
        assert found.pairs is not None
        assert found.pairs.value == 4 * 64 - 6
        assert pattern.reach(64).layers_to_connect.value == 21
        assert isinstance(pattern.cache_policy(), NoFormula)


def test_terms_without_time_are_open() -> None:
    found = redundancy(patterndsl.parse("window(3) | window(2) | window(1)").spec, seconds=-1)
    assert (found.dead, found.num_open) == ((), 3)


@pytest.mark.parametrize("text", [f"{REMAINDERS} < 5", f"{QUOTIENTS} <= k"])
def test_divisions_inside_one_another_are_not_read(text: str) -> None:
    pattern = patterndsl.parse(text)
    with pytest.raises(GaveUpError, match="inside one another"):
        composed([pattern.resolved.relation], 64)


@pytest.mark.parametrize("text", [f"{REMAINDERS} < 5", f"{QUOTIENTS} <= k", TERMS, XORS], ids=lambda text: text[:24])
def test_hard_patterns_end(text: str) -> None:
    pattern = patterndsl.parse(text)
    start = time.process_time()
    assert pattern.report(1024).pairs is not None
    pattern.prove("rows_nonempty")
    pattern.reach(256)
    pattern.lint()
    assert time.process_time() - start < 60  # no race with the clock: a hang
    assert not isinstance(pattern.prove("causal"), Proven) or text is TERMS


def test_residues_of_residues_end() -> None:
    pattern = patterndsl.parse("causal & ~((shifted(k <= q // 3, 1) - (q + k < N | q % 2 == k % 2)))")
    assert pattern.report(48).pairs is not None
