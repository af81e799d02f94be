"""`patterndsl check`: are specs right? Neither NumPy nor PyTorch is imported."""

from __future__ import annotations

import argparse

from patterndsl.cli.output import report, say, say_json
from patterndsl.cli.specs import pattern_of
from patterndsl.diagnostics import PatternError


def run(arguments: argparse.Namespace) -> int:
    """Checks every spec; 1 if one is wrong."""
    results = [_checked(spec, arguments) for spec in arguments.specs]
    right = all(result["ok"] for result in results)
    if arguments.json:
        say_json({"ok": right, "files": results})
    return 0 if right else 1


def _checked(spec: str, arguments: argparse.Namespace) -> dict[str, object]:
    """What is wrong with one spec, said at once unless it is wanted as data."""
    try:
        pattern = pattern_of(spec, arguments)
        if arguments.n is not None:
            pattern.bind(arguments.n, heads=arguments.heads)
    except PatternError as failed:
        if not arguments.json:
            report(failed.diagnostics)
        return {"spec": spec, "ok": False, "errors": [found.to_dict() for found in failed.diagnostics]}
    if not arguments.json:
        say(f"{spec}: ok")
    return {"spec": spec, "ok": True, "errors": []}
