"""What does a layer remember between segments?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from patterndsl.score.state import State as Sums


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """States of earlier segments, without gradient; see `Attention.init_state`.

    recalled: of each `recall` source the last of them, [B, up to size, dim]. waiting: of each `compress` source those
    that are recalled no more and too few to be compressed, [B, fewer than rate, dim]. compressed: [B, up to size, dim].
    usage: of each recalled or waiting state the attention it had, [B, T], where a compression asks for it. sums: of
    each branch that sums features, "" for the only one, the sums over all earlier keys. pattern, layer: whose it is,
    by canonical text and number.
    """

    recalled: Mapping[str, Tensor] = field(default_factory=dict)
    waiting: Mapping[str, Tensor] = field(default_factory=dict)
    compressed: Mapping[str, Tensor] = field(default_factory=dict)
    usage: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, Sums] = field(default_factory=dict)
    pattern: str = ""
    layer: int = 0


def detached(sums: Sums) -> Sums:
    """The same sums without gradient."""
    return Sums(sums.numerator.detach(), sums.denominator.detach(), sums.shift.detach())
