"""Generated kernels against the oracle: outputs, log-sum-exps and gradients, on a GPU and in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own. It
is slow and of float32 alone: sizes are small there, and of a few ragged tiles of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl import Pattern
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.devices import CUDA
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.plan import Pass, passes_of
from patterndsl.lower.plan import plan as make_plan
from patterndsl.lower.rests import rests_of
from patterndsl.lower.shapes import Keys
from patterndsl.lower.tiles import find_tiles
from patterndsl.runtime import ops
from patterndsl.runtime.kernels.asked import asked_of, draws_for
from patterndsl.runtime.kernels.predicate import WHOLE, predicate_of
from patterndsl.runtime.kernels.shapes import usual_shapes
from patterndsl.runtime.planned import Planned
from tests.interpreting import HAS_CUDA, IS_INTERPRETED, assert_passes_in_the_interpreter, compiles, runs
from tests.strategies import Case, cases, many

triton = pytest.importorskip("triton")

DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPES = [torch.float32, *([torch.bfloat16, torch.float16] if HAS_CUDA else [])]
N = 1000 if HAS_CUDA else 45
"""No multiple of any tile."""

on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest number. Float32 has 6e-8, and a row sums some hundred products of 16 to 64 channels, in no order that
the oracle has, twice over in a gradient. The halves have 4e-3 and 5e-4: results are rounded once, and the weights and
their gradients each once before they are multiplied."""

