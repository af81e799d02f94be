"""How fast are devices? Measured constants: of single pieces, which choose a plan, and of whole calls, for reports.

A Machine prices each pass of a plan, a Device a call of which only pairs and bytes are known: each fits what it is for,
and neither follows from the other. `lower.machine` says which machine is taken where one is calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from patterndsl.lower.gather import GATHERED, SAVING, Blocks
from patterndsl.lower.shapes import Wanted

Kernel: TypeAlias = Literal["sdpa", "single", "triton", "flex", "gathered"]

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Products of matrices over the pairs: scores and output; scores again, dV, dP, dQ, dK."""


# ---- piece by piece: fitted by hand to what benchmarks/plans.py measured


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device runs a piece with, and how fast. Rates are FLOP/s at head_dim 64, bandwidth bytes/s, calls seconds.

    bands, blocks, saving, finer: see `shapes.Wanted`. partial: the work of a tile that is masked, to one that is not.
    short, few: rows of a group, and keys, below which a dense kernel loses speed in proportion; grain: positions that
    causal kernels skip at once, and on a GPU the sides of tiles that dense kernels compute whole. units: of the device,
    that work on one row of tiles each, so that the longest row is a tail.
    """

    name: str
    bands: bool
    blocks: Blocks
    saving: float
    finer: Blocks
    sparse_kernel: Kernel
    dense_rate: float
    band_rate: float
    sparse_rate: float
    backward_rate: float
    partial: float
    bandwidth: float
    dense_call: float
    sparse_call: float
    itemsize: int
    short: int
    few: int
    grain: int
    units: int

    @property
    def is_gpu(self) -> bool:
        """Whether many units work side by side."""
        return self.units > 1

    @property
    def wanted(self) -> Wanted:
        """What its kernels take well."""
        return Wanted(self.bands, self.blocks, self.saving, self.finer, single_keys=self.sparse_kernel == "triton")


CPU = Machine(
    name="cpu-2-core",
    bands=True,
    blocks=GATHERED,
    saving=SAVING,
    finer=(),
    sparse_kernel="gathered",
    dense_rate=2.15e11,
    band_rate=2.4e11,
    sparse_rate=1.1e11,
    backward_rate=0.75,
    partial=1.9,
    bandwidth=1.2e10,
    dense_call=6e-5,
    sparse_call=6e-4,
    itemsize=4,
    short=12,
    few=50,
    grain=32,
    units=1,
)
CUDA = Machine(
    name="h100",
    bands=False,
    blocks=((64, 64),),
    saving=1.06,
    finer=(),
    sparse_kernel="triton",
    dense_rate=4.2e14,
    band_rate=4.2e14,
    sparse_rate=4.2e14,
    backward_rate=0.7,
    partial=1.2,
    bandwidth=3.1e12,
    dense_call=1.2e-4,
    sparse_call=1.2e-4,
    itemsize=2,
    short=0,
    few=200,
    grain=128,
    units=132,
)


def built_in(device_type: str) -> Machine:
    """The constants that are the same everywhere, for a kind of device."""
    return CUDA if device_type == "cuda" else CPU


# ---- whole calls: measured by benchmarks/device_rates.py, which says how; its results are beside it


@dataclass(frozen=True, slots=True)
class Device:
    """How fast a device is at attention: FLOP/s, bytes/s, and the seconds of a call that do not depend on its size.

    dense: PyTorch's own attention; sparse: a compiled program, by the pairs of its live tiles. Both were measured in
    `dtype`.
    """

    name: str
    dtype: str
    dense_flops: float
    sparse_flops: float
    dense_overhead: float
    sparse_overhead: float
    bandwidth: float
    how: str


DEVICES = {
    "h200": Device(
        "h200", "bfloat16", 4.7e14, 2.4e14, 2.4e-5, 1.4e-4, 4.2e12, "one NVIDIA H200, bfloat16, head_dim 64"
    ),
    "cpu-2-core": Device(
        "cpu-2-core", "float32", 1.5e11, 6.9e10, 2.4e-4, 1.7e-3, 2.4e10, "two x86-64 cores, float32, head_dim 64"
    ),
}
