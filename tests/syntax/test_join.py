"""Do joined patterns mean what their parts mean, and are they refused where that cannot be?"""

from __future__ import annotations

from typing import Any

import pytest

import patterndsl
from patterndsl import InputError, Pattern, parse

W = "params: {w: 3}\nattend: recent(w)"
DOC = "inputs: {doc: 'int[N]'}\nattend: same(doc)"
GRID = "grid: {row: 8, col: 8}\nattend: q.row == k.row"


@pytest.mark.parametrize(
    ("joined", "text"),
    [
        (parse("causal") & parse("recent(3)"), "causal & recent(3)"),
        (parse("causal | all") & parse("recent(3) & first(2)"), "(causal | all) & recent(3) & first(2)"),
        (parse("causal") | parse("recent(3)") | parse("first(2)"), "causal | recent(3) | first(2)"),
        (~parse("causal & recent(3)"), "~(causal & recent(3))"),
        (parse(W) | parse("params: {w: 3, g: 2}\nattend: first(g) & recent(w)"), None),
        (parse(W) & parse(DOC) & parse(GRID), None),
        (parse("define: {near(w): recent(w)}\nattend: near(3)") & parse(W), None),
    ],
)
def test_a_joined_pattern_is_written_as_in_the_language(joined: Pattern, text: str | None) -> None:
    assert text is None or str(joined) == text
    assert parse(str(joined)) == joined


def test_joined_masks_are_those_of_the_language() -> None:
    first, second = parse(W), parse("params: {g: 2}\nattend: first(g)")
    one, other = (pattern.compile(n=9).mask() for pattern in (first, second))
    assert (first | second).with_params(w=3, g=2).compile(n=9).mask().equal(one | other)
    assert (first & ~second).compile(n=9).mask().equal(one & ~other)


@pytest.mark.parametrize(
    ("left", "right", "code", "said"),
    [
        (W, "params: {w: 4}\nattend: first(w)", "E208", "`w` is declared differently"),
        ("define: {window(w): recent(w)}\nattend: window(3)", "window(2)", "E208", "the prelude's"),
        ("window(2)", "define: {window(w): recent(w)}\nattend: window(3)", "E208", "the prelude's"),
        (GRID, "grid: {row: 4, col: 16}\nattend: q.row == k.row", "E208", "different `grid`"),
        ("attend: causal & k < q\nfallback: q == k", "causal", "E505", "`fallback`"),
        ("causal", "branches: {a: causal, b: all}\ncombine: mean", "E505", "`branches`"),
        ("causal", "keys: 2 * N\nattend: k < 4", None, ""),
    ],
)
def test_what_cannot_be_joined(left: str, right: str, code: str | None, said: str) -> None:
    one, other = parse(left), parse(right)
    if code is None:
        assert (one & other).resolved.num_keys is not None
        return
    with pytest.raises(InputError, match=code) as failed:
        one & other
    assert said in str(failed.value)


def test_a_name_in_two_sections_is_refused() -> None:
    with pytest.raises(patterndsl.PatternError, match="E208"):
        parse(DOC) | parse("params: {doc: 2}\nattend: recent(doc)")


def test_only_patterns_are_joined() -> None:
    text: Any = "recent(3)"
    with pytest.raises(TypeError):
        parse("causal") & text
