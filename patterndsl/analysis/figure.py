"""What is known of a figure, and how? A number is never said without its certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Certainty: TypeAlias = Literal["Exact", "UpperBound", "LowerBound", "Expected", "Measured"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number in `unit`, how certain it is, and where that comes from.

    Exact: so it is. UpperBound: not more. LowerBound: not less. Expected: what a stated model predicts. Measured: seen
    in a run.
    """

    value: float
    certainty: Certainty
    unit: str = ""
    how: str = ""

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"value": self.value, "certainty": self.certainty, "unit": self.unit, "how": self.how}

    def __str__(self) -> str:
        return f"{readable(self.value, self.unit)} ({self.certainty})"


def readable(value: float, unit: str = "") -> str:
    """1,234,567 pairs, 3.2 GFLOP, 12.5 MiB, 0.43 ms."""
    if unit == "bytes":
        return _scaled(value, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))
    if unit == "FLOP":
        return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))
    if unit == "s":
        return _scaled(value * 1e6, 1000, ("µs", "ms", "s"))
    number = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3g}"
    return f"{number} {_singular(unit) if value == 1 else unit}".strip()


def _singular(unit: str) -> str:
    """pairs, keys and tiles, of which there is one."""
    return unit.removesuffix("s") if len(unit) > 1 else unit


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    at = 0
    while abs(value) >= step and at + 1 < len(units):
        value, at = value / step, at + 1
    return f"{value:,.0f} {units[at]}" if at == 0 and value >= 10 else f"{value:.3g} {units[at]}"
