"""What does a bound relation look up? Inputs and draws as arrays, by point and by range, on one device.

A range is answered from minima and maxima of aligned power-of-two blocks: at most two blocks cover it, so the answer
is exact for aligned blocks and never too narrow for others. Arrays are NumPy's or PyTorch's (through the array API
standard); this module imports neither PyTorch nor a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import array_api_compat
import numpy as np

from patterndsl.ir.draws import DrawnCells, TableCells, draw, drawn_for
from patterndsl.ir.index import Facet
from patterndsl.ir.interval import Interval, Verdict, of_single_pairs
from patterndsl.ir.meaning import Integers, Truths, listed_by_reading, width_of
from patterndsl.ir.relation import Listed, Random

Array: TypeAlias = Any

FEW_LISTED = 16
"""Lists up to that long are read one key after the other."""
MAX_TRUTHS = 1 << 28
"""Pairs of rows and keys that a table may have, a byte each."""


def namespace(array: Array) -> Any:
    """The array API of an array's library. NumPy has it itself from 2.1 on; a wrapper would import for 0.1 s more."""
    if isinstance(array, np.ndarray) and hasattr(np, "cumulative_sum"):
        return np
    return array_api_compat.array_namespace(array)


@dataclass(frozen=True)
class InputArray:
    """One input: its values, the first position of each one's run, its rank in the stable order by value."""

    values: Array  # int [length]

    @cached_property
    def starts(self) -> Array:
        xp = namespace(self.values)
        if self.values.shape[0] == 0:
            return self.values
        first = xp.ones_like(self.values[:1], dtype=xp.bool)
        changes = xp.concat((first, self.values[1:] != self.values[:-1]))
        return xp.nonzero(changes)[0][xp.cumulative_sum(xp.astype(changes, xp.int64)) - 1]

    @cached_property
    def ranks(self) -> Array:
        xp = namespace(self.values)
        return xp.argsort(xp.argsort(self.values, stable=True), stable=True)

    def facet(self, facet: Facet) -> Array:
        """The array of a facet."""
        return {"value": lambda: self.values, "start": lambda: self.starts, "rank": lambda: self.ranks}[facet]()

    @cached_property
    def _pyramids(self) -> dict[Facet, _Pyramid]:
        return {}

    def pyramid(self, facet: Facet) -> _Pyramid:
        """The block minima and maxima of a facet, built once."""
        if facet not in self._pyramids:
            self._pyramids[facet] = _Pyramid.over(self.facet(facet))
        return self._pyramids[facet]


@dataclass(frozen=True)
class _Pyramid:
    """Minima and maxima of aligned blocks of 1, 2, 4, ... values, level after level in one array."""

    least: Array
    most: Array
    level_starts: tuple[int, ...]

    @staticmethod
    def over(values: Array) -> _Pyramid:
        xp = namespace(values)
        least, most, starts, start = [values], [values], [0], 0
        while least[-1].shape[0] > 1:
            start += least[-1].shape[0]
            starts.append(start)
            least.append(_halved(least[-1], xp.minimum, xp))
            most.append(_halved(most[-1], xp.maximum, xp))
        return _Pyramid(xp.concat(least), xp.concat(most), tuple(starts))

    def bounds(self, low: Array, high: Array) -> Interval:
        """Bounds over [low, high] within the array, inclusive."""
        xp = namespace(low)
        # the number of bits of high - low: blocks of so many positions cover it by two
        level = xp.astype(xp.frexp(xp.astype(high - low, xp.float64))[1], low.dtype)
        level = level.clip(0, len(self.level_starts) - 1)
        start = xp.asarray(self.level_starts, dtype=level.dtype, device=array_api_compat.device(level))[level]
        first, second = start + (low >> level), start + (high >> level)
        return xp.minimum(self.least[first], self.least[second]), xp.maximum(self.most[first], self.most[second])


def _halved(level: Array, pick: Any, xp: Any) -> Array:
    if level.shape[0] % 2:
        level = xp.concat((level, level[-1:]))
    return pick(level[::2], level[1::2])


