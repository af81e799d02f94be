"""patterndsl: attention patterns as small declarative specs, compiled to sparse attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patterndsl.diagnostics import Diagnostic, InputError, PatternError
from patterndsl.loading import load, load_program, parse
from patterndsl.pattern import Pattern

if TYPE_CHECKING:
    from patterndsl import nn as nn
    from patterndsl import sets as sets
    from patterndsl.analysis.verdict import Proven as Proven
    from patterndsl.analysis.verdict import Refuted as Refuted
    from patterndsl.analysis.verdict import Unknown as Unknown
    from patterndsl.decoding import Cache as Cache
    from patterndsl.functional import attention as attention
    from patterndsl.runtime.packed import documents as documents
    from patterndsl.runtime.packed import present as present
    from patterndsl.runtime.program import Program as Program

__version__ = "0.1.0"
__all__ = [
    "Cache",
    "Diagnostic",
    "InputError",
    "Pattern",
    "PatternError",
    "Program",
    "Proven",
    "Refuted",
    "Unknown",
    "attention",
    "documents",
    "load",
    "load_program",
    "nn",
    "parse",
    "present",
    "sets",
]

_LAZY = {
    "Cache": "patterndsl.decoding",
    "Program": "patterndsl.runtime.program",
    "Proven": "patterndsl.analysis.verdict",
    "Refuted": "patterndsl.analysis.verdict",
    "Unknown": "patterndsl.analysis.verdict",
    "attention": "patterndsl.functional",
    "documents": "patterndsl.runtime.packed",
    "present": "patterndsl.runtime.packed",
}


def __dir__() -> list[str]:
    """What is public, with the names that are not imported yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> object:
    """What is slow to import waits until it is first asked for."""
    from importlib import import_module

    if name in ("nn", "sets"):
        return import_module(f"patterndsl.{name}")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'patterndsl' has no attribute {name!r}")
