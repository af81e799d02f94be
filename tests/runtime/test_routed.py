"""Routes whose results are averaged on a CPU, some at a time: outputs and gradients are the oracle's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.runtime import by_rank, routed
from patterndsl.runtime.program import Program

HEADS, ROUTES, WIDTH = 4, 7, 9
SPEC = """
inputs: {{valid: "bool[N]"}}
labels: {{c: kmeans(clusters = 7)}}
select: {{route: "members(c, top = 9)", first: "members(c, top = 1)"}}
merge: mean
attend: {attend}
"""
ATTEND = {
    "causal": "causal & route",
    "every pair": "route",
    "itself last": "causal & route & q != k | first",
    "a mask of a call": "causal & route & q.valid & k.valid",
    "some heads": "head % 2 == 0 & causal & route | head % 2 == 1 & route",
}


def lists_of(n: int, kind: str, rows: int) -> Tensor:
    """int64 [rows, HEADS, ROUTES, WIDTH]: members in order, or in none, some twice, and some that there are not."""
    generator = torch.Generator().manual_seed(n)
    shape = (rows, HEADS, ROUTES, n)
    lists = torch.rand(shape, generator=generator).argsort(-1)[..., :WIDTH]
    if kind == "ascending":
        return lists.sort(-1).values
    lists[..., 3] = lists[..., 5]
    lists[..., ::4, -2:] = -1
    lists[0, 0, 0] = -1
    return lists


def results(program: patterndsl.Program, tensors: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = program(*leaves, inputs=inputs, scale=-0.3)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["ascending", "any"])
@pytest.mark.parametrize("name", ATTEND)
def test_they_are_the_oracles(
    name: str, kind: str, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed, "BLOCK_PAIRS", 250)  # three routes
    monkeypatch.setattr(by_rank, "FEWEST_ROWS", 3)  # in three pieces
    n, rows = 65, 2 if kv_heads == 4 else 1
    torch.manual_seed(n)
    pattern = patterndsl.parse(SPEC.format(attend=ATTEND[name]))
    tensors = [torch.randn(2, heads, n, 8, dtype=dtype) for heads in (HEADS, kv_heads, kv_heads)]
    lists = lists_of(n, kind, rows)
    given = {"route": lists, "first": lists[..., :1], "valid": torch.rand(2, n) > 0.2}
    inputs = {shape.name: given[shape.name] for shape in pattern.bind(n, heads=HEADS).inputs}
    program, oracle = (pattern.compile(n, heads=HEADS, backend=backend) for backend in ("auto", "oracle"))
    assert program.who(*tensors) == "routed"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, truth in zip(results(program, tensors, inputs), results(oracle, tensors, inputs), strict=True):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["causal", "itself last"])
@pytest.mark.parametrize("width", [1, 2, 130, 192])
@pytest.mark.parametrize("factor", [1, 30], ids=["low scores", "high scores"])
def test_long_and_short_routes_are_the_oracles(factor: int, width: int, name: str) -> None:
    """Of the high ones powers as they are would not be numbers; their rounding is higher by as much."""
    torch.manual_seed(width)
    spec = SPEC.replace("top = 9", f"top = {width}").format(attend=ATTEND[name])
    pattern = patterndsl.parse(spec)
    lists = torch.rand(2, 2, ROUTES, 200).argsort(-1)[..., :width].sort(-1).values
    inputs = {"route": lists} | ({"first": lists[..., :1]} if name == "itself last" else {})
    program, oracle = (pattern.compile(200, heads=2, backend=backend) for backend in ("auto", "oracle"))
    tensors = [torch.randn(2, 2, 200, 8, dtype=torch.float64) for _ in range(3)]
    tensors[0] *= factor
    tensors[1] *= factor
    is_high = 0.3 * (tensors[0] @ tensors[1].mT).amax() > 709  # which e is raised to no more
    assert is_high == (factor > 1) and program.who(*tensors) == "routed"
    for found, truth in zip(results(program, tensors, inputs), results(oracle, tensors, inputs), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12 * factor**2)


@pytest.mark.parametrize(
    ("value", "score"), [(1.0, 2.8), (1e33, 2.8), (1.0, -8.0), (1e-28, -4.1)], ids=["plain", "large", "low", "small"]
)
def test_powers_are_taken_as_they_are_where_products_are_numbers(value: float, score: float) -> None:
    """Those of a high score with a large value would be none, of low scores alone they would be 0, as with a small
    value."""
    pattern = patterndsl.parse(SPEC.format(attend="causal & route"))
    program, oracle = (pattern.compile(65, heads=HEADS, backend=backend) for backend in ("auto", "oracle"))
    tensors = [torch.full((1, HEADS, 65, 8), number) for number in (-abs(score), score, value)]
    inputs = {"route": lists_of(65, "ascending", 1)}
    all_found, all_true = results(program, tensors, inputs), results(oracle, tensors, inputs)
    # gradients of queries and keys are 0 but for roundings, of lse, which grow as scores, times keys
    for found, truth, rounding in zip(all_found, all_true, (0, *2 * [4e-6 * abs(score) ** 3], 0), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found / value, truth / value, rtol=1e-5, atol=rounding or 1e-5)


def test_rows_in_no_route_attend_what_a_fallback_says() -> None:
    """The rest is a part of the pattern, which is given lists route by route."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, HEADS, 65, 8, dtype=torch.float64) for _ in range(3)]
    pattern = patterndsl.parse(SPEC.format(attend="causal & route") + "fallback: q == k")
    inputs = {"route": lists_of(65, "any", 2)}
    program, oracle = (pattern.compile(65, heads=HEADS, backend=backend) for backend in ("auto", "oracle"))
    assert program.ready.parts.otherwise is not None
    main, _ = program.ready.parts.otherwise
    assert isinstance(main, Program) and main.who(*tensors) == "routed"
    for found, truth in zip(results(program, tensors, inputs), results(oracle, tensors, inputs), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["ascending", "any", "int32"])
@pytest.mark.parametrize("clusters", [7, 1])
def test_what_is_not_finite_is_left_to_others(kind: str, clusters: int) -> None:
    """Programs of single routes, whose lists the call checked as those of all routes: a value reaches the rows that
    attend it, outputs and gradients."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, HEADS, 65, 8, dtype=torch.float64) for _ in range(3)]
    pattern = patterndsl.parse(SPEC.replace("= 7", f"= {clusters}").format(attend="causal & route"))
    lists = lists_of(65, kind, 2)[:, :, :clusters]
    inputs = {"route": lists.int() if kind == "int32" else lists}
    program, oracle = (pattern.compile(65, heads=HEADS, backend=backend) for backend in ("auto", "oracle"))
    assert program.who(*tensors) == "routed"
    nobody = ~oracle.mask(inputs).any(-2)
    tensors[2][nobody] = torch.nan
    assert nobody.any() and program.who(*tensors) == "parts"
    clean = [*tensors[:2], tensors[2].nan_to_num()]
    for found, truth in zip(results(program, tensors, inputs), results(oracle, clean, inputs), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
