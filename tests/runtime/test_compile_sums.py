"""Causal sums are one operator in a graph of torch.compile: as outside, and no new graph for a new length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import patterndsl
from patterndsl import InputError
from patterndsl.nn import Attention
from patterndsl.runtime import summed_ops

DIM, HEADS = 8, 2
SUMS = {
    "elu": "score: elu\nattend: causal",
    "favor": "score: favor(6)\nattend: causal",
    "decay": "score: linear(decay = exp(-1 / 2 ** head))\nattend: causal",
    "a source": "sources: {rows: memory(3)}\nscore: elu\nattend: {self: causal, rows: all}",
    "a window too": "branches: {near: recent(4), far: {score: elu, attend: causal}}\ncombine: gate",
}
LENGTHS = (5, 17, 64, 65, 128, 2, 130, 63)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(text: str) -> Attention:
    torch.manual_seed(0)
    return Attention(text, DIM, HEADS).double().eval()


def steps(run: Any, layer: Attention, x: Tensor) -> list[Tensor]:
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("name", SUMS)
def test_eight_lengths_need_two_graphs_and_no_warning(name: str) -> None:
    layer, counter = layer_of(SUMS[name]), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in LENGTHS if name == "elu" else LENGTHS[:4]:
            x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
            for mine, expected in zip(steps(compiled, layer, x), steps(layer, layer, x), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    assert counter.frame_count <= 2


def test_a_state_goes_from_segment_to_segment() -> None:
    layer = layer_of(SUMS["favor"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, state, found = torch.randn(2, 40, DIM, dtype=torch.float64), layer.init_state(2), []
    for segment in x.split([20, 20], 1):
        out, state = compiled(segment, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), layer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("is_log", [False, True])
def test_the_operators_are_as_they_say(is_log: bool, has_state: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, 9, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    if has_state:
        like = (1, 2, 4)
        tensors += [torch.rand(*like, 4), torch.rand(like) + 1, torch.zeros(like)]
        tensors[3:] = [x.double().requires_grad_(at < 2) for at, x in enumerate(tensors[3:])]
    keep = torch.arange(9) % 4 != 1
    decay = None if is_log else [0.9, 0.5]
    torch.library.opcheck(summed_ops.sums, (tensors, keep, is_log, "linear", decay, True))


def test_second_derivatives_are_refused() -> None:
    layer = layer_of(SUMS["elu"])
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(1, 6, DIM, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(InputError, match="second derivatives of compiled attention"):
        torch.autograd.grad(grad.sum(), x)


def test_attention_without_a_layer() -> None:
    pattern, counter = patterndsl.parse(SUMS["elu"]), CompileCounterWithBackend("eager")

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return patterndsl.attention(query, key, value, pattern)

    run = torch.compile(attention, fullgraph=True, backend=counter)
    for length in LENGTHS[:5]:
        tensors = [torch.randn(1, 2, length, 4) for _ in range(3)]
        torch.testing.assert_close(run(*tensors), attention(*tensors))
    assert counter.frame_count <= 2
