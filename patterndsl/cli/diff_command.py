"""`patterndsl diff`: what does one pattern have that another lacks? A verdict for every N, and a picture of one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from patterndsl.cli.output import say, say_json, shows_unicode, width
from patterndsl.cli.prove_command import fixed_params, other_of
from patterndsl.cli.specs import pattern_of

if TYPE_CHECKING:
    from patterndsl.analysis.difference import Difference

DEFAULT_N = 64


def run(arguments: argparse.Namespace) -> int:
    """Prints what both, only the first and only the second have; 1 where they differ."""
    import sys

    from patterndsl.analysis.difference import difference

    first, second = pattern_of(arguments.spec, arguments), other_of(arguments.other, arguments)
    params = fixed_params(arguments)
    verdicts = [
        first.prove("equals", second, params=params),
        first.prove("within", second, params=params),
        second.prove("within", first, params=params),
    ]
    n = DEFAULT_N if arguments.n is None else arguments.n
    found = difference(first.bind(n, layer=arguments.layer or 0), second.bind(n, layer=arguments.layer or 0))
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
        say(f"{label}: {verdict}")
    say(
        f"at N = {n:,}: {found.both:,} pairs in both, {found.only_first:,} only in the first, "
        f"{found.only_second:,} only in the second"
    )
    for name, pair in (("first", found.first_example), ("second", found.second_example)):
        if pair is not None:
            say(f"  only in the {name}: q = {pair[0]}, k = {pair[1]}")
    say(_picture(found, unicode=shows_unicode(sys.stdout)))
    return int(found.differs)


def _picture(found: Difference, unicode: bool) -> str:
    """A cell a character: what only one has stands out; both and neither are quiet."""
    signs: dict[Any, str] = {"none": "·" if unicode else ".", "both": "█" if unicode else "#"}
    signs |= {"first": "1", "second": "2", "mixed": "X"}
    cells = found.cells(min(64, width() - 2))
    lines = ["".join(signs[cell] for cell in row) for row in cells]
    return "\n".join(
        [*lines, f"{signs['both']} both  1 only the first  2 only the second  X each some  {signs['none']} neither"]
    )
