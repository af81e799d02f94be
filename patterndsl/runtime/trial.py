"""Is a program right, and what does it cost here? Its output against the oracle, its time against dense attention.

It prints nothing and decides nothing: what is measured is returned.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.analysis.verdict import Proven
from patterndsl.diagnostics import InputError
from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import Compare, Everything
from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime import oracle
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.composed_dense import dense_rows
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.learned import learned_of
from patterndsl.runtime.measure import timed
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Attend, Tensors

ALL_ROWS_PAIRS = 1 << 25
"""Up to this many pairs, over batch and heads, every row is checked."""
PAIRS_AT_ONCE = 1 << 22
TIMING_SECONDS = 2.0
MAX_REPEATS = 20
NEIGHBOURS = 8
"""At how many inputs beside those of a check dense attention is measured too, where it is very exact at these."""
_PROBE = 1024


# ---- right? -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest distance from float64: the program's, dense SDPA's in the same dtype, one rounding of the result.

    dense_error: at the inputs of the check; where twice that is too little, the largest there and at neighbours, inputs
    that differ in the last half of their digits. A gradient of few pairs errs by a few roundings, so dense attention is
    by chance very exact at some inputs, where any other order of the same sums would fail. At neighbours its roundings
    are others, and of the same size; a fault is larger than all of them.
    """

    what: str
    error: float
    dense_error: float
    rounding: float

    @property
    def passed(self) -> bool:
        """At most twice as far as dense attention, or within one rounding of the result. Never for NaN."""
        return self.error <= max(2 * self.dense_error, self.rounding)

    def beside(self, dense_error: float) -> Deviation:
        """With what dense attention's is at a neighbour, which may overflow and then says nothing."""
        return replace(self, dense_error=max(self.dense_error, dense_error)) if math.isfinite(dense_error) else self


@dataclass(frozen=True, slots=True)
class Check:
    """Deviations over so many query rows of each head; gradients are those of a loss over the same rows. num_pairs:
    that these rows attend, over heads and batch, of num_all pairs with the keys of each branch."""

    num_rows: int
    every_row: bool
    deviations: tuple[Deviation, ...]
    num_pairs: int
    num_all: int

    @property
    def passed(self) -> bool:
        return all(deviation.passed for deviation in self.deviations)


def check(
    program: Program | CompositeProgram,
    tensors: Tensors,
    inputs: Inputs | None = None,
    *,
    sample_rows: int = 64,
    backward: bool = False,
    seed: int = 0,
    on_event: OnEvent | None = None,
    attend: Attend | None = None,
) -> Check:
    """The program's output, and gradients, against the oracle: every row where pairs are few, else some.

    attend: other attention, which should compute what the program does, to check instead of it.
    Work: O(rows x B x Hq x Tk x D) in float64, up to 1 + NEIGHBOURS times where something does not pass at once; in
    memory of PAIRS_AT_ONCE scores and one head of keys and values; of several terms that of all heads.
    """
    sizes = program.sizes
    num_keys = sizes.kv_len
    if isinstance(program, CompositeProgram):
        num_keys = keys_of_branches(program, tensors)
    rows = _checked_rows(sizes.q_len, num_keys, tensors.query.shape, sample_rows, seed)
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    value = tensors.value
    shape = (*tensors.query.shape[:3], value.shape[3])
    upstream = torch.zeros(shape, dtype=value.dtype, device=value.device)
    if backward:
        drawn = torch.randn((*shape[:2], len(rows), shape[3]), generator=generator)
        upstream[:, :, rows] = drawn.to(upstream.device, upstream.dtype)
    attend = attend or attend_of(program, inputs)
    found = _results(attend, tensors, upstream if backward else None, rows)
    wanted = upstream if backward else None

    def reference(tensors: Tensors) -> tuple[list[Tensor], list[Tensor], int]:
        if isinstance(program, CompositeProgram):
            return _dense_reference(program, tensors, inputs, wanted, rows, on_event)
        return _reference(program, tensors, inputs, wanted, rows, on_event)

    expected, dense, num_pairs = reference(tensors)
    names = ("output", *(f"{name} gradient" for name in tensors.names))
    ours, theirs = (_furthest(names, results, expected) for results in (found, dense))
    largest, epsilon = _furthest(names, expected), torch.finfo(value.dtype).eps
    deviations = [Deviation(name, ours[name], theirs[name], epsilon * largest[name]) for name in ours]
    generator = torch.Generator("cpu").manual_seed(seed + 2)
    for _ in range(NEIGHBOURS):
        if all(item.passed for item in deviations) or not all(math.isfinite(item.error) for item in deviations):
            break
        expected, dense, _ = reference(tensors.each(partial(_moved, generator=generator)))
        there = _furthest(names, dense, expected)
        deviations = [item if item.passed else item.beside(there[item.what]) for item in deviations]
    num_all = shape[0] * shape[1] * len(rows) * num_keys
    return Check(len(rows), len(rows) == sizes.q_len, tuple(deviations), num_pairs, num_all)


