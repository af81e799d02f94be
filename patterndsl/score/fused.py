"""Which causal sums run by kernels of our own, and how are these launched? Their plain twin is `causal`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from patterndsl.score.features import Elementwise
from patterndsl.score.state import State
from patterndsl.score.sum_kernels import asked_kernel, key_kernel, query_kernel, row_kernel, scan_kernel, segment_kernel

PROGRAMS = 2048
"""Segments of all heads together, about as many: several times what runs at once, so that none waits long for the
last, and few enough that their states are little beside the tensors."""
MAX_STATE = 128 * 128
MAX_FEATURES = 256
"""Features, and features times channels, of a state that registers hold."""
SMALL_STATE = 64 * 64
WARPS = {"segment_kernel": 4, "row_kernel": 4, "query_kernel": 4, "asked_kernel": 4, "key_kernel": 4}
"""Of a kernel with a small state; a larger one takes 8. Chunks are then loaded one ahead, in bfloat16."""
SCANNED = 512
"""Numbers of a state that one program of the scan takes: at least MAX_FEATURES."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What is summed. phi, key_phi: what is still made of queries and of keys. log_decay: float32 [Hkv] or None; see
    `causal.Summing`."""

    phi: Elementwise
    key_phi: Elementwise
    normalise: bool
    log_decay: Tensor | None = None


def takes(query: Tensor, key: Tensor, value: Tensor, state: State | None) -> bool:
    """Whether there are kernels for these. query: [B, Hq, T, M], key: [B, Hkv, T, M], value: [B, Hkv, T, Dv]."""
    tensors = (query, key, value)
    num_features, value_dim = (_padded(x.shape[3]) for x in (key, value))
    return (
        all(x.is_cuda and x.dtype == value.dtype and x.numel() for x in tensors)
        and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (state is None or state.numerator.dtype == torch.float32)
        and num_features <= MAX_FEATURES
        and num_features * value_dim <= MAX_STATE
    )


def causal_sums(query: Tensor, key: Tensor, value: Tensor, state: State | None, sums: Sums) -> tuple[Tensor, State]:
    """Outputs [B, Hq, T, Dv] in the dtype of value, and the state of all keys and those of `state`, in float32.

    query: [B, Hq, T, M], key: [B, Hkv, T, M], value: [B, Hkv, T, Dv], of one dtype that `takes` allows; T at least 1.
    Features must be finite; a row whose weights sum to 0 is 0 with gradient 0, where they are normalised. The same bits
    each time. Differentiable once, also in the state. Work: O(T M Dv) for each head, in three launches, and four in the
    backward pass; memory beyond the tensors: PROGRAMS states.
    """
    numerator, denominator = (None, None) if state is None else (state.numerator, state.denominator)
    out, after, weights = _sum(query, key, value, numerator, denominator, sums)
    return out, State(after, weights, torch.zeros_like(weights))


class _Sum(Function):
    """Gradients by kernels that make all states again from those of segments."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        numerator: Tensor | None,
        denominator: Tensor | None,
        sums: Sums,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        launch = _Launch.of(query, key, value, sums)
        states, shares = launch.empty_states()
        launch.run(
            segment_kernel, launch.kv_programs,
            key, value, states, shares, launch.rates, *_strides(key, value), *launch.lengths, launch.kv_heads,
            phi=sums.key_phi,
        )  # fmt: skip
        whole, whole_share = launch.scanned(states, shares, numerator, denominator, is_backward=False)
        out = _like(query, value.shape[3])
        totals = launch.of_rows() if sums.normalise else states
        launch.run(
            row_kernel, launch.programs,
            query, key, value, out, totals, states, shares, launch.rates, *_strides(query, key, value, out),
            *launch.lengths, launch.heads, launch.kv_group,
            phi=sums.phi, key_phi=sums.key_phi, normalise=sums.normalise,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, out if sums.normalise else None, totals, states, shares)
        ctx.sums, ctx.has_state = sums, numerator is not None
        ctx.set_materialize_grads(False)
        return out, whole, whole_share

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_whole: Tensor | None, grad_share: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, totals, states, shares = ctx.saved_tensors
        sums: Sums = ctx.sums
        launch = _Launch.of(query, key, value, sums)
        out = query if out is None else out  # not read
        if grad_out is None:
            grad_out = query.new_zeros((*query.shape[:3], value.shape[3]))
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        grad_query, grad_key, grad_value = (_like(x, x.shape[3]) for x in (query, key, value))
        deltas = launch.of_rows() if sums.normalise else states
        launch.run(
            query_kernel, launch.programs,
            query, key, value, out, grad_out, grad_query, totals, deltas, states, shares, launch.rates,
            *_strides(query, key, value, out, grad_out, grad_query), *launch.lengths, launch.heads, launch.kv_group,
            phi=sums.phi, key_phi=sums.key_phi, normalise=sums.normalise,
        )  # fmt: skip
        asked, asked_share = launch.empty_states()
        launch.run(
            asked_kernel, launch.kv_programs,
            query, grad_out, totals, deltas, asked, asked_share, launch.rates, *_strides(query, grad_out),
            *launch.lengths, launch.kv_heads, launch.kv_group,
            phi=sums.phi, normalise=sums.normalise,
        )  # fmt: skip
        of_state = launch.scanned(asked, asked_share, grad_whole, grad_share, is_backward=True)
        launch.run(
            key_kernel, launch.kv_programs,
            query, key, value, grad_out, grad_key, grad_value, totals, deltas, asked, asked_share, launch.rates,
            *_strides(query, key, value, grad_out, grad_key, grad_value),
            *launch.lengths, launch.kv_heads, launch.kv_group,
            phi=sums.phi, key_phi=sums.key_phi, normalise=sums.normalise,
        )  # fmt: skip
        return grad_query, grad_key, grad_value, *(of_state if ctx.has_state else (None, None)), None


