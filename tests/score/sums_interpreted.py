"""Run by test_fused.py with TRITON_INTERPRET=1: prints a line for each case in which kernels agree with their twin."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from patterndsl.score import fused, fused_logs
from patterndsl.score.features import Elementwise, directions, favor_exponents
from patterndsl.score.linear import kernel_attention
from patterndsl.score.state import State
from tests.hastening import hasten

hasten()
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
fused.PROGRAMS = 2048  # more segments than the scan reads ahead
check(230, 2, 4, "linear", True, False, True)


def log_leaves(length: int, heads: int, num_features: int, is_wild: bool) -> tuple[Tensor, ...]:
    """Exponents of FAVOR+, values, and sums of a state. is_wild: norms from 0.1 to 30."""
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(1, number, length, 4, generator=generator) for number in (heads, 2))
    if is_wild:
        norms = torch.logspace(-1, 1.5, length)[torch.arange(length) * 7 % length, None]
        query, key = query * norms, key * norms
    w = directions(num_features, 4, orthogonal=True, seed=1)
    value = torch.randn(1, 2, length, 5, generator=generator)
    numerator = torch.randn(1, 2, num_features, 5, generator=generator)
    made = (favor_exponents(query, w, False), favor_exponents(key, w, False), value, numerator, numerator[..., 0].exp())
    return tuple(x.detach().requires_grad_() for x in made)


def log_results(given: tuple[Tensor, ...], with_state: bool, kernels: bool) -> list[Tensor]:
    query, key, value, numerator, denominator = given
    shift = torch.linspace(-2, 1, numerator.shape[2]).to(numerator).expand(denominator.shape)
    state = State(numerator, denominator, shift) if with_state else None
    if kernels:
        out, after = fused_logs.causal_log_sums(query, key, value, state)
    else:
        out, after = kernel_attention(query, key, value, causal=True, state=state, is_log=True)
    generator = torch.Generator().manual_seed(0)
    found = (out, after.numerator, after.denominator)
    pulled = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in found)
    assert isinstance(pulled, Tensor)
    leaves = given if with_state else given[:3]
    return [*found, after.shift, *torch.autograd.grad(pulled, leaves)]


for length, heads, num_features, is_wild, with_state, programs in (
    (37, 2, 6, True, False, 2048),
    (70, 4, 16, False, True, 8),
    (70, 2, 5, True, True, 4),
    (1, 4, 3, False, True, 2048),
):
    fused_logs.PROGRAMS = programs
    given = log_leaves(length, heads, num_features, is_wild)
    wide = tuple(x.detach().double().requires_grad_() for x in given)
    ours, twins = log_results(given, with_state, True), log_results(wide, with_state, False)
    # exponents reach some hundreds where norms are wild, and have as many units of the last place
    tolerance = 1e-4 if is_wild else 1e-5
    for mine, other in zip(ours, twins, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max(), (mine - other).abs().max()
    print("ok")
