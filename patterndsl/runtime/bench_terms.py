"""Can FlexAttention say what a pattern with several terms says, and how? One call for each branch, to compare with.

A branch is one softmax over the keys of its sources, laid one after the other; a bias of positions and a cap are its
score_mod. What it cannot say is said in words, and not run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from patterndsl.ir.meaning import Point
from patterndsl.ir.real import Real, RealFunction, real_value
from patterndsl.runtime import flex
from patterndsl.runtime.arguments import checked_scale
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.contest import Contestant, Variant
from patterndsl.runtime.data import DeviceData, Inputs, checked_inputs, device_data
from patterndsl.runtime.heads import folded, has_heads
from patterndsl.runtime.learned import Learned, learned_of
from patterndsl.runtime.scored import Scalars, tables_read
from patterndsl.runtime.scored_term import ScoredTerm
from patterndsl.runtime.tensors import Tensors

if TYPE_CHECKING:
    from patterndsl.terms import Branch, Term

BLOCK = 128


def flex_of_terms(
    program: CompositeProgram, tensors: Tensors, inputs: Inputs | None, *, limit: int
) -> tuple[Contestant, float | None]:
    """FlexAttention as a contestant, and the seconds that `create_block_mask` took. inputs: with all labels and lists.
    limit: pairs that it may look at for that."""
    pattern, learned = program.pattern, learned_of(program.pattern, tensors.more)
    branches = pattern.branches_at(program.layer)
    why = next(
        filter(None, (_unsaid(program, pattern.branches[name], terms) for name, terms in branches.items())), None
    )
    if why is not None:
        return Contestant("FlexAttention", (), skipped=why), None
    began, calls = time.perf_counter(), []
    for name, terms in branches.items():
        made = _Softmax.of(program, pattern.branches[name], terms, tensors, learned, inputs)
        if made.num_pairs > limit:
            why = f"create_block_mask would look at {made.num_pairs:,} pairs, above the limit of {limit:,}"
            return Contestant("FlexAttention", (), skipped=why), None
        if made.num_pairs == 0:
            of = f"branch `{name}`" if name else "the pattern"
            return Contestant("FlexAttention", (), skipped=f"it takes no mask of no pairs, and {of} has none"), None
        calls.append((name, made, made.block_mask()))
    building = time.perf_counter() - began
    compiled = [flex.compiled_flex() for _ in calls]

    def attend(parts: Tensors) -> Tensor:
        now = learned_of(pattern, parts.more)
        outputs = []
        for (name, made, mask), run in zip(calls, compiled, strict=True):
            out = made.attend(run, parts, now, mask)
            outputs.append(out * now.gates[name][..., None] if pattern.combine == "gate" else out)
        total = reduce(torch.add, outputs)
        return total / len(outputs) if pattern.combine == "mean" else total

    on_cuda = program.device.type == "cuda"
    note = "a call for each branch" if len(calls) > 1 else None
    if not on_cuda:
        note = "; ".join(filter(None, (note, "PyTorch has no gradients of it on the CPU")))
    variant = Variant(f"blocks of {BLOCK}", attend, program, inputs, trains=on_cuda)
    return Contestant("FlexAttention", (variant,), note), building


def _unsaid(program: CompositeProgram, branch: Branch, terms: Sequence[Term]) -> str | None:
    """Why FlexAttention cannot compute a branch, if so."""
    of = f"branch `{branch.name}`" if branch.name else "the pattern"
    kinds = {item.name: item.kind for item in program.pattern.resolved.tables}
    if branch.is_kernel:
        return f"it has no sums of features, and {of} is one"
    if branch.is_made_up:
        return f"it has no scores but products, and those of {of} are made up: it would look up N x N of them"
    if any(term.projections.name for term in terms):
        return f"a softmax of it has one query, key and value, and {of} has roles with their own"
    if any(kinds[table] != "scalars" for table in tables_read(branch.bias)):
        return f"its score_mod sees neither query nor key, and the bias of {of} is made of them"
    bounds = (program.program(term.name, program.usual_keys(term)).bound for term in terms)
    return (
        None if all(bound.is_plain for bound in bounds) else f"it counts a key once, and {of} has `merge` or `fallback`"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """A term's keys [start, start + length) among those of its branch."""

    start: int
    length: int
    keep: flex.MaskMod
    bias: Real | None
    data: DeviceData


