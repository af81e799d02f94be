"""Is a terminal picture right to the letter, within its width, in every kind of terminal?"""

import re

import pytest

import patterndsl
from patterndsl.diagnostics import PatternError
from patterndsl.lower.lookup import Lookup
from patterndsl.show.cells import caption, find_cells
from patterndsl.show.terminal import Terminal, draw, layout

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def picture(text: str, terminal: Terminal, cell: int | None = None, **sizes: int) -> str:
    bound = patterndsl.parse(text).bind(**sizes)
    plan = layout(bound.sizes, terminal, cell)
    cells = find_cells(bound.groups[0].relation, bound.sizes, Lookup(), plan.q_cell, plan.kv_cell)
    return draw(cells, plan.shape, caption(None, text, bound, bound.groups[0], None), terminal)


def test_half_blocks() -> None:
    expected = """\
causal & (window(2) | strided(6))

  k  0       8
  q ┌┴───────┴───────┐
  0 ┤█▄              │
    │▀██▄            │
    │  ▀██▄          │
    │▀▄  ▀██▄        │
  8 ┤  ▀▄  ▀██▄      │
    │    ▀▄  ▀██▄    │
    │▀▄    ▀▄  ▀██▄  │
    │  ▀▄    ▀▄  ▀██▄│
    └────────────────┘

     █ kept
N 16 · 59 of 256 pairs kept (23.0 %)
"""
    assert picture("causal & (window(2) | strided(6))", Terminal(), n=16) == expected


def test_ascii() -> None:
    expected = """\
window(1) | global(1)

  k  0       4       8
  q ++-------+-------+---+
  0 +####################|
    |######..............|
    |########............|
    |##..######..........|
  4 +##....######........|
    |##......######......|
    |##........######....|
    |##..........######..|
  8 +##............######|
    |##..............####|
    +--------------------+

     # kept   . empty
N 10 | 44 of 100 pairs kept (44.0 %)
"""
    assert picture("window(1) | global(1)", Terminal(unicode=False), n=10) == expected


def test_colours_show_two_rows_of_three_tones_in_a_character() -> None:
    text = picture("causal", Terminal(color=True), cell=2, n=8)
    body = [line for line in text.splitlines() if "│" in line or "┤" in line]
    full, partial, back = "38;5;33", "38;5;67", "48;5;33"
    assert len(body) == 2
    # cells: P... over FP.., then FFP. over FFFP
    assert f"\x1b[{partial};{back}m▀\x1b[0m" in body[0]
    assert f"\x1b[{partial}m▄\x1b[0m" in body[0]
    assert f"\x1b[{full}m██\x1b[0m" in body[1]
    assert ANSI.sub("", body[0]).endswith("┤▀▄  │")


def test_without_colours_cells_are_tall_where_they_can_be_partial() -> None:
    text = picture("causal", Terminal(), n=256)
    assert "cells of 8×4" in text
    assert "▒" in text


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("sizes", [{"n": 256}, {"n": 1000}, {"n": 1 << 20}, {"q_len": 3, "kv_len": 5000}], ids=str)
def test_fits(sizes: dict[str, int], width: int, unicode: bool, color: bool) -> None:
    text = ANSI.sub("", picture("causal & window(99)", Terminal(width, color, unicode), **sizes))
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) <= 72
    assert unicode or text.isascii()


def test_a_title_that_is_too_long_is_cut() -> None:
    long = " | ".join(f"block({number})" for number in range(1, 60))
    assert len(picture(long, Terminal(), n=8).split("\n\n")[0].splitlines()) == 2


def test_later_queries_are_labelled_by_their_position() -> None:
    text = picture("causal", Terminal(), n=100, q_len=4, q_start=96)
    assert re.search(r"^ *96 ┤", text, re.MULTILINE)


def test_nothing_to_draw() -> None:
    assert "(no positions)" in picture("causal", Terminal(), n=0)


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PatternError, match=r"cells of 1 need 4,096 columns"):
        picture("causal", Terminal(), cell=1, n=4096)
