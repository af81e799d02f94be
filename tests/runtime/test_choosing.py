"""Blocks that kernels choose, against a loop and the plain twin: in Triton's interpreter, and on a GPU.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
Integers whose products and sums float32 holds leave nothing to rounding: then lists are equal, not nearly so.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.learn import topk
from patterndsl.nn import Attention
from patterndsl.runtime import chosen
from patterndsl.sema.bind import BoundSelection
from tests.compiling import compiling

pytest.importorskip("triton")

from patterndsl.runtime.kernels import choosing
from patterndsl.runtime.kernels.choosing_kernels import choose_kernel
from patterndsl.runtime.kernels.source import function_of
from tests.interpreting import HAS_CUDA, assert_passes_in_the_interpreter, compiles, runs

DEVICE = "cuda" if HAS_CUDA else "cpu"

on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Any:
    """What a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, where there is no GPU."""
    monkeypatch.setattr(chosen, "has_kernels", lambda _: True)


def selection_of(selector: str, n: int, heads: int, start: int = 0) -> BoundSelection:
    bound = patterndsl.parse(f"select: {{top: '{selector}'}}\nattend: top").bind(
        q_len=n - start, kv_len=n, q_start=start, heads=heads
    )
    found = bound.inputs[0].selection
    assert found is not None
    return found


def whole(batch: int, heads: int, length: int, dim: int, seed: int) -> Tensor:
    """Numbers that a mean of up to five of them, or of six, leaves integers."""
    generator = torch.Generator().manual_seed(seed)
    return (60 * torch.randint(-2, 3, (batch, heads, length, dim), generator=generator)).float()


def normal(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, length, dim, generator=torch.Generator().manual_seed(dim)).to(DEVICE, dtype)


def units(x: Tensor, size: int, offset: int) -> list[Tensor]:
    """The rows of each block of x [T, D], the first of which has `offset` rows before these."""
    edges = [max(0, at - offset) for at in range(0, x.shape[0] + offset + size, size)]
    return [x[start:stop] for start, stop in pairwise(edges) if start < x.shape[0]]


def by_hand(query: Tensor, key: Tensor, selection: BoundSelection, q_start: int) -> Tensor:
    """Scores [B, Hq, rows, blocks] of each head, in float64."""
    query, key = query.double().cpu(), key.double().cpu()
    group = query.shape[1] // key.shape[1]
    rows = []
    for head in range(query.shape[1]):
        per_batch = []
        for b in range(query.shape[0]):
            asking = units(query[b, head], selection.per, q_start % selection.per)
            asked = units(key[b, head // group], selection.of, 0)
            scores = torch.empty(len(asking), len(asked), dtype=torch.float64)
            for at, mine in enumerate(asking):
                for block, keys in enumerate(asked):
                    q = mine.mean(0)
                    if selection.by == "max":
                        scores[at, block] = torch.maximum(q * keys.amax(0), q * keys.amin(0)).sum()
                    else:
                        scores[at, block] = q @ keys.mean(0)
            per_batch.append(scores)
        rows.append(torch.stack(per_batch))
    return torch.stack(rows, 1)


def first_of_the_best(scores: Tensor, selection: BoundSelection, among: str, always: str) -> Tensor:
    """The lists of scores [B, H, rows, blocks], by a loop: of equal ones the first block; NaN is the lowest."""
    lists = torch.full((*scores.shape[:3], selection.width), -1)
    for place in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        q, found = place[2] + selection.first_row, dict[int, float]()
        for k, score in enumerate(scores[tuple(place)].tolist()):
            if eval(always, {}, {"q": q, "k": k}):
                found[k] = math.inf
            elif eval(among, {}, {"q": q, "k": k}) and score != -math.inf:
                found[k] = torch.finfo(torch.float32).min if math.isnan(score) else score
        listed = sorted(sorted(found, key=lambda k: (-found[k], k))[: selection.width])
        lists[(*place, slice(selection.width - len(listed), None))] = torch.tensor(listed, dtype=torch.int64)
    return lists


AMONG, ALWAYS = ["True", "k < q", "k <= q // 2", "k % 3 == 1", "False"], ["False", "k == q", "k == 0", "q - k < 3"]


def named(text: str) -> str:
    """A condition of Python's in the language."""
    return {"True": "all", "False": "none"}.get(text, text)


# ---- what is chosen


