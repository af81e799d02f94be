"""How does a picture look in a terminal? Half blocks in two tones, or shades and plain letters where it must be.

A character is about twice as high as wide. Three ways to keep cells square follow from that: two rows of cells in
one character (half blocks), two characters per cell, or cells of twice as many queries as keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from patterndsl.diagnostics import error
from patterndsl.sema.parameters import Sizes
from patterndsl.show.axis import ticks
from patterndsl.show.cells import Caption, Cells, figures, fitting_cell
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL

MAX_LINES = 64
MIN_COLUMNS = 16

Shape: TypeAlias = Literal["half", "wide", "tall"]


@dataclass(frozen=True, slots=True)
class Terminal:
    """What the output can show."""

    width: int = 80
    color: bool = False
    unicode: bool = True


@dataclass(frozen=True, slots=True)
class Layout:
    """How cells become characters: half (two rows in one), wide (a cell in two), tall (a cell of 2c x c in one)."""

    shape: Shape
    q_cell: int
    kv_cell: int

    @property
    def rows_per_line(self) -> int:
        return 2 if self.shape == "half" else 1

    @property
    def chars_per_column(self) -> int:
        return 2 if self.shape == "wide" else 1


def layout(sizes: Sizes, terminal: Terminal, cell: int | None = None) -> Layout:
    """The finest layout that fits the terminal, or the one with the cell that was asked for.

    Raises PatternError (E701) where cells of that size do not fit.
    """
    room = max(MIN_COLUMNS, terminal.width - _gutter(sizes) - 2)
    if cell is not None:
        return _layout_of(sizes, terminal, cell, room)
    cell = fitting_cell(sizes, 2 * MAX_LINES, room)
    if terminal.unicode and (terminal.color or cell == 1):
        return Layout("half", cell, cell)
    wide = fitting_cell(sizes, MAX_LINES, room // 2)
    if wide == 1:
        return Layout("wide", 1, 1)
    return Layout("tall", 2 * cell, cell)


def _layout_of(sizes: Sizes, terminal: Terminal, cell: int, room: int) -> Layout:
    half = terminal.unicode and (terminal.color or cell == 1)
    needed = -(-sizes.kv_len // cell) * (1 if half else 2)
    if needed > room:
        help = "take larger cells, a wider terminal, or a file: -o picture.png"
        raise error("E701", f"cells of {cell} need {needed:,} columns; there are {room}", None, help)
    return Layout("half" if half else "wide", cell, cell)


def draw(cells: Cells, shape: Shape, words: Caption, terminal: Terminal) -> str:
    """The picture as lines of text: title, axes, cells, legend and figures."""
    plan = Layout(shape, cells.q_cell, cells.kv_cell)
    words_width = min(terminal.width, 120)
    lines = [*_wrapped(words.title, words_width, 2), ""]
    if cells.states.size:
        lines += [*_top(cells, plan, terminal), *_body(cells, plan, terminal), *_bottom(cells, plan, terminal), ""]
    else:
        lines += ["(no positions)", ""]
    pad = " " * (_gutter(cells.sizes) + 1)
    lines.append(pad + _legend(cells, plan, terminal))
    lines += _wrapped(f"{words.view} · {figures(cells)}", words_width, 4)
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    return text if terminal.unicode else _plain(text)


def _plain(text: str) -> str:
    """The words between the cells, for a terminal that shows ASCII only."""
    for sign, plain in (("×", "x"), ("·", "|"), ("…", "...")):
        text = text.replace(sign, plain)
    return text.encode("ascii", "replace").decode("ascii")


def _wrapped(text: str, width: int, max_lines: int) -> list[str]:
    return textwrap.wrap(text, width, max_lines=max_lines, placeholder=" ...", subsequent_indent="  ") or [""]


# ---- axes ---------------------------------------------------------------------------------------------------


def _gutter(sizes: Sizes) -> int:
    """Columns left of the frame: the widest query position and a space before it."""
    return max(len(str(sizes.q_start + max(0, sizes.q_len - 1))), 3) + 1


def _frame(terminal: Terminal) -> dict[str, str]:
    if terminal.unicode:
        return {"h": "─", "v": "│", "tl": "┌", "tr": "┐", "bl": "└", "br": "┘", "up": "┴", "left": "┤"}
    return {"h": "-", "v": "|", "tl": "+", "tr": "+", "bl": "+", "br": "+", "up": "+", "left": "+"}


def _top(cells: Cells, plan: Layout, terminal: Terminal) -> Iterator[str]:
    """Key positions, and the frame with a tick under each."""
    frame, pad = _frame(terminal), " " * _gutter(cells.sizes)
    width = cells.states.shape[1] * plan.chars_per_column
    gap = (len(str(cells.sizes.kv_len)) + 3) / plan.chars_per_column
    marks = ticks(cells.sizes.kv_len, cells.kv_cell, max(gap, cells.states.shape[1] / 8))
    labels, border = [" "] * (width + 8), [frame["h"]] * width
    for position in marks:
        at = position // cells.kv_cell * plan.chars_per_column
        border[at] = frame["up"]
        labels[at : at + len(str(position))] = str(position)
    yield f"{pad[:-2]}k {' '}{''.join(labels).rstrip()}"
    yield f"{pad[:-2]}q {frame['tl']}{''.join(border)}{frame['tr']}"


def _bottom(cells: Cells, plan: Layout, terminal: Terminal) -> Iterator[str]:
    frame, pad = _frame(terminal), " " * _gutter(cells.sizes)
    yield f"{pad}{frame['bl']}{frame['h'] * (cells.states.shape[1] * plan.chars_per_column)}{frame['br']}"


def _body(cells: Cells, plan: Layout, terminal: Terminal) -> Iterator[str]:
    frame, gutter = _frame(terminal), _gutter(cells.sizes)
    num_rows = cells.states.shape[0]
    marks = {
        position // cells.q_cell // plan.rows_per_line: position
        for position in ticks(cells.sizes.q_len, cells.q_cell, max(4 * plan.rows_per_line, num_rows / 8))
    }
    for line, row in enumerate(range(0, num_rows, plan.rows_per_line)):
        label = str(cells.sizes.q_start + marks[line]) if line in marks else ""
        edge = frame["left"] if line in marks else frame["v"]
        upper = cells.states[row].tolist()
        lower = cells.states[row + 1].tolist() if plan.rows_per_line == 2 and row + 1 < num_rows else None
        yield f"{label:>{gutter - 1}} {edge}{_cells_line(upper, lower, plan, terminal)}{frame['v']}"


# ---- cells --------------------------------------------------------------------------------------------------

_TONES = {PARTIAL: "38;5;67", FULL: "38;5;33"}
_BACKS = {PARTIAL: "48;5;67", FULL: "48;5;33"}
_SHADES = {EMPTY: " ", PARTIAL: "▒", FULL: "█"}
_HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_LETTERS = {EMPTY: ".", PARTIAL: "+", FULL: "#"}


def _cells_line(upper: list[int], lower: list[int] | None, plan: Layout, terminal: Terminal) -> str:
    if plan.shape != "half":
        signs = _SHADES if terminal.unicode else _LETTERS
        return "".join(signs[state] * plan.chars_per_column for state in upper)
    pairs = list(zip(upper, lower if lower is not None else [EMPTY] * len(upper), strict=True))
    if not terminal.color:
        return "".join(_HALVES[bool(up), bool(low)] for up, low in pairs)
    return "".join(_half_blocks(up, low, len(list(run))) for (up, low), run in groupby(pairs))


def _half_blocks(up: int, low: int, count: int) -> str:
    """A run of characters that show one cell above another, in colour."""
    if up == low:
        return " " * count if up == EMPTY else _painted("█" * count, _TONES[up])
    if up == EMPTY:
        return _painted("▄" * count, _TONES[low])
    if low == EMPTY:
        return _painted("▀" * count, _TONES[up])
    return _painted("▀" * count, f"{_TONES[up]};{_BACKS[low]}")


def _painted(text: str, ansi: str) -> str:
    return f"\x1b[{ansi}m{text}\x1b[0m"


def _legend(cells: Cells, plan: Layout, terminal: Terminal) -> str:
    names = {FULL: "kept"} if cells.is_single else {FULL: "full", PARTIAL: "partial"}
    if not terminal.unicode:
        shown = [f"{_LETTERS[state]} {name}" for state, name in names.items()] + [". empty"]
    elif terminal.color:
        shown = [f"{_painted('█', _TONES[state])} {name}" for state, name in names.items()]
    else:
        shown = [f"{_SHADES[state]} {name}" for state, name in names.items()]
    return "   ".join(shown)
