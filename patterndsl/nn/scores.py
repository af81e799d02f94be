"""What does a layer hold beside its projections, so that pairs have scores?

Tables that biases look up, random directions, and modules that make scores up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Row
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from patterndsl.composite import Composite
from patterndsl.learn.again import Calls
from patterndsl.pattern import Pattern
from patterndsl.runtime.scored import Scalars, Sinusoids, Vectors
from patterndsl.runtime.summed import drawn_directions
from patterndsl.score.synthesize import Dense, FactoredDense, FactoredRandom, Mixture, Random, Synthesizer


class Table(nn.Module):
    """What a bias looks up; see `runtime.scored`. Scalars start at 0, vectors and weights as a linear map does."""

    def __init__(self, kind: str, size: int | None, heads: int, head_dim: int, dim: int) -> None:
        super().__init__()
        self.kind = kind
        match kind:
            case "scalars":
                self.weight = nn.Parameter(torch.zeros(heads, size or 0))
            case "vectors":
                self.weight = nn.Parameter(torch.randn(heads, size or 0, head_dim) * head_dim**-0.5)
            case _:
                self.weight = nn.Parameter(torch.randn(heads, head_dim, dim) * dim**-0.5)
                self.u, self.v = (nn.Parameter(torch.zeros(heads, head_dim)) for _ in range(2))

    def forward(self) -> Scalars | Vectors | Sinusoids:
        """What a bias looks up: [H, size]; of vectors [H, size, D]; of sinusoids [H, D, dim] with u and v [H, D]."""
        match self.kind:
            case "scalars":
                return Scalars(self.weight)
            case "vectors":
                return Vectors(self.weight)
            case _:
                return Sinusoids(self.weight, self.u, self.v)


ONLY = "only_"
"""What modules of branches are called by, as the only branch has the name ""."""


class Directions(nn.Module):
    """The random directions of FAVOR+ [M, D], the same for all heads; in training drawn anew every `redraw` calls.

    A call that checkpointing runs again has those of its first run.
    """

    directions: Tensor
    calls: Tensor

    def __init__(self, settings: Mapping[str, int | float | str], head_dim: int) -> None:
        super().__init__()
        self.settings, self.head_dim = settings, head_dim
        self.register_buffer("directions", drawn_directions(settings, head_dim).clone())
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.earlier: Calls[Tensor] = Calls()

    def forward(self) -> Tensor:
        """The directions of this call, [M, D]; a checkpointed call that runs again gets those of its first run."""
        redraw = int(self.settings["redraw"])
        if not self.training or not redraw:
            return self.directions
        former = self.earlier.started()
        if former is not None:
            return former
        turn = int(self.calls) + 1
        if turn % redraw == 0:
            # a tensor of its own, as the backward pass of earlier calls needs the former ones
            drawn = drawn_directions(self.settings, self.head_dim, turn // redraw)
            self.directions = drawn.to(self.directions.device)
        self.calls.fill_(turn)
        self.earlier.begin(self.directions)
        return self.directions

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves directions to another device, and leaves their dtype: rounded they are not orthogonal."""
        exact = self.directions
        without_types: Any = super()._apply
        without_types(fn, recurse)
        if not exact.is_meta:
            self.directions = exact.to(self.directions.device)
        return self


class Zeros(nn.Module):
    """What stands for a projection that nothing reads: a parameter would never have a gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Zeros [..., width] for x [..., any width], of its dtype and device."""
        return x.new_zeros((*x.shape[:-1], self.width))


class WithProduct(nn.Module):
    """Scores that are made up beside the product of query and key, whose part is learned as well."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made
        self.weight = nn.Parameter(torch.zeros(2))

    def share(self) -> Tensor:
        """The part of the product."""
        return self.weight.softmax(0)[0]

    def forward(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        """Logits [B or 1, H, T, num_keys] of states x [B, T, dim], weighted by what the product leaves; errors are the
        synthesizer's."""
        return cast("Tensor", self.weight.softmax(0)[1] * self.made(x, num_keys, start))


def score_modules(pattern: Pattern, dim: int, heads: int, head_dim: int) -> dict[str, nn.Module]:
    """What scores of branches need: directions, or modules that make scores up."""
    found: dict[str, nn.Module] = {}
    for name, branch in pattern.branches.items() if isinstance(pattern, Composite) else ():
        assert isinstance(pattern, Composite)
        settings = pattern.score_settings(name)
        if branch.score.name == "favor":
            found[ONLY + name] = Directions(settings, head_dim)
        elif branch.is_made_up:
            found[ONLY + name] = _synthesizer(branch.score.makers, settings, dim, heads)
    return found


def _synthesizer(makers: Row[str], settings: Mapping[str, int | float | str], dim: int, heads: int) -> nn.Module:
    length, rank, trainable = int(settings["length"]), int(settings["rank"]), settings["learned"] == "yes"
    members: list[Synthesizer] = []
    for maker in makers:
        match maker:
            case "dense":
                members.append(Dense(dim, heads, length))
            case "random":
                members.append(Random(dim, heads, length, trainable=trainable))
            case "factored_dense":
                members.append(FactoredDense(dim, heads, length))
            case "factored_random":
                members.append(FactoredRandom(dim, heads, length, rank=rank, trainable=trainable))
    made = members[0] if len(members) == 1 else Mixture(dim, heads, length, members=members)
    return WithProduct(made) if "product" in makers else made


def tables_of(pattern: Pattern) -> list[tuple[str, str, int | None]]:
    """Name, kind and size of each table."""
    if not isinstance(pattern, Composite):
        return []
    return [(item.name, item.kind, pattern.table_size(item.name)) for item in pattern.resolved.tables]
