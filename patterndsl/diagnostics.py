"""What does a user see when something of theirs is wrong, or could be better?

One `Diagnostic` per mistake or advice: a stable code, the matter in the user's words, the place with a caret, and the
cure. This module knows nothing of the language; it neither finds mistakes nor decides how many to report.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

MAX_ERRORS = 20
"""More than this many independent errors are not reported at once."""

CODES: dict[str, str] = {
    # E1: the text does not parse
    "E101": "syntax error",
    "E102": "the text is too long or nested too deeply",
    # E2: names and kinds
    "E201": "unknown name",
    "E202": "unknown attribute",
    "E203": "wrong kind: an integer where a predicate belongs, or the reverse",
    "E204": "wrong number of arguments, or an unknown argument",
    "E205": "a definition uses itself",
    "E206": "definitions expand without bound",
    "E207": "a list is used without an index, or indexed by something else than head or layer",
    "E208": "a name is taken",
    "E209": "an argument depends on what it must not depend on",
    "E210": "a source that cannot be attended so",
    "E211": "a score that cannot be had for this",
    # E3: the YAML around the expressions
    "E301": "not YAML",
    "E302": "unknown key",
    "E303": "duplicate key",
    "E304": "wrong type of value",
    "E305": "missing key",
    "E306": "a word that YAML 1.1 reads as a truth value",
    "E307": "import that cannot be read",
    "E308": "import cycle",
    # E4: parameters and sizes
    "E401": "unknown parameter",
    "E402": "a parameter outside its domain, or without a value",
    "E403": "division or modulo by something that is not positive",
    "E404": "grid that does not multiply to N",
    "E405": "list shorter than the heads or layers that index it",
    "E406": "a size that cannot be",
    "E407": "a function outside its domain, or a number beyond 62 bits",
    # E5: tensors
    "E501": "missing or unknown input",
    "E502": "input of the wrong shape or dtype",
    "E503": "query, key and value that do not fit together or do not fit the program",
    "E504": "something that would need N x N memory above the limit",
    "E505": "a backend that cannot do this",
    "E506": "a claim that is not there, or that needs another pattern",
    # E6: files
    "E601": "file that cannot be read",
    "E602": "file that cannot be written",
    "E603": "damaged or foreign plan file",
    "E604": "damaged or foreign file of a machine's constants",
    # E7: the command line
    "E701": "wrong command line",
    # W2: names
    "W201": "a name by which another library counts differently",
    "W202": "a name that nothing uses",
    # W3: what is kept
    "W301": "queries that attend no key",
    "W302": "a term that changes nothing",
    "W303": "causal but for a few queries",
    "W304": "draws that the rest of the pattern drops",
    "W305": "a bias that is no finite number",
    # W4: what it costs
    "W401": "far more pairs computed than kept",
    "W402": "tiles of another size would compute far fewer pairs",
    "W403": "a last tile that holds few positions",
}

Severity: TypeAlias = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Source:
    """A text and the name that the user knows it by; `importer` names the spec that brought it in."""

    name: str
    text: str
    importer: str | None = None

    def line_and_column(self, offset: int) -> tuple[int, int]:
        """1-based line and column of a character offset."""
        before = self.text[:offset]
        return before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1

    def line_text(self, line: int) -> str:
        lines = self.text.split("\n")
        return lines[line - 1].rstrip("\r") if line <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class SourceRange:
    """Characters [start, stop) of a source."""

    source: Source
    start: int
    stop: int

    def joined(self, other: SourceRange) -> SourceRange:
        return SourceRange(self.source, min(self.start, other.start), max(self.stop, other.stop))


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One mistake or advice: what is wrong, where, and what to write instead. With `is_strict` advice is an error."""

    code: str
    message: str
    where: SourceRange | None = field(default=None)
    help: str | None = field(default=None)
    label: str = field(default="")
    is_strict: bool = field(default=False)

    def __post_init__(self) -> None:
        assert self.code in CODES, f"diagnostic code {self.code} is not in the catalogue"

    @property
    def severity(self) -> Severity:
        """An error, or a warning for the codes that begin with W."""
        return "warning" if self.code.startswith("W") and not self.is_strict else "error"

    def to_dict(self) -> dict[str, object]:
        """Plain data; lines and columns are 1-based, `stop` offsets are exclusive."""
        data: dict[str, object] = {
            "code": self.code,
            "severity": self.severity,
            "message": self.message,
            "help": self.help,
        }
        if self.where is not None:
            line, column = self.where.source.line_and_column(self.where.start)
            stop_line, stop_column = self.where.source.line_and_column(self.where.stop)
            data |= {
                "file": self.where.source.name,
                "line": line,
                "column": column,
                "stop_line": stop_line,
                "stop_column": stop_column,
                "source_line": self.where.source.line_text(line),
                "label": self.label,
            }
        return data


