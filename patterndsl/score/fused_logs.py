"""Causal sums of features that are logarithms, by the kernels of `log_sum_kernels`. Their plain twin is `causal`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from patterndsl.score.fused import MAX_FEATURES, MAX_STATE
from patterndsl.score.log_sum_kernels import (
    asked_log_kernel,
    key_log_kernel,
    query_log_kernel,
    row_log_kernel,
    scan_log_kernel,
    segment_log_kernel,
)
from patterndsl.score.state import State

PROGRAMS = 2048
"""See `fused.PROGRAMS`."""
CHUNK = 16
"""Tokens whose pairs are looked at one by one: the fewest that products of matrices take."""
SCANNED = 16
"""Features that one program of the scan takes."""


def takes(query: Tensor, key: Tensor, value: Tensor, state: State | None) -> bool:
    """Whether there are kernels for these. query: [B, Hq, T, M], key: [B, Hkv, T, M], value: [B, Hkv, T, Dv]."""
    num_features, value_dim = (_padded(x.shape[3]) for x in (key, value))
    return (
        all(x.is_cuda and x.numel() for x in (query, key, value))
        and query.dtype == key.dtype == torch.float32
        and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (state is None or state.numerator.dtype == torch.float32)
        and num_features <= MAX_FEATURES
        and num_features * value_dim <= MAX_STATE
    )


def causal_log_sums(query: Tensor, key: Tensor, value: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Outputs [B, Hq, T, Dv] in the dtype of value, normalised, and the state of all keys and those of `state`.

    query: [B, Hq, T, M] and key [B, Hkv, T, M], logarithms in float32, -inf where a key is absent; value:
    [B, Hkv, T, Dv], of a dtype and width that `takes` allows; T at least 1. Rows without a key are 0 with
    gradient 0. The same bits each time. Differentiable once, also in the state. Work: O(T M (Dv + CHUNK)) for each
    query head, for which keys are copied; memory beyond that: PROGRAMS states.
    """
    again = query.shape[1] // key.shape[1]
    parts = (key, value, *(() if state is None else (state.numerator, state.denominator, state.shift)))
    repeated = [x.repeat_interleave(again, dim=1) for x in parts] if again > 1 else list(parts)
    before = repeated[2:] or [None] * 3
    out, numerator, denominator, shift = _sum(query, *repeated[:2], *before)
    # the query heads of a key head have the same state, and each its share of the gradient
    after = [x[:, ::again] for x in (numerator, denominator, shift)]
    return out, State(after[0], after[1], after[2])


class _States(NamedTuple):
    """Sums, shares and shifts of segments: [B, H, segments, M, Dv], and [B, H, segments, M] twice."""

    sums: Tensor
    shares: Tensor
    shifts: Tensor


class _LogSum(Function):
    """Gradients by kernels that make all states again from those of segments."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        numerator: Tensor | None,
        denominator: Tensor | None,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        launch = _Launch.of(query, value)
        before = launch.empty_states()
        launch.run(segment_log_kernel, (key, value), *before)
        start = (
            None
            if numerator is None or denominator is None or shift is None
            else _States(numerator.contiguous(), denominator.contiguous(), shift.contiguous())
        )
        whole = launch.scanned(before, start, is_backward=False)
        out, norms = value.new_empty((*query.shape[:3], value.shape[3])), launch.of_rows()
        launch.run(row_log_kernel, (query, key, value, out), norms, *before)
        ctx.save_for_backward(query, key, value, out, norms, *before, whole.shifts, None if start is None else shift)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(whole.shifts)
        return out, *whole

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_sums: Tensor | None, grad_shares: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, norms, sums, shares, shifts, shift_after, shift_before = ctx.saved_tensors
        launch = _Launch.of(query, value)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
        deltas = launch.of_rows()
        tensors = (query, key, value, out, grad_out, grad_query)
        launch.run(query_log_kernel, tensors, norms, deltas, sums, shares, shifts)
        asked = launch.empty_states()
        launch.run(asked_log_kernel, (query, grad_out), norms, deltas, *asked)
        start = None
        if grad_sums is not None or grad_shares is not None:
            of_sums = torch.zeros_like(asked.sums[:, :, 0]) if grad_sums is None else grad_sums.contiguous()
            of_shares = torch.zeros_like(asked.shares[:, :, 0]) if grad_shares is None else grad_shares.contiguous()
            start = _States(of_sums, of_shares, -shift_after.clamp(min=torch.finfo(torch.float32).min))
        whole = launch.scanned(asked, start, is_backward=True)
        tensors = (query, key, value, grad_out, grad_key, grad_value)
        launch.run(key_log_kernel, tensors, norms, deltas, *asked)
        if shift_before is None:
            return grad_query, grad_key, grad_value, None, None, None
        factor = (shift_before + whole.shifts).exp()
        return grad_query, grad_key, grad_value, whole.sums * factor[..., None], whole.shares * factor, None


@dataclass(frozen=True, slots=True)
class _Launch:
    """What all kernels of a call have in common. chunks: of a segment."""

    batch: int
    heads: int
    length: int
    dim: int
    value_dim: int
    chunks: int
    num_segments: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, value: Tensor) -> _Launch:
        batch, heads, length, dim = query.shape
        num_chunks = -(-length // CHUNK)
        chunks = max(1, -(-num_chunks * batch * heads // PROGRAMS))
        segments = -(-num_chunks // chunks)
        return cls(batch, heads, length, dim, value.shape[3], chunks, segments, value.dtype, value.device)

    def empty_states(self) -> _States:
        """Room for the state of each segment."""
        shape = (self.batch, self.heads, self.num_segments, self.dim)
        shares = torch.empty(shape, dtype=torch.float32, device=self.device)
        return _States(shares.new_empty((*shape, self.value_dim)), shares, torch.empty_like(shares))

    def of_rows(self) -> Tensor:
        """Room for a number of each row [B, H, T]."""
        return torch.empty((self.batch, self.heads, self.length), dtype=torch.float32, device=self.device)

    def run(self, kernel: Any, tensors: tuple[Tensor, ...], *rest: Tensor) -> None:
        """Launches a kernel; channels of the tensors lie next to each other."""
        padded, value_padded = _padded(self.dim), _padded(self.value_dim)
        kernel[(self.batch * self.heads * self.num_segments,)](
            *tensors,
            *rest,
            *(step for x in tensors for step in x.stride()[:3]),
            self.length,
            self.chunks,
            self.num_segments,
            self.heads,
            dim=self.dim,
            value_dim=self.value_dim,
            padded=padded,
            value_padded=value_padded,
            block=CHUNK,
            precision="tf32x3" if self.dtype != torch.bfloat16 else "tf32",
            num_warps=8 if padded * value_padded > 64 * 64 else 4,
        )

    def scanned(self, states: _States, start: _States | None, *, is_backward: bool) -> _States:
        """Makes of the states of segments, in place, those before each, or behind it; returns that of all."""
        whole = _States(*(torch.empty_like(x[:, :, 0]) for x in states))
        scan_log_kernel[(self.batch * self.heads, triton.cdiv(self.dim, SCANNED))](
            *states, *(whole if start is None else start), *whole, self.num_segments,
            starts=start is not None, is_backward=is_backward, dim=self.dim, value_dim=self.value_dim,
            value_padded=_padded(self.value_dim), block=SCANNED,
        )  # fmt: skip
        return whole


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


# torch declares `apply` without types
_sum: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _LogSum.apply
