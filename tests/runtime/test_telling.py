"""Tiles that a call tells, on generated kernels, against the oracle: in Triton's interpreter, and on a GPU.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.ir.relation import draws_in
from patterndsl.lower import listings as listings_module
from patterndsl.lower.listings import can_tell, listings_of
from patterndsl.runtime import program as program_module
from patterndsl.runtime import telling as telling_module
from patterndsl.runtime.data import checked_inputs
from patterndsl.runtime.kernels import told_lists
from patterndsl.runtime.kernels.told_lists import Extent, States, Turned, work_of_states
from patterndsl.runtime.kernels.work import Work
from patterndsl.runtime.telling import Telling, _Call
from patterndsl.runtime.told import most_live, states
from patterndsl.sema.bind import Bound
from tests.interpreting import HAS_CUDA, assert_passes_in_the_interpreter, compiles, runs
from tests.strategies import Case, cases, many

pytest.importorskip("triton")

DEVICE = "cuda" if HAS_CUDA else "cpu"
N, HEADS = 70, 2
TOLERANCE = 2e-5
"""Of the largest number: float32, and sums in another order."""

on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")

DOC = 'inputs: {doc: "int[N]"}\n'
BLOCKS = "select:\n  top: given(2, of = blocks(16), per = blocks(%s))\n"
PATTERNS = {
    "documents": f"{DOC}attend: causal & same(doc)",
    "documents and a window": f"{DOC}attend: (recent(30) | first(3)) & same(doc)",
    "padding": 'inputs: {there: "bool[N]"}\nattend: causal & k.there | q == k & q % 3 == 0',  # some rows have none
    "tables": f'{DOC[:-2]}, span: "int[]"}}\nattend: abs(q - k) < span[q.doc]',
    "kinds of heads": f"{DOC}attend: head == 0 & causal & same(doc) | head == 1 & q < 40 & recent(9)",
    "blocks": BLOCKS % 32 + "attend: causal & top",
    "blocks of whole tiles": "select: {top: 'given(1, of = blocks(64), per = blocks(64))'}\nattend: causal & top",
    "blocks in tiles": "select: {top: 'given(2, of = blocks(20), per = blocks(24))'}\nattend: top | q == k",
    "blocks by head": BLOCKS % 16 + "attend: head % 2 == 0 & top | recent(7)",
    "blocks and documents": BLOCKS[:-1] % 32 + f"\n{DOC}attend: (causal & top | recent(5)) & same(doc)",
    "what no block lists": BLOCKS % 16 + "attend: recent(40) - top",
}


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """What a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs_of(bound: Bound, *outer: int) -> dict[str, Tensor]:
    """Documents and tables of each batch row; what is selected by each head."""
    torch.manual_seed(3)
    found = dict[str, Tensor]()
    for shape in bound.inputs:
        match shape.name:
            case "top":
                assert shape.selection is not None
                size = (*outer, shape.selection.num_rows, shape.selection.width)
                found["top"] = torch.randint(-2, shape.selection.num_blocks + 2, size)
            case "doc":
                found["doc"] = torch.randint(0, 5, (*outer[:1], N)).sort(-1).values
            case "there":
                found["there"] = torch.rand(*outer[:1], N) < 0.4
            case _:
                found["span"] = torch.arange(5) * 3
    return {name: values.to(DEVICE) for name, values in found.items()}


# ---- lists

Owner: TypeAlias = tuple[int, int, int]
"""A batch row, a head, and a block."""


def lists_in(work: Work, owners: int) -> dict[Owner, list[int]]:
    """The entries of each owner: parts of a list that is cut follow each other, and what has no work leaves its part
    where nobody reads."""
    parts, found = dict[int, list[int]](), dict[Owner, list[int]]()
    cut = dict[Owner, set[int]]()
    for row, head, owner, start, stop, slot in work.pieces.tolist():
        entries = work.entries[start:stop].tolist()
        if work.num_slots and slot == work.num_slots - 1:
            assert not entries
        elif slot < 0:
            assert (row, head, owner) not in found
            found[row, head, owner] = entries
        else:
            assert slot not in parts
            parts[slot] = entries
            cut.setdefault((row, head, owner), set()).add(slot)
    for row, head, owner, slot, number in work.joints.tolist():
        if number:
            assert cut.pop((row, head, owner)) == set(range(slot, slot + number))
            found[row, head, owner] = [entry for turn in range(number) for entry in parts[slot + turn]]
        else:
            assert owner == owners
    assert not cut
    return found


