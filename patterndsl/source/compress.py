"""Old memories as fewer keys."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import pad

Attend = Callable[[Tensor], Tensor]
"""What queries read of states [B, T, dim] as their only keys."""


class Compress(nn.Module):
    """Compression functions of Rae et al. 2019, arXiv 1911.05507, section 3.2: `rate` old memories become one.

    by: conv, a convolution of kernel and stride `rate`; dilated, the same with every second of twice as many; mean and
    max of `rate` in a row; most_used, those with the largest part of past attention, in their order. loss: attention,
    what queries read of old and of new memories is to be alike (algorithm 2); states, old memories are to be told from
    new ones; none.
    """

    def __init__(self, dim: int, *, rate: int, by: str, loss: str) -> None:
        super().__init__()
        self.rate, self.by, self.kind = rate, by, loss
        self.conv: nn.Conv1d | None = None
        if by in ("conv", "dilated"):
            dilation = 2 if by == "dilated" else 1
            self.conv = nn.Conv1d(dim, dim, rate, rate, dilation=dilation)
        self.decoder = nn.ConvTranspose1d(dim, dim, rate, rate) if loss == "states" else None

    def forward(self, old: Tensor, usage: Tensor | None = None) -> Tensor:
        """[B, T / rate, dim] of memories old [B, T, dim], T a multiple of the rate. usage: [B, T], how much of the
        attention each had, for most_used. Work: O(T dim), of convolutions O(T dim^2)."""
        batch, length, dim = old.shape
        assert length % self.rate == 0
        if length == 0:
            return old
        if self.conv is not None:
            x = old.transpose(1, 2)
            if self.by == "dilated":  # as many outputs as without dilation
                x = pad(x, (self.rate - 1, 0))
            compressed: Tensor = self.conv(x)
            return compressed.transpose(1, 2)
        if self.by == "most_used":
            assert usage is not None
            kept = usage.topk(length // self.rate, dim=1).indices.sort(1).values
            return old.gather(1, kept[..., None].expand(-1, -1, dim))
        grouped = old.view(batch, -1, self.rate, dim)
        return grouped.amax(2) if self.by == "max" else grouped.mean(2)

    def loss(self, old: Tensor, new: Tensor, attend: Attend) -> Tensor:
        """How much is lost: a mean of squares, a scalar. It moves nothing but the compression: `attend` is to have no
        gradient but to what it reads of."""
        if self.kind == "states":
            assert self.decoder is not None
            told: Tensor = self.decoder(new.transpose(1, 2))
            return (told.transpose(1, 2) - old.detach()).square().mean()
        return (attend(old.detach()).detach() - attend(new)).square().mean()

    @property
    def has_loss(self) -> bool:
        """Whether there is one, and something that learns from it."""
        return self.kind != "none" and any(True for _ in self.parameters())