@runs
@on_cuda
@settings(max_examples=30, deadline=None)
@given(
    of=st.sampled_from([1, 2, 3, 5]),
    per=st.sampled_from([1, 2, 3, 5]),
    top=st.sampled_from([1, 2, 3, 7, 20]),
    by=st.sampled_from(["mean", "max"]),
    sharing=st.sampled_from(["each", "group", "all"]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (2, 2)]),
    among=st.sampled_from(AMONG),
    always=st.sampled_from(ALWAYS),
    n=st.integers(1, 90),
    start=st.integers(0, 40),
    dim=st.sampled_from([3, 4]),
    is_moved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lists_equal_a_loop(
    of: int,
    per: int,
    top: int,
    by: str,
    sharing: str,
    heads: tuple[int, int],
    among: str,
    always: str,
    n: int,
    start: int,
    dim: int,
    is_moved: bool,
    seed: int,
) -> None:
    """Equal scores are many: of these the first blocks are listed. Ragged blocks, tensors in any order in memory."""
    assume((among, always) != ("False", "False"))  # which nothing would ask for
    start = min(start, n - 1)
    selection = selection_of(
        f"topk({top}, of = blocks({of}), per = blocks({per}), by = {by}, heads = {sharing}, among = {named(among)}, "
        f"always = {named(always)})",
        n,
        heads[0],
        start,
    )
    query, key = whole(2, heads[0], n - start, dim, seed), whole(2, heads[1], n, dim, seed + 1)
    scores = by_hand(query, key, selection, start)
    group = heads[0] // heads[1]
    if sharing == "group":
        scores = scores.unflatten(1, (heads[1], group)).sum(2).repeat_interleave(group, 1)
    elif sharing == "all":
        scores = scores.sum(1, keepdim=True)
    query, key = query.to(DEVICE), key.to(DEVICE)
    if is_moved:
        query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
        key = key.transpose(-1, -2).contiguous().transpose(-1, -2)
    found = choosing.topk_lists(query, key, selection, start)
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), first_of_the_best(scores, selection, among, always))


@runs
@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize(
    ("settings", "n", "start", "dim"),
    [
        ("16, of = blocks(16), per = blocks(16), among = k < q, always = k == q", 1500, 0, 64),
        ("3, of = blocks(100), among = k < q // 100, always = k == q // 100", 333, 0, 128),
        ("3, of = blocks(48), per = blocks(96), always = k == 0, heads = group", 500, 101, 80),
        ("64, among = k <= q, heads = all", 200, 0, 40),
        ("5, of = blocks(3), per = blocks(200)", 700, 500, 192),
    ],
)
def test_lists_equal_those_of_the_plain_twin(
    settings: str, n: int, start: int, dim: int, by: str, dtype: torch.dtype
) -> None:
    """Several strips of blocks, tiles of rows and chunks of channels; scores of random numbers are rarely equal."""
    selection = selection_of(f"topk({settings}, by = {by})", n, 4, start)
    query, key = normal(1, 4, n - start, dim, dtype), normal(1, 2, n, dim, dtype)
    found, expected = (lists(query, key, selection, start) for lists in (choosing.topk_lists, topk.topk_lists))
    assert (found != expected).float().mean() <= (2e-3 if HAS_CUDA else 0)


@runs
@on_cuda
@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize(
    ("of", "per", "start", "dim"), [(16, 16, 5, 64), (3, 100, 130, 20), (200, 2, 0, 160), (7, 1, 3, 8)]
)
def test_blocks_are_pooled(of: int, per: int, start: int, dim: int, by: str) -> None:
    """Those that are cut off by the first query, or by the last query or key, too."""
    selection = selection_of(f"topk(1, of = blocks({of}), per = blocks({per}), by = {by})", 330, 2, start)
    query, key = normal(2, 2, 330 - start, dim), normal(2, 1, 330, dim)
    rows, most, least = choosing.pooled_blocks(query, key, selection, start)
    torch.testing.assert_close(rows, topk.pooled(query, per, start % per))
    if by == "mean":
        torch.testing.assert_close(most, topk.pooled(key, of, 0))
    else:
        blocks = key.split(of, 2)
        assert torch.equal(most, torch.stack([x.amax(2) for x in blocks], 2))
        assert torch.equal(least, torch.stack([x.amin(2) for x in blocks], 2))


