"""`patterndsl report`: what do patterns cost? One report, or several specs side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.cli.output import report as complain
from patterndsl.cli.output import say, say_json, table
from patterndsl.cli.specs import heads_of, inputs_of, pattern_of
from patterndsl.diagnostics import Diagnostic, PatternError, error
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.analysis.report import Report
    from patterndsl.cli.specs import Array

MARKS = {"Exact": "", "Expected": "≈ "}
"""What stands before a number in a table; before another one, that it is a bound."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the report of each spec; a table where there are several. 1 where a spec is wrong; the others are told."""
    reports: list[Report] = []
    wrong: list[Diagnostic] = []
    for spec in arguments.specs:
        try:
            reports.append(_report(spec, arguments))
        except PatternError as failed:
            if len(arguments.specs) == 1:
                raise
            wrong.extend(failed.diagnostics)
    if arguments.json:
        data: list[object] = [found.to_dict() for found in reports]
        data += [{"errors": [item.to_dict() for item in wrong]}] if wrong else []
        say_json(data[0] if len(arguments.specs) == 1 else data)
    elif arguments.latex:
        for found in reports:
            say(found.latex())
    elif len(arguments.specs) == 1:
        say(str(reports[0]))
    elif reports:
        say(table(_rows(reports), right=range(2, 9) if _is_figured(reports) else ()))
    if wrong and not arguments.json:
        complain(wrong)
    return int(bool(wrong))


def _report(spec: str, arguments: argparse.Namespace) -> Report:
    pattern: Pattern = pattern_of(spec, arguments)
    return pattern.report(
        arguments.n,
        heads=heads_of(arguments, pattern, default=1),
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim or 64,
        dtype=arguments.dtype or "float32",
        layer=arguments.layer or 0,
        block=arguments.block or 128,
        inputs=_inputs(pattern, arguments),
    )


def _inputs(pattern: Pattern, arguments: argparse.Namespace) -> dict[str, Array] | None:
    """What the options give; None where they give nothing, or the pattern of a table reads nothing."""
    if not (arguments.inputs or arguments.input_values):
        return None
    if arguments.n is None:
        raise error("E701", "inputs are for the figures at one length", None, "add -n")
    bound = pattern.bind(arguments.n, heads=heads_of(arguments, pattern, default=1), layer=arguments.layer or 0)
    return inputs_of(bound.inputs, arguments, drawn=True) if bound.inputs or len(arguments.specs) == 1 else None


def _is_figured(reports: list[Report]) -> bool:
    return any(report.n is not None for report in reports)


def _rows(reports: list[Report]) -> list[list[str]]:
    """Name and order; with a length also figures."""
    from patterndsl.analysis.figure import readable

    devices = sorted({name for report in reports for name in report.times})
    figured = _is_figured(reports)
    head = ["pattern", "order"]
    timed = [_headed(name, reports) for name in devices]
    rows = [head + (["pairs", "density", "tile eff.", "forward", *timed] if figured else ["pairs"])]
    for report in reports:
        row = [report.name.splitlines()[0][:32], report.order_at_defaults or report.order or "?"]
        if not figured:
            row.append(report.formula_text())
        elif report.pairs is None or report.density is None or report.flops is None:
            row += ["needs inputs" if report.missing else "too many tiles", *[""] * (3 + len(devices))]
        else:
            row.append(MARKS.get(report.pairs.certainty, "≤ ") + readable(report.pairs.value))
            row += [
                f"{report.density.value:.2%}",
                f"{report.efficiency.value:.0%}" if report.efficiency else "",
                readable(report.flops.value, "FLOP"),
            ]
            row += [readable(report.times[name].value, "s") if report.times else "" for name in devices]
        rows.append(row)
    return rows


def _headed(device: str, reports: list[Report]) -> str:
    """The device, and whose rate it is where that is another dtype."""
    from patterndsl.lower.devices import DEVICES

    measured = DEVICES[device].dtype
    differs = any(report.shape is not None and report.shape.dtype != measured for report in reports)
    return f"{device} ({measured})" if differs else device
