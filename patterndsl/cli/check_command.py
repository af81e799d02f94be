"""`patterndsl check`: are specs right, and could they be better? What is wrong is said without NumPy and PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from patterndsl.cli.output import report, say, say_json
from patterndsl.cli.specs import DEFAULT_HEADS, heads_of, pattern_of, with_heads
from patterndsl.diagnostics import Diagnostic, PatternError
from patterndsl.pattern import Pattern


def run(arguments: argparse.Namespace) -> int:
    """Checks every spec; 1 if one is wrong."""
    results = [_checked(spec, arguments) for spec in arguments.specs]
    right = all(result["ok"] for result in results)
    if arguments.json:
        say_json({"ok": right, "files": results})
    return 0 if right else 1


def _checked(spec: str, arguments: argparse.Namespace) -> dict[str, object]:
    """What is wrong with one spec, said at once unless it is wanted as data."""
    found = _found(spec, arguments)
    errors = [item for item in found if item.severity == "error"]
    warnings = [item for item in found if item.severity == "warning"]
    if not arguments.json:
        if found:
            report(found)
        if not errors:
            say(f"{spec}: ok" + (f", {_counted(warnings)}" if warnings else ""))
    return {
        "spec": spec,
        "ok": not errors,
        "errors": [item.to_dict() for item in errors],
        "warnings": [item.to_dict() for item in warnings],
    }


def _found(spec: str, arguments: argparse.Namespace) -> Sequence[Diagnostic]:
    heads = DEFAULT_HEADS if arguments.heads is None else arguments.heads
    try:
        pattern = pattern_of(spec, arguments)
        heads = heads_of(arguments, pattern)
        if arguments.n is not None:
            pattern.fit(arguments.n, heads=heads)
        else:
            _check_constants(pattern, arguments.heads or 1)
    except PatternError as failed:
        return with_heads(failed, heads).diagnostics
    if arguments.no_lint:
        return ()
    warnings = pattern.lint(arguments.n, heads=heads)
    return [replace(item, is_strict=True) for item in warnings] if arguments.strict else warnings


def _check_constants(pattern: Pattern, num_heads: int) -> None:
    """Raises PatternError with what is wrong at every length."""
    wrong = pattern.misfit(num_heads)
    if wrong is not None:
        raise wrong


def _counted(warnings: Sequence[Diagnostic]) -> str:
    return "1 warning" if len(warnings) == 1 else f"{len(warnings)} warnings"
