"""Which colours does a picture have? One restrained palette, in a light and a dark form."""

from __future__ import annotations

from typing import Literal, TypeAlias

Tone: TypeAlias = Literal[
    "page", "empty", "partial", "full", "both", "first", "second", "mixed", "frame", "text", "muted"
]

LIGHT: dict[Tone, str] = {
    "page": "#ffffff",
    "empty": "#f3f4f6",
    "partial": "#a5c8ec",
    "full": "#1f5fa8",
    "both": "#c5cbd3",
    "first": "#1f5fa8",
    "second": "#d06a12",
    "mixed": "#7a3e9d",
    "frame": "#9aa3ae",
    "text": "#1c2127",
    "muted": "#5d6772",
}
DARK: dict[Tone, str] = {
    "page": "#14181d",
    "empty": "#1e242b",
    "partial": "#2f5f8f",
    "full": "#7fbcf5",
    "both": "#47525e",
    "first": "#7fbcf5",
    "second": "#f0a35e",
    "mixed": "#c79be0",
    "frame": "#56616d",
    "text": "#e8ebee",
    "muted": "#9ba5b0",
}


def fills(tones: dict[Tone, str]) -> str:
    """SVG style rules: a class per tone."""
    return " ".join(f".{tone} {{ fill: {color} }}" for tone, color in tones.items())


def variables(tones: dict[Tone, str]) -> str:
    """CSS custom properties: one per tone."""
    return " ".join(f"--{tone}: {color};" for tone, color in tones.items())
