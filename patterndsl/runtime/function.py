"""What is one call? A Run, which knows its own gradients and joins autograd as one function; or what PyTorch records.

Where gradients are differentiated, they are a function of their own, so that asking for second ones is understood and
refused. The form with `setup_context` is what torch.func needs, and takes PyTorch longer: it is for torch.func alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor, autocast
from torch.autograd import Function, forward_ad

from patterndsl.diagnostics import input_error
from patterndsl.runtime.arguments import is_autocast_on
from patterndsl.runtime.derivatives import no_forward_mode, no_second_derivatives, no_vmap


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What is attended in one call, and how. backend: its name, where derivatives are refused.

    forward: output [B, Hq, Tq, Dv] and lse [B, Hq, Tq] of query, key and value, without a graph. gradients: those of
    query, key and value, from these, output and lse, and the gradients of the latter; None where lse has none. What
    `forward` may keep for them they find again where it did not run: in a graph, backward is a call of its own.
    """

    backend: str
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """The same by operations that PyTorch records and differentiates. forward: lse may be None where nobody asked."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


Attending: TypeAlias = Run | Recorded
"""One call, made ready."""


class Attends(Protocol):
    """What makes calls ready: a `Program`, to those who are below it."""

    def attending(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: dict[str, Tensor],
        scale: float,
        *,
        train: bool,
        want_lse: bool,
    ) -> Attending:
        """A call with checked tensors and inputs. train: whether a backward pass follows."""
        ...


def with_unchanged(given: Mapping[str, Tensor], made: Attending) -> Attending:
    """The same, whose gradients refuse inputs that were written to meanwhile, as PyTorch does of what it saves."""
    if isinstance(made, Recorded):
        return made
    before = [(name, x, x._version) for name, x in given.items() if not x.is_inference()]

    def gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        for name, x, version in before:
            if x._version != version:
                message = f"input `{name.partition('#')[0]}` was written to before its backward pass"
                raise input_error("E502", message, "write to it afterwards, or give a clone")
        return made.gradients(*arguments)

    return replace(made, gradients=gradients)


@overload
def attended(query: Tensor, key: Tensor, value: Tensor, run: Run) -> tuple[Tensor, Tensor]: ...


@overload
def attended(query: Tensor, key: Tensor, value: Tensor, run: Attending) -> tuple[Tensor, Tensor | None]: ...


def attended(query: Tensor, key: Tensor, value: Tensor, run: Attending) -> tuple[Tensor, Tensor | None]:
    """Output and lse of a call, differentiable in both, once where it is a Run. What that computes in float32 stays so
    under autocast."""
    if isinstance(run, Recorded):
        return run.forward(query, key, value)
    if is_autocast_on(query.device.type):
        with autocast(query.device.type, enabled=False):
            return attended(query, key, value, run)
    if _is_transformed():
        return _attend_transformed(query, key, value, run)
    if _is_watched(query, key, value):
        return _attend(query, key, value, run)
    return run.forward(query, key, value)


_is_transformed: Callable[[], bool] = cast("Any", torch._C)._are_functorch_transforms_active
"""Whether torch.func is at work."""


def _is_watched(*tensors: Tensor) -> bool:
    """Whether anybody asks for derivatives, in whatever mode. To be a function of autograd takes as long as a small
    kernel."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Entering autocast costs as much as a small kernel, so that is done only where there is one to leave."""
    return autocast(kind, enabled=False) if is_autocast_on(kind) else nullcontext()


class _Attend(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        results = run.forward(query, key, value)
        _keep(ctx, (query, key, value), run, results)
        return results

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grad_out = torch.zeros_like(tensors[3]) if grad_out is None else grad_out
        differentiate = _differentiate if torch.is_grad_enabled() or _is_transformed() else _gradients
        with without_autocast(grad_out.device.type):  # backward() may be called where autocast is on
            grads = differentiate(*tensors, grad_out, grad_lse, ctx.run)
        return *grads, None

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise no_vmap()

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise no_forward_mode(ctx.run.backend)


def _keep(ctx: Any, tensors: tuple[Tensor, ...], run: Run, results: tuple[Tensor, Tensor]) -> None:
    ctx.run = run
    ctx.set_materialize_grads(False)  # most callers use no lse, and its gradient costs
    ctx.save_for_backward(*tensors, *results)


class _AttendTransformed(Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        return run.forward(query, key, value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, run = inputs
        _keep(ctx, tuple(tensors), run, output)

    backward = staticmethod(_Attend.backward)
    vmap = staticmethod(_Attend.vmap)
    jvp = staticmethod(_Attend.jvp)


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, run = arguments
    return cast("Run", run).gradients(*tensors)


class _Differentiate(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _gradients(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[-1].backend

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise no_second_derivatives(ctx.backend)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise no_vmap()


# torch declares `apply` without types
_attend: Callable[..., tuple[Tensor, Tensor]] = _Attend.apply
_attend_transformed: Callable[..., tuple[Tensor, Tensor]] = _AttendTransformed.apply
_differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Differentiate.apply
