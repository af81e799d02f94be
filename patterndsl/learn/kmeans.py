"""Which keys are alike? Spherical k-means whose centroids follow the keys while a layer trains.

Roy et al. 2020, Routing Transformer, section 4.1: assignment by the largest product with a centroid, centroids by
exponential moving averages of what is assigned to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from patterndsl.learn.again import Calls


class KMeans(nn.Module):
    """Centroids of each head, and the label of a key: the centroid that it points to most.

    heads, dim: of the keys. clusters: centroids of a head. seed: of their random start, replaced by keys when `update`
    first sees some. decay: of the moving averages in a training step. Without gradient; state is in buffers.
    """

    centroids: Tensor
    counts: Tensor
    sums: Tensor
    is_begun: Tensor

    def __init__(self, heads: int, dim: int, clusters: int, *, seed: int = 0, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        generator = torch.Generator().manual_seed(seed)
        start = normalize(torch.randn(heads, clusters, dim, generator=generator), dim=-1)
        self.register_buffer("centroids", start)
        self.register_buffer("counts", torch.ones(heads, clusters))
        self.register_buffer("sums", start.clone())
        self.register_buffer("is_begun", torch.tensor(False))
        self.earlier: Calls[Tensor] = Calls()

    def scores(self, key: Tensor) -> Tensor:
        """[B, H, T, clusters] of key [B, H, T, D]: how much each points to each centroid; what else is asked of these
        keys takes them as they are. Work: O(T D clusters)."""
        with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
            return self._unit(key) @ self.centroids.transpose(-1, -2)

    def forward(self, key: Tensor, scores: Tensor | None = None) -> Tensor:
        """int64 [B, H, T] of key [B, H, T, D]. scores: of these keys, if they are known."""
        return (self.scores(key) if scores is None else scores).argmax(-1)

    def members(self, key: Tensor, top: int, scores: Tensor | None = None) -> Tensor:
        """int64 [B, H, clusters, min(top, T)] of key [B, H, T, D]: the tokens that point most to each centroid, in
        ascending order. A token may be a member of none, or of several."""
        found = self.scores(key) if scores is None else scores
        by_centroid = found.transpose(-1, -2).contiguous()
        return by_centroid.topk(min(top, key.shape[2]), sorted=False).indices.sort(-1).values

    def _unit(self, key: Tensor) -> Tensor:
        return normalize(key.detach().to(self.centroids.dtype), dim=-1)

    @torch.no_grad()
    def update(self, key: Tensor, keep: Tensor | None = None, scores: Tensor | None = None) -> None:
        """A training step: counts and sums of what each centroid is nearest to, decayed; a centroid is its mean.

        keep: bool [B, T], False for padding, which moves nothing. Counts are smoothed by 1e-5 (Laplace), so a centroid
        without keys stays where it is. The first step starts from keys of the batch, evenly spaced.
        """
        with torch.autocast(key.device.type, enabled=False):
            unit = self._unit(key)
            if keep is not None:
                unit = unit * keep[:, None, :, None]
            flat = unit.transpose(0, 1).flatten(1, 2)  # [H, B T, D]
            kept = (flat != 0).any(-1)
            if scores is None:
                self._begin(flat)
                scores = self.scores(key)
            nearest = scores.transpose(0, 1).flatten(1, 2).argmax(-1)
            counts = torch.zeros_like(self.counts).scatter_add_(1, nearest, kept.to(self.counts.dtype))
            sums = torch.zeros_like(self.sums).scatter_add_(1, nearest[..., None].expand_as(flat), flat)
            self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            total = self.counts.sum(-1, keepdim=True)
            smoothed = (self.counts + SMOOTHING) / (total + self.counts.shape[1] * SMOOTHING) * total
            self.centroids.copy_(self.sums / smoothed[..., None])

    @contextmanager
    def step(self, key: Tensor) -> Iterator[Tensor]:
        """The scores of key [B, H, T, D], and while the module trains a step: `begin` before them, `update` after all
        that is asked of these keys.

        A step that checkpointing runs again has the centroids of its first run, and updates nothing.
        """
        if not self.training:
            yield self.scores(key)
            return
        former = self.earlier.started()
        if former is None:
            self.begin(key)
            self.earlier.begin(self.centroids.clone())
            scores = self.scores(key)
            yield scores
            self.update(key, scores=scores)
            return
        now, self.centroids = self.centroids, former
        try:
            yield self.scores(key)
        finally:
            self.centroids = now

    @torch.no_grad()
    def begin(self, key: Tensor) -> None:
        """The start of the first training step, before scores are asked; nothing in later ones."""
        with torch.autocast(key.device.type, enabled=False):
            self._begin(self._unit(key).transpose(0, 1).flatten(1, 2))

    def _begin(self, flat: Tensor) -> None:
        """Before the first step the centroids are keys of it, evenly spaced; padding is no key. Without a look at the
        host: it would wait for the device in each step, and break a graph."""
        clusters = self.centroids.shape[1]
        places = torch.arange(clusters, device=flat.device) * flat.shape[1] // clusters
        chosen = flat[:, places]
        start = torch.where(self.is_begun | (chosen == 0).all(-1, keepdim=True), self.centroids, chosen)
        self.sums.copy_(torch.where(self.is_begun, self.sums, start))
        self.centroids.copy_(start)
        self.is_begun.fill_(True)

    def commitment(self, key: Tensor, scores: Tensor | None = None) -> Tensor:
        """The mean squared distance of unit keys to their centroids, a scalar; differentiable in the keys."""
        unit = normalize(key.to(self.centroids.dtype), dim=-1)
        label = self(key, scores)
        found = self.centroids[torch.arange(key.shape[1], device=key.device)[:, None], label]
        return (unit - found).square().mean()


SMOOTHING = 1e-5
