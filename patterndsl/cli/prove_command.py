"""`patterndsl prove`: does a claim hold for every N? Exit code 0 if proven, 1 if refuted, 3 if nobody knows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.cli.output import say, say_json
from patterndsl.cli.specs import is_path, pattern_of
from patterndsl.diagnostics import error
from patterndsl.pattern import Pattern, load, parse

if TYPE_CHECKING:
    from patterndsl.analysis.redundancy import DeadTerm

EXIT_CODES = {"Proven": 0, "Refuted": 1, "Unknown": 3}


def run(arguments: argparse.Namespace) -> int:
    """Prints the verdict."""
    pattern = pattern_of(arguments.spec, arguments)
    if arguments.claim == "dead-terms":
        return _dead_terms(pattern, arguments)
    other = None if arguments.other is None else other_of(arguments.other, arguments)
    verdict = pattern.prove(arguments.claim, other, n=arguments.n, params=fixed_params(arguments))
    if arguments.json:
        say_json({"verdict": type(verdict).__name__, **verdict.to_dict()})
    else:
        say(str(verdict))
    return EXIT_CODES[type(verdict).__name__]


def _dead_terms(pattern: Pattern, arguments: argparse.Namespace) -> int:
    """What could be dropped: 1 if there is something."""
    found = pattern.dead_terms()
    if arguments.json:
        shown = [{"text": item.text, "why": item.why, "scope": item.scope, "place": _place(item)} for item in found]
        say_json(shown)
    else:
        say("\n".join(f"{_place(item)}: {item}, {item.scope}" for item in found) or "no term is dead")
    return int(bool(found))


def _place(item: DeadTerm) -> str:
    line, column = item.place.source.line_and_column(item.place.start)
    return f"{item.place.source.name}:{line}:{column}"


def other_of(spec: str, arguments: argparse.Namespace) -> Pattern:
    """The second pattern of a comparison: an expression may use the parameters that --set gives."""
    if is_path(spec):
        return load(spec)
    return parse(spec, fixed_params(arguments) or None, name="<other>") if arguments.params else parse(spec)


def fixed_params(arguments: argparse.Namespace) -> dict[str, int]:
    """What --set fixes: a proof needs numbers."""
    found = {}
    for text in arguments.params:
        name, _, value = text.partition("=")
        if not value.strip().lstrip("+-").isdigit():
            raise error("E701", f"--set {text}: a proof takes whole numbers", None, "leave it out for every value")
        found[name.strip()] = int(value)
    return found
