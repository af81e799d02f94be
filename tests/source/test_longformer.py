"""Against transformers' Longformer, with its weights: both sets of projections, chosen globals, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patterndsl
from patterndsl.nn import Attention

pytest.importorskip("transformers")

N, W, HEADS, DIM = 24, 3, 2, 12
TEXT = f"""
inputs: {{chosen: "bool[N]", there: "bool[Nk]"}}
roles: {{globals: q.chosen}}
attend: (window({W}) | q.chosen | k.chosen) & k.there
"""


def their_layer() -> Any:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[2 * W], attention_probs_dropout_prob=0.0
    )
    return LongformerSelfAttention(config, layer_id=0).double().eval()


def with_weights_of(theirs: Any) -> Attention:
    layer = Attention(patterndsl.parse(TEXT), DIM, HEADS).double()
    weights = {}
    for ours, name in (("", ""), ("roles.globals.", "_global")):
        for what in ("query", "key", "value"):
            for part in ("weight", "bias"):
                weights[f"{ours}{what}_projection.{part}"] = getattr(getattr(theirs, what + name), part)
    weights |= {"output_projection.weight": torch.eye(DIM), "output_projection.bias": torch.zeros(DIM)}
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize(
    ("chosen", "lengths"),
    [
        ([[0], [0]], [24, 24]),
        ([[0, 1, 2], [0, 5, 13]], [24, 24]),
        ([[0, 7], [3, 10]], [24, 17]),
        ([[0], [2]], [9, 13]),
    ],
)
def test_outputs_and_gradients(chosen: list[list[int]], lengths: list[int]) -> None:
    """Its softmax is in float32 whatever the tensors are, so that is what can be asked. Padded rows are zero there."""
    theirs = their_layer()
    layer = with_weights_of(theirs)
    there = patterndsl.present(torch.tensor(lengths), N)
    is_global = torch.zeros(2, N, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        is_global[row, positions] = True
    x = torch.randn(2, N, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.where(there, 0.0, -10000.0).masked_fill(is_global, 10000.0).double()
    (found,) = theirs(
        x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True
    )[:1]
    ours = layer(x, inputs={"chosen": is_global, "there": there})
    assert isinstance(ours, torch.Tensor)
    torch.testing.assert_close(ours[there], found[there], rtol=0, atol=2e-6)
    weights = torch.randn(2, N, DIM, dtype=torch.float64) * there[..., None]
    pairs = [
        (x, x),
        *(
            (layer.get_parameter(f"{what}_projection.weight"), getattr(theirs, what).weight)
            for what in ("query", "key")
        ),
        *(
            (layer.get_parameter(f"roles.globals.{what}_projection.weight"), getattr(theirs, f"{what}_global").weight)
            for what in ("query", "key", "value")
        ),
    ]
    mine = torch.autograd.grad((ours * weights).sum(), [leaf for leaf, _ in pairs])
    wanted = torch.autograd.grad((found * weights).sum(), [leaf for _, leaf in pairs])
    for ours_grad, their_grad in zip(mine, wanted, strict=True):
        assert their_grad.abs().max() > 1e-3
        torch.testing.assert_close(ours_grad, their_grad, rtol=0, atol=2e-5)
