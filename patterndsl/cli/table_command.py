"""`patterndsl table`: systems side by side, each row derived from a spec; the survey's own table where it has one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patterndsl.cli.output import picture_format, progress, say, say_json, table
from patterndsl.diagnostics import PatternError, error
from patterndsl.files import write_atomically
from patterndsl.loading import load, parse
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl.survey import Entry
    from patterndsl.systems import System

HEADS = ("system", "class", "time", "memory", "decodable", "decode state", "parameters", "layers", "pairs of a head")
NUMBERS = (6, 7, 8)
MAX_STATE = 28
DIFFERS = "*"
KEY = "≈ seen in expected counts, ≤ inputs decide; memory: scores are not kept, where they are it grows as the time"


@dataclass(frozen=True)
class Row:
    """A system, and what the survey says of it. differing: the columns where the two differ."""

    system: System
    pattern: Pattern
    entry: Entry | None

    @property
    def differing(self) -> tuple[str, ...]:
        """The columns in which the survey says something else."""
        from patterndsl.survey import ORDERS

        if self.entry is None:
            return ()
        found = self.system
        said = {
            "time": (found.time, ORDERS[self.entry.complexity]),
            "classes": (set(found.classes), set(self.entry.classes)),
            "decodable": (found.decodable == "yes", self.entry.decodable),
        }
        return tuple(name for name, (ours, theirs) in said.items() if ours != theirs)

    def cells(self) -> list[str]:
        from patterndsl.systems import MARKS

        found, differing = self.system, self.differing
        marked = {name: DIFFERS * (name in differing) for name in ("time", "classes", "decodable")}
        state = found.state if len(found.state) <= MAX_STATE else found.state[: MAX_STATE - 3] + "..."
        return [
            found.name,
            "+".join(found.classes) + marked["classes"] or "dense",
            MARKS[found.time_certainty] + found.time + marked["time"],
            found.memory,
            found.decodable + marked["decodable"],
            state,
            f"{found.parameters:,}",
            "-" if found.layers is None else str(found.layers),
            found.pairs_at,
        ]

    def notes(self) -> list[str]:
        """That layers differ; and what the survey has in each cell that differs, and why."""
        entry = self.entry
        of_layer = [f"{self.system.name}: its layers differ, this is the first"] * self.system.layers_differ
        if entry is None:
            return of_layer
        printed = {
            "time": entry.complexity,
            "classes": "+".join(entry.classes),
            "decodable": "yes" if entry.decodable else "no",
        }
        words = {"time": "time", "classes": "class", "decodable": "decodable"}
        reasons = {name: entry.reasons.get(name, "no reason known") for name in words}
        return of_layer + [
            f"{self.system.name}, {words[name]}: the survey has {printed[name]}; {reasons[name]}"
            for name in self.differing
        ]

    def to_dict(self) -> dict[str, object]:
        found: dict[str, object] = dict(self.system.to_dict())
        if self.entry is not None:
            found["survey"] = {
                "complexity": self.entry.complexity,
                "decodable": self.entry.decodable,
                "classes": list(self.entry.classes),
                "differing": list(self.differing),
                "notes": self.notes(),
            }
        return found


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, or writes it."""
    suffix = picture_format(arguments, (".md", ".html"))
    found = rows(arguments)
    if suffix is not None:
        text = markdown(found, arguments) if suffix == ".md" else page(found, arguments)
        write_atomically(arguments.output, text.encode(), arguments.force, "--force")
    if arguments.json:
        say_json([row.to_dict() for row in found])
    elif suffix is not None:
        say(f"{arguments.output}: {len(found)} systems")
    else:
        notes = [f"{DIFFERS} {note}" for row in found for note in row.notes()]
        say(table([list(HEADS), *(row.cells() for row in found)], NUMBERS))
        say("\n".join(["", KEY, *notes]))
    return 0


def rows(arguments: argparse.Namespace) -> list[Row]:
    """A row for each spec, of the survey's systems by default."""
    from patterndsl.cli.specs import is_path
    from patterndsl.survey import SURVEY
    from patterndsl.syntax.grammar import examples_folder
    from patterndsl.systems import system

    if arguments.dim % arguments.heads:
        raise error(
            "E701", f"--dim {arguments.dim} is no multiple of {arguments.heads} heads", None, "change one of them"
        )
    asked: list[tuple[Pattern, Entry | None]]
    if arguments.specs:
        asked = [(load(spec) if is_path(spec) else parse(spec), None) for spec in arguments.specs]
    else:
        folder = examples_folder()
        if not folder.is_dir():
            raise PatternError([error("E601", f"there is no folder {folder}", None, "name specs").diagnostics[0]])
        asked = [(load(folder / entry.spec), entry) for entry in SURVEY]
    found = []
    with progress() as on_event:
        for at, (pattern, entry) in enumerate(asked):
            on_event("deriving", at, len(asked))
            row = system(pattern, n=arguments.n, heads=arguments.heads, dim=arguments.dim)
            found.append(Row(row, pattern, entry))
    return found


def markdown(found: list[Row], arguments: argparse.Namespace) -> str:
    """The table with its notes."""
    lines = [
        "| " + " | ".join(HEADS) + " |",
        "|" + "|".join("---:" if at in NUMBERS else "---" for at in range(len(HEADS))) + "|",
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in found]
    notes = [f"- {note}" for row in found for note in row.notes()]
    about = f"N = {arguments.n:,}, {arguments.heads} heads, width {arguments.dim}; {KEY}"
    return "\n".join(
        [*lines, "", about, *(["", f"{DIFFERS} differs from the survey:", "", *notes] if notes else []), ""]
    )


def page(found: list[Row], arguments: argparse.Namespace) -> str:
    """One page of HTML with a picture of each system."""
    from patterndsl.show.systems import Card, systems_page

    cards = []
    for row in found:
        figures = dict(zip(HEADS[1:], row.cells()[1:], strict=True)) | {"decode state": row.system.state}
        figures["pairs"] = row.system.pairs
        cards.append(Card(row.system.name, figures, row.notes(), pictures(row.pattern)))
    title = f"{len(found)} systems at N = {arguments.n:,}, {arguments.heads} heads, width {arguments.dim}"
    return systems_page(title, cards)


PICTURED = 160
"""Positions of a picture, whose parameters are made smaller until they fit."""


def pictures(pattern: Pattern) -> dict[str, list[list[bool]]]:
    """What queries attend of each source, by the names of terms; a term that inputs decide is left out."""
    from patterndsl.analysis.witness import attended, bound_at
    from patterndsl.composite import Composite
    from patterndsl.ir.index import Const
    from patterndsl.ir.relation import inputs_read
    from patterndsl.lower.lookup import Lookup

    terms = {term.name: term.pattern for term in pattern.terms} if isinstance(pattern, Composite) else {"": pattern}
    found = {}
    for name, part in terms.items():
        resolved = part.resolved
        if inputs_read(resolved.relation):
            continue
        defaults = {item.name: item.default.value for item in resolved.params if isinstance(item.default, Const)}
        small = {name: value if value <= 8 else max(4, min(value, PICTURED // 20)) for name, value in defaults.items()}
        try:
            bound = bound_at(resolved, PICTURED, small, 8, 0)
        except PatternError:
            continue
        mask = attended(bound, 0, range(PICTURED), Lookup({}))
        found[name] = [[bool(x) for x in row] for row in mask]
    return found
