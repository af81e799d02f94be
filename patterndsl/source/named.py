"""Modules by names that a user chose."""

from __future__ import annotations

from typing import Self

from torch import nn


class Named(nn.ModuleDict):
    """A dictionary of modules whose names may also be those of its methods, such as `keys`: it is asked by [name]."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module

    def train(self, mode: bool = True) -> Self:
        """As of any module, though one of these may be called `training`."""
        object.__setattr__(self, "training", mode)
        for module in self.children():
            module.train(mode)
        return self
