"""Scores at every scale that a float has: equal to the oracle, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patterndsl

N = 70
PATTERNS = {
    "causal": "causal",
    "per head": "causal & (head % 2 == 0 | recent(3))",
    "documents": "inputs: {doc: 'int[N]'}\nattend: causal & same(doc)",
    "buckets": "labels: {b: given}\nattend: causal & (same(b) | recent(2))",
    "chosen": "select: {top: 'topk(2, of = blocks(8), per = blocks(8))'}\nattend: causal & (top | recent(2))",
}
SCALES = [0.0, -0.5, 1e-42, 1e-300]
"""Kernels mask before they scale: -inf x 0 is NaN, and x a number below 0 is inf. Some are 0 in float32."""


def found(text: str, backend: str, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, N, 8).to(dtype).requires_grad_() for _ in range(3))
    given = {"doc": torch.arange(N) // 30, "b": torch.arange(N) * 7 % 5}
    inputs = {name: x for name, x in given.items() if f"{name}:" in text}
    out = patterndsl.attention(query, key, value, patterndsl.parse(text), inputs=inputs, scale=scale, backend=backend)
    return [out.detach(), *torch.autograd.grad((out * torch.arange(8)).sum(), (query, key, value))]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_is_the_oracles(text: str, scale: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        expected = found(text, "oracle", scale, torch.float64)
        for ours, exact in zip(found(text, "auto", scale, dtype), expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", SCALES)
def test_beside_a_bias(scale: float) -> None:
    """Which is added to the scores and not scaled."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, N, 8)
    at = torch.arange(N)
    past = at[:, None] - at
    scores = query.double() @ key.double().mT * scale - 0.1 * past
    expected = scores.masked_fill(past < 0, -torch.inf).softmax(-1) @ value.double()
    pattern = patterndsl.parse("attend: causal\nbias: -(q - k) * 0.1")
    out = patterndsl.attention(query, key, value, pattern, scale=scale)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_compiled(scale: float) -> None:
    query, key, value = (torch.randn(1, 2, N, 8, requires_grad=True) for _ in range(3))
    program = patterndsl.parse("causal").compile(N, heads=2)

    def attend(query: Tensor) -> Tensor:
        out: Tensor = program(query, key, value, scale=scale)
        return out

    results = []
    for call in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        out = call(query)
        results.append((out, torch.autograd.grad(out.square().sum(), query)[0]))
    torch.testing.assert_close(results[1], results[0])
    assert all(torch.isfinite(x).all() for pair in results for x in pair)
