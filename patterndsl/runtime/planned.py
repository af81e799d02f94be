"""How does a plan run? Pass by pass, each on its positions and heads, their results merged in place.

Passes hold disjoint pairs, so outputs and log-sum-exps merge by the monoid of `runtime.merge`, and each backward pass
starts from the merged result. A row that no pass reaches yields 0 and -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autocast
from torch.autograd import Function
from torch.nn.functional import pad

from patterndsl.diagnostics import input_error
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.geometry import Geometry
from patterndsl.lower.plan import Pass, Plan
from patterndsl.lower.shapes import Sparse
from patterndsl.runtime import gathered
from patterndsl.runtime.data import DeviceData, device_data
from patterndsl.runtime.gathered import BlockLists, block_lists
from patterndsl.runtime.sdpa import DensePass, Launch, add_to_keys, add_to_queries
from patterndsl.runtime.views import Part, grouped, parts, places, split


@dataclass(frozen=True, slots=True, eq=False)
class SparsePass:
    """A block-sparse piece made ready: its tiles on the device, and its relation in local positions."""

    launch: Launch
    lists: BlockLists
    keep: Callable[[Tensor, Tensor], Tensor]

    @staticmethod
    def of(geometry: Geometry, shape: Sparse, device: torch.device) -> SparsePass:
        launch = Launch(geometry.groups, geometry.groups, geometry.q, geometry.k, False)
        data = device_data(shape.relation, 1, {}, device)
        return SparsePass(launch, block_lists(shape.tiles, device), Keep(shape.relation, data))


@dataclass(frozen=True, slots=True)
class Keep:
    """Membership in local positions."""

    relation: Relation
    data: DeviceData

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.as_tensor(member(self.relation, Point(q, k, 0, self.data)), device=q.device)


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPass:
    """A pass made ready for a device."""

    heads: tuple[int, ...]
    work: DensePass | SparsePass


class Planned:
    """A plan made ready for a device; call it with tensors."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.passes = tuple(_ready(item, device) for item in plan.passes)
        self.must_be_finite = any(isinstance(item.work, DensePass) and item.work.is_masked for item in self.passes)

    def takes(self, key: Tensor, value: Tensor) -> bool:
        """Whether masked keys are harmless: a kernel that masks weighs their values with 0, and 0 x NaN is NaN."""
        # a sum is finite only where every summand is; where finite summands overflow, it errs on the careful side
        return not self.must_be_finite or bool(torch.isfinite(key.sum() + value.sum()))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, D] in the inputs' dtype and lse [B, Hq, Tq]; differentiable in both."""
        with autocast(query.device.type, enabled=False):
            out, lse = _Planned.apply(query, key, value, self.passes, scale)  # type: ignore[no-untyped-call]
        return out, lse


def _ready(item: Pass, device: torch.device) -> ReadyPass:
    shape = item.piece.shape
    if isinstance(shape, Sparse):
        return ReadyPass(item.heads, SparsePass.of(item.piece.geometry, shape, device))
    return ReadyPass(item.heads, DensePass(item.piece, device))


