"""`patterndsl compile`: the plan of a pattern, as a file."""

from __future__ import annotations

import argparse
import os

from patterndsl.cli.interrupts import importing
from patterndsl.cli.output import say
from patterndsl.cli.specs import pattern_of, single, sizes_of
from patterndsl.diagnostics import error
from patterndsl.files import refuse_unwritable


def run(arguments: argparse.Namespace) -> int:
    """Compiles and writes; refuses before it works where it would refuse to write."""
    path = arguments.output
    if not path.lower().endswith(".safetensors"):
        help = f"write -o {os.path.splitext(path)[0]}.safetensors"
        raise error("E701", f"a plan is a .safetensors file, not {path}", None, help)
    refuse_unwritable(path, overwrite=arguments.force)
    pattern = single(pattern_of(arguments.spec, arguments), "a plan file")
    sizes = sizes_of(pattern, arguments, None)
    bound = pattern.bind(**sizes)
    with importing():
        from patterndsl.runtime import program  # noqa: F401  # what `compile` imports
    pattern.compile(**sizes).save(path, overwrite=arguments.force)
    groups = f"{bound.num_heads} heads" + (f" in {len(bound.groups)} groups" if len(bound.groups) > 1 else "")
    tiles = ""
    if bound.inputs:
        names = ", ".join(shape.name for shape in bound.inputs)
        tiles = f"; its tiles depend on {names} and are found when it runs"
    say(f"{path}: {os.path.getsize(path):,} bytes, {groups}{tiles}")
    return 0
