"""Is a program right? Its output, and its gradients, against the oracle.

It prints nothing and decides nothing: what is measured is returned. What a program costs is measured in `rival`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime import oracle
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.composed_dense import dense_rows
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.learned import learned_of
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Attend, Tensors

ALL_ROWS_PAIRS = 1 << 25
"""Up to this many pairs, over batch and heads, every row is checked."""
PAIRS_AT_ONCE = 1 << 22
NEIGHBOURS = 8
"""At how many inputs beside those of a check dense attention is measured too, where it is very exact at these."""


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
