"""How does a pattern run inside the documents of a row? Each by the passes of its length, on views of its positions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from patterndsl.lower.inside import Inside
from patterndsl.lower.shapes import Band, Masked
from patterndsl.runtime import planned
from patterndsl.runtime.planned import Planned

Span: TypeAlias = tuple[int, int]
"""First position and length of a document."""

MAX_KEPT = 1 << 24
"""Pairs of the masks of all lengths that are remembered; with more, all are made anew."""
OF_LENGTH = 1 << 10
"""What a length is counted for beside its masks."""


class Documents:
    """The passes of documents made ready for the CPU, once for each length."""

    def __init__(self, inside: Inside, device: torch.device) -> None:
        self.inside, self.device = inside, device
        self._ready = dict[int, Planned]()
        self._num_kept = 0

    @property
    def lengths(self) -> Collection[int]:
        """Those that are remembered."""
        return self._ready.keys()

    def of(self, length: int) -> Planned:
        """The passes of a document of so many positions."""
        ready = self._ready.get(length)  # another thread may forget it meanwhile
        if ready is None:
            passes = self.inside.at(length)
            shapes = (item.piece.shape for item in passes)
            num_pairs = OF_LENGTH + sum(shape.mask.size for shape in shapes if isinstance(shape, Band | Masked))
            if self._num_kept + num_pairs > MAX_KEPT:
                self._ready.clear()
                self._num_kept = 0
            ready = self._ready[length] = Planned(passes, self.device)
            self._num_kept += num_pairs
        return ready


def spans_of(values: Tensor) -> list[Span] | None:
    """The runs of equal values in a row [N]; None where a value comes back later, so that its run is broken."""
    found, counts = torch.unique_consecutive(values, return_counts=True)
    if len(found.unique()) < len(found):
        return None
    starts = counts.cumsum(0) - counts
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


def forward(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, spans: Sequence[Span], scale: float
) -> tuple[Tensor, Tensor]:
    """Output [1, H, N, D] and lse [1, H, N] of tensors [1, H, N, D], in float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty((*query.shape[:3], value.shape[3]), dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    for start, length in spans:
        q, k, v, into, lse_into = (x.narrow(2, start, length) for x in (query, key, value, out, lse))
        part, part_lse, _ = planned.results(q, k, v, documents.of(length).passes, scale, train=False)
        into.copy_(part)
        lse_into.copy_(part_lse)
    return out, lse


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Sequence[Tensor],
    documents: Documents,
    spans: Sequence[Span],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tensors [1, H, N, D]. results: grad_out and out [1, H, N, D], and lse [1, H, N], of all."""
    totals = tuple(torch.empty(x.shape, dtype=results[2].dtype, device=x.device) for x in (query, key, value))
    for start, length in spans:
        q, k, v, grad_out, out, lse = (x.narrow(2, start, length) for x in (query, key, value, *results))
        found = planned.gradients(q, k, v, out, lse, grad_out, None, documents.of(length), scale)
        for total, grad in zip(totals, found, strict=True):
            total.narrow(2, start, length).copy_(grad)
    return totals[0], totals[1], totals[2]