@runs
@on_cuda
@pytest.mark.parametrize("by", ["mean", "max"])
def test_what_is_no_number(by: str) -> None:
    """Is chosen after all numbers, and before what is no candidate; without bounds as little as with a mean."""
    selection = selection_of(f"topk(3, of = blocks(4), per = blocks(4), among = k < 5, by = {by})", 40, 1)
    query, key = normal(1, 1, 40, 8), normal(1, 1, 40, 8)
    key[:, :, [4, 9, 14]] = torch.nan  # blocks 1, 2 and 3
    found = choosing.topk_lists(query, key, selection, 0)
    assert torch.equal(found, torch.tensor([0, 1, 4], device=DEVICE).expand(1, 1, 10, 3))
    query[:, :, 5] = torch.nan
    found = choosing.topk_lists(query, key, selection, 0)
    assert found[0, 0, 1].tolist() == [0, 1, 2]


@runs
@on_cuda
@pytest.mark.parametrize("top", [3, 33])
@pytest.mark.parametrize("seed", range(3))
def test_lists_of_given_scores(top: int, seed: int) -> None:
    """Of any strides, equal, of either sign, infinite or no numbers."""
    among, always = "k <= q", "k == 2"
    selection = selection_of(f"topk({top}, among = {among}, always = {always}, by = learned)", 150, 1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-9, 10, (2, 1, 130, 150), generator=generator).float() * -0.25
    scores[..., 7], scores[..., 9], scores[..., 11] = torch.inf, -torch.inf, torch.nan
    scores[..., 13], scores[..., 14] = 0.0, -0.0
    scores = scores.to(DEVICE).transpose(-1, -2).contiguous().transpose(-1, -2)
    scores = scores[:, :, 20:]
    expected = first_of_the_best(scores.cpu(), replace(selection, first_row=20), among, always)
    assert torch.equal(choosing.highest(scores, selection, 20).cpu(), expected)


@runs
@on_cuda
def test_random_candidates() -> None:
    """A predicate that looks up what was drawn."""
    selection = selection_of("topk(3, of = blocks(2), per = blocks(2), among = random(5, seed = 1))", 60, 2)
    query, key = normal(1, 2, 60, 8), normal(1, 2, 60, 8)
    found = choosing.topk_lists(query, key, selection, 0)
    assert torch.equal(found.cpu(), topk.topk_lists(query.cpu(), key.cpu(), selection, 0))
    assert (found >= 0).all()


# ---- what is left to the plain twin


@pytest.mark.parametrize(
    ("settings", "n", "dtype"),
    [("65", 90, torch.float32), ("3", 20, torch.float64), ("3, of = blocks(4)", 0, torch.float32)],
    ids=["wide lists", "float64", "no keys"],
)
def test_what_the_plain_twin_lists(settings: str, n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "choose_kernel", None)
    monkeypatch.setattr(choosing, "pick_kernel", None)
    selection = selection_of(f"topk({settings}, among = k < q)", n, 2)
    query, key = normal(1, 2, n, 8, dtype), normal(1, 2, n, 8, dtype)
    found, expected = (lists(query, key, selection, 0) for lists in (choosing.topk_lists, topk.topk_lists))
    assert torch.equal(found, expected)
    scores = query @ key.transpose(-1, -2)
    if n:
        found, expected = (lists(scores.clone(), selection, 0) for lists in (choosing.highest, topk.highest))
        assert torch.equal(found, expected)


@runs
@on_cuda
def test_under_transforms() -> None:
    """torch.func hides what tensors hold, and the plain twin lists."""
    selection = selection_of("topk(2, of = blocks(4), per = blocks(4))", 24, 1)
    query, key = normal(1, 1, 24, 8), normal(1, 1, 24, 8)

    def listed(query: Tensor) -> tuple[Tensor, Tensor]:
        return query.sum(), choosing.topk_lists(query, key, selection, 0)

    _, found = torch.func.grad(listed, has_aux=True)(query)
    assert torch.equal(found, choosing.topk_lists(query, key, selection, 0))


