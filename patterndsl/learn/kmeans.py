"""Which keys are alike? Spherical k-means whose centroids follow the keys while a layer trains.

Roy et al. 2020, Routing Transformer, section 4.1: assignment by the largest product with a centroid, centroids by
exponential moving averages of what is assigned to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from patterndsl.learn import strips
from patterndsl.learn.again import Calls


class Assigned(NamedTuple):
    """Of keys [B, H, T, D]: labels int64 [B, H, T], the centroid that each points to most, and by how many are wanted
    the members of each centroid int64 [B, H, clusters, min(top, T)], the tokens that point most to it, ascending."""

    labels: Tensor
    members: dict[int, Tensor]


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

    @torch.no_grad()
    def assigned(self, key: Tensor, tops: Sequence[int] = ()) -> Assigned:
        """Labels of key [B, H, T, D], and members for each of some numbers of them. A token may be a member of no
        centroid, or of several. Work: O(T D clusters); scores of some centroids at a time are held, and none by
        kernels of our own: see `nearest`, and `strips` for CPUs, whose plain twin is this."""
        with torch.autocast(key.device.type, enabled=False):
            if self._runs_on_kernels(key, tops):
                from patterndsl.learn import nearest

                return Assigned(*nearest.assigned(key, self.centroids, tops))
            if strips.takes(key, self.centroids) and not torch.compiler.is_compiling():
                return Assigned(*strips.assigned(key, self.centroids, tops))
            keys = self._unit(key).transpose(-1, -2)
            highest = torch.full(key.shape[:3], -torch.inf, dtype=keys.dtype, device=key.device)
            labels = torch.zeros(key.shape[:3], dtype=torch.int64, device=key.device)
            parts: dict[int, list[Tensor]] = {top: [] for top in tops}
            at_once = max(FEWEST, MAX_SCORES // max(1, highest.numel()))
            for first in range(0, self.centroids.shape[1], at_once):
                scores = self.centroids[:, first : first + at_once] @ keys
                for top, found in parts.items():
                    found.append(scores.topk(min(top, key.shape[2]), sorted=False).indices.sort(-1).values)
                best, at = scores.max(-2)
                labels = torch.where(best > highest, at + first, labels)
                highest = torch.maximum(best, highest)
            return Assigned(labels, {top: torch.cat(found, dim=2) for top, found in parts.items()})

    def forward(self, key: Tensor) -> Tensor:
        """The labels, int64 [B, H, T], of key [B, H, T, D]."""
        return self.assigned(key).labels

    def members(self, key: Tensor, top: int) -> Tensor:
        """int64 [B, H, clusters, min(top, T)] of key [B, H, T, D]: see `Assigned`."""
        return self.assigned(key, (top,)).members[top]

    def _runs_on_kernels(self, key: Tensor, tops: Sequence[int] = ()) -> bool:
        """In a graph of torch.compile it is plain code, which that fuses."""
        if not has_kernels(key.device) or torch.compiler.is_compiling():
            return False
        from patterndsl.learn import nearest

        return nearest.takes(key, self.centroids, tops)

    def _unit(self, key: Tensor) -> Tensor:
        """Directions; 0 for keys with NaN or infinity, which are nearest to no centroid and move none."""
        key = key.detach().to(self.centroids.dtype)
        length: Tensor = torch.linalg.vector_norm(key, dim=-1, keepdim=True)
        return (key / length.clamp(min=strips.SHORTEST)).where(length.isfinite(), 0.0)

    @torch.no_grad()
    def update(self, key: Tensor, keep: Tensor | None = None, labels: Tensor | None = None) -> None:
        """A training step: counts and sums of what each centroid is nearest to, decayed; a centroid is its mean.

        keep: bool [B, T], False for padding, which moves nothing; keys with NaN or infinity do not either. labels: of
        these keys, if they are known. Counts are smoothed by 1e-5 (Laplace), so a centroid without keys stays where it
        is. The first step starts from keys of the batch, evenly spaced.
        """
        with torch.autocast(key.device.type, enabled=False):
            unit = self._unit(key)
            if keep is not None:
                unit = unit * keep[:, None, :, None]
            flat = unit.transpose(0, 1).flatten(1, 2)  # [H, B T, D]
            kept = (flat != 0).any(-1)
            if labels is None:
                self._begin(self._spread(flat))
                labels = self(key)
            nearest = labels.transpose(0, 1).flatten(1, 2)
            counts = torch.zeros_like(self.counts).scatter_add_(1, nearest, kept.to(self.counts.dtype))
            sums = torch.zeros_like(self.sums).scatter_add_(1, nearest[..., None].expand_as(flat), flat)
            self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            total = self.counts.sum(-1, keepdim=True)
            smoothed = (self.counts + SMOOTHING) / (total + self.counts.shape[1] * SMOOTHING) * total
            self.centroids.copy_(self.sums / smoothed[..., None])

    @contextmanager
    def step(self, key: Tensor, tops: Sequence[int] = ()) -> Iterator[Assigned]:
        """What `assigned` says, and while the module trains a step: `begin` before it, `update` after all that is asked
        of these keys.

        A step that checkpointing runs again has the centroids of its first run, and updates nothing.
        """
        if not self.training:
            yield self.assigned(key, tops)
            return
        former = self.earlier.started()
        if former is None:
            self.begin(key)
            self.earlier.begin(self.centroids.clone())
            found = self.assigned(key, tops)
            yield found
            self.update(key, labels=found.labels)
            return
        now, self.centroids = self.centroids, former
        try:
            yield self.assigned(key, tops)
        finally:
            self.centroids = now

    @torch.no_grad()
    def begin(self, key: Tensor) -> None:
        """The start of the first training step, before labels are asked; nothing in later ones."""
        with torch.autocast(key.device.type, enabled=False):
            self._begin(self._unit(self._spread(key.transpose(0, 1).flatten(1, 2))))

    def _spread(self, flat: Tensor) -> Tensor:
        """As many of keys [H, B T, D] as there are centroids, evenly spaced."""
        clusters = self.centroids.shape[1]
        return flat[:, torch.arange(clusters, device=flat.device) * flat.shape[1] // clusters]

    def _begin(self, chosen: Tensor) -> None:
        """Before the first step the centroids are keys of it; padding is no key. Without a look at the host: it would
        wait for the device in each step, and break a graph."""
        start = torch.where(self.is_begun | (chosen == 0).all(-1, keepdim=True), self.centroids, chosen)
        self.sums.copy_(torch.where(self.is_begun, self.sums, start))
        self.centroids.copy_(start)
        self.is_begun.fill_(True)

    def commitment(self, key: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared distance of unit keys to their centroids, a scalar; differentiable in the keys. labels: of
        these keys, if they are known."""
        labels = self(key) if labels is None else labels
        if self._runs_on_kernels(key):
            from patterndsl.learn import nearest

            return nearest.commitment(key, self.centroids, labels)
        if strips.takes(key, self.centroids) and not torch.compiler.is_compiling():
            return strips.commitment(key, self.centroids, labels)
        unit = normalize(key.to(self.centroids.dtype), dim=-1)
        found = self.centroids[torch.arange(key.shape[1], device=key.device)[:, None], labels]
        return (unit - found).square().mean()


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and HAS_TRITON


HAS_TRITON = find_spec("triton") is not None
SMOOTHING = 1e-5
MAX_SCORES = 1 << 25
"""Scores that are held at once, over batch and heads."""
FEWEST = 64
"""Centroids that are scored at once even so: with fewer, products take longer."""