class PatternError(Exception):
    """One or more mistakes of the user. `str()` is the full plain text with carets."""

    def __init__(self, diagnostics: Diagnostic | Sequence[Diagnostic]) -> None:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = found[:MAX_ERRORS]
        super().__init__(render(self.diagnostics))


class InputError(PatternError, ValueError):
    """Tensors that do not fit: also a ValueError, which is what callers of tensor code catch."""


class MissingError(InputError, AttributeError):
    """What a kind of object does not have: also an AttributeError, so that hasattr says no."""


def error(
    code: str, message: str, where: SourceRange | None = None, help: str | None = None, label: str = ""
) -> PatternError:
    """A PatternError with one diagnostic, ready to raise."""
    return PatternError(Diagnostic(code, message, where, help, label))


def input_error(code: str, message: str, help: str | None = None) -> InputError:
    """An InputError with one diagnostic, ready to raise."""
    return InputError(Diagnostic(code, message, None, help))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that the user most likely meant, if one is near; above all the same in other cases."""
    names = sorted(set(known))
    other_case = next((other for other in names if other.casefold() == name.casefold()), None)
    return other_case or next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


MAX_LINE_WIDTH = 160


# what a terminal would obey, or show as nothing: control and direction characters, half of a character
_UNSEEN = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")


def _visible(text: str) -> str:
    """The text on one line, as many characters long, without what does not show."""
    return _UNSEEN.sub("\ufffd", text)


def render(diagnostics: Sequence[Diagnostic], color: bool = False) -> str:
    """All diagnostics as text; colours only if the caller says that the output can show them."""
    return "\n\n".join(_render_one(diagnostic, color) for diagnostic in diagnostics)


def _render_one(diagnostic: Diagnostic, color: bool) -> str:
    def paint(text: str, ansi: str) -> str:
        return f"\x1b[{ansi}m{text}\x1b[0m" if color and text else text

    accent = "1;31" if diagnostic.severity == "error" else "1;33"
    title = paint(f"{diagnostic.severity}[{diagnostic.code}]", accent)
    lines = [title + paint(f": {_visible(diagnostic.message)}", "1")]
    if diagnostic.where is not None:
        place = diagnostic.where
        line, column = place.source.line_and_column(place.start)
        text = place.source.line_text(line)
        width = max(1, min(place.stop - place.start, len(text) - column + 1))
        if len(text) > MAX_LINE_WIDTH:  # show the neighbourhood of the caret, not a ten-megabyte line
            left = max(0, column - 1 - MAX_LINE_WIDTH // 2)
            text, column = text[left : left + MAX_LINE_WIDTH], column - left
            width = min(width, len(text) - column + 1)
        # tabs keep their width under the caret
        pad = "".join("\t" if char == "\t" else " " for char in text[: column - 1])
        gutter = " " * len(str(line))
        real_column = place.source.line_and_column(place.start)[1]
        by = f" (imported by {_visible(place.source.importer)})" if place.source.importer else ""
        lines.append(f"{gutter}{paint('-->', '34')} {_visible(place.source.name)}:{line}:{real_column}{by}")
        lines.append(f"{gutter} {paint('|', '34')}")
        lines.append(f"{paint(str(line), '34')} {paint('|', '34')} {_visible(text)}")
        caret = paint("^" * max(1, width) + (f" {diagnostic.label}" if diagnostic.label else ""), accent)
        lines.append(f"{gutter} {paint('|', '34')} {pad}{caret}")
    if diagnostic.help:
        lines.append(f"  {paint('= help:', '36')} {_visible(diagnostic.help)}")
    return "\n".join(lines)
