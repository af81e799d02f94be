"""How does a picture become a PNG or an SVG file? One scene of boxes, lines and words, and a painter for each.

Everything lies on whole pixels. Owner of Pillow, which only the PNG painter needs.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeAlias
from xml.sax.saxutils import escape

from patterndsl.sema.parameters import Sizes
from patterndsl.show.axis import ticks
from patterndsl.show.cells import Caption, Cells, figures, fitting_cell
from patterndsl.show.palette import DARK, LIGHT, Tone, fills
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

PNG_CELLS, SVG_CELLS = 512, 256
"""Cells along the longer side, at most."""
PLOT = 1080
LEFT, RIGHT, TOP, BOTTOM = 104, 60, 36, 36
LINE = 28
TICK = 7
GRID_FROM = 10
"""Cells of so many pixels are set apart by a line."""

Anchor: TypeAlias = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Look:
    """How the states of cells are painted and named, those of state 0 as empty, and the figures under the title."""

    states: tuple[tuple[int, Tone, str], ...]
    figures: str


def kept(cells: Cells) -> Look:
    """The look of a pattern."""
    named: tuple[tuple[int, Tone, str], ...] = ((FULL, "full", "full"), (PARTIAL, "partial", "partial"))
    return Look(((FULL, "full", "kept"),) if cells.is_single else named, figures(cells))


@dataclass(frozen=True, slots=True)
class Words:
    """A line of text: its baseline's place, and how it hangs there."""

    x: int
    y: int
    text: str
    size: int
    tone: Tone
    anchor: Anchor = "start"


@dataclass(frozen=True, slots=True)
class Rect:
    """A filled rectangle in pixels."""

    x: int
    y: int
    width: int
    height: int
    tone: Tone


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """Everything on the picture: cells of `pixel` pixels from (left, top) on, and what stands around them."""

    width: int
    height: int
    left: int
    top: int
    pixel: int
    cells: Cells
    look: Look
    words: tuple[Words, ...]
    rects: tuple[Rect, ...]


def image_cell(sizes: Sizes, max_cells: int) -> int:
    """The least power of two whose cells fit the picture."""
    return fitting_cell(sizes, max_cells, max_cells)


def png(cells: Cells, words: Caption, look: Look | None = None) -> bytes:
    """The picture as a PNG file, of a pattern where no other look is given."""
    return _painted_png(scene(cells, words, look))


def svg(cells: Cells, words: Caption, look: Look | None = None) -> bytes:
    """The picture as an SVG file, which follows the reader's light or dark theme."""
    return _painted_svg(scene(cells, words, look)).encode()


# ---- the scene ------------------------------------------------------------------------------------------------


