"""`patterndsl reach`: what can reach a position through several layers? PyTorch is not imported."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

from patterndsl.cli.output import progress, say, say_json
from patterndsl.cli.specs import heads_of, inputs_of, pattern_of, single
from patterndsl.composite import Composite
from patterndsl.diagnostics import error
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.analysis.reach import Reach
    from patterndsl.cli.specs import Array

Runs: TypeAlias = list[tuple[int, int]]
"""Positions as half-open ranges."""

MOST_LAYERS = 64
"""Layers through which a query is followed where nobody says how many."""
MOST_SHOWN = 6
"""Runs or hops in a line."""


def run(arguments: argparse.Namespace) -> int:
    """Prints how far content gets, what reaches --query, and a --path."""
    given = pattern_of(arguments.spec, arguments)
    pattern = (given.whole if isinstance(given, Composite) else None) or single(given, "`reach`")
    if arguments.n is None:
        raise error("E701", "no length is given", None, "add -n 4096")
    heads, layers = heads_of(arguments, pattern), arguments.layers
    inputs = _inputs(pattern, heads, arguments)
    with progress() as on_event:
        found = pattern.reach(arguments.n, heads=heads, layers=layers, inputs=inputs, on_event=on_event)
        fields = {} if arguments.query is None else _fields(found, arguments.query, layers)
        path = None if arguments.path is None else found.path(*arguments.path)
    if arguments.json:
        say_json(found.to_dict() | _data(fields, path, arguments))
        return 0
    say("\n".join(found.lines()))
    for number, runs in fields.items():
        say(f"  after {_layers(number)} {_size(runs):,} positions reach q = {arguments.query}: {_listed(runs)}")
    if arguments.path is not None:
        say(_path_line(arguments.path, path))
    return 0


def _inputs(pattern: Pattern, heads: int, arguments: argparse.Namespace) -> dict[str, Array]:
    """What any layer reads."""
    from patterndsl.analysis.reach import period_of

    period = period_of(pattern.resolved, arguments.layers)
    layers = [pattern.bind(arguments.n, heads=heads, layer=layer) for layer in range(period)]
    shapes = dict.fromkeys(shape for bound in layers for shape in bound.inputs)
    return inputs_of(shapes, arguments, exact="`reach`")


def _fields(found: Reach, q: int, layers: int | None) -> dict[int, Runs]:
    """What reaches q after 1, 2, 3 layers, each power of two and the last; no further than it grows."""
    last = layers or min(MOST_LAYERS, int(found.layers_to_connect.value))
    shown = sorted({1, 2, 3, last, *(1 << bit for bit in range(last.bit_length()))})
    fields: dict[int, Runs] = {}
    for number in shown:
        if number <= last:
            fields[number] = _runs(found.field(q, number))
            if _size(fields[number]) == (q + 1 if found.is_causal else found.n):
                break
    return fields


def _runs(positions: Array) -> Runs:
    import numpy as np

    breaks = np.flatnonzero(np.diff(positions) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks)]


def _size(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _listed(runs: Runs) -> str:
    """Ranges as the language writes them."""
    texts = [f"{start}..{stop}" if stop - start > 1 else f"{start}" for start, stop in runs[:MOST_SHOWN]]
    return ", ".join(texts) + (f", ... ({len(runs):,} runs)" if len(runs) > MOST_SHOWN else "")


def _layers(number: int) -> str:
    return f"{number} {'layer' if number == 1 else 'layers'}"


def _path_line(ends: list[int], path: tuple[int, ...] | None) -> str:
    q, k = ends
    if path is None:
        return f"  nothing of k = {k} ever reaches q = {q}"
    hops = [str(hop) for hop in path]
    if len(hops) > 2 * MOST_SHOWN:
        hops = [*hops[:MOST_SHOWN], "...", *hops[-MOST_SHOWN:]]
    return f"  from k = {k} to q = {q} in {_layers(len(path) - 1)}: {' -> '.join(hops)}"


def _data(fields: dict[int, Runs], path: tuple[int, ...] | None, arguments: argparse.Namespace) -> dict[str, object]:
    data: dict[str, object] = {}
    if arguments.query is not None:
        after = [{"layers": number, "positions": _size(runs), "runs": runs} for number, runs in fields.items()]
        data["query"] = {"q": arguments.query, "fields": after}
    if arguments.path is not None:
        q, k = arguments.path
        hops = None if path is None else [{"layer": layer, "position": hop} for layer, hop in enumerate(path)]
        data["path"] = {"q": q, "k": k, "hops": hops}
    return data
