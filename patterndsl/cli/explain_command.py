"""`patterndsl explain`: which plan runs, why, and when does something else run?"""

from __future__ import annotations

import argparse

from patterndsl.cli.output import progress, say, say_json
from patterndsl.cli.specs import pattern_of, sizes_of


def run(arguments: argparse.Namespace) -> int:
    """Prints the explanation."""
    pattern = pattern_of(arguments.spec, arguments)
    sizes = sizes_of(pattern, arguments, None)
    with progress() as on_event:
        found = pattern.explain(
            **sizes,
            head_dim=arguments.head_dim or 64,
            device=arguments.device,
            train=arguments.train,
            on_event=on_event,
        )
    if arguments.json:
        say_json(found.to_dict())
    else:
        say(str(found))
    return 0
