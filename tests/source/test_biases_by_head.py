"""Biases beside inputs that differ from head to head, against softmax over pairs in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.nn import Attention

B, H, N, D = 2, 4, 24, 4


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, heads, N, D, dtype=torch.float64, requires_grad=True) for heads in (H, 2, 2)]


def dense(given: list[Tensor], keep: Tensor, bias: Tensor) -> Tensor:
    query, key, value = given
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = query @ key.mT * D**-0.5 + bias
    return scores.masked_fill(~keep, -torch.inf).softmax(-1) @ value


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("heads", ["", " & (head < 2 | recent(9))"], ids=["heads agree", "heads differ"])
def test_an_input(heads: str, batch: int) -> None:
    text = f"inputs: {{d: 'int[N]'}}\nattend: causal & same(d){heads}\nbias: 0.1 * k.d - 0.2 * head * q"
    program: Any = patterndsl.parse(text).compile(N, heads=H)
    d, given = torch.randint(0, 3, (batch, H, N)), tensors()
    q, k, head = torch.arange(N)[:, None], torch.arange(N), torch.arange(H)[:, None, None]
    keep = (d[..., :, None] == d[..., None, :]) & (k <= q)
    if heads:
        keep = keep & ((head < 2) | (q - k < 9))
    bias = 0.1 * d[..., None, :].double() - 0.2 * head * q
    assert_same(program(*given, inputs={"d": d}), dense(given, keep, bias), given)


def test_an_input_of_the_bias_alone() -> None:
    program: Any = patterndsl.parse("inputs: {d: 'int[N]'}\nattend: causal\nbias: 0.3 * k.d").compile(N, heads=H)
    d, given = torch.randint(0, 3, (B, H, N)), tensors()
    keep = torch.ones(N, N, dtype=torch.bool).tril()
    assert_same(program(*given, inputs={"d": d}), dense(given, keep, 0.3 * d[..., None, :].double()), given)


@pytest.mark.parametrize("rounds", [1, 2])
def test_labels_found_in_a_call(rounds: int) -> None:
    labels = f"labels: {{b: 'lsh(buckets = 4, rounds = {rounds})'}}\nattend: same(b)"
    program: Any = patterndsl.parse(f"{labels}\nbias: 0.1 * k").compile(N, heads=H)
    given = tensors()
    plain = patterndsl.parse(labels).compile(N, heads=H)
    keep = plain.mask(plain.labels(given[1]))
    assert_same(program(*given), dense(given, keep, 0.1 * torch.arange(N).double()), given)


def test_labels_that_the_bias_alone_reads() -> None:
    program: Any = patterndsl.parse("labels: {b: 'lsh(buckets = 4)'}\nattend: all\nbias: 0.3 * k.b").compile(N, heads=H)
    given = tensors()
    label = patterndsl.parse("labels: {b: 'lsh(buckets = 4)'}\nattend: same(b)").compile(N, heads=H).labels(given[1])
    keep = torch.ones(N, N, dtype=torch.bool)
    assert_same(program(*given), dense(given, keep, 0.3 * label["b"][..., None, :].double()), given)


@pytest.mark.parametrize("text", ["attend: causal & same(b)\nbias: 0.1 * k", "attend: causal\nbias: 0.1 * q.b * k.b"])
def test_k_means_of_a_layer(text: str) -> None:
    """As if its labels had been given."""
    layer = Attention(f"labels: {{b: 'kmeans(clusters = 3)'}}\n{text}", 16, H, kv_heads=2).double()
    x = torch.randn(B, N, 16, dtype=torch.float64)
    layer(x)
    layer.eval()
    learner: Any = layer.learners["b"]
    label = learner(layer._keys(x)[0]).repeat_interleave(2, dim=1)
    torch.testing.assert_close(layer(x), layer(x, inputs={"b": label}), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(layer(x), layer(x, inputs={"b": torch.zeros_like(label)}))
