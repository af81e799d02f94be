"""Which keys point the same way? Hashing by random rotations: the label is the direction that a key is nearest to.

Kitaev et al. 2020, Reformer, section 3 (the angular scheme of Andoni et al. 2015).
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

MOST_AT_ONCE = 128
"""Buckets of one rotation; more are the pairs of two rotations' buckets, which costs the root of it."""


def lsh_labels(key: Tensor, *, buckets: int, rounds: int, seed: int) -> Tensor:
    """int64 [B, H, rounds, T] in 0..buckets of key [B, H, T, D]: argmax of [x R; -x R] for random directions R.

    Each head and round has directions of its own, the same on every device and run for a seed. The length of a key has
    no part in it; NaN counts as the largest. Work: O(T D buckets), O(T D sqrt(buckets)) where that is more than 128 and
    a product of two even numbers. Without gradient.
    """
    label = torch.zeros(*key.shape[:2], rounds, key.shape[2], dtype=torch.int64, device=key.device)
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        x = key.detach().to(torch.promote_types(key.dtype, torch.float32))
        for turn, size in enumerate(factors_of(buckets)):
            shape = (key.shape[1], rounds, key.shape[3], size // 2)
            for at in range(rounds):  # one after the other: the projections of all are large
                directions = directions_of(shape, seed, turn, key.device, x.dtype)[:, at]
                projected = x @ directions  # [B, H, T, size / 2]
                nearest = projected.abs().argmax(-1, keepdim=True)
                is_opposite = projected.gather(-1, nearest) < 0
                nearest = (nearest + is_opposite * (size // 2))[..., 0]
                label[:, :, at] = label[:, :, at] * size + nearest
    return label


def factors_of(buckets: int) -> tuple[int, ...]:
    """One even number, or two that multiply to it, as near to each other as can be."""
    if buckets <= MOST_AT_ONCE:
        return (buckets,)
    small = next((size for size in range(isqrt(buckets), 1, -1) if not (size % 2 or buckets % (2 * size))), None)
    return (buckets,) if small is None else (small, buckets // small)


@lru_cache(maxsize=16)
def directions_of(
    shape: tuple[int, int, int, int], seed: int, turn: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Normal [heads, rounds, D, directions]; drawn on the host, where a seed means the same for every device."""
    generator = torch.Generator().manual_seed(2 * seed + turn)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
