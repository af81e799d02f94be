"""How do causal sums run inside torch.compile? As one operator, patterndsl::sums, whose length is a symbol.

Their loops over chunks would be written out, a graph for each length. Backward runs the sums again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patterndsl.runtime.operators import gradients_again, in_places, like_wanted, no_second
from patterndsl.score.features import Elementwise
from patterndsl.score.linear import kernel_attention
from patterndsl.score.state import State


def causal_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keep: Tensor | None,
    state: State | None,
    is_log: bool,
    phi: Elementwise,
    decay: Sequence[float] | None,
    normalise: bool,
) -> tuple[Tensor, State]:
    """`kernel_attention`, causal; in a graph of torch.compile one node of it."""
    if not torch.compiler.is_compiling():
        return kernel_attention(
            query,
            key,
            value,
            causal=True,
            keep=keep,
            state=state,
            is_log=is_log,
            phi=phi,
            decay=decay,
            normalise=normalise,
        )
    before = [] if state is None else [state.numerator, state.denominator, state.shift]
    factors = None if decay is None else list(decay)
    out, *after = torch.ops.patterndsl.sums([query, key, value, *before], keep, is_log, phi, factors, normalise)
    return out, State(*after)


_ASKED = "Tensor? keep, bool is_log, str phi, float[]? decay, bool normalise"
_schema = f"(Tensor[] tensors, {_ASKED}) -> (Tensor, Tensor, Tensor, Tensor)"
_backward_schema = f"(Tensor[] tensors, bool[] wanted, Tensor?[] grads, {_ASKED}) -> Tensor[]"


def _run(
    tensors: Sequence[Tensor],
    keep: Tensor | None,
    is_log: bool,
    phi: Elementwise,
    decay: Sequence[float] | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, *before = tensors
    state = State(*before) if before else None
    options: dict[str, Any] = {"is_log": is_log, "phi": phi, "decay": decay, "normalise": normalise}
    out, after = kernel_attention(query, key, value, causal=True, keep=keep, state=state, **options)
    return out, after.numerator, after.denominator, after.shift


@torch.library.custom_op("patterndsl::sums", mutates_args=(), schema=_schema)
def sums(tensors: Sequence[Tensor], *asked: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and state, none of them a view of an argument."""
    with torch.no_grad():
        out, *after = _run(tensors, *asked)
    numerator, denominator, shift = (x.clone() for x in after)
    return out.contiguous(), numerator, denominator, shift


@torch.library.custom_op("patterndsl::sums_backward", mutates_args=(), schema=_backward_schema)
def sums_backward(
    tensors: Sequence[Tensor], wanted: Sequence[bool], grads: Sequence[Tensor | None], *asked: Any
) -> list[Tensor]:
    """Gradients of the wanted tensors."""
    return gradients_again(lambda leaves: _run(leaves, *asked), tensors, wanted, grads)


# ---- what the compiler and autograd know of them


@sums.register_fake
def _(tensors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = tensors[:3]
    dtype = torch.float32
    for x in tensors[:4]:
        dtype = torch.promote_types(dtype, x.dtype)
    shift = key.new_empty((*key.shape[:2], key.shape[3]), dtype=dtype)
    numerator = key.new_empty((*key.shape[:2], key.shape[3], value.shape[3]), dtype=dtype)
    return value.new_empty((*query.shape[:3], value.shape[3])), numerator, torch.empty_like(shift), shift


@sums_backward.register_fake
def _(tensors: Sequence[Tensor], wanted: Sequence[bool], *_: Any) -> list[Tensor]:
    return like_wanted(tensors, wanted)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, keep, *ctx.asked = inputs
    ctx.wanted = [x.requires_grad for x in tensors]
    ctx.has_keep = keep is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])  # no output depends on the shift
    ctx.save_for_backward(*tensors, *([keep] if keep is not None else []))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    keep = saved.pop() if ctx.has_keep else None
    told = torch.ops.patterndsl.sums_backward(saved, ctx.wanted, [*grads[:3], None], keep, *ctx.asked)
    return in_places(told, ctx.wanted), None, *(None,) * len(ctx.asked)


sums.register_autograd(_backward, setup_context=_keep_for_backward)
sums_backward.register_autograd(no_second)
