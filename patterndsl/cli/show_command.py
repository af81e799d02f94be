"""`patterndsl show`: a picture of a pattern. PyTorch is not imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patterndsl.cli.output import picture_format, progress, say, say_json, shows_color, shows_unicode, width, write
from patterndsl.cli.specs import documents_of, inputs_of, pattern_of, sampled, single, sizes_of
from patterndsl.composite import Composite
from patterndsl.diagnostics import error, input_error
from patterndsl.files import write_atomically
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.lower.lookup import Lookup
    from patterndsl.sema.bind import Bound, HeadGroup
    from patterndsl.show.cells import Caption, Cells

DEFAULT_N = 256
FORMATS = (".png", ".svg", ".html")
JSON_CELLS = 64


def run(arguments: argparse.Namespace) -> int:
    """Draws to the terminal, to a file, or as figures."""
    suffix = picture_format(arguments, FORMATS)
    pattern = pattern_of(arguments.spec, arguments)
    if isinstance(pattern, Composite):
        return _show_terms(pattern, suffix, arguments)
    bound = pattern.bind(**sizes_of(pattern, arguments, DEFAULT_N))
    lookup, drawn = _lookup(bound, arguments)
    group = _group(bound, arguments.head)
    words = _words(pattern, bound, group, drawn, arguments)
    if suffix == ".html":
        with progress() as on_event:
            from patterndsl.show.page import page

            captions = [_words(pattern, bound, other, drawn, arguments) for other in bound.groups]
            data = page(bound, lookup, captions, bound.groups.index(group), on_event)
        write_atomically(arguments.output, data, arguments.force, "--force")
    elif suffix is not None:
        data = _image(suffix, bound, group, lookup, words, arguments)
        write_atomically(arguments.output, data, arguments.force, "--force")
    if arguments.json:
        say_json(_figures(bound, lookup, arguments))
    elif suffix is not None:
        say(f"{arguments.output}: {words.view}")
    else:
        write(_terminal(bound, group, lookup, words, arguments))
    return 0


def _show_terms(pattern: Composite, suffix: str | None, arguments: argparse.Namespace) -> int:
    """Each term in the terminal; a file, and figures, are of one term."""
    if suffix is not None or arguments.json:
        single(pattern, "what --json prints" if suffix is None else "a picture in a file")
    for term in pattern.terms:
        bound = term.pattern.bind(**sizes_of(pattern, arguments, DEFAULT_N))
        lookup, drawn = _lookup(bound, arguments)
        group = _group(bound, arguments.head)
        words = _words(term.pattern, bound, group, drawn, arguments)
        say(f"of {term.name}")
        write(_terminal(bound, group, lookup, words, arguments))
    return 0


def _lookup(bound: Bound, arguments: argparse.Namespace) -> tuple[Lookup, list[str]]:
    """What is given, and documents, labels and lists at random; which. Labels of several rounds have one row for all,
    or one each."""
    from patterndsl.lower.lookup import Lookup

    documents = documents_of([bound.relation], arguments)
    inputs = inputs_of(bound.inputs, arguments, drawn=True, documents=documents)
    one_row, names = sampled(bound.inputs, inputs)
    for shape in bound.inputs:
        if shape.name not in inputs:
            continue
        name, values = shape.name, inputs[shape.name]
        outer = values.shape[: values.ndim - len(shape.inner)]
        if any(size != 1 for size in outer):
            kinds = zip(outer, ("rows", "heads"), strict=False)
            shown = " and ".join(f"{size} {kind}" for size, kind in kinds if size != 1)
            dims = len(shape.inner)
            help = f"draw one of them: give a tensor of {dims} dimension{'s' * (dims != 1)}"
            raise input_error("E502", f"input `{name}` has {shown}; a picture shows one", help)
        rows = values.reshape(shape.rounds, -1).astype("int64")
        one_row |= dict(zip(shape.names, rows, strict=True))
    return Lookup(one_row), [*names, *(name for name in inputs if name in documents)]


def _group(bound: Bound, head: int | None) -> HeadGroup:
    return next(group for group in bound.groups if (head or 0) in group.heads)


def _words(
    pattern: Pattern, bound: Bound, group: HeadGroup, drawn: Sequence[str], arguments: argparse.Namespace
) -> Caption:
    from patterndsl.sema.parameters import param_values
    from patterndsl.show.cells import caption
    from patterndsl.syntax.render import render_expression

    values = param_values(pattern.resolved, {}, bound.sizes)
    shown = (f"{name} = {list(value) if isinstance(value, tuple) else value}" for name, value in values.items())
    text = ", ".join((render_expression(pattern.spec.attend), *shown))
    return caption(pattern.name, text, bound, group, arguments.layer, drawn)


def _cells(bound: Bound, group: HeadGroup, lookup: Lookup, q_cell: int, kv_cell: int) -> Cells:
    from patterndsl.show.cells import find_cells

    return find_cells(group.relation, bound.sizes, lookup, q_cell, kv_cell)


def _terminal(bound: Bound, group: HeadGroup, lookup: Lookup, words: Caption, arguments: argparse.Namespace) -> str:
    from patterndsl.show.terminal import Terminal, draw, layout

    terminal = Terminal(width(), shows_color(sys.stdout), shows_unicode(sys.stdout))
    plan = layout(bound.sizes, terminal, arguments.cell)
    picture = draw(_cells(bound, group, lookup, plan.q_cell, plan.kv_cell), plan.shape, words, terminal)
    others = [f"--head {other.heads[0]}" for other in bound.groups if other is not group]
    more = " ..." if len(others) > 6 else ""
    return picture + (f"other heads: {', '.join(others[:6])}{more}\n" if others else "")


def _image(
    suffix: str, bound: Bound, group: HeadGroup, lookup: Lookup, words: Caption, arguments: argparse.Namespace
) -> bytes:
    from patterndsl.show import image

    most = image.PNG_CELLS if suffix == ".png" else image.SVG_CELLS
    cell = arguments.cell or image.image_cell(bound.sizes, most)
    longest = -(-max(bound.sizes.q_len, bound.sizes.kv_len) // cell)
    if longest > image.PLOT:
        help = f"take cells of {image.image_cell(bound.sizes, most)} or more, or draw a page to zoom into: .html"
        raise error("E701", f"cells of {cell} make a picture of {longest:,} cells", None, help)
    cells = _cells(bound, group, lookup, cell, cell)
    return image.png(cells, words) if suffix == ".png" else image.svg(cells, words)


def _figures(bound: Bound, lookup: Lookup, arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of each head group, or of the one that was asked for."""
    from patterndsl.show.cells import fitting_cell

    sizes = bound.sizes
    cell = arguments.cell or fitting_cell(sizes, JSON_CELLS, JSON_CELLS)
    asked = [group for group in bound.groups if arguments.head is None or arguments.head in group.heads]
    found = [(group, _cells(bound, group, lookup, cell, cell)) for group in asked]
    return {
        "spec": arguments.spec,
        "n": sizes.total,
        "q_len": sizes.q_len,
        "kv_len": sizes.kv_len,
        "q_start": sizes.q_start,
        "layer": bound.layer,
        "cell": cell,
        "groups": [
            {
                "heads": list(group.heads),
                "num_cells": cells.states.size,
                "num_live": cells.num_live,
                "num_full": cells.num_full,
                "live_share": cells.live_share,
                "exact": cells.exact,
            }
            for group, cells in found
        ],
    }
