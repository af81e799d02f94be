"""Where do the numbers along a picture go? Round positions, a power of two apart, far enough for their labels."""

from __future__ import annotations


def tick_step(cell: int, min_cells: float) -> int:
    """Positions between two ticks of cells of `cell` positions: a power of two of cells, at least min_cells."""
    step = 1
    while step < min_cells:
        step *= 2
    return step * cell


def ticks(length: int, cell: int, min_cells: float) -> list[int]:
    """Tick positions in [0, length), from 0 on. A tick too near to the far edge for its label is still there."""
    return list(range(0, length, tick_step(cell, min_cells)))
