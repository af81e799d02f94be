"""Mixtures of all tokens as keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patterndsl.diagnostics import input_error
from patterndsl.source.sequence import Keys, Sequence


class Project(nn.Module):
    """Linformer's projections E and F along the sequence: key E K, value F V (Wang et al. 2020, arXiv 2006.04768,
    equation 7).

    size: mixtures; length: the longest sequence, of which shorter ones use the first columns. share: none, E and F of
    each head; heads, one E and one F for all; keys, one E for keys and values of all heads (the paper's key-value
    sharing). For one E in a whole model (layerwise sharing) give layers the same module. Start: uniform within
    1 / sqrt(size), as the released code of lucidrains/linformer.
    """

    def __init__(self, dim: int, kv_heads: int, head_dim: int, *, size: int, length: int, share: str) -> None:
        super().__init__()
        self.length = length
        heads = kv_heads if share == "none" else 1
        number = 1 if share == "keys" else 2
        self.weights = nn.Parameter((torch.rand(number, heads, size, length) * 2 - 1) * size**-0.5)

    def forward(self, sequence: Sequence) -> Keys:
        """Key and value [B, Hkv, size, D]; tokens that are not present count as 0. Work: O(size T D) of each head.

        Raises InputError (E503) where the sequence is longer than `length`.
        """
        length = sequence.length
        if length > self.length:
            message = f"{length:,} tokens, and the projection is learned for {self.length:,}"
            raise input_error("E503", message, f"declare the source with length = {length} or more")
        weights = self.weights[..., :length]
        key, value = sequence.keys
        if sequence.present is not None:
            gone = ~sequence.present[:, None, :, None]
            key, value = key.masked_fill(gone, 0.0), value.masked_fill(gone, 0.0)
        return _mixed(weights[0], key), _mixed(weights[-1], value)


def _mixed(weights: Tensor, x: Tensor) -> Tensor:
    return weights.to(x.dtype) @ x
