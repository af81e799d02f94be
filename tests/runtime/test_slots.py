"""Routes and lists for each query on generated kernels, against the oracle: in Triton's interpreter, and on a GPU.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.lower.hulls import Lists
from patterndsl.runtime import program as program_module
from patterndsl.runtime.kernels import work
from patterndsl.runtime.slotted import Slotted
from patterndsl.sema.parameters import Sizes
from tests.interpreting import HAS_CUDA, IS_INTERPRETED, assert_passes_in_the_interpreter, compiles, runs

pytest.importorskip("triton")

DEVICE = "cuda" if HAS_CUDA else "cpu"
TOLERANCE = 2e-5
"""Of the largest number: float32, and sums in another order."""

on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """What a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, where there is no GPU."""
    monkeypatch.setattr(program_module, "has_kernels", lambda _: True)


# ---- programs


@dataclass(frozen=True)
class Call:
    """Heads of queries and of keys, batch rows, and the outer dimensions of what is listed."""

    heads: tuple[int, int] = (2, 2)
    batch: int = 2
    outer: tuple[int, ...] = (2, 2)
    q_start: int = 0
    n: int = 41


ROUTES = "labels: {c: kmeans(clusters = %d)}\nselect: {route: 'members(c, top = %d)'}\nmerge: %s\n%sattend: %s"
FIRST = (
    "labels: {c: kmeans(clusters = 4)}\n"
    "select: {route: 'members(c, top = 12)', first: 'members(c, top = 1)'}\n"
    "merge: %s\nattend: causal & route & q != k | first"
)
LISTS = "select:\n  top: given(%d, of = blocks(%d))\n%sattend: %s"
DOC = "inputs: {doc: 'int[N]'}\n"
OWN = "fallback: q == k\n"
GROUPED = Call((4, 2), outer=(2, 4))

CASES = {
    "a multiset": (ROUTES % (4, 12, "multiset", "", "causal & route"), Call()),
    "a mean": (ROUTES % (4, 12, "mean", "", "causal & route"), Call()),
    "a set": (ROUTES % (4, 12, "set", "", "causal & route"), Call()),
    "a multiset of whole tiles": (ROUTES % (3, 32, "multiset", "", "route & (q + k) % 3 > 0"), GROUPED),
    "a mean of whole tiles, later queries": (ROUTES % (2, 32, "mean", "", "causal & route"), Call(q_start=9)),
    "a set of many routes": (ROUTES % (40, 5, "set", "", "route"), Call(q_start=5)),
    "routes of batch rows": (ROUTES % (3, 9, "set", "", "causal & route"), Call((4, 1), outer=(2,))),
    "routes of all": (ROUTES % (3, 9, "mean", "", "causal & route"), Call((4, 2), outer=())),
    "itself last": (FIRST % "mean", Call()),
    "itself last, merged": (FIRST % "multiset", GROUPED),
    "a mean and itself": (ROUTES % (3, 6, "mean", OWN, "causal & route & q != k"), GROUPED),
    "a set and itself": (ROUTES % (3, 6, "set", OWN, "causal & route & q != k"), GROUPED),
    "a set with a window": (ROUTES % (4, 12, "set", "", "causal & (route | recent(5))"), GROUPED),
    "a multiset with a window": (ROUTES % (4, 12, "multiset", "", "causal & (route | recent(5))"), Call()),
    "a mean with a window": (ROUTES % (4, 12, "mean", "", "causal & (route | recent(5))"), GROUPED),
    "routes inside documents": (ROUTES % (4, 12, "set", DOC, "(route | recent(4)) & same(doc)"), GROUPED),
    "a mean inside documents": (ROUTES % (4, 12, "mean", DOC, "(route | recent(4)) & same(doc)"), Call()),
    "kinds of heads": (
        ROUTES % (4, 12, "mean", "", "head % 2 == 0 & causal & route | head % 2 == 1 & recent(3)"),
        GROUPED,
    ),
    "kinds of heads, merged": (
        ROUTES % (4, 12, "multiset", "", "head % 2 == 0 & causal & route | head % 4 == 1 & recent(3)"),
        Call((4, 2), outer=(2,)),
    ),
    "lists": (LISTS % (2, 16, "", "causal & top"), Call(batch=1, outer=(1, 2), n=70)),
    "lists of grouped heads": (LISTS % (3, 16, "", "top"), Call((4, 2), 1, (1, 4), n=40)),
    "lists of all, ragged": (LISTS % (2, 20, "", "causal & top & q % 3 > 0"), Call(batch=1, outer=(), q_start=5, n=50)),
    "lists of batch rows": (LISTS % (2, 32, "", "causal & top"), Call((2, 1), outer=(2,), n=40)),
    "lists and a window": (LISTS % (2, 16, "", "causal & (top | recent(9))"), Call(batch=1, outer=(1, 2), n=40)),
    "lists twice and itself": (
        LISTS % (2, 16, f"merge: multiset\n{OWN}", "k > 3 & (top | recent(9))"),
        Call(batch=1, outer=(1, 2), n=40),
    ),
    "lists inside documents": (
        LISTS % (2, 16, DOC, "causal & same(doc) & (recent(5) | head % 4 < 3 & top | head % 4 == 3 & strided(5))"),
        Call((4, 2), outer=(2, 4), n=30),
    ),
    "lists and drawn keys": (
        LISTS % (2, 16, "", "random(2, seed = 3) | causal & top"),
        Call(batch=1, outer=(1, 2), n=40),
    ),
    "lists of few queries": (
        "select:\n  top: given(2, of = blocks(16), per = blocks(4))\nattend: causal & top",
        Call(batch=1, outer=(1, 1), q_start=5, n=60),
    ),
    "two lists": (
        "select:\n  top: given(2, of = blocks(16))\n  low: given(1, of = blocks(32))\nattend: causal & (top | low)",
        Call(batch=1, outer=(1, 2), n=40),
    ),
    "lists and routes": (
        "labels: {c: kmeans(clusters = 4)}\n"
        "select:\n  top: given(2, of = blocks(16))\n  route: members(c, top = 9)\nattend: causal & (top | route)",
        Call(batch=1, outer=(1, 2), n=40),
    ),
}


def inputs_of(program: patterndsl.Program, call: Call) -> dict[str, Tensor]:
    """What is listed may be nothing, what there is not, or what is listed already; documents are of batch rows."""
    found = {}
    for shape in program.bound.inputs:
        selection = shape.selection
        if selection is None:
            found[shape.name] = torch.randint(0, 3, (call.batch, call.n), device=DEVICE).sort(-1).values
        else:
            number = call.n + 2 if selection.label else selection.num_blocks + 1
            inner = [size for size in shape.inner if size is not None]
            found[shape.name] = torch.randint(-1, number, (*call.outer, *inner), device=DEVICE)
    return found


def compiled(pattern: patterndsl.Pattern, call: Call, backend: str = "auto") -> patterndsl.Program:
    return pattern.compile(call.n, q_start=call.q_start, heads=call.heads[0], device=DEVICE, backend=backend)


def tensors_of(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    lengths = zip((call.heads[0], *call.heads[1:] * 2), (call.n - call.q_start, call.n, call.n), strict=True)
    return [
        torch.randn(call.batch, heads, length, 16, dtype=dtype, device=DEVICE, requires_grad=True)
        for heads, length in lengths
    ]


def weighed(results: tuple[Tensor, ...]) -> Tensor:
    """Something that depends on all of them, differently everywhere."""
    weights = (torch.linspace(-1, 1, x.numel(), device=x.device, dtype=torch.float64).view(x.shape) for x in results)
    finite = (x.double().masked_fill(x == -torch.inf, 0) for x in results)
    return torch.stack([(x * weight).sum() for x, weight in zip(finite, weights, strict=True)]).sum()


def everything(program: patterndsl.Program, tensors: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output, lse but of a mean, and gradients."""
    query, key, value = tensors
    if program.bound.merge == "mean":
        results: tuple[Any, ...] = (program(query, key, value, inputs=inputs),)
    else:
        results = program(query, key, value, inputs=inputs, return_lse=True)
    return [x.detach().double() for x in (*results, *torch.autograd.grad(weighed(results), tensors))]


