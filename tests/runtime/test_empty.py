"""Tensors without elements: as scaled_dot_product_attention has it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.nn import Attention

SHAPES = {
    "no batch": ((0, 4, 16, 8), (0, 4, 16, 6)),
    "no positions": ((2, 4, 0, 8), (2, 4, 0, 6)),
    "no head dimension": ((2, 4, 16, 0), (2, 4, 16, 6)),
    "no value dimension": ((2, 4, 16, 8), (2, 4, 16, 0)),
}


@pytest.mark.parametrize("backend", ["auto", "gathered", "oracle"])
@pytest.mark.parametrize("pattern", ["causal", "k <= q & head >= 0"], ids=["alike", "per head"])
@pytest.mark.parametrize(("shape", "value_shape"), SHAPES.values(), ids=SHAPES)
def test_is_sdpa(shape: tuple[int, ...], value_shape: tuple[int, ...], pattern: str, backend: str) -> None:
    query, key = (torch.randn(shape, requires_grad=True) for _ in range(2))
    value = torch.randn(value_shape, requires_grad=True)
    output = patterndsl.attention(query, key, value, pattern, backend=backend)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))
    output.sum().backward()
    assert [part.grad.shape for part in (query, key, value) if part.grad is not None] == [shape, shape, value_shape]


@pytest.mark.parametrize("backend", ["auto", "gathered", "oracle"])
def test_inputs_of_an_empty_batch(backend: str) -> None:
    program = patterndsl.parse("same(doc)", inputs={"doc": "int[N]"}).compile(5, heads=2, backend=backend)
    x, doc = torch.randn(0, 2, 5, 4), torch.zeros(0, 5, dtype=torch.int64)
    assert program(x, x, x, inputs={"doc": doc}).shape == x.shape
    assert program.mask(inputs={"doc": doc}).shape == (0, 1, 5, 5)


@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0), (0, 0)])
def test_a_layer(batch: int, length: int) -> None:
    layer = Attention("causal & recent(8)", 64, 8)
    output = layer(torch.randn(batch, length, 64))
    assert output.shape == (batch, length, 64)
    output.sum().backward()


def test_flex_refuses_them() -> None:
    x = torch.zeros(0, 1, 8, 4)
    with pytest.raises(patterndsl.InputError, match="E505"):
        patterndsl.attention(x, x, x, "causal", backend="flex")
