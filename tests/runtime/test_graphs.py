"""Calls and training steps of patterns that inputs decide, in CUDA graphs: replayed on other numbers, they give what
new calls give.

A step is captured by `measure.captured`, which refuses what waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.device import graphs
from patterndsl.functional import MAX_PROGRAMS, cache_clear
from patterndsl.learn.lsh import lsh_labels
from patterndsl.nn import Attention
from patterndsl.runtime.measure import captured

HAS_CUDA = torch.cuda.is_available()
on_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
N, HEADS, DIM, BATCH = 1024, 4, 64, 2
ROUTES = "labels: {c: kmeans(clusters = 8)}\nselect: {route: 'members(c, top = %d)'}\nmerge: %s\n%sattend: %s"
FIRST = (
    "labels: {c: kmeans(clusters = 8)}\nselect: {route: 'members(c, top = 64)', first: 'members(c, top = 1)'}\n"
    "merge: mean\nattend: causal & route & q != k | first"
)
OWN = "fallback: q == k\n"
HASHED = "labels: {b: 'lsh(buckets = 16, rounds = %d)'}\n"
DOC = "inputs: {doc: 'int[N]'}\n"
PROGRAMS = {
    "a mean of routes": ROUTES % (64, "mean", "", "causal & route"),
    "a set of routes of odd sizes": ROUTES % (50, "set", "", "causal & route"),
    "routes, a window and documents": ROUTES % (64, "multiset", DOC, "causal & same(doc) & (route | recent(32))"),
    "routes and itself": ROUTES % (64, "mean", OWN, "causal & route & q != k"),
    "itself last": FIRST,
    "hashed chunks": HASHED % 1 + OWN + "merge: multiset\nattend: causal & chunks(b, 64, 1) & q != k",
    "rounds of hashes, and documents": HASHED % 3 + DOC + "attend: causal & same(doc) & (chunks(b, 64, 1) | recent(9))",
    "documents": DOC + "attend: causal & same(doc)",
    "padding": "inputs: {there: 'bool[Nk]'}\nattend: recent(128) & k.there",
    "blocks for blocks": (
        "select: {top: 'topk(4, of = blocks(64), per = blocks(64), among = k < q, always = k == q)'}\n"
        "attend: causal & (top | recent(64))"
    ),
    "blocks for queries": (
        "select: {top: 'topk(3, of = blocks(128), among = k < q // 128, always = k == q // 128)'}\nattend: causal & top"
    ),
    "blocks and a window": "select: {top: 'topk(3, of = blocks(64))'}\nattend: causal & (top | recent(40))",
    "given blocks": "select: {top: 'given(3, of = blocks(32))'}\nattend: causal & top",
    "tokens": "select: {top: 'topk(16, among = causal)'}\nattend: causal & top",
    "many tokens": "select: {top: 'topk(100, among = causal, heads = all)'}\nattend: causal & top",
}
ADDED_UP = ("tokens", "many tokens")
"""Whose gradients of keys are added up in any order."""


def inputs_of(program: patterndsl.Program) -> dict[str, Tensor]:
    """What the caller gives."""
    found = dict[str, Tensor]()
    for shape in program.bound.inputs:
        selection = shape.selection
        if shape.found_by == "call":
            continue
        if selection is not None:
            number = N if selection.label else selection.num_blocks
            size = (BATCH, HEADS, *(size for size in shape.inner if size is not None))
            found[shape.name] = torch.rand(*size[:-1], number, device="cuda").topk(size[-1]).indices.sort(-1).values
        elif shape.dtype == "bool":
            found[shape.name] = torch.rand(BATCH, N, device="cuda") < 0.7
        else:
            found[shape.name] = torch.randint(0, 9, (BATCH, N), device="cuda").sort(-1).values
    return found


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def in_graph(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays it, and where it then leaves its results."""
    results = list[Tensor]()

    def kept() -> None:
        results[:] = step()

    return captured(kept, torch.device("cuda")), results


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """The bias of keys has no gradient but for what rounding leaves of numbers as large as others."""
    rounding = torch.finfo(torch.float32).eps * max(largest_of(other) for other in wanted)
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=max(tolerance * largest_of(other), rounding))


