"""`patterndsl bench`: is a pattern faster here than dense SDPA and FlexAttention, and by how much?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from patterndsl.cli.calls import call_of, drawn_inputs, inputs_given
from patterndsl.cli.interrupts import importing
from patterndsl.cli.output import picture_format, progress, say, say_json, table
from patterndsl.cli.specs import heads_of, pattern_of
from patterndsl.files import write_atomically

if TYPE_CHECKING:
    import torch

    from patterndsl.cli.output import OnEvent
    from patterndsl.pattern import Pattern
    from patterndsl.runtime.bench import Comparison
    from patterndsl.runtime.composed import CompositeProgram
    from patterndsl.runtime.contest import Entry, Timing
    from patterndsl.runtime.program import Program

DEFAULT_N = 4096
FORMATS = (".json", ".png", ".svg")


def run(arguments: argparse.Namespace) -> int:
    """Checks, times in turns; 1 where a pattern's own result is wrong."""
    suffix = picture_format(arguments, FORMATS)
    patterns = [pattern_of(spec, arguments) for spec in arguments.specs]
    with progress() as on_event:
        with importing():
            from patterndsl.runtime.arguments import checked_device
            from patterndsl.runtime.bench import surroundings

        device = checked_device(arguments.device)
        sizes = _sizes(patterns, arguments)
        options: dict[str, Any] = {"n": sizes["n"], "heads": sizes["heads"], "layer": arguments.layer or 0}
        programs = [pattern.compile(**options, device=device, backend=arguments.backend) for pattern in patterns]
        for pattern, program in zip(patterns, programs, strict=True):  # of all, before the first takes its time
            inputs_given(pattern, program, arguments)
        found = []
        for spec, pattern, program in zip(arguments.specs, patterns, programs, strict=True):
            found.append(_compared(pattern, program, arguments, device, on_event))
            if not arguments.json:
                _say(spec, found[-1], sizes, drawn_inputs(pattern, arguments), arguments)
    data = {
        **surroundings(device),
        **sizes,
        "patterns": [
            _data(spec, drawn_inputs(pattern, arguments), item)
            for spec, pattern, item in zip(arguments.specs, patterns, found, strict=True)
        ],
    }
    if suffix is not None:
        written = _file(suffix, data)
        write_atomically(arguments.output, written, arguments.force, "--force")
    if arguments.json:
        say_json(data)
    elif suffix is not None:
        say(f"{arguments.output}: {len(written):,} bytes")
    return 0 if all(item.contest.entries[0].skipped is None for item in found) else 1


def _compared(
    pattern: Pattern,
    program: Program | CompositeProgram,
    arguments: argparse.Namespace,
    device: torch.device,
    on_event: OnEvent,
) -> Comparison:
    from patterndsl.runtime.bench import compare
    from patterndsl.runtime.contest import Limits
    from patterndsl.runtime.trial import with_found

    tensors, inputs = call_of(pattern, program, arguments, device)
    return compare(
        program,
        tensors,
        with_found(program, tensors, inputs),
        backward=arguments.backward,
        limits=Limits(arguments.seconds, arguments.limit),
        on_event=on_event,
    )


def _sizes(patterns: Sequence[Pattern], arguments: argparse.Namespace) -> dict[str, object]:
    heads = heads_of(arguments, *patterns)
    return {
        "n": DEFAULT_N if arguments.n is None else arguments.n,
        "batch": arguments.batch or 1,
        "heads": heads,
        "kv_heads": arguments.kv_heads or heads,
        "head_dim": arguments.head_dim or 64,
        "dtype": arguments.dtype or "float32",
        "device": arguments.device,
    }


# ---- words --------------------------------------------------------------------------------------------------


def _say(
    spec: str,
    found: Comparison,
    sizes: Mapping[str, object],
    drawn: Sequence[str],
    arguments: argparse.Namespace,
) -> None:
    say(
        f"{spec}: N {sizes['n']:,}, {sizes['heads']} heads of {sizes['head_dim']}, {sizes['dtype']}, "
        f"{arguments.device}, {found.backend}" + "".join(f", {name} at random" for name in drawn)
    )
    say("")
    entries = found.contest.entries
    measures = ("forward", "training") if arguments.backward else ("forward",)
    rows = [["", *(cell for measure in measures for cell in (_TITLES[measure], "spread", "ratio", "memory"))]]
    for entry in entries:
        if entry.skipped is None:
            rows.append([entry.label, *(cell for measure in measures for cell in _cells(entry, measure))])
    say(table(rows, range(1, len(rows[0]))))
    for line in _remarks(found):
        say(line)
    say("")


_TITLES = {"forward": "forward", "training": "with backward"}


def _cells(entry: Entry, measure: str) -> list[str]:
    timing: Timing | None = getattr(entry, measure)
    peak: int | None = getattr(entry, f"{measure}_bytes")
    if timing is None:
        return ["", "", "", ""]
    spread = timing.seconds
    around = f"{_short(spread.low)} to {_short(spread.high)}" if timing.num_rounds > 1 else "once"
    ratio = "" if timing.ratio is None else f"{timing.ratio.median:.2f}x"
    return [_seconds(spread.median), around, ratio, "" if peak is None else f"{peak / 2**20:,.1f} MiB"]


def _remarks(found: Comparison) -> list[str]:
    """What the table has no room for."""
    lines = []
    ours = found.contest.entries[0]
    if ours.check is not None:
        rows = "every row" if ours.check.every_row else f"{ours.check.num_rows} rows"
        lines.append(f"checked against float64 before timing, {rows}: largest error {_largest(ours):.1e}")
    for entry in found.contest.entries:
        variants = {t.variant for t in (entry.forward, entry.training) if t is not None and t.variant}
        if variants and entry is not ours:
            lines.append(f"{entry.label}: {' and '.join(sorted(variants))}")
        if entry.skipped:
            lines.append(f"{entry.label} was not run: {entry.skipped}")
        elif entry.note:
            lines.append(f"{entry.label}: {entry.note}")
        lines += [f"{entry.label}, left out: {failure}" for failure in entry.failures]
    before = found.preparation
    built = f"{_seconds(before.create_block_mask)} by create_block_mask" if before.create_block_mask else ""
    built = built or f"create_block_mask was not timed, {before.skipped}"
    ours_too = "" if before.block_mask is None else f"{_seconds(before.block_mask)} by program.block_mask; "
    lines.append(f"mask: {built}; {ours_too}plan: {_seconds(before.plan)}")
    others = found.contest.cores_of_others
    if others is not None and others > 0.25:
        lines.append(f"other processes kept {others:.1f} cores busy meanwhile")
    return lines


def _largest(entry: Entry) -> float:
    return max((d.error for d in entry.check.deviations), default=0.0) if entry.check else 0.0


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds * 1e3:.2f}"


# ---- data and pictures --------------------------------------------------------------------------------------


def _file(suffix: str, data: dict[str, object]) -> bytes:
    from patterndsl.runtime.bench_chart import chart
    from patterndsl.show import bars

    if suffix == ".json":
        return (json.dumps(data, indent=2) + "\n").encode()
    return bars.png(chart(data)) if suffix == ".png" else bars.svg(chart(data))


def _data(spec: str, drawn: Sequence[str], found: Comparison) -> dict[str, object]:
    from dataclasses import asdict

    return {"spec": spec, "drawn": list(drawn), **asdict(found)}
