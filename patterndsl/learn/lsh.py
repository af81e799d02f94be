"""Which keys point the same way? Hashing by random rotations: the label is the direction that a key is nearest to.

Kitaev et al. 2020, Reformer, section 3 (the angular scheme of Andoni et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from math import isqrt, pi, prod
from typing import Any

import torch
from torch import Tensor, nn

from patterndsl.device.graphs import on_device, remembered
from patterndsl.learn.again import Calls

MOST_AT_ONCE = 128
"""Buckets of one rotation; more are the pairs of two rotations' buckets, which costs the root of it."""


AT_ONCE = 1 << 18
"""Projections of a CPU that are held at once: they stay in its caches."""


def lsh_labels(key: Tensor, *, buckets: int, rounds: int, seed: int | Tensor) -> Tensor:
    """int64 [B, H, rounds, T] in 0..buckets of key [B, H, T, D]: argmax of [x R; -x R] for random directions R.

    Each head and round has directions of its own, the same on every device and run for a seed, which may be a number on
    the device. The length of a key has no part in it; NaN counts as the largest. Work: O(T D buckets), O(T D
    sqrt(buckets)) where that is more than 128 and a product of two even numbers. Without gradient.
    """
    label = torch.zeros(*key.shape[:2], rounds, key.shape[2], dtype=torch.int64, device=key.device)
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        dtype = torch.promote_types(key.dtype, torch.float32)
        halves = [size // 2 for size in factors_of(buckets)]
        directions = [
            directions_of((key.shape[1], rounds, key.shape[3], half), seed, turn, key.device, dtype)
            for turn, half in enumerate(halves)
        ]
        together, step = _at_once(key, rounds, sum(halves))
        for first, start in product(range(0, rounds, together), range(0, key.shape[2], step)):
            some, rows = slice(first, first + together), slice(start, start + step)
            wide = torch.cat([x[:, some] for x in directions], -1).permute(0, 2, 1, 3).flatten(2)
            projected: Any = key.detach()[:, :, rows].to(dtype) @ wide
            by_round = projected.unflatten(-1, (-1, sum(halves)))  # [B, H, keys, rounds, directions of both rotations]
            mine = label[:, :, some, rows]
            for part, half in zip(by_round.split(halves, -1), halves, strict=True):
                nearest = part.abs().argmax(-1, keepdim=True)
                is_opposite = part.gather(-1, nearest) < 0
                mine.mul_(2 * half).add_((nearest + is_opposite * half)[..., 0].transpose(-1, -2))
    return label


def _at_once(key: Tensor, rounds: int, directions: int) -> tuple[int, int]:
    """Rounds and keys that are projected together. A CPU takes as long for a few directions as for all rounds'; others,
    and graphs, take all keys of a round, as the projections of all rounds are large."""
    if key.device.type != "cpu" or torch.compiler.is_compiling():
        return 1, max(1, key.shape[2])
    return rounds, max(1, AT_ONCE // max(1, key.shape[0] * key.shape[1] * rounds * directions))


def labels_of_heads(
    key: Tensor,
    settings: Mapping[str, int],
    heads: int,
    turn: int | Tensor = 0,
    hash_keys: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The labels of key [B, Hkv, T, D] for query heads: int64 [B, heads, T], of several rounds [B, heads, rounds, T].

    turn: how often the directions were drawn anew, on the device where it changes. hash_keys: `lsh_labels`, or what
    does the same, for one round without a dimension for rounds.
    """
    rounds, kv_group = settings["rounds"], heads // key.shape[1]
    label = (hash_keys or lsh_labels)(key, buckets=settings["buckets"], rounds=rounds, seed=settings["seed"] + turn)
    label = label if kv_group == 1 else label.repeat_interleave(kv_group, dim=1)
    return label[:, :, 0] if rounds == 1 and label.dim() == 4 else label


class Redrawn(nn.Module):
    """How often the directions of a label were drawn anew: in training every `redraw` calls, as released code does in
    each. It is counted on the device, without a look at it. A call that checkpointing runs again has those of its first
    run."""

    calls: Tensor

    def __init__(self, redraw: int) -> None:
        super().__init__()
        self.redraw = redraw
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.earlier: Calls[Tensor] = Calls()

    def forward(self) -> Tensor:
        if self.training:
            former = self.earlier.started()
            if former is not None:
                return former
            self.calls.add_(1)
        turn = self.calls // self.redraw
        if self.training:
            self.earlier.begin(turn)
        return turn


def factors_of(buckets: int) -> tuple[int, ...]:
    """One even number, or two that multiply to it, as near to each other as can be."""
    if buckets <= MOST_AT_ONCE:
        return (buckets,)
    small = next((size for size in range(isqrt(buckets), 1, -1) if not (size % 2 or buckets % (2 * size))), None)
    return (buckets,) if small is None else (small, buckets // small)


def directions_of(
    shape: tuple[int, int, int, int], seed: int | Tensor, turn: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Normal [heads, rounds, D, directions] of a seed and the number of a rotation. Those of a number of the host are
    made there and kept."""
    if isinstance(seed, Tensor):
        return normal(shape, 2 * seed + turn, device).to(dtype)
    return _kept(shape, 2 * seed + turn, device, dtype)


@remembered(16)
def _kept(shape: tuple[int, int, int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return normal(shape, seed, torch.device("cpu")).to(device, dtype)


def normal(shape: tuple[int, ...], seed: int | Tensor, device: torch.device) -> Tensor:
    """Normal numbers in float64, which follow from the seed and where they stand alone: by Box and Muller from numbers
    of 53 bits that are mixed of these. On all devices the same but for the last bits."""
    number = prod(shape)
    start = _mixed(on_device(seed, device))
    bits = _mixed(torch.arange(2 * number, device=device) + start)
    first, second = (((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) + 0.5).mul_(2.0**-53).view(2, number)
    found: Tensor = (-2 * first.log()).sqrt() * (2 * pi * second).cos()
    return found.view(shape)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) on int64, whose products wrap around as those without sign
    do: every bit of x moves every bit of the result."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & ((1 << 33) - 1))
