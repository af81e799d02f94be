"""Features: their values, the law of the directions, and what FAVOR+ estimates."""

from __future__ import annotations

import math

import pytest
import torch

from patterndsl.diagnostics import InputError
from patterndsl.score.features import directions, elu_features, favor_exponents, relu_features

DTYPE = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def estimates(q: torch.Tensor, k: torch.Tensor, num: int, draws: int, **settings: bool) -> torch.Tensor:
    """[draws]: phi(q).phi(k) with fresh directions for each."""
    hyperbolic = settings.pop("hyperbolic", False)
    found = []
    for seed in range(draws):
        w = directions(num, len(q), seed=seed, dtype=DTYPE, **settings)
        found.append((favor_exponents(q, w, hyperbolic) + favor_exponents(k, w, hyperbolic)).exp().sum())
    return torch.stack(found)


def test_elementwise_features() -> None:
    x = torch.tensor([-800.0, -40.0, -1.0, 0.0, 0.5, 3.0], dtype=DTYPE, requires_grad=True)
    expected = torch.tensor([0.0, math.exp(-40), math.exp(-1), 1.0, 1.5, 4.0], dtype=DTYPE)
    torch.testing.assert_close(elu_features(x), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(elu_features(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(elu_features(x).sum(), x)
    torch.testing.assert_close(slope, expected.clamp(max=1), rtol=1e-14, atol=0)
    assert relu_features(x).tolist() == [1e-3, 1e-3, 1e-3, 1e-3, 0.501, 3.001]


@pytest.mark.parametrize(("num", "dim"), [(1, 1), (3, 8), (8, 8), (21, 8)])
@pytest.mark.parametrize("regularized", [False, True])
def test_blocks_are_orthogonal_and_the_last_is_cut(num: int, dim: int, regularized: bool) -> None:
    w = directions(num, dim, orthogonal=True, seed=3, regularized=regularized, dtype=DTYPE)
    assert w.shape == (num, dim)
    for block in w.split(dim):
        gram = block @ block.mT
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)
    if regularized:
        torch.testing.assert_close(w.norm(dim=-1), torch.full((num,), dim**0.5, dtype=DTYPE))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_same_seed_same_directions(orthogonal: bool) -> None:
    torch.manual_seed(1)
    first = directions(9, 4, orthogonal=orthogonal, seed=5)
    state = torch.get_rng_state()
    assert torch.equal(first, directions(9, 4, orthogonal=orthogonal, seed=5))
    assert not torch.equal(first, directions(9, 4, orthogonal=orthogonal, seed=6))
    assert torch.equal(state, torch.get_rng_state()), "the global generator is not touched"
    assert first.dtype == torch.float32


@pytest.mark.parametrize("orthogonal", [False, True])
def test_directions_have_the_moments_of_a_gaussian(orthogonal: bool) -> None:
    """Mean 0, also of the first entry (without the sign correction it is negative), and covariance 1."""
    draws = torch.stack([directions(4, 4, orthogonal=orthogonal, seed=seed, dtype=DTYPE) for seed in range(1000)])
    rows = draws.flatten(0, 1)
    assert (draws.mean(0).abs() < 4.5 / math.sqrt(1000)).all()
    torch.testing.assert_close(rows.mT @ rows / len(rows), torch.eye(4, dtype=DTYPE), rtol=0, atol=0.12)


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_estimate_is_unbiased(orthogonal: bool, hyperbolic: bool, aligned: bool) -> None:
    dim = 4
    q, k = normal(dim, seed=1), normal(dim, seed=2)
    if aligned:  # along a coordinate, where a Q without corrected signs is most biased
        q = k = torch.tensor([1.2, 0, 0, 0], dtype=DTYPE)
    draws = estimates(q, k, dim, 600, orthogonal=orthogonal, hyperbolic=hyperbolic)
    z = (draws.mean() - (q @ k / dim**0.5).exp()) / (draws.std() / len(draws) ** 0.5)
    assert abs(z) < 4


def test_orthogonal_and_hyperbolic_vary_less() -> None:
    q, k = normal(8, seed=1), normal(8, seed=2)
    independent = estimates(q, k, 8, 1000, orthogonal=False).var()
    assert estimates(q, k, 8, 1000, orthogonal=True).var() < 0.95 * independent
    assert estimates(q, k, 4, 1000, orthogonal=False, hyperbolic=True).var() < independent


def test_error_falls_as_one_over_root_of_features() -> None:
    q, k = normal(8, seed=1) / 2, normal(8, seed=2) / 2
    exact = (q @ k / 8**0.5).exp()
    sizes = (16, 64, 256)
    errors = [(estimates(q, k, m, 250, orthogonal=False) - exact).square().mean().sqrt().item() for m in sizes]
    slopes = [math.log(errors[at + 1] / errors[at], 4) for at in range(2)]
    assert all(-0.65 < slope < -0.35 for slope in slopes)


@pytest.mark.parametrize("hyperbolic", [False, True])
def test_exponents_by_loops_and_gradient(hyperbolic: bool) -> None:
    x, w = normal(2, 3, 5, seed=4).requires_grad_(), normal(7, 5, seed=5)
    found = favor_exponents(x, w, hyperbolic)
    rows = [*w, *(-w)] if hyperbolic else [*w]
    for b in range(2):
        for t in range(3):
            y = x[b, t] / 5**0.25
            for m, row in enumerate(rows):
                phi = (row @ y - y @ y / 2).exp() / len(rows) ** 0.5
                torch.testing.assert_close(found[b, t, m], phi.log(), rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda x: favor_exponents(x, w, hyperbolic), x)


def test_half_precision_exponents_are_float32() -> None:
    assert favor_exponents(normal(3, 4).half(), normal(2, 4), False).dtype == torch.float32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="E503"):
        favor_exponents(normal(3, 4), normal(2, 5), False)
    with pytest.raises(InputError, match="E406"):
        directions(0, 4, orthogonal=True, seed=0)
