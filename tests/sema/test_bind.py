"""What is a pattern at given sizes? Lengths, parameters and their domains."""

from __future__ import annotations

import re
from typing import Any

import pytest

import patterndsl
from patterndsl import PatternError
from patterndsl.sema.bind import Sizes

SIZES: dict[str, tuple[dict[str, int], Sizes]] = {
    "n": ({"n": 9}, Sizes(9, 9, 0, 9)),
    "nothing at all": ({"n": 0}, Sizes(0, 0, 0, 0)),
    "two lengths": ({"q_len": 3, "kv_len": 5}, Sizes(3, 5, 0, 3)),
    "queries only": ({"q_len": 3}, Sizes(3, 3, 0, 3)),
    "queries from a position on": ({"q_len": 3, "q_start": 4}, Sizes(3, 7, 4, 7)),
    "more keys": ({"q_len": 3, "kv_len": 20, "q_start": 4}, Sizes(3, 20, 4, 7)),
    "a slice": ({"n": 9, "q_len": 3, "q_start": 4}, Sizes(3, 9, 4, 9)),
    "the rest": ({"n": 9, "q_start": 4}, Sizes(5, 9, 4, 9)),
    "no query": ({"n": 9, "q_start": 9}, Sizes(0, 9, 9, 9)),
}


@pytest.mark.parametrize(("given", "expected"), SIZES.values(), ids=SIZES)
def test_sizes(given: dict[str, int], expected: Sizes) -> None:
    assert patterndsl.parse("causal").bind(**given).sizes == expected


NO_SIZES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "keys alone": {"kv_len": 3},
    "negative": {"n": -1},
    "negative start": {"n": 3, "q_start": -1},
    "beyond the sequence": {"n": 3, "q_len": 3, "q_start": 1},
    "start beyond the sequence": {"n": 3, "q_start": 4},
    "a fraction": {"n": 2.0},
    "a truth value": {"n": True},
    "text": {"n": "3"},
    "too long": {"n": 2**40 + 1},
    "no heads": {"n": 3, "heads": 0},
    "a fraction of a head": {"n": 3, "heads": 1.0},
    "negative layer": {"n": 3, "layer": -1},
}


@pytest.mark.parametrize("given", NO_SIZES.values(), ids=NO_SIZES)
def test_sizes_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(PatternError, match="E406"):
        patterndsl.parse("causal").bind(**given)


# ---- parameters -------------------------------------------------------------------------------------------------

PARAMS = {
    "isqrt(N)": 7,
    "log2(N)": 5,
    "ceildiv(N, 12)": 5,
    "N // 10 * 3": 15,
    "max(1, N // 100)": 1,
    "clamp(N, 3, 20)": 20,
    "-N % 7": 6,
    "min(N, Nk, 60)": 50,
    "2 * isqrt(N) - 1": 13,
}


@pytest.mark.parametrize(("text", "value"), PARAMS.items(), ids=PARAMS)
def test_default_of_the_length(text: str, value: int) -> None:
    found = patterndsl.parse(f'params: {{w: "{text}"}}\nattend: window(w)').bind(50).relation
    assert found == patterndsl.parse(f"window({value})").bind(50).relation


OVERRIDES: dict[str, tuple[str, dict[str, Any], str]] = {
    "an integer": ("window(w)", {"w": 3}, "window(3)"),
    "a negative": ("window(4, w)", {"w": -3}, "window(4, -3)"),
    "an expression": ("window(w)", {"w": "isqrt(N)"}, "window(4)"),
    "a list": ("window(w[1])", {"w": [3, 5]}, "window(5)"),
    "a tuple": ("window(w[1])", {"w": (3, 5)}, "window(5)"),
    "a list of expressions": ("window(w[1])", {"w": [3, "N // 4"]}, "window(4)"),
}


