"""How long may one question take? A time that all its parts share, asked between their steps.

isl counts its own operations (`sets.limited`) and cannot be interrupted; this is for what it does not count, and for
many small answers that add up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SECONDS = 5.0
"""For one question: a proof, a report, the reach of a pattern."""

_end: ContextVar[tuple[float, float] | None] = ContextVar("end", default=None)
"""When the time is over, and how many seconds it was."""


class GaveUpError(Exception):
    """An answer takes too much work, or isl is missing; the text says which."""


@contextmanager
def within(seconds: float = SECONDS) -> Iterator[None]:
    """The time of what is done inside. A part of a longer question has at most what is left of it."""
    now, outer = time.monotonic(), _end.get()
    end = (now + seconds, seconds)
    token = _end.set(end if outer is None else min(end, outer))
    try:
        yield
    finally:
        _end.reset(token)


def check_time() -> None:
    """Raises GaveUpError when the time is over."""
    end = _end.get()
    if end is not None and time.monotonic() > end[0]:
        raise GaveUpError(f"gave up after {end[1]:g} s")
