"""Partial results form a commutative monoid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patterndsl.runtime.merge import merge

Part = tuple[Tensor, Tensor]


def attend(scores: Tensor, value: Tensor) -> Part:
    """Attention over some keys; over none it is the empty row."""
    if not scores.shape[-1]:
        return value.new_zeros(*scores.shape[:-1], value.shape[-1]), scores.new_full(scores.shape[:-1], -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.fixture
def parts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 30 * torch.randn(5, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)


@pytest.mark.parametrize("cut", [0, 1, 5, 12])
def test_two_halves_are_the_whole(parts: tuple[Tensor, Tensor], cut: int) -> None:
    scores, value = parts
    merged = merge(*attend(scores[:, :cut], value[:cut]), *attend(scores[:, cut:], value[cut:]))
    for ours, whole in zip(merged, attend(scores, value), strict=True):
        torch.testing.assert_close(ours, whole)


def test_commutes_and_associates(parts: tuple[Tensor, Tensor]) -> None:
    scores, value = parts
    a, b, c = (attend(scores[:, at::3], value[at::3]) for at in range(3))
    for ours, theirs in zip(merge(*a, *b), merge(*b, *a), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_empty_rows_are_empty() -> None:
    empty = torch.zeros(4, 3), torch.full((4,), -torch.inf)
    out, lse = merge(*empty, *empty)
    assert torch.equal(out, empty[0])
    assert torch.equal(lse, empty[1])
