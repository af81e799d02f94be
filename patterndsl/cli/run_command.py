"""`patterndsl run`: does a pattern compute what it says, and is it fast here?"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from patterndsl.cli.calls import call_of, drawn_inputs
from patterndsl.cli.interrupts import importing
from patterndsl.cli.output import OnEvent, progress, say, say_json, shows_color, table
from patterndsl.cli.specs import pattern_of, sizes_of
from patterndsl.diagnostics import error
from patterndsl.loading import parse

if TYPE_CHECKING:
    import torch

    from patterndsl.pattern import Pattern
    from patterndsl.runtime.composed import CompositeProgram
    from patterndsl.runtime.data import Inputs
    from patterndsl.runtime.program import Program
    from patterndsl.runtime.rival import Cost, Rival
    from patterndsl.runtime.tensors import Tensors
    from patterndsl.runtime.trial import Check


def run(arguments: argparse.Namespace) -> int:
    """Runs, checks, times; 1 where the check fails."""
    _refuse_misfits(arguments)
    pattern = None if _is_plan(arguments.spec) else pattern_of(arguments.spec, arguments)
    with progress() as on_event:
        with importing():
            from patterndsl.runtime import trial
            from patterndsl.runtime.arguments import checked_device
            from patterndsl.runtime.rival import dense_rival
            from patterndsl.runtime.tensors import read_tensors

        device = checked_device(arguments.device)
        given = read_tensors(arguments.input, dtype=arguments.dtype, device=device) if arguments.input else None
        pattern, program = _program(pattern, arguments, device, given)
        tensors, inputs = call_of(pattern, program, arguments, device, given)
        options: dict[str, Any] = {"backward": arguments.backward}
        ours = _costs(program, tensors, inputs, arguments.backward, on_event)
        # found in the calls above; the checks ask for masks
        inputs = dict(trial.with_found(program, tensors, inputs) or {}) or None
        found = trial.check(
            program,
            tensors,
            inputs,
            sample_rows=arguments.sample_rows,
            seed=arguments.seed,
            on_event=on_event,
            **options,
        )
        on_event("timing dense attention", 0, 1)
        rival = dense_rival(program, tensors, inputs, limit_seconds=arguments.dense_limit, **options)
    if arguments.json:
        say_json(_data(arguments, pattern, program, tensors, found, ours, rival))
    else:
        _say(arguments, pattern, program, tensors, found, ours, rival)
    return 0 if found.passed else 1


def _refuse_misfits(arguments: argparse.Namespace) -> None:
    """Options that contradict a tensor file or a plan file are refused, not dropped."""
    sizes = {"-n": arguments.n, "--q-len": arguments.q_len, "--kv-len": arguments.kv_len, "--heads": arguments.heads}
    shapes = {"--kv-heads": arguments.kv_heads, "--head-dim": arguments.head_dim, "--batch": arguments.batch}
    if arguments.input:
        _refuse(
            {**{k: v for k, v in sizes.items() if k != "-n"}, **shapes}, f"the tensors of {arguments.input} decide it"
        )
    if _is_plan(arguments.spec):
        others = {"--q-start": arguments.q_start, "--layer": arguments.layer, "--set": arguments.params or None}
        declared = {"--grid": arguments.grid, "--declare": arguments.declare or None}
        _refuse({**sizes, **others, **declared}, f"{arguments.spec} is a plan, which has decided it")


def _refuse(options: dict[str, Any], why: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise error("E701", f"{option} has no part here: {why}", None, f"drop {option}")


def _is_plan(spec: str) -> bool:
    return spec.lower().endswith(".safetensors")


def _program(
    pattern: Pattern | None, arguments: argparse.Namespace, device: torch.device, given: Tensors | None
) -> tuple[Pattern, Program | CompositeProgram]:
    from patterndsl.loading import load_program

    if pattern is None:
        planned = load_program(arguments.spec, device=device, backend=arguments.backend)
        return parse(planned.text), planned
    if given is not None:
        arguments.heads, arguments.q_len = given.query.shape[1:3]
        arguments.kv_len = given.key.shape[2]
    return pattern, pattern.compile(**sizes_of(pattern, arguments, None), device=device, backend=arguments.backend)


def _costs(
    program: Program | CompositeProgram, tensors: Tensors, inputs: Inputs | None, backward: bool, on_event: OnEvent
) -> tuple[Cost, Cost | None]:
    from patterndsl.runtime.rival import cost_of_program

    on_event("timing", 0, 2)
    forward = cost_of_program(program, tensors, inputs)
    on_event("timing", 1, 2)
    return forward, cost_of_program(program, tensors, inputs, backward=True) if backward else None


# ---- words --------------------------------------------------------------------------------------------------


def _say(
    arguments: argparse.Namespace,
    pattern: Pattern,
    program: Program | CompositeProgram,
    tensors: Tensors,
    found: Check,
    ours: tuple[Cost, Cost | None],
    rival: Rival,
) -> None:
    query, key = tensors.query, tensors.key
    sizes = program.sizes
    lengths = f"N {sizes.total:,}" if sizes.q_len == sizes.kv_len else f"{sizes.q_len:,} queries, {sizes.kv_len:,} keys"
    heads = f"{query.shape[1]} heads" + (f" ({key.shape[1]} for keys)" if key.shape[1] != query.shape[1] else "")
    batch = f", batch {query.shape[0]}" if query.shape[0] != 1 else ""
    where = f"{_dtype(tensors)}, {query.device}, {program.backend}"
    say(f"{arguments.spec}: {lengths}, {heads} of {query.shape[3]}{batch}, {where}")
    say("")
    rows = "every row" if found.every_row else f"{found.num_rows} rows of {sizes.q_len:,}"
    drawn = drawn_inputs(pattern, arguments)
    say(
        f"attends {_pairs(found)}"
        + (f", with {', '.join(drawn)} at random, in runs like packed documents" if drawn else "")
    )
    say(f"checked against float64, {rows}: {_verdict(found)}")
    lines = [["", "largest error", "dense SDPA's"]]
    lines += [[f"  {d.what}", f"{d.error:.1e}", f"{d.dense_error:.1e}"] for d in found.deviations]
    say(table(lines, (1, 2)))
    say("")
    say(table(_cost_rows(program, ours, rival), (1, 2, 3, 4)))
    if rival.skipped:
        say(f"{rival.label} was not run: {rival.skipped}")
    elif rival.note:
        say(f"{rival.label}: {rival.note}")
    say(f"first call, with finding the tiles: {_seconds(ours[0].first_seconds)}")


def _pairs(found: Check) -> str:
    """Of all heads and batch rows."""
    where = "" if found.every_row else f", in {found.num_rows} rows"
    share = f", {found.num_pairs / found.num_all:.2%}" if found.num_all else ""
    return f"{found.num_pairs:,} of {found.num_all:,} pairs{share}{where}"


def _verdict(found: Check) -> str:
    import sys

    word, ansi = "passed", "32"
    if not found.passed:
        is_nan = any(math.isnan(item.dense_error) for item in found.deviations)
        why = (
            "float64 too has NaN: a tensor or score is no finite number"
            if is_nan
            else "more than twice dense SDPA's error"
        )
        word, ansi = f"FAILED, {why}", "1;31"
    return f"\x1b[{ansi}m{word}\x1b[0m" if shows_color(sys.stdout) else word


def _cost_rows(program: Program | CompositeProgram, ours: tuple[Cost, Cost | None], rival: Rival) -> list[list[str]]:
    rows = [["", "forward", "memory", "with backward", "memory"]]
    rows.append([f"patterndsl, {program.backend}", *_cost_cells(ours[0]), *_cost_cells(ours[1])])
    if rival.forward is not None:
        rows.append([rival.label, *_cost_cells(rival.forward), *_cost_cells(rival.backward)])
        rows.append(["", *_ratio_cells(ours[0], rival.forward), *_ratio_cells(ours[1], rival.backward)])
    return rows if ours[1] is not None else [[*row[:3], "", ""] for row in rows]


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["", ""]
    return [_seconds(cost.seconds), "not known" if cost.peak_bytes is None else _bytes(cost.peak_bytes)]


def _ratio_cells(ours: Cost | None, dense: Cost | None) -> list[str]:
    if ours is None or dense is None:
        return ["", ""]
    return [_times(dense.seconds / ours.seconds), ""]


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _dtype(tensors: Tensors) -> str:
    return str(tensors.query.dtype).removeprefix("torch.")


def _data(
    arguments: argparse.Namespace,
    pattern: Pattern,
    program: Program | CompositeProgram,
    tensors: Tensors,
    found: Check,
    ours: tuple[Cost, Cost | None],
    rival: Rival,
) -> dict[str, object]:
    from dataclasses import asdict

    def costs(forward: Cost | None, backward: Cost | None) -> dict[str, object]:
        return {
            "forward": asdict(forward) if forward else None,
            "with_backward": asdict(backward) if backward else None,
        }

    return {
        "spec": arguments.spec,
        "drawn": list(drawn_inputs(pattern, arguments)),
        "query": list(tensors.query.shape),
        "key": list(tensors.key.shape),
        "dtype": _dtype(tensors),
        "device": str(tensors.query.device),
        "backend": program.backend,
        "check": {
            "passed": found.passed,
            "every_row": found.every_row,
            "num_rows": found.num_rows,
            "num_pairs": found.num_pairs,
            "num_all": found.num_all,
            "deviations": [asdict(deviation) for deviation in found.deviations],
        },
        "program": costs(*ours),
        "dense": {
            "label": rival.label,
            "note": rival.note,
            "skipped": rival.skipped,
            **costs(rival.forward, rival.backward),
        },
    }
