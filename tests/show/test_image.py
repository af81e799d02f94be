"""Do PNG and SVG show the cells, in their colours, where they belong?"""

import io
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image, ImageColor

import patterndsl
from patterndsl.lower.lookup import Lookup
from patterndsl.show.cells import Caption, Cells, caption, find_cells
from patterndsl.show.image import image_cell, merged_runs, png, scene, svg
from patterndsl.show.palette import LIGHT, Tone
from patterndsl.show.quadtree import EMPTY, FULL, PARTIAL

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str, cell: int = 1, **sizes: int) -> tuple[Cells, Caption]:
    bound = patterndsl.parse(text).bind(**sizes)
    cells = find_cells(bound.groups[0].relation, bound.sizes, Lookup(), cell, cell)
    return cells, caption(None, text, bound, bound.groups[0], None)


@pytest.mark.parametrize(("cell", "n"), [(1, 40), (8, 100), (1, 300)])
def test_png_pixels_are_the_cells(cell: int, n: int) -> None:
    cells, words = drawn("causal & (window(9) | first(3))", cell, n=n)
    plan = scene(cells, words)
    image = Image.open(io.BytesIO(png(cells, words))).convert("RGB")
    assert image.size == (plan.width, plan.height)
    middles = plan.pixel // 2 + plan.pixel * np.arange(len(cells.states))
    seen = np.asarray(image)[plan.top + middles][:, plan.left + middles]
    tones: dict[int, Tone] = {EMPTY: "empty", PARTIAL: "partial", FULL: "full"}
    for state, tone in tones.items():
        expected = (cells.states == state)[..., None] & np.ones(3, dtype=bool)
        color = np.array(ImageColor.getrgb(LIGHT[tone]))
        assert (np.abs(seen.astype(int) - color)[expected] <= 2).all(), tone


def test_png_is_about_1200_pixels_wide_and_small() -> None:
    cells, words = drawn("causal & window(9)", 1, n=256)
    data = png(cells, words)
    assert 1000 < Image.open(io.BytesIO(data)).width < 1300
    assert len(data) < 50_000


def test_svg_is_xml_with_the_title_escaped_and_one_path_per_tone() -> None:
    cells, words = drawn("k < 3 & q > 4 | causal", 4, n=64)
    root = ElementTree.fromstring(svg(cells, words))
    texts = ["".join(node.itertext()) for node in root.iter(f"{SVG}text")]
    assert "k < 3 & q > 4 | causal" in texts
    group = root.find(f"{SVG}g")
    assert group is not None
    assert [path.get("class") for path in group] == ["partial", "full"]
    assert "http" not in svg(cells, words).decode().replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("text", ["causal & strided(3)", "window(4) | global(2)", "random(5, seed = 1)", "all", "none"])
def test_merged_runs_cover_each_cell_of_a_state_once(text: str) -> None:
    cells, _ = drawn(text, 2, n=45)
    for state in (PARTIAL, FULL):
        covered = np.zeros(cells.states.shape, dtype=int)
        for column, row, width, height in merged_runs(cells, state):
            covered[row : row + height, column : column + width] += 1
        assert np.array_equal(covered, cells.states == state)


def test_equal_rows_become_one_rectangle() -> None:
    cells, _ = drawn("first(3)", 1, n=50)
    assert merged_runs(cells, FULL) == [(0, 0, 3, 50)]


@pytest.mark.parametrize("sizes", [{"n": 0}, {"n": 1}, {"q_len": 2, "kv_len": 900}, {"n": 1 << 20}], ids=str)
def test_any_size_can_be_drawn(sizes: dict[str, int]) -> None:
    bound = patterndsl.parse("causal").bind(**sizes)
    cells, words = drawn("causal", image_cell(bound.sizes, 256), **sizes)
    ElementTree.fromstring(svg(cells, words))
    Image.open(io.BytesIO(png(cells, words))).load()


def test_labels_along_an_axis_keep_their_distance() -> None:
    cells, words = drawn("causal", 2048, n=1 << 20)
    labels = [text for text in scene(cells, words).words if text.text.isdigit() and text.anchor == "middle"]
    places = sorted((text.x, len(text.text)) for text in labels)
    assert all(b[0] - a[0] > 5 * (a[1] + b[1]) for a, b in pairwise(places))
    assert places[-1][0] + 5 * places[-1][1] < scene(cells, words).width
