"""How long does a piece of a plan take on a device? Work over a rate that depends on its shape, plus what a call costs.

The factors below were fitted by hand to what benchmarks/plans.py measured; rates are those of a machine, see
`lower.devices`. They decide between plans: what matters is their order and not their last digit.
"""

from __future__ import annotations

from dataclasses import dataclass

from patterndsl.ir.draws import constant
from patterndsl.ir.relation import draws_in
from patterndsl.lower.devices import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, Kernel, Machine
from patterndsl.lower.segments import num_segments
from patterndsl.lower.shapes import (
    Band,
    Keys,
    Masked,
    Piece,
    Sparse,
    Triangle,
    longest_column,
    longest_row,
    num_rows,
    num_runs,
)
from patterndsl.lower.tiles import Tiles

BACKWARD = BACKWARD_PRODUCTS / FORWARD_PRODUCTS
"""Products of a backward pass to those of a forward pass."""

MASKING = 1.03
"""How much longer a pair takes on the CPU with a mask added to its score."""
FORWARD_ALONE, BACKWARD_ALONE = 2.0, 4.0
"""How much longer a unit of a GPU takes for a tile, forward and backward, where others have nothing left to do."""
ORDERED = 1.45
"""How much longer a tile of patches takes on a GPU than the model else says: its rows are loaded one by one, and not by
an engine that copies tiles, and it is asked in digits of positions."""
SUMMED = 9.0
"""Rows that the backward pass of dense kernels on a GPU reads and writes more: it sums query gradients in float32."""
DRAWN = 0.7
"""How much longer a masked tile takes on a GPU for each key that is drawn, to a full one: a pair is compared
with all of these."""
SCATTERED = 1.0
"""How much longer reading a row of a key takes that stands by itself, mostly in the cache of a GPU."""
APART = 2.0
"""How much longer a kernel of our own takes to read the results that it goes on from where rows lie apart."""
SEGMENT = 0.5
"""Of what a call of the gathered kernel takes, for each further length of its lists."""
BEGUN = 150
"""Keys that a block of queries could do in the time that a block-sparse kernel takes to begin a row of tiles, or a run
of them where it is another's."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Predicted seconds of a forward and of a backward pass, for one batch row."""

    forward: float
    backward: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def of(self, train: bool) -> float:
        """What counts: forward alone, or both."""
        return self.forward + self.backward if train else self.forward


NO_COST = Cost(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Moved:
    """Predicted bytes that a forward and a backward pass read and write, for one batch row."""

    forward: int
    backward: int

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.forward + other.forward, self.backward + other.backward)


def kernel_of(piece: Piece, machine: Machine) -> Kernel:
    """What runs the piece."""
    if isinstance(piece.shape, Sparse):
        return machine.sparse_kernel
    if isinstance(piece.shape, Keys):
        return "triton"
    return "single" if piece.geometry.q.length == piece.geometry.k.length == 1 else "sdpa"


def cost(piece: Piece, machine: Machine, *, num_heads: int, head_dim: int, is_first: bool = False) -> Cost:
    """The predicted time of a piece, and of merging what it gives. is_first: whether a GPU merges it with nothing, as
    no pass comes before it; on a CPU the constants are those of passes that merge."""
    geometry = piece.geometry
    rows = num_heads * head_dim * machine.itemsize / machine.bandwidth  # seconds to read a position of all heads once
    q_rows = geometry.num_rows
    merging = NO_COST if is_first and machine.is_gpu else _merging(piece, machine, rows)
    if kernel_of(piece, machine) == "single":
        return Cost(machine.dense_call + 8.0 * rows * q_rows, machine.dense_call + 16.0 * rows * q_rows) + merging
    if isinstance(piece.shape, Sparse):
        return _sparse(piece, piece.shape, machine, num_heads, head_dim) + merging
    if isinstance(piece.shape, Keys):
        return _by_keys(piece, machine, rows) + merging
    rate = machine.band_rate if isinstance(piece.shape, Band) else machine.dense_rate
    if isinstance(piece.shape, Masked):
        rate /= MASKING
    calls = geometry.num_groups if isinstance(piece.shape, Band) else 1
    work = 4.0 * head_dim * computed_pairs(piece, machine) * num_heads / (rate * _fullness(piece, machine))
    found = Cost(
        calls * machine.dense_call + work, calls * machine.dense_call + BACKWARD * work / machine.backward_rate
    )
    if machine.is_gpu:
        found = found + Cost(0.0, SUMMED * rows * q_rows)
    return found + _copying(piece, machine, rows) + merging


def _merging(piece: Piece, machine: Machine, rows: float) -> Cost:
    """Of merging a result into that of other passes, and of adding gradients: two read and one written. A kernel that
    goes on from what is there reads one more. rows: seconds to read a position once."""
    times = 3.0
    if kernel_of(piece, machine) == "triton":
        times = 1.0 if piece.geometry.q.axes[-1].stride == 1 else APART
    q_rows, k_rows = piece.geometry.num_rows, piece.geometry.num_groups * piece.geometry.k.length
    return Cost(times * rows * q_rows, times * rows * (q_rows + 2 * k_rows))


