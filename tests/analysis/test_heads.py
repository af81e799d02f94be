"""What reports say of the heads: cases, bounds, leading terms, LaTeX; and formulas at the given parameters."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import patterndsl
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.heads import group_dict, group_lines
from patterndsl.analysis.latex import words

BIGBIRD = "examples/bigbird.yaml"


@pytest.mark.parametrize(
    ("text", "params", "leading"),
    [
        ("window(w) | global(g)", {"w": 4, "g": 2}, "2·N·g + 2·N·w"),
        ("causal", {}, "N²/2"),
        ("causal - recent(w)", {"w": 4}, "N²/2"),
        ("block(b)", {"b": 4}, "N·b"),
        ("causal & block(b)", {"b": 4}, "N·b/2"),
        ("causal & strided(s)", {"s": 4}, "N²/(2·s)"),
        ("causal & recent(isqrt(N))", {}, "N√N"),
        ("causal & recent(4)", {}, "4·N"),
    ],
)
def test_leading_terms(text: str, params: dict[str, int], leading: str) -> None:
    (group,) = patterndsl.parse(text, params=params).report().groups
    assert group.leading == leading


def test_leading_terms_are_near_for_long_sequences() -> None:
    pattern = patterndsl.parse("causal & (recent(l) | strided(l))", params={"l": 1000})
    (group,) = pattern.report().groups
    assert group.leading == "N·l + N²/(2·l)"
    assert isinstance(group.formula, Formula)
    found = group.formula.at({"N": 10**6, "l": 10**3})
    assert found is not None
    assert abs(found / (10**9 + 10**9 / 2) - 1) < 0.01


def test_every_case_of_a_bound_is_said() -> None:
    pattern = patterndsl.load(BIGBIRD)
    (group,) = pattern.report().groups
    assert group.upper is not None
    lines = group_lines(group, False)
    assert sum(" where " in line for line in lines) == len(group.upper.cells) - 1
    found = group_dict(group)["formula"]
    assert isinstance(found, dict)
    assert len(found["upper_bound"]["cases"]) == len(group.upper.cells)
    assert found["upper_bound"]["latex"].startswith(r"\text{pairs} \le \begin{cases}")


def test_a_bound_is_one_in_every_case() -> None:
    pattern = patterndsl.load(BIGBIRD).with_params(b=4, w=1, r=2)
    (group,) = pattern.report().groups
    assert group.upper is not None
    for n in (8, 9, 12, 16, 22, 40):
        bound = group.upper.at({"N": n, "b": 4, "w": 1, "r": 2, "seed": 0})
        assert bound is not None
        assert bound >= int(pattern.compile(n=n, backend="oracle").mask().sum())


def test_a_formula_at_the_given_parameters() -> None:
    pattern = patterndsl.parse("causal & (strided(s) | strided(t))", params={"s": 4, "t": 6})
    (group,) = pattern.report().groups
    assert isinstance(group.formula, Formula)
    assert dict(group.formula.fixed) == {"s": 4, "t": 6}
    assert group.reason == "neither of `s` and `t` divides the other"
    assert "(Exact at s = 4, t = 6 for " in group_lines(group, False)[0]
    for n in (24, 48, 120):
        q, k = np.arange(n)[:, None], np.arange(n)
        kept = (k <= q) & (((q - k) % 4 == 0) | ((q - k) % 6 == 0))
        assert group.formula.at({"N": n, "s": 4, "t": 6}) == kept.sum()
    assert group.formula.at({"N": 24, "s": 4, "t": 7}) is None


def test_heads_that_draw_other_keys_share_what_is_known() -> None:
    first, *others = patterndsl.load(BIGBIRD).report(heads=4).groups
    assert [group.heads for group in (first, *others)] == [(0,), (1,), (2,), (3,)]
    assert all(group.upper is first.upper for group in others)


def test_all_cases_in_latex() -> None:
    text = patterndsl.parse("window(w)", params={"w": 4}).report().latex()
    assert text.startswith(r"\text{pairs} = \begin{cases}")
    assert text.count(r"\text{for ") == text.count(r"\\") + 1 == 2
    assert patterndsl.parse("all").report().latex() == r"\text{pairs} = N^{2}"


def test_words_in_latex() -> None:
    assert words("w_1 ≥ 50% & a") == r"\text{w\_1 $\ge$ 50\% \& a}"


def test_what_a_notebook_shows() -> None:
    pattern = patterndsl.parse("causal & recent(w)", params={"w": 4})
    shown: list[Any] = [
        pattern,
        pattern.prove("causal"),
        pattern.prove("rows_nonempty"),
        patterndsl.parse("k * k <= q * q").prove("causal"),
        pattern.cache_policy(),
        pattern.report().formula,
        pattern.report(),
    ]
    for item in shown:
        bundle = item._repr_mimebundle_()
        assert bundle["text/plain"] == str(item)
        assert re.fullmatch(r"\$.*\$", bundle["text/latex"])


def test_quotients_that_differ_by_part() -> None:
    pattern = patterndsl.parse("causal & ((q + k < N & columns(4, 2)) - (q % 2 == k % 2 - q + k < N))")
    formula = pattern.report().formula
    assert isinstance(formula, Formula)
    for n in (1, 7, 8, 13, 30, 47):
        assert formula.at({"N": n}) == int(pattern.compile(n=n, backend="oracle").mask().sum())