def largest_of(x: Tensor) -> float:
    return float(x.detach().float().abs().max())


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("name", PROGRAMS)
def test_calls(name: str) -> None:
    """Forward and backward, twice on other tensors, labels, lists and documents; bit for bit where that is promised."""
    torch.manual_seed(0)
    program = patterndsl.parse(PROGRAMS[name]).compile(N, heads=HEADS, device="cuda")
    tensors = [normal(BATCH, heads, N, DIM).requires_grad_() for heads in (HEADS, 2, 2)]
    inputs, upstream = inputs_of(program), normal(BATCH, HEADS, N, DIM)

    def step() -> list[Tensor]:
        out = program(*tensors, inputs=inputs)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]

    replay, results = in_graph(step)
    before = [x.clone() for x in step()]
    for _ in range(2):
        with torch.no_grad():
            for x in tensors:
                x.copy_(torch.randn_like(x))
        for given, other in zip(inputs.values(), inputs_of(program).values(), strict=True):
            given.copy_(other)
        replay()
        wanted = step()
        assert not torch.equal(wanted[0], before[0])
        if name in ADDED_UP:
            assert_close(results, wanted, 1e-2)
        else:
            assert all(torch.equal(ours, other) for ours, other in zip(results, wanted, strict=True))


# ---- layers

LAYERS = {
    "hashes, drawn anew": HASHED.replace("%d", "1, redraw = 1") + "attend: causal & chunks(b, 64, 1)",
    "rounds, drawn anew now and then": HASHED.replace("%d", "2, redraw = 2") + "attend: causal & chunks(b, 64, 1)",
    "clusters": "labels: {c: kmeans(clusters = 16)}\nshare: query_key\nattend: causal & chunks(c, 64, 1)",
    "routes": (
        "share: query_key\n"
        + ROUTES % (64, "mean", "", "causal & (head % 2 == 0 & recent(32) | head % 2 == 1 & route)")
    ),
    "an index of blocks": (
        "select: {top: 'topk(4, of = blocks(64), per = blocks(64), by = learned, among = k < q, always = k == q)'}\n"
        "attend: causal & top"
    ),
    "an index of tokens": "select: {top: 'topk(32, by = learned, among = causal)'}\nattend: top",
    "an index of many tokens": "select: {top: 'topk(100, by = learned, among = causal)'}\nattend: top",
    "blocks for queries": PROGRAMS["blocks for queries"],
}
WIDTH = HEADS * 32


def layer_of(text: str) -> Attention:
    torch.manual_seed(0)
    layer = Attention(text, WIDTH, HEADS).cuda()
    learners: Any = layer.learners.values()
    for learner in learners:
        learner.decay = 0.5  # so that labels move at once
    return layer


def step_of(layer: Attention, x: Tensor) -> Callable[[], list[Tensor]]:
    """Output, losses, all gradients, and what the layer has become."""
    learned = [x, *layer.parameters()]

    def step() -> list[Tensor]:
        out = layer(x)
        loss = torch.stack([out.square().mean(), *layer.losses.values()]).sum()
        grads = torch.autograd.grad(loss, learned, allow_unused=True)
        return [out.detach(), loss.detach(), *(grad for grad in grads if grad is not None), *layer.buffers()]

    return step


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("text", LAYERS.values(), ids=LAYERS)
def test_training_steps(text: str) -> None:
    """Each replay is a step of its own: centroids move, directions are drawn anew, and losses teach."""
    layer, x = layer_of(text), normal(BATCH, N, WIDTH, dtype=torch.float32).requires_grad_()
    replay, results = in_graph(step_of(layer, x))
    other = copy.deepcopy(layer)
    wanted_of = step_of(other, x)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        replay()
        assert_close(results, wanted_of(), 1e-4)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("name", ["hashes, drawn anew", "routes", "blocks for queries"])
