"""Is canonical text what one would write by hand, and the inverse of the parser?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl.diagnostics import Source
from patterndsl.syntax import tree as ast
from patterndsl.syntax.parse import parse_expression, snippet_of
from patterndsl.syntax.render import render_expression
from tests.strategies import many


def tree(text: str) -> ast.Expr:
    return parse_expression(snippet_of(Source("test", text)))


CANONICAL = {
    "q<k": "q < k",
    "((q)) < (k)": "q < k",
    "(q < k) & ((k < 4))": "q < k & k < 4",
    "(a & b) | c": "a & b | c",
    "a & (b | c)": "a & (b | c)",
    "a and (b and c)": "a & b & c",
    "a or b and not c": "a | b & ~c",
    "~(a & b)": "~(a & b)",
    "~(q < k)": "~q < k",
    "(~a) & b": "~a & b",
    "~(~a)": "~~a",
    "a - (b - c)": "a - (b - c)",
    "(a - b) - c": "a - b - c",
    "(a & b) - c": "(a & b) - c",
    "(q < k) - (k < 4)": "(q < k) - (k < 4)",
    "q - (k + 1)": "q - (k + 1)",
    "(q * k) // (2 * k)": "q * k // (2 * k)",
    "-(q)": "-q",
    "-(-q)": "--q",
    "-(q + k)": "-(q + k)",
    "2 * (-q)": "2 * -q",
    "(-q) % 3": "-q % 3",
    "-(q % 3)": "-(q % 3)",
    "(q + 1) in (0)..(4)": "q + 1 in 0..4",
    "q in { 0,1 }": "q in {0, 1}",
    "window ( 3 )": "window(3)",
    "random(3,seed=7)": "random(3, seed = 7)",
    "(R) at (k,q)": "R at (k, q)",
    "(a | b) at (q // 2, k // 2, N = N // 2)": "(a | b) at (q // 2, k // 2, N = N // 2)",
    "(R at (k, q)) at (q, k)": "R at (k, q) at (q, k)",
    "(q < k) at (k, q)": "(q < k) at (k, q)",
    "~(R at (k, q))": "~R at (k, q)",
    "(~R) at (k, q)": "(~R) at (k, q)",
    "d[ head ]": "d[head]",
    "q . doc . start": "q.doc.start",
    "007 < 1_000": "7 < 1000",
    "a # because\n & b": "a & b",
}


@pytest.mark.parametrize(("text", "expected"), CANONICAL.items(), ids=CANONICAL)
def test_canonical(text: str, expected: str) -> None:
    assert render_expression(tree(text)) == expected


# ---- any tree that the parser can build -------------------------------------------------------------------------

PLACE = snippet_of(Source("test", "x")).place(0, 1)
NAMES = st.sampled_from(["q", "k", "w", "causal", "R"])
OPS = st.sampled_from(["+", "-", "*", "//", "%"])
COMPARE = st.sampled_from(["<", "<=", "==", "!=", ">", ">="])


def combined(inner: st.SearchStrategy[ast.Expr]) -> st.SearchStrategy[ast.Expr]:
    arguments = st.lists(st.builds(ast.Argument, st.none() | NAMES, inner, place=st.just(PLACE)), max_size=3)
    logic = st.lists(inner, min_size=2, max_size=3)
    return st.one_of(
        st.builds(ast.Negative, inner, place=st.just(PLACE)),
        st.builds(ast.Not, inner, place=st.just(PLACE)),
        st.builds(ast.Binary, OPS, inner, inner, place=st.just(PLACE)),
        st.builds(ast.Subscript, NAMES, inner, place=st.just(PLACE)),
        st.builds(ast.Call, NAMES, arguments.map(tuple), place=st.just(PLACE)),
        st.builds(ast.InRange, inner, inner, inner, place=st.just(PLACE)),
        st.builds(ast.InSet, inner, st.lists(inner, min_size=1, max_size=3).map(tuple), place=st.just(PLACE)),
        st.builds(ast.At, inner, inner, inner, st.just(()), place=st.just(PLACE)),
        st.tuples(COMPARE, COMPARE, inner, inner, inner).map(
            lambda t: ast.Comparison((t[0], t[1]), (t[2], t[3], t[4]), place=PLACE)
        ),
        st.tuples(st.sampled_from("&|"), logic).map(lambda t: flat(t[0], t[1])),
    )


def flat(op: str, terms: list[ast.Expr]) -> ast.Logic:
    """The parser writes `a & (b & c)` as one row of terms."""
    joined = [
        part for term in terms for part in (term.terms if isinstance(term, ast.Logic) and term.op == op else (term,))
    ]
    return ast.Logic(op, tuple(joined), place=PLACE)


TREES: st.SearchStrategy[ast.Expr] = st.recursive(
    st.one_of(
        st.builds(ast.Number, st.integers(0, 2**53), place=st.just(PLACE)),
        st.builds(ast.Name, NAMES, place=st.just(PLACE)),
        st.builds(ast.Attribute, st.sampled_from("qk"), NAMES, st.sampled_from([None, "start"]), place=st.just(PLACE)),
    ),
    combined,
    max_leaves=12,
)


@many(6)
@given(TREES)
def test_the_inverse_of_the_parser(expr: ast.Expr) -> None:
    text = render_expression(expr)
    assert tree(text) == expr
    assert render_expression(tree(text)) == text


# ---- specs ------------------------------------------------------------------------------------------------------

SPECS = {
    "the bare expression": ("attend: ( causal )", "causal"),
    "name, doc and cite say nothing about the pattern": ("name: x\ndoc: y\ncite: z\nattend: causal", "causal"),
    "sections in one order": (
        "attend: f(w)\ndefine: {f(a): window(a)}\nparams: {w: 4}",
        "params:\n  w: 4\ndefine:\n  f(a): window(a)\nattend: f(w)\n",
    ),
    "parameters": (
        "params: {a: -4, b: isqrt(N), c: [1, 2 * 3], d: {default: N // 2, min: 1}, e: {min: 0}}\nattend: all",
        'params:\n  a: -4\n  b: "isqrt(N)"\n  c: [1, "2 * 3"]\n  d: {default: "N // 2", min: 1}\n'
        "  e: {min: 0}\nattend: all\n",
    ),
    "a grid": (
        'grid: {a: "N // 8", b: 8, ab: [a, b]}\nattend: all',
        "grid:\n  a: N // 8\n  b: 8\n  ab: [a, b]\nattend: all\n",
    ),
    "inputs": (
        'inputs: {a: "int[N]", b: " bool [ Nk ] ", c: "int[]", d: "int[2*4]"}\nattend: all',
        "inputs:\n  a: int[N]\n  b: bool[Nk]\n  c: int[]\n  d: int[2 * 4]\nattend: all\n",
    ),
    "an import in place": (
        "import: {a: {params: {w: 4}, attend: window(w)}}\nattend: a(w = 2)",
        "import:\n  a:\n    params:\n      w: 4\n    attend: window(w)\nattend: a(w = 2)\n",
    ),
    "definitions as text": (
        "define: |\n  f(a) = window(a)  # near\n  g = f(3)\nattend: g",
        "define:\n  f(a): window(a)\n  g: f(3)\nattend: g\n",
    ),
    "quotes where YAML needs them": (
        'define: {a: "~causal", b: "-3", c: "k in {q}"}\nattend: "~a & c"',
        'define:\n  a: "~causal"\n  b: -3\n  c: k in {q}\nattend: "~a & c"\n',
    ),
    "words that YAML takes for truth values": (
        'params: {"on": 1, "no": 2}\nattend: window(on, no)',
        'params:\n  "on": 1\n  "no": 2\nattend: window(on, no)\n',
    ),
}


@pytest.mark.parametrize(("text", "expected"), SPECS.values(), ids=SPECS)
def test_canonical_spec(text: str, expected: str) -> None:
    assert str(patterndsl.parse(text)) == expected
    assert str(patterndsl.parse(expected)) == expected


SAME = [
    ("causal & window(4)", "attend: causal and (window(4))"),
    ("attend: window(4)", "name: other\nattend: window( 4 )"),
    ("params: {w: 4}\nattend: window(w)", "params: {w: {default: 4, doc: half}}\nattend: window(w)"),
    ("define: {f: causal}\nattend: f", "define: |\n  f = causal\nattend: f"),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=range(len(SAME)))
def test_equal_patterns(one: str, other: str) -> None:
    assert patterndsl.parse(one) == patterndsl.parse(other)
    assert hash(patterndsl.parse(one)) == hash(patterndsl.parse(other))


@pytest.mark.parametrize(("one", "other"), [("causal", "k <= q"), ("window(4)", "window(5)")])
def test_unequal_patterns(one: str, other: str) -> None:
    assert patterndsl.parse(one) != patterndsl.parse(other)
    assert patterndsl.parse(one) != one
