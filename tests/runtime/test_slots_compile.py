"""Do the kernels of slots compile for a GPU, and how many are launched in a call? Asked without one."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patterndsl
from patterndsl.runtime import program as program_module
from patterndsl.runtime.kernels import launch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

N, HEADS = 1024, 4
ROUTES = "labels: {c: kmeans(clusters = 8)}\nselect: {route: 'members(c, top = %d)'}\nmerge: %s\nattend: %s"
BLOCKS = "select:\n  top: topk(3, of = blocks(%d), among = k < q // %d, always = k == q // %d)\nattend: %s"
STAND = {"sort_kernel": 1, "stand_kernel": 1, "fill_kernel": 1, "settle_kernel": 1}
TURN = dict.fromkeys(("item_kernel", "count_kernel", "begin_kernel", "place_kernel", "range_kernel", "tile_kernel"), 1)
ATTEND = {"attend_kernel": 1, "join_kernel": 1}
OF_ROUTES = {"query_kernel": 1, "key_kernel": 1, "add_kernel": 3}
OF_LISTS = {"query_kernel": 1, "add_kernel": 1, "entry_kernel": 1, "column_kernel": 1, "key_kernel": 1, "sum_kernel": 2}
CASES = {
    "a multiset": (ROUTES % (128, "multiset", "causal & route"), 0, {**STAND, **ATTEND}, OF_ROUTES),
    "a mean": (ROUTES % (128, "mean", "causal & route"), 0, {**STAND, **ATTEND}, {**OF_ROUTES, "share_kernel": 1}),
    "a set, ragged": (ROUTES % (100, "set", "causal & route"), 7, {**STAND, **ATTEND, "route_kernel": 1}, OF_ROUTES),
    "with a window": (
        ROUTES % (96, "multiset", "causal & (route | recent(9))"),
        0,
        {**STAND, **ATTEND, "attend_kernel": 2},
        {**OF_ROUTES, "query_kernel": 2, "key_kernel": 2},
    ),
    "blocks": (BLOCKS % (256, 256, 256, "causal & top"), 0, {**TURN, **ATTEND}, OF_LISTS),
    "small blocks": (BLOCKS % (48, 48, 48, "causal & top & q != k"), 16, {**TURN, **ATTEND}, OF_LISTS),
}
LAUNCHING = {"zeros", "cumsum", "zero_"}
"""Operations of PyTorch that launch something; others are of the host."""
QUIET = {"empty", "view", "slice", "unsqueeze", "detach", "select", "alias", "transpose", "as_strided", "ones_like"}


class _Operations(TorchDispatchMode):
    """Those of PyTorch, by how often they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "has_kernels", lambda _: True)
    monkeypatch.setattr(launch, "is_interpreted", lambda: True)


def compiled(text: str, q_start: int) -> patterndsl.Program:
    return patterndsl.parse(text).compile(N, q_start=q_start, heads=HEADS)


def given_to(program: patterndsl.Program) -> dict[str, torch.Tensor]:
    inner = ((shape.name, [size for size in shape.inner if size]) for shape in program.bound.inputs)
    return {name: torch.zeros(1, HEADS, *sizes, dtype=torch.int64) for name, sizes in inner}


def tensors_of(q_start: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    lengths = (HEADS, N - q_start), (kv_heads, N), (kv_heads, N)
    return [torch.zeros(1, heads, length, dim, dtype=dtype, requires_grad=True) for heads, length in lengths]


@pytest.mark.parametrize(("text", "q_start", "forward", "backward"), CASES.values(), ids=CASES)
def test_calls_are_a_few_launches(text: str, q_start: int, forward: dict[str, int], backward: dict[str, int]) -> None:
    from tests.compiling import compiling

    program, tensors = compiled(text, q_start), tensors_of(q_start, HEADS, 64, torch.bfloat16)
    query, key, value = tensors
    inputs = given_to(program)
    with compiling() as found:
        torch.autograd.grad(program(query, key, value, inputs=inputs), tensors, torch.zeros_like(query))  # found once
        found.compiled.clear()
        with _Operations() as operations:
            out = program(query, key, value, inputs=inputs)
        assert Counter(found.compiled) == forward
        assert sum(number for name, number in operations.names.items() if name in LAUNCHING) <= 3
        assert set(operations.names) <= LAUNCHING | QUIET
        found.compiled.clear()
        with _Operations() as operations:
            torch.autograd.grad(out, tensors, torch.zeros_like(out))
        assert Counter(found.compiled) == backward
        assert set(operations.names) <= QUIET | {"zeros_like"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["a mean", "a set, ragged", "blocks", "small blocks"])
def test_kernels_compile(name: str, dim: int, dtype: torch.dtype) -> None:
    """Two query heads for each head of keys, which routes take in turns."""
    from tests.compiling import compiling

    text, q_start, _, backward = CASES[name]
    program, tensors = compiled(text, q_start), tensors_of(q_start, HEADS // 2, dim, dtype)
    query, key, value = tensors
    with compiling() as found:
        out = program(query, key, value, inputs=given_to(program))
        found.compiled.clear()
        torch.autograd.grad(out, tensors, torch.zeros_like(out))
    turns = 2 if name.startswith("a ") else 1
    assert Counter(found.compiled) == {**backward, "key_kernel": turns}
