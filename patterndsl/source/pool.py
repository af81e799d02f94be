"""Windows of tokens as one key each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from patterndsl.source.sequence import Keys, Sequence


def margins(length: int, size: int, stride: int, edge: str) -> tuple[int, int, int]:
    """How many windows there are of a sequence, and the positions that are put before and after it; negative ones are
    left out.

    edge: none, only windows that lie within; left, windows that end at the last token and every `stride` before;
    right, windows from the first token on until all are covered, or none is left to start at.
    """
    match edge:
        case "left":
            number = -(-length // stride)
            front = size - stride + -length % stride
        case "right":
            number = min(-(-length // stride), max(1, -(-(length - size) // stride) + 1))
            front = 0
        case _:
            number, front = max(0, (length - size) // stride + 1), 0
    covered = (number - 1) * stride + size if number else 0
    return number, front, covered - front - length


def windows(x: Tensor, size: int, stride: int, edge: str, fill: float = 0.0) -> Tensor:
    """[..., windows, size] of x [..., T]; positions outside hold `fill`."""
    number, front, back = margins(x.shape[-1], size, stride, edge)
    if number == 0:
        return x.new_empty((*x.shape[:-1], 0, size))
    return pad(x, (front, back), value=fill).unfold(-1, size, stride)


class Pool(nn.Module):
    """One key for each window of `size` tokens, every `stride`.

    by: mean or max of the tokens that are there, or a convolution (Liu et al. 2018, arXiv 1801.10198, section 4.2.3),
    which takes 0 for those that are not. of: states, which are then projected, or keys and values, each head by itself,
    both by one convolution. pad: see `margins`.
    """

    def __init__(
        self, dim: int, kv_heads: int, head_dim: int, *, size: int, stride: int, by: str, pad: str, of: str
    ) -> None:
        super().__init__()
        self.size, self.stride, self.by, self.edge, self.of = size, stride, by, pad, of
        self.conv: nn.Conv1d | None = None
        if by == "conv":
            width, groups = (dim, 1) if of == "states" else (kv_heads * head_dim, kv_heads)
            self.conv = nn.Conv1d(width, width, size, stride, groups=groups)

    def forward(self, sequence: Sequence) -> Keys:
        """Key and value [B, Hkv, windows, D]. Work: O(T size D), of a convolution O(T / stride size D^2)."""
        present = sequence.present
        if self.of == "states":
            return sequence.project(self.pooled(sequence.states.transpose(1, 2), present).transpose(1, 2))
        key, value = (self._by_head(x, present) for x in sequence.keys)
        return key, value

    def _by_head(self, x: Tensor, present: Tensor | None) -> Tensor:
        """[B, H, windows, D] of x [B, H, T, D], pooled channel by channel."""
        batch, heads, length, width = x.shape
        found = self.pooled(x.transpose(2, 3).reshape(batch, heads * width, length), present)
        return found.view(batch, heads, width, found.shape[-1]).transpose(2, 3)

    def pooled(self, x: Tensor, present: Tensor | None) -> Tensor:
        """[B, C, windows] of x [B, C, T]; a window without tokens is 0."""
        there = torch.ones_like(x[:, :1], dtype=torch.bool) if present is None else present[:, None]
        if self.by == "max":
            lowest = torch.finfo(x.dtype).min
            found = windows(x.masked_fill(~there, lowest), self.size, self.stride, self.edge, lowest)
            return found.amax(-1).masked_fill(~self.some(there), 0.0) if found.shape[-2] else found[..., 0]
        x = x.masked_fill(~there, 0.0)
        if self.conv is not None:
            number, front, back = margins(x.shape[-1], self.size, self.stride, self.edge)
            convolved: Tensor = self.conv(pad(x, (front, back))) if number else x[..., :0]
            return convolved
        counts = windows(there.to(x.dtype), self.size, self.stride, self.edge).sum(-1)
        return windows(x, self.size, self.stride, self.edge).sum(-1) / counts.clamp(min=1)

    def some(self, there: Tensor) -> Tensor:
        """bool [B, 1, windows]: whether any token of a window is there."""
        return windows(there.to(torch.float32), self.size, self.stride, self.edge).sum(-1) > 0
