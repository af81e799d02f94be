"""How are keys hashed on a GPU? In one launch for all rounds, and one for each rotation that is drawn anew; the plain
twin is `learn.lsh`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.learn.lsh import directions_of, factors_of, lsh_labels
from patterndsl.runtime.kernels.hash_kernels import draw_kernel, hash_kernel
from patterndsl.runtime.kernels.memory import strides_of
from patterndsl.runtime.views import with_unit_stride

BLOCK = 64
MOST_DIRECTIONS = 64
"""Of one rotation; more are left to the plain twin, as wider heads are."""
MOST_CHANNELS = 128

OPTIONS = {"num_warps": 4, "num_stages": 1}
DRAWN = 1024
"""Numbers that a program draws."""

_hash, _draw = Launcher(hash_kernel), Launcher(draw_kernel)


def hashed(key: Tensor, *, buckets: int, rounds: int, seed: int | Tensor) -> Tensor:
    """`lsh_labels` of key [B, H, T, D], in int16 or int32: [B, H, rounds, T], or [B, H, T] of one round. Without
    gradient."""
    sizes = factors_of(buckets)
    dtype = torch.int16 if buckets <= 1 << 15 else torch.int32
    batch, heads, length, dim = key.shape
    if max(sizes) > 2 * MOST_DIRECTIONS or dim > MOST_CHANNELS or key.dtype == torch.float64 or not key.numel():
        label = lsh_labels(key, buckets=buckets, rounds=rounds, seed=seed).to(dtype)
        return label if rounds > 1 else label[:, :, 0]
    key = with_unit_stride(key)
    size = (batch, heads, rounds, length) if rounds > 1 else (batch, heads, length)
    label = torch.empty(size, dtype=dtype, device=key.device)
    numbers = [size // 2 for size in sizes]
    tables = [_directions((heads, rounds, dim, number), seed, turn, key.device) for turn, number in enumerate(numbers)]
    _hash(
        (-(-length // BLOCK), heads, batch),
        (key, tables[0], tables[-1], label),
        (*strides_of(key), length, rounds),
        {
            "dim": dim, "padded": _padded(dim), "first_number": numbers[0],
            "second_number": numbers[1] if len(numbers) > 1 else 0, "first_padded": _padded(numbers[0]),
            "second_padded": _padded(numbers[-1]), "block": BLOCK,
        },
        OPTIONS,
    )  # fmt: skip
    return label


def _directions(shape: tuple[int, int, int, int], seed: int | Tensor, turn: int, device: torch.device) -> Tensor:
    """`directions_of`, in float32."""
    if not isinstance(seed, Tensor):
        return directions_of(shape, seed, turn, device, torch.float32)
    found, number = torch.empty(shape, dtype=torch.float32, device=device), prod(shape)
    _draw((-(-number // DRAWN), 1, 1), (seed, found), (turn, number), {"block": DRAWN})
    return found


def _padded(width: int) -> int:
    """A power of two that matrix units take."""
    return max(16, 1 << (width - 1).bit_length())
