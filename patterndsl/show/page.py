"""How does a picture become a page to zoom into? The quadtrees of all head groups, packed into one HTML file.

The page needs nothing but itself: no network, no fonts, no libraries. What it does with the trees is in page.html.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import OnEvent
from patterndsl.sema.bind import Bound
from patterndsl.show.cells import Caption
from patterndsl.show.palette import DARK, LIGHT, variables
from patterndsl.show.quadtree import Quadtree, grow, pruned

MAX_BYTES = 1_400_000
"""Of all trees together, as the page holds them."""
MAX_NODES = 1 << 20
"""Of all trees together, before equal ones are merged."""


def page(
    bound: Bound,
    lookup: Lookup,
    captions: Sequence[Caption],
    selected: int = 0,
    on_event: OnEvent | None = None,
) -> bytes:
    """The HTML file. captions: the words of each head group; selected: the group that is shown first."""
    num_groups = len(bound.groups)
    groups = []
    for group, words in zip(bound.groups, captions, strict=True):
        tree = grow(group.relation, bound.sizes, lookup, MAX_NODES // num_groups, on_event)
        groups.append(_packed(tree, MAX_BYTES // num_groups) | {"heads": list(group.heads), "view": words.view})
    sizes = bound.sizes
    data = {
        "title": captions[selected].title,
        "qStart": sizes.q_start,
        "qLen": sizes.q_len,
        "kvLen": sizes.kv_len,
        "selected": selected,
        "groups": groups,
    }
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # `<` cannot stand in a script element's text; the title is text of the document
    for mark, value in (
        ("{{light}}", variables(LIGHT)),
        ("{{dark}}", variables(DARK)),
        ("{{title}}", html.escape(captions[selected].title)),
        ("{{data}}", json.dumps(data, sort_keys=True).replace("<", "\\u003c")),
    ):
        text = text.replace(mark, value)
    return text.encode()


def _packed(tree: Quadtree, max_bytes: int) -> dict[str, object]:
    """A tree as JSON data, without its deepest levels where it would be too large."""
    data = _compressed(tree)
    while len(data) > max_bytes and tree.levels:
        tree = pruned(tree)
        data = _compressed(tree)
    return {
        "depth": tree.depth,
        "root": tree.root,
        "counts": [len(level) for level in tree.levels],
        "finest": tree.finest,
        "exact": tree.exact,
        "nodes": data,
    }


def _compressed(tree: Quadtree) -> str:
    """Level after level, quarter after quarter, byte after byte of 32-bit codes: like beside like deflates well."""
    planes = [np.ascontiguousarray(level.T, dtype="<u4").view(np.uint8).reshape(4, -1, 4) for level in tree.levels]
    flat = b"".join(np.ascontiguousarray(plane.transpose(0, 2, 1)).tobytes() for plane in planes)
    return base64.b64encode(zlib.compress(flat, 9)).decode()