class _Planned(Function):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, passes: Sequence[ReadyPass], scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.zeros((*query.shape[:3], value.shape[-1]), dtype=dtype, device=query.device)
        lse = torch.full(query.shape[:3], -torch.inf, dtype=dtype, device=query.device)
        for ready in passes:
            for part in parts(ready.heads, query, key, value):
                tensors = part.of_queries(query), part.of_keys(key), part.of_keys(value)
                into = part.of_queries(out), part.of_queries(lse)
                _forward(ready.work, *tensors, *into, scale)
        return out.to(query.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.passes, ctx.scale = inputs
        ctx.set_materialize_grads(False)  # most callers use no lse, and its gradient costs
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            grad_out = torch.zeros_like(ctx.saved_tensors[3])
        with autocast(grad_out.device.type, enabled=False):
            grads = _Gradients.apply(*ctx.saved_tensors, grad_out, grad_lse, ctx.passes, ctx.scale)  # type: ignore[no-untyped-call]
        return *grads, None, None


class _Gradients(Function):
    """The first derivatives, as a function of its own so that asking for the second ones is understood."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        passes: Sequence[ReadyPass],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = query.shape[-1]
        if grad_lse is not None:
            query, key, value, out, grad_out = _with_lse_gradient(query, key, value, out, grad_out, grad_lse)
        grads = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value))
        merged = _Merged(out, lse.masked_fill(lse == -torch.inf, torch.inf), grad_out.contiguous())
        for ready in passes:
            for part in parts(ready.heads, query, key, value):
                tensors = part.of_queries(query), part.of_keys(key), part.of_keys(value)
                into = part.of_queries(grads[0]), part.of_keys(grads[1]), part.of_keys(grads[2])
                _backward(ready.work, *tensors, merged.of(part), into, scale)
        grad_query, grad_key, grad_value = (grad[..., :head_dim].to(query.dtype) for grad in grads)
        return grad_query, grad_key, grad_value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise input_error("E505", "second derivatives of planned attention", "use backend='oracle', for small sizes")


def _with_lse_gradient(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """query, key, value, out, grad_out with channels more, such that the sum of grad_out * out is less by grad_lse.

    That sum is what kernels subtract from each score's gradient, so the gradient of lse goes in with it. The other
    tensors are 0 in the new channels, and no score changes. Eight channels, as kernels want.
    """
    wide = [pad(x, (0, 8)) for x in (query, key, value, out, grad_out)]
    wide[3][..., -1] = -grad_lse
    wide[4][..., -1] = 1.0
    return tuple(wide)


@dataclass(frozen=True, slots=True, eq=False)
class _Merged:
    """What all passes gave together, and its gradient. lse: +inf where a row is empty."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor

    def of(self, part: Part) -> _Merged:
        return _Merged(part.of_queries(self.out), part.of_queries(self.lse), part.of_queries(self.grad_out))


def _forward(
    work: DensePass | SparsePass, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """Runs a pass and merges its result into out [B, H, Tq, D] and lse [B, H, Tq]."""
    if isinstance(work, DensePass):
        for launch in work.launches:
            _merge(launch, *work.forward(launch, query, key, value, scale), out, lse)
        return
    launch = work.launch
    q = _as_rows(grouped(query, launch.q_groups, launch.q))
    k, v = (_as_rows(grouped(x, launch.k_groups, launch.k)) for x in (key, value))
    part_out, part_lse = gathered.forward(q, k, v, work.lists, work.keep, scale)
    shape = (out.shape[0] * out.shape[1], -1, launch.q.length)
    _merge(launch, part_out.reshape(*shape, out.shape[-1]), part_lse.reshape(shape), out, lse)


def _as_rows(x: Tensor) -> Tensor:
    """[B * H, groups, L, D] to [B * H * groups, 1, L, D]."""
    return x.reshape(-1, 1, *x.shape[2:])


def _merge(launch: Launch, part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges the launch's result into that of all; see `runtime.merge`, which says the same of whole tensors."""
    axes = (*launch.q_groups, *launch.q.axes)
    known, total = places(out, axes, launch.q.start), places(lse, axes, launch.q.start)
    new_out, new_lse = (split(x, out, launch.q_groups, launch.q) for x in (part_out, part_lse))
    # the share of the new part; of two empty rows it is -inf - -inf, and neither has any
    share = torch.sigmoid(new_lse - total).nan_to_num_(0.0)
    known.lerp_(new_out.to(known.dtype), share.unsqueeze(-1))
    torch.logaddexp(total, new_lse, out=total)


def _backward(
    work: DensePass | SparsePass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merged: _Merged,
    into: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Adds the gradients of a pass to those of query, key and value."""
    if isinstance(work, DensePass):
        for launch in work.launches:
            found = work.backward(launch, query, key, value, merged.out, merged.lse, merged.grad_out, scale)
            add_to_queries(into[0], launch, found[0])
            add_to_keys(into[1], launch, found[1])
            add_to_keys(into[2], launch, found[2])
        return
    launch = work.launch
    q, out, grad_out, lse = (
        _as_rows(grouped(x, launch.q_groups, launch.q)) for x in (query, merged.out, merged.grad_out, merged.lse)
    )
    k, v = (_as_rows(grouped(x, launch.k_groups, launch.k)) for x in (key, value))
    delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    found = gathered.backward(q, k, v, grad_out, lse, delta, work.lists, work.keep, scale)
    rows = (query.shape[0] * query.shape[1], -1)
    add_to_queries(into[0], launch, found[0].reshape(*rows, *found[0].shape[2:]))
    add_to_keys(into[1], launch, found[1].reshape(*rows, *found[1].shape[2:]))
    add_to_keys(into[2], launch, found[2].reshape(*rows, *found[2].shape[2:]))
