"""What does the terminal get to see? Diagnostics, tables and bars: the one place that asks what the output can show."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Protocol, TextIO

from patterndsl.diagnostics import Diagnostic, error, render
from patterndsl.files import refuse_unwritable

if TYPE_CHECKING:
    from rich.progress import Progress

SLOW = 1.0
"""Seconds after which a bar appears."""


class OnEvent(Protocol):
    """Called as (what, done, total) while something takes long."""

    def __call__(self, what: str, done: int, total: int, /) -> None: ...


def open_streams() -> None:
    """Streams that take any sign: one that a terminal has not is no reason to stop, nor is a stream that is closed."""
    sys.stdout, sys.stderr = (_open(stream) for stream in (sys.stdout, sys.stderr))


def _open(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by who started the process
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")
    return stream


def drop_output() -> None:
    """Lets what is still buffered go into nothing at exit, where nobody can read it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """A line of the result. Raises as `write` does."""
    write(text + "\n")


def write(text: str, *, flush: bool = False) -> None:
    """A part of the result. Raises PatternError (E602) where it cannot be written, and BrokenPipeError where nobody
    reads on."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as failed:
        drop_output()
        raise error(
            "E602", f"cannot write the output: {failed.strerror or failed}", None, "choose another place"
        ) from None


def say_json(data: object) -> None:
    """The result as JSON."""
    say(json.dumps(data, indent=2, ensure_ascii=not shows_unicode(sys.stdout)))


def picture_format(arguments: argparse.Namespace, formats: Sequence[str]) -> str | None:
    """The output's suffix. Raises PatternError (E701) on another one, (E602) where it cannot be written."""
    if arguments.output is None:
        return None
    suffix: str = os.path.splitext(arguments.output)[1].lower()
    if suffix not in formats:
        raise error("E701", f"a picture cannot be {arguments.output}", None, f"end it with {', '.join(formats)}")
    refuse_unwritable(arguments.output, overwrite=arguments.force)
    return suffix


def report(diagnostics: Sequence[Diagnostic]) -> None:
    """What is wrong, where the user looks for it; where that takes nothing, the exit code must do."""
    with suppress(OSError):
        sys.stderr.write(render(diagnostics, color=shows_color(sys.stderr)) + "\n")


def shows_color(stream: TextIO) -> bool:
    """A terminal that has colours; NO_COLOR and FORCE_COLOR decide where they are set."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def shows_unicode(stream: TextIO) -> bool:
    """Whether the stream is written in some form of Unicode."""
    return (stream.encoding or "").lower().replace("-", "").startswith("utf")


def width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return max(40, shutil.get_terminal_size((80, 24)).columns)


def table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Aligned columns, two spaces apart; `right` names the columns of numbers."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(widths[at]) if at in right else cell.ljust(widths[at]) for at, cell in enumerate(row)
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


@contextmanager
def progress() -> Iterator[OnEvent]:
    """A bar on a terminal's stderr for what takes longer than a second; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total, /: None
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    """rich's bar, imported and shown when the first second has passed."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: Progress | None = None

    def __call__(self, what: str, done: int, total: int, /) -> None:
        if time.monotonic() - self._began < SLOW:
            return
        if self._shown is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._shown = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
            self._shown.add_task(what, total=total)
            self._shown.start()
        self._shown.update(self._shown.task_ids[0], description=what, completed=done, total=total)
        self._shown.refresh()  # by hand: a thread that refreshes would disturb what is being timed

    def stop(self) -> None:
        if self._shown is not None:
            self._shown.stop()
