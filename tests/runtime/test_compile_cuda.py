"""On a CUDA device: attention in a graph of torch.compile is what it is outside, block-sparse passes included."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import patterndsl
from patterndsl.nn import Attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N = 1024
PATTERNS = [
    "causal & (recent(64) | strided(64))",  # a block-sparse and a dense pass
    "recent(64)",  # a block-sparse pass alone
    "window(32) | global(8)",
    "causal & block(64)",  # dense only
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(attend: object, given: list[Tensor]) -> list[Tensor]:
    assert callable(attend)
    out, lse = attend(*given)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    loss = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0.0).mean()
    first = torch.autograd.grad(loss, given, retain_graph=True)
    again = torch.autograd.grad(loss, given)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)
    with torch.no_grad():
        return [out, lse, *first, attend(*given)[0]]


@pytest.mark.parametrize(
    ("text", "backend", "compiler"),
    [
        (PATTERNS[0], "planned", "aot_eager"),
        (PATTERNS[0], "planned", "inductor"),
        (PATTERNS[1], "planned", "aot_eager"),
        (PATTERNS[2], "planned", "aot_eager"),
        (PATTERNS[3], "planned", "aot_eager"),
        (PATTERNS[1], "flex", "aot_eager"),
        (PATTERNS[1], "gathered", "aot_eager"),
    ],
)
def test_a_program(text: str, backend: str, compiler: str) -> None:
    torch.manual_seed(0)
    program = patterndsl.parse(text).compile(N, heads=4, device="cuda", backend=backend)
    given = [torch.randn(2, 4, N, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return program(query, key, value, return_lse=True)

    expected = steps(attend, given)
    found = steps(torch.compile(attend, fullgraph=True, backend=compiler), given)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs.float()).nan_to_num().norm() <= 0.01 * theirs.float().nan_to_num().norm()


def test_a_layer_at_many_lengths() -> None:
    layer = Attention("causal & (recent(64) | strided(64))", 256, 4, kv_heads=2).to("cuda", torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    for length in (512, 513, 700, 1024):
        x = torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), layer(x), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True], ids=["by hooks", "reentrant"])
def test_checkpointing(reentrant: bool) -> None:
    layer = Attention("causal & (recent(64) | strided(64))", 256, 4, kv_heads=2).to("cuda", torch.bfloat16)
    x = torch.randn(2, N, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    checkpoint(layer, x, use_reentrant=reentrant).float().square().sum().backward()
    assert x.grad is not None
    assert (x.grad.float() - expected.float()).norm() <= 0.01 * expected.float().norm()
