"""How long does a piece of a plan take on a device? Work over a rate that depends on its shape, plus what a call costs.

The constants are measured, by `benchmarks/plan_rates.py` on the named machines; they decide between plans, so what
matters is their order and not their last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from patterndsl.lower.geometry import Side
from patterndsl.lower.shapes import Band, Full, Masked, Piece, Sparse, Triangle

Kernel: TypeAlias = Literal["sdpa", "single", "flex", "gathered"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device runs a piece with, and how fast. Rates: FLOP/s at head_dim 64; bandwidth: bytes/s; seconds a call.

    bands: whether masks and overlapping views are welcome. blocks: (q_block, kv_block) of what is block-sparse, coarse
    to fine; a finer one must compute less by `saving`.
    short: rows of a group below which a dense kernel loses speed in proportion. units: of the device, that work on one
    row of tiles each: the longest row is a tail.
    """

    name: str
    bands: bool
    blocks: tuple[tuple[int, int], ...]
    saving: float
    sparse_kernel: Kernel
    dense_rate: float
    masked_rate: float
    sparse_rate: float
    bandwidth: float
    dense_call: float
    sparse_call: float
    itemsize: int
    short: int
    units: int


CPU = Machine(
    name="cpu-2-core",
    bands=True,
    blocks=((64, 64), (64, 8), (64, 1)),
    saving=2.0,
    sparse_kernel="gathered",
    dense_rate=1.5e11,
    masked_rate=1.45e11,
    sparse_rate=6e10,
    bandwidth=1.2e10,
    dense_call=6e-5,
    sparse_call=6e-4,
    itemsize=4,
    short=16,
    units=1,
)
CUDA = Machine(
    name="h200",
    bands=False,
    blocks=((128, 128),),
    saving=1.06,
    sparse_kernel="flex",
    dense_rate=3.6e14,
    masked_rate=3.6e14,
    sparse_rate=2.8e14,
    bandwidth=3.0e12,
    dense_call=3e-5,
    sparse_call=6e-5,
    itemsize=2,
    short=64,
    units=132,
)


def machine_of(device_type: str) -> Machine:
    """The built-in constants for a kind of device."""
    return CUDA if device_type == "cuda" else CPU


def kernel_of(piece: Piece, machine: Machine) -> Kernel:
    """What runs the piece."""
    if isinstance(piece.shape, Sparse):
        return machine.sparse_kernel
    return "single" if piece.geometry.q.length == piece.geometry.k.length == 1 else "sdpa"


def seconds(piece: Piece, machine: Machine, *, num_heads: int, head_dim: int) -> float:
    """The predicted time of a forward pass of one batch row."""
    geometry, shape = piece.geometry, piece.shape
    flops = 4.0 * head_dim * piece.num_computed * num_heads
    calls = geometry.num_groups if isinstance(shape, Band) else 1
    match shape:
        case Full() | Triangle():
            rate, call = machine.dense_rate, machine.dense_call
        case Band() | Masked():
            rate, call = machine.masked_rate, machine.dense_call
        case Sparse():
            rate, call = machine.sparse_rate, machine.sparse_call
    if kernel_of(piece, machine) == "single":
        return call + 12.0 * geometry.num_rows * num_heads * head_dim * machine.itemsize / machine.bandwidth
    if isinstance(shape, Sparse):
        longest = 4.0 * head_dim * shape.longest_row * machine.units
        flops = max(flops, longest)
    rows = shape.tile if isinstance(shape, Band) else geometry.q.length
    if not isinstance(shape, Sparse):
        rate *= rows / (rows + machine.short)
    # the result is merged into that of the other passes: read twice and written once
    moved = 3.0 * geometry.num_rows
    if isinstance(shape, Sparse) or _is_copied(geometry.q) or _is_copied(geometry.k):
        moved += geometry.num_groups * (3.0 * geometry.q.length + 4.0 * geometry.k.length)
    return calls * call + flops / rate + moved * num_heads * head_dim * machine.itemsize / machine.bandwidth


def _is_copied(side: Side) -> bool:
    return len(side.axes) > 1