def lists_of(live: Tensor, full: Tensor, heads: int) -> dict[Owner, list[int]]:
    """What they are to be, of states [rows, some, owners, entries]."""
    rows, some, owners, _ = live.shape
    return {
        (row, head, owner): [
            2 * entry + (not full[row, head % some, owner, entry])
            for entry in live[row, head % some, owner].nonzero().flatten().tolist()
        ]
        for row in range(rows)
        for head in range(heads)
        for owner in range(owners)
    }


@pytest.mark.parametrize(("rows", "some", "heads", "batch"), [(1, 1, 3, 2), (2, 1, 3, 2), (2, 3, 3, 2), (1, 1, 1, 1)])
def test_each_live_tile_is_in_one_piece(
    monkeypatch: pytest.MonkeyPatch, rows: int, some: int, heads: int, batch: int
) -> None:
    """Of lists that are made in steps."""
    monkeypatch.setattr(told_lists, "PARTS", 64)
    monkeypatch.setattr(told_lists, "SHORTEST", 2)
    owners, width, num_cut = 7, 69, 0
    for seed in range(30):
        torch.manual_seed(seed)
        live = torch.rand(rows, some, owners, width) < torch.rand(rows, some, owners, 1) ** 3
        full = live & (torch.rand(live.shape) < 0.5)
        most, longest = int(live.sum()) + seed, int(live.sum(-1).max()) + seed % 2
        told = States(live, full, Extent(rows, some, owners, width, most, longest))
        work = work_of_states(told, Turned.by_query(told.extent), heads, batch)
        assert work.is_shared == (rows == 1)
        assert lists_in(work, owners) == lists_of(live, full, heads)
        num_cut += bool(work.joints[:, 4].any())
    assert num_cut


def bound_of(text: str, q_start: int = 0) -> Bound:
    return patterndsl.parse(text).bind(q_len=N - 6, kv_len=N, q_start=q_start, heads=HEADS)


def assert_kernels_tell(
    bound: Bound, given: dict[str, Tensor], blocks: tuple[int, int], batch: int, kv_group: int
) -> tuple[Tensor, Tensor]:
    """What they list is what PyTorch tells, by queries and by keys, in as many pieces as there is room for."""
    telling = Telling(bound, torch.device(DEVICE))
    call = _Call(given)
    told = telling._states(call, blocks)
    for by_key in (False, True):
        extent = told.extent
        turned = Turned.of_keys(extent, kv_group) if by_key else Turned.by_query(extent)
        heads = bound.num_heads // kv_group if by_key else bound.num_heads
        work = telling._work(call, batch, kv_group, blocks, by_key=by_key)
        assert work.is_shared == (extent.rows == 1)
        expected = lists_of(turned.of(told.live), turned.of(told.full), heads // turned.some * turned.some)
        assert lists_in(work, turned.owners) == expected
        assert len(work.entries) == turned.most >= sum(map(len, expected.values())) * turned.some // heads
    return told.live, told.full


ODD = {
    **PATTERNS,
    "reads at other positions": f"{DOC}attend: causal & (same(doc) at (q - 3, k + 5))",
    "reads of blocks": f'{DOC[:-2]}, span: "int[]"}}\nattend: span[q // 16] <= span[k // 7] | span[q - k] == 2',
    "reads at one place": f'{DOC[:-2]}, span: "int[]"}}\nattend: k < span[3] * 4 & k.doc != span[0]',
    "starts": f"{DOC}attend: within(doc, recent(5) | first(2))",
    "ranks": f"{DOC}attend: abs(q.doc.rank - k.doc.rank) < 9",
    "functions": f"{DOC}attend: isqrt(k) == k.doc | log2(q + 1) < k.doc | max(q - k, 7 * k.doc) < min(q, 20)",
    "remainders": f"{DOC}attend: (q - k) % 5 == 0 & q.doc % 3 != k.doc % 2 | (q + k.doc) // 7 == k // 9",
    "large numbers": f"{DOC}attend: q * 100000 * 100000 <= k * 100000 * (99999 + k.doc)",
    "all of them": f"{DOC}attend: k.doc >= -1 | q == 3",
    "neither": f"{DOC}attend: head == 0 & k.doc < 0 & q > k | head == 1 & all",
}


@runs
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    ("blocks", "q_start", "outer"),
    [((16, 16), 0, ()), ((8, 16), 5, (2,)), ((32, 7), 6, (2, HEADS))],
)
def test_kernels_tell_as_steps_do(
    monkeypatch: pytest.MonkeyPatch, text: str, blocks: tuple[int, int], q_start: int, outer: tuple[int, ...]
) -> None:
    """Exactly, whatever a relation asks of inputs, from batch row to batch row and from head to head."""
    monkeypatch.setattr(telling_module, "has_list_kernels", lambda _: True)
    monkeypatch.setattr(told_lists, "PARTS", 16)
    monkeypatch.setattr(told_lists, "SHORTEST", 1)
    bound = bound_of(text, q_start)
    given = checked_inputs(bound, inputs_of(bound, *outer), torch.device(DEVICE))
    assert_kernels_tell(bound, given, blocks, batch=2, kv_group=1 + q_start % 2)