@pytest.mark.parametrize(("text", "params", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_parameters_in_code(text: str, params: dict[str, Any], expected: str) -> None:
    expected_relation = patterndsl.parse(expected).bind(16).relation
    pattern = patterndsl.parse(text, params=params)
    assert pattern.bind(16).relation == expected_relation
    assert patterndsl.parse(str(pattern)) == pattern
    if not text.startswith("window(w[") or "N // 4" not in params["w"]:
        assert pattern.with_params(**params) == pattern


NO_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction": ({"w": 3.5}, "E402"),
    "a truth value": ({"w": True}, "E402"),
    "nothing": ({"w": None}, "E402"),
    "an empty list": ({"w": []}, "E402"),
    "a list of lists": ({"w": [[1]]}, "E402"),
    "bytes": ({"w": b"3"}, "E402"),
    "no expression": ({"w": "3 3"}, "E101"),
    "an unknown name": ({"w": "v"}, "E201"),
    "a position": ({"w": "q"}, "E209"),
    "beyond 2^53": ({"w": 2**54}, "E102"),
    "a name with a space": ({"w": 3, "a b": 3}, "E304"),
    "no name": ({"w": 3, "": 3}, "E304"),
    "a name of the language": ({"w": 3, "N": 3}, "E208"),
    "a keyword": ({"w": 3, "at": 3}, "E208"),
}


@pytest.mark.parametrize(("params", "code"), NO_PARAMS.values(), ids=NO_PARAMS)
def test_parameters_that_cannot_be(params: dict[str, Any], code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse("window(w)", params=params).bind(9)


NO_GRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "a fraction": ({"row": 1.5}, "E402"),
    "no size": ({"row": None}, "E402"),
    "an unknown axis": ({"row": ["col"]}, "E202"),
    "numbers for axes": ({"row": [3]}, "E304"),
    "no name": ({"2d": 3}, "E304"),
    "a name of the language": ({"k": 3}, "E208"),
    "too small": ({"row": 2, "col": 4}, "E404"),
    "nothing": ({"row": 0, "col": 4}, "E404"),
    "a position": ({"row": "q"}, "E209"),
}


@pytest.mark.parametrize(("grid", "code"), NO_GRIDS.values(), ids=NO_GRIDS)
def test_grids_that_cannot_be(grid: dict[str, Any], code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse("causal", grid=grid).bind(9)


NO_INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no type": ({"doc": "tensor"}, "E304"),
    "not text": ({"doc": 3}, "E304"),
    "no name": ({"a b": "int[N]"}, "E304"),
    "a name of the language": ({"q": "int[N]"}, "E208"),
    "a size of a position": ({"doc": "int[k]"}, "E209"),
}


@pytest.mark.parametrize(("inputs", "code"), NO_INPUTS.values(), ids=NO_INPUTS)
def test_inputs_that_cannot_be(inputs: dict[str, Any], code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse("causal", inputs=inputs)


SHAPES: dict[str, tuple[str, int | None]] = {
    "int[N]": ("both", 9),
    "int[Nq]": ("query", 9),
    "int[Nk]": ("key", 12),
    "int[]": ("table", None),
    "int[5]": ("table", 5),
    "int[N + 1]": ("table", 8),
    "int[2 * Nk]": ("table", 24),
}


@pytest.mark.parametrize(("kind", "expected"), SHAPES.items(), ids=SHAPES)
def test_input_shape(kind: str, expected: tuple[str, int | None]) -> None:
    """Of 7 queries and 12 keys; an input of both sides has a value for each position of either."""
    side, length = expected
    use = {"both": "q.doc == k.doc", "query": "q.doc == 1", "key": "k.doc == 1", "table": "doc[q] == 1"}[side]
    (shape,) = patterndsl.parse(use, inputs={"doc": kind}).bind(q_len=7, kv_len=12).inputs
    expected_length = {"both": 12, "query": 7}.get(side, length)
    assert (shape.side, shape.length) == (side, expected_length)


# ---- domains ----------------------------------------------------------------------------------------------------

FITS = [
    "q // max(1, k) == 0",
    "q % (abs(k - q) + 1) == 0",
    "isqrt(q * q + k) < 5",
    "log2(q + 1) == log2(k + 1)",
    "q // clamp(k, 1, 8) == 2",
    "q // (head + 1) == k // (layer + 1)",
    "q // (1 + k % 3) == 0",
    "q * 4611686018427387 < k",
    "random(0)",
    "random(100)",
    "random(2, seed = -5)",
    "random(1) at (q // 2, k // 2, N = 0)",
    "random(2, avoid = random(1, avoid = causal))",
]


@pytest.mark.parametrize("text", FITS)
def test_within_its_domain(text: str) -> None:
    patterndsl.parse(text).bind(64, heads=2)


LEAVES = {
    "q // k == 0": "E403",
    "q % (k - q) == 0": "E403",
    "q // (head - 1) == 0": "E403",
    "q // min(1, k) == 0": "E403",
    "isqrt(k - 1) == 0": "E407",
    "log2(k) == 0": "E407",
    "q * 9007199254740992 * 9007199254740992 < k": "E407",
    "random(3, avoid = k // q == 1)": "E403",
    "random(head - 1)": "E402",
}


@pytest.mark.parametrize(("text", "code"), LEAVES.items(), ids=LEAVES)
def test_outside_its_domain(text: str, code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse(text).bind(64, heads=2)


IMAGE = "{params: {w: {default: 4, min: 2}}, grid: {row: N // w, col: w}, attend: same(row)}"
LISTS = "{params: {d: {default: [1, 2], min: 1}}, attend: 'strided(d[head % 2])'}"

WHERE_THEY_STAND = {
    "a grid": (IMAGE, "o", 16, None),
    "a grid that does not fit": (IMAGE, "o", 18, "the grid has 16 positions, but N is 18"),
    "a grid in blocks": (IMAGE, "blocks(3, o)", 48, None),
    "a grid in blocks that only fits outside": (IMAGE, "blocks(3, o)", 16, "the grid has 4 positions, but N is 6 here"),
    "a grid in blocks of blocks": (IMAGE, "blocks(2, blocks(3, o))", 24, None),
    "a grid in a definition in blocks": (IMAGE, "blocks(3, f)", 48, None),
    "a grid in a definition in blocks alone": (IMAGE.replace("N // w", "4"), "blocks(3, f)", 48, None),
    "a grid inside and outside": (IMAGE, "o | blocks(3, o)", 48, None),
    "a grid given a definition that drops it": (IMAGE, "drop(o)", 17, None),
    "a minimum of a rescaled length": (IMAGE, "blocks(4, o(w = N // 8))", 64, None),
    "a minimum that a rescaled length misses": (
        IMAGE,
        "blocks(8, o(w = N // 8))",
        64,
        "`o.w` is 1, and must be at least 2",
    ),
    "a minimum of lengths that move": (IMAGE, "blocks(q + 1, o)", 16, "`grid` is checked when sizes are bound"),
    "a list": (LISTS, "o", 16, None),
    "a list that is given": (LISTS, "o(d = good)", 16, None),
    "a list with a bad item": (LISTS, "o(d = bad)", 16, "`o.d` is 0, and must be at least 1"),
    "a default list with a bad item": (LISTS.replace("[1, 2]", "[1, 0]"), "o", 16, "`o.d` is 0"),
}


@pytest.mark.parametrize(("spec", "text", "n", "message"), WHERE_THEY_STAND.values(), ids=WHERE_THEY_STAND)
def test_requirements_hold_where_the_import_stands(spec: str, text: str, n: int, message: str | None) -> None:
    source = f"params: {{good: [2, 4], bad: [2, 0]}}\nimport:\n  o: {spec}\ndefine:\n  f: o\n  drop(R): q == k\n"

    def bind() -> None:
        patterndsl.parse(source + f"attend: {text}").bind(n, heads=2)

    if message is None:
        bind()
        return
    with pytest.raises(PatternError, match=re.escape(message)):
        bind()


def test_requirements_are_reported_once() -> None:
    text = "import: {o: {grid: {row: 3, col: 3}, attend: same(row)}}\ndefine: {f: o}\nattend: f | o | ~f"
    with pytest.raises(PatternError) as caught:
        patterndsl.parse(text).bind(8)
    assert [found.code for found in caught.value.diagnostics] == ["E404"]


def test_a_definition_that_is_only_checked_requires_nothing() -> None:
    """Its parameter has no value, so no minimum and no grid can be held against it."""
    text = (
        "import: {o: {params: {w: {default: 3, min: 1}}, grid: {row: w, col: N // w}, inputs: {t: 'int[w]'}, "
        "attend: 'same(row) & t[0] == 1'}}\ndefine: {f(a): o(w = a)}\nattend: f(3)"
    )
    (shape,) = patterndsl.parse(text).bind(9).inputs
    assert shape.length == 3