def assert_close(found: list[Tensor], truth: list[Tensor]) -> None:
    for ours, wanted in zip(found, truth, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        if finite.any():
            scale = wanted[finite].abs().max().clamp_min(1.0)
            assert (ours - wanted)[finite].abs().max() <= TOLERANCE * scale


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(("text", "call"), CASES.values(), ids=CASES)
def test_programs(text: str, call: Call) -> None:
    torch.manual_seed(0)
    pattern, tensors = patterndsl.parse(text), tensors_of(call)
    program = compiled(pattern, call)
    assert program.who(*tensors) == "slotted"
    inputs = inputs_of(program, call)
    truth = everything(compiled(pattern, call, "oracle"), tensors, inputs)
    assert_close(everything(program, tensors, inputs), truth)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("name", ["a mean", "lists of few queries"])
def test_results_are_the_same_again(name: str) -> None:
    torch.manual_seed(0)
    text, call = CASES[name]
    pattern, tensors = patterndsl.parse(text), tensors_of(call)
    program = compiled(pattern, call)
    inputs = inputs_of(program, call)
    runs = [everything(program, tensors, inputs) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


RESTS = st.sampled_from(["causal", "q != k", "(q + k) % 3 > 0", "k <= q + 2", "same(doc)", "k % 5 > 0", "q > 9"])
TERMS = st.lists(st.sampled_from(["recent(6)", "first(2)", "strided(7)"]), max_size=2, unique=True)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@settings(
    max_examples=4 if IS_INTERPRETED else 8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    clusters=st.integers(1, 5),
    width=st.integers(1, 20),
    block=st.sampled_from([0, 16, 17, 33]),
    rests=st.lists(RESTS, max_size=2, unique=True),
    terms=TERMS,
    merge=st.sampled_from(["set", "multiset", "mean"]),
    fallback=st.sampled_from(["", OWN]),
    n=st.integers(2, 30),
    later=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    of_heads=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_lists(
    clusters: int,
    width: int,
    block: int,
    rests: list[str],
    terms: list[str],
    merge: str,
    fallback: str,
    n: int,
    later: bool,
    heads: tuple[int, int],
    of_heads: bool,
    seed: int,
) -> None:
    """Of routes, or of blocks, which a mean leaves to other programs."""
    torch.manual_seed(seed)
    q_start = n // 3 if later and not fallback else 0
    call = Call(heads, 1, (1, heads[0]) if of_heads else (), q_start, n)
    union = " & ".join([*rests, "(" + " | ".join(["listed", *terms]) + ")"])
    label, listed = f"labels: {{c: kmeans(clusters = {min(clusters, n)})}}\n", f"members(c, top = {width})"
    if block:
        label, listed = "", f"given({min(width, 4)}, of = blocks({block}))"
    text = f"{label}{DOC}select: {{listed: '{listed}'}}\nmerge: {merge}\n{fallback}attend: {union}"
    pattern, tensors = patterndsl.parse(text), tensors_of(call)
    program = compiled(pattern, call)
    is_slotted = program.who(*tensors) == "slotted"
    assert is_slotted or (merge == "mean" and block)
    inputs = inputs_of(program, call)
    truth = everything(compiled(pattern, call, "oracle"), tensors, inputs)
    if is_slotted:
        assert_close(everything(program, tensors, inputs), truth)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("name", ["lists of grouped heads", "lists of all, ragged", "a multiset of whole tiles"])
def test_long_lists_are_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU were small: parts of a list are added up, whichever places they took."""
    monkeypatch.setattr(work, "SHORTEST", 1)
    monkeypatch.setattr(work, "PARTS", 64)
    torch.manual_seed(0)
    text, call = CASES[name]
    text, call = text.replace("top = 32", "top = 180"), Call((2, 1), 1, (), call.q_start, 190)
    pattern, tensors = patterndsl.parse(text), tensors_of(call)
    program = compiled(pattern, call)
    inputs = inputs_of(program, call)
    slotted = program.ready.by_inputs
    assert isinstance(slotted, Slotted)
    query, key, value = tensors
    (item,) = slotted.passes(query, key, value, program.given(query, key, value, inputs))
    columns = item.columns(0)
    assert columns.num_joints and int((columns.joints[:, 4] > 1).sum())
    truth = everything(compiled(pattern, call, "oracle"), tensors, inputs)
    assert_close(everything(program, tensors, inputs), truth)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_what_is_chosen_in_a_call() -> None:
    """Lists that a program finds itself, and a graph of torch.compile, which finds gradients from results."""
    torch.manual_seed(0)
    call = Call((2, 1), 1, n=50)
    text = (
        "select:\n  top: topk(2, of = blocks(16), among = k < q // 16, always = k == q // 16)\n%sattend: causal & top"
    )
    for fallback in ("", "fallback: q == k\n"):
        pattern, tensors = patterndsl.parse(text % fallback), tensors_of(call)
        program = compiled(pattern, call)
        out, lists = program(*tensors, return_labels=True)
        truth = everything(compiled(pattern, call, "oracle"), tensors, lists)
        assert_close([out.detach().double()], truth[:1])
        graph: Any = torch.compile(program, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(weighed(graph(*tensors, return_lse=True)), tensors)
        assert_close([x.double() for x in found], truth[2:])


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("merge", ["mean", "set"])
def test_a_graph_of_a_mean_finds_its_slots_again(merge: str) -> None:
    torch.manual_seed(0)
    pattern = patterndsl.parse(ROUTES % (4, 12, merge, "", "causal & route"))
    call = Call()
    tensors, program = tensors_of(call), compiled(pattern, call)
    inputs = inputs_of(program, call)
    graph = torch.compile(lambda *x: program(*x, inputs=inputs), fullgraph=True, backend="aot_eager")
    out = graph(*tensors)
    grads = [torch.autograd.grad(weighed((out,)), tensors, retain_graph=turn == 0) for turn in range(2)]
    own = program(*tensors, inputs=inputs)
    expected = [torch.autograd.grad(weighed((own,)), tensors, retain_graph=turn == 0) for turn in range(2)]
    for found in (grads[0], grads[1], expected[1]):
        assert all(torch.equal(one, other) for one, other in zip(found, expected[0], strict=True))


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_scales_and_strides() -> None:
    """A scale below 0, and tensors whose heads lie inside positions."""
    torch.manual_seed(0)
    text, call = CASES["a set with a window"]
    pattern = patterndsl.parse(text)
    program, truth = compiled(pattern, call), compiled(pattern, call, "oracle")
    inputs = inputs_of(program, call)
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors_of(call)]
    for scale in (-0.5, 0.0):
        results = [run(*tensors, inputs=inputs, scale=scale, return_lse=True) for run in (program, truth)]
        grads = [torch.autograd.grad(weighed(result), tensors) for result in results]
        mine, expected = ([x.detach().double() for x in (*results[at], *grads[at])] for at in range(2))
        assert_close(mine, expected)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_members_that_are_not_attended_may_be_anything() -> None:
    """Keys behind all queries of a tile, and those of other routes, are not multiplied by 0."""
    torch.manual_seed(0)
    text, call = ROUTES % (2, 8, "mean", "", "causal & route & k < 20"), Call()
    pattern, tensors = patterndsl.parse(text), tensors_of(call)
    program = compiled(pattern, call)
    inputs = {"route": torch.randint(0, 20, (2, 2, 2, 8), device=DEVICE)}
    expected = everything(program, tensors, inputs)
    with torch.no_grad():
        for x in tensors[1:]:
            x[:, :, 20:] = torch.nan
    found = everything(program, tensors, inputs)
    assert all(torch.equal(one[:, :, :20], other[:, :, :20]) for one, other in zip(found, expected, strict=True))


# ---- who has slots

MEMBERS = "labels: {c: kmeans(clusters = 4)}\nselect: {route: 'members(c, top = 9)', other: 'members(c, top = 5)'}\n"


@pytest.mark.parametrize(
    ("text", "is_slotted"),
    [
        (MEMBERS + "attend: causal & route", True),
        (MEMBERS + "merge: mean\nattend: causal & route | other", True),
        (MEMBERS + "attend: causal & (route | other)", False),
        (LISTS % (2, 16, "", "causal & top"), True),
        (LISTS % (2, 15, "", "causal & top"), False),
        (LISTS % (2, 16, "merge: mean\n", "causal & top | recent(3)"), False),
        (LISTS % (2, 16, "", "causal & top | q < 3"), True),
        (LISTS % (2, 16, "fallback: first(3)\n", "causal & top"), False),
        ("select: {top: 'given(2, of = blocks(16), per = blocks(16))'}\nattend: causal & top", False),
        ("inputs: {doc: 'int[N]'}\nattend: causal & same(doc)", False),
    ],
)
def test_who_has_slots(monkeypatch: pytest.MonkeyPatch, text: str, is_slotted: bool) -> None:
    monkeypatch.setattr(program_module, "has_kernels", lambda _: True)
    pattern = patterndsl.parse(text)
    program = pattern.compile(64, heads=2)
    assert (program.who(*(torch.zeros(1, 2, 64, 16) for _ in range(3))) == "slotted") == is_slotted
    assert ("with a slot for" in pattern.explain(64, heads=2, device="h100").runs) == is_slotted


# ---- who stands where


@runs
@on_cuda
@pytest.mark.parametrize(
    ("width", "routes", "n", "q_start"), [(1, 1, 1, 0), (7, 5, 30, 4), (16, 3, 20, 0), (1100, 2, 1500, 9)]
)
def test_each_member_has_a_place(width: int, routes: int, n: int, q_start: int) -> None:
    from patterndsl.runtime.kernels.slot_tables import routed

    torch.manual_seed(0)
    table = torch.randint(-2, n + 3, (2, 3, routes * width), device=DEVICE)
    (query, places, begins, _), key = routed(table, width, Sizes(n - q_start, n, q_start, n))
    assert begins is not None
    starts = [*begins.flatten().tolist(), int((key >= 0).sum())]
    for at in range(6):
        members = table.view(6, routes, width)[at]
        keys = key.view(6, routes, width)[at]
        for mine, stand in zip(members.tolist(), keys.tolist(), strict=True):
            there = [member for member in stand if member >= 0]
            assert there == sorted({member for member in mine if 0 <= member < n})
        flat = keys.flatten()
        expected = torch.where(flat >= q_start, flat - q_start, -1)
        assert torch.equal(query.view(6, -1)[at], expected.int())
        for position in range(n):
            first, stop = starts[at * n + position], starts[at * n + position + 1]
            assert places.flatten()[first:stop].tolist() == (flat == position).nonzero().flatten().tolist()


@runs
@on_cuda
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("width", "of", "n", "q_start", "shape"), [(1, 16, 5, 0, (1, 1)), (3, 17, 150, 7, (2, 2)), (4, 64, 130, 0, (1, 4))]
)
def test_each_block_that_is_listed_has_a_slot(
    width: int, of: int, n: int, q_start: int, shape: tuple[int, int], counted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are of one block, queries ascend in them, and full ones are behind their keys."""
    from patterndsl.runtime.kernels import slot_tables

    if not counted:
        monkeypatch.setattr(slot_tables, "MOST_COUNTED", 0)
    torch.manual_seed(0)
    heads, tile, kv_block, length = 4, 8, 16, n - q_start
    lists = Lists(("top",), width, of, 1, q_start, False)
    blocks = -(-n // of)
    table = torch.randint(-1, blocks + 1, (*shape, length * width), device=DEVICE)
    found = slot_tables.turned(table, lists, Sizes(length, n, q_start, n), "behind", heads, tile, kv_block)
    some = heads // shape[1]
    pieces = found.rows.pieces.view(shape[0], heads, -1, 6)
    for at in range(shape[0] * shape[1]):
        rows = table.view(-1, length, width)[at].tolist()
        query, states = found.slots.query.view(shape[0] * shape[1], -1, tile)[at], found.states[at].tolist()
        places = found.slots.places.view(shape[0] * shape[1], length, width)[at]
        seen = set()
        for number, (mine, state) in enumerate(zip(query.tolist(), states, strict=True)):
            there = [q for q in mine if q >= 0]
            assert mine[: len(there)] == there == sorted(there) and bool(there) == (state >= 0)
            seen |= {(q, state >> 1) for q in there}
            piece = pieces[at // shape[1], at % shape[1] * some, number].tolist()
            assert piece[:3] == [at // shape[1], at % shape[1] * some, number] and piece[5] == -1
            if state >= 0 and not state & 1:
                assert min(there) + q_start >= (state // 2 + 1) * of - 1 and found.keys.order is None
            entries = found.rows.entries[piece[3] : piece[4]].tolist()
            first = (state >> 1) * found.keys.per_block
            stop = min(first + found.keys.per_block, found.keys.number)
            assert entries == ([2 * block + (state & 1) for block in range(first, stop)] if state >= 0 else [])
        assert seen == {(q, block) for q, row in enumerate(rows) for block in row if 0 <= block < blocks}
        for q, turn in (places >= 0).nonzero().tolist():
            slot = int(places[q, turn])
            assert query.flatten()[slot] == q and states[slot // tile] >> 1 == rows[q][turn]
        assert int((places >= 0).sum()) == len(seen)


# ---- all of it in the interpreter


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
