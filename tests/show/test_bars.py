"""Are bars as long as their ratios, on one axis, with their words?"""

import io
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageColor

from patterndsl.show.bars import PLOT_LEFT, PLOT_RIGHT, WIDTH, Bar, Chart, Group, Panel, drawing, png, svg
from patterndsl.show.palette import LIGHT

SVG = "{http://www.w3.org/2000/svg}"


def chart(*ratios: float, title: str = "a < b & c") -> Chart:
    group = Group(title, "us 1 ms", tuple(Bar("second", ratio, f"{ratio} ms") for ratio in ratios))
    return Chart("Title", ("a line",), "us", (("second", "them"),), (Panel("Forward", (group,)),))


@pytest.mark.parametrize("ratios", [(1.0,), (3.0, 47.0), (0.3, 12.0), (0.001, 1e6)], ids=str)
def test_bars_begin_at_one_and_end_at_their_ratio(ratios: tuple[float, ...]) -> None:
    found = drawing(chart(*ratios))
    bars = [rect for rect in found.rects if rect.tone == "second"][1:]  # the first is the legend's
    (base,) = (rect.x + 1 for rect in found.rects if rect.tone == "full" and rect.height > 50)
    assert len(bars) == len(ratios)
    for bar, ratio in zip(bars, ratios, strict=True):
        assert bar.x == base if ratio >= 1 else abs(bar.x + bar.width - base) <= 1
        assert bar.x >= PLOT_LEFT and bar.x + bar.width <= PLOT_RIGHT + 2
        assert bar.y + bar.height < found.height
    widths = [bar.width for bar, ratio in zip(bars, ratios, strict=True) if ratio >= 1]
    assert widths == sorted(widths)


def test_a_decade_is_as_wide_everywhere() -> None:
    found = drawing(chart(10.0, 100.0))
    ten, hundred = (rect.width for rect in [rect for rect in found.rects if rect.tone == "second"][1:])
    assert abs(hundred - 2 * ten) <= 1


def test_svg_is_xml_with_all_words_escaped() -> None:
    root = ElementTree.fromstring(svg(chart(2.0, 30.0)))
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    for said in ("Title", "a line", "us", "them", "Forward", "a < b & c", "us 1 ms", "2.0x  2.0 ms", "30x  30.0 ms"):
        assert said in texts


def test_png_has_the_bars_in_their_colour() -> None:
    found = drawing(chart(5.0))
    image = Image.open(io.BytesIO(png(chart(5.0)))).convert("RGB")
    assert image.size == (WIDTH, found.height)
    bar = [rect for rect in found.rects if rect.tone == "second"][-1]
    seen = image.getpixel((bar.x + bar.width // 2, bar.y + bar.height // 2))
    assert isinstance(seen, tuple)
    wanted = ImageColor.getrgb(LIGHT["second"])
    assert all(abs(a - b) <= 2 for a, b in zip(seen, wanted, strict=False))


def test_long_titles_are_cut_before_the_plot() -> None:
    words = [item.text for item in drawing(chart(2.0, title="x" * 200)).words]
    assert not any(len(text) > 60 for text in words)
