"""Learned rows that every query may attend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patterndsl.source.sequence import Keys, Sequence


class Memory(nn.Module):
    """`size` learned rows before the sequence: of = states, rows of the layer's width that are projected as tokens are
    (inducing points, Lee et al. 2019, section 3.2); of = keys, a key and a value of each head (the memory keys of
    Routing Transformer's code, the null key of memory-compressed attention).

    Rows start as draws of N(0, 1 / width), so that they are told apart.
    """

    def __init__(self, dim: int, kv_heads: int, head_dim: int, *, size: int, of: str) -> None:
        super().__init__()
        shape = (size, dim) if of == "states" else (2, kv_heads, size, head_dim)
        self.rows = nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)

    def forward(self, sequence: Sequence) -> Keys:
        """Key and value [B, Hkv, size, D]. Work: O(size dim^2)."""
        batch = sequence.states.shape[0]
        if self.rows.dim() == 2:
            key, value = sequence.project(self.rows[None])
        else:
            key, value = (part[None].to(sequence.keys[0].dtype) for part in self.rows)
        return _for_each(key, batch), _for_each(value, batch)


def _for_each(x: Tensor, batch: int) -> Tensor:
    return x.expand(batch, -1, -1, -1)
