"""How does a comparison become a picture? Bars on a logarithmic axis: how many times as long each rival takes.

Where all stand on one line, 1, is the one that they are compared with. The painters are those of `show.image`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patterndsl.show.image import Rect, Words, draw_rects, draw_words, png_bytes, rect_svg, svg_start, words_svg
from patterndsl.show.palette import LIGHT, Tone

WIDTH = 1080
EDGE = 36
PLOT_LEFT, PLOT_RIGHT = 372, 868
BAR, GAP = 16, 5
TICKS = (1, 2, 5)
TEXT_WIDTH = 46
"""Characters that fit beside the plot."""


@dataclass(frozen=True, slots=True)
class Bar:
    """Somebody's ratio, and the words behind it."""

    tone: Tone
    ratio: float
    text: str


@dataclass(frozen=True, slots=True)
class Group:
    """What was compared, and the line under it."""

    title: str
    text: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """Groups under one heading."""

    title: str
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """base: who is compared with, at 1. legend: what the tones mean."""

    title: str
    lines: tuple[str, ...]
    base: str
    legend: tuple[tuple[Tone, str], ...]
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Drawing:
    """Rectangles, then words over them."""

    height: int
    rects: tuple[Rect, ...]
    words: tuple[Words, ...]


def png(chart: Chart) -> bytes:
    """The picture as a PNG file."""
    from PIL import Image, ImageDraw

    found = drawing(chart)
    image = Image.new("RGB", (WIDTH, found.height), LIGHT["page"])
    draw = ImageDraw.Draw(image)
    draw_rects(draw, found.rects)
    draw_words(draw, found.words)
    return png_bytes(image)


def svg(chart: Chart) -> bytes:
    """The picture as an SVG file, which follows the reader's light or dark theme."""
    found = drawing(chart)
    parts = [*svg_start(WIDTH, found.height, chart.title), *map(rect_svg, found.rects), *map(words_svg, found.words)]
    return ("\n".join([*parts, "</svg>"]) + "\n").encode()


# ---- where everything goes


@dataclass(frozen=True, slots=True)
class _Axis:
    """From `low` to `high`, both ends of a decade's tick."""

    low: float
    high: float

    def at(self, ratio: float) -> int:
        share = math.log(ratio / self.low) / math.log(self.high / self.low)
        return round(PLOT_LEFT + max(0.0, min(1.0, share)) * (PLOT_RIGHT - PLOT_LEFT))

    def ticks(self) -> Iterator[float]:
        """1, 2, 5, 10 and so on between the ends."""
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for digit in TICKS:
                value = digit * 10.0**exponent
                if self.low <= value * 1.001 and value <= self.high * 1.001:
                    yield value


def _axis(ratios: Sequence[float]) -> _Axis:
    below = [value for value in (0.1, 0.2, 0.5, 1.0) if value <= min([1.0, *ratios])]
    largest = max([2.0, *ratios])
    above = next(value for e in range(9) for digit in TICKS if (value := digit * 10.0**e) >= largest)
    return _Axis(below[-1] if below else 0.1, above)


def drawing(chart: Chart) -> Drawing:
    """The chart in pixels, as high as it must be."""
    ratios = [bar.ratio for panel in chart.panels for group in panel.groups for bar in group.bars]
    axis = _axis(ratios)
    words = [Words(EDGE, EDGE + 20, chart.title, 22, "text")]
    y = EDGE + 20
    for line in chart.lines:
        y += 24
        words.append(Words(EDGE, y, line, 15, "muted"))
    y += 36
    rects: list[Rect] = []
    x = EDGE
    for tone, name in (("full", chart.base), *chart.legend):
        width = 3 if tone == "full" else 16
        rects.append(Rect(x + (16 - width) // 2, y - 14, width, 18, tone))
        words.append(Words(x + 25, y, name, 15, "text"))
        x += 25 + 8 * len(name) + 30
    y += 24
    for panel in chart.panels:
        y = _panel(panel, axis, chart, y, rects, words)
    return Drawing(y + EDGE // 2, tuple(rects), tuple(words))


def _panel(panel: Panel, axis: _Axis, chart: Chart, y: int, rects: list[Rect], words: list[Words]) -> int:
    """Adds a panel from y on; where it ends."""
    y += 34
    words.append(Words(EDGE, y, panel.title, 18, "text"))
    for value in axis.ticks():
        words.append(Words(axis.at(value), y, f"{value:g}x", 14, "muted", "middle"))
    top = y + 10
    y = top + 10
    bars: list[Rect] = []
    for group in panel.groups:
        height = max(38, len(group.bars) * (BAR + GAP) - GAP)
        words.append(Words(EDGE, y + 14, _fitting(group.title), 15, "text"))
        words.append(Words(EDGE, y + 34, group.text, 14, "muted"))
        for at, bar in enumerate(group.bars):
            start, stop = sorted((axis.at(1.0), axis.at(bar.ratio)))
            above = y + at * (BAR + GAP)
            bars.append(Rect(start, above, max(2, stop - start), BAR, bar.tone))
            shown = f"{bar.ratio:.0f}x" if bar.ratio >= 9.95 else f"{bar.ratio:.1f}x"
            words.append(Words(max(stop, axis.at(1.0)) + 8, above + 13, f"{shown}  {bar.text}", 14, "text"))
        y += height + 16
    for value in axis.ticks():
        rects.append(Rect(axis.at(value), top, 1, y - top, "empty"))
    rects += bars
    rects.append(Rect(axis.at(1.0) - 1, top, 3, y - top, "full"))
    return y


def _fitting(text: str) -> str:
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…"
