"""What does a program cost here, and dense attention beside it? Seconds and memory of a call.

It prints nothing and decides nothing: what is measured is returned.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.analysis.verdict import Proven
from patterndsl.diagnostics import InputError
from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import Compare, Everything
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.heads import for_each_query_head
from patterndsl.runtime.measure import timed
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Tensors
from patterndsl.runtime.trial import attend_of

TIMING_SECONDS = 2.0
MAX_REPEATS = 20
_PROBE = 1024
"""Queries and keys of the part by which it is said how long all would take."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Median seconds of a call after the first, the first one's, and the most memory beyond what was held before.

    peak_bytes is None where the system does not say: on CUDA it is the allocator's, on Linux the process's own.
    """

    seconds: float
    first_seconds: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Rival:
    """Dense attention to compare with: what it took, why it is not the pattern's own, or why it was not run."""

    label: str
    note: str | None
    forward: Cost | None = None
    backward: Cost | None = None
    skipped: str | None = None


def cost_of_program(
    program: Program | CompositeProgram, tensors: Tensors, inputs: Inputs | None = None, *, backward: bool = False
) -> Cost:
    """A call of the program, with its backward pass or without."""
    return _cost(_calls(attend_of(program, inputs), tensors, backward), tensors.query.device)


def dense_rival(
    program: Program | CompositeProgram,
    tensors: Tensors,
    inputs: Inputs | None = None,
    *,
    backward: bool = False,
    limit_seconds: float = 20.0,
) -> Rival:
    """PyTorch's dense attention with the pattern's mask, or without where a mask of N x N is out of reach; of a pattern
    with several terms that of the sequence's own keys, which is another attention of the same shape.

    It is first timed on a small part; where that says more than limit_seconds for a call it is not run.
    """
    label, note, options = _dense_options(program, inputs)
    tensors = with_equal_heads(tensors)  # outside the clock
    device = tensors.query.device
    expected = expected_seconds(tensors, options, backward)
    if expected > limit_seconds:
        limit = f"beyond the limit of {limit_seconds:g} s"
        return Rival(label, note, skipped=f"a call would take about {expected:,.0f} s, {limit}")

    def attend(parts: Tensors) -> Tensor:
        return scaled_dot_product_attention(parts.query, parts.key, parts.value, **options)

    try:
        forward = _cost(_calls(attend, tensors, False), device)
        both = _cost(_calls(attend, tensors, True), device) if backward else None
    except torch.OutOfMemoryError:
        return Rival(label, note, skipped="it needs more memory than there is")
    return Rival(label, note, forward, both)


def _dense_options(
    program: Program | CompositeProgram, inputs: Inputs | None
) -> tuple[str, str | None, dict[str, Any]]:
    """What dense attention is called, how it differs from the pattern, and the arguments that bring it near."""
    if isinstance(program, CompositeProgram):
        return own_dense(program)
    relation, sizes = program.bound.relation, program.bound.sizes
    square = sizes.q_start == 0 and sizes.q_len == sizes.kv_len
    if isinstance(relation, Everything):
        return "dense SDPA", None, {}
    if relation == Compare("<=", K, Q) and square:
        return "dense SDPA, causal", None, {"is_causal": True}
    try:
        return "dense SDPA, masked", None, {"attn_mask": four_dimensional(program.mask(inputs))}
    except InputError:
        note = f"without the pattern's mask, whose {sizes.q_len:,} x {sizes.kv_len:,} would not fit"
        if square and looks_causal(program, inputs):
            return "dense SDPA, causal", note, {"is_causal": True}
        return "dense SDPA, all pairs", note, {}


def with_equal_heads(tensors: Tensors) -> Tensors:
    """As many key heads as query heads, and nothing beside: the kernels for those are the fast ones."""
    key, value = (for_each_query_head(x, tensors.query.shape[1]) for x in (tensors.key, tensors.value))
    return Tensors(tensors.query, key, value)


def own_dense(program: CompositeProgram) -> tuple[str, str | None, dict[str, Any]]:
    """Dense attention of the shape of a pattern with several terms: to the sequence's own keys, causal where the
    pattern is."""
    sizes = program.sizes
    is_square = sizes.q_start == 0 and sizes.q_len == sizes.kv_len
    note = "another attention of the same shape: one softmax of products with all of the sequence's own keys"
    if is_square and isinstance(program.pattern.prove("causal"), Proven):
        return "dense SDPA, causal", note.replace("all of", "all up to the query of"), {"is_causal": True}
    return "dense SDPA, all pairs", note, {}


def four_dimensional(mask: Tensor) -> Tensor:
    """The mask as [B or 1, H or 1, Tq, Tk]: the quick kernel of the CPU takes no three dimensions."""
    return mask if mask.dim() == 4 else mask[None]


def looks_causal(program: Program, inputs: Inputs | None) -> bool:
    """Whether no sampled query sees a later key: enough to choose what to compare with."""
    sizes = program.bound.sizes
    positions = torch.linspace(0, max(0, sizes.q_len - 1), 16, dtype=torch.float64).long()[: sizes.q_len]
    # one by one: all rows of all heads together may be above the limit
    return not any(program.rows([q], inputs=inputs)[..., q + 1 :].any() for q in positions.tolist())


def expected_seconds(tensors: Tensors, options: Mapping[str, Any], backward: bool) -> float:
    """Seconds of a call by rule of three, from the first queries and keys; 0 where they are all."""
    q_len, kv_len = tensors.query.shape[2], tensors.key.shape[2]
    q_part, kv_part = min(q_len, _PROBE), min(kv_len, _PROBE)
    if (q_part, kv_part) == (q_len, kv_len) or not q_part or not kv_part:
        return 0.0
    part = Tensors(tensors.query[:, :, :q_part], tensors.key[:, :, :kv_part], tensors.value[:, :, :kv_part])
    part_options = dict(options)
    if "attn_mask" in options:
        part_options["attn_mask"] = options["attn_mask"][..., :q_part, :kv_part]

    def attend(parts: Tensors) -> Tensor:
        return scaled_dot_product_attention(parts.query, parts.key, parts.value, **part_options)

    call = _calls(attend, part, backward)
    call()
    seconds, _ = timed(call, tensors.query.device)
    return seconds * (q_len / q_part) * (kv_len / kv_part)


def _calls(attend: Callable[[Tensors], Tensor], tensors: Tensors, backward: bool) -> Callable[[], object]:
    """One call to time."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return attend(tensors)

        return forward
    leaves = tensors.trainable()
    parts = tuple(leaves.all)
    upstream = torch.ones_like(tensors.query[..., :1]).expand(*tensors.query.shape[:3], tensors.value.shape[3])
    return lambda: torch.autograd.grad(attend(leaves), parts, upstream, allow_unused=True)


def _cost(call: Callable[[], object], device: torch.device) -> Cost:
    first, first_peak = timed(call, device)
    once, peak = timed(call, device)
    seconds = [once]
    while len(seconds) < MAX_REPEATS and sum(seconds) + once < TIMING_SECONDS:
        seconds.append(timed(call, device)[0])
    # a later call finds memory that the first one left to the process
    peaks = [bytes_ for bytes_ in (first_peak, peak) if bytes_ is not None]
    return Cost(statistics.median(seconds), first, max(peaks, default=None))
