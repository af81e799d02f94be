"""Do generated verdicts compile for a GPU, and with how many launches are tiles told and listed? Asked without one."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patterndsl
from patterndsl.runtime import telling as telling_module
from patterndsl.runtime.telling import Telling, _Call

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

N, HEADS = 2100, 4
DOC = 'inputs: {doc: "int[N]"}\nattend: '
TABLES = 'inputs: {doc: "int[N]", span: "int[]"}\nattend: '
BLOCKS = "select:\n  top: given(%s, of = blocks(%s), per = blocks(%s))\nattend: causal & top"
LISTED = {"_bounds_kernel": 1, "_list_kernel": 1, "_piece_kernel": 1}
CUT = {**LISTED, "_cut_kernel": 1}
PATTERNS = {
    "documents": (DOC + "causal & same(doc)", CUT),
    "padding": ('inputs: {there: "bool[N]"}\nattend: causal & k.there', CUT),
    "blocks of whole tiles": (BLOCKS % (4, 64, 64), {**LISTED, "_lists_kernel": 1}),
    "blocks in tiles": (BLOCKS % (2, 20, 24), {**LISTED, "_lists_kernel": 1}),
    "kinds of heads": (DOC + "head == 0 & recent(99) & same(doc) | head > 0 & q < 40 & k.doc > 3", CUT),
    "other positions": (DOC + "causal & (same(doc) at (q - 3, k + 5))", {**CUT, "_range_kernel": 2}),
    "tables": (TABLES + "span[q // 16] <= k & k < span[3] & recent(70)", {**LISTED, "_range_kernel": 1}),
    "functions": (
        DOC + "recent(9) & (isqrt(k) == k.doc | log2(q + 1) < k.doc | max(q, 7 * k.doc) < min(q, 20))",
        LISTED,
    ),
    "remainders": (
        DOC + "recent(9) & ((q - k) % 5 == 0 & q.doc % 3 != k.doc % 2 | (q + k.doc) // 7 == k // 9)",
        LISTED,
    ),
    "large numbers": (DOC + "recent(9) & q * 100000 * 100000 <= k * 100000 * (99999 + k.doc)", LISTED),
    "all of them or none": (DOC + "head == 0 & recent(9) & k.doc < 0 | head == 1 & first(9)", LISTED),
}


class _Operations(TorchDispatchMode):
    """Those of PyTorch, each of which launches a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("text", "launches"), PATTERNS.values(), ids=PATTERNS)
def test_tiles_are_told_in_a_few_launches(monkeypatch: pytest.MonkeyPatch, text: str, launches: dict[str, int]) -> None:
    from tests.compiling import compiling

    monkeypatch.setattr(telling_module, "has_list_kernels", lambda _: True)
    bound = patterndsl.parse(text).bind(N, heads=HEADS)
    given = dict[str, torch.Tensor]()
    for shape in bound.inputs:
        size = [5 if length is None else length for length in shape.inner]
        given[shape.name] = torch.zeros(2, HEADS, *size, dtype=torch.int64).flatten(2)
    if "top" not in given:  # documents of batch rows, blocks of heads
        given = {name: values[:, 0].contiguous() for name, values in given.items()}
    telling, call = Telling(bound, torch.device("cpu")), _Call(given)
    with compiling() as found:
        telling._work(_Call(given), 2, 2, (64, 64), by_key=False)  # what is found once
        found.compiled.clear()
        with _Operations() as operations:
            telling._work(call, 2, 2, (64, 64), by_key=False)
        assert Counter(found.compiled) == launches
        assert operations.names <= {"empty"}  # which launches nothing
        found.compiled.clear()
        telling._work(call, 2, 2, (64, 64), by_key=True)  # bounds are known
        assert set(found.compiled) <= {"_list_kernel", "_cut_kernel", "_piece_kernel"}
        found.compiled.clear()
        telling._work(call, 2, 2, (32, 64), by_key=True)  # lists and ranges are
        assert set(found.compiled) <= set(CUT)
        assert max(Counter(found.compiled).values()) == 1