@dataclass(frozen=True, slots=True)
class _Launch:
    """What all kernels of a call have in common. chunks: of a segment; block: tokens of a chunk."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    value_dim: int
    block: int
    chunks: int
    num_segments: int
    dtype: torch.dtype
    rates: Tensor
    decays: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, sums: Sums) -> _Launch:
        batch, heads, length, dim = query.shape
        kv_heads, value_dim = key.shape[1], value.shape[3]
        block = 32 if query.dtype == torch.float32 else 64
        num_chunks = -(-length // block)
        chunks = max(1, -(-num_chunks * batch * kv_heads // PROGRAMS))
        rates = key if sums.log_decay is None else sums.log_decay  # not read where nothing decays
        return cls(
            batch,
            heads,
            kv_heads,
            length,
            dim,
            value_dim,
            block,
            chunks,
            -(-num_chunks // chunks),
            query.dtype,
            rates,
            sums.log_decay is not None,
        )

    @property
    def kv_group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def programs(self) -> int:
        return self.batch * self.heads * self.num_segments

    @property
    def kv_programs(self) -> int:
        return self.batch * self.kv_heads * self.num_segments

    @property
    def lengths(self) -> tuple[int, int, int]:
        return self.length, self.chunks, self.num_segments

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """Room for the sums [B, Hkv, segments, M, Dv] and [B, Hkv, segments, M] of each segment."""
        shape = (self.batch, self.kv_heads, self.num_segments, self.dim)
        made = torch.empty((*shape, self.value_dim), dtype=torch.float32, device=self.rates.device)
        return made, made.new_empty(shape)

    def of_rows(self) -> Tensor:
        """Room for a number of each row [B, Hq, T]."""
        shape = (self.batch, self.heads, self.length)
        return torch.empty(shape, dtype=torch.float32, device=self.rates.device)

    def run(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launches a kernel with what it is compiled for."""
        padded, value_padded = _padded(self.dim), _padded(self.value_dim)
        is_small = padded * value_padded <= SMALL_STATE
        kernel[(programs,)](
            *arguments,
            decays=self.decays,
            dim=self.dim,
            value_dim=self.value_dim,
            padded=padded,
            value_padded=value_padded,
            block=self.block,
            mm=tl.bfloat16 if self.dtype == torch.bfloat16 else tl.float32,
            # the digits of float32, where they fit shared memory
            precision="tf32x3" if is_small or self.dtype == torch.float32 else "tf32",
            stages=2 if self.dtype == torch.bfloat16 and is_small else 1,
            num_warps=WARPS[kernel.__name__] if is_small else 8,
            **constants,
        )

    def scanned(
        self,
        states: Tensor,
        shares: Tensor,
        start: Tensor | None,
        start_share: Tensor | None,
        *,
        is_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        """Makes of the sums of segments, in place, those before each, or behind it; returns those of all."""
        whole, whole_share = (torch.empty_like(x[:, :, 0]) for x in (states, shares))
        starts = start is not None or start_share is not None
        first, first_share = (
            (torch.zeros_like(x) if starts else x) if given is None else given.contiguous()
            for given, x in ((start, whole), (start_share, whole_share))
        )
        blocks = -(-self.dim * self.value_dim // SCANNED)
        scan_kernel[(self.batch * self.kv_heads, blocks + 1)](
            states, shares, first, first_share, whole, whole_share, self.rates,
            self.length, self.chunks * self.block, self.num_segments, self.kv_heads,
            decays=self.decays, starts=starts, is_backward=is_backward, state_size=self.dim * self.value_dim,
            share_size=self.dim, blocks=blocks, block=SCANNED,
        )  # fmt: skip
        return whole, whole_share


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch rows, heads and rows; channels lie next to each other."""
    return [step for x in tensors for step in x.stride()[:3]]


def _like(x: Tensor, width: int) -> Tensor:
    """Room for [B, H, T, width], heads and rows in the order that x has."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, width)).transpose(1, 2)
    return x.new_empty((batch, heads, length, width))


# torch declares `apply` without types
_sum: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Sum.apply
