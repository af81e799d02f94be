"""How are labels and members of centroids found on a CPU? Head by head, in strips of tokens that caches hold.

While the scores of a strip are there, the highest of each is taken, and of each chunk of tokens. Members are then
looked for in the w chunks alone whose highest scores are highest: any token elsewhere has w before it, one in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SCORES = 1 << 25
"""Scores of a head that are held at once."""
STRIP = 1 << 20
"""Scores that are made at once: a few megabytes."""
CHUNK = 16
"""Tokens of a chunk."""
FEWEST_SCORES = 1 << 18
"""Of a head. With fewer, all heads at once take less time than one after the other."""
FEWEST = 64
"""Centroids that are scored at once, however long the sequence is: with fewer, products take longer."""
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
    padded = -(-length // CHUNK) * CHUNK
    at_once = min(clusters, max(FEWEST, MAX_SCORES // padded))
    room = torch.empty(padded * at_once, dtype=centroids.dtype)
    for row in range(batch):
        for head in range(heads):
            highest = torch.full((length,), -torch.inf, dtype=centroids.dtype)
            for first in range(0, clusters, at_once):
                some = slice(first, first + at_once)
                asked = centroids[head, some].t()
                scores = room[: padded * asked.shape[1]].view(padded, -1)
                scores[length:] = -torch.inf
                label = labels[row, head], highest, first
                maxima = _scored(key[row, head].detach(), asked, scores, label)
                for top, found in members.items():
                    found[row, head, some] = _members(scores, maxima, min(top, length))
    return labels, members


def _scored(key: Tensor, asked: Tensor, scores: Tensor, label: tuple[Tensor, Tensor, int]) -> Tensor:
    """Writes the scores [padded T, n] of key [T, D] by asked [D, n], and labels where a score is above the highest;
    returns the highest of each chunk [chunks, n]. label: labels, their scores, and the number of the first centroid."""
    labels, highest, first = label
    step = max(1, STRIP // (asked.shape[1] * CHUNK)) * CHUNK
    maxima = []
    for start in range(0, key.shape[0], step):
        strip = slice(start, min(start + step, key.shape[0]))
        torch.mm(unit(key[strip].to(asked.dtype)), asked, out=scores[strip])
        best, at = scores[strip].max(-1)
        labels[strip] = torch.where(best > highest[strip], at + first, labels[strip])
        highest[strip] = torch.maximum(best, highest[strip])
        maxima.append(scores[start : start + step].view(-1, CHUNK, scores.shape[1]).amax(1))
    return torch.cat(maxima)


def unit(key: Tensor) -> Tensor:
    """Directions of key [T, D]; 0 where there is none, of NaN and infinity."""
    length: Tensor = torch.linalg.vector_norm(key, dim=-1, keepdim=True)
    found = key / length.clamp(min=SHORTEST)
    return found if length.isfinite().all() else found.where(length.isfinite(), 0.0)


def _members(scores: Tensor, maxima: Tensor, top: int) -> Tensor:
    """int64 [n, top] of scores [padded T, n]: ascending."""
    chunks = maxima.t().contiguous().topk(min(top, maxima.shape[0]), sorted=False).indices.sort(-1).values
    by_chunk = scores.view(-1, CHUNK, scores.shape[1]).permute(2, 0, 1)
    among = by_chunk.gather(1, chunks[..., None].expand(-1, -1, CHUNK)).flatten(1)
    at = among.topk(top, sorted=False).indices.sort(-1).values
    return chunks.gather(1, at // CHUNK) * CHUNK + at % CHUNK
