"""How does one use patterndsl from a shell? Finds the command, runs it, and turns what goes wrong into an exit code.

0: done. 1: something of the user's is wrong, and the diagnostics say what. 2: the command line itself is wrong. 130:
interrupted, while PyTorch is imported by the signal itself. 141: nobody reads the output any more. Each command is a
module here, imported when it is called for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import cast

from patterndsl.cli.arguments import parsed
from patterndsl.cli.output import drop_output, open_streams, report, write
from patterndsl.diagnostics import Diagnostic, PatternError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    open_streams()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        write("", flush=True)
    except PatternError as failed:
        report(failed.diagnostics)
        return 2 if all(found.code == "E701" for found in failed.diagnostics) else 1
    except MemoryError:
        help = "choose smaller sizes: a picture needs what the pattern's draws and inputs need, a run its tensors too"
        report([Diagnostic("E504", "there is not enough memory for this", None, help)])
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    return code


def _run(argv: list[str]) -> int:
    arguments = parsed(argv)
    if arguments is None:  # help or version was all that was asked for
        return 0
    command = import_module(f"patterndsl.cli.{arguments.command}_command")
    try:
        return cast("int", command.run(arguments))
    except PatternError as failed:
        if "heads" in arguments and any(found.code == "E405" for found in failed.diagnostics):
            from patterndsl.cli.specs import heads_of, with_heads

            raise with_heads(failed, heads_of(arguments)) from None
        raise
