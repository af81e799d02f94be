"""`patterndsl explain`: which plan runs, why, and when does something else run?"""

from __future__ import annotations

import argparse

from patterndsl.cli.output import progress, say, say_json
from patterndsl.cli.specs import pattern_of, sizes_of
from patterndsl.composite import Composite

UNPLANNED = {
    "scored": "no plan: block by block over the live tiles, as scores have a bias or a cap, or are made up",
    "summed": "no plan: sums of the features of keys, and no pair is looked at",
}
"""How terms run that no plan is made for, see `Branch.runs`."""


def run(arguments: argparse.Namespace) -> int:
    """Prints the explanation."""
    pattern = pattern_of(arguments.spec, arguments)
    is_composite = isinstance(pattern, Composite)
    sizes = sizes_of(arguments, None)
    terms, unplanned = {"": pattern}, dict[str, str]()
    if isinstance(pattern, Composite):
        parts = pattern.terms_at(sizes["layer"])
        terms = {term.name: term.pattern for term in parts}
        runs = {term.name: pattern.branches[term.branch].runs for term in parts}
        unplanned = {name: UNPLANNED[how] for name, how in runs.items() if how != "planned"}
    if unplanned:
        pattern.fit(sizes["n"] or sizes["q_len"], heads=sizes["heads"], layer=sizes["layer"])
    with progress() as on_event:
        found = {
            name: term.explain(
                **sizes,
                head_dim=arguments.head_dim or 64,
                device=arguments.device,
                train=arguments.train,
                on_event=on_event,
            )
            for name, term in terms.items()
            if name not in unplanned
        }
    if arguments.json:
        data = {
            name: {"plan": None, "runs": unplanned[name]} if name in unplanned else found[name].to_dict()
            for name in terms
        }
        say_json(data if is_composite else data[""])
    else:
        said = {name: unplanned.get(name) or str(found[name]) for name in terms}
        say("\n\n".join(f"of {name}: {text}" if name else text for name, text in said.items()))
    return 0
