"""What do operators have in common that no compiler looks into? How they are given inputs, and gradients by running
again.

An operator takes lists of tensors, and texts: so inputs go in as a list beside their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.runtime import flex


def apart(given: Mapping[str, Tensor] | None) -> tuple[list[Tensor], str]:
    """Inputs as an operator takes them: the tensors, and their names."""
    names = sorted(given or {})
    return [given[name] for name in names] if given else [], ",".join(names)


def by_name(tensors: Sequence[Tensor], names: str) -> dict[str, Tensor] | None:
    """The inputs that `apart` took apart; None for none."""
    return dict(zip(names.split(","), tensors, strict=True)) if names else None


def gradients_again(
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """Gradients of the wanted tensors, 0 of what has no part in the results: PyTorch records what runs once more.

    grads: of each result, None where nobody asks.
    """
    with flex.with_derivatives():
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(tensors, wanted, strict=True)]
        results = zip(run(leaves), grads, strict=True)
        given = [(x, grad) for x, grad in results if grad is not None and x.requires_grad]
        asked_of = [x for x in leaves if x.requires_grad]
        found = torch.autograd.grad(
            [x for x, _ in given], asked_of, [grad for _, grad in given], allow_unused=True, materialize_grads=True
        )
    return [grad.contiguous() for grad in found]


def like_wanted(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """What `gradients_again` returns, without values, for the compiler."""
    return [x.new_empty(x.shape) for x, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]


def in_places(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the wanted tensors where these stand among all."""
    left = iter(found)
    return [next(left) if is_wanted else None for is_wanted in wanted]


def no_second(ctx: Any, *_: Any) -> Any:
    """The derivative of gradients that are computed so. Raises InputError (E505)."""
    raise input_error("E505", "second derivatives of compiled attention", "leave torch.compile out")
