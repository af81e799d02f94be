"""Modules by names that a user chose."""

from __future__ import annotations

from torch import nn


class Named(nn.ModuleDict):
    """A dictionary of modules whose names may also be those of its methods, such as `keys`: it is asked by [name]."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module
