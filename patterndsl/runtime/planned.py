"""How does a plan run? Pass by pass, each on its positions and heads, their results merged in place.

Outputs and log-sum-exps merge by the monoid of `runtime.merge`, and each backward pass starts from the merged result. A
row that no pass reaches yields 0 and -inf.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from patterndsl.ir.relation import Relation
from patterndsl.lower.geometry import Integers, whole
from patterndsl.lower.plan import Pass
from patterndsl.lower.shapes import Keys, Orders, Sparse
from patterndsl.runtime.finite import is_finite
from patterndsl.runtime.function import Attending, Run, attended
from patterndsl.runtime.fused import add_into, merge_into
from patterndsl.runtime.kernels.passes import KeysPass, ListedPass, Member, WholePass
from patterndsl.runtime.merge import Merged, with_lse_gradient
from patterndsl.runtime.sdpa import DensePass
from patterndsl.runtime.single import SinglePass
from patterndsl.runtime.tiled import FlexPass, GatheredPass
from patterndsl.runtime.views import EVERYTHING, Form, Launch, Part, Places, make_room, parts, with_unit_stride


class Kernel(Protocol):
    """A piece made ready for a device. The tensors of its calls are a part of the heads: query [B, H, Tq, D], key and
    value [B, H, Tk, D], as many heads each."""

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The calls that a forward pass takes; one where it keeps something for its backward."""

    def gradient_launches(self, row_bytes: int) -> Sequence[Launch]:
        """Those of a backward pass. row_bytes: of one position of all batch rows and heads."""

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """Output [B * H, groups, length, D], lse [B * H, groups, length], and what its backward needs of them."""

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the launch's queries, keys and values, [B * H, groups, length, D], from what all passes gave."""


@dataclass(frozen=True, slots=True, eq=False)
class ReadyPass:
    """A pass made ready for a device, or several of different heads in one.

    sign: -1 where its pairs were counted twice, and are taken out again. is_first: of each launch, whether no other one
    reached its rows before, so that there is nothing to merge with; num_first: the rows of those launches, over all
    heads.
    """

    heads: tuple[int, ...]
    kernel: Kernel | WholePass
    sign: int
    is_first: tuple[bool, ...]
    num_first: int
    _parts: dict[tuple[Form, ...], list[Part]] = field(default_factory=dict, repr=False)

    def parts(self, query: Tensor, key: Tensor, value: Tensor) -> list[Part]:
        """See `views.parts`; found once for each form of the tensors."""
        if isinstance(self.kernel, WholePass):
            return [EVERYTHING]
        forms = (query.shape, query.stride()), (key.shape, key.stride()), (value.shape, value.stride())
        found = self._parts.get(forms)
        if found is None:
            make_room(self._parts)
            found = self._parts[forms] = parts(self.heads, query, key, value)
        return found

    @property
    def is_in_place(self) -> bool:
        """Whether its kernel writes where results are collected."""
        return isinstance(self.kernel, WholePass) or (self.sign > 0 and isinstance(self.kernel, ListedPass))

    @property
    def is_fresh(self) -> bool:
        """Whether the output is a new tensor; that of a single key is a view of the values."""
        return not isinstance(self.kernel, SinglePass)


def _ready(item: Pass, kernel: Kernel | WholePass, reached: dict[tuple[int, ...], Integers]) -> ReadyPass:
    """The pass behind others. reached: rows that these reach, of the heads of each group, bool [rows]; kept up to
    date."""
    is_first, num_first = list[bool](), 0
    for launch in kernel.launches:
        mine, before = launch.queries.rows(), reached.get(item.heads, np.zeros(0, dtype=bool))
        after = np.zeros(max(before.size, mine.max(initial=-1) + 1), dtype=bool)
        after[: before.size] = before
        is_first.append(not after[mine].any())
        num_first += len(item.heads) * len(mine) * is_first[-1]
        after[mine] = True
        reached[item.heads] = after
    return ReadyPass(item.heads, kernel, item.sign, tuple(is_first), num_first)


