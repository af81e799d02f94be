"""Attention in a graph of torch.compile is what it is outside: outputs, gradients, autocast, and no new graph for a new
length."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import patterndsl
from patterndsl import InputError
from patterndsl.nn import Attention
from patterndsl.runtime import ops

PATTERNS = [
    "causal & (recent(16) | strided(16))",  # several dense passes
    "window(9) | global(2)",  # bands and masks
    "blocks(8, random(2, seed = 1)) & causal",  # block-sparse
    "k > q",  # a row without keys
    "head % 2 == 0 & recent(5) | head % 2 == 1 & strided(4)",
]
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(n: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(n)
    return [torch.randn(2, number, n, 8, dtype=dtype, requires_grad=True) for number in (heads, kv_heads, kv_heads)]


def steps(attend: Callable[..., Any], given: list[Tensor]) -> list[Tensor]:
    """Output and lse, their gradients, and the output without any."""
    out, lse = attend(*given)
    kept = torch.where(lse > -torch.inf, lse, 0.0)
    grads = torch.autograd.grad(out.square().sum() + kept.sum(), given)
    with torch.no_grad():
        return [out, lse, *grads, attend(*given)[0]]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("text", PATTERNS)
def test_a_program(text: str, compiler: str) -> None:
    program = patterndsl.parse(text).compile(100, heads=4)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return program(query, key, value, return_lse=True)

    given = tensors(100)
    assert_same(steps(torch.compile(attend, fullgraph=True, backend=compiler), given), steps(attend, given))


@pytest.mark.parametrize("backend", ["gathered", "oracle"])
def test_the_other_backends(backend: str) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return patterndsl.attention(query, key, value, "causal & recent(9)", backend=backend, return_lse=True)

    given = tensors(50)
    assert_same(steps(torch.compile(attend, fullgraph=True, backend="aot_eager"), given), steps(attend, given))


@pytest.mark.parametrize("backend", ["masked", "gathered"])
def test_inputs(backend: str) -> None:
    pattern = patterndsl.parse("causal & same(doc) & k < limit[q.doc]", inputs={"doc": "int[N]", "limit": "int[]"})
    inputs = {"limit": torch.tensor([9, 100, 100]), "doc": torch.arange(60) // 25}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return patterndsl.attention(query, key, value, pattern, inputs=inputs, backend=backend, return_lse=True)

    given = tensors(60)
    assert_same(steps(torch.compile(attend, fullgraph=True, backend="aot_eager"), given), steps(attend, given))


def test_values_that_are_not_finite() -> None:
    """What a dense kernel would spoil is left to another backend, forward and backward, as outside."""
    program = patterndsl.parse("causal & k < 50 & (recent(16) | strided(16))").compile(100, heads=4)
    given = tensors(100)
    with torch.no_grad():
        given[2][:, :, 60:] = torch.nan

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return program(query, key, value, return_lse=True)

    assert_same(steps(torch.compile(attend, fullgraph=True, backend="aot_eager"), given), steps(attend, given))


@pytest.mark.parametrize(
    "text",
    [
        'labels: {found: "lsh(buckets = 8, rounds = 2)"}\nattend: causal & chunks(found, 16, 1)',
        "select: {found: 'topk(2, of = blocks(8), per = blocks(8), among = k < q)'}\nattend: causal & found",
    ],
    ids=["labels", "lists"],
)
def test_what_a_call_finds_is_returned(text: str) -> None:
    program = patterndsl.parse(text).compile(64, heads=2)

    def attend(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return program(x, x, x, return_labels=True)

    torch.manual_seed(0)
    x = torch.randn(1, 2, 64, 8)
    (out, found), (expected, wanted) = torch.compile(attend, fullgraph=True, backend="aot_eager")(x), attend(x)
    torch.testing.assert_close(out, expected)
    assert torch.equal(found["found"], wanted["found"])


@pytest.mark.parametrize("pattern", ["causal & (recent(8) | strided(16))", patterndsl.parse("window(4) | global(1)")])
def test_eight_lengths_need_two_graphs(pattern: str | patterndsl.Pattern) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = Attention(pattern, 32, 4, kv_heads=2)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (30, 33, 64, 65, 100, 127, 128, 200):
        x = torch.randn(2, length, 32)
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected)
        found, wanted = (torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (out, expected))
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


def test_queries_that_continue_a_sequence_need_two_graphs() -> None:
    counter = CompileCounterWithBackend("eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(query: Tensor, key: Tensor, q_start: int) -> Tensor:
        return patterndsl.attention(query, key, key, "causal & recent(9)", q_start=q_start)

    for start in (40, 41, 42, 50):
        query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, start + 1, 8)
        expected = patterndsl.attention(query, key, key, "causal & recent(9)", q_start=start)
        torch.testing.assert_close(step(query, key, start), expected)
    assert counter.frame_count <= 2


def test_autocast() -> None:
    layer = Attention("causal & (recent(8) | strided(8))", 32, 4)
    x = torch.randn(2, 40, 32)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(out.float().sum(), list(layer.parameters())) for out in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["by hooks", "reentrant"])
def test_checkpointing(reentrant: bool, compiled: bool) -> None:
    layer = Attention("causal & (recent(8) | strided(8))", 32, 4).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    attend = torch.compile(run, fullgraph=not reentrant, backend="aot_eager") if compiled else run
    out, expected = attend(x), layer(x)
    assert torch.equal(out, expected)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    out.square().sum().backward()
    for part, theirs in zip([x, *layer.parameters()], wanted, strict=True):
        torch.testing.assert_close(part.grad, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("text", PATTERNS)
def test_a_graph_can_be_gone_through_twice(text: str, compiled: bool) -> None:
    program, given = patterndsl.parse(text).compile(100, heads=4), tensors(100)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return program(query, key, value).square().sum()

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    loss = run(*given)
    first = torch.autograd.grad(loss, given, retain_graph=True)
    again = torch.autograd.grad(loss, given)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_program_that_graphs_have_run_is_kept_for_their_backward() -> None:
    given = tensors(64)

    def loss() -> Tensor:
        program = patterndsl.parse("causal & recent(7)").compile(64, heads=4)
        return torch.compile(lambda q, k, v: program(q, k, v).sum(), fullgraph=True, backend="aot_eager")(*given)

    total = loss()
    gc.collect()
    total.backward()


def test_a_program_that_is_gone_is_said_to_be() -> None:
    address = ops.register(patterndsl.parse("causal").compile(8))
    gc.collect()
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(InputError, match=r"E505.*gone"):
        ops.attend(x, x, x, [], "", address, *ops.Call(), None, False, False)


def test_mistakes_are_said_as_outside() -> None:
    program = patterndsl.parse("causal").compile(16, heads=2)
    run = torch.compile(lambda x: program(x, x, x), fullgraph=True, backend="eager")
    with pytest.raises(InputError, match="E503"):
        run(torch.randn(1, 2, 20, 8))
    with pytest.raises(patterndsl.PatternError, match="E201"):
        torch.compile(lambda x: patterndsl.attention(x, x, x, "causl"), fullgraph=True, backend="eager")(
            torch.randn(1, 2, 20, 8)
        )


def test_second_derivatives_are_refused() -> None:
    program, given = patterndsl.parse("causal & recent(4)").compile(16, heads=4), tensors(16)
    address = ops.register(program)
    out, _ = ops.attend(*given, [], "", address, *ops.Call(), None, True, False)
    (grad,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(InputError, match="E505"):
        torch.autograd.grad(grad.sum(), given[0])


@pytest.mark.parametrize("text", PATTERNS)
def test_the_operators_are_as_they_say(text: str) -> None:
    program, given = patterndsl.parse(text).compile(40, heads=4), tensors(40)
    asked: Any = ([], "", ops.register(program), *ops.Call(), None)
    torch.library.opcheck(ops.attend, (*given, *asked, True, True))
    with torch.no_grad():
        given = [x.detach() for x in given]
        out, lse = ops.attend(*given, *asked, True, True)
        torch.library.opcheck(ops.attend_backward, (*given, out, lse, torch.randn_like(out), None, *asked))
        grad_lse = torch.randn_like(lse)
        torch.library.opcheck(ops.attend_backward, (*given, out, lse, torch.randn_like(out), grad_lse, *asked))


def test_other_orders_in_memory() -> None:
    """[B, T, H, D] transposed, as layers have it."""
    program = patterndsl.parse("causal & (recent(16) | strided(16))").compile(64, heads=4)
    given = [torch.randn(2, 64, 4, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3)]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return program(query, key, value, return_lse=True)

    assert_same(steps(torch.compile(attend, fullgraph=True, backend="aot_eager"), given), steps(attend, given))
    torch.library.opcheck(ops.attend, (*given, [], "", ops.register(program), *ops.Call(), None, True, True))


def test_inductor() -> None:
    """Nothing but the operators, so that no kernel is built."""
    program = patterndsl.parse("causal & (recent(16) | strided(16))").compile(64, heads=4)
    given = [torch.randn(2, 64, 4, 8).transpose(1, 2).requires_grad_() for _ in range(3)]
    found, expected = torch.compile(program, fullgraph=True)(*given), program(*given)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(2, 4, 64, 8)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, weight), torch.autograd.grad(expected, given, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
