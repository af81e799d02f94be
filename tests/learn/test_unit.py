"""Unit length by kernels against PyTorch's own, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from patterndsl.learn import unit as module
from patterndsl.learn.unit import unit
from tests.interpreting import HAS_CUDA, IS_INTERPRETED, assert_passes_in_the_interpreter, compiles, runs

pytest.importorskip("triton")

DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_kernels", lambda _: True)


def keys(length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """By head, as projections are; one without length, and one that is shorter than what is divided by."""
    generator = torch.Generator(DEVICE).manual_seed(length)
    x = torch.randn(2, length, 3, dim, device=DEVICE, generator=generator).transpose(1, 2)
    x[0, 0, 0], x[1, 1, -1] = 0.0, 1e-14
    return x.to(dtype).requires_grad_()


@runs
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "dim"), [(1, 16), (70, 24), (129, 64), (33, 200)])
def test_keys_and_their_gradients(length: int, dim: int, dtype: torch.dtype) -> None:
    x = keys(length, dim, dtype)
    grad = torch.randn(x.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1000)).to(dtype)
    wide = x.detach().double().requires_grad_()
    found, expected = unit(x), normalize(wide, dim=-1)
    assert type(found.grad_fn).__name__ == "_UnitBackward"
    assert found.dtype == dtype and found.stride() == x.stride()
    assert torch.equal(found, unit(x.detach()))
    rounding = max(1e-6, torch.finfo(dtype).eps)  # of the result, which the interpreter cuts off
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-7)
    (ours,), (other,) = (torch.autograd.grad(y, leaf, grad.to(y.dtype)) for y, leaf in ((found, x), (expected, wide)))
    is_long = wide.detach().norm(dim=-1) > 1e-6  # of others gradients are beyond what these types hold
    scale = float(other[is_long].abs().max()) if is_long.any() else 1.0
    torch.testing.assert_close(ours.double()[is_long], other[is_long], rtol=4 * rounding, atol=2 * rounding * scale)


@runs
@on_cuda
def test_of_short_keys() -> None:
    """They are divided by no less than 1e-12, in both directions."""
    x = torch.full((1, 1, 2, 16), 1e-14, device=DEVICE).requires_grad_()
    ours, other = (torch.autograd.grad(f(x).sum(), x)[0] for f in (unit, lambda x: normalize(x, dim=-1)))
    torch.testing.assert_close(ours, other)


@runs
@on_cuda
def test_what_is_no_number_stays_so() -> None:
    x = torch.ones(1, 1, 3, 16, device=DEVICE)
    x[..., 0, 3], x[..., 1, 3] = torch.nan, torch.inf
    torch.testing.assert_close(unit(x), normalize(x, dim=-1), equal_nan=True)


@runs
@on_cuda
def test_derivatives_of_derivatives() -> None:
    x, found = torch.randn(1, 2, 5, 16, device=DEVICE, requires_grad=True), list[Tensor]()
    for function in (unit, lambda x: normalize(x, dim=-1)):
        (first,) = torch.autograd.grad(function(x).square()[..., 0].sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3, 4, 16).double(), torch.ones(0, 3, 4, 16), torch.ones(3, 4, 16), torch.ones(1, 1, 2, 300)],
    ids=["float64", "nothing", "no heads", "wide"],
)
def test_what_pytorch_does(x: Tensor) -> None:
    assert not module._takes(x)
    assert torch.equal(unit(x), normalize(x, dim=-1))


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 128, 256])
def test_kernels_compile(dtype: torch.dtype, dim: int) -> None:
    from tests.compiling import compiling

    with compiling() as found:
        unit(torch.ones(1, 2, 70, dim, dtype=dtype, requires_grad=True)).sum().backward()
    assert found.compiled == ["unit_kernel", "unit_gradient_kernel"]


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
