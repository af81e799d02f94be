"""`patterndsl diff`: what does one pattern have that another lacks? A verdict for every N, and a picture of one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patterndsl.cli.output import picture_format, say, say_json, shows_unicode, width
from patterndsl.cli.prove_command import fixed_params, other_of
from patterndsl.cli.specs import documents_of, inputs_of, of_term, pattern_of, sampled
from patterndsl.composite import Composite
from patterndsl.diagnostics import error
from patterndsl.files import write_atomically
from patterndsl.pattern import Pattern
from patterndsl.sema.model import ScoreDeclaration
from patterndsl.syntax.tree import OWN_KEYS

if TYPE_CHECKING:
    from patterndsl.analysis.difference import Difference
    from patterndsl.analysis.verdict import Verdict
    from patterndsl.lower.lookup import Lookup
    from patterndsl.sema.bind import Bound
    from patterndsl.show.palette import Tone

DEFAULT_N = 64
FORMATS = (".png", ".svg")


@dataclass(frozen=True, slots=True)
class _Compared:
    """What was found of a term that both have. verdicts: for every N, as `_QUESTIONS` asks."""

    verdicts: tuple[Verdict, ...]
    found: Difference
    drawn: tuple[str, ...]


_QUESTIONS = ("equals", "first_within_second", "second_within_first")
_WORDS = ("the two are equal", "the first is within the second", "the second is within the first")


def run(arguments: argparse.Namespace) -> int:
    """Prints what both, only the first and only the second have, term by term; 1 where they differ."""
    suffix = picture_format(arguments, FORMATS)
    first = pattern_of(arguments.spec, arguments)
    second = other_of(arguments.other, arguments, first)
    if isinstance(second, Composite):
        second = of_term(second, arguments.term)
    ours, theirs = _terms(first), _terms(second)
    if ours.keys() != theirs.keys():
        ours, theirs = _named(ours), _named(theirs)
    if suffix is not None and (len(ours), ours.keys()) != (1, theirs.keys()):
        raise error("E701", "a picture is of one term of both patterns", None, f"add --term {next(iter(ours))}")
    found = {name: _compared(ours[name], theirs[name], arguments) for name in ours if name in theirs}
    shared = {name: item for name, item in found.items() if isinstance(item, _Compared)}
    others = {name: item for name, item in found.items() if not isinstance(item, _Compared)}
    alone = {"first": [x for x in ours if x not in theirs], "second": [x for x in theirs if x not in ours]}
    besides = _besides(first, second)
    if suffix is not None:
        title = f"{first.name or arguments.spec} | {second.name or arguments.other}"
        if not shared:
            raise error("E701", "the two have not as many keys, so there is no picture", None, "drop -o")
        (item,) = shared.values()
        write_atomically(arguments.output, _image(item.found, title, suffix), arguments.force, "--force")
    is_apart = bool(besides or others or alone["first"] or alone["second"])
    differs = is_apart or any(item.found.differs for item in shared.values())
    if arguments.json:
        terms = {name: _data(item) for name, item in shared.items()}
        more = {"only_of_first": alone["first"], "only_of_second": alone["second"], "other_keys": others}
        more["besides"] = besides
        is_one = ours.keys() == theirs.keys() == {""}
        say_json({**terms[""], "besides": besides} if is_one else {"terms": terms, **more})
        return int(differs)
    for name, item in shared.items():
        if name:
            say(f"of {name}")
        _say(item)
        if suffix is None:
            say(_picture(item.found, unicode=shows_unicode(sys.stdout)))
    for name, (one, other) in others.items():
        say(f"of {name}: {one:,} keys in the first and {other:,} in the second, which are not compared")
    for which, names in alone.items():
        for name in names:
            say(f"of {name}: only the {which} has it")
    if besides:
        say(f"beside pairs they differ in their {' and '.join(besides)}")
    if suffix is not None:
        say(f"drawn to {arguments.output}")
    return int(differs)


def _terms(pattern: Pattern) -> dict[str, Pattern]:
    """What is attended of each source in each branch, "" where that is keys of the sequence alone."""
    if not isinstance(pattern, Composite):
        return {"": pattern}
    return {"": pattern.whole} if pattern.whole else {term.name: term.pattern for term in pattern.written}


def _named(terms: dict[str, Pattern]) -> dict[str, Pattern]:
    """The same beside terms with names, where keys of the sequence alone are those of `self`."""
    return {name or OWN_KEYS: pattern for name, pattern in terms.items()}


def _compared(first: Pattern, second: Pattern, arguments: argparse.Namespace) -> _Compared | tuple[int, int]:
    """What was found; of sources that have not as many keys how many each has."""
    from patterndsl.analysis.difference import difference

    params = _of_both(fixed_params(arguments), first, second)
    n = DEFAULT_N if arguments.n is None else arguments.n
    one, other = (side.bind(n, layer=arguments.layer or 0) for side in (first, second))
    if one.sizes != other.sizes:
        return one.sizes.kv_len, other.sizes.kv_len
    verdicts = (
        first.prove("equals", second, params=params),
        first.prove("within", second, params=params),
        second.prove("within", first, params=params),
    )
    lookups, drawn = zip(*(_lookup(bound, arguments) for bound in (one, other)), strict=True)
    found = difference(one, other, (lookups[0], lookups[1]))
    return _Compared(verdicts, found, tuple(dict.fromkeys((*drawn[0], *drawn[1]))))


def _of_both(params: dict[str, int], first: Pattern, second: Pattern) -> dict[str, int]:
    """Those that the two terms declare; other terms may have others."""
    declared = {item.name for side in (first, second) for item in side.resolved.params}
    return {name: value for name, value in params.items() if name in declared}


def _lookup(bound: Bound, arguments: argparse.Namespace) -> tuple[Lookup, list[str]]:
    """What a term reads: what is given, and documents, labels and lists at random, alike in both patterns; which."""
    from patterndsl.analysis.inputs import checked_inputs

    documents = documents_of([bound.relation], arguments)
    given = inputs_of(bound.inputs, arguments, drawn=True, documents=documents)
    drawn, names = sampled(bound.inputs, given)
    known = [shape for shape in bound.inputs if shape.name in given]
    return checked_inputs(known, given, drawn), [*names, *(name for name in given if name in documents)]


def _besides(first: Pattern, second: Pattern) -> list[str]:
    """In what the two differ beside what is attended."""
    one, other = _told(first), _told(second)
    return [name for name in one if one[name] != other[name]]


def _told(pattern: Pattern) -> dict[str, object]:
    """What is told beside what is attended; what goes without saying of a pattern that is one relation."""
    if not isinstance(pattern, Composite):
        return {"sources": {}, "tables": {}, "scores": {"": _USUAL}, "roles": {}, "combine": "sum"}
    sources, tables, scores, _, combine = pattern.told
    roles = {term.name: term.projections for term in pattern.terms if term.projections.name}
    return {"sources": sources, "tables": tables, "scores": scores, "roles": roles, "combine": combine}


_USUAL = (ScoreDeclaration("softmax"), None, None)
"""The score of a pattern that says nothing of it, and no bias or cap."""


def _say(item: _Compared) -> None:
    found = item.found
    for words, verdict in zip(_WORDS, item.verdicts, strict=True):
        say(f"{words}: {str(verdict).replace(f': {verdict.claim}', '', 1)}")
    pairs = "pair" if found.both == 1 else "pairs"
    where = f", by {' and '.join(f'`{name}`' for name in item.drawn)} at random" if item.drawn else ""
    say(
        f"at N = {found.masks[0].shape[0]:,}{where}: {found.both:,} {pairs} in both, "
        f"{found.only_first:,} only in the first, {found.only_second:,} only in the second"
    )
    for name, pair in (("first", found.first_example), ("second", found.second_example)):
        if pair is not None:
            say(f"  only in the {name}: q = {pair[0]}, k = {pair[1]}")


def _data(item: _Compared) -> dict[str, object]:
    said = {
        name: {"verdict": type(verdict).__name__, **verdict.to_dict()}
        for name, verdict in zip(_QUESTIONS, item.verdicts, strict=True)
    }
    return {**said, **item.found.to_dict(), "drawn": list(item.drawn)}


def _picture(found: Difference, unicode: bool) -> str:
    """A cell a character: what only one has stands out; both and neither are quiet."""
    signs = ("·█" if unicode else ".#") + "12X"
    lines = ["".join(signs[state] for state in row) for row in found.cells(_cell(found, min(64, width() - 2)))]
    return "\n".join([*lines, f"{signs[1]} both  1 only the first  2 only the second  X each some  {signs[0]} neither"])


def _cell(found: Difference, most: int) -> int:
    """The least side of cells of which so many fit."""
    longest: int = max(found.masks[0].shape)
    return max(1, -(-longest // most))


def _image(found: Difference, title: str, suffix: str) -> bytes:
    from patterndsl.analysis.difference import CELLS
    from patterndsl.sema.bind import Sizes
    from patterndsl.show import image
    from patterndsl.show.cells import Caption, Cells

    n, num_keys = found.masks[0].shape
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
    cells = Cells(found.cells(cell), cell, cell, Sizes(n, num_keys, 0, n), True)
    paint = image.png if suffix == ".png" else image.svg
    return paint(cells, Caption(title, f"N {n:,}"), look)
