"""How does a query attend one key? Its output is that key's value, and its lse the one score: no kernel is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from patterndsl.runtime.merge import Merged, wide
from patterndsl.runtime.views import Launch, OneLaunch


class SinglePass(OneLaunch):
    """Groups of one query and one key, such as the diagonal."""

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`."""
        q, k, v = _rows(launch, query, key, value)
        score = torch.linalg.vecdot(q.to(wide(q.dtype)), k.to(wide(k.dtype))) * scale
        return v, score, None

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, _: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`."""
        q, k, v = (x.to(wide(x.dtype)) for x in _rows(launch, query, key, value))
        rows = (merged.out, merged.grad_out, merged.lse)
        out, grad_out, lse = (launch.queries.grouped(x).to(q.dtype) for x in rows)
        weight = torch.exp(torch.linalg.vecdot(q, k) * scale - lse)
        d_score = weight * torch.linalg.vecdot(grad_out, v - out) * scale
        return d_score[..., None] * k, d_score[..., None] * q, weight[..., None] * grad_out


def _rows(launch: Launch, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B * H, groups, 1, D] each."""
    return launch.queries.grouped(query), launch.keys.grouped(key), launch.keys.grouped(value)
