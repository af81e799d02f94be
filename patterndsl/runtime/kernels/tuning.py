"""Which blocks of generated kernels are fastest on a device? Those of `lower.blocks.CANDIDATES`, side by side.

Only a calibration asks; whoever runs a kernel reads what it found. What cannot be compiled here, or computes something
else than the usual blocks do, is no candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from patterndsl.ir.index import Const, K, Q, arithmetic
from patterndsl.ir.relation import Compare, Relation, conjunction, disjunction
from patterndsl.lower.blocks import CANDIDATES, Blocks, Length, Pipeline, Tuned, Use
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import OnEvent, find_tiles
from patterndsl.runtime.kernels import launch
from patterndsl.runtime.kernels.asked import asked_of
from patterndsl.runtime.kernels.lists import WorkLists
from patterndsl.runtime.kernels.shapes import ROLES, has_hopper_kernel, usual_shapes
from patterndsl.runtime.measure import step_seconds
from patterndsl.sema.parameters import Sizes

HEADS = 16
ROUNDS = 30
WORTH, SLOWER = 0.97, 1.02
"""Blocks are taken that need at most so much of the time of the usual ones on average, and no more than this on any
example; less is noise."""
CLOSE = 2e-2
"""Of the largest number: how far roundings of half precision take two ways to compute one thing apart."""


@dataclass(frozen=True, slots=True)
class Example:
    """A relation of so many positions."""

    relation: Relation
    num: int


_BACK = arithmetic("-", Q, K)
_PAST = Compare("<=", Const(0), _BACK)
_EVERY_FOURTH = Compare("==", arithmetic("%", arithmetic("//", K, Const(64)), Const(4)), Const(0))
_GLOBAL = tuple(Compare("<", side, Const(64)) for side in (Q, K))
EXAMPLES: dict[Length, tuple[Example, ...]] = {
    "short": (
        Example(conjunction((_PAST, Compare("<", _BACK, Const(512)))), 65_536),
        Example(disjunction((conjunction((_PAST, Compare("<", _BACK, Const(512)))), *_GLOBAL)), 65_536),
    ),
    "long": (Example(_PAST, 8192), Example(conjunction((_PAST, _EVERY_FOURTH)), 16_384)),
}
"""Lists of one length, and some much longer ones among them; neighbouring keys, and scattered ones."""

Call = Callable[[Any], tuple[Tensor, ...]]
"""What runs a kernel on some blocks."""


def tune(device: torch.device, *, on_event: OnEvent | None = None) -> tuple[Tuned, ...]:
    """What to take for each use. Compiles some forty kernels: a minute or two, the first time."""
    found = []
    uses = [Use(role, dim, length) for dim, length, role in product((64, 128), EXAMPLES, ROLES)]
    for at, use in enumerate(uses):
        if on_event is not None:
            on_event(f"measuring: kernels, {use.role}, {use.head_dim}, {use.length}", at, len(uses))
        found.append(Tuned(use, fastest(use, device)))
    return tuple(found)


def fastest(use: Use, device: torch.device) -> Blocks | Pipeline:
    """The blocks that need the least time on average; the usual ones where none is much faster."""
    usual, *others = CANDIDATES[use.role, use.head_dim]
    shares = dict[Blocks | Pipeline, list[float]]()
    for example in EXAMPLES[use.length]:
        call = call_of(use, example, device)
        truth = call(usual)
        right = [usual, *(blocks for blocks in others if _is_right(call, blocks, truth))]
        rounds = step_seconds([partial(call, blocks) for blocks in right], device, ROUNDS)
        seconds = [min(of_blocks) for of_blocks in zip(*rounds, strict=True)]
        for blocks, needed in zip(right, seconds, strict=True):
            shares.setdefault(blocks, []).append(needed / seconds[0])
    means = {
        blocks: mean(each)
        for blocks, each in shares.items()
        if len(each) == len(EXAMPLES[use.length]) and max(each) <= SLOWER
    }
    best = min(means, key=means.__getitem__)
    return best if means[best] <= WORTH else usual


def call_of(use: Use, example: Example, device: torch.device) -> Call:
    """The kernel of a use on an example."""
    num, dim, relation = example.num, use.head_dim, example.relation
    sizes, scale = Sizes(num, num, 0, num), dim**-0.5
    lists = WorkLists(
        lambda q_block, kv_block: ((find_tiles(relation, sizes, Lookup(), q_block, kv_block),),),
        *([0] * HEADS, 1, num, device),
    )
    generator = torch.Generator(device).manual_seed(0)
    shape = 4, 1, HEADS, num, dim
    query, key, value, grad_out = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    asked = asked_of(relation, sizes, {}, {})

    def forward(blocks: Blocks | Pipeline) -> tuple[Tensor, Tensor]:
        return launch.forward(query, key, value, lists.rows(blocks), blocks, asked, scale)

    def queries(blocks: Blocks | Pipeline) -> tuple[Tensor, Tensor]:
        results = out, lse, grad_out, None
        return launch.gradient_of_queries(query, key, value, *results, lists.rows(blocks), blocks, asked, scale)

    def keys(blocks: Blocks | Pipeline) -> tuple[Tensor, Tensor]:
        results = lse, grad_out, delta
        return launch.gradients_of_keys(query, key, value, *results, lists.columns(blocks), blocks, asked, scale)

    if use.role == "forward":
        return forward
    usual = usual_shapes(torch.bfloat16, dim)
    out, lse = forward(usual.forward)
    if use.role == "queries":
        return queries
    _, delta = queries(usual.queries)
    return keys


def _is_right(call: Call, blocks: Blocks | Pipeline, truth: tuple[Tensor, ...]) -> bool:
    """Whether blocks can be run on here, and give what others give."""
    if isinstance(blocks, Pipeline) and not has_hopper_kernel(truth[0].device):
        return False
    try:
        found = call(blocks)
    except (TritonError, RuntimeError):  # the second is what its passes raise
        return False
    return all(
        bool((ours - wanted).abs().max() <= CLOSE * wanted.abs().max().clamp_min(1.0))
        for ours, wanted in zip(found, truth, strict=True)
    )