@dataclass(frozen=True, slots=True, eq=False)
class _Softmax:
    """A branch as a call of FlexAttention. tables: of scalars, which the bias looks up. per: batch rows and heads whose
    masks differ, None where they agree."""

    sources: tuple[str, ...]
    segments: tuple[_Segment, ...]
    softcap: float | None
    tables: dict[str, Tensor]
    q_len: int
    q_start: int
    per: tuple[int | None, int | None]
    device: torch.device

    @staticmethod
    def of(
        program: CompositeProgram,
        branch: Branch,
        terms: Sequence[Term],
        tensors: Tensors,
        learned: Learned,
        inputs: Inputs | None,
    ) -> _Softmax:
        own, (batch, heads) = (tensors.key, tensors.value), tensors.query.shape[:2]
        segments, start = [], 0
        per_batch = per_head = False
        for term in terms:
            key, _ = learned.keys_of(term.source, own)
            made = program.program(term.name, key.shape[2])
            given = checked_inputs(made.bound, term.read_of(inputs), made.device, batch)
            by_head = has_heads(given)
            flat = folded(given, range(heads), batch) if by_head else given
            data = device_data(made.bound.relation, heads, flat, made.device)
            scored = ScoredTerm(program.pattern, term, made)
            bias = scored.scoring({}, None).bias
            read = device_data(made.bound.relation, heads, {}, made.device) if not given else data
            segments.append(_Segment(start, key.shape[2], flex.mask_mod(made.bound, data, by_head=by_head), bias, read))
            start += key.shape[2]
            per_batch = per_batch or any(x.dim() > 1 and x.shape[0] > 1 for x in given.values())
            per_head = per_head or by_head or len(made.bound.groups) > 1
        tables = {name: learned.tables[name] for name in tables_read(branch.bias)}
        assert all(isinstance(table, Scalars) for table in tables.values())
        return _Softmax(
            tuple(term.source for term in terms),
            tuple(segments),
            branch.softcap,
            {name: table.numbers for name, table in tables.items()},
            program.sizes.q_len,
            program.sizes.q_start,
            (batch if per_batch else None, heads if per_head else None),
            program.device,
        )

    @property
    def num_keys(self) -> int:
        return sum(item.length for item in self.segments)

    @property
    def num_pairs(self) -> int:
        return (self.per[0] or 1) * (self.per[1] or 1) * self.q_len * self.num_keys

    def block_mask(self) -> BlockMask:
        """As PyTorch makes it, from the predicate at every pair."""

        def keep(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            parts = (
                item.keep(batch, head, q, k - item.start) & (k >= item.start) & (k < item.start + item.length)
                for item in self.segments
            )
            return reduce(torch.logical_or, parts)

        return create_block_mask(keep, *self.per, self.q_len, self.num_keys, self.device.type, BLOCK)

    def attend(self, run: flex.Attend, parts: Tensors, learned: Learned, mask: BlockMask) -> Tensor:
        keys = [learned.keys_of(source, (parts.key, parts.value)) for source in self.sources]
        key, value = (torch.cat(x, 2) if len(keys) > 1 else x[0] for x in zip(*keys, strict=True))
        scale = checked_scale(None, parts.query.shape[3])
        has_more = self.softcap is not None or any(item.bias is not None for item in self.segments)
        mod = self.score if has_more else None
        return flex.flex(run, parts.query, key, value, mask, scale=scale, want_lse=False, score_mod=mod)[0]

    def score(self, score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Its score_mod."""
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        for item in self.segments:
            if item.bias is None:
                continue
            point = Point(q + self.q_start, k - item.start, head, item.data.at_row(batch))
            bias = real_value(item.bias, point, _Numbers(self.tables, head))
            if len(self.segments) > 1:
                inside = (k >= item.start) & (k < item.start + item.length)
                bias = torch.where(inside, bias, 0.0)
            score = score + bias
        return score


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """Numbers of a bias at one pair, in float32; see `ir.real.Numbers`. What has no position stays a number of
    Python's, as the compiler of FlexAttention takes no tensors of constants."""

    tables: dict[str, Tensor]
    head: Tensor

    def number(self, integers: Any) -> Any:
        return integers.to(torch.float32) if isinstance(integers, Tensor) else float(integers)

    def call(self, name: RealFunction, arguments: tuple[Any, ...]) -> Any:
        if name in ("min", "max"):
            return reduce(_least if name == "min" else _most, arguments)
        (x,) = arguments
        if name == "abs":
            return abs(x)
        return getattr(torch if isinstance(x, Tensor) else math, name)(x)

    def entry(self, table: str, at: Any) -> Tensor:
        numbers = self.tables[table]
        last = numbers.shape[1] - 1
        place = at.floor().long().clamp(0, last) if isinstance(at, Tensor) else min(max(math.floor(at), 0), last)
        return numbers[self.head, place]


def _least(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def _most(a: Any, b: Any) -> Any:
    return -_least(-a, -b)
