"""Where is each key of each batch row? In pages, which rows take as they grow and give back when they are reset.

A row has places: first those of its ring, then those of keys that last, in order. A page is so many places. All of it
is decided here, on the host, in integers: a device is told, and never asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from patterndsl.analysis.holding import Holding

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

AHEAD = 4096
"""Positions for which is found at once which keys last."""


class Writes(NamedTuple):
    """Which new tokens are stored where, int64 [number of them]: token `token` of all rows, one row after the other,
    at place `inside` of page `page`."""

    token: Integers
    page: Integers
    inside: Integers


class Pages:
    """The places of keys, for batch rows of different lengths.

    ring: how many of the newest keys are in the ring, at least `holding.newest` where that is not 0. A key that lasts
    is also stored behind the ring; it counts there once it has left the ring. lasting: the positions of these keys, as
    far as any row reaches.
    """

    def __init__(self, holding: Holding, batch: int, max_queries: int, page: int) -> None:
        self.holding, self.batch, self.page = holding, batch, page
        self.ring = holding.newest + max_queries - 1 if holding.newest else 0
        self.ring_pages = -(-self.ring // page)
        self.lengths = np.zeros(batch, dtype=np.int64)
        self.lasting = np.zeros(0, dtype=np.int64)
        self.known = 0  # positions below are known to last, or not to
        self.table = np.full((batch, max(1, self.ring_pages)), -1, dtype=np.int32)
        self.taken = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)  # pages: of the ring, behind it
        self.free = list[int]()
        self.num_pages = 0
        self.version = 0  # of the table

    @property
    def older(self) -> Integers:
        """int64 [batch]: how many keys that last have left the ring."""
        return np.searchsorted(self.lasting, self.lengths - self.ring)

    @property
    def most_columns(self) -> int:
        """How many columns of the table a row attends to, of the row with most."""
        older, in_ring = self.older, -(-np.minimum(self.lengths, self.ring) // self.page)
        return int(np.where(older > 0, self.ring_pages - (-older // self.page), in_ring).max(initial=0))

    def append(self, counts: Integers, num_tokens: int) -> Writes:
        """Makes place for the first counts[row] of num_tokens new tokens of each row."""
        starts, stops = self.lengths, self.lengths + counts
        self._learn(int(stops.max(initial=0)))
        first, last = np.searchsorted(self.lasting, starts), np.searchsorted(self.lasting, stops)
        self._take(stops, last)
        ring_starts = np.maximum(starts, stops - self.ring)
        ring_rows, ring_keys = _spread(ring_starts, np.maximum(stops, ring_starts))
        rows, ranks = _spread(first, last)
        turn = ring_keys % max(1, self.ring)
        ring_at = turn // self.page, turn % self.page
        at = self.ring_pages + ranks // self.page, ranks % self.page
        row = np.concatenate([ring_rows, rows])
        page, inside = (np.concatenate(parts) for parts in zip(ring_at, at, strict=True))
        key = np.concatenate([ring_keys, self.lasting[ranks]])
        self.lengths = stops
        return Writes(row * num_tokens + key - starts[row], self.table[row, page].astype(np.int64), inside)

    def reset(self, rows: Iterable[int]) -> None:
        """The rows are empty again; their pages are free."""
        for row in rows:
            held = self.table[row]
            self.free += held[held >= 0].tolist()
            self.table[row], self.lengths[row] = -1, 0
            self.taken[0][row] = self.taken[1][row] = 0
            self.version += 1

    def _learn(self, stop: int) -> None:
        """Which keys last, up to some positions behind the longest row."""
        if stop > self.known:
            upto = -(-stop // AHEAD) * AHEAD
            self.lasting = np.append(self.lasting, self.holding.lasting(self.known, upto))
            self.known = upto

    def _take(self, stops: Integers, num_lasting: Integers) -> None:
        """Pages for rows of such lengths, with so many keys that last."""
        in_ring = -(-np.minimum(stops, self.ring) // self.page)
        behind = -(-num_lasting // self.page)
        parts = [
            _spread(have, np.maximum(have, want)) for have, want in zip(self.taken, (in_ring, behind), strict=True)
        ]
        (ring_rows, ring_at), (rows, at) = parts
        if not len(ring_rows) and not len(rows):
            return
        self.taken = np.maximum(self.taken[0], in_ring), np.maximum(self.taken[1], behind)
        width = self.ring_pages + int(behind.max(initial=0))
        if width > self.table.shape[1]:
            wider = np.full((self.batch, max(width, 2 * self.table.shape[1])), -1, dtype=np.int32)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
        more = len(ring_rows) + len(rows) - len(self.free)
        if more > 0:
            self.free += range(self.num_pages, self.num_pages + more)
            self.num_pages += more
        places = np.concatenate([ring_rows, rows]), np.concatenate([ring_at, self.ring_pages + at])
        self.table[places] = [self.free.pop() for _ in places[0]]
        self.version += 1


def _spread(starts: Integers, stops: Integers) -> tuple[Integers, Integers]:
    """Every row and number of the ranges [starts[row], stops[row])."""
    lengths = stops - starts
    rows = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return rows, np.arange(len(rows)) + (starts - before)[rows]
