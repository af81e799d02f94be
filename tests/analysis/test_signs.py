"""Parameters are counted from 0 inside; what is subtracted from them may be less, and what is divided then too."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest

import patterndsl
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.pairs import pairs, symbolic
from patterndsl.analysis.policy import CachePolicy
from patterndsl.analysis.verdict import Proven, Refuted, Unknown
from tests.analysis.test_closed_forms import value_of

TEXTS = [
    "causal | k == q + abs(w - s) // 20",
    "causal | k == q - (w - s) // 20",
    "recent(max(0, w - s) // 3 + 1)",
    "window(abs(2 * w - s) // 4)",
    "k * 1 <= q - (w - s) // 7 & k >= q - 30",
    "recent(1 + isqrt(abs(w - s)))",
]


def pattern_of(text: str, **least: int) -> patterndsl.Pattern:
    declared = ", ".join(f"{name}: {{default: 9, min: {value}}}" for name, value in least.items())
    return patterndsl.parse(f"params: {{{declared}}}\nattend: {text}\n")


@pytest.mark.parametrize("text", TEXTS)
def test_formulas_hold_on_both_sides_of_0(text: str) -> None:
    pattern, drawn = pattern_of(text, w=0, s=0), random.Random(text)
    formula = pairs(symbolic(pattern.resolved))
    assert isinstance(formula, Formula)
    conditions = [formula.condition(cell) for cell in formula.cells]
    text_of = cache(lambda at: formula.text(formula.cells[at]))
    for _ in range(60):
        values: dict[str, Any] = {"N": drawn.randint(1, 40), "w": drawn.randint(0, 90), "s": drawn.randint(0, 90)}
        mask = pattern.with_params(w=values["w"], s=values["s"]).compile(values["N"]).mask()
        assert formula.at(values) == int(mask.sum()), values
        if "isqrt" not in text:
            held = [bool(value_of(condition, values)) for condition in conditions]
            assert sum(held) == 1, (values, conditions)
            assert value_of(text_of(held.index(True)), values) == int(mask.sum()), values


@pytest.mark.parametrize("shift", ["abs(w - s) // 20", "0 - (w - s) // 20", "(w - s) // 20", "log2(max(1, w - s))"])
def test_no_claim_is_proven_by_leaving_values_out(shift: str) -> None:
    """Too far from the least values for a search among small ones."""
    verdict = pattern_of(f"causal | k == q + {shift}", w=0, s=0).prove("causal")
    assert isinstance(verdict, Refuted)
    assert verdict.witness.k is not None and verdict.witness.k > verdict.witness.q


def test_roots_are_bounds_only() -> None:
    """isl knows a root by its bounds, so that a claim about one may stay open, but is never proven wrongly."""
    assert isinstance(pattern_of("causal | k == q + isqrt(abs(w - s)) // 5", w=0, s=0).prove("causal"), Unknown)


def test_values_below_0_are_said_to_be_beyond_proofs() -> None:
    pattern = pattern_of("causal | k == q - w - 18", w=-30)
    verdict = pattern.prove("causal")
    assert isinstance(verdict, Unknown) and "`w` may be negative" in verdict.reason
    assert isinstance(pattern.prove("causal", params={"w": -10}), Proven)
    assert isinstance(pattern.prove("causal", params={"w": -25}), Refuted)
    assert "Exact at w = 9" in "\n".join(pattern.report().lines())


@pytest.mark.parametrize(
    "text", ["causal & k < isqrt(abs(N))", "q >= k & ~(q <= isqrt(abs(N)))", "causal & k >= log2(max(1, N))"]
)
def test_roots_of_lengths_have_policies_without_a_crash(text: str) -> None:
    pattern = patterndsl.parse(text)
    policy = pattern.cache_policy()
    if not isinstance(policy, CachePolicy):
        return
    for n in (1, 2, 5, 17):
        mask = pattern.compile(n).mask()[0]
        for t in range(n):
            keys = np.arange(t + 1)
            needed = mask[t:].any(dim=0)[: t + 1].numpy()
            assert (policy.keeps(t, keys, {}, n) >= needed).all(), (n, t)
