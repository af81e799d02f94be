"""Where does what a verdict looks up lie in memory? Its tables one after the other, by the forms of inputs alone.

So it is found once for all calls whose inputs have the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from patterndsl.ir.index import Facet
from patterndsl.lower.listings import Listing
from patterndsl.runtime.kernels.verdicts import OfLists, OfRanges, OfTiles, Verdicts
from patterndsl.sema.parameters import Sizes

Form: TypeAlias = tuple[int, ...]
"""[length], [rows, length] or [rows, heads, length]."""


class TileJob(NamedTuple):
    """Bounds [rows, heads, tiles] of an input's facet, from place `first` on: of tiles of `size` positions each of
    start..stop."""

    name: str
    facet: Facet
    first: int
    cells: int
    tiles: int
    length: int
    start: int
    stop: int
    size: int


class RangeJob(NamedTuple):
    """Trees of bounds [tables, 2 x leaves] of an input's facet."""

    name: str
    facet: Facet
    first: int
    tables: int
    leaves: int
    length: int


class ListJob(NamedTuple):
    """Bytes [tables, num_rows, num_blocks] of a table of lists."""

    name: str
    first: int
    tables: int
    num_rows: int
    num_blocks: int
    width: int


@dataclass(frozen=True, slots=True)
class Tables:
    """What is made before tiles are told. places: of the verdict's lookups; of_tiles, of_ranges, of_lists: how many
    values there are, of bounds twice as many: least ones, and then greatest ones."""

    places: tuple[int, ...]
    tile_jobs: tuple[TileJob, ...]
    range_jobs: tuple[RangeJob, ...]
    list_jobs: tuple[ListJob, ...]
    of_tiles: int
    of_ranges: int
    of_lists: int


def tables_of(
    verdicts: Verdicts,
    sizes: Sizes,
    blocks: tuple[int, int],
    forms: Mapping[str, Form],
    listings: Mapping[str, Listing],
) -> Tables:
    """The tables of a verdict over such tiles. forms: of the inputs. Those that are of no tiles lie where they do for
    tiles of all sizes."""
    tile_jobs, range_jobs, list_jobs = list[TileJob](), list[RangeJob](), list[ListJob]()
    steps = list[tuple[int, ...]]()
    tiles_end = ranges_end = lists_end = 0
    for lookup in verdicts.lookups:
        rows, heads, length = _outer(forms[lookup.name])
        match lookup:
            case OfTiles(name, facet, side):
                start, stop = (sizes.q_start, sizes.q_start + sizes.q_len) if side == "q" else (0, sizes.kv_len)
                size = blocks[0 if side == "q" else 1]
                each = -(-(stop - start) // size)
                cells = rows * heads * each
                job = TileJob(name, facet, tiles_end, cells, max(1, each), length, start, stop, size)
                tile_jobs.append(job)
                tiles_end += cells
                steps.append((job.first, *_steps(rows, heads, each), 0, 0, 0))
            case OfRanges(name, facet):
                leaves = 1 << max(0, length - 1).bit_length()
                range_jobs.append(RangeJob(name, facet, ranges_end, rows * heads, leaves, length))
                steps.append((ranges_end, *_steps(rows, heads, 2 * leaves), 0, leaves, length))
                ranges_end += rows * heads * 2 * leaves
            case OfLists(name):
                width, num_blocks = listings[name].width, listings[name].num_blocks
                num_rows = length // width
                list_jobs.append(ListJob(name, lists_end, rows * heads, num_rows, num_blocks, width))
                steps.append((lists_end, *_steps(rows, heads, num_rows * num_blocks), num_blocks, 0, 0))
                lists_end += rows * heads * num_rows * num_blocks
    halves = {OfTiles: tiles_end, OfRanges: ranges_end}
    places = list[int]()
    for lookup, (first, row, head, fourth, *others) in zip(verdicts.lookups, steps, strict=True):
        places += [first, row, head, halves.get(type(lookup), fourth), *others]
    return Tables(
        tuple(places), tuple(tile_jobs), tuple(range_jobs), tuple(list_jobs), tiles_end, ranges_end, lists_end
    )


def _outer(form: Form) -> tuple[int, int, int]:
    """Batch rows, heads, and length."""
    *outer, length = form
    return (*outer, 1, 1)[0], (*outer[1:], 1)[0], length


def _steps(rows: int, heads: int, size: int) -> tuple[int, int]:
    """From row to row and from head to head, 0 where all have the same."""
    return (heads * size if rows > 1 else 0), (size if heads > 1 else 0)