def scene(cells: Cells, words: Caption, look: Look | None = None) -> Scene:
    """Where everything goes."""
    look = look or kept(cells)
    num_rows, num_columns = cells.states.shape
    pixel = max(1, PLOT // max(1, num_rows, num_columns))
    plot_width, plot_height = num_columns * pixel, num_rows * pixel
    width = LEFT + max(plot_width, PLOT // 2) + RIGHT
    texts: list[Words] = []
    y = TOP + 22
    for line in textwrap.wrap(words.title, (width - LEFT - RIGHT) // 11, max_lines=3, placeholder=" …") or [""]:
        texts.append(Words(LEFT, y, line, 22, "text"))
        y += LINE + 2
    for line in textwrap.wrap(f"{words.view} · {look.figures}", (width - LEFT - RIGHT) // 8):
        texts.append(Words(LEFT, y, line, 16, "muted"))
        y += LINE - 4
    top = y + 26
    rects = [Rect(LEFT - 1, top - 1, plot_width + 2, plot_height + 2, "frame")]
    rects.append(Rect(LEFT, top, plot_width, plot_height, "empty"))
    for along_q, length in ((False, cells.sizes.kv_len), (True, cells.sizes.q_len)):
        axis_words, axis_rects = _axis(cells, along_q, length, pixel, top)
        texts += axis_words
        rects += axis_rects
    y = top + plot_height + 40
    legend_words, legend_rects = _legend(look, y)
    return Scene(
        width,
        y + BOTTOM,
        LEFT,
        top,
        pixel,
        cells,
        look,
        (*texts, *legend_words),
        (*rects, *legend_rects),
    )


def _axis(cells: Cells, along_q: bool, length: int, pixel: int, top: int) -> tuple[list[Words], list[Rect]]:
    """Ticks and numbers: keys along the upper edge, queries down the left one."""
    cell = cells.q_cell if along_q else cells.kv_cell
    label_pixels = 44 if along_q else 30 + 11 * len(str(length))
    first = cells.sizes.q_start if along_q else 0
    texts: list[Words] = []
    rects: list[Rect] = []
    # a single position is a cell with a middle; a block of positions is named by where it starts
    shift = pixel // 2 if cells.is_single and pixel >= GRID_FROM else 0
    places = [(position, position // cell * pixel + shift) for position in ticks(length, cell, label_pixels / pixel)]
    if length and not shift:
        edge = -(-length // cell) * pixel
        places = [place for place in places if place[0] == 0 or edge - place[1] >= label_pixels] + [(length, edge)]
    for position, at in places:
        if along_q:
            texts.append(Words(LEFT - TICK - 7, top + at + 6, f"{first + position}", 16, "muted", "end"))
            rects.append(Rect(LEFT - 1 - TICK, top + at, TICK, 1, "frame"))
        else:
            texts.append(Words(LEFT + at, top - TICK - 8, f"{position}", 16, "muted", "middle"))
            rects.append(Rect(LEFT + at, top - 1 - TICK, 1, TICK, "frame"))
    if along_q:
        texts.append(Words(16, top + 6, "q", 18, "text"))
    else:
        texts.append(Words(LEFT - 36, top - TICK - 8, "k", 18, "text", "middle"))
    return texts, rects


def _legend(look: Look, y: int) -> tuple[list[Words], list[Rect]]:
    names = [(tone, name) for _, tone, name in look.states]
    texts: list[Words] = []
    rects: list[Rect] = []
    x = LEFT
    for tone, name in (*names, ("empty", "empty")):
        rects += [Rect(x, y - 14, 16, 16, "frame"), Rect(x + 1, y - 13, 14, 14, tone)]
        texts.append(Words(x + 25, y, name, 16, "text"))
        x += 25 + 9 * len(name) + 34
    texts.append(Words(x, y, "queries q down, keys k across", 16, "muted"))
    return texts, rects


# ---- PNG --------------------------------------------------------------------------------------------------------


def _painted_png(scene: Scene) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (scene.width, scene.height), LIGHT["page"])
    draw = ImageDraw.Draw(image)
    draw_rects(draw, scene.rects)
    states, pixel = scene.cells.states, scene.pixel
    if states.size:
        tones: dict[int, Tone] = {state: tone for state, tone, _ in scene.look.states}
        colors = [LIGHT[tones.get(state, "empty")] for state in range(max(tones) + 1)]  # EMPTY is 0
        plot = Image.fromarray(states)
        plot.putpalette([channel for color in colors for channel in bytes.fromhex(color[1:])])
        size = (states.shape[1] * pixel, states.shape[0] * pixel)
        image.paste(plot.resize(size, Image.Resampling.NEAREST).convert("RGB"), (scene.left, scene.top))
    draw_rects(draw, _grid(scene))
    draw_words(draw, scene.words)
    return png_bytes(image)


def draw_rects(draw: ImageDraw.ImageDraw, rects: Iterable[Rect]) -> None:
    """The rectangles that have an area."""
    for rect in rects:
        if rect.width and rect.height:
            box = (rect.x, rect.y, rect.x + rect.width - 1, rect.y + rect.height - 1)
            draw.rectangle(box, fill=LIGHT[rect.tone])


def draw_words(draw: ImageDraw.ImageDraw, texts: Iterable[Words]) -> None:
    """Text in Pillow's own font."""
    from PIL import ImageFont

    anchors = {"start": "ls", "middle": "ms", "end": "rs"}
    for words in texts:
        font = ImageFont.load_default(words.size)
        text = words.text.replace("×", "x")  # which Pillow's own font has not
        draw.text((words.x, words.y), text, fill=LIGHT[words.tone], font=font, anchor=anchors[words.anchor])


def png_bytes(image: Image.Image) -> bytes:
    """A small file."""
    from PIL import Image

    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _grid(scene: Scene) -> list[Rect]:
    """Lines between cells that are large enough to be told apart."""
    if scene.pixel < GRID_FROM:
        return []
    num_rows, num_columns = scene.cells.states.shape
    width, height = num_columns * scene.pixel, num_rows * scene.pixel
    across = [Rect(scene.left, scene.top + at * scene.pixel, width, 1, "page") for at in range(1, num_rows)]
    down = [Rect(scene.left + at * scene.pixel, scene.top, 1, height, "page") for at in range(1, num_columns)]
    return across + down


# ---- SVG --------------------------------------------------------------------------------------------------------


def _painted_svg(scene: Scene) -> str:
    parts = [*svg_start(scene.width, scene.height, scene.words[0].text), *map(rect_svg, scene.rects)]
    parts.append(f'<g transform="translate({scene.left} {scene.top}) scale({scene.pixel})">')
    for state, tone, _ in sorted(scene.look.states):
        outlines = "".join(f"M{x} {y}h{w}v{h}h-{w}z" for x, y, w, h in merged_runs(scene.cells, state))
        if outlines:
            parts.append(f'<path class="{tone}" d="{outlines}"/>')
    parts.append("</g>")
    lines = "".join(_outline(rect) for rect in _grid(scene))
    if lines:
        parts.append(f'<path class="page" d="{lines}"/>')
    return "\n".join([*parts, *map(words_svg, scene.words), "</svg>"]) + "\n"


def svg_start(width: int, height: int, title: str) -> tuple[str, ...]:
    """The first lines of a file that follows the reader's theme, with an empty page."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" shape-rendering="crispEdges" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f"<style>{fills(LIGHT)} @media (prefers-color-scheme: dark) {{ {fills(DARK)} }}</style>",
        f'<path class="page" d="M0 0h{width}v{height}H0z"/>',
    )


def rect_svg(rect: Rect) -> str:
    """A line of the file."""
    return f'<path class="{rect.tone}" d="{_outline(rect)}"/>'


def words_svg(words: Words) -> str:
    """A line of the file."""
    place = f'x="{words.x}" y="{words.y}" font-size="{words.size}"'
    anchor = f' text-anchor="{words.anchor}"' if words.anchor != "start" else ""
    return f'<text class="{words.tone}" {place}{anchor}>{escape(words.text)}</text>'


def _outline(rect: Rect) -> str:
    return f"M{rect.x} {rect.y}h{rect.width}v{rect.height}h-{rect.width}z"


def merged_runs(cells: Cells, state: int) -> list[tuple[int, int, int, int]]:
    """The cells of one state as (column, row, width, height): runs of a row, joined with equal runs below."""
    done: list[tuple[int, int, int, int]] = []
    growing: dict[tuple[int, int], int] = {}  # (column, width) of a run -> the row where it began
    for row, states in enumerate([*cells.states.tolist(), []]):
        runs = {}
        column = 0
        for value, run in groupby(states):
            width = len(list(run))
            if value == state:
                runs[column, width] = growing.pop((column, width), row)
            column += width
        done += [(at, began, width, row - began) for (at, width), began in growing.items()]
        growing = runs
    return done


assert EMPTY == 0, "the PNG palette and the runs count on it"
