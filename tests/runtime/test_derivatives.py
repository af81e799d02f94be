"""Which derivatives are there, and what is said to those that are not?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl import InputError

X = torch.randn(1, 2, 20, 4, dtype=torch.float64)


PATTERN = patterndsl.parse("causal & recent(5) & same(doc)", inputs={"doc": "int[N]"})
INPUTS = {"doc": torch.arange(20) // 9}
BACKENDS = ["auto", "planned", "masked", "gathered"]


def loss(x: Tensor, backend: str) -> Tensor:
    if backend == "planned":
        return patterndsl.attention(x, x, x, "causal & recent(5)", backend=backend).square().sum()
    return patterndsl.attention(x, x, x, PATTERN, inputs=INPUTS, backend=backend).square().sum()


def gradient(x: Tensor, backend: str) -> Tensor:
    return torch.autograd.grad(loss(x, backend), x, create_graph=True)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_is_autograds(backend: str) -> None:
    x = X.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(lambda y: loss(y, backend))(X), gradient(x, backend))


def test_the_oracle_has_second_derivatives() -> None:
    x = X.clone().requires_grad_()
    gradient(x, "oracle").square().sum().backward()
    assert x.grad is not None


Loss: TypeAlias = Callable[[Tensor], Tensor]
ABSENT: dict[str, tuple[str, Callable[[Loss], object]]] = {
    "double backward": ("second derivatives", lambda f: twice(f, X.clone().requires_grad_())),
    "nested func.grad": ("second", lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(X)),
    "vmap": ("torch.vmap", lambda f: torch.func.vmap(f)(X[None])),
    "vmap of grad": ("torch.vmap", lambda f: torch.func.vmap(torch.func.grad(f))(X[None])),
    "jvp": ("forward-mode", lambda f: torch.func.jvp(f, (X,), (X,))),
}


def twice(f: Loss, x: Tensor) -> None:
    torch.autograd.grad(f(x), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("backend", ["auto", "planned"])
@pytest.mark.parametrize("mapped", range(3), ids=["query", "key", "value"])
def test_one_mapped_tensor_is_enough_to_refuse(mapped: int, backend: str) -> None:
    program = patterndsl.parse("causal & recent(8)").compile(32, heads=2, backend=backend)
    plain = torch.randn(1, 2, 32, 8)
    tensors = [plain.expand(3, -1, -1, -1, -1) if at == mapped else plain for at in range(3)]
    dims = tuple(0 if at == mapped else None for at in range(3))
    with pytest.raises(InputError, match=r"(?s)E505.*torch\.vmap.*= help"):
        torch.func.vmap(program, in_dims=dims)(*tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("said", "call"), ABSENT.values(), ids=ABSENT)
def test_what_is_absent_is_said(said: str, call: Callable[[Loss], object], backend: str) -> None:
    with pytest.raises(InputError, match=rf"(?s)E505.*{said}.*= help"):
        call(lambda x: loss(x, backend))
