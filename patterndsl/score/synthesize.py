"""Which logits need no keys? The Synthesizer's: made from the queries' states, or learnt for each pair of positions.

Every kind is a module made for sequences of `length` at most and called with the states x [B, T, dim] and the number of
keys; it returns logits for the softmax, [B, H, T, num_keys], or [1, H, T, num_keys] where they do not depend on x. A
shorter sequence takes the first rows and columns. What is masked, also for causality, is left to the caller: the logit
of a pair depends on no other token than the query's own. Source: Tay et al. 2020, arXiv 2005.00743, section 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patterndsl.diagnostics import input_error


class Synthesizer(nn.Module, ABC):
    """What all kinds share: `dim` of the states, `heads`, and the greatest `length` of queries and of keys."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        if min(dim, heads, length) < 1:
            message = f"a synthesizer of dim {dim}, {heads} heads and length {length}"
            raise input_error("E406", message, "give at least 1 of each")
        self.dim, self.heads, self.length = dim, heads, length

    def forward(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        """Logits [B or 1, H, T, num_keys] of states x [B, T, dim], the first at position `start`. Raises InputError
        (E502, E503)."""
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise input_error("E502", f"x is of shape {[*x.shape]}", f"give states [B, T, {self.dim}]")
        longest = max(start + x.shape[1], num_keys)
        if longest > self.length:
            message = f"{start + x.shape[1]} queries and {num_keys} keys for a synthesizer of length {self.length}"
            raise input_error("E503", message, f"make it with length={longest}, or give shorter sequences")
        return self.logits(x, num_keys, start)

    @abstractmethod
    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        """`forward` of what was checked."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, length={self.length}"


class Dense(Synthesizer):
    """Logits of a query: relu(x W1 + b1) W2 + b2, by weights of each head. hidden: the width between, dim unless given.

    Parameters: H (dim + length + 1) hidden + H length. Work: O(B H T hidden (dim + num_keys)).
    """

    def __init__(self, dim: int, heads: int, length: int, *, hidden: int | None = None) -> None:
        super().__init__(dim, heads, length)
        self.first = _HeadLinear(dim, heads, dim if hidden is None else hidden)
        self.second = _HeadLinear(self.first.bias.shape[-1], heads, length)

    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        found: Tensor = self.second(self.first(x.unsqueeze(1)).relu(), num_keys)
        return found


class Random(Synthesizer):
    """Logits that are the same for all inputs: a parameter of each pair, or with trainable=False a fixed draw of it.

    Parameters: H length^2, at first normal. Work: none but to slice.
    """

    def __init__(self, dim: int, heads: int, length: int, *, trainable: bool = True) -> None:
        super().__init__(dim, heads, length)
        self.weight = nn.Parameter(torch.randn(heads, length, length), requires_grad=trainable)

    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        return self.weight[None, :, start : start + x.shape[1], :num_keys]


class FactoredDense(Synthesizer):
    """Logit of key k is a[k mod Na] b[k // Na], where a = x Wa + ba and b = x Wb + bb, by weights of each head.

    Na Nb = length, Na the greatest divisor up to its root. Raises InputError (E505) for a prime length, for which one
    factor would be as long as the dense logits. Parameters: H (dim + 1) (Na + Nb). Work: O(B H T (dim (Na + Nb) +
    num_keys)).
    """

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__(dim, heads, length)
        inner = _inner_factor(length)
        if inner == 1 and length > 1:
            raise input_error("E505", f"length {length} is prime: it has no two factors", _composite_lengths(length))
        self.inner = _HeadLinear(dim, heads, inner)
        self.outer = _HeadLinear(dim, heads, length // inner)

    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        inner = self.inner(x.unsqueeze(1))
        outer = self.outer(x.unsqueeze(1), -(-num_keys // inner.shape[-1]))
        products: Tensor = outer[..., :, None] * inner[..., None, :]
        return products.flatten(-2)[..., :num_keys]


class FactoredRandom(Synthesizer):
    """Logits R1 R2^T that are the same for all inputs, R1 and R2 [H, length, rank]; trainable as in `Random`.

    Parameters: 2 H length rank, at first normal, so scaled that the logits vary as those of `Random`. Work:
    O(H T num_keys rank).
    """

    def __init__(self, dim: int, heads: int, length: int, *, rank: int = 8, trainable: bool = True) -> None:
        super().__init__(dim, heads, length)
        if rank < 1:
            raise input_error("E406", f"factors of rank {rank}", "give a rank of at least 1")
        draws = torch.randn(2, heads, length, rank) * rank**-0.25
        self.rows = nn.Parameter(draws[0].clone(), requires_grad=trainable)
        self.columns = nn.Parameter(draws[1].clone(), requires_grad=trainable)

    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        return (self.rows[:, start : start + x.shape[1]] @ self.columns[:, :num_keys].mT)[None]


class Mixture(Synthesizer):
    """The members' logits added up, weighted by the softmax of one parameter for each member, at first equal.

    members: synthesizers of the same dim, heads and length; others raise InputError (E503). Work: that of the members.
    """

    def __init__(self, dim: int, heads: int, length: int, *, members: Sequence[Synthesizer]) -> None:
        super().__init__(dim, heads, length)
        if not members:
            raise input_error("E503", "a mixture of no members", "give at least one synthesizer")
        for member in members:
            if (member.dim, member.heads, member.length) != (dim, heads, length):
                message = f"{type(member).__name__}({member.extra_repr()}) in a Mixture({self.extra_repr()})"
                raise input_error("E503", message, "make the members with the mixture's dim, heads and length")
        self.members = nn.ModuleList(members)
        self.weight = nn.Parameter(torch.zeros(len(members)))

    def logits(self, x: Tensor, num_keys: int, start: int = 0) -> Tensor:
        shares = self.weight.softmax(0).unbind()
        parts: list[Tensor] = [
            share * member(x, num_keys, start) for share, member in zip(shares, self.members, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class _HeadLinear(nn.Module):
    """x W + b with weights of each head, drawn as nn.Linear draws its own."""

    def __init__(self, dim: int, heads: int, out: int) -> None:
        super().__init__()
        if out < 1:
            raise input_error("E406", f"a layer of width {out}", "give a width of at least 1")
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(heads, dim, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, out).uniform_(-bound, bound))

    def forward(self, x: Tensor, num_out: int | None = None) -> Tensor:
        """[B, H, T, num_out], the first ones, of x [B, H or 1, T, dim]."""
        found: Tensor = x @ self.weight[..., :num_out] + self.bias[..., :num_out]
        return found


def _inner_factor(length: int) -> int:
    """The greatest divisor up to the root."""
    return next(factor for factor in range(math.isqrt(length), 0, -1) if length % factor == 0)


def _composite_lengths(prime: int) -> str:
    """The nearest lengths below and above a prime that have two factors."""
    near = [other for other in (prime - 1, prime + 1) if _inner_factor(other) > 1] or [4]
    return "make it with length=" + " or ".join(
        f"{other} ({_inner_factor(other)} x {other // _inner_factor(other)})" for other in near
    )
