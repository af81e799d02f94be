"""Layers that change in a call, under gradient checkpointing: changed once, and with the gradients of a plain call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patterndsl import InputError, PatternError
from patterndsl.nn import Attention

DIM, HEADS = 16, 2
LAYERS = {
    "directions": "score: favor(8, redraw = 1)\nattend: causal",
    "every second": "score: favor(8, redraw = 2)\nattend: causal",
    "hashes": "labels: {bucket: 'lsh(buckets = 4, redraw = 1)'}\nattend: causal & same(bucket)",
    "rounds of hashes": "labels: {bucket: 'lsh(buckets = 4, rounds = 2, redraw = 2)'}\nattend: causal & same(bucket)",
    "labels": "labels: {bucket: 'kmeans(clusters = 3)'}\nattend: causal & same(bucket)",
    "members": "labels: {bucket: 'kmeans(clusters = 3)'}\nselect: {top: 'members(bucket, top = 5)'}\nattend: top",
}


def layer_of(text: str) -> Attention:
    torch.manual_seed(0)
    layer = Attention(text, DIM, HEADS).double()
    learners: Any = layer.learners.values()
    for learner in learners:
        learner.decay = 0.5  # so that labels move at once
    return layer


def trained(layer: Attention, run: Callable[[Attention, Tensor], Tensor], num_calls: int) -> list[Tensor]:
    """Gradients of two steps of several calls each, and what the layer has become."""
    found: list[Tensor] = []
    torch.manual_seed(1)
    for _ in range(2):
        xs = [torch.randn(2, 12, DIM, dtype=torch.float64, requires_grad=True) for _ in range(num_calls)]
        outs = [run(layer, x) for x in xs]
        total = torch.stack([out.square().sum() for out in outs]).sum()
        total.backward()
        found += [x.grad for x in xs if x.grad is not None]
    return [*found, *(x.grad for x in layer.parameters() if x.grad is not None), *layer.buffers()]


@pytest.mark.parametrize("num_calls", [1, 3])
@pytest.mark.parametrize("reentrant", [False, True], ids=["by hooks", "reentrant"])
@pytest.mark.parametrize("text", LAYERS.values(), ids=LAYERS)
def test_checkpointing_changes_nothing(text: str, reentrant: bool, num_calls: int) -> None:
    layer = layer_of(text)
    other = copy.deepcopy(layer)

    def again(layer: Attention, x: Tensor) -> Any:
        return checkpoint(layer, x, use_reentrant=reentrant)

    def once(layer: Attention, x: Tensor) -> Any:
        return layer(x)

    for mine, theirs in zip(trained(layer, again, num_calls), trained(other, once, num_calls), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_losses_of_learners_too() -> None:
    layer = layer_of(LAYERS["labels"])
    other, grads = copy.deepcopy(layer), []
    x = torch.randn(2, 12, DIM, dtype=torch.float64)
    for one, is_checkpointed in ((layer, True), (other, False)):
        out = checkpoint(one, x, use_reentrant=False) if is_checkpointed else one(x)
        total = out.square().sum() + one.losses["bucket"]
        grads.append(torch.autograd.grad(total, list(one.parameters())))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_call_that_nobody_remembers_is_refused() -> None:
    """Without its random state a call cannot be told from others."""
    layer = layer_of(LAYERS["directions"])
    x = torch.randn(2, 12, DIM, dtype=torch.float64, requires_grad=True)
    out: Any = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(InputError, match=r"E505.*random state"):
        out.sum().backward()


def test_hashes_are_drawn_anew_in_training_alone() -> None:
    """Every second call; what was drawn follows from the seed and the number of calls."""
    text = "labels: {{bucket: 'lsh(buckets = 4, seed = {})'}}\nattend: causal & same(bucket)"
    redrawn = text.replace("seed = {}", "seed = 3, redraw = 2").format()
    layer, x = layer_of(redrawn), torch.randn(2, 30, DIM, dtype=torch.float64)
    fixed = [layer_of(text.format(seed)) for seed in (3, 4, 5)]
    expected = [other(x) for other in fixed]
    assert not torch.equal(expected[0], expected[1])
    for turn in (0, 1, 1, 2):
        torch.testing.assert_close(layer(x), expected[turn])
    layer.eval()
    other = layer_of(redrawn).eval()
    other.load_state_dict(layer.state_dict())
    for _ in range(3):
        torch.testing.assert_close(layer(x), expected[2])
        torch.testing.assert_close(other(x), expected[2])
    with pytest.raises(InputError, match="E501"):
        layer(x, inputs={"buckets": torch.zeros(30, dtype=torch.int64)})


def test_how_often_is_a_number() -> None:
    with pytest.raises(PatternError, match=r"E209.*after how many calls `bucket` is drawn anew depends on N"):
        layer_of("labels: {bucket: 'lsh(buckets = 4, redraw = N)'}\nattend: same(bucket)")
