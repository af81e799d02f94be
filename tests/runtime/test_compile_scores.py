"""Scores that are more than products are one operator in a graph of torch.compile: outputs, gradients, and no new graph
for a new length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import patterndsl
from patterndsl import InputError
from patterndsl.nn import Attention
from patterndsl.runtime import scored_ops
from patterndsl.runtime.ops import Call

DIM, HEADS = 16, 4
SCORES = {
    "bias": "attend: causal\nbias: -(q - k) * 2 ** -(head + 1)",
    "softcap": "attend: window(5)\nsoftcap: 2.0",
    "scalars": "tables: {near: scalars(9)}\nattend: causal\nbias: near[min(q - k, 8)]",
    "vectors": "tables: {near: vectors(9)}\nattend: causal\nbias: near[min(q - k, 8)]\nsoftcap: 3.0",
    "sinusoids": "tables: {r: sinusoids}\nattend: causal\nbias: r[q - k]",
    "two tables": "tables: {a: scalars(3), b: vectors(4)}\nattend: causal\nbias: b[(q - k) % 4] + a[(q - k) % 3]",
    "made": "attend: causal\nscore: synthesize(dense, length = 64)",
    "made and products": "attend: causal\nscore: synthesize(random, product, length = 64)",
    "heads": "attend: head % 2 == 0 & recent(5) | head % 2 == 1 & strided(4)\nbias: 0.1 * k",
    "rows without keys": "attend: k > q\nbias: 0.1 * k",
    "an input": "inputs: {doc: 'int[N]'}\nattend: causal & same(doc)\nbias: 0.3 * q.doc - 0.1 * k.doc",
    "a source": "sources: {mem: memory(3)}\nbias: 0.1 * k\nattend: {self: causal, mem: all}",
    "branches": "branches:\n  a: {attend: recent(4), bias: 0.1 * k}\n  b: {attend: causal, softcap: 2.0}\n"
    "  c: causal\ncombine: gate",
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(text: str) -> Attention:
    torch.manual_seed(0)
    layer = Attention(text, DIM, HEADS, kv_heads=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def inputs_of(text: str, length: int) -> dict[str, Tensor] | None:
    return {"doc": torch.arange(length) // 7} if "inputs" in text else None


def steps(run: Any, layer: Attention, x: Tensor, inputs: Any) -> list[Tensor]:
    out = run(x, inputs=inputs)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        return [out, *grads, run(x, inputs=inputs)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("text", SCORES.values(), ids=SCORES)
def test_a_layer(text: str) -> None:
    layer, x = layer_of(text), torch.randn(2, 30, DIM, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = inputs_of(text, 30)
    assert_same(steps(compiled, layer, x, given), steps(layer, layer, x, given))


@pytest.mark.parametrize("score", ["", "bias: 0.1 * k\n"])
def test_roles_at_several_lengths(score: str) -> None:
    layer = layer_of(
        f"roles: {{first: q < 2, near: {{at: window(1), own: value}}}}\n{score}attend: window(3) | global(2)"
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (6, 9):
        x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
        assert_same(steps(compiled, layer, x, None), steps(layer, layer, x, None))


@dataclass(frozen=True)
class Given:
    """What a program is called with."""

    tensors: list[Tensor]
    learned: dict[str, dict[str, Tensor]]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.tensors, *(x for named in self.learned.values() for x in named.values())]


def given_to(name: str, n: int) -> Given:
    torch.manual_seed(n)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    learned: dict[str, dict[str, dict[str, Tensor]]] = {
        "scalars": {"tables": {"near": some(HEADS, 9)}},
        "vectors": {"tables": {"near": some(HEADS, 9, 4)}},
        "made": {"scores": {"": some(1, HEADS, n, n)}},
    }
    return Given([some(2, heads, n, 4) for heads in (HEADS, 2, 2)], learned.get(name, {}))


@pytest.mark.parametrize("name", ["bias", "softcap", "scalars", "vectors", "made"])
def test_a_program(name: str) -> None:
    program: Any = patterndsl.parse(SCORES[name]).compile(20, heads=HEADS)
    given = given_to(name, 20)

    def attend(tensors: list[Tensor], learned: Any) -> Any:
        return program(*tensors, **learned, return_lse=True)

    def both(run: Any) -> list[Tensor]:
        out, lse = run(given.tensors, given.learned)
        total = out.square().sum() + lse.sum()
        return [out, lse, *torch.autograd.grad(total, given.leaves, allow_unused=True, materialize_grads=True)]

    assert_same(both(torch.compile(attend, fullgraph=True, backend="aot_eager")), both(attend))


def test_eight_lengths_need_two_graphs() -> None:
    layer = layer_of(SCORES["scalars"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (30, 33, 64, 65, 100, 127, 128, 200):
        x = torch.randn(2, length, DIM, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count <= 2


def test_a_program_takes_other_numbers_of_keys() -> None:
    pattern = patterndsl.parse("sources: {past: recall(9)}\nbias: 0.1 * (k - q)\nattend: {self: causal, past: all}")
    program: Any = pattern.compile(8, heads=2)
    query, key = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4)

    def attend(query: Tensor, key: Tensor, past: Tensor) -> Any:
        return program(query, key, key, sources={"past": (past, past)})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for length in (3, 5, 9):
        past = torch.randn(1, 2, length, 4)
        torch.testing.assert_close(compiled(query, key, past), attend(query, key, past))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_reaches_the_tensors_and_nothing_inside(compiled: bool) -> None:
    """Products and sums stay in float32, as those of patterns without a bias do."""
    program: Any = patterndsl.parse("attend: causal\nbias: 0.01 * k").compile(64, heads=2)
    query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found: Tensor = program(query, key, value)
            return found

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    found = run(query, key, value)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, program(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize("name", ["vectors", "made"])
def test_checkpointing(name: str) -> None:
    layer, x = layer_of(SCORES[name]), torch.randn(2, 20, DIM, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, inputs: None) -> Any:
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(steps(compiled, layer, x, None), steps(layer, layer, x, None))


@pytest.mark.parametrize("name", ["bias", "scalars", "vectors", "made"])
def test_the_operators_are_as_they_say(name: str) -> None:
    pattern, given = patterndsl.parse(SCORES[name]), given_to(name, 12)
    kinds = ",".join(f"{table}:{name}" for table in given.learned.get("tables", {}))
    asked: Any = ([], "", kinds, f"pattern:self:auto:{pattern.text}", *Call(), None)
    torch.library.opcheck(scored_ops.scored, (given.leaves, *asked))
    with torch.no_grad():
        leaves = [x.detach() for x in given.leaves]
        out, lse = scored_ops.scored(leaves, *asked)
        wanted = [True] * (len(leaves) - 1) + [False]
        for grad_lse in (None, torch.randn_like(lse)):
            torch.library.opcheck(scored_ops.scored_backward, (leaves, wanted, torch.randn_like(out), grad_lse, *asked))


def test_second_derivatives_are_refused() -> None:
    layer = layer_of(SCORES["bias"])
    tensors = [torch.randn(1, HEADS, 9, 4, requires_grad=True) for _ in range(3)]
    out, _ = scored_ops.scored(tensors, [], "", "", f"pattern:self:auto:{layer.pattern.text}", *Call(), None)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(InputError, match="E505"):
        torch.autograd.grad(grad.sum(), tensors[0])


def test_mistakes_are_said_as_outside() -> None:
    program: Any = patterndsl.parse(SCORES["scalars"]).compile(8, heads=2)
    run = torch.compile(lambda x, near: program(x, x, x, tables={"near": near}), fullgraph=True, backend="eager")
    with pytest.raises(InputError, match="E503"):
        run(torch.randn(1, 2, 9, 4), torch.randn(2, 9))