def _furthest(
    names: Sequence[str], results: Sequence[Tensor], origin: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """The largest distance from float64, or from 0, of all results of a name: of tensors that are made together. NaN
    where some number is."""
    found: dict[str, list[float]] = {}
    for at, (name, result) in enumerate(zip(names, results, strict=False)):
        found.setdefault(name, []).append(_largest(result.double() - (0 if origin is None else origin[at])))
    return {name: math.nan if any(map(math.isnan, sizes)) else max(sizes) for name, sizes in found.items()}


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """A neighbour: each number with the last half of its digits changed at random, so that no rounding is the same."""
    share = 2 * torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 1
    return (x.double() * (1 + math.sqrt(torch.finfo(x.dtype).eps) * share)).to(x.dtype)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def keys_of_branches(program: CompositeProgram, tensors: Tensors) -> int:
    """Keys of all sources that are attended, once for each branch."""
    learned, own = learned_of(program.pattern, tensors.more), (tensors.key, tensors.value)
    attended = {(term.branch, term.source) for term in program.pattern.terms_at(program.layer)}
    return sum(learned.keys_of(source, own)[0].shape[2] for _, source in attended)


def _checked_rows(q_len: int, num_keys: int, shape: torch.Size, sample_rows: int, seed: int) -> Tensor:
    """Local rows, ascending: all, or a sample with the first and the last row in it."""
    num_pairs = shape[0] * shape[1] * q_len * num_keys
    if num_pairs <= ALL_ROWS_PAIRS or sample_rows >= q_len:
        return torch.arange(q_len)
    drawn = torch.randperm(q_len, generator=torch.Generator("cpu").manual_seed(seed))[: max(0, sample_rows - 2)]
    return torch.tensor(sorted({0, *drawn.tolist(), q_len - 1}))


def attend_of(program: Program | CompositeProgram, inputs: Inputs | None) -> Attend:
    """The program as attention of the tensors alone."""
    return lambda tensors: _output(program, tensors, inputs)


def with_found(program: Program | CompositeProgram, tensors: Tensors, inputs: Inputs | None) -> Inputs | None:
    """The inputs with all labels and lists, which the checks ask for masks by."""
    if not isinstance(program, CompositeProgram):
        return program.with_found(tensors.query, tensors.key, inputs)
    learned = learned_of(program.pattern, tensors.more)
    return program.with_found(tensors.query, (tensors.key, tensors.value), learned, inputs)


def _results(attend: Attend, tensors: Tensors, upstream: Tensor | None, rows: Tensor) -> list[Tensor]:
    """The output at the rows, and its gradients: query's at the rows, all of key's and value's."""
    if upstream is None:
        with torch.no_grad():
            return [attend(tensors)[:, :, rows]]
    leaves = tensors.trainable()
    output = attend(leaves)
    torch.autograd.backward(output, upstream)
    return [output.detach()[:, :, rows], *_gradients(leaves, rows)]


def _gradients(leaves: Tensors, rows: Tensor) -> list[Tensor]:
    """Query's at the rows, all of the others; 0 of what has no part in the output."""
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.all]
    return [found[0][:, :, rows], *found[1:]]


def _output(program: Program | CompositeProgram, tensors: Tensors, inputs: Inputs | None) -> Tensor:
    own = (tensors.query, tensors.key, tensors.value)
    if isinstance(program, CompositeProgram):
        output = program.attend(*own, learned_of(program.pattern, tensors.more), inputs=inputs)
    else:
        output = program(*own, inputs=inputs)
    assert isinstance(output, Tensor)
    return output


