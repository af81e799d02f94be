"""What does attention over so many pairs cost? Work, bytes and time on a device, by formulas written down here.

Work follows FlashAttention's algorithm (Dao 2023, arXiv 2307.08691, section 3): two matrix products over the pairs
forward, five backward, where the scores are computed again. A kernel computes whole tiles, so time follows the pairs of
the live tiles and not those that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from patterndsl.analysis.figure import Figure
from patterndsl.diagnostics import error, nearest
from patterndsl.lower.devices import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, Device

ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """What runs: q_len queries and kv_len keys, heads, channels and the size of an item in bytes."""

    q_len: int
    kv_len: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def itemsize(self) -> int:
        return ITEM_SIZES[self.dtype]


def checked_dtype(dtype: object) -> str:
    """The name of a dtype, or of PyTorch's, if it is one that attention runs in. Raises PatternError (E502)."""
    name = str(dtype).removeprefix("torch.")
    if name in ITEM_SIZES:
        return name
    near = nearest(name, ITEM_SIZES)
    help = f"did you mean `{near}`?" if near else f"choose from {', '.join(ITEM_SIZES)}"
    raise error("E502", f"there is no dtype `{name}`", None, help)


def forward_flops(num_pairs: float, head_dim: int) -> float:
    """Two products, QK' and PV, of head_dim multiplications and additions for each pair."""
    return FORWARD_PRODUCTS * 2 * head_dim * num_pairs


def backward_flops(num_pairs: float, head_dim: int) -> float:
    """Five products: the scores again, dV, dP, dQ and dK."""
    return BACKWARD_PRODUCTS * 2 * head_dim * num_pairs


def least_bytes(shape: Shape) -> float:
    """Query, key, value and output once each: no forward pass moves less."""
    queries = shape.q_len * shape.num_q_heads * shape.head_dim
    keys = shape.kv_len * shape.num_kv_heads * shape.head_dim
    return float((2 * queries + 2 * keys) * shape.itemsize)


def saved_bytes(shape: Shape) -> float:
    """What training keeps for the backward pass: query, key, value, output, and a float32 log-sum-exp per row."""
    return least_bytes(shape) + 4 * shape.q_len * shape.num_q_heads


def state_bytes(shape: Shape, num_keys: int) -> float:
    """Keys and values that a decoder holds for so many positions, over all heads of a layer."""
    return float(2 * num_keys * shape.num_kv_heads * shape.head_dim * shape.itemsize)


def predicted(device: Device, flops: float, num_bytes: float, *, dense: bool = False) -> Figure:
    """Time by the roofline: the slower of arithmetic and memory, and the overhead of a call."""
    rate = device.dense_flops if dense else device.sparse_flops
    overhead = device.dense_overhead if dense else device.sparse_overhead
    seconds = max(flops / rate, num_bytes / device.bandwidth) + overhead
    return Figure(seconds, "Expected", "s", f"roofline of {device.how}")