@runs
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("length", [0, 1, 3, 70])
@pytest.mark.parametrize("sizes", [(5, 0), (1, 1), (33, 64)])
def test_kernels_tell_short_inputs(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], length: int) -> None:
    """Tables that end before positions do, and no keys at all."""
    monkeypatch.setattr(telling_module, "has_list_kernels", lambda _: True)
    text = 'inputs: {doc: "int[]"}\nattend: doc[k] > 1 | doc[q] == doc[k - 1]'
    bound = patterndsl.parse(text).bind(q_len=sizes[0], kv_len=sizes[1], heads=HEADS)
    assert_kernels_tell(bound, {"doc": torch.arange(length, device=DEVICE)}, (16, 16), batch=1, kv_group=1)


@runs
@many(0.5)
@given(case=cases(max_length=60), blocks=st.sampled_from([(16, 16), (8, 16), (32, 8)]))
def test_kernels_tell_any_relation(case: Case, blocks: tuple[int, int]) -> None:
    """Of those that can be told."""
    bound = case.bound(case.pattern())
    assume(bound.merge == "set" and listings_of(bound) is not None and not list(draws_in(bound.relation)))
    kinds = {"int": torch.int64, "bool": torch.bool}
    inputs = {of.name: torch.tensor(case.inputs[of.name], dtype=kinds[of.dtype], device=DEVICE) for of in bound.inputs}
    given = checked_inputs(bound, inputs, torch.device(DEVICE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telling_module, "has_list_kernels", lambda _: True)
        patch.setattr(told_lists, "PARTS", 16)
        patch.setattr(told_lists, "SHORTEST", 1)
        assert_kernels_tell(bound, given, blocks, batch=1, kv_group=1)


@many(1)
@given(
    text=st.sampled_from(list(PATTERNS.values())),
    blocks=st.sampled_from([(16, 16), (8, 16), (32, 16), (7, 11), (70, 1)]),
    q_start=st.sampled_from([0, 16, 5]),
)
def test_tiles_hold_what_is_told(text: str, blocks: tuple[int, int], q_start: int) -> None:
    """No pair outside of live tiles, none missing in full ones; exact where blocks of lists are whole tiles."""
    pattern = patterndsl.parse(text)
    program = pattern.compile(N, q_start=q_start, heads=HEADS)
    listings = listings_of(program.bound)
    assert listings is not None
    inputs = inputs_of(program.bound)
    masks = program.mask(inputs).expand(HEADS, -1, -1)
    flat = {name: x.long().flatten() for name, x in inputs.items()}
    for group in program.bound.groups:
        live, full = states(group.relation, program.bound.sizes, flat, blocks, torch.device("cpu"), listings)
        most = most_live(group.relation, program.bound.sizes, blocks, listings)
        assert live.sum((1, 2)).max() <= most.in_all
        assert live.sum(2).max() <= most.in_row
        mask = masks[group.heads[0]]
        short = (-mask.shape[0] % blocks[0], -mask.shape[1] % blocks[1])
        tiles = torch.nn.functional.pad(mask, (0, short[1], 0, short[0]))
        tiles = tiles.view(live.shape[1], blocks[0], live.shape[2], blocks[1])
        assert not (tiles.any(3).any(1) & ~live[0]).any()
        assert not (full[0] & ~tiles.all(3).all(1)).any()
        if text == BLOCKS % 32 + "attend: causal & top" and blocks == (16, 16) and q_start == 0:
            assert torch.equal(tiles.any(3).any(1), live[0])
            assert torch.equal(tiles.all(3).all(1), full[0])


# ---- programs


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, where there is no GPU, cut into few parts."""
    monkeypatch.setattr(program_module, "has_kernels", lambda _: True)
    monkeypatch.setattr(telling_module, "has_list_kernels", lambda _: True)
    monkeypatch.setattr(told_lists, "PARTS", 4)
    monkeypatch.setattr(told_lists, "SHORTEST", 1)


def everything(program: patterndsl.Program, tensors: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    query, key, value = tensors
    out, lse = program(query, key, value, inputs=inputs, return_lse=True)
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    of_lse = torch.linspace(1, -1, lse.numel(), device=DEVICE).view(lse.shape)
    loss = (out.double() * weight).sum() + (lse.double().masked_fill(lse == -torch.inf, 0) * of_lse).sum()
    return [x.detach().double() for x in (out, lse, *torch.autograd.grad(loss, tensors))]


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_programs(text: str) -> None:
    """Batch rows and heads of their own, two query heads for each of keys, ragged tiles."""
    pattern = patterndsl.parse(text)
    program = pattern.compile(N, heads=HEADS, device=DEVICE)
    batch = 2 if text in (PATTERNS["documents"], PATTERNS["blocks"]) else 1
    outer = (batch, HEADS) if "given" in text and "head" not in text else (batch,)
    inputs = inputs_of(program.bound, *outer)
    torch.manual_seed(0)
    tensors = [torch.randn(batch, heads, N, 16, device=DEVICE, requires_grad=True) for heads in (HEADS, 1, 1)]
    assert program.who(*tensors) == "told"
    found = everything(program, tensors, inputs)
    truth = everything(pattern.compile(N, heads=HEADS, device=DEVICE, backend="oracle"), tensors, inputs)
    for mine, true in zip(found, truth, strict=True):
        scale = true[true.isfinite()].abs().max()
        torch.testing.assert_close(mine, true, rtol=0, atol=TOLERANCE * float(scale))
    if text == PATTERNS["documents"]:
        assert all(torch.equal(x, y) for x, y in zip(found, everything(program, tensors, inputs), strict=True))


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_selected_in_the_call() -> None:
    """What a program lists itself, in a graph of torch.compile too."""
    text = "select:\n  top: topk(2, of = blocks(16), per = blocks(16), by = mean, among = causal)\nattend: causal & top"
    pattern = patterndsl.parse(text)
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, N, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    program = pattern.compile(N, heads=2, device=DEVICE)
    out, lists = program(*tensors, return_labels=True)
    truth = pattern.compile(N, heads=2, device=DEVICE, backend="oracle")(*tensors, inputs=lists)
    torch.testing.assert_close(out, truth, rtol=0, atol=TOLERANCE)
    graph = torch.compile(program, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(graph(*tensors).sum(), tensors)
    for mine, expected in zip(found, torch.autograd.grad(program(*tensors).sum(), tensors), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "text",
    [
        "labels: {b: given}\nattend: chunks(b, 8, 1)",
        f"{DOC}attend: same(doc) & random(2)",
        f"{DOC}merge: multiset\nattend: recent(3) & same(doc) | first(2)",
        "select: {top: 'given(2, of = blocks(16), per = blocks(1))'}\nattend: top",
        "recent(3)",
    ],
    ids=["orders", "draws", "multisets", "lists of each query", "no inputs"],
)
def test_what_others_run(text: str) -> None:
    assert not can_tell(patterndsl.parse(text).bind(N))


def test_more_tiles_than_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = patterndsl.parse(PATTERNS["documents"]).bind(300)
    assert can_tell(bound)
    monkeypatch.setattr(listings_module, "MAX_CELLS", 24)
    assert not can_tell(bound)


# ---- all of it in the interpreter


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__, "kernels or programs or selected")
