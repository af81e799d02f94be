"""What does a source make keys of? What a layer has of its sequence: states, their projections, and how to project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Keys: TypeAlias = tuple[Tensor, Tensor]
"""Key [B, Hkv, T, D] and value [B, Hkv, T, Dv]."""
Project: TypeAlias = Callable[[Tensor], Keys]
"""Key and value of states [B, T, dim], by the projections of a layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """states: [B, T, dim], the layer's input; keys: what it projects to. present: bool [B, T], False where a token is
    padding; None where all are there."""

    states: Tensor
    keys: Keys
    project: Project
    present: Tensor | None = None
    training: bool = False

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.states.shape[1]