def _fullness(piece: Piece, machine: Machine) -> float:
    """The share of its rate that a dense kernel reaches: what each call and each row of scores begins with is lost, and
    on a GPU what its tiles have beyond a group."""
    tall, wide = piece.geometry.q.length, piece.geometry.k.length
    if isinstance(piece.shape, Band):
        tall, wide = piece.shape.mask.shape
    rows, keys = (_whole(side, machine.grain) for side in (tall, wide)) if machine.is_gpu else (tall, wide)
    return tall / (rows + machine.short) * wide / (keys + machine.few)


def _whole(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def moved(piece: Piece, machine: Machine, *, num_heads: int, head_dim: int) -> Moved:
    """The bytes of a piece: what each group reads and writes, once, and the merge of what it gives.

    Forward query, key, value and output; backward these, the output's gradient and three more. A key that several
    groups or tiles read counts once for each group, and for the tiles of a band once.
    """
    geometry = piece.geometry
    row = num_heads * head_dim * machine.itemsize
    q_rows, k_rows = geometry.num_rows, geometry.num_groups * geometry.k.length
    forward, backward = 2 * q_rows + 2 * k_rows, 4 * q_rows + 4 * k_rows
    merged, added = 3 * q_rows, 3 * (q_rows + 2 * k_rows)
    copied = 2 * _copied_rows(piece, machine)  # read and written
    return Moved(row * (forward + copied + merged), row * (backward + 2 * copied + added))


def computed_pairs(piece: Piece, machine: Machine) -> float:
    """Pairs that a kernel computes, over all groups: causal ones skip what lies whole grains ahead."""
    if not isinstance(piece.shape, Triangle):
        return float(piece.num_computed)
    length = piece.geometry.q.length
    return piece.geometry.num_groups * length * min(length, (length + machine.grain) / 2)


def _sparse(piece: Piece, shape: Sparse, machine: Machine, num_heads: int, head_dim: int) -> Cost:
    """The work of all tiles, but no less than that of the longest row, and backward of the longest column too."""
    geometry = piece.geometry
    is_cut = machine.sparse_kernel == "triton"  # long rows and columns are, so that none is a tail
    num_drawn = sum(constant(node.count) for node in draws_in(shape.relation)) if machine.is_gpu else 0
    rate = machine.sparse_rate / (ORDERED if is_cut and shape.orders is not None else 1.0)

    def seconds(tiles: Tiles) -> tuple[float, float]:
        """Of a full tile, and of all."""
        num_full = int(tiles.is_full.sum())
        tile = 4.0 * head_dim * tiles.q_block * tiles.kv_block / rate
        number = num_full + machine.partial * (tiles.num_tiles - num_full)
        if machine.is_gpu:
            number += DRAWN * num_drawn * (tiles.num_tiles - num_full)
            begun = num_rows(tiles) if is_cut else num_runs(tiles)
            number += begun * BEGUN / tiles.kv_block
        return tile, tile * number * geometry.num_groups * num_heads

    fine, forward = seconds(shape.in_inference)
    tile, work = seconds(shape.tiles)
    if machine.is_gpu and not is_cut:
        forward = max(forward, fine * machine.units * FORWARD_ALONE * longest_row(shape.in_inference))
    alone = 0.0 if is_cut else tile * machine.units * (BACKWARD_ALONE if machine.is_gpu else 1)
    row, column = (max(work, alone * most) for most in (longest_row(shape.tiles), longest_column(shape.tiles)))
    backward = (BACKWARD - 1) / 2 / machine.backward_rate  # each of its two parts, over rows and over columns
    # a forward pass of training has the coarse tiles; what it takes longer is added here
    found = Cost(forward, max(0.0, work - forward) + backward * (row + column) + work / machine.backward_rate)
    rows = num_heads * head_dim * machine.itemsize / machine.bandwidth
    if machine.sparse_kernel == "gathered":
        found = found + Cost(3.0 * rows * geometry.num_rows, 6.0 * rows * geometry.num_rows)
        further = SEGMENT * machine.sparse_call * max(0, num_segments(shape.tiles) - 1)
        found = found + Cost(further, 2.0 * further)
    found = found + _copying(piece, machine, rows)
    return found + Cost(machine.sparse_call, machine.sparse_call)


def _by_keys(piece: Piece, machine: Machine, rows: float) -> Cost:
    """A pair reads its key and value; backward again, and from the key's side its query and the output's gradient."""
    pairs = SCATTERED * rows * piece.num_computed
    return Cost(machine.sparse_call + 2.0 * pairs, 2.0 * machine.sparse_call + 4.0 * pairs)


def _copying(piece: Piece, machine: Machine, rows: float) -> Cost:
    """Of reading and writing what is copied, far from the order of memory. rows: seconds to read a position once."""
    copied = 4.0 * rows * _copied_rows(piece, machine)
    return Cost(copied, 2.0 * copied)


def _copied_rows(piece: Piece, machine: Machine) -> int:
    """Positions of query, key and value that are copied since their order has no single stride, and of the output that
    is put back. Kernels of our own take positions in any order where they lie."""
    geometry, shape = piece.geometry, piece.shape
    is_ordered = isinstance(shape, Sparse) and shape.orders is not None and machine.sparse_kernel != "triton"
    copied = (2 * side.length for side in (geometry.q, geometry.k) if is_ordered or len(side.axes) > 1)
    return geometry.num_groups * sum(copied)
