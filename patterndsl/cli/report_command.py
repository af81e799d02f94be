"""`patterndsl report`: what do patterns cost? One report, or several specs side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.cli.output import say, say_json, table
from patterndsl.cli.specs import pattern_of
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.analysis.report import Report


def run(arguments: argparse.Namespace) -> int:
    """Prints the report of each spec; a table where there are several."""
    reports = [_report(spec, arguments) for spec in arguments.specs]
    if arguments.json:
        data = [report.to_dict() for report in reports]
        say_json(data[0] if len(data) == 1 else data)
    elif arguments.latex:
        for report in reports:
            say(report.latex())
    elif len(reports) == 1:
        say("\n".join(reports[0].lines()))
    else:
        say(table(_rows(reports), right=range(2, 9)))
    return 0


def _report(spec: str, arguments: argparse.Namespace) -> Report:
    pattern: Pattern = pattern_of(spec, arguments)
    return pattern.report(
        arguments.n,
        heads=arguments.heads or 1,
        kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim or 64,
        dtype=arguments.dtype or "float32",
        layer=arguments.layer or 0,
        block=arguments.block or 128,
    )


def _rows(reports: list[Report]) -> list[list[str]]:
    """Name and order; with a length also figures."""
    from patterndsl.analysis.figure import readable

    devices = sorted({name for report in reports for name in report.times})
    figured = any(report.n is not None for report in reports)
    head = ["pattern", "order"]
    rows = [head + (["pairs", "density", "tile eff.", "forward", *devices] if figured else ["pairs"])]
    for report in reports:
        first = report.groups[0]
        row = [report.name.splitlines()[0][:32], first.order_at_defaults or first.order or "?"]
        if not figured:
            row.append(report.formula_text())
        elif report.pairs is None or report.density is None or report.efficiency is None or report.flops is None:
            row += ["needs inputs", *[""] * (3 + len(devices))]
        else:
            mark = "" if report.pairs.certainty == "Exact" else "≤ "
            row.append(mark + readable(report.pairs.value))
            row += [
                f"{report.density.value:.2%}",
                f"{report.efficiency.value:.0%}",
                readable(report.flops.value, "FLOP"),
            ]
            row += [readable(report.times[name].value, "s") for name in devices]
        rows.append(row)
    return rows
