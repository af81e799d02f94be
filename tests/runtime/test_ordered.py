"""Kernels that reach rows through an order, against dense attention: in Triton's interpreter, and on a GPU.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.learn.lsh import lsh_labels
from patterndsl.lower import hulls
from patterndsl.lower.hulls import hull_of
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.runtime import chosen
from patterndsl.runtime import program as program_module
from patterndsl.runtime.kernels import work
from patterndsl.runtime.kernels.asked import Asked, Orders, asked_by
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.hashing import hashed
from patterndsl.runtime.kernels.lists import WorkLists
from patterndsl.runtime.kernels.predicate import predicate_of
from patterndsl.runtime.kernels.sorting import order_by_label
from patterndsl.runtime.ordered import Ordered, order_of
from patterndsl.sema.parameters import Sizes
from tests.interpreting import HAS_CUDA, assert_passes_in_the_interpreter, compiles, runs

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


def attended(tensors: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse in float64, where each key counts so often, [B, Hq, Tq, Tk]."""
    query, key, value = (x.double() for x in tensors)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    empty = (counts == 0).all(-1)
    scores = query @ key.mT * query.shape[-1] ** -0.5 + counts.double().log()
    scores = scores.masked_fill(empty[..., None], 0)  # the gradient of the softmax of nothing is NaN
    out = scores.softmax(-1) @ value
    return out.masked_fill(empty[..., None], 0), scores.logsumexp(-1).masked_fill(empty, -torch.inf)


def weighed(out: Tensor, lse: Tensor) -> Tensor:
    """Something that depends on both, differently everywhere."""
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    of_lse = torch.linspace(1, -1, lse.numel(), device=out.device, dtype=torch.float64).view(lse.shape)
    return (out.double() * weight).sum() + (lse.double().masked_fill(lse == -torch.inf, 0) * of_lse).sum()


def assert_close(found: list[Tensor], truth: list[Tensor]) -> None:
    for ours, wanted in zip(found, truth, strict=True):
        finite = wanted.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        scale = wanted[finite].abs().max().clamp_min(1.0)
        assert (ours.double() - wanted)[finite].abs().max() <= TOLERANCE * scale


# ---- one launch after the other


def random_orders(rows: int, heads: int, length: int, places: int) -> Tensor:
    """int32 [rows, heads, places]: all rows, shuffled, and empty places among them."""
    order = torch.rand(rows, heads, places, device=DEVICE).argsort(-1).int()
    return order.masked_fill(order >= length, -1)


def place_of(order: Tensor, length: int) -> Tensor:
    """[rows, heads, length]: where each row stands."""
    places = torch.arange(order.shape[-1], device=DEVICE).expand_as(order)
    found = torch.zeros(*order.shape[:2], length + 1, dtype=torch.int64, device=DEVICE)
    return found.scatter_(-1, order.long().where(order >= 0, length), places)[..., :length]


