"""`patterndsl diff`: what does one pattern have that another lacks? A verdict for every N, and a picture of one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.cli.output import picture_format, say, say_json, shows_unicode, width
from patterndsl.cli.prove_command import fixed_params, other_of
from patterndsl.cli.specs import other_single, pattern_of, single
from patterndsl.files import write_atomically

if TYPE_CHECKING:
    from patterndsl.analysis.difference import Difference
    from patterndsl.show.palette import Tone

DEFAULT_N = 64
FORMATS = (".png", ".svg")


def run(arguments: argparse.Namespace) -> int:
    """Prints what both, only the first and only the second have; 1 where they differ."""
    import sys

    from patterndsl.analysis.difference import difference

    first = single(pattern_of(arguments.spec, arguments))
    second = other_single(other_of(arguments.other, arguments, first))
    params = fixed_params(arguments)
    verdicts = [
        first.prove("equals", second, params=params),
        first.prove("within", second, params=params),
        second.prove("within", first, params=params),
    ]
    suffix = picture_format(arguments, FORMATS)
    n = DEFAULT_N if arguments.n is None else arguments.n
    found = difference(first.bind(n, layer=arguments.layer or 0), second.bind(n, layer=arguments.layer or 0))
    if suffix is not None:
        title = f"{first.name or arguments.spec} | {second.name or arguments.other}"
        write_atomically(arguments.output, _image(found, title, suffix), arguments.force, "--force")
    if arguments.json:
        names = ("equals", "first_within_second", "second_within_first")
        said = {
            name: {"verdict": type(verdict).__name__, **verdict.to_dict()}
            for name, verdict in zip(names, verdicts, strict=True)
        }
        say_json({**said, **found.to_dict()})
        return int(found.differs)
    labels = ("the two are equal", "the first is within the second", "the second is within the first")
    for label, verdict in zip(labels, verdicts, strict=True):
        say(f"{label}: {str(verdict).replace(f': {verdict.claim}', '', 1)}")
    pairs = "pair" if found.both == 1 else "pairs"
    say(
        f"at N = {n:,}: {found.both:,} {pairs} in both, {found.only_first:,} only in the first, "
        f"{found.only_second:,} only in the second"
    )
    for name, pair in (("first", found.first_example), ("second", found.second_example)):
        if pair is not None:
            say(f"  only in the {name}: q = {pair[0]}, k = {pair[1]}")
    if suffix is None:
        say(_picture(found, unicode=shows_unicode(sys.stdout)))
    else:
        say(f"drawn to {arguments.output}")
    return int(found.differs)


def _picture(found: Difference, unicode: bool) -> str:
    """A cell a character: what only one has stands out; both and neither are quiet."""
    signs = ("·█" if unicode else ".#") + "12X"
    lines = ["".join(signs[state] for state in row) for row in found.cells(_cell(found, min(64, width() - 2)))]
    return "\n".join([*lines, f"{signs[1]} both  1 only the first  2 only the second  X each some  {signs[0]} neither"])


def _cell(found: Difference, most: int) -> int:
    """The least side of cells of which so many fit."""
    n: int = found.masks[0].shape[0]
    return max(1, -(-n // most))


def _image(found: Difference, title: str, suffix: str) -> bytes:
    from patterndsl.analysis.difference import CELLS
    from patterndsl.sema.parameters import sizes_of
    from patterndsl.show import image
    from patterndsl.show.cells import Caption, Cells

    n = found.masks[0].shape[0]
    cell = _cell(found, image.PNG_CELLS if suffix == ".png" else image.SVG_CELLS)
    names: tuple[tuple[Tone, str], ...] = (
        ("first", "only the first"),
        ("second", "only the second"),
        ("mixed", "each some"),
        ("both", "both"),
    )
    look = image.Look(
        tuple((CELLS.index(tone), tone, name) for tone, name in names),
        f"{found.both:,} pairs in both, {found.only_first:,} only in the first, {found.only_second:,} in the second",
    )
    cells = Cells(found.cells(cell), cell, cell, sizes_of(n, None, None, 0), True)
    paint = image.png if suffix == ".png" else image.svg
    return paint(cells, Caption(title, f"N {n:,}"), look)
