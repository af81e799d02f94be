"""Under autocast attention takes and gives what scaled_dot_product_attention does."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.nn import Attention


@pytest.mark.parametrize("pattern", ["causal & recent(8)", "causal & (head == 0 | recent(3))"])
def test_a_layer_trains(pattern: str) -> None:
    torch.manual_seed(0)
    layer = Attention(pattern, 64, 8)
    x = torch.randn(1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    expected = layer(x)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0)
    found = gradients(layer)
    layer.zero_grad()
    expected.square().sum().backward()
    assert (found - gradients(layer)).norm() <= 0.02 * found.norm()


def gradients(layer: Attention) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in layer.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("backend", ["gathered", "oracle"])
@pytest.mark.parametrize(
    "dtypes", [("float32",) * 3, ("float32", "bfloat16", "float32"), ("float64",) * 3], ids="-".join
)
def test_takes_and_gives_the_dtypes_of_sdpa(backend: str, dtypes: tuple[str, str, str]) -> None:
    query, key, value = (torch.randn(1, 2, 40, 8, dtype=getattr(torch, name), requires_grad=True) for name in dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        ours = patterndsl.attention(query, key, value, "causal", backend=backend)
        theirs = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=0.03 if theirs.dtype == torch.bfloat16 else 1e-10, rtol=0)
    ours.sum().backward()  # outside of autocast, as PyTorch's guide has it
    for part in (query, key, value):
        assert part.grad is not None
        assert part.grad.dtype == part.dtype