@runs
@on_cuda
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "rows", "orders", "q_len", "kv_len", "holes"),
    [
        (1, 1, 1, 1, 1, 64, 64, 0),
        (2, 2, 2, 2, 2, 35, 40, 7),
        (1, 4, 2, 1, 4, 45, 30, 3),
        (2, 2, 1, 2, 1, 33, 40, 0),
        (1, 1, 1, 1, 1, 5, 170, 9),
        (1, 1, 1, 1, 1, 170, 5, 9),
    ],
    ids=["one head", "orders of each", "grouped keys", "shared by heads", "rows in parts", "columns in parts"],
)
def test_launches_in_orders(
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    orders: int,
    q_len: int,
    kv_len: int,
    holes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice, in orders of their own: the second launch goes on from the first, and gradients add up."""
    monkeypatch.setattr(work, "SHORTEST", 2)  # so that five blocks are cut
    torch.manual_seed(0)
    rest = (torch.arange(q_len, device=DEVICE)[:, None] + torch.arange(kv_len, device=DEVICE)) % 4 > 0
    size = 8 if max(q_len, kv_len) < 100 else 400
    text = f"labels: {{b: given}}\nattend: chunks(b, {size}, 1) & (q + k) % 4 > 0"
    relation = patterndsl.parse(text).bind(10).relation
    shapes = [(batch, heads, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 16)]
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    number_q, number_k = q_len + holes, kv_len + holes
    sizes, launches = Sizes(number_q, number_k, 0, number_q), list[Asked]()
    counts = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.int64, device=DEVICE)

    def find(q_block: int, kv_block: int) -> tuple[tuple[Tiles]]:
        tiles = find_tiles(hull_of(relation, "b"), sizes, Lookup(), q_block, kv_block)
        return ((replace(tiles, is_full=tiles.is_full & False),),)  # places say not all

    lists = WorkLists(find, [0] * heads, heads // kv_heads, number_k, torch.device(DEVICE))
    for _ in range(2):
        tables = Orders(
            random_orders(rows, orders, q_len, number_q), random_orders(rows, orders, kv_len, number_k), not holes
        )
        launches.append(asked_by(predicate_of(relation, sizes, "b"), sizes, {}, {}, tables))
        q_place, k_place = place_of(tables.query, q_len)[..., None], place_of(tables.key, kv_len)[..., None, :]
        back = q_place // size - k_place // size
        counts += (back >= 0) & (back <= 1) & rest
    query, key, value = (x.detach() for x in tensors)
    out, lse = forward(lists, launches[0], 0.25, query, key, value)
    forward(lists, launches[1], 0.25, query, key, value, (out, lse), goes_on=True)
    leaves = [x.detach().requires_grad_() for x in (out, lse)]
    upstream = torch.autograd.grad(weighed(leaves[0], leaves[1]), leaves)
    results = query, key, value, out, lse, upstream[0], upstream[1]
    grads = gradients(lists, launches[0], 0.25, *results)
    gradients(lists, launches[1], 0.25, *results, grads, adds=(True, True))
    assert (max(q_len, kv_len) > 100) == any(made.num_joints for made in lists._made.values())
    truth = attended(tensors, counts)
    assert_close([out, lse, *grads], [x.detach() for x in (*truth, *torch.autograd.grad(weighed(*truth), tensors))])


# ---- programs

PATTERNS = {
    "one round": ("labels: {b: given}\nattend: causal & chunks(b, 16, 1) & q != k", 1),
    "both ways": ("labels: {b: given}\nattend: chunks(b, 32, 1)", 1),
    "a set of rounds": (
        "labels: {a: given, b: given, c: given}\n"
        "attend: causal & (chunks(a, 16, 1) | chunks(b, 16, 1) | chunks(c, 8, 2))",
        3,
    ),
    "a multiset of rounds": (
        "labels: {a: given, b: given, c: given}\nmerge: multiset\nfallback: q == k\n"
        "attend: causal & q != k & (chunks(a, 16, 1) | chunks(b, 16, 1) | chunks(c, 16, 0))",
        3,
    ),
    "documents, windows and sinks": (
        "labels: {b: given}\ninputs: {doc: 'int[N]'}\n"
        "attend: causal & (chunks(b, 16, 1) | recent(9) | first(4)) & same(doc)",
        1,
    ),
    "equal labels": ("labels: {b: given}\nattend: chunks(b, 16, 1) & same(b)", 1),
    "kinds of heads": (
        "labels: {b: given}\nattend: head % 2 == 0 & chunks(b, 16, 1) | head >= 2 & recent(7) & causal",
        1,
    ),
    "a random part": ("labels: {b: given}\nattend: causal & (chunks(b, 16, 1) | random(2, seed = 3))", 1),
    "empty rows": ("labels: {b: given}\nattend: chunks(b, 8, 0) & k < 20 & q % 3 > 0", 1),
    "another fallback": ("labels: {b: given}\nfallback: first(3)\nattend: chunks(b, 8, 1) & k < 10", 1),
}


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, where there is no GPU, and for few positions."""
    for module in (program_module, chosen):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    monkeypatch.setattr(hulls, "BLOCK", 16)


def inputs_of(pattern: patterndsl.Pattern, n: int, outer: tuple[int, ...]) -> dict[str, Tensor]:
    """Labels of each head, documents of each batch row."""
    found = {}
    for shape in pattern.resolved.inputs:
        is_document = shape.name == "doc"
        size = (*outer[:1], n) if is_document else (*outer, n)
        values = torch.randint(-3, 4, size, device=DEVICE)
        found[shape.name] = values.sort(-1).values if is_document else values
    return found


def everything(program: patterndsl.Program, tensors: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    query, key, value = tensors
    out, lse = program(query, key, value, inputs=inputs, return_lse=True)
    return [x.detach().double() for x in (out, lse, *torch.autograd.grad(weighed(out, lse), tensors))]


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(("text", "rounds"), PATTERNS.values(), ids=PATTERNS)
def test_programs(text: str, rounds: int) -> None:
    """Ragged chunks and tiles, labels of each head, two query heads for each of keys."""
    torch.manual_seed(0)
    pattern = patterndsl.parse(text)
    outer, n, heads = ((2, 2), 35, 2) if "head" not in text else ((2,), 35, 4)
    tensors = [
        torch.randn(2, number, n, 16, device=DEVICE, requires_grad=True) for number in (heads, heads // 2, heads // 2)
    ]
    inputs = inputs_of(pattern, n, outer)
    program = pattern.compile(n, heads=heads, device=DEVICE)
    if "first(3)" not in text:  # a fallback of its own is another program
        ordered = program.ready.by_inputs
        assert isinstance(ordered, Ordered)
        assert len(ordered.ready) >= rounds
    truth = everything(pattern.compile(n, heads=heads, device=DEVICE, backend="oracle"), tensors, inputs)
    assert_close(everything(program, tensors, inputs), truth)


TERMS = st.sampled_from(
    [
        "chunks(a, 8, 1)",
        "chunks(b, 16, 0)",
        "chunks(a, 7, 2) & q != k",
        "q.b.rank - k.b.rank in 0..9",
        "abs(q.a.rank - k.a.rank) <= 5 & same(b)",
        "chunks(a, 16, 1) - chunks(b, 16, 1)",
        "chunks(b, 16, 1) & (q + k) % 3 > 0",
        "recent(6) & same(a)",
        "first(2)",
        "head % 2 == 1 & chunks(b, 8, 1)",
    ]
)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    terms=st.lists(TERMS, min_size=1, max_size=3, unique=True),
    frame=st.sampled_from(["causal & ({})", "({})", "k % 5 > 0 & ({})", "q > 9 & ({})"]),
    merge=st.sampled_from(["set", "multiset"]),
    n=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    of_heads=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_hulls(
    terms: list[str], frame: str, merge: str, n: int, heads: tuple[int, int], of_heads: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    union = frame.format(" | ".join(f"({term})" for term in terms))
    attend = f"{union} | chunks(a, 16, 0) & (q - k == 3 | same(b))"
    text = f"labels: {{a: given, b: given}}\nmerge: {merge}\nfallback: q == k\nattend: {attend}"
    pattern, shapes = patterndsl.parse(text), [(1, number, n, 16) for number in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    inputs = inputs_of(pattern, n, (1, heads[0]) if of_heads else ())
    truth = everything(pattern.compile(n, heads=heads[0], device=DEVICE, backend="oracle"), tensors, inputs)
    assert_close(everything(pattern.compile(n, heads=heads[0], device=DEVICE), tensors, inputs), truth)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_hashing() -> None:
    """Labels that a program finds itself, and the same again from those it returns."""
    torch.manual_seed(0)
    text = "labels: {b: 'lsh(buckets = 6, rounds = 2)'}\nmerge: multiset\nfallback: q == k\n"
    pattern = patterndsl.parse(f"{text}attend: causal & chunks(b, 16, 1) & q != k")
    tensors = [torch.randn(1, heads, 41, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1)]
    program = pattern.compile(41, heads=2, device=DEVICE)
    ordered = program.ready.by_inputs
    assert isinstance(ordered, Ordered)
    assert ordered.labels == {"b#0": 6, "b#1": 6}
    out, labels = program(*tensors, return_labels=True)
    assert labels["b"].dtype == torch.int64
    query, key, value = tensors
    for inputs, dtype in ((None, torch.int16), ({"b": labels["b"].short()}, torch.int64)):  # the former are counted
        assert {x.dtype for x in program.given(query, key, value, inputs).values()} == {dtype}
    truth = everything(pattern.compile(41, heads=2, device=DEVICE, backend="oracle"), tensors, labels)
    assert_close([out.double()], truth[:1])
    assert_close(everything(program, tensors, labels), truth)
    graph = torch.compile(program, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(graph(*tensors).sum(), tensors)
    assert_close([x.double() for x in found], list(torch.autograd.grad(program(*tensors).double().sum(), tensors)))


@runs
@on_cuda
@pytest.mark.parametrize(("buckets", "dim"), [(2, 8), (10, 24), (128, 16), (256, 64), (1018, 16)])
def test_labels_are_those_of_the_plain_twin(buckets: int, dim: int) -> None:
    key = torch.randn(2, 2, 70, dim, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    key[0, 0, 5, 3] = torch.nan
    settings = {"buckets": buckets, "rounds": 2}
    found = hashed(key, **settings, seed=3)
    assert found.dtype == torch.int16
    assert torch.equal(found.long(), lsh_labels(key, **settings, seed=3))
    there = torch.tensor(3, device=DEVICE)  # where directions are then drawn
    assert torch.equal(found, hashed(key, **settings, seed=there))
    assert torch.equal(found.long(), lsh_labels(key, **settings, seed=there))


@runs
@on_cuda
@pytest.mark.parametrize(
    ("batch", "heads", "length", "labels", "dtype"),
    [
        (1, 1, 1, 1, torch.int32),
        (2, 3, 70, 6, torch.int16),
        (1, 2, 1024, 16, torch.int16),
        (2, 1, 1025, 256, torch.int32),
        (1, 1, 4100, 2048, torch.int16),
    ],
)
def test_orders_by_counting_are_those_of_the_plain_twin(
    batch: int, heads: int, length: int, labels: int, dtype: torch.dtype
) -> None:
    """Of one of two rounds, which lie between each other."""
    generator = torch.Generator(DEVICE).manual_seed(length)
    label = torch.randint(0, labels, (batch, heads, 2, length), device=DEVICE, generator=generator).to(dtype)[:, :, 1]
    assert torch.equal(order_by_label(label, labels).order, order_of(label))
    last = torch.full_like(label, labels - 1)  # with which blocks are filled up
    assert torch.equal(order_by_label(last, labels).order, order_of(last))


# ---- all of it in the interpreter


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
