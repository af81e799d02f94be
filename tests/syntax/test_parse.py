"""Does text become the tree that Python's precedence says, with places that point into the source?"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patterndsl.diagnostics import PatternError, Source
from patterndsl.syntax import tree as ast
from patterndsl.syntax.parse import parse_definitions, parse_expression, snippet_of
from patterndsl.syntax.render import render_expression
from tests.strategies import many


def tree(text: str) -> ast.Expr:
    return parse_expression(snippet_of(Source("test", text)))


def bracketed(expr: ast.Expr) -> str:
    """The tree with every operation in brackets."""
    match expr:
        case ast.Negative(operand=operand):
            return f"(-{bracketed(operand)})"
        case ast.Not(operand=operand):
            return f"(~{bracketed(operand)})"
        case ast.Binary(op=op, left=left, right=right):
            return f"({bracketed(left)} {op} {bracketed(right)})"
        case ast.Logic(op=op, terms=terms):
            return f"({f' {op} '.join(map(bracketed, terms))})"
        case ast.Comparison(ops=ops, operands=operands):
            parts = itertools.chain.from_iterable(zip(("", *ops), map(bracketed, operands), strict=True))
            return f"({' '.join(parts).strip()})"
        case ast.InRange(operand=operand, start=start, stop=stop):
            return f"({bracketed(operand)} in {bracketed(start)}..{bracketed(stop)})"
        case ast.InSet(operand=operand, items=items):
            return f"({bracketed(operand)} in {{{', '.join(map(bracketed, items))}}})"
        case ast.At(relation=relation, query=query, key=key, lengths=lengths):
            inside = [bracketed(query), bracketed(key), *(f"{part.name}={bracketed(part.value)}" for part in lengths)]
            return f"({bracketed(relation)} at ({', '.join(inside)}))"
        case ast.Subscript(name=name, index=index):
            return f"{name}[{bracketed(index)}]"
        case ast.Call(name=name, arguments=arguments):
            given = ((f"{item.name}=" if item.name else "") + bracketed(item.value) for item in arguments)
            return f"{name}({', '.join(given)})"
        case _:
            return render_expression(expr)


STRUCTURE = {
    # arithmetic
    "1 + 2 * 3": "(1 + (2 * 3))",
    "1 - 2 - 3": "((1 - 2) - 3)",
    "8 // 4 // 2": "((8 // 4) // 2)",
    "8 % 5 * 2": "((8 % 5) * 2)",
    "-q + k": "((-q) + k)",
    "-q // 2": "((-q) // 2)",
    "--q": "(-(-q))",
    "1 - -1": "(1 - (-1))",
    "-(q + 1)": "(-(q + 1))",
    "1_000 + 007": "(1000 + 7)",
    # comparisons
    "q < k": "(q < k)",
    "0 <= q - k < 4 != k": "(0 <= (q - k) < 4 != k)",
    "q + 1 in 0..k * 2": "((q + 1) in 0..(k * 2))",
    "q in {0, k - 1}": "(q in {0, (k - 1)})",
    "(q < k) - (k < 4)": "((q < k) - (k < 4))",
    # logic
    "a & b & c": "(a & b & c)",
    "a & (b & c)": "(a & b & c)",
    "(a | b) | c": "(a | b | c)",
    "a | b & c | d": "(a | (b & c) | d)",
    "a and b or c and not d": "((a & b) | (c & (~d)))",
    "~a & b": "((~a) & b)",
    "~q < k": "(~(q < k))",
    "not q < k and b": "((~(q < k)) & b)",
    "~~a": "(~(~a))",
    "q < 4 | k < 4 & causal": "((q < 4) | ((k < 4) & causal))",
    "q & k < 4": "(q & (k < 4))",
    "a - b & c": "((a - b) & c)",
    "a - b - c": "((a - b) - c)",
    "~a - b": "(~(a - b))",
    # at
    "R at (k, q)": "(R at (k, q))",
    "~R at (k, q) & S": "((~(R at (k, q))) & S)",
    "R at (k, q) at (q // 2, k)": "((R at (k, q)) at ((q // 2), k))",
    "a - b at (q, k)": "(a - (b at (q, k)))",
    "(a | b) at (q, k, N = N // 2)": "((a | b) at (q, k, N=(N // 2)))",
    "window(3) at (q, k, Nq = 1, Nk = 2)": "(window(3) at (q, k, Nq=1, Nk=2))",
    # names and calls
    "f()": "f()",
    "f(1, b = 2)": "f(1, b=2)",
    "f(a & b, c | d)": "f((a & b), (c | d))",
    "d[head % 2] + 1": "(d[(head % 2)] + 1)",
    "q.doc.start": "q.doc.start",
    "q . doc": "q.doc",
    "android & inner & attend & notes & order": "(android & inner & attend & notes & order)",
    # white space and comments
    " q<k#no space\n&k<4 # at all\r\n": "((q < k) & (k < 4))",
    "q\t<\n\n k": "(q < k)",
    "q<-k": "(q < (-k))",
    "q in -1..-k": "(q in (-1)..(-k))",
    "k in 1..2": "(k in 1..2)",
}


@pytest.mark.parametrize(("text", "expected"), STRUCTURE.items(), ids=STRUCTURE)
def test_structure(text: str, expected: str) -> None:
    assert bracketed(tree(text)) == expected


REFUSED = [
    "",
    "q <",
    "q < k <",
    "q in 0..4..8",
    "q in {}",
    "q in 0..4 in {1}",
    "f(1,)",
    "f(,1)",
    "f(a = )",
    "1 2",
    "q.doc.start.rank",
    "3.doc",
    "(q).doc",
    "f(1).doc",
    "f(1)[2]",
    "d[]",
    "d[1, 2]",
    "R at q, k",
    "R at (q)",
    "R at (q, k, 3)",
    "at (q, k)",
    "and a",
    "a or",
    "not",
    "in",
    "a in b",
    "1_",
    "_1x +",
    "0x10",
    "1e3",
    "q => k",
    "q =< k",
    "q === k",
    "a &| b",
    "λ",
    "'a'",
    "f(x) = x",
    "a; b",
    "{1, 2}",
    "[1]",
    "+1",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text: str) -> None:
    with pytest.raises(PatternError, match="E101"):
        tree(text)


# ---- precedence is Python's -------------------------------------------------------------------------------------

INTEGERS = st.sampled_from(["q", "k", "0", "1", "2", "3", "7"])
ARITHMETIC = st.sampled_from([" + ", " - ", " * ", " // ", " % "])
COMPARE = st.sampled_from([" < ", " <= ", " == ", " != ", " > ", " >= "])


@st.composite
def flat(draw: st.DrawFn) -> str:
    """Integers joined by operators, without any bracket."""

    def sum_() -> str:
        text = draw(st.sampled_from(["", "-"])) + draw(INTEGERS)
        for _ in range(draw(st.integers(0, 3))):
            text += draw(ARITHMETIC) + draw(st.sampled_from(["", "-"])) + draw(INTEGERS)
        return text

    def relation() -> str:
        return "".join(
            [
                draw(st.sampled_from(["", "not "])),
                sum_(),
                *(draw(COMPARE) + sum_() for _ in range(draw(st.integers(1, 2)))),
            ]
        )

    return relation() + "".join(
        draw(st.sampled_from([" and ", " or "])) + relation() for _ in range(draw(st.integers(0, 3)))
    )


@many(3)
@given(text=flat(), q=st.integers(-9, 9), k=st.integers(-9, 9))
def test_precedence_is_that_of_python(text: str, q: int, k: int) -> None:
    python = bracketed(tree(text)).replace("~", " not ").replace("&", "and").replace("|", "or")
    try:
        expected = eval(text, {"q": q, "k": k})
    except ZeroDivisionError:
        return
    assert eval(python, {"q": q, "k": k}) == expected


# ---- places -----------------------------------------------------------------------------------------------------

PLACES = [
    ("a & b | c", lambda e: e, "a & b | c"),
    ("a & b | c", lambda e: e.terms[0], "a & b"),
    ("  q - k < 4 ", lambda e: e, "q - k < 4"),
    ("q - k < 4", lambda e: e.operands[0], "q - k"),
    ("(q - k) < 4", lambda e: e.operands[0], "q - k"),
    ("f(1, b = k // 2)", lambda e: e.arguments[1].value, "k // 2"),
    ("f(1, b = k // 2)", lambda e: e.arguments[1], "b = k // 2"),
    ("~ R at (q, k)", lambda e: e.operand.relation, "R"),
    ("~ R at (q, k)", lambda e: e.operand, "R at (q, k)"),
    ("d[head % 2] < 3", lambda e: e.operands[0].index, "head % 2"),
    ("q.doc.start < 1", lambda e: e.operands[0], "q.doc.start"),
    ("- q < 1", lambda e: e.operands[0], "- q"),
    ("k in {0, q + 1}", lambda e: e.items[1], "q + 1"),
]


@pytest.mark.parametrize(("text", "part", "expected"), PLACES, ids=[f"{row[2]} of {row[0]}" for row in PLACES])
def test_place(text, part, expected):
    place = part(tree(text)).place
    assert text[place.start : place.stop] == expected


# ---- definitions ------------------------------------------------------------------------------------------------

DEFINITIONS = {
    "": [],
    "# nothing\n": [],
    "a = 1": ["a = 1"],
    "a = 1\nb(x) = x + a": ["a = 1", "b(x) = x + a"],
    "ring(w, R) = window(w)\n  - R\nb = ring(3,\n none)": ["ring(w, R) = window(w) - R", "b = ring(3, none)"],
    "a = q == k b = a": ["a = q == k", "b = a"],
}


@pytest.mark.parametrize(("text", "expected"), DEFINITIONS.items(), ids=range(len(DEFINITIONS)))
def test_definitions(text: str, expected: list[str]) -> None:
    found = parse_definitions(snippet_of(Source("test", text)))
    heads = [item.name + (f"({', '.join(item.params)})" if item.params else "") for item in found]
    assert [f"{head} = {render_expression(item.body)}" for head, item in zip(heads, found, strict=True)] == expected


@pytest.mark.parametrize(
    "text", ["a", "a =", "= 3", "a(1) = 3", "a() = 3", "a(x,) = 3", "a b = 3", "a = 1 =", "q.a = 1"]
)
def test_definitions_refused(text: str) -> None:
    with pytest.raises(PatternError, match="E101"):
        parse_definitions(snippet_of(Source("test", text)))


# ---- limits -----------------------------------------------------------------------------------------------------

LIMITS = {
    "99 brackets": "(" * 99 + "q" + ")" * 99,
    "99 negations": "~" * 99 + "a",
    "90 sums": "q" + " + k" * 90,
    "8,000 terms": " & ".join(["q < k"] * 8_000),
    "2^53": "k < 9007199254740992",
}


@pytest.mark.parametrize("text", LIMITS.values(), ids=LIMITS)
def test_within_the_limits(text: str) -> None:
    assert tree(render_expression(tree(text))) == tree(text)


BEYOND = {
    "101 brackets": "(" * 101 + "q" + ")" * 101,
    "101 negations": "~" * 101 + "a",
    "101 sums": "q" + " + k" * 101,
    "66,000 characters": " & ".join(["q < k"] * 10_000),
    "2^53 + 1": "k < 9007199254740993",
    "5,000 digits": "k < " + "9" * 5000,
}


@pytest.mark.parametrize(
    "text", [text + " " * 66_000 * (name[:2] == "66") for name, text in BEYOND.items()], ids=BEYOND
)
def test_beyond_the_limits(text: str) -> None:
    with pytest.raises(PatternError, match="E102"):
        tree(text)
