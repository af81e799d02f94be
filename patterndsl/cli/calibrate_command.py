"""`patterndsl calibrate`: how fast is this machine at what plans are made of, and on which blocks are its kernels?"""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from patterndsl.cli.interrupts import importing
from patterndsl.cli.output import progress, say, say_json, table
from patterndsl.diagnostics import error
from patterndsl.files import refuse_unwritable
from patterndsl.lower.blocks import CANDIDATES, Pipeline, Tuned
from patterndsl.lower.devices import Machine, built_in
from patterndsl.lower.machine import Calibration, storage, store, write_calibration

BUSY = 0.2
"""Cores at other work from which on it is said that they were."""
UNITS = {
    "dense_rate": "FLOP/s",
    "band_rate": "FLOP/s",
    "sparse_rate": "FLOP/s",
    "backward_rate": "of forward",
    "bandwidth": "bytes/s",
    "dense_call": "s",
    "sparse_call": "s",
    "partial": "of full",
    "short": "rows",
    "few": "keys",
}


def run(arguments: argparse.Namespace) -> int:
    """Measures, stores, and prints what was measured beside what is built in; 1 where it is not stored."""
    path = Path(arguments.output) if arguments.output else None
    if path is not None:
        if path.suffix != ".json":
            raise error("E701", f"constants cannot be {path}", None, "end it with .json")
        refuse_unwritable(path, overwrite=arguments.force)
    with progress() as on_event:
        with importing():
            from patterndsl.runtime.arguments import checked_device
            from patterndsl.runtime.calibrate import calibrate
            from patterndsl.runtime.measure import cores_of_others, usage

        device, before = checked_device(arguments.device), usage()
        if path is None:
            storage(device.type)  # before the work, not after it
        found = calibrate(device, on_event=on_event)
        others = cores_of_others(before, usage()) or 0.0
    # a GPU has its own clock, and what others do on it is not known
    disturbance = round(others, 2) if found.device_type == "cpu" and others > BUSY else 0.0
    is_stored = path is None
    if path is not None:
        write_calibration(found, path, overwrite=arguments.force)
    elif arguments.force or not disturbance:
        path = store(found)
    if arguments.json:
        say_json({"path": None if path is None else str(path), "cores_of_others": disturbance, **_data(found)})
    else:
        _say(found, path, disturbance, is_stored=is_stored)
    return int(path is None)


def _say(found: Calibration, path: Path | None, others: float, *, is_stored: bool) -> None:
    usual = built_in(found.device_type)
    threads = f", {found.threads} thread{'s' * (found.threads != 1)}" if found.device_type == "cpu" else ""
    say(f"{found.device}{threads}, torch {found.torch}")
    say("")
    rows = [["", "measured", usual.name, "", ""]]
    for name, unit in UNITS.items():
        mine, theirs = getattr(found.machine, name), getattr(usual, name)
        rows.append([f"  {name}", f"{mine:.3g}", f"{theirs:.3g}", unit, f"{mine / theirs:.2f}x"])
    say(table(rows, (1, 2, 4)))
    say("")
    if found.tuned:
        say("kernels in half precision, and the blocks on which they were fastest")
        say(table([_tuned_row(item) for item in found.tuned], ()))
        say("")
    if others:
        say(f"others kept {others:.1f} cores busy meanwhile: measure again when the machine is idle")
    if path is None:
        say("nothing is stored; --force stores it all the same")
        return
    said = "plans on this device are made with them" if is_stored else f"patterndsl explain --device {path} takes them"
    say(f"written to {path}; {said}")


def _tuned_row(item: Tuned) -> list[str]:
    use, blocks = item.use, item.blocks
    is_usual = blocks == CANDIDATES[use.role, use.head_dim][0]
    numbers = ", ".join(f"{name} {number}" for name, number in asdict(blocks).items() if number is not None)
    kernel = "Hopper's kernel" if isinstance(blocks, Pipeline) else "Triton"
    return [f"  {use.role}", f"{use.head_dim}", f"{use.length} lists", kernel, numbers, "as usual" * is_usual]


def _data(found: Calibration) -> dict[str, object]:
    usual = built_in(found.device_type)
    return {
        "device": found.device,
        "torch": found.torch,
        "threads": found.threads,
        "measured": {field.name: getattr(found.machine, field.name) for field in fields(Machine)},
        "built_in": {field.name: getattr(usual, field.name) for field in fields(Machine)},
        "tuned": [asdict(item) for item in found.tuned],
    }
