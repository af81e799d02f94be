"""Packed and padded batches as inputs: equal to attention on each sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.diagnostics import InputError
from patterndsl.nn import Attention

LENGTHS = [[5, 0, 9, 3], [17, 1, 1, 1]]
N = 23


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:at]) for at in range(len(lengths) + 1)]


@pytest.mark.parametrize(
    ("attend", "selected"),
    [
        ("causal & same(doc)", ""),
        ("within(doc, recent(3))", ""),
        ("causal & top & same(doc)", "select: {top: 'topk(3, among = causal)'}\n"),
        ("causal & (same(b) | first(2)) & same(doc)", "labels: {b: 'lsh(buckets = 4)'}\n"),
    ],
)
def test_rows_of_different_documents(attend: str, selected: str) -> None:
    """Each document attends itself alone: changing the others changes nothing of it, and its gradient is its own."""
    torch.manual_seed(0)
    pattern = patterndsl.parse(f"inputs: {{doc: 'int[N]'}}\n{selected}attend: {attend}\n")
    layer = Attention(pattern, 16, 2).double().eval()
    x = torch.randn(2, N, 16, dtype=torch.float64, requires_grad=True)
    doc = patterndsl.documents(torch.tensor([starts(row) for row in LENGTHS], dtype=torch.int32), N)
    out = layer(x, inputs={"doc": doc})
    for row, lengths in enumerate(LENGTHS):
        for start, length in zip(starts(lengths), lengths, strict=False):
            here = slice(start, start + length)
            (grad,) = torch.autograd.grad(out[row, here].sum(), x, retain_graph=True)
            outside = grad.clone()
            outside[row, here] = 0
            assert outside.abs().max() == 0
            if length and not selected:
                alone = layer(x[row : row + 1, here], inputs={"doc": torch.zeros(length, dtype=torch.int64)})
                torch.testing.assert_close(alone[0], out[row, here], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["one", "rows"])
def test_documents_are_those_of_a_loop(shape: str) -> None:
    given = [starts(row) for row in LENGTHS]
    found = patterndsl.documents(torch.tensor(given if shape == "rows" else given[0]), N)
    for row, lengths in zip(found if shape == "rows" else found[None], LENGTHS, strict=False):
        expected = [at for at, length in enumerate(lengths) for _ in range(length)]
        assert row.tolist() == expected + [len(lengths)] * (N - len(expected))


@pytest.mark.parametrize("attend", ["causal & k.there", "window(3) & k.there", "causal & chunks(b, 4, 1) & k.there"])
def test_padding_has_no_part(attend: str) -> None:
    torch.manual_seed(0)
    labels = "labels: {b: given}\n" if "b," in attend else ""
    pattern = patterndsl.parse(f"inputs: {{there: 'bool[Nk]'}}\n{labels}attend: {attend}\n")
    lengths = torch.tensor([13, 20, 1])
    there = patterndsl.present(lengths, 20)
    query, key, value = (torch.randn(3, 2, 20, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    # padding sorts behind everything, as a bucket of its own
    label = torch.randint(0, 3, (3, 20)).masked_fill(~there, 9)
    inputs: dict[str, Tensor] = {"there": there} | ({"b": label} if labels else {})
    out = pattern.compile(20, heads=2)(query, key, value, inputs=inputs)
    for row, length in enumerate(lengths.tolist()):
        alone = pattern.compile(length, heads=2)(
            *(x[row : row + 1, :, :length] for x in (query, key, value)),
            inputs={name: x[row : row + 1, :length] for name, x in inputs.items()},
        )
        torch.testing.assert_close(out[row : row + 1, :, :length], alone, rtol=0, atol=1e-12)
    kept = (out * there[:, None, :, None]).sum()
    for grad in torch.autograd.grad(kept, (key, value)):
        assert (grad * ~there[:, None, :, None]).abs().max() == 0


LIBRARY: Any = patterndsl  # called as no type checker would let it be


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: patterndsl.documents(torch.tensor([0.0, 3.0]), 4), "dtype float32"),
        (lambda: patterndsl.documents(torch.tensor([1, 3]), 4), "does not ascend from 0"),
        (lambda: patterndsl.documents(torch.tensor([0, 3, 2]), 4), "does not ascend from 0"),
        (lambda: patterndsl.documents(torch.tensor([0, 3, 5]), 4), "ends at 5, behind the 4 positions"),
        (lambda: patterndsl.documents(torch.tensor([[0, 3, 4], [0, 2, 6]]), 4), "ends at 6, behind the 4 positions"),
        (lambda: LIBRARY.documents([0, 3], 4), "is list"),
        (lambda: patterndsl.documents(torch.zeros(1, 1, 2, dtype=torch.int64), 4), "has shape"),
        (lambda: patterndsl.documents(torch.zeros(0, dtype=torch.int64), 4), "has shape"),
        (lambda: patterndsl.present(torch.tensor([[3]]), 4), "has shape"),
        (lambda: patterndsl.present(torch.tensor([True]), 4), "dtype bool"),
        (lambda: patterndsl.present(torch.tensor([4, 5]), 4), "has 5, of 4 positions"),
        (lambda: patterndsl.present(torch.tensor([0, -1]), 4), "has -1, of 4 positions"),
    ],
)
def test_what_does_not_fit(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()
