"""`patterndsl explain`: which plan runs, why, and when does something else run?"""

from __future__ import annotations

import argparse

from patterndsl.cli.output import progress, say, say_json
from patterndsl.cli.specs import pattern_of, sizes_of
from patterndsl.composite import Composite


def run(arguments: argparse.Namespace) -> int:
    """Prints the explanation."""
    pattern = pattern_of(arguments.spec, arguments)
    is_composite = isinstance(pattern, Composite)
    terms = {term.name: term.pattern for term in pattern.terms} if isinstance(pattern, Composite) else {"": pattern}
    with progress() as on_event:
        found = {
            name: term.explain(
                **sizes_of(arguments, None),
                head_dim=arguments.head_dim or 64,
                device=arguments.device,
                train=arguments.train,
                on_event=on_event,
            )
            for name, term in terms.items()
        }
    if arguments.json:
        data = {name: item.to_dict() for name, item in found.items()}
        say_json(data if is_composite else data[""])
    else:
        say("\n\n".join(f"of {name}: {item}" if name else str(item) for name, item in found.items()))
    return 0
