"""Lightning Attention as a layer: loops over pairs, transformers' layer, steps, and layers of two kinds."""

from __future__ import annotations

import importlib
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

import patterndsl
from patterndsl import PatternError, Proven
from patterndsl.composite import Composite
from patterndsl.nn import Attention
from patterndsl.source.state import State
from patterndsl.systems import system

DTYPE = torch.float64
DIM, HEADS, KV_HEADS, LAYERS = 12, 4, 2, 16
SPEC = patterndsl.load("examples/sources/lightning.yaml")
PATTERN = SPEC.with_params(heads=HEADS, layers=LAYERS)


def layer_of(pattern: Any, layer: int = 2) -> Attention:
    torch.manual_seed(0)
    return Attention(pattern, DIM, HEADS, kv_heads=KV_HEADS, layer=layer).double()


def states(length: int) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(2, length, DIM, dtype=DTYPE, requires_grad=True)


def factor(head: int, layer: int) -> float:
    return math.exp(-(2 ** (-8 * (head + 1) / HEADS)) * (1 - layer / (LAYERS - 1 + 1e-5) + 1e-5))


def projected(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, T, D] each, keys and values once for each query head."""
    query, key, value = (
        module(x).unflatten(-1, (-1, DIM // HEADS)).transpose(1, 2)
        for module in (layer.query_projection, layer.key_projection, layer.value_projection)
    )
    return query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)


def looped(layer: Attention, x: Tensor) -> Tensor:
    query, key, value = projected(layer, x)
    rows = []
    for i in range(x.shape[1]):
        row = torch.zeros_like(value[:, :, 0])
        for j in range(i + 1):
            fades = torch.tensor([factor(head, layer.layer) ** (i - j) for head in range(HEADS)], dtype=DTYPE)
            weights = fades * (query[:, :, i] * key[:, :, j]).sum(-1)
            row = row + weights[..., None] * value[:, :, j]
        rows.append(row.flatten(1))
    found: Tensor = layer.output_projection(torch.stack(rows, 1))
    return found


@pytest.mark.parametrize("length", [1, 2, 13, 67])
def test_a_layer_is_the_loop(length: int) -> None:
    layer, x = layer_of(PATTERN), states(length)
    found, expected = layer(x), looped(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    leaves = (x, *layer.parameters())
    pull = torch.randn_like(found)
    have, want = (torch.autograd.grad((y * pull).sum(), leaves) for y in (found, expected))
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 3, 2], [0, 70, 1]], ids=str)
def test_step_by_step_is_all_at_once(lengths: list[int]) -> None:
    layer = layer_of(PATTERN)
    x = states(sum(lengths))
    state, outputs = layer.init_state(batch=2), []
    for start, stop in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        out, state = layer(x[:, start:stop], state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x), rtol=1e-9, atol=1e-9)
    assert isinstance(state, State)
    assert state.sums["sums"].numerator.shape == (2, HEADS, DIM // HEADS, DIM // HEADS)


def test_later_queries_see_all_keys_before() -> None:
    """Queries that continue a sequence whose keys are given again."""
    query, key, value = (x.detach() for x in projected(layer_of(PATTERN), states(70)))
    whole = patterndsl.attention(query, key, value, PATTERN, layer=2)
    part = patterndsl.attention(query[:, :, 66:], key, value, PATTERN, layer=2, q_start=66)
    torch.testing.assert_close(part, whole[:, :, 66:], rtol=1e-9, atol=1e-9)


def test_every_eighth_layer_is_softmax() -> None:
    layer, x = layer_of(PATTERN, layer=7), states(9)
    query, key, value = projected(layer, x)
    expected = layer.output_projection(
        scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(PatternError, match="no state"):
        layer.init_state(batch=2)
    assert isinstance(PATTERN, Composite)
    kinds = [[term.branch for term in PATTERN.terms_at(at)] for at in range(LAYERS)]
    assert kinds == [["softmax" if at % 8 == 7 else "sums"] for at in range(LAYERS)]


def test_what_is_known_before_it_runs() -> None:
    for claim in ("causal", "rows_nonempty"):
        assert isinstance(PATTERN.prove(claim), Proven)
    reports = [PATTERN.report(4096, heads=HEADS, layer=at) for at in (0, 7)]
    assert [report.pairs and report.pairs.value for report in reports] == [0, HEADS * 4096 * 4097 // 2]
    assert system(PATTERN, n=4096, heads=HEADS, dim=DIM).classes == ("KR",)
    other = SPEC.with_params(heads=2 * HEADS, layers=LAYERS)
    assert isinstance(PATTERN.prove("equals", PATTERN), Proven)
    again = patterndsl.parse(str(PATTERN))
    assert isinstance(again, Composite) and isinstance(PATTERN, Composite) and PATTERN.told == again.told
    assert other != PATTERN


def test_retention() -> None:
    """RetNet's heads: 1 - 2^(-5 - head), no normaliser (Sun et al. 2023, arXiv 2307.08621, section 2.2)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, 20, 4, dtype=DTYPE)
    found = patterndsl.attention(query, key, value, "score: linear(decay = 1 - 2 ** (-5 - head))\nattend: causal")
    factors = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=DTYPE))
    places = torch.arange(20)
    fades = (factors[:, None, None] ** (places[:, None] - places)).tril()
    torch.testing.assert_close(found, (query @ key.mT * fades) @ value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["elu", "relu"])
def test_normalised_or_not(score: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 4, dtype=DTYPE)
    ones = torch.ones_like(value)
    given, sums, total = (
        patterndsl.attention(query, key, v, f"score: {score}(normalise = {word})\nattend: all")
        for v, word in ((value, "yes"), (value, "no"), (ones, "no"))
    )
    torch.testing.assert_close(given, sums / total, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [5, 70])
def test_is_that_of_transformers(length: int) -> None:
    peer = importlib.import_module("transformers.models.minimax.modeling_minimax")
    config = importlib.import_module("transformers.models.minimax.configuration_minimax").MiniMaxConfig(
        hidden_size=DIM, num_attention_heads=HEADS, head_dim=3, num_hidden_layers=LAYERS, block_size=16
    )
    torch.manual_seed(0)
    theirs, x = peer.MiniMaxLightningAttention(config, 4).double(), states(length)
    summed: list[Tensor] = []
    theirs.norm.register_forward_pre_hook(lambda _, inputs: summed.append(inputs[0]))
    theirs(x, None, None)
    made = silu(theirs.qkv_proj(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    query, key, value = made.split(3, dim=-1)
    ours = patterndsl.attention(query, key, value, PATTERN, layer=4)
    # its slopes are of float32
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), summed[0], rtol=1e-6, atol=1e-6)