PATTERNS = {
    "band and sinks": "causal & (recent(40) | first(4))",
    "random blocks of each head": "blocks(16, random(2, seed = head) | window(1))",
    "kinds of heads": "head < 1 & recent(9) & causal | head >= 1 & strided(20)",
    "empty rows and columns": "q >= 35 & k < 20",
    "nothing at all": "none",
    "all pairs": "all",
    "global rows": "window(5) | global(3)",
    "last positions": "k >= N - 3 | q == k",
    "divisions": "(q - 40) // 7 == (k - 40) // 7 | (q - k) % 24 == 5",
    "functions": "isqrt(q) == isqrt(k) | log2(1 + q) == log2(1 + k) & abs(q - k) < min(q, 9) | max(q, k) == 3",
}
CUT = [name for name in PATTERNS if name not in ("random blocks of each head", "nothing at all", "all pairs")]
"""Those whose border cuts tiles of 16."""
FURTHER = {
    "documents": ('inputs: {doc: "int[N]"}\nattend: causal & within(doc, recent(20))', lambda: documents(2)),
    "tables": ('inputs: {doc: "int[N]", span: "int[]"}\nattend: abs(q - k) < span[q.doc]', lambda: tables()),
    "truths": ('inputs: {there: "bool[N]"}\nattend: k.there | q == k', lambda: {"there": documents(2)["doc"] % 2 == 0}),
    "chunks by label": ("labels: {doc: given}\nattend: chunks(doc, 8, 1) | k < 3", lambda: documents(2)),
    "labels of each head": ("labels: {doc: given}\nattend: causal & same(doc)", lambda: documents(2, 2)),
    "chosen blocks": (
        "select:\n  top: given(3, of = blocks(16), per = blocks(32))\nattend: top | q == k",
        lambda: {"top": torch.randint(-1, -(-N // 16), (2, 2, -(-N // 32), 3))},
    ),
}


def documents(*outer: int) -> dict[str, Tensor]:
    """Runs of a length of their own in each row."""
    rows = torch.arange(torch.Size(outer).numel())
    return {"doc": (torch.arange(N) // (11 + 6 * rows[:, None])).reshape(*outer, N)}


def tables() -> dict[str, Tensor]:
    return {**documents(2), "span": torch.arange(N) % 9}


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """What a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_tensors(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, value_dim: int, batch: int = 1
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (batch, heads, N, dim), (batch, kv_heads, N, dim), (batch, kv_heads, N, value_dim)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def everything(
    pattern: Pattern, backend: str, tensors: list[Tensor], inputs: dict[str, Tensor] | None = None, **more: Any
) -> list[Tensor]:
    """Output, lse, and the gradients of something that depends on both."""
    query, key, value = tensors
    program = pattern.compile(
        q_len=query.shape[2], kv_len=key.shape[2], heads=query.shape[1], device=DEVICE, backend=backend, **more
    )
    output, lse = program(query, key, value, inputs=inputs, return_lse=True)
    return [x.detach() for x in (output, lse, *torch.autograd.grad(loss_of(output, lse), tensors))]


def loss_of(output: Tensor, lse: Tensor) -> Tensor:
    """Depends on both, with gradients of at most one."""
    weight = torch.linspace(-1, 1, output.numel(), device=DEVICE).reshape(output.shape)
    of_lse = torch.linspace(1, -1, lse.numel(), device=DEVICE).reshape(lse.shape)
    return (output.double() * weight).sum() + (lse.double().masked_fill(lse == -torch.inf, 0) * of_lse).sum()


def dense(pattern: Pattern, tensors: list[Tensor]) -> list[Tensor]:
    """The same by PyTorch's matrix products and softmax over all pairs, in the dtype of the tensors."""
    query, key, value = tensors
    keep = pattern.compile(query.shape[2], heads=query.shape[1], device=DEVICE).mask()
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = (query @ k.mT * query.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    output = weights @ v
    return [x.detach() for x in (output, lse, *torch.autograd.grad(loss_of(output, lse), tensors))]


def assert_close(
    found: list[Tensor], truth: list[Tensor], dtype: torch.dtype, beside: list[Tensor] | None = None
) -> None:
    """Within the tolerance; or, where it is given, within twice the error of dense attention in the same dtype."""
    others: Sequence[Tensor | None] = [None] * len(found) if beside is None else beside
    for ours, wanted, other in zip(found, truth, others, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        if finite.any():
            scale = wanted[finite].abs().max().clamp_min(1.0)
            bound = TOLERANCE[dtype] * scale
            if other is not None:
                bound = torch.maximum(bound, 2 * (other - wanted)[finite].abs().max())
            assert (ours - wanted)[finite].abs().max() <= bound


@runs
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_equals_the_oracle(text: str, dtype: torch.dtype) -> None:
    """Two heads of queries for each of keys."""
    pattern, tensors = patterndsl.parse(text), random_tensors(dtype, 2, 1, 16, 16)
    beside = dense(pattern, tensors) if dtype == torch.float32 else None
    assert_close(everything(pattern, "triton", tensors), everything(pattern, "oracle", tensors), dtype, beside)


@runs
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("text", "inputs"), FURTHER.values(), ids=FURTHER)
def test_inputs(text: str, inputs: Any, dtype: torch.dtype) -> None:
    """Two batch rows, which differ."""
    torch.manual_seed(1)
    pattern, tensors = patterndsl.parse(text), random_tensors(dtype, 2, 1, 16, 16, batch=2)
    asked = {name: values.to(DEVICE) for name, values in inputs().items()}
    assert_close(everything(pattern, "triton", tensors, asked), everything(pattern, "oracle", tensors, asked), dtype)


@runs
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 3), (24, 40), (80, 16), (16, 100), (128, 128), (256, 200)])
def test_widths(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    pattern, tensors = patterndsl.parse("recent(20) | k == 5"), random_tensors(dtype, 1, 1, dim, value_dim)
    assert_close(everything(pattern, "triton", tensors), everything(pattern, "oracle", tensors), dtype)


@runs
@on_cuda
@pytest.mark.parametrize(("q_len", "kv_len", "q_start"), [(1, 70, 69), (40, 1, 0), (33, 90, 57), (32, 64, 100)])
def test_lengths(q_len: int, kv_len: int, q_start: int) -> None:
    """Decoding, cross attention, queries behind all keys."""
    torch.manual_seed(0)
    shapes = (1, 2, q_len, 16), (1, 2, kv_len, 16), (1, 2, kv_len, 16)
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    pattern = patterndsl.parse("causal & (q - k < 50 | k % 8 == 0)")
    results = [everything(pattern, backend, tensors, q_start=q_start) for backend in ("triton", "oracle")]
    assert_close(results[0], results[1], torch.float32)


@runs
@on_cuda
def test_long_lists_are_cut() -> None:
    """More entries in a row and in a column than one piece of work takes, and rows that have none."""
    torch.manual_seed(0)
    length = 34 * 32 + 5
    tensors = [torch.randn(1, 1, length, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    pattern = patterndsl.parse("q < 3 | k == 1 & q < N - 40")
    program = pattern.compile(length, device=DEVICE, backend="triton")
    work = program.ready.kernels.lists(1, {}).rows(usual_shapes(torch.float32, 16).forward)
    assert work.num_joints == 1
    assert work.num_slots == 3
    assert_close(everything(pattern, "triton", tensors), everything(pattern, "oracle", tensors), torch.float32)


@runs
@on_cuda
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.5])
def test_scales(scale: float) -> None:
    query, key, value = random_tensors(torch.float32, 1, 1, 16, 16)
    pattern = patterndsl.parse("recent(20)")
    results = []
    for backend in ("triton", "oracle"):
        output = pattern.compile(N, device=DEVICE, backend=backend)(query, key, value, scale=scale)
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), (query, key, value))])
    assert_close(results[0], results[1], torch.float32)