class Lookup:
    """Points and ranges of inputs and draws: the data side of `member` and of `verdict`.

    inputs: 1-D int64 arrays by name, truth values as 0 and 1. Without inputs everything is NumPy on the host.
    """

    def __init__(self, inputs: Mapping[str, Array] | None = None) -> None:
        self.inputs = {name: InputArray(values) for name, values in (inputs or {}).items()}
        first = next(iter((inputs or {}).values()), None)
        self.xp: Any = namespace(np.zeros(0) if first is None else first)
        self.device: Any = None if first is None else array_api_compat.device(first)
        self._cells: dict[Random | str, DrawnCells] = {}
        self._tables: dict[str, Array | None] = {}

    def integers(self, start: int, stop: int) -> Array:
        """int64 [start, stop) on the device."""
        return self.xp.arange(start, stop, dtype=self.xp.int64, device=self.device)

    def read(self, name: str, facet: Facet, index: Integers) -> Integers:
        values = self.inputs[name].facet(facet)
        length = values.shape[0]
        if isinstance(index, int):
            index = self.integers(index, index + 1)[0]
        if length == 0:
            return index * 0 - 1
        inside = (index >= 0) & (index < length)
        return self.xp.where(inside, values[index.clip(0, length - 1)], -1)

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        pyramid, length = self.inputs[name].pyramid(facet), self.inputs[name].values.shape[0]
        low, high = (self.integers(end, end + 1) if isinstance(end, int) else end for end in index)
        if length == 0:
            return -1, -1
        low, high = self.xp.broadcast_arrays(low, high)
        least, most = pyramid.bounds(low.clip(0, length - 1), high.clip(0, length - 1))
        leaves, misses = (low < 0) | (high >= length), (high < 0) | (low >= length)
        least = self.xp.where(leaves, least.clip(max=-1), least)
        most = self.xp.where(leaves, most.clip(min=-1), most)
        return self.xp.where(misses, -1, least), self.xp.where(misses, -1, most)

    def drawn(self, node: Random, head: Integers, q: Integers) -> Iterable[Integers]:
        keys = draw(node)
        if self.device is None:
            return drawn_for(keys, q)
        return (self._here(column) for column in drawn_for(keys, _on_host(q)))

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> Truths:
        if node not in self._cells:
            self._cells[node] = DrawnCells(draw(node))
        return self._any(self._cells[node], q, k)

    def lists(self, node: Listed, row: Integers, key: Integers) -> Truths:
        """By a table of truths where lists are long and the table is not too large."""
        table = self._table_of(node)
        if table is None:
            return listed_by_reading(self, node, row, key)
        row, key = np.asarray(row), np.asarray(key)
        inside = (row >= 0) & (row < table.shape[0]) & (key >= 0) & (key < table.shape[1])
        return inside & table[np.where(inside, row, 0), np.where(inside, key, 0)]

    def _table_of(self, node: Listed) -> Array | None:
        if node.name not in self._tables:
            self._tables[node.name] = self._table(node)
        return self._tables[node.name]

    def _table(self, node: Listed) -> Array | None:
        """bool [rows, keys]: which row lists which key; None where looking each up one after the other is as good."""
        values, width = self.inputs[node.name].values, width_of(node)
        if width <= FEW_LISTED or not isinstance(values, np.ndarray) or not values.size:
            return None
        lists = values.reshape(-1, width)
        shape = (len(lists), int(lists.max()) + 1)
        if shape[0] * shape[1] > MAX_TRUTHS:
            return None
        found = np.zeros((shape[0], shape[1] + 1), dtype=bool)
        np.put_along_axis(found, lists, True, axis=1)  # -1, what is not listed, is the last place
        return found[:, :-1]

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        if node.name not in self._cells:
            table = self._table_of(node)
            lists = _on_host(self.inputs[node.name].values).reshape(-1, max(1, width_of(node)))
            self._cells[node.name] = DrawnCells(lists) if table is None else TableCells(table)
        return of_single_pairs(row, key, self._any(self._cells[node.name], row, key))

    def _any(self, cells: DrawnCells, q: Interval, k: Interval) -> Truths:
        ends = np.broadcast_arrays(*(np.atleast_1d(_on_host(end)) for end in (*q, *k)))
        return self._here(cells.any_within(*ends))

    def _here(self, array: Array) -> Array:
        return array if self.device is None else self.xp.asarray(array, device=self.device)


def _on_host(array: Integers) -> Any:
    return array if isinstance(array, int) else np.asarray(array.cpu() if hasattr(array, "cpu") else array)
