"""Chunks in the orders of a call on a CPU, block after block: outputs, lse and gradients are the oracle's."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.ir.relation import EVERYTHING
from patterndsl.learn import lsh
from patterndsl.learn import unit as unit_module
from patterndsl.learn.unit import unit
from patterndsl.runtime import chunk, chunked
from patterndsl.runtime.chunk import lag_of

ROUNDS = 'labels: {b: "lsh(buckets = 16, rounds = 2)"}\n'
SPECS = {
    "rounds, itself last": ROUNDS + "merge: multiset\nfallback: q == k\nattend: causal & chunks(b, 16, 1) & q != k",
    "rounds, each pair once": ROUNDS + "attend: causal & chunks(b, 16, 1)",
    "a window beside": ROUNDS + "attend: causal & chunks(b, 16, 2) & q != k | recent(9)",
    "a multiset with a window": ROUNDS + "merge: multiset\nattend: chunks(b, 16, 1) | recent(9)",
    "odd chunks": 'labels: {b: "lsh(buckets = 16)"}\nattend: chunks(b, 7, 1)',
    "strict": 'labels: {b: "lsh(buckets = 16)"}\nattend: k < q & chunks(b, 16, 1)',
    "heads that differ": 'labels: {b: "lsh(buckets = 16)"}\n'
    "attend: head % 2 == 0 & causal & chunks(b, 16, 1) | head == 1 & causal & chunks(b, 16, 2)",
}


def results(program: patterndsl.Program, tensors: list[Tensor], labels: dict[str, Tensor]) -> list[Tensor]:
    """Output, lse, and gradients of something that depends on both."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = program(*leaves, inputs=labels, scale=0.3, return_lse=True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    of_lse = torch.linspace(1, -1, lse.numel(), dtype=lse.dtype).view(lse.shape)
    total = (out * weight).sum() + (lse.masked_fill(lse == -torch.inf, 0) * of_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(total, leaves)]


@cache
def programs(name: str, n: int) -> tuple[patterndsl.Program, patterndsl.Program]:
    """As planned, and the oracle."""
    pattern = patterndsl.parse(SPECS[name])
    return pattern.compile(n, heads=4), pattern.compile(n, heads=4, backend="oracle")


@pytest.mark.parametrize(  # each pair of values occurs
    ("n", "kv_heads", "dtype"),
    [(640, 4, torch.float32), (640, 2, torch.float64), (697, 4, torch.float64), (697, 2, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("name", SPECS)
def test_they_are_the_oracles(
    name: str, n: int, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "BLOCK_PAIRS", 2000)  # several blocks, and rows are put back in parts
    monkeypatch.setattr(chunk, "ROWS", 100)
    torch.manual_seed(n)
    tensors = [torch.randn(2, heads, n, 8, dtype=dtype) for heads in (4, kv_heads, kv_heads)]
    program, oracle = programs(name, n)
    assert program.who(*tensors) == "chunked"
    labels = program.labels(tensors[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, truth in zip(results(program, tensors, labels), results(oracle, tensors, labels), strict=True):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    pattern = patterndsl.parse(SPECS["rounds, itself last"])
    tensors = [torch.randn(1, 2, 300, 8, dtype=torch.bfloat16) for _ in range(3)]
    program = pattern.compile(300, heads=2)
    assert program.who(*tensors) == "chunked"
    labels = program.labels(tensors[1])
    found, truth = (program(*(x.to(t) for x in tensors), inputs=labels) for t in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(found, truth.to(torch.bfloat16), rtol=0, atol=0)


def test_what_is_not_finite_is_left_to_others() -> None:
    """Keys that are masked must not reach a row."""
    torch.manual_seed(0)
    pattern = patterndsl.parse(SPECS["odd chunks"])
    tensors = [torch.randn(1, 1, 300, 8) for _ in range(3)]
    program, oracle = (pattern.compile(300, backend=backend) for backend in ("auto", "oracle"))
    labels = program.labels(tensors[1])
    assert program.who(*tensors) == "chunked"
    tensors[2][0, 0, 40] = torch.nan
    assert program.who(*tensors) == "gathered"
    found, truth = (each(*tensors, inputs=labels) for each in (program, oracle))
    torch.testing.assert_close(found, truth, equal_nan=True)


def test_a_key_that_only_itself_would_attend_may_be_nan() -> None:
    """A query attends its own key where it has no other, and that of one that has others reaches no gradient."""
    torch.manual_seed(0)
    pattern = patterndsl.parse("labels: {b: given}\nfallback: q == k\nattend: k < q & chunks(b, 16, 1)")
    tensors = [torch.randn(1, 1, 64, 8, dtype=torch.float64) for _ in range(3)]
    labels = {"b": torch.zeros(64, dtype=torch.int64)}
    programs = [pattern.compile(64, backend=backend) for backend in ("auto", "gathered", "oracle")]
    truth = results(programs[2], tensors, labels)
    tensors[1][0, 0, 63] = torch.nan
    for program in programs:
        for found, wanted in zip(results(program, tensors, labels), truth, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "lag"),
    [
        ("causal", 0),
        ("k < q", 1),
        ("causal & q != k", 1),
        ("causal & k < q", 1),
        ("q != k", None),
        ("all", None),
        ("k <= q & recent(3)", None),
    ],
)
def test_a_relation_that_is_a_lag(text: str, lag: int | None) -> None:
    assert lag_of(patterndsl.parse(text).bind(10).relation) == lag
    assert lag_of(EVERYTHING) is None


def test_labels_do_not_depend_on_what_is_projected_together(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    key = torch.randn(2, 3, 700, 16, dtype=torch.float64)
    whole = lsh.lsh_labels(key, buckets=256, rounds=3, seed=1)
    monkeypatch.setattr(lsh, "AT_ONCE", 5000)
    assert torch.equal(lsh.lsh_labels(key, buckets=256, rounds=3, seed=1), whole)
    apart = torch.cat([lsh.lsh_labels(key[:, :, at : at + 1], buckets=256, rounds=3, seed=1) for at in range(5)], -1)
    assert torch.equal(apart, whole[..., :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_unit_keys(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By head, as projections are; one without length, and one that is shorter than what is divided by."""
    monkeypatch.setattr(unit_module, "AT_ONCE", 300)
    torch.manual_seed(0)
    x = torch.randn(2, 70, 3, 16, dtype=dtype).transpose(1, 2)
    x[0, 0, 0], x[1, 1, -1] = 0.0, 1e-14
    grad, x = torch.randn_like(x), x.requires_grad_()
    found = unit(x)
    assert type(found.grad_fn).__name__ == "_UnitBackward"
    truth = torch.nn.functional.normalize(x, dim=-1)
    assert torch.equal(found, truth)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, truth)))
