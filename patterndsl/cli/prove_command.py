"""`patterndsl prove`: does a claim hold for every N? Exit code 0 if proven, 1 if refuted, 3 if nobody knows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.analysis.budget import SECONDS
from patterndsl.cli.output import say, say_json
from patterndsl.cli.specs import is_path, other_single, pattern_of
from patterndsl.composite import Composite
from patterndsl.diagnostics import error
from patterndsl.loading import load, parse_beside
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.analysis.redundancy import DeadTerm

EXIT_CODES = {"Proven": 0, "Refuted": 1, "Unknown": 3}


def run(arguments: argparse.Namespace) -> int:
    """Prints the verdict."""
    pattern = pattern_of(arguments.spec, arguments)
    if arguments.claim == "dead-terms":
        return _dead_terms(pattern, arguments)
    other = None if arguments.other is None else other_of(arguments.other, arguments, pattern)
    if other is not None and not isinstance(pattern, Composite):
        other = other_single(other)
    verdict = pattern.prove(arguments.claim, other, n=arguments.n, params=fixed_params(arguments))
    if arguments.json:
        say_json({"verdict": type(verdict).__name__, **verdict.to_dict()})
    else:
        say(str(verdict))
    return EXIT_CODES[type(verdict).__name__]


def _dead_terms(pattern: Pattern, arguments: argparse.Namespace) -> int:
    """What could be dropped: 1 if there is something, 3 if there was no time to tell."""
    from patterndsl.analysis.redundancy import redundancy

    found = redundancy(pattern.spec)
    if arguments.json:
        dead = [{"text": item.text, "why": item.why, "scope": item.scope, "place": _place(item)} for item in found.dead]
        say_json({"dead": dead, "num_open": found.num_open})
    else:
        lines = [f"{_place(item)}: {item}, {item.scope}" for item in found.dead]
        if found.num_open:
            lines.append(f"Unknown: whether {found.num_open} other parts are dead; gave up after {SECONDS:g} s")
        say("\n".join(lines) or "no term is dead")
    return EXIT_CODES["Unknown"] if found.num_open and not found.dead else int(bool(found.dead))


def _place(item: DeadTerm) -> str:
    line, column = item.place.source.line_and_column(item.place.start)
    return f"{item.place.source.name}:{line}:{column}"


def other_of(spec: str, arguments: argparse.Namespace, first: Pattern) -> Pattern:
    """The second pattern of a comparison: an expression may use what the first declares, and what --set gives."""
    return load(spec) if is_path(spec) else parse_beside(spec, first, fixed_params(arguments), name="<other>")


def fixed_params(arguments: argparse.Namespace) -> dict[str, int]:
    """What --set fixes: a proof needs numbers."""
    found = {}
    for text in arguments.params:
        name, _, value = text.partition("=")
        if not value.strip().lstrip("+-").isdigit():
            raise error("E701", f"--set {text}: a proof takes whole numbers", None, "leave it out for every value")
        found[name.strip()] = int(value)
    return found
