"""Counterexamples that no small size shows, and proofs that must not be vacuous."""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl.analysis.proof import Claim, Proven, Refuted, Unknown
from patterndsl.diagnostics import PatternError

FAR = [
    # pattern, claim, other, N, q, k
    ("recent(1500)", "equals", "window(1500, 0)", 1501, 1500, 0),
    ("recent(4096)", "equals", "window(4096, 0)", 4097, 4096, 0),
    ("causal & recent(4096)", "within", "recent(4095)", 4096, 4095, 0),
    ("q // 4096 == k // 4096", "within", "window(4094)", 4096, 0, 4095),
    ("causal | q == 3000", "causal", None, 3002, 3000, 3001),
    ("causal & ~(q == 5000)", "rows_nonempty", None, 5001, 5000, None),
    ("causal & ~(q == 5000000)", "rows_nonempty", None, 5_000_001, 5_000_000, None),
    ("strided(97)", "equals", "strided(97) & window(2000)", 2038, 0, 2037),
    ("(q - k) % 99991 == 17 & (q + k) % 99989 == 5 & q % 10007 < k % 10009", "causal", None, 99_985, 10, 99_984),
]


@pytest.mark.parametrize(("text", "claim", "other", "n", "q", "k"), FAR)
def test_the_first_counterexample_may_be_far(
    text: str, claim: Claim, other: str | None, n: int, q: int, k: int | None
) -> None:
    verdict = patterndsl.parse(text).prove(claim, None if other is None else patterndsl.parse(other))
    assert isinstance(verdict, Refuted), str(verdict)
    assert (verdict.witness.n, verdict.witness.q, verdict.witness.k) == (n, q, k)


@pytest.mark.parametrize(
    ("text", "claim", "other", "n", "head", "layer"),
    [
        ("causal & (recent(8) | layer == 3)", "equals", "recent(8)", 9, 0, 3),
        ("causal & (recent(8) | head == 5)", "within", "recent(8)", 9, 5, 0),
        ("causal & recent(layer + 3)", "within", "recent(4)", 5, 0, 2),
        ("causal & (recent(1024) | layer % 6 == 5)", "within", "recent(1024)", 1025, 0, 5),
    ],
)
def test_any_head_and_layer(text: str, claim: Claim, other: str, n: int, head: int, layer: int) -> None:
    verdict = patterndsl.parse(text).prove(claim, patterndsl.parse(other))
    assert isinstance(verdict, Refuted), str(verdict)
    assert (verdict.witness.n, verdict.witness.head, verdict.witness.layer) == (n, head, layer)


def test_what_happens_at_no_length_that_there_can_be_is_proven() -> None:
    verdict = patterndsl.parse("causal | q == 2000000000000").prove("causal")
    assert isinstance(verdict, Proven)
    assert verdict.scope == "for N ≤ 2^40"


SHIFTED = "params: {m: {default: 4, min: 1}}\nattend: (q + m // 2) // m == (k + m // 2) // m & q % m // 3 == k % m // 3"


def test_an_assumption_that_the_defaults_break_proves_nothing() -> None:
    verdict = patterndsl.load("examples/swin.yaml").prove("rows_nonempty")
    assert isinstance(verdict, Unknown)
    assert verdict.reason.endswith("at the defaults m = 4 it is proven for all N")
    assert not isinstance(patterndsl.parse(SHIFTED).prove("symmetric"), Refuted)


def test_sizes_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(PatternError, match="E404"):
        patterndsl.load("examples/axial.yaml").prove("symmetric", n=7, params={"cols": 2})
    assert isinstance(patterndsl.load("examples/axial.yaml").prove("symmetric", n=7), Proven)


@pytest.mark.parametrize(
    ("text", "claim", "other"),
    [
        ("causal & strided(s) & strided(t)", "within", "causal & strided(s)"),
        ("causal & strided(s)", "within", "causal & (strided(s) | strided(t))"),
        ("causal & (strided(s) | strided(t))", "within", "strided(t) | strided(s) | window(2)"),
        ("causal & (strided(s) | strided(t))", "causal", None),
        ("strided(s) & strided(t)", "equals", "strided(t) & strided(s)"),
    ],
)
def test_terms_that_both_have_need_no_arithmetic(text: str, claim: Claim, other: str | None) -> None:
    params = {"s": 4, "t": 6}
    second = None if other is None else patterndsl.parse(other, params=params)
    assert isinstance(patterndsl.parse(text, params=params).prove(claim, second), Proven)


def test_the_defaults_may_refute_what_is_open_for_all() -> None:
    pattern = patterndsl.parse("strided(s) & strided(t) & q - k == 12", params={"s": 4, "t": 6})
    verdict = pattern.prove("within", patterndsl.parse("none"))
    assert isinstance(verdict, Refuted), str(verdict)
    assert (verdict.witness.n, verdict.witness.q, verdict.witness.k) == (13, 12, 0)


def test_inputs_far_away() -> None:
    pattern = patterndsl.parse("causal | (q.doc == k.doc & k - q == 30)", inputs={"doc": "int[N]"})
    verdict = pattern.prove("causal")
    assert isinstance(verdict, Refuted), str(verdict)
    assert (verdict.witness.n, verdict.witness.q, verdict.witness.k) == (31, 0, 30)
    hidden = patterndsl.parse("causal | (q.doc == 777 & k - q == 30)", inputs={"doc": "int[N]"})
    assert isinstance(hidden.prove("causal"), Unknown)