class Planned:
    """Passes made ready for a device; call it with tensors. lengths: of queries and of keys, where passes of all of
    these may be one launch."""

    def __init__(self, passes: Sequence[Pass], device: torch.device, lengths: tuple[int, int] | None = None) -> None:
        # what the others merge into comes first, what is taken out again last
        in_order = sorted(passes, key=lambda item: (item.sign < 0, -item.piece.geometry.num_rows))
        reached: dict[tuple[int, ...], Integers] = {}
        ready = [_ready(item, _kernel(item, device, lengths), reached) for item in in_order]
        self.passes = tuple(_joined(ready, device))
        masks = any(isinstance(item.kernel, DensePass) and item.kernel.is_masked for item in self.passes)
        self.must_be_finite = masks and device.type == "cpu"  # on CUDA a look at the numbers would wait for the device
        self._turns = dict[object, _Turns]()

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether what is masked is harmless: a kernel that masks weighs values with 0, and 0 x NaN is NaN."""
        return not self.must_be_finite or is_finite(query, key, value)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, D] in the inputs' dtype and lse [B, Hq, Tq]; differentiable in both."""
        out, lse = attended(query, key, value, self.run(query, key, value, scale))
        assert lse is not None
        return out, lse

    def run(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Attending:
        """One call."""
        kernel = self.passes[0].kernel if self.passes else None
        is_alone = len(self.passes) == 1 and len(self.passes[0].heads) == query.shape[1]
        if is_alone and isinstance(kernel, WholePass):
            return kernel.alone(query, key, scale)
        recorded = kernel.alone(query, key, value, scale) if is_alone and isinstance(kernel, FlexPass) else None
        return recorded or _run(self, scale, _has_backward(query, key, value))

    def turns(self, query: Tensor, key: Tensor, value: Tensor) -> _Turns:
        """What the backward pass does; found once for each form of the tensors."""
        forms = tuple((x.shape, x.stride()) for x in (query, key, value))
        asked = (self.passes, forms)
        found = self._turns.get(asked)
        if found is None:
            make_room(self._turns)
            found = self._turns[asked] = _turns(self.passes, query, key, value)
        return found


def _has_backward(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _joined(passes: Sequence[ReadyPass], device: torch.device) -> Iterator[ReadyPass]:
    """The same, with one launch for all heads whose whole sequences are tiles of one order: one for those that nothing
    comes before, and one for the others, behind what these go on from. Heads that look up what they draw
    stay by themselves, as a kernel would look it up for all."""
    of_kind = dict[tuple[tuple[bool, ...], Orders | None], list[ReadyPass]]()
    for ready in passes:
        if isinstance(ready.kernel, WholePass) and not ready.kernel.draws:
            of_kind.setdefault((ready.is_first, ready.kernel.orders), []).append(ready)
    for ready in passes:
        if not isinstance(ready.kernel, WholePass) or ready.kernel.draws:
            yield ready
            continue
        kin = of_kind[ready.is_first, ready.kernel.orders]
        if ready is kin[0 if ready.is_first[0] else -1]:
            yield _as_one(kin, device)


def _as_one(kin: Sequence[ReadyPass], device: torch.device) -> ReadyPass:
    if len(kin) == 1:
        return kin[0]
    heads, shapes = dict[Relation, tuple[int, ...]](), dict[Relation, Sparse]()
    for ready in kin:
        assert isinstance(ready.kernel, WholePass)
        for member in ready.kernel.members:
            relation = member.shape.relation
            heads[relation] = (*heads.get(relation, ()), *member.heads)
            shapes[relation] = member.shape
    first = kin[0].kernel
    assert isinstance(first, WholePass)
    joint = WholePass(first.geometry, [Member(heads[relation], shapes[relation]) for relation in heads], device)
    all_heads = tuple(sorted(itertools.chain.from_iterable(heads.values())))
    return ReadyPass(all_heads, joint, 1, kin[0].is_first, sum(ready.num_first for ready in kin))


def _kernel(item: Pass, device: torch.device, lengths: tuple[int, int] | None) -> Kernel | WholePass:
    geometry, shape = item.piece.geometry, item.piece.shape
    match item.kernel:
        case "single":
            return SinglePass(geometry)
        case "sdpa":
            return DensePass(item.piece, device)
        case "triton" if isinstance(shape, Keys):
            return KeysPass(geometry, shape, device)
        case "triton":
            assert isinstance(shape, Sparse)
            if item.sign > 0 and lengths is not None and geometry == whole(*lengths):
                return WholePass(geometry, [Member(item.heads, shape)], device)
            return ListedPass(geometry, shape, len(item.heads), device)
        case "flex":
            assert isinstance(shape, Sparse)
            return FlexPass(geometry, shape, device)
        case "gathered":
            assert isinstance(shape, Sparse)
            return GatheredPass(geometry, shape, device)


# ---- sums of parts


@dataclass
class _Result:
    """The merged output and lse so far. is_covered: whether each row has a launch that reaches it first."""

    query: Tensor
    width: int
    is_covered: bool
    out: Tensor | None = None
    lse: Tensor | None = None

    def add(self, part: Part, ready: ReadyPass, at: int, out: Tensor, lse: Tensor, kept: object) -> None:
        """Merges the result of a launch, the pass's `at`-th."""
        places, is_first = ready.kernel.launches[at].queries, ready.is_first[at]
        if self.out is None and is_first and part.is_whole and kept is None and ready.is_fresh:
            self._adopt(places, out, lse)
            if self.out is not None:
                return
        into, lse_into = (places.into(part.of_queries(x)) for x in self.tensors())
        out, lse = places.fit(out, into), places.fit(lse, lse_into)
        if is_first:
            into.copy_(out)
            lse_into.copy_(lse)
        else:
            merge_into(into, lse_into, out, lse, ready.sign)

    def views(self, part: Part, places: Places) -> tuple[Tensor, Tensor] | None:
        """Where output [B * H, groups, length, D] and lse of some positions belong; None if no view has that form."""
        out, lse = (places.into(part.of_queries(x)) for x in self.tensors())
        return (out, lse) if out.dim() == 4 and lse.dim() == 3 else None

    def _adopt(self, places: Places, out: Tensor, lse: Tensor) -> None:
        """Keeps the first result, where it has all rows and lies in memory as the query does."""
        rows = self.query.shape[:3]
        self.out = places.adopted(out, rows) if out.dtype == self.dtype() else None
        if self.out is not None:
            self.lse = torch.empty(rows, dtype=lse.dtype, device=lse.device)
            into = places.into(self.lse)
            into.copy_(places.fit(lse, into))

    def dtype(self) -> torch.dtype:
        """Float32 at least on the CPU; on CUDA that of the query, as memory is what merging costs there."""
        query = self.query
        return query.dtype if query.dtype == torch.float64 or query.device.type == "cuda" else torch.float32

    def tensors(self) -> tuple[Tensor, Tensor]:
        if self.out is None or self.lse is None:
            rows, dtype, device = self.query.shape[:3], self.dtype(), self.query.device
            self.out = torch.empty((*rows, self.width), dtype=dtype, device=device)
            self.lse = torch.empty(rows, dtype=torch.promote_types(dtype, torch.float32), device=device)
            if not self.is_covered:
                self.out.zero_()
                self.lse.fill_(-torch.inf)
        return self.out, self.lse


@dataclass
class _Gradient:
    """The gradient of one tensor so far, a sum over passes. is_covered: whether each position of each head has a step
    that is the first to reach it, and gives all its channels."""

    of: Tensor
    is_covered: bool
    total: Tensor | None = None

    def add(self, places: Places, grad: Tensor, take: Callable[[Tensor], Tensor], sign: int, *, is_first: bool) -> None:
        """Adds the gradient of some positions of a part. take: the part of [B, H, ...]; is_first: whether nothing is
        there yet."""
        if self.total is None and sign > 0 and grad.dtype == self.dtype() and grad.shape[-1] == self.of.shape[-1]:
            self.total = places.adopted(grad, self.of.shape[:3])
            if self.total is not None:
                return
        into = places.into(take(self.begun()))
        into = into if grad.shape[-1] == into.shape[-1] else into[..., : grad.shape[-1]]
        if is_first:
            into.copy_(places.fit(grad, into))
        else:
            add_into(into, places.fit(grad, into), sign)

    def begun(self) -> Tensor:
        """The sum so far, a new tensor where there is none."""
        if self.total is None:
            new = torch.empty if self.is_covered else torch.zeros
            self.total = new(self.of.shape, dtype=self.dtype(), device=self.of.device)
        return self.total

    def dtype(self) -> torch.dtype:
        of = self.of
        return of.dtype if of.dtype == torch.float64 or of.device.type == "cuda" else torch.float32

    def result(self, width: int) -> Tensor:
        total = torch.zeros_like(self.of) if self.total is None else self.total.to(self.of.dtype)
        return total if width == total.shape[-1] else total[..., :width]


def _views(totals: Sequence[_Gradient], part: Part, launch: Launch) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sums of query, key and value so far as a launch sees them, [B * H, groups, length, D]; None where no view has
    that form."""
    query, key, value = (total.begun() for total in totals)
    views = (
        launch.queries.into(part.of_queries(query)),
        launch.keys.into(part.of_keys(key)),
        launch.keys.into(part.of_keys(value)),
    )
    return views if all(view.dim() == 4 for view in views) else None


class _Turn(NamedTuple):
    """A part of a pass and its launches in the backward pass, each with whether it is the first to reach the queries,
    and the keys, that it reaches: all positions of some heads."""

    ready: ReadyPass
    part: Part
    launches: Sequence[tuple[Launch, tuple[bool, bool]]]


class _Turns(NamedTuple):
    """Those of all passes. are_covered: whether each query, and each key, has a launch that reaches it first."""

    turns: Sequence[_Turn]
    are_covered: tuple[bool, bool]


def _turns(passes: Sequence[ReadyPass], query: Tensor, key: Tensor, value: Tensor) -> _Turns:
    reached, covered = (
        [torch.zeros(x.shape[:2], dtype=torch.bool, device="cpu") for x in (query, key)] for _ in range(2)
    )
    turns = list[_Turn]()

    def is_first(side: int, heads: Any, *, is_all: bool) -> bool:
        """Whether a launch gives all positions of heads of which none was reached before. heads: an index."""
        first = is_all and not bool(reached[side][heads].any())
        reached[side][heads] = True
        if first:
            covered[side][heads] = True
        return first

    for ready in passes:
        for part in ready.parts(query, key, value):
            (rows, heads, _, dim), launches = part.of_queries(query).shape, list[tuple[Launch, tuple[bool, bool]]]()
            q_heads, kv_heads = _heads_of(ready, part, query.shape[1] // key.shape[1])
            for launch in ready.kernel.gradient_launches(rows * heads * dim * query.element_size()):
                of_queries = ready.sign > 0 and launch.queries.num_rows == query.shape[2]
                of_keys = ready.sign > 0 and launch.has_each_key_once and launch.keys.num_rows == key.shape[2]
                first_queries = is_first(0, q_heads, is_all=of_queries)
                first_keys = is_first(1, kv_heads, is_all=of_keys)
                launches.append((launch, (first_queries, first_keys)))
            turns.append(_Turn(ready, part, launches))
    return _Turns(turns, (bool(covered[0].all()), bool(covered[1].all())))


def _heads_of(ready: ReadyPass, part: Part, kv_group: int) -> tuple[Any, Any]:
    """Batch rows and heads of the queries, and those of the keys, that a part of a pass has, as indices."""
    every = slice(None)
    if isinstance(ready.kernel, WholePass):
        return (every, list(ready.heads)), (every, sorted({head // kv_group for head in ready.heads}))
    q_heads, kv_heads = (every if heads is None else heads for heads in (part.q_heads, part.kv_heads))
    return (part.rows, q_heads), (part.rows, kv_heads)


# ---- forward and backward


def results(
    query: Tensor, key: Tensor, value: Tensor, passes: Sequence[ReadyPass], scale: float, train: bool
) -> tuple[Tensor, Tensor, list[object]]:
    """Output, lse, and what each part of a pass keeps for its backward."""
    query, key, value = map(with_unit_stride, (query, key, value))
    is_covered = sum(ready.num_first for ready in passes) == query.shape[1] * query.shape[2]
    result, saved = _Result(query, value.shape[-1], is_covered), list[object]()
    for ready in passes:
        for part in ready.parts(query, key, value):
            if isinstance(ready.kernel, WholePass):
                ready.kernel.write(query, key, value, scale, result.tensors(), goes_on=not ready.is_first[0])
                saved.append(None)
                continue
            tensors, kept = (part.of_queries(query), part.of_keys(key), part.of_keys(value)), None
            for at, launch in enumerate(ready.kernel.launches):
                views = result.views(part, launch.queries) if ready.is_in_place else None
                if views is not None:
                    assert isinstance(ready.kernel, ListedPass)
                    ready.kernel.write(launch, *tensors, scale, views, goes_on=not ready.is_first[at])
                    continue
                out, lse, kept = ready.kernel.forward(launch, *tensors, scale, train)
                result.add(part, ready, at, out, lse, kept)
            saved.append(kept)
    found, lse = result.tensors()
    return found.to(query.dtype), lse, saved


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    plan: Planned,
    scale: float,
    saved: Sequence[object] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. out, lse, saved: `results`; what was not saved is computed again."""
    query, key, value, out = map(with_unit_stride, (query, key, value, out))
    head_dim, kept = query.shape[-1], iter(saved) if saved else itertools.repeat(None)
    if grad_lse is not None:
        query, key, value, out, grad_out = with_lse_gradient(query, key, value, out, grad_out, grad_lse)
    turns, are_covered = plan.turns(query, key, value)
    whole = grad_lse is None  # gradients have all the channels of the tensors
    totals = [_Gradient(x, whole and are_covered[at]) for x, at in ((query, 0), (key, 1), (value, 1))]
    if not all(ready.is_in_place for ready in plan.passes):  # the others take no row for empty
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    merged = Merged(out, lse, grad_out.contiguous())
    for ready, part, launches in turns:
        if isinstance(ready.kernel, WholePass):
            ((_, (is_first_query, is_first_key)),) = launches
            sums, adds = (
                (totals[0].begun(), totals[1].begun(), totals[2].begun()),
                (not is_first_query, not is_first_key),
            )
            ready.kernel.add_gradients(query, key, value, merged, scale, sums, adds=adds)
            next(kept)
            continue
        tensors, of_part = (part.of_queries(query), part.of_keys(key), part.of_keys(value)), next(kept)
        mine = merged if part.is_whole else Merged(*map(part.of_queries, (merged.out, merged.lse, merged.grad_out)))
        for launch, (is_first_query, is_first_key) in launches:
            views = _views(totals, part, launch) if ready.is_in_place else None
            if views is not None:
                assert isinstance(ready.kernel, ListedPass)
                adds = (not is_first_query, not is_first_key)
                ready.kernel.add_gradients(launch, *tensors, mine, scale, views, adds=adds)
                continue
            grads = ready.kernel.backward(launch, *tensors, mine, scale, of_part)
            totals[0].add(launch.queries, grads[0], part.of_queries, ready.sign, is_first=is_first_query)
            for total, grad in zip(totals[1:], grads[1:], strict=True):
                for places, some in launch.key_gradients(grad):
                    total.add(places, some, part.of_keys, ready.sign, is_first=is_first_key)
    grad_query, grad_key, grad_value = (total.result(head_dim) for total in totals)
    return grad_query, grad_key, grad_value


def _run(plan: Planned, scale: float, train: bool) -> Run:
    """One call. train: whether its parts keep what their backward needs."""
    saved: list[object] = []

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, found = results(query, key, value, plan.passes, scale, train)
        saved.extend(found)
        return out, lse

    return Run("planned", forward, partial(gradients, plan=plan, scale=scale, saved=saved))
