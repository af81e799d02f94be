"""`patterndsl schema`: the JSON Schema of spec files."""

from __future__ import annotations

import argparse

from patterndsl.cli.output import say
from patterndsl.syntax.schema import schema_text


def run(arguments: argparse.Namespace) -> int:
    """Prints the schema."""
    say(schema_text().rstrip("\n"))
    return 0
