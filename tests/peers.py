"""How do layers of ours compute with the weights of independent code? For tests beside packages of the same papers.

Weights of ours are made of theirs, so that both have gradients to the same leaves.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import patterndsl
from patterndsl.nn import Attention

EXAMPLES = Path(__file__).parents[1] / "examples"
DIM, HEADS, BATCH = 12, 4, 2
D = DIM // HEADS
Weights = Mapping[str, Tensor]


def imported(name: str) -> ModuleType:
    """A module of theirs, of the extra `peers`. The test is skipped where it is not there: it is research code of
    others, which nothing of ours needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed; to compare with it: pip install '.[peers]'")


def seeded(make: Any, *args: Any, **options: Any) -> Any:
    """A module of theirs in float64, whose weights are the same each time."""
    torch.manual_seed(0)
    return make(*args, **options).double()


def states(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def example(path: str, **params: int) -> patterndsl.Pattern:
    return patterndsl.load(EXAMPLES / f"{path}.yaml").with_params(**params)


def layer_of(pattern: Any, **options: Any) -> Attention:
    return Attention(pattern, DIM, HEADS, **options).double()


def projections(query: Tensor, key: Tensor, value: Tensor, output: nn.Linear) -> dict[str, Tensor]:
    """The weights of a layer of ours by those of theirs, which have biases at the output alone."""
    found = {"output_projection.weight": output.weight, "output_projection.bias": output.bias}
    for name, weight in (("query", query), ("key", key), ("value", value)):
        found[f"{name}_projection.weight"] = weight
        found[f"{name}_projection.bias"] = torch.zeros_like(weight[:, 0])
    return found


def called(layer: nn.Module, weights: Weights, *args: Any, **options: Any) -> Any:
    """The layer with these weights, all of its weights."""
    return functional_call(layer, dict(weights), args, options, strict=True)


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T, D] of states [B, T, dim]."""
    return (x @ weight.T).unflatten(-1, (-1, D)).transpose(1, 2)


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    weight = states(*ours.shape, seed=2)
    found, expected = (torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)
