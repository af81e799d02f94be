"""Run by test_fused.py with TRITON_INTERPRET=1: prints a line for each case in which kernels agree with their twin."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from patterndsl.score import fused
from patterndsl.score.features import Elementwise
from patterndsl.score.linear import kernel_attention
from patterndsl.score.state import State

DECAY = (0.7, 0.999)


def leaves(length: int, heads: int, dim: int, value_dim: int, with_state: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    tensors = (normal(1, heads, length, dim), normal(1, 2, length, dim), normal(1, 2, length, value_dim))
    if not with_state:
        return tensors
    state = (normal(1, 2, dim, value_dim), normal(1, 2, dim))
    return (*tensors, *(x.detach().abs().requires_grad_() for x in state))


def results(phi: Elementwise, decays: bool, normalise: bool, given: tuple[Tensor, ...], kernels: bool) -> list[Tensor]:
    """Output, state, and all gradients, also through the state."""
    query, key, value, *rest = given
    state = State(rest[0], rest[1], torch.zeros_like(rest[1])) if rest else None
    if kernels:
        log_decay = torch.tensor(DECAY, dtype=torch.float64).log().float() if decays else None
        out, after = fused.causal_sums(query, key, value, state, fused.Sums(phi, phi, normalise, log_decay))
    else:
        out, after = kernel_attention(
            query, key, value, causal=True, state=state, phi=phi, decay=DECAY if decays else None, normalise=normalise
        )
    generator = torch.Generator().manual_seed(0)
    found = (out, after.numerator, after.denominator)
    pulled = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in found)
    assert isinstance(pulled, Tensor)
    return [*found, *torch.autograd.grad(pulled, given)]


def check(length: int, heads: int, dim: int, phi: Elementwise, decays: bool, normalise: bool, state: bool) -> None:
    given = leaves(length, heads, dim, dim + 3, state)
    ours, twins = (results(phi, decays, normalise, given, kernels) for kernels in (True, False))
    for mine, other in zip(ours, twins, strict=True):
        assert (mine - other).abs().max() <= 2e-5 * other.abs().max(), (mine - other).abs().max()
    print("ok")


kinds: tuple[tuple[Elementwise, bool], ...] = (("linear", False), ("elu", True), ("relu", True))
for (phi, normalise), whole in itertools.product(kinds, (False, True)):
    check(75, 2, 5, phi, whole, normalise, whole)
fused.PROGRAMS = 4  # segments of two chunks, as of long sequences
for (phi, normalise), heads in itertools.product(kinds, (2, 4)):
    check(101, heads, 16, phi, True, normalise, False)
check(1, 4, 3, "elu", True, True, True)
check(33, 4, 20, "elu", False, False, True)
