"""Does the page hold the trees of all heads, nothing from elsewhere, and not too many bytes?"""

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import patterndsl
from patterndsl.lower.lookup import Lookup
from patterndsl.show.cells import caption
from patterndsl.show.page import MAX_BYTES, page
from patterndsl.show.quadtree import FIRST_NODE, grow


def page_of(text: str, n: int, heads: int = 1, **options: Any) -> str:
    bound = patterndsl.parse(text, **options).bind(n, heads=heads)
    return page(bound, Lookup(), [caption(None, text, bound, group, None) for group in bound.groups]).decode()


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def unpacked(group: dict[str, Any]) -> list[Any]:
    """The levels of a tree, as the page's script reads them."""
    flat = np.frombuffer(zlib.decompress(base64.b64decode(group["nodes"])), dtype=np.uint8)
    levels, offset = [], 0
    for count in group["counts"]:
        planes = flat[offset : offset + 16 * count].reshape(4, 4, count).astype(np.int64)
        levels.append((planes << 8 * np.arange(4)[:, None]).sum(1).T)
        offset += 16 * count
    assert offset == len(flat)
    return levels


def test_holds_the_tree() -> None:
    text = "causal & (window(24) | strided(16))"
    group = data_of(page_of(text, 300))["groups"][0]
    bound = patterndsl.parse(text).bind(300)
    tree = grow(bound.groups[0].relation, bound.sizes, Lookup())
    levels = unpacked(group)
    assert group["root"] == tree.root
    assert all(np.array_equal(a, b) for a, b in zip(levels, tree.levels, strict=True))
    below = [*group["counts"][1:], 0]
    assert all(level.max(initial=0) < FIRST_NODE + count for level, count in zip(levels, below, strict=True))


def test_holds_every_group_of_heads() -> None:
    data = data_of(page_of("causal & recent(w[head])", 64, heads=4, params={"w": [4, 9, 4, 30]}))
    assert [group["heads"] for group in data["groups"]] == [[0, 2], [1], [3]]
    assert data["groups"][1]["view"] == "N 64 · head 1 of 4; 3 groups differ"


def test_titles_cannot_leave_their_place() -> None:
    text = page_of("k < 3 # </script><b>", 8)
    assert "</script><b>" not in text
    assert "k &lt; 3" in text
    assert data_of(text)["title"] == "k < 3 # </script><b>"


def test_needs_nothing_from_elsewhere() -> None:
    text = page_of("causal", 64)
    assert not re.search(r"https?:|//cdn|@import|url\(|src=|<link", text)
    HTMLParser().feed(text)
    assert "{{" not in text


@pytest.mark.parametrize("text", ["random(3, seed = 1)", "blocks(64, window(1) | random(3, seed = 2))"])
def test_is_bounded_where_the_pattern_has_no_symmetry(text: str) -> None:
    made = page_of(text, 1 << 16)
    assert len(made) < MAX_BYTES + 100_000
    assert data_of(made)["groups"][0]["counts"]
