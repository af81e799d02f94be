"""Does every kernel compile for a GPU? Asked without one: the interpreter runs what the compiler refuses."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import patterndsl
from tests.compiling import compiling

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="they run"),
]
DTYPES = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks at the device is told that there are kernels for it. Numbers are those of memory that nobody wrote."""
    from patterndsl.lower import hulls
    from patterndsl.runtime import chosen, program, telling
    from patterndsl.runtime.kernels import launch, told_lists

    for module in (program, chosen):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    monkeypatch.setattr(hulls, "BLOCK", 16)  # for few positions
    monkeypatch.setattr(launch, "is_interpreted", lambda: True)
    monkeypatch.setattr(telling, "has_list_kernels", lambda _: True)
    monkeypatch.setattr(told_lists, "SHORTEST", 1)  # so that lists are cut


def leaves(n: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> list[Tensor]:
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [torch.ones(1, number, n, width, dtype=dtype, requires_grad=True) for number, width in sizes]


def trained(text: str, n: int, tensors: list[Tensor], **inputs: Tensor) -> None:
    program = patterndsl.parse(text).compile(n, heads=tensors[0].shape[1], backend="auto" if inputs else "triton")
    out, lse = program(*tensors, inputs=inputs or None, return_lse=True)
    torch.autograd.grad(out.sum() + lse.sum(), tensors)


def tiles(dtype: torch.dtype) -> None:
    """Long rows and long columns, which are cut, and pairs that are looked up."""
    trained("window(64) | global(4) | random(3)", 2600, leaves(2600, 2, 1, 64, 64, dtype))


def odd_widths(dtype: torch.dtype) -> None:
    trained("causal & dilated(9, 4) | abs(q - k) % 5 == head", 300, leaves(300, 2, 2, 40, 24, dtype))


def hashed(dtype: torch.dtype) -> None:
    """In orders of a call, with a fallback."""
    labels = "labels: {b: 'lsh(buckets = 8, rounds = 2)'}\nmerge: multiset\nfallback: q == k\n"
    tensors = leaves(256, 2, 2, 64, 64, dtype)
    program = patterndsl.parse(f"{labels}attend: causal & chunks(b, 16, 1) & q != k").compile(256, heads=2)
    torch.autograd.grad(program(*tensors).sum(), tensors)


def told(dtype: torch.dtype) -> None:
    text = 'inputs: {doc: "int[N]"}\nattend: causal & same(doc) | first(3)'
    trained(text, 700, leaves(700, 2, 1, 64, 64, dtype), doc=torch.arange(700) // 100)


def decoded(dtype: torch.dtype) -> None:
    """In several tiles and one, of several pages and one; of many splits, programs merge some channels each."""
    sinks, stride = "recent(300) | causal & first(4)", "causal & (recent(9) | strided(64))"
    for text, length, page, value_dim in (
        (sinks, 700, 64, 32),
        (sinks, 700, 16, 32),
        (stride, 150, 64, 32),
        ("recent(4096) | causal & first(4)", 5000, 64, 128),
    ):
        query, key, value = (x.detach() for x in leaves(length, 4, 2, 64, value_dim, dtype))
        cache = patterndsl.Cache(
            text,
            batch=1,
            heads=4,
            kv_heads=2,
            head_dim=64,
            value_dim=value_dim,
            page=page,
            dtype=dtype,
            backend="triton",
        )
        cache.append(key, value)
        cache.attend(query[:, :, -1:])


def drawn(dtype: torch.dtype) -> None:
    from patterndsl.runtime.kernels import keys

    query, key, value = (x.detach().flatten(0, 1) for x in leaves(100, 2, 2, 40, 24, dtype))
    table, starts, queries = (torch.zeros(size, dtype=torch.int32) for size in ((3, 100), (101,), (300,)))
    out, lse = keys.attend(query, key, value, table, 0.1)
    keys.gradients(query, key, value, out, lse, out, table, starts, queries, 0.1)


def rows(dtype: torch.dtype) -> None:
    from patterndsl.runtime.row_kernels import add_rows, merge_rows, share_rows

    out, lse = torch.ones(2, 3, 4, 5, 24, dtype=dtype), torch.ones(2, 3, 4, 5)
    merge_rows(out, lse, out.clone(), lse.clone(), 1)
    share_rows(out, lse, out, lse, out, out.clone(), lse.clone())
    add_rows(out, out.clone(), 1)


def sums(dtype: torch.dtype) -> None:
    from patterndsl.score import fused, fused_logs

    query, key, value = tensors = leaves(300, 2, 1, 32, 24, dtype)
    for each in (fused.Sums("elu", "elu", True, None), fused.Sums("linear", "linear", False, torch.zeros(2))):
        out, state = fused.causal_sums(query, key, value, None, each)
        torch.autograd.grad(out.sum() + state.numerator.sum(), tensors)
    out, state = fused_logs.causal_log_sums(query.float(), key.float(), value, None)
    torch.autograd.grad(out.sum() + state.numerator.sum(), tensors)


SUMS = ("kernel", "log_kernel")
KERNELS: dict[Callable[[torch.dtype], None], set[str]] = {
    tiles: {"attend_kernel", "merge_kernel", "query_kernel", "key_kernel", "sum_kernel"},
    odd_widths: {"attend_kernel", "query_kernel", "key_kernel"},
    hashed: {
        *("hash_kernel", "count_kernel", "begin_kernel", "place_kernel", "attend_kernel", "attend_own_kernel"),
        *("query_kernel", "key_kernel", "own_gradients_kernel"),
    },
    told: {"_list_kernel", "_piece_kernel", "attend_kernel", "query_kernel", "key_kernel", "sum_kernel"},
    decoded: {"decode_kernel", "merge_splits_kernel"},
    drawn: {"_attend_kernel", "_query_kernel", "_key_kernel"},
    rows: {"_merge_kernel", "_share_kernel", "_add_kernel"},
    sums: {f"{what}_{kind}" for what in ("asked", "query", "key", "row", "scan", "segment") for kind in SUMS},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use", KERNELS, ids=lambda use: str(use.__name__))
def test_compiles(use: Callable[[torch.dtype], None], dtype: torch.dtype) -> None:
    with compiling() as compiler:
        use(dtype)
    assert set(compiler.compiled) >= KERNELS[use]
