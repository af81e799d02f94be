"""Weights that decay with the distance, and weights that are not divided by their sum, against loops over pairs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from patterndsl.diagnostics import InputError
from patterndsl.score.features import Elementwise, directions, elementwise, favor_exponents
from patterndsl.score.linear import empty_state, kernel_attention, read, step

DTYPE = torch.float64
DECAY = (0.6, 1.0, 1e-6, 0.999)
KINDS: tuple[Elementwise | None, ...] = ("linear", "elu", "relu", None)
"""None: FAVOR+, whose features are logarithms."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def case(kind: Elementwise | None, length: int, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves: query [2, heads, T, 4], key [2, 4, T, 4] or their exponents, and value [2, 4, T, 3]."""
    query, key = normal(2, heads, length, 4, seed=1), normal(2, 4, length, 4, seed=2)
    if kind is None:
        w = directions(6, 4, orthogonal=True, seed=1, dtype=DTYPE)
        query, key = favor_exponents(query, w, False), favor_exponents(key, w, False)
    return query.requires_grad_(), key.requires_grad_(), normal(2, 4, length, 3, seed=3).requires_grad_()


def looped(
    q: Tensor, k: Tensor, v: Tensor, kind: Elementwise | None, normalise: bool, keep: Tensor | None = None
) -> Tensor:
    """Row by row: the weights of the keys that it sees."""
    q, k = (part.exp() if kind is None else elementwise(kind, part) for part in (q, k))
    group, rows = q.shape[1] // k.shape[1], []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        seen = [j for j in range(i + 1) if keep is None or keep[b, j]]
        fades = torch.tensor([DECAY[h // group] ** (i - j) for j in seen], dtype=DTYPE)
        weights = fades * (k[b, h // group, seen] @ q[b, h, i])
        row = weights @ v[b, h // group, seen]
        rows.append(row / weights.sum() if normalise and seen else row)
    return torch.stack(rows).reshape(*q.shape[:3], v.shape[-1])


def check(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    pull = normal(*found.shape, seed=9)
    have = torch.autograd.grad((found * pull).sum(), leaves)
    want = torch.autograd.grad((expected * pull).sum(), leaves)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def attended(leaves: tuple[Tensor, ...], kind: Elementwise | None, normalise: bool, **options: Any) -> Tensor:
    phi: Elementwise = "linear" if kind is None else kind
    return kernel_attention(
        *leaves,
        causal=True,
        is_log=kind is None,
        phi=phi,
        decay=DECAY,
        normalise=normalise,
        **options,
    )[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_is_the_loop(kind: Elementwise | None, length: int) -> None:
    normalise = kind != "linear"
    leaves = case(kind, length)
    check(attended(leaves, kind, normalise), looped(*leaves, kind, normalise), leaves)


@pytest.mark.parametrize("kind", ["elu", None])
def test_not_normalised(kind: Elementwise | None) -> None:
    leaves = case(kind, 21)
    check(attended(leaves, kind, False), looped(*leaves, kind, False), leaves)


@pytest.mark.parametrize("kind", ["linear", None])
def test_heads_share_keys(kind: Elementwise | None) -> None:
    leaves = case(kind, 9, heads=8)
    check(attended(leaves, kind, False), looped(*leaves, kind, False), leaves)


@pytest.mark.parametrize("kind", ["linear", "elu", None])
def test_dropped_keys_still_take_time(kind: Elementwise | None) -> None:
    leaves, normalise = case(kind, 19), kind != "linear"
    keep = torch.rand(2, 19, generator=torch.Generator().manual_seed(4)) < 0.6
    keep[:, :2] = False
    check(attended(leaves, kind, normalise, keep=keep), looped(*leaves, kind, normalise, keep), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_and_steps_are_the_whole(kind: Elementwise | None) -> None:
    """Cut anywhere, with more than a chunk in one segment, and the last tokens one by one."""
    leaves, normalise = case(kind, 160), kind != "linear"
    phi: Elementwise = "linear" if kind is None else kind
    whole = attended(leaves, kind, normalise)
    state, outputs = None, []
    for start, stop in itertools.pairwise([0, 3, 150, 150, 158]):
        parts = (x[:, :, start:stop] for x in leaves)
        out, state = kernel_attention(
            *parts, causal=True, state=state, is_log=kind is None, phi=phi, decay=DECAY, normalise=normalise
        )
        outputs.append(out)
    for at in (158, 159):
        query, key, value = (x[:, :, at : at + 1] for x in leaves)
        assert state is not None
        out, state = step(query, key, value, state, kind is None, phi=phi, decay=DECAY, normalise=normalise)
        outputs.append(out)
    check(torch.cat(outputs, 2), whole, leaves)
    assert state is not None
    last = read(leaves[0][:, :, -1:], state, kind is None, phi=phi, normalise=normalise)
    torch.testing.assert_close(last, whole[:, :, -1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", None])
def test_gradients_reach_the_state_before(kind: Elementwise | None) -> None:
    query, key, value = case(kind, 70)
    start = empty_state(2, 4, key.shape[-1], 3, dtype=DTYPE)
    numerator = normal(*start.numerator.shape, seed=5).abs().requires_grad_()
    denominator = normal(*start.denominator.shape, seed=6).abs().requires_grad_()
    before = type(start)(numerator, denominator, torch.zeros_like(start.shift))
    out, after = kernel_attention(
        query, key, value, causal=True, state=before, is_log=kind is None, decay=DECAY, normalise=kind is None
    )
    fades = torch.tensor(DECAY, dtype=DTYPE)[:, None] ** torch.arange(1, 71)
    phi = query.exp() if kind is None else query
    own = kernel_attention(query, key, value, causal=True, is_log=kind is None, decay=DECAY, normalise=False)[0]
    expected = own + fades[..., None] * (phi @ numerator)
    if kind is None:
        ones = torch.ones_like(value[..., :1])
        weights = kernel_attention(query, key, ones, causal=True, is_log=True, decay=DECAY, normalise=False)[0]
        expected = expected / (weights + fades[..., None] * (phi @ denominator[..., None]))
    leaves = (query, key, value, numerator, denominator) if kind is None else (query, key, value, numerator)
    check(out, expected, leaves)
    scale = after.shift.exp()[..., None]
    faded = (torch.tensor(DECAY, dtype=DTYPE) ** 70)[:, None, None] * numerator
    of_keys = kernel_attention(query, key, value, causal=True, is_log=kind is None, decay=DECAY)[1]
    expected_state = faded + of_keys.numerator * of_keys.shift.exp()[..., None]
    torch.testing.assert_close(after.numerator * scale, expected_state, rtol=1e-9, atol=1e-9)


def test_what_no_later_key_changes() -> None:
    for kind in KINDS:
        query, key, value = case(kind, 130)
        before = attended((query, key, value), kind, kind != "linear")
        with torch.no_grad():
            key[:, :, 100:] *= 3
            value[:, :, 100:] += 1e3
        after = attended((query, key, value), kind, kind != "linear")
        assert torch.equal(before[:, :, :100], after[:, :, :100])
        assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("decay", "causal", "said"),
    [((1.0,), True, "for 4 heads"), ((1.0, 1.0, 0.0, 1.0), True, "above 0"), ((1.0,) * 4, False, "one query")],
)
def test_what_is_refused(decay: tuple[float, ...], causal: bool, said: str) -> None:
    with pytest.raises(InputError, match="E503") as caught:
        kernel_attention(*case("linear", 3), causal=causal, decay=decay)
    assert said in str(caught.value)
