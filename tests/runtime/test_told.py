"""Tiles told in a call: none is left out that holds a pair, none is full that lacks one, and none waits to be found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

import patterndsl
from patterndsl.ir.relation import NOTHING
from patterndsl.lower.devices import CUDA
from patterndsl.lower.hulls import hulls
from patterndsl.runtime import told

BLOCK = 8
PATTERNS = [
    "causal & same(doc)",
    "recent(20) & same(doc)",
    "q.doc.start <= k & k <= q",
    "same(doc) & q.doc != 3 | first(5)",
    "~same(doc)",
    "abs(q.doc.rank - k.doc.rank) < 9",
    "causal & k.doc < 4",
    "names[q.doc] == names[k.doc]",
]


def by_tile(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a tile has a pair, and whether it is full and whole: bool [rows, tiles, tiles] of a mask [rows, n, n]."""
    n = mask.shape[-1]
    number = -(-n // BLOCK)
    short = number * BLOCK - n
    tiles = pad(mask, (0, short, 0, short)).view(-1, number, BLOCK, number, BLOCK)
    return tiles.any(4).any(2), tiles.all(4).all(2)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(PATTERNS),
    n=st.integers(1, 90),
    rows=st.integers(0, 3),
    is_sorted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tiles_of_inputs(text: str, n: int, rows: int, is_sorted: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    doc = torch.randint(0, 6, (rows, n) if rows else (n,), generator=generator)
    inputs = {"doc": doc.sort(-1).values if is_sorted else doc}
    types = {"doc": "int[N]"}
    if "names" in text:
        inputs["names"], types["names"] = torch.randint(0, 3, (5,), generator=generator), "int[]"
    program = patterndsl.parse(text, inputs=types).compile(n, backend="oracle")
    live, full = told.states(program.bound.relation, program.bound.sizes, inputs, (BLOCK, BLOCK), doc.device)
    holds, is_full = by_tile(program.mask(inputs).reshape(-1, n, n))
    assert not (holds & ~live).any()
    assert not (full & ~is_full).any()
    if "names" not in text and "|" not in text:  # whose values are not in order; which terms only together fill
        assert torch.equal(full & live, is_full)
    lists = told.told(live, full)
    for at, tiles in enumerate((live & ~full, live & full, (live & ~full).mT, (live & full).mT)):
        number, columns = lists[2 * at], lists[2 * at + 1]
        assert columns.is_contiguous()  # kernels read them so
        found = torch.zeros_like(tiles)
        for row, line in (tiles.sum(-1) >= 0).nonzero().tolist():
            found[row, line, columns[row, 0, line, : number[row, 0, line]].long()] = True
        assert torch.equal(found, tiles)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 90),
    sizes=st.sampled_from([(16, 1), (16, 8), (3, 16), (24, 16), (16, 24), (8, 40), (17, 1), (16, 16)]),
    start=st.integers(0, 40),
    beside=st.sampled_from(["", " | recent(7)", " | same(doc)"]),
    seed=st.integers(0, 99),
)
def test_tiles_of_lists(n: int, sizes: tuple[int, int], start: int, beside: str, seed: int) -> None:
    """What a GPU would run: lists and what stands beside them."""
    generator = torch.Generator().manual_seed(seed)
    start, (of, per) = min(start, n - 1), sizes
    text = f"select: {{top: 'given(3, of = blocks({of}), per = blocks({per}))'}}\nattend: causal & (top{beside})\n"
    text = ('inputs: {doc: "int[N]"}\n' if "doc" in beside else "") + text
    program = patterndsl.parse(text).compile(n, q_len=n - start, kv_len=n, q_start=start, backend="oracle")
    (hull,) = hulls(program.bound, CUDA) or ()
    assert hull.lists is not None
    shape = next(shape for shape in program.bound.inputs if shape.selection is not None)
    table = torch.randint(-1, -(-n // of), (2, *(size or 0 for size in shape.inner)), generator=generator)
    inputs = {"doc": torch.randint(0, 4, (2, n), generator=generator)} if "doc" in beside else {}
    mask = program.mask({**inputs, "top": table}).reshape(-1, n - start, n)
    live, full, bits = told._tell_listed(
        hull.lists,
        hull.said[0].rest,
        hull.relation if hull.in_call else NOTHING,
        program.bound.sizes,
        table,
        inputs,
        BLOCK,
    )
    short = (-(n - start) % BLOCK, -n % BLOCK)
    tiles = pad(mask, (0, short[1], 0, short[0])).view(2, -(-(n - start) // BLOCK), BLOCK, -(-n // BLOCK), BLOCK)
    assert not (tiles.any(4).any(2) & ~live).any()
    assert not (full & ~tiles.all(4).all(2)).any()
    rows = torch.arange(table.shape[1])[:, None].expand(table.shape[1:])
    for at in range(2):
        listed = torch.zeros_like(bits[at, :, :-1])
        there = table[at] >= 0
        listed[rows[there], table[at][there]] = True
        assert torch.equal(bits[at, :, :-1], listed)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    bound = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"}).compile(100).bound
    doc = torch.arange(100) // 17
    for mine, theirs in zip(
        told.teller()(bound.relation, bound.sizes, {"doc": doc}, BLOCK),
        told._tell(bound.relation, bound.sizes, {"doc": doc}, BLOCK),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
