"""How are labels and members of centroids found on a CPU? Head by head, in strips of tokens that caches hold.

While the scores of a strip are there, the highest of each is taken, and of each chunk of tokens. Members are then
looked for in the w chunks alone whose highest scores are highest: any token elsewhere has w before it, one in each. Of
very many chunks these are found in the same way. NumPy chooses them, many numbers at a time, where PyTorch compares one
after the other. The commitment goes by strips, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

MAX_SCORES = 1 << 23
"""Scores of a head that are held at once: what the caches of all cores together hold, or not much more."""
STRIP = 1 << 19
"""Scores that are made at once: two megabytes."""
CHUNK = 8
"""Tokens of a chunk, and chunks of a chunk of these: with fewer there are more chunks to choose among, with more more
of each."""
FEWEST_SCORES = 1 << 18
"""Of a head. With fewer, all heads at once take less time than one after the other."""
FEWEST = 64
"""Centroids that are scored at once, however long the sequence is: with fewer, products take longer."""
NUMBERS = 1 << 18
"""Of the keys whose distances are made at once."""
SHORTEST = 1e-12
"""As in torch.nn.functional.normalize."""


def takes(key: Tensor, centroids: Tensor) -> bool:
    """Whether these are worth strips."""
    return key.device.type == "cpu" and key.shape[2] * centroids.shape[1] >= FEWEST_SCORES


def assigned(key: Tensor, centroids: Tensor, tops: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Labels int64 [B, H, T] of key [B, H, T, D] by centroids [H, clusters, D], and for each of some numbers the
    members int64 [B, H, clusters, min(top, T)]: see `kmeans.Assigned`. Which of equal scores is a member is not said.

    Without gradient. Work: O(T D clusters); memory: MAX_SCORES, or T for each of FEWEST centroids.
    """
    batch, heads, length, _ = key.shape
    clusters = centroids.shape[1]
    labels = torch.zeros((batch, heads, length), dtype=torch.int64)
    members = {top: torch.empty((batch, heads, clusters, min(top, length)), dtype=torch.int64) for top in tops}
    padded = -(-length // CHUNK**2) * CHUNK**2
    at_once = min(clusters, max(FEWEST, MAX_SCORES // padded))
    room = torch.empty(padded * at_once, dtype=centroids.dtype)
    keys = torch.empty(key.shape[2:], dtype=centroids.dtype)
    for row in range(batch):
        for head in range(heads):
            highest = torch.full((length,), -torch.inf, dtype=centroids.dtype)
            _write_unit(key[row, head].detach().to(centroids.dtype), keys)
            for first in range(0, clusters, at_once):
                some = slice(first, first + at_once)
                asked = centroids[head, some].t()
                scores = room[: padded * asked.shape[1]].view(padded, -1)
                scores[length:] = -torch.inf
                label = labels[row, head], highest, first
                maxima = _scored(keys, asked, scores, label)
                for top, found in members.items():
                    found[row, head, some] = _members(scores, maxima, min(top, length))
    return labels, members


def _scored(key: Tensor, asked: Tensor, scores: Tensor, label: tuple[Tensor, Tensor, int]) -> Tensor:
    """Writes the scores [padded T, n] of unit key [T, D] by asked [D, n], and labels where one is above the highest;
    returns the highest of each chunk [chunks, n]. label: labels, their scores, and the number of the first centroid."""
    labels, highest, first = label
    step = max(1, STRIP // (asked.shape[1] * CHUNK**2)) * CHUNK**2
    numbers, room = torch.arange(1, asked.shape[1] + 1, dtype=asked.dtype), torch.empty_like(scores[:step])
    maxima = []
    for start in range(0, key.shape[0], step):
        strip = slice(start, min(start + step, key.shape[0]))
        torch.mm(key[strip], asked, out=scores[strip])
        best, at = _highest(scores[strip], numbers, room[: strip.stop - start])
        labels[strip] = torch.where(best > highest[strip], at + first, labels[strip])
        highest[strip] = torch.maximum(best, highest[strip])
        maxima.append(scores[start : start + step].view(-1, CHUNK, scores.shape[1]).amax(1))
    return torch.cat(maxima)


def _highest(scores: Tensor, numbers: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row of scores [T, n], and where it is first. A CPU compares and keeps one number after the
    other, but eight at a time it finds which are equal to the highest, and adds up their numbers, which count from 1.
    Where several are, the sum is none of them: such rows are looked at once more."""
    best = scores.amax(-1)
    at = torch.eq(scores, best[:, None], out=room).mv(numbers).long() - 1
    at.masked_fill_((at < 0) | (at >= len(numbers)), 0)
    is_other = scores.gather(1, at[:, None])[:, 0] != best
    if is_other.any():
        at[is_other] = scores[is_other].argmax(-1)
    return best, at


def _write_unit(key: Tensor, into: Tensor) -> None:
    """Directions of key [T, D]; 0 where there is none, of NaN and infinity."""
    length = torch.linalg.vector_norm(key, dim=-1, keepdim=True)
    torch.div(key, length.clamp(min=SHORTEST), out=into)
    if not length.isfinite().all():
        into.masked_fill_(~length.isfinite(), 0.0)


# ---- the commitment


def commitment(key: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """The mean squared distance of unit keys [B, H, T, D] to the centroids of these labels, a scalar; differentiable
    once, in the keys. A few keys at a time, of which nothing is kept."""
    return _commitment(key, centroids, labels)


class _Commitment(Function):
    """What is kept of each key is its length, and its product with its centroid, both of which one distance tells."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
        lengths, products = (torch.empty(key.shape[:3], dtype=centroids.dtype) for _ in range(2))
        total = torch.zeros((), dtype=centroids.dtype)
        for at, head in _strips(key):
            keys, nearest = key[at].to(centroids.dtype), centroids[head].index_select(0, labels[at])
            length = torch.linalg.vector_norm(keys, dim=-1)
            apart = nearest.addcdiv_(keys, length.clamp(min=SHORTEST)[:, None], value=-1)
            square = torch.linalg.vector_norm(apart, dim=-1).square_()
            total += square.sum()
            lengths[at] = length
            products[at] = square
        if ctx.needs_input_grad[0]:
            square = torch.linalg.vector_norm(centroids, dim=-1).square_().expand(len(key), -1, -1).gather(2, labels)
            products = square.add_(1).sub_(products).div_(2)
            ctx.save_for_backward(key, centroids.clone(), labels, lengths, products)  # a step moves the centroids
        return total / key.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of a direction u and its centroid c it is u (u c) - c by the length."""
        key, centroids, labels, lengths, products = ctx.saved_tensors
        found = torch.empty_like(key)
        products = products.where(lengths > SHORTEST, 1.0)  # what they are divided by does not depend on them
        longer = lengths.clamp(min=SHORTEST)
        share = 2 * grad / key.numel() / longer
        along = products * share / longer
        for at, head in _strips(key):
            part = key[at].to(centroids.dtype) * along[at][:, None]
            nearest = centroids[head].index_select(0, labels[at])
            torch.addcmul(part, nearest, share[at][:, None], value=-1, out=found[at])
        return found, None, None


def _strips(key: Tensor) -> Iterator[tuple[tuple[int, int, slice], int]]:
    """Some keys of a head at a time: where they are, and the head."""
    step = max(1, NUMBERS // max(1, key.shape[3]))
    for row, head in product(range(key.shape[0]), range(key.shape[1])):
        for start in range(0, key.shape[2], step):
            yield (row, head, slice(start, start + step)), head


# torch declares `apply` without types
_commitment: Callable[..., Tensor] = _Commitment.apply


# ---- members


def _members(scores: Tensor, maxima: Tensor, top: int) -> Tensor:
    """int64 [n, top] of scores [padded T, n] and the highest of each chunk [chunks, n]: ascending."""
    levels = [scores, maxima]
    if maxima.shape[0] > top * CHUNK:
        levels.append(maxima.view(-1, CHUNK, maxima.shape[1]).amax(1))
    highest = levels.pop().t().contiguous()
    found = _highest_of(highest, min(top, highest.shape[1]))
    while levels:
        among = (found[..., None] * CHUNK + torch.arange(CHUNK)).flatten(1)
        found = among.gather(1, _highest_of(levels.pop().t().gather(1, among), min(top, among.shape[1])))
    return torch.from_numpy(np.sort(found.numpy(), axis=-1))


def _highest_of(x: Tensor, top: int) -> Tensor:
    """Where the `top` highest of each row of x [n, m] are, int64 [n, top], in any order."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # NumPy has no bfloat16
    lower = x.shape[1] - top
    return torch.from_numpy(np.argpartition(x.numpy(), lower, axis=-1)[:, lower:])
