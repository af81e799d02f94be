"""Whatever is written, the answer is a pattern or a message: never another exception, and never silence about where.

Examples with characters deleted, inserted, doubled and exchanged, cut off, with control characters, and plain noise.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import patterndsl
from patterndsl import Pattern, PatternError
from patterndsl.diagnostics import CODES, MAX_ERRORS
from tests.strategies import many

HERE = Path(__file__).parent
SPECS = [path.read_text() for path in sorted((HERE.parents[1] / "examples").glob("*.yaml"))]
SPECS += [path.read_text() for path in sorted((HERE / "specs").glob("*.yaml"))]
EXPRESSIONS = [line for path in sorted((HERE / "expressions").glob("*.pat")) for line in path.read_text().splitlines()]
EXPRESSIONS += [
    "causal & (window(256) | strided(128))",
    "blocks(64, window(1) | global(1) | random(3, seed = 7))",
    "0 <= q - k < 4 & k in {0, 1} | q // 8 - k // 8 in 0..2",
    "transpose(window(3, 1)) at (q % 8, k % 8, N = 8) - first(2)",
]
SIGNS = [*string.printable, "&&", "==", "..", "//", " at (", "~", "\r\n", "\x00", "\ufeff", "\u2028", "ö", "\U0001f642"]
SIGNS += [
    "\x85",
    "\ud800",
    "\x1b[31m",
    "---\n",
    "&a ",
    "*a",
    "!!bool ",
    "%",
    "\t",
    ": ",
    "# ",
    "? ",
    "- ",
    "<<: ",
    "'",
    '"',
]
WORDS = [
    "q",
    "k",
    "N",
    "head",
    "window(",
    "random(",
    "same(",
    "d[",
    "params:",
    "attend: ",
    "define:\n",
    "import: {a: b}",
]


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any], texts: list[str]) -> str:
    """One of the texts after one to six accidents."""
    text: str = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(text)))
        stop = min(len(text), at + draw(st.sampled_from((0, 1, 1, 2, 5, 40))))
        match draw(st.sampled_from(("insert", "replace", "delete", "double", "exchange", "cut", "line ends"))):
            case "insert" | "replace" as accident:
                sign = draw(st.one_of(st.sampled_from(SIGNS + WORDS), st.characters()))
                text = text[:at] + sign + text[at if accident == "insert" else stop :]
            case "delete":
                text = text[:at] + text[stop:]
            case "double":
                text = text[:stop] + text[at:]
            case "exchange":
                text = text[: at - 1] + text[at : at + 1] + text[at - 1 : at] + text[at + 1 :] if at else text
            case "cut":
                text = text[:at]
            case "line ends":
                text = text.replace("\n", "\r\n")
    return text


def read(call: Callable[[], Pattern]) -> None:
    """Reads and binds; whatever is refused is refused in order."""
    try:
        pattern = call()
        pattern.bind(24, heads=3)
    except PatternError as failed:
        check(failed)
    else:
        assert patterndsl.parse(str(pattern)) == pattern


def check(failed: PatternError) -> None:
    """A message has a code, words, a place within its text, and can be printed."""
    assert 1 <= len(failed.diagnostics) <= MAX_ERRORS
    assert len({(found.code, found.message, found.where) for found in failed.diagnostics}) == len(failed.diagnostics)
    str(failed).encode()
    for found in failed.diagnostics:
        assert found.code in CODES
        assert found.message
        found.to_dict()
        if found.where is not None:
            assert 0 <= found.where.start <= found.where.stop <= len(found.where.source.text) + 1
            line, column = found.where.source.line_and_column(found.where.start)
            assert 1 <= column <= len(found.where.source.text.split("\n")[line - 1]) + 2, "the caret is on its line"


@many(6)
@given(damaged(SPECS))
def test_a_damaged_spec(text: str) -> None:
    read(lambda: patterndsl.parse(text))


@many(6)
@given(damaged(EXPRESSIONS))
def test_a_damaged_expression(text: str) -> None:
    read(lambda: patterndsl.parse(text))


@many(2)
@given(st.text(max_size=60))
@example("")
@example("#")
@example("\ufeff")
def test_noise(text: str) -> None:
    read(lambda: patterndsl.parse(text))


@many(3)
@given(st.lists(st.sampled_from([*SIGNS, *WORDS]), max_size=30).map("".join))
def test_pieces_of_the_language(text: str) -> None:
    read(lambda: patterndsl.parse(text))


@many(2)
@given(st.one_of(st.binary(max_size=80), damaged(SPECS).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"\xef\xbb\xbfattend: causal")
@example("attend: causal".encode("utf-16"))
def test_a_file_of_any_bytes(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_bytes(data)
        read(lambda: patterndsl.load(path))


NAMES = st.text(alphabet="abqkN_1 é", max_size=4)
VALUES = st.one_of(st.integers(), st.text(max_size=6), st.lists(st.integers(-3, 9), max_size=3), st.booleans())


@many(1)
@given(params=st.dictionaries(NAMES, VALUES, max_size=2), grid=st.dictionaries(NAMES, VALUES, max_size=2))
def test_arguments_of_any_value(params: dict[str, Any], grid: dict[str, Any]) -> None:
    read(lambda: patterndsl.parse("window(a) & same(b)", params=params, grid=grid))


@many(1)
@given(inputs=st.dictionaries(NAMES, st.one_of(st.text(max_size=8), st.sampled_from(["int[N]", "bool[]"])), max_size=2))
def test_input_types_of_any_text(inputs: dict[str, str]) -> None:
    read(lambda: patterndsl.parse("same(a) & causal", inputs=inputs))


@pytest.mark.parametrize("text", SPECS, ids=range(len(SPECS)))
def test_windows_line_ends_change_no_message(text: str) -> None:
    def outcome(text: str) -> list[tuple[object, ...]] | str:
        try:
            return str(patterndsl.parse(text))
        except PatternError as failed:
            found = [one.to_dict() for one in failed.diagnostics]
            return [(d["code"], d["message"], d.get("line", 0), d.get("column", 0)) for d in found]

    assert outcome(text.replace("\n", "\r\n")) == outcome(text)
