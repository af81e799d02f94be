"""Where are the grammar files and the examples? Beside the package in a source checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path


def examples_folder() -> Path:
    """The top-level `examples/` folder, beside the package or inside it."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "examples"
    return installed if installed.exists() else package.parent / "examples"


def grammar_text(name: str) -> str:
    """The text of a file of the top-level `grammar/` folder."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "grammar" / name
    return (installed if installed.exists() else package.parent / "grammar" / name).read_text(encoding="utf-8")