def test_layers_that_pytorch_captures(name: str) -> None:
    """By torch.cuda.make_graphed_callables, each layer forward and backward in a graph of its own."""
    layer = layer_of(LAYERS[name])
    other = copy.deepcopy(layer)
    shape = (BATCH, N, WIDTH)
    example = normal(*shape, dtype=torch.float32).requires_grad_()
    graphed: Any = torch.cuda.make_graphed_callables(layer, (example,))
    other.load_state_dict(layer.state_dict())
    for _ in range(2):
        x = normal(*shape, dtype=torch.float32).requires_grad_()
        out, wanted = graphed(x), other(x)
        grads, wanted_grads = (
            torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
            for y, model in ((out, layer), (wanted, other))
        )
        assert_close([out, *grads], [wanted, *wanted_grads], 1e-4)


@pytest.mark.cuda
@on_cuda
def test_programs_that_torch_compile_captures() -> None:
    """By mode="reduce-overhead", after a call that finds what stays."""
    program = patterndsl.parse(PROGRAMS["blocks for blocks"]).compile(N, heads=HEADS, device="cuda")
    tensors = [normal(BATCH, HEADS, N, DIM).requires_grad_() for _ in range(3)]
    upstream = normal(BATCH, HEADS, N, DIM)
    torch.autograd.grad(program(*tensors), tensors, upstream)
    fast = torch.compile(program, mode="reduce-overhead")
    for _ in range(4):
        with torch.no_grad():
            for x in tensors:
                x.copy_(torch.randn_like(x))
        torch.compiler.cudagraph_mark_step_begin()
        out = fast(*tensors)
        grads = [x.clone() for x in torch.autograd.grad(out, tensors, upstream)]
        wanted = program(*tensors)
        assert_close([out, *grads], [wanted, *torch.autograd.grad(wanted, tensors, upstream)], 1e-2)


# ---- what graphs read


@pytest.mark.cuda
@on_cuda
def test_what_a_graph_reads_stays() -> None:
    """Programs and directions that were forgotten since, and whose memory would be another's."""
    query, key, value = (normal(BATCH, HEADS, N, DIM) for _ in range(3))
    text = HASHED % 2 + "attend: causal & (chunks(b, 64, 1) | recent(100))"
    with torch.no_grad():
        replay, results = in_graph(lambda: [patterndsl.attention(query, key, value, text)])
    wanted = patterndsl.attention(query, key, value, text)
    cache_clear()
    for seed in range(1, MAX_PROGRAMS):
        lsh_labels(key[:, :, :4], buckets=16, rounds=2, seed=seed)
    torch.cuda.empty_cache()
    filled = [torch.full((1 << size,), 77, dtype=torch.int32, device="cuda") for size in 64 * list(range(6, 22))]
    replay()
    assert torch.equal(results[0], wanted)
    assert filled


def test_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last few, and all that were asked for while a graph was captured."""
    made = list[int]()

    @graphs.remembered(1)
    def make(number: int) -> Tensor:
        made.append(number)
        return torch.full((3,), number)

    monkeypatch.setattr(graphs, "_held", {})
    assert make(1) is make(1)
    assert make(2) is not make(1)
    assert made == [1, 2, 1]
    assert not graphs._held
    monkeypatch.setattr(graphs, "is_capturing", lambda: True)
    held = make(3)
    monkeypatch.setattr(graphs, "is_capturing", lambda: False)
    make(4)
    assert list(graphs._held.values()) == [held]


@pytest.mark.parametrize("number", [True, 7])
def test_numbers_are_filled_in(number: int) -> None:
    found = graphs.on_device(number, torch.device("cpu"))
    assert torch.equal(found, torch.tensor(number))
    assert found.dtype == torch.tensor(number).dtype
    assert graphs.on_device(found, torch.device("cpu")) is found