def _dense_reference(
    program: CompositeProgram,
    tensors: Tensors,
    inputs: Inputs | None,
    upstream: Tensor | None,
    rows: Tensor,
    on_event: OnEvent | None,
) -> tuple[list[Tensor], list[Tensor], int]:
    """The same of a pattern with several terms, from `composed_dense`."""
    per_row = max(1, math.prod(tensors.query.shape[:2]) * keys_of_branches(program, tensors))
    step, num_pairs = max(1, PAIRS_AT_ONCE // per_row), 0
    found = []
    for dtype in (torch.float64, tensors.query.dtype):
        leaves = tensors.each(partial(_leaf, dtype=dtype, trains=upstream is not None))
        learned, num_pairs = learned_of(program.pattern, leaves.more), 0
        outputs = [leaves.query.new_zeros((*leaves.query.shape[:2], 0, leaves.value.shape[3]))]
        for start in range(0, len(rows), step):
            if on_event:
                on_event("checking", start, len(rows))
            at = rows[start : start + step]
            out, num = dense_rows(program, leaves.query, (leaves.key, leaves.value), learned, inputs, at)
            num_pairs += num
            if upstream is not None and out.requires_grad:
                torch.autograd.backward(out, upstream[:, :, at].to(out.dtype))
            outputs.append(out.detach())
        gradients = [] if upstream is None else _gradients(leaves, rows)
        found.append([x.double() for x in (torch.cat(outputs, 2), *gradients)])
    return found[0], found[1], num_pairs


def _leaf(x: Tensor, dtype: torch.dtype, trains: bool) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_(trains)


def _reference(
    program: Program,
    tensors: Tensors,
    inputs: Inputs | None,
    upstream: Tensor | None,
    rows: Tensor,
    on_event: OnEvent | None,
) -> tuple[list[Tensor], list[Tensor], int]:
    """What `_results` should be, in float64: from the oracle, and from dense SDPA in the tensors' dtype; and the pairs
    that the rows attend."""
    query, key, value = tensors.query, tensors.key, tensors.value
    shapes = [(*query.shape[:2], len(rows), value.shape[3])]
    if upstream is not None:
        shapes += [(*query.shape[:2], len(rows), query.shape[3]), tuple(key.shape), tuple(value.shape)]
    expected, dense = ([query.new_zeros(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    num_pairs = 0
    pairs_per_row = max(1, key.shape[2])
    # the masks of all heads are asked for together
    step = max(1, min(PAIRS_AT_ONCE, oracle.MAX_PAIRS // max(1, math.prod(query.shape[:2]))) // pairs_per_row)
    for start in range(0, len(rows), step):
        if on_event:
            on_event("checking", start, len(rows))
        at = rows[start : start + step]
        for batch, head, kv_head, keep in _masks(program, inputs, at, query.shape, key.shape[1]):
            num_pairs += int((keep > 0).any(0).sum())
            places = ((batch, head, slice(start, start + step)),) * 2 + ((batch, kv_head),) * 2
            upstream_at = None if upstream is None else upstream[batch, head, at]
            parts = (query[batch, head, at], key[batch, kv_head], value[batch, kv_head])
            for sums, attend in ((expected, _exact), (dense, _rough)):
                for total, place, part in zip(sums, places, attend(parts, keep, upstream_at), strict=False):
                    total[place] += part
    return expected, dense, num_pairs


def _masks(
    program: Program, inputs: Inputs | None, rows: Tensor, shape: torch.Size, num_kv_heads: int
) -> Iterator[tuple[int, int, int, Tensor]]:
    """batch, head, key head and, for each head, [softmaxes, rows, Tk] that says how often each key counts."""
    keep = program.softmaxes(rows + program.sizes.q_start, inputs=inputs)
    keep = keep if keep.dim() == 5 else keep[:, None]
    kv_group = shape[1] // max(1, num_kv_heads)
    for batch in range(shape[0]):
        for head in range(shape[1]):
            mask = keep[:, batch if keep.shape[1] > 1 else 0, head if keep.shape[2] > 1 else 0]
            yield batch, head, head // kv_group, mask


_Parts: TypeAlias = tuple[Tensor, Tensor, Tensor]


def _exact(parts: _Parts, keep: Tensor, upstream: Tensor | None) -> list[Tensor]:
    """Output and gradients of one head from the oracle."""
    leaves = [part.detach().double().requires_grad_(upstream is not None) for part in parts]
    query, key, value = (leaf[None, None] for leaf in leaves)
    outputs = [oracle.attend(query, key, value, counts)[0][0, 0] for counts in keep]
    return _with_gradients(_mean(outputs, keep), leaves, upstream)


def _rough(parts: _Parts, keep: Tensor, upstream: Tensor | None) -> list[Tensor]:
    """The same from PyTorch's dense attention in the dtype of the parts; rows without keys are left out of it."""
    leaves = [part.detach().clone().requires_grad_(upstream is not None) for part in parts]
    outputs = [_dense(leaves, counts) for counts in keep]
    return [part.double() for part in _with_gradients(_mean(outputs, keep), leaves, upstream)]


def _dense(leaves: list[Tensor], keep: Tensor) -> Tensor:
    live = (keep > 0).any(-1)
    mask = keep[live] if keep.dtype == torch.bool else keep[live].to(leaves[0].dtype).log()
    query, key, value = leaves
    found = scaled_dot_product_attention(query[None, None, live], key[None, None], value[None, None], attn_mask=mask)
    return value.new_zeros(len(keep), value.shape[-1]).index_put((live,), found[0, 0])


def _mean(outputs: list[Tensor], keep: Tensor) -> Tensor:
    """Of the softmaxes in which a row has keys."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.stack(outputs).sum(0) / (keep > 0).any(-1).sum(0).clamp(min=1)[:, None]


def _with_gradients(output: Tensor, leaves: list[Tensor], upstream: Tensor | None) -> list[Tensor]:
    if upstream is None:
        return [output]
    torch.autograd.backward(output, upstream.to(output.dtype))
    return [output.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


# ---- fast? ------------------------------------------------------------------------------------------------------


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
    tensors = tensors.alone()
    kv_group = tensors.query.shape[1] // tensors.key.shape[1]
    if kv_group > 1:  # outside the clock: the kernels for equal heads are the fast ones
        tensors = replace(
            tensors,
            key=tensors.key.repeat_interleave(kv_group, dim=1),
            value=tensors.value.repeat_interleave(kv_group, dim=1),
        )
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
