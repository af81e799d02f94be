"""Where does what lives for a moment lie? In memory that is used again and again: new pages take longer than what is
written to them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Scratch:
    """Memory by name, of one dtype on one device, as large as the largest tensor that was asked for by that name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor with whatever numbers were there; it holds until the name is asked for again."""
        number, flat = prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < number:
            flat = self._flat[name] = torch.empty(number, dtype=self.dtype, device=self.device)
        return flat[:number].view(shape)


__all__ = ["Scratch"]