@pytest.mark.cuda
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("per", [1, 64])
def test_in_a_graph_of_cuda(per: int) -> None:
    """Captured, and replayed on other numbers."""
    selection = selection_of(f"topk(5, of = blocks(64), per = blocks({per}))", 2048, 4)
    query, key = normal(1, 4, 2048, 64, torch.bfloat16), normal(1, 2, 2048, 64, torch.bfloat16)
    choosing.topk_lists(query, key, selection, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = choosing.topk_lists(query, key, selection, 0)
    query.copy_(-query.flip(2))
    graph.replay()
    assert torch.equal(captured, choosing.topk_lists(query, key, selection, 0))


# ---- programs and layers


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("start", [0, 13])
def test_programs(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend what is chosen, in a graph of torch.compile too, and give the lists back."""
    selector = "topk(2, of = blocks(8), per = blocks(8), among = k < q, always = k == q)"
    text = f"select: {{top: '{selector}'}}\nattend: causal & top"
    calls = counted(monkeypatch, "topk_lists")
    program = patterndsl.parse(text).compile(50, heads=2, q_len=50 - start, kv_len=50, q_start=start, device=DEVICE)
    query, key, value = (normal(1, heads, length, 16) for heads, length in ((2, 50 - start), (1, 50), (1, 50)))
    out = program(query, key, value)
    again, lists = program(query, key, value, return_labels=True)
    assert calls == 2 * ["topk_lists"]
    assert torch.equal(lists["top"], topk.topk_lists(query, key, selection(program), start))
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(out, program(query, key, value, inputs=lists))
    graph = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(out, graph(query, key, value))


def selection(program: patterndsl.Program) -> BoundSelection:
    found = program.bound.inputs[0].selection
    assert found is not None
    return found


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """A name for each call of a function of `choosing`."""
    function, calls = getattr(choosing, name), list[str]()

    def call(*arguments: Any) -> Tensor:
        calls.append(name)
        found: Tensor = function(*arguments)
        return found

    monkeypatch.setattr(choosing, name, call)
    return calls


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an index learned is chosen by a kernel, some rows at a time; by the plain twin where layers are compiled."""
    monkeypatch.setattr(topk, "MAX_SCORES", 1 << 8)
    calls = counted(monkeypatch, "highest")
    selector = "topk(2, of = blocks(4), by = learned, among = k < q // 4, always = k == q // 4)"
    text = f"select: {{top: '{selector}'}}\nattend: causal & top"
    torch.manual_seed(0)
    layer = Attention(patterndsl.parse(text), 32, 2).to(DEVICE).eval()
    x = normal(1, 1, 40, 32)[:, 0]
    out = layer(x)
    assert len(calls) > 1
    torch.testing.assert_close(out, torch.compile(layer, backend="aot_eager")(x))
    monkeypatch.setattr(chosen, "has_kernels", lambda _: False)
    torch.testing.assert_close(out, layer(x))


# ---- what a compiler would refuse


@compiles
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 128), (torch.bfloat16, 64), (torch.float16, 128)])
@pytest.mark.parametrize(
    "settings",
    [
        "16, of = blocks(64), per = blocks(64), among = k < q, always = k == q",
        "3, of = blocks(512), among = k < q // 512, always = k == q // 512, heads = group",
        "64, of = blocks(16), per = blocks(48), by = max, heads = all, among = random(9, seed = 1)",
        "1, by = max",
    ],
)
def test_kernels_compile(settings: str, dim: int, dtype: torch.dtype) -> None:
    selection = selection_of(f"topk({settings})", 600, 4)
    query, key = (torch.zeros(1, heads, 600, dim, dtype=dtype) for heads in (4, 2))
    with compiling() as found:
        choosing.topk_lists(query, key, selection, 0)
        choosing.highest(query.new_zeros(1, 1, selection.num_rows, selection.num_blocks), selection, 0)
    pools = "of" in settings or "per" in settings
    assert found.compiled == [*(["pool_kernel"] if pools else []), "choose_kernel", "pick_kernel"]


@compiles
def test_two_predicates_of_a_kernel_are_two_functions() -> None:
    """Triton compiles a function once for a name."""
    text = "@triton.jit\ndef keep(q, k, q_place, k_place, head, row, numbers, tables):\n    return k < q\n"
    first, second = (function_of(source) for source in (text, text.replace("<", "==")))
    assert first.__name__ != second.__name__
    selection = selection_of("topk(2, of = blocks(64), per = blocks(64), among = k < q, always = k == q)", 300, 1)
    with compiling():
        choosing.topk_lists(torch.zeros(1, 1, 300, 64), torch.zeros(1, 1, 300, 64), selection, 0)
    found = [kernel.asm["ttgir"] for kernel in choose_kernel.device_caches[-1][0].values()]
    # products would be gone if all candidates were listed before all others
    assert found and all("warp_group_dot" in text for text in found)


# ---- all of it in the interpreter


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
