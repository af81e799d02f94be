"""The examples with sources, scores and branches are one graph of torch.compile: as outside, and for each length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import patterndsl
from patterndsl.nn import Attention

DIM, HEADS = 32, 4
EXAMPLES = sorted(Path("examples/sources").glob("*.yaml"))
OTHERS = {"encoder-decoder": "encoded", "set-transformer": "summaries"}
"""The source that each call gives."""
RECALLS = ("compressive", "transformer-xl", "transformer-xl-same-length")
"""Their states have other shapes in each of the first calls, and each shape is a graph."""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(path: Path) -> Attention:
    torch.manual_seed(0)
    return Attention(patterndsl.load(path), DIM, HEADS).double().eval()


def call(run: Any, layer: Attention, path: Path, x: Tensor) -> Tensor:
    """What comes of x; where segments are recalled, of its second half."""
    if path.stem in RECALLS:
        first, second = x.chunk(2, 1)
        _, state = run(first, layer.init_state(len(x), dtype=x.dtype))
        out: Tensor = run(second, state)[0]
        return out
    other = OTHERS.get(path.stem)
    given = {} if other is None else {"sources": {other: x.detach()[:, :7]}}
    found: Tensor = run(x, **given)
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example(path: Path) -> None:
    layer = layer_of(path)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 128, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    out, expected = (call(run, layer, path, x) for run in (compiled, layer))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    found, wanted = (torch.autograd.grad(y.square().sum(), leaves, **options) for y in (out, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem not in RECALLS], ids=lambda path: path.stem)
def test_other_lengths(path: Path) -> None:
    layer, counter = layer_of(path), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (128, 256, 320):
        x = torch.randn(2, length, DIM, dtype=torch.float64)
        torch.testing.assert_close(call(compiled, layer, path, x), call(layer, layer, path, x))
    assert counter.frame_count <= 2
