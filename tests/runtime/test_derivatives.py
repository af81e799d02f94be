"""Which derivatives are there, and what is said to those that are not?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl import InputError

X = torch.randn(1, 2, 20, 4, dtype=torch.float64)


def loss(x: Tensor, backend: str = "gathered") -> Tensor:
    return patterndsl.attention(x, x, x, "causal & recent(5)", backend=backend).square().sum()


def gradient(x: Tensor, backend: str = "gathered") -> Tensor:
    return torch.autograd.grad(loss(x, backend), x, create_graph=True)[0]


def test_func_grad_is_autograds() -> None:
    x = X.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(X), gradient(x))


def test_the_oracle_has_second_derivatives() -> None:
    x = X.clone().requires_grad_()
    gradient(x, "oracle").square().sum().backward()
    assert x.grad is not None


ABSENT: dict[str, tuple[str, Callable[[], object]]] = {
    "double backward": ("second derivatives", lambda: gradient(X.clone().requires_grad_()).sum().backward()),
    "nested func.grad": ("second", lambda: torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(X)),
    "vmap": ("torch.vmap", lambda: torch.func.vmap(loss)(X[None])),
    "vmap of grad": ("torch.vmap", lambda: torch.func.vmap(torch.func.grad(loss))(X[None])),
    "jvp": ("forward-mode", lambda: torch.func.jvp(loss, (X,), (X,))),
}


@pytest.mark.parametrize(("said", "call"), ABSENT.values(), ids=ABSENT)
def test_what_is_absent_is_said(said: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=rf"(?s)E505.*{said}.*= help"):
        call()