@runs
@on_cuda
def test_other_orders_in_memory() -> None:
    """[B, T, H, D] transposed, as layers have it, and gradients that are expanded."""
    torch.manual_seed(0)
    rows = [torch.randn(2, N, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    pattern, results = patterndsl.parse("recent(20)"), []
    for backend in ("triton", "oracle"):
        output = pattern.compile(N, heads=2, device=DEVICE, backend=backend)(*(x.transpose(1, 2) for x in rows))
        results.append([output.detach(), *torch.autograd.grad(output.sum(), rows)])
    assert_close(results[0], results[1], torch.float32)


@runs
@on_cuda
def test_multisets_and_fallbacks() -> None:
    pattern = patterndsl.parse(
        "merge: multiset\nfallback: q == k\nattend: recent(9) & k % 3 == 0 | q < 40 & strided(4)\n"
    )
    tensors = random_tensors(torch.float32, 2, 2, 16, 16)
    assert_close(everything(pattern, "triton", tensors), everything(pattern, "oracle", tensors), torch.float32)


@runs
@on_cuda
def test_results_are_the_same_in_every_run() -> None:
    pattern, tensors = patterndsl.parse("recent(9) | global(2)"), random_tensors(torch.float32, 2, 1, 16, 16, batch=2)
    first, second = (everything(pattern, "triton", tensors) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@runs
@on_cuda
def test_the_operators_are_as_they_say() -> None:
    """What torch.compile and autograd are told of them holds, and whole graphs have them."""
    query, key, value = (x[:, :, :33].detach().requires_grad_() for x in random_tensors(torch.float32, 1, 1, 16, 16))
    program = patterndsl.parse("recent(9)").compile(33, device=DEVICE, backend="triton")
    torch.use_deterministic_algorithms(False)  # it compares what is not asked for, too
    asked: Any = ([], "", ops.register(program), *ops.Call(), None)
    torch.library.opcheck(ops.attend, (query, key, value, *asked, True, True))
    graph = torch.compile(program, fullgraph=True, backend="aot_eager")
    found, expected = (
        [out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value))]
        for out in (graph(query, key, value), program(query, key, value))
    )
    assert_close(found, expected, torch.float32)


@runs
@on_cuda
def test_what_it_refuses() -> None:
    program = patterndsl.parse("recent(9)").compile(8, device=DEVICE, backend="triton")
    for tensor in (torch.ones(1, 1, 8, 16, dtype=torch.float64), torch.ones(1, 1, 8, 257), torch.ones(0, 1, 8, 16)):
        with pytest.raises(patterndsl.InputError, match="the triton backend does not take"):
            program(*[tensor.to(DEVICE)] * 3)


@pytest.mark.skipif(HAS_CUDA or IS_INTERPRETED, reason="there is something to run on")
def test_without_a_gpu() -> None:
    with pytest.raises(patterndsl.InputError, match="no kernels for cpu"):
        patterndsl.parse("recent(9)").compile(8, backend="triton")


@pytest.mark.parametrize(
    "text", ["recent(9) | k >= N - 3", "causal & within(doc, recent(20))", "blocks(16, window(1))"]
)
def test_lengths_share_a_predicate(text: str) -> None:
    """A kernel is compiled for a text and not for its constants."""
    pattern = patterndsl.parse(text, inputs={"doc": "int[N]"} if "doc" in text else None)
    bounds = [pattern.bind(length) for length in (100, 1000, 70_000)]
    texts = {predicate_of(bound.relation, bound.sizes).text for bound in bounds}
    assert len(texts) == 1


def test_no_more_is_looked_up_than_was_drawn() -> None:
    bound = patterndsl.parse("random(3)").bind(2)
    assert "q, k, 2)" in predicate_of(bound.relation, bound.sizes).text


@pytest.mark.parametrize("text", ["(q - k) - (q - k) <= 0", "(q - k) % 3 - (q - k) % 3 + q - k < 5 + q - k"])
def test_truths_of_pairs_are_vectors(text: str) -> None:
    """Also those that need no position when both sides are put together."""
    bound = patterndsl.parse(text).bind(100)
    assert " = q - k\n" in predicate_of(bound.relation, bound.sizes).text


def test_divisors_stay_in_the_text() -> None:
    bounds = [patterndsl.parse(f"(q - k) % {divisor} == 0").bind(100) for divisor in (24, 25)]
    assert len({predicate_of(bound.relation, bound.sizes).text for bound in bounds}) == 2


@runs
@pytest.mark.parametrize("text", [PATTERNS[name] for name in CUT] + ["recent(9) | blocks(6, random(2, seed = head))"])
def test_states_of_tiles(text: str) -> None:
    """Of each tile the whole is asked, and the rest that it leaves: both hide what the pattern does not keep."""
    from tests.runtime.triton_membership import hidden_by

    bound, block = patterndsl.parse(text).bind(64, heads=2), 16
    groups = [
        (group.relation, find_tiles(group.relation, bound.sizes, Lookup(), block, block)) for group in bound.groups
    ]
    rests = rests_of(groups, bound.sizes)
    asked = asked_of(bound.relation, bound.sizes, {}, draws_for(bound.relation, 2, torch.device(DEVICE)))
    rows, wanted = list[tuple[int, ...]](), list[Tensor]()
    for group, (relation, tiles), places in zip(bound.groups, groups, rests.places, strict=True):
        for at in np.flatnonzero(~tiles.is_full):
            first_q, first_k = int(tiles.q_blks[at]) * block, int(tiles.kv_blks[at]) * block
            q, k = np.arange(first_q, first_q + block)[:, None], np.arange(first_k, first_k + block)
            kept = np.broadcast_to(np.asarray(member(relation, Point(q, k, 0, Lookup()))), (block, block))
            rows += [(group.heads[0], first_q, first_k, state) for state in (WHOLE, WHOLE + 1 + int(places[at]))]
            wanted += 2 * [torch.tensor(np.where(kept, 1.0, -1.0), dtype=torch.float32)]
    out = torch.zeros(len(rows), block, block, device=DEVICE)
    hidden_by(asked.of_rests(rests), torch.tensor(rows, dtype=torch.int32, device=DEVICE), out)
    assert torch.equal(out.cpu(), torch.stack(wanted))


# ---- passes of plans

PLANNED = {
    "one pass": "window(9) | global(3)",
    "a stride in place": "causal & dilated(8, 3)",
    "two orders": "causal & (recent(9) | strided(8))",
    "kinds of heads": "causal & dilated(8, 2) | head == 1 & k < 2",
    "kinds of windows": "causal & recent(5 + 4 * head)",
    "kinds of windows behind strides": "causal & (recent(3 + 4 * head) | strided(8))",
    "neighbours": "grid: {row: 6, col: 8}\nattend: abs(q.row - k.row) <= 1 & abs(q.col - k.col) <= 1\n",
}


@runs
@on_cuda
@pytest.mark.parametrize("length", [48, 53])
@pytest.mark.parametrize("text", PLANNED.values(), ids=PLANNED)
def test_passes_of_plans(text: str, length: int) -> None:
    """In strided views, written and added up where results are collected, shared heads of keys too. Block-sparse passes
    alone: dense ones are other kernels'."""
    assert check_plans(text, 48 if "grid" in text else length)


KEYS = {
    "draws of each head": "recent(3) | random(2, seed = head)",
    "draws that avoid": "causal & random(3, seed = 4, avoid = recent(2) | ~causal)",  # the first rows have none
    "draws of some rows": "head == 0 & window(2) | head == 1 & q >= 9 & k < 90 & random(1, seed = 2)",
}


@runs
@on_cuda
@pytest.mark.parametrize("text", KEYS.values(), ids=KEYS)
def test_keys_one_by_one(text: str) -> None:
    """What is drawn key by key is a pass of its own."""
    assert any(isinstance(item.piece.shape, Keys) for passes in check_plans(text, 101) for item in passes)


def check_plans(text: str, length: int) -> list[Sequence[Pass]]:
    """Compares those that run on kernels of our own alone, which it returns, with the oracle."""
    torch.manual_seed(0)
    pattern = patterndsl.parse(text)
    tensors = [torch.randn(1, heads, length, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1)]
    plan = make_plan(pattern.bind(length, heads=2), Lookup(), CUDA)
    truth = everything(pattern, "oracle", tensors)
    seen = list[Sequence[Pass]]()
    for choice in range(plan.num_choices):
        passes = passes_of(replace(plan, choice=choice).forward)
        if any(item.kernel != "triton" for item in passes):
            continue
        seen.append(passes)
        query, key, value = tensors
        output, lse = Planned(passes, torch.device(DEVICE), (length, length))(query, key, value, 16**-0.5)
        found = [output.detach(), lse.detach(), *torch.autograd.grad(loss_of(output, lse), tensors)]
        assert_close(found, truth, torch.float32)
    return seen


@runs
@on_cuda
@pytest.mark.parametrize(
    "text",
    ["k <= reach[q] // 3", "k <= q - 4 + reach[q] % 5", "(q - reach[k]) % 3 == 1", "k <= abs(reach[q] // 7) // 3"],
)
def test_what_is_read_may_be_negative(text: str) -> None:
    """Division is floored there, too: of values below 0, and of -1 where the table has no such row."""
    from tests.runtime.triton_membership import membership

    program = patterndsl.parse(f"inputs: {{reach: 'int[20]'}}\nattend: {text}").compile(30, device=DEVICE)
    inputs = {"reach": torch.arange(-10, 10, device=DEVICE) * 2}
    expected = program.mask(inputs=inputs)[0].cpu()
    assert expected.any()
    assert torch.equal(membership(program, inputs, 0).cpu(), expected)


# ---- random patterns


@runs
@on_cuda
@many(1 if IS_INTERPRETED else 0.2)
@given(cases(max_length=60))
def test_predicates_of_random_patterns(case: Case) -> None:
    """Membership of every pair, as a kernel says it."""
    from tests.runtime.triton_membership import membership

    pattern = case.pattern()
    program = pattern.compile(case.sizes.get("n"), **case.keywords, heads=case.heads, layer=case.layer, device=DEVICE)
    inputs = {shape.name: torch.tensor(case.inputs[shape.name], device=DEVICE) for shape in program.bound.inputs}
    keep = torch.from_numpy(case.keep(pattern))
    for head in range(case.heads):
        assert torch.equal(membership(program, inputs, head).cpu(), keep[head])


@runs
@on_cuda
@many(0.2 if IS_INTERPRETED else 0.1)
@given(case=cases(max_length=70, max_heads=2), kv_group=st.sampled_from((1, 2)))
def test_random_patterns(case: Case, kv_group: int) -> None:
    torch.manual_seed(0)
    pattern, sizes = case.pattern(), case.lengths
    kv_heads = case.heads // kv_group if case.heads % kv_group == 0 else case.heads
    shapes = (1, case.heads, sizes.q_len, 16), (1, kv_heads, sizes.kv_len, 16), (1, kv_heads, sizes.kv_len, 16)
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    results = []
    for backend in ("triton", "oracle"):
        keywords = {**case.keywords, "heads": case.heads, "layer": case.layer, "device": DEVICE, "backend": backend}
        program = pattern.compile(case.sizes.get("n"), **keywords)
        inputs = {shape.name: torch.tensor(case.inputs[shape.name], device=DEVICE) for shape in program.bound.inputs}
        query, key, value = tensors
        output, lse = program(query, key, value, inputs=inputs, return_lse=True)
        loss = output.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
        results.append([x.detach() for x in (output, lse, *torch.autograd.grad(loss, tensors))])
    assert_close(results[0], results[1], torch.float32)


# ---- all of it in the interpreter


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
