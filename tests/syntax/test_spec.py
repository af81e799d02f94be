"""Does a YAML file become the spec that it says, with every expression at its place in the file?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import patterndsl
from patterndsl import PatternError
from patterndsl.diagnostics import Source
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression
from patterndsl.syntax.spec import read_file, read_yaml
from tests.strategies import many


def spec(text: str) -> ast.Spec:
    found, diagnostics = read_yaml(Source("test", text))
    assert not diagnostics
    return found


# ---- carets -----------------------------------------------------------------------------------------------------

STYLES = {
    "plain": "attend: {}\n",
    "plain behind a comment": "# what it is\n\nname: x   # the name\nattend: {}   # and this\n",
    "plain, indented": "define:\n    near(w):     {}\nattend: near(3)\n",
    "single quotes": "attend: '{}'\n",
    "double quotes": 'attend: "{}"\n',
    "escapes before": 'attend: "\\x63ausal \\x26 \\" {}"\n',
    "escaped white space before": 'attend: "causal\\t&\\n\\x20q < {}"\n',
    "flow mapping": 'params: {{w: 4, s: "{}"}}\nattend: window(w)\n',
    "flow sequence": 'params: {{w: [4, "{}"]}}\nattend: window(w[0])\n',
    "block": "attend: |\n  {}\n",
    "block with a header comment": "attend: |-  # why\n  {}\nname: x\n",
    "block with an indent": "attend: |2\n     {}\n",
    "folded": "attend: >\n  {}\n",
    "folded, kept": "attend: >+\n\n  {}\n\n",
    "definitions as text": "define: |\n  near = window(3)\n  far = {}\nattend: near\n",
    "an import in place": "import:\n  near:\n    attend: {}\nattend: near\n",
    "a minimum": "params:\n  w:\n    default: 3\n    min: {}\nattend: window(w)\n",
    "an input's size": "inputs:\n  doc: int[{}]\nattend: same(doc)\n",
    "a grid": "grid:\n  row: {}\n  col: 8\nattend: same(row)\n",
}
MANY_LINES = {
    "plain": "attend:\n  causal &\n  window(4)\n\n  & {}\nname: x\n",
    "single quotes": "attend: 'causal &\n  window(4)\n\n   & {}'\nname: x\n",
    "double quotes": 'attend: "causal &\n  window(4) \\\n   & {}"\n',
    "block": "attend: |\n  causal &\n    window(4)   # near\n\n  & {}\n",
    "folded": "attend: >\n  causal &\n    window(4)\n\n  & {}\n",
    "folded, stripped": "attend: >-\n   causal\n   & window(4) &\n\n\n   {} | first(2)\nname: x\n",
}


def place_of_error(text: str) -> tuple[int, int]:
    with pytest.raises(PatternError) as caught:
        patterndsl.parse(text)
    data = caught.value.diagnostics[0].to_dict()
    assert isinstance(data["line"], int)
    assert isinstance(data["column"], int)
    return data["line"], data["column"]


def place_of_sign(text: str, sign: str) -> tuple[int, int]:
    before = text[: text.index(sign)]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


@pytest.mark.parametrize("mistake", ["$", "4 $ 3", "(q - k) $"])
@pytest.mark.parametrize("form", STYLES.values(), ids=STYLES)
def test_the_caret_is_at_the_mistake(form: str, mistake: str) -> None:
    text = form.format(mistake)
    assert place_of_error(text) == (place_of_sign(text, "$") if '\\"' not in text else place_of_sign(text, '\\"'))


@pytest.mark.parametrize("form", MANY_LINES.values(), ids=MANY_LINES)
def test_the_caret_is_on_the_right_line(form: str) -> None:
    text = form.format("q < $")
    assert place_of_error(text) == place_of_sign(text, "$")


@pytest.mark.parametrize(
    ("form", "line_end"),
    [
        pytest.param(form, line_end, id=f"{name}-{line_end!r}")
        for name, form in MANY_LINES.items()
        for line_end in ("\n", "\r\n")
        if line_end == "\n" or "\\\n" not in form  # YAML escapes an end of one character
    ],
)
def test_the_caret_is_at_the_unknown_name(form: str, line_end: str) -> None:
    text = form.format("q < 4 | unheard_of(3)").replace("\n", line_end)
    assert place_of_error(text) == place_of_sign(text, "unheard_of")


@many(2)
@given(
    style=st.sampled_from(["", "|", ">", "'", '"']),
    words=st.lists(st.sampled_from(["causal &", "window(4) |", "q <", "k +", "(", "-"]), max_size=8),
    breaks=st.lists(st.sampled_from([" ", "\n", "\n\n", "   ", "\n  "]), min_size=8, max_size=8),
)
def test_the_caret_survives_folding(style: str, words: list[str], breaks: list[str]) -> None:
    """An unknown sign is the first mistake wherever it stands, and YAML folds what is before it."""
    value = "".join(word + gap for word, gap in zip(words, breaks, strict=False)) + "$ 4"
    indented = value.replace("\n", "\n  ")
    forms = {"": "attend: q <\n  {}\n", "|": "attend: |\n  {}\n", ">": "attend: >\n  {}\n"}
    text = forms.get(style, f"attend: {style}{{}}{style}\n").format(indented)
    assert place_of_error(text) == place_of_sign(text, "$")


# ---- values -----------------------------------------------------------------------------------------------------

VALUES = {
    "an integer": ("params: {w: 4}", "4"),
    "a negative": ("params: {w: -4}", "-4"),
    "an expression": ("params: {w: N // 2}", "N // 2"),
    "digits with underscores": ("params: {w: 1_000}", "1000"),
    "a leading zero": ("params: {w: 010}", "10"),
    "a default": ("params: {w: {default: 3, min: 1}}", "3"),
    "in quotes": ("params: {w: '3'}", "3"),
    "over lines": ("params:\n  w:\n    N //\n    2", "N // 2"),
}


@pytest.mark.parametrize(("text", "expected"), VALUES.values(), ids=VALUES)
def test_parameter(text: str, expected: str) -> None:
    default = spec(text + "\nattend: causal").params[0].default
    assert default is not None
    assert not isinstance(default, tuple)
    assert render_expression(default) == expected


INPUTS = {
    "int[N]": ("int", "N"),
    "bool[Nk]": ("bool", "Nk"),
    "int[]": ("int", None),
    "  int [ 8 ]  ": ("int", "8"),
    "int[2 * N + 1]": ("int", "2 * N + 1"),
    "int[max(1, N)]": ("int", "max(1, N)"),
    "bool[d[0]]": ("bool", "d[0]"),
}


@pytest.mark.parametrize(("kind", "expected"), INPUTS.items(), ids=INPUTS)
def test_input(kind: str, expected: tuple[str, str | None]) -> None:
    (declared,) = spec(f"inputs:\n  doc: '{kind}'\nattend: causal").inputs
    size = None if declared.size is None else render_expression(declared.size)
    assert (declared.dtype, size) == expected


REFUSED = {
    "Int[N]": "E304",
    "int": "E304",
    "int[N": "E304",
    "int[N] or so": "E304",
    "float[N]": "E304",
    "[N]": "E304",
    "int[N,]": "E101",
    "int[N][2]": "E101",
    "int[q.doc": "E304",
}


@pytest.mark.parametrize(("kind", "code"), REFUSED.items(), ids=REFUSED)
def test_input_refused(kind: str, code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse(f"inputs:\n  doc: '{kind}'\nattend: causal")


SIGNATURES = {
    "near": ("near", ()),
    "near(w)": ("near", ("w",)),
    "near( w ,R )": ("near", ("w", "R")),
    " near ": ("near", ()),
    "_n1(_)": ("_n1", ("_",)),
}


@pytest.mark.parametrize(("head", "expected"), SIGNATURES.items(), ids=SIGNATURES)
def test_definition_head(head: str, expected: tuple[str, tuple[str, ...]]) -> None:
    (found,) = spec(f'define: {{"{head}": causal}}\nattend: causal').define
    assert (found.name, found.params) == expected


@pytest.mark.parametrize(
    "head", ["near()", "near(w", "near w", "2near", "near(2)", "near(w,)", "near(w)(v)", "a-b", ""]
)
def test_definition_head_refused(head: str) -> None:
    with pytest.raises(PatternError, match="E304"):
        patterndsl.parse(f'define: {{"{head}": causal}}\nattend: causal')


# ---- files ------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"\xef\xbb\xbfattend: causal & $\n")
    _, (found,) = read_file(path)
    assert found.where is not None
    assert found.where.source.line_and_column(found.where.start) == (1, 18)


def test_imports_are_relative_to_the_importing_file(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.yaml").write_text("attend: window(3)")
    (tmp_path / "inner" / "a.yaml").write_text("import: {b: b.yaml}\nattend: b")
    (tmp_path / "top.yaml").write_text("import: {a: inner/a.yaml, b: ./inner/../inner/b.yaml}\nattend: a | b")
    assert patterndsl.load(tmp_path / "top.yaml").bind(9).relation == patterndsl.parse("window(3)").bind(9).relation


def test_two_imports_of_one_file_are_no_cycle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("attend: window(3)")
    (tmp_path / "b.yaml").write_text("import: {a: a.yaml}\nattend: a")
    (tmp_path / "c.yaml").write_text("import: {a: a.yaml, b: b.yaml}\nattend: a | b")
    patterndsl.load(tmp_path / "c.yaml")


def test_a_spec_in_one_brace() -> None:
    assert str(patterndsl.parse("{params: {w: 4}, attend: window(w)}")) == "params:\n  w: 4\nattend: window(w)\n"


@pytest.mark.parametrize("text", ["causal", "k in 0..4 # a: b", "causal\n& all # attend: none\n", "k in\n{0, 1}"])
def test_an_expression_is_no_spec(text: str) -> None:
    assert "attend" not in str(patterndsl.parse(text))


@pytest.mark.parametrize(
    "text", ["attend:\n  causal", "# x\n\n'attend': causal", "  attend: causal", "name: x\nattend : causal"]
)
def test_a_spec_is_no_expression(text: str) -> None:
    assert str(patterndsl.parse(text)) == "causal"


@pytest.mark.parametrize("name", ["a.yaml", "<expression>", "über\x1b[31m.yaml"])
def test_the_name_of_the_text_is_shown(name: str) -> None:
    with pytest.raises(PatternError) as caught:
        patterndsl.parse("windw(3)", name=name)
    assert f"--> {name.replace(chr(27), chr(0xFFFD))}:1:1" in str(caught.value)
