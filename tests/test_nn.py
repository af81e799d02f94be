"""`patterndsl.nn.Attention`: projections around a pattern."""

from __future__ import annotations

import pytest
import torch

import patterndsl
from patterndsl.nn import Attention


def test_equals_multihead_attention_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = Attention("causal", 32, 4).double()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    with torch.no_grad():
        projections = (ours.query_projection, ours.key_projection, ours.value_projection)
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        theirs.out_proj.load_state_dict(ours.output_projection.state_dict())
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    drop = torch.ones(50, 50, dtype=torch.bool).triu(1)  # True may not attend, unlike everywhere here
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=drop, need_weights=False)[0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_trains_with_shared_key_heads(kv_heads: int) -> None:
    layer = Attention("causal & recent(5)", 32, 4, kv_heads=kv_heads)
    layer(torch.randn(2, 33, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_attends_to_a_context() -> None:
    layer = Attention("k <= 2 * q", 16, 2)
    assert layer(torch.randn(1, 10, 16), torch.randn(1, 20, 16)).shape == (1, 10, 16)


def test_passes_inputs_and_layer() -> None:
    pattern = patterndsl.parse("causal & same(doc) & (layer % 2 == 0 | recent(2))", inputs={"doc": "int[N]"})
    x, doc = torch.randn(1, 12, 16), torch.arange(12) // 5
    even, odd = (Attention(pattern, 16, 2, layer=layer) for layer in (0, 1))
    odd.load_state_dict(even.state_dict())
    assert not torch.allclose(even(x, inputs={"doc": doc}), odd(x, inputs={"doc": doc}))


def test_an_empty_row_yields_the_output_bias() -> None:
    layer = Attention("k < q", 16, 2)
    torch.testing.assert_close(layer(torch.randn(1, 4, 16))[0, 0], layer.output_projection.bias)


@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(30, 4, None), (32, 4, 3), (32, 0, None)])
def test_refuses_heads_that_do_not_divide(dim: int, heads: int, kv_heads: int | None) -> None:
    with pytest.raises(patterndsl.InputError, match=r"E503|E406"):
        Attention("causal", dim, heads, kv_heads=kv_heads)


def test_a_layer_shows_only_what_its_pattern_has() -> None:
    plain = repr(Attention("causal & recent(4)", dim=32, heads=4))
    assert [line.split(":")[0].strip(" ()") for line in plain.splitlines()[2:-1]] == [
        f"{name}_projection" for name in ("query", "key", "value", "output")
    ]
    pattern = patterndsl.parse("roles: {globals: q < 2}\nattend: window(4) | global(2)")
    shown = repr(Attention(pattern, dim=32, heads=4))
    assert "(globals): Role(" in shown and "(tables)" not in shown
