"""What can be done with a pattern at given sizes? A Program: its mask, its tiles, its gather indices, its attention.

Tiles of a pattern without inputs are found once and kept; those of a pattern that reads inputs are found for the
inputs of each call, on their device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from os import PathLike
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.analysis.cache import CachePlan, NotDecodable, cache_plan
from patterndsl.analysis.explain import Explanation, explanation
from patterndsl.diagnostics import PatternError, error, input_error
from patterndsl.ir.relation import Relation
from patterndsl.learn.graphs import hold
from patterndsl.learn.lsh import labels_of_heads
from patterndsl.lower.costs import Machine
from patterndsl.lower.fallback import FALLBACK, Call, Rule, leaves, usual_backend
from patterndsl.lower.gather import gather_tiles
from patterndsl.lower.hulls import Hull, hulls, ordered_hulls, slot_hulls
from patterndsl.lower.listings import can_tell
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.machine import Constants
from patterndsl.lower.plan import Plan, passes_of
from patterndsl.lower.plan import plan as make_plan
from patterndsl.lower.row import row_keys
from patterndsl.lower.stored import chosen
from patterndsl.lower.tiles import OnEvent, Tiles, find_tiles
from patterndsl.runtime import flex, ops, oracle
from patterndsl.runtime.arguments import (
    as_autocast,
    check_backend,
    check_no_others,
    check_tensors,
    checked_block,
    checked_device,
    checked_positions,
    checked_scale,
    with_positive_scale,
)
from patterndsl.runtime.chosen import hash_on, topk_on
from patterndsl.runtime.chunked import Chunked
from patterndsl.runtime.constants import constants_for, given_constants
from patterndsl.runtime.data import DeviceData, Inputs, by_round, checked_inputs, device_data
from patterndsl.runtime.gathered import Group, gathered_attention
from patterndsl.runtime.groups import groups_of_row, lookups_of_heads, lookups_of_rows, num_rows_of, rows_of
from patterndsl.runtime.kernels.attention import Kernels, check_can_run, has_kernels
from patterndsl.runtime.masked import Masked
from patterndsl.runtime.ordered import Ordered
from patterndsl.runtime.parts import Parts, folded, has_heads, is_own_key
from patterndsl.runtime.placed import Placed
from patterndsl.runtime.plan import StoredPlan
from patterndsl.runtime.plan import write as write_plan
from patterndsl.runtime.planned import Planned, is_finite
from patterndsl.runtime.slotted import Slotted
from patterndsl.runtime.telling import Telling
from patterndsl.sema.bind import Bound, HeadGroup, InputShape
from patterndsl.sema.parameters import MAX_SIZE, Sizes, counted, integer

MAX_GATHERED = 1 << 28


class GatherIndices(NamedTuple):
    """Keys per query block: indices int64 [heads or 1, num_q_blocks, width], ascending, padded with -1, the exact
    union over the block's rows; counts int64 [heads or 1, num_q_blocks]. Batched inputs put a batch dimension first."""

    indices: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class _TileKey:
    q_block: int
    kv_block: int


class Program:
    """A pattern compiled for lengths, heads and a device; make one with `Pattern.compile`."""

    def __init__(
        self,
        bound: Bound,
        text: str,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        choice: int | None = None,
        machine: Machine | str | PathLike[str] | None = None,
    ) -> None:
        check_backend(backend)
        self.bound = bound
        self.text = text
        self.device = checked_device(device)
        if backend == "triton":
            check_can_run(self.device)
        self._chosen_by_rule = backend == "auto"
        self._choice = choice
        self._constants_asked = machine
        self._constants = None if machine is None else given_constants(machine, self.device)
        self._asked = backend
        self._tiles: dict[_TileKey, tuple[Tiles, ...]] = {}
        self._gathered: tuple[Tiles, ...] | None = None
        self._static_groups: tuple[Group, ...] | None = None
        self._data: DeviceData | None = None
        self._flex: flex.Attend | None = None
        self._block_masks: dict[int, BlockMask] = {}
        self._address = ops.register(self)

    def __repr__(self) -> str:
        sizes = self.bound.sizes
        lengths = f"q_len={sizes.q_len}, kv_len={sizes.kv_len}, q_start={sizes.q_start}"
        return f"Program({lengths}, heads={self.bound.num_heads}, device={self.device}, backend={self.backend!r})"

    @cached_property
    def backend(self) -> str:
        """What was asked for, or what `auto` means here."""
        if self._asked != "auto":
            return self._asked
        kind, has_inputs = self.device.type, bool(self.bound.inputs)
        has_hulls = has_inputs and self.hulls is not None
        return usual_backend(kind, has_inputs, len(self.bound.groups), has_hulls)

    @property
    def sizes(self) -> Sizes:
        """Its lengths, and where the queries begin."""
        return self.bound.sizes

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.bound.num_heads

    # ---- what is attended -----------------------------------------------------------------------------------

    def mask(self, inputs: Inputs | None = None) -> Tensor:
        """bool [heads or 1, q_len, kv_len], with a batch dimension first where inputs have one; True may attend.

        Straight from membership, O(q_len x kv_len). Raises InputError (E504) above oracle.MAX_PAIRS pairs.
        """
        given = self._inputs(inputs)
        keep = self.dense(given)
        return keep if num_rows_of(given) is not None else keep[0]

    def dense(self, given: dict[str, Tensor]) -> Tensor:
        """bool [rows or 1, heads or 1, q_len, kv_len]."""
        oracle.check_pairs(self.bound, self.bound.sizes.q_len, rows_of(given))
        start = self.bound.sizes.q_start
        return self.counted(torch.arange(start, start + self.bound.sizes.q_len, device=self.device), given) > 0

    def rows(self, positions: Tensor | Sequence[int], inputs: Inputs | None = None) -> Tensor:
        """bool [heads or 1, len(positions), kv_len]: the mask's rows of some absolute query positions.

        positions: a one-dimensional tensor or list of integers in [q_start, q_start + q_len). Raises InputError: E502
        on others, E504 above oracle.MAX_PAIRS pairs.
        """
        return self.counts(positions, inputs) > 0

    def counts(self, positions: Tensor | Sequence[int], inputs: Inputs | None = None) -> Tensor:
        """How often each key counts, [heads or 1, len(positions), kv_len]: bool like `rows`, int64 of a multiset."""
        given = self._inputs(inputs)
        found = checked_positions(positions, self.bound.sizes).to(self.device)
        counts = self.counted(found, given)
        return counts if num_rows_of(given) is not None else counts[0]

    def softmaxes(self, positions: Tensor | Sequence[int], inputs: Inputs | None = None) -> Tensor:
        """`counts` of each softmax whose results are averaged, [softmaxes, ...]: one, but of a mean, where a row leaves
        out those in which it has no key."""
        given = self._inputs(inputs)
        counts = self.counted_apart(checked_positions(positions, self.bound.sizes).to(self.device), given)
        return counts if num_rows_of(given) is not None else counts[:, 0]

    def counted_apart(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """`softmaxes` of checked positions and inputs, with a dimension for batch rows."""
        if self.bound.merge != "mean":
            return self.counted(positions, given)[None]
        return self._parts.averaged_counts(positions, given)

    def counted(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """`counts` of checked positions and inputs, with a dimension for batch rows; bool where none counts twice."""
        if self._parts.are_needed(given):
            return self._parts.counts(positions, given)
        return oracle.membership_rows(self.bound, self._device_data(given), positions, rows_of(given))

    def tiles(
        self,
        q_block: int = 128,
        kv_block: int | None = None,
        *,
        inputs: Inputs | None = None,
        on_event: OnEvent | None = None,
    ) -> list[tuple[Tiles, ...]]:
        """The live tiles per batch row (one where inputs have no batch dimension) and head group.

        Groups are those of `program.bound.groups`; each head is one where inputs have a dimension for heads. Work:
        O(live tiles), see `lower.tiles`.
        """
        key = _TileKey(checked_block(q_block), checked_block(q_block if kv_block is None else kv_block))
        given = self._inputs(inputs)
        return self._tiles_of(key, given, on_event)

    def _tiles_of(self, key: _TileKey, given: dict[str, Tensor], on_event: OnEvent | None) -> list[tuple[Tiles, ...]]:
        if has_heads(given):
            return [
                tuple(self._found(key, self._group_of(head).relation, lookup) for head, lookup in enumerate(row))
                for row in lookups_of_heads(given, self.bound.num_heads)
            ]
        if given:
            return [self._find(key, lookup, on_event) for lookup in lookups_of_rows(given)]
        if key not in self._tiles:
            self._tiles[key] = self._find(key, Lookup(), on_event)
        return [self._tiles[key]]

    def block_mask(self, block: int = 128, inputs: Inputs | None = None) -> BlockMask:
        """FlexAttention's BlockMask, [batch or 1, heads or 1, ...], equal to create_block_mask's, without its N x N.

        Above flex.MAX_DENSE_BLOCKS blocks the index tensors hold live columns only: enough for flex_attention, not for
        `to_dense` and slicing.
        """
        given, block = self._inputs(inputs), checked_block(block)
        self._refuse("block masks", None)
        return self._block_mask(block, given)

    def _block_mask(self, block: int, given: dict[str, Tensor]) -> BlockMask:
        if not given and block in self._block_masks:
            return self._block_masks[block]
        sizes = self.bound.sizes
        tiles = self._tiles_of(_TileKey(block, block), given, None)
        some = tiles[0][0]
        by_head = has_heads(given)
        flat = folded(given, range(self.bound.num_heads), len(tiles)) if by_head else given
        mask = flex.block_mask(
            [self._per_head(row) for row in tiles],
            (block, block),
            (some.num_q_blocks, some.num_kv_blocks),
            (sizes.q_len, sizes.kv_len),
            flex.mask_mod(self.bound, self._device_data(flat), by_head=by_head),
        )
        if not given:
            self._block_masks[block] = mask
        return mask

    def _per_head(self, groups: tuple[Tiles, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The tiles of each head, or of one head where all agree."""
        on_device = [tuple(self._tensor(part) for part in (t.q_blks, t.kv_blks, t.is_full)) for t in groups]
        if len(groups) in (1, self.bound.num_heads):
            return [(parts[0], parts[1], parts[2]) for parts in on_device]
        group_of = {head: at for at, group in enumerate(self.bound.groups) for head in group.heads}
        picked = (on_device[group_of[head]] for head in range(self.bound.num_heads))
        return [(parts[0], parts[1], parts[2]) for parts in picked]

    def gather_indices(self, q_block: int = 64, inputs: Inputs | None = None) -> GatherIndices:
        """The keys that each block of q_block queries needs. Raises InputError (E504) where there are too many."""
        given, q_block = self._inputs(inputs), checked_block(q_block)
        key = _TileKey(q_block, 1)
        if has_heads(given):
            rows = self._tiles_of(key, given, None)
        else:
            lookups = lookups_of_rows(given) if given else [Lookup()]
            rows = [self._find(key, lookup, None, tell_full=False) for lookup in lookups]
        per_row = [[(self._tensor(tiles.q_blks), self._tensor(tiles.kv_blks)) for tiles in row] for row in rows]
        num_q_blocks = -(-self.bound.sizes.q_len // q_block)
        counts = torch.stack(
            [torch.stack([torch.bincount(q, minlength=num_q_blocks) for q, _ in groups]) for groups in per_row]
        )
        width = int(counts.max()) if counts.numel() else 0
        if counts.numel() * width > MAX_GATHERED:
            message = f"{counts.numel() * width:,} gather indices are above the limit of {MAX_GATHERED:,}"
            raise input_error("E504", message, "use block_mask(), whose cost follows tiles and not keys")
        indices = torch.full((*counts.shape, width), -1, device=self.device)
        starts = counts.cumsum(-1) - counts
        for row, groups in enumerate(per_row):
            for group, (q_blks, keys) in enumerate(groups):
                place = torch.arange(len(keys), device=self.device) - starts[row, group, q_blks]
                indices[row, group, q_blks, place] = keys
        if len(self.bound.groups) > 1 and not has_heads(given):
            group_of = {head: at for at, group in enumerate(self.bound.groups) for head in group.heads}
            order = [group_of[head] for head in range(self.bound.num_heads)]
            indices, counts = indices[:, order], counts[:, order]
        if num_rows_of(given) is None:
            indices, counts = indices[0], counts[0]
        return GatherIndices(indices, counts)

    def _find(
        self, key: _TileKey, lookup: Lookup, on_event: OnEvent | None, tell_full: bool = True
    ) -> tuple[Tiles, ...]:
        groups = self.bound.groups
        return tuple(self._found(key, group.relation, lookup, on_event, tell_full=tell_full) for group in groups)

    def _found(
        self,
        key: _TileKey,
        relation: Relation,
        lookup: Lookup,
        on_event: OnEvent | None = None,
        *,
        tell_full: bool = True,
    ) -> Tiles:
        blocks, sizes = (key.q_block, key.kv_block), self.bound.sizes
        return find_tiles(relation, sizes, lookup, *blocks, tell_full=tell_full, on_event=on_event)

    def _group_of(self, head: int) -> HeadGroup:
        return next(group for group in self.bound.groups if head in group.heads)

    # ---- decoding -------------------------------------------------------------------------------------------

    def row(self, q: int, head: int = 0, inputs: Inputs | None = None) -> Tensor:
        """int64 [num_keys]: the ascending keys of one query, an absolute position; found without a mask or tiles.

        Work: O(keys x log kv_len). Raises InputError: E406 for a query or head that is not there, E502 for inputs of
        more than one batch row.
        """
        sizes, num_heads = self.bound.sizes, self.bound.num_heads
        at, number = integer(q), integer(head)
        for name, found, given, start, length in (
            ("query", at, q, sizes.q_start, sizes.q_len),
            ("head", number, head, 0, num_heads),
        ):
            if found is None or not start <= found < start + length:
                help = f"give an integer in {start}..{start + length}"
                raise input_error("E406", f"there is no {name} {given!r}", help)
        assert at is not None
        assert number is not None
        lookup = self._host_lookup(inputs, number)
        return self._tensor(row_keys(self._group_of(number).relation, sizes, lookup, at))

    def cache_plan(self, inputs: Inputs | None = None) -> tuple[CachePlan, ...]:
        """Which keys a decoder keeps, in which slots, until when: one plan per head group, see `analysis.cache`.

        Raises PatternError (E505) where a query attends a later key, and InputError (E502) for inputs of more than one
        batch row.
        """
        self._refuse("cache plans", None)
        lookup = self._host_lookup(inputs)
        plans = []
        for group in self.bound.groups:
            plan_or_not = cache_plan(group, self.bound.sizes, lookup)
            if isinstance(plan_or_not, NotDecodable):
                raise _cannot_decode(plan_or_not, self.bound)
            plans.append(plan_or_not)
        return tuple(plans)

    def _host_lookup(self, inputs: Inputs | None, head: int | None = None) -> Lookup:
        """The inputs of a head as NumPy arrays; one line at a time is faster on the host."""
        given = self._inputs(inputs)
        if not given:
            return self._static_lookup
        num_rows = num_rows_of(given)
        if num_rows not in (None, 1):
            raise input_error("E502", f"inputs of {num_rows} batch rows", "give those of one row: rows may differ")
        if has_heads(given):
            if head is None:
                raise input_error("E502", "inputs that differ from head to head", "give those of one head")
            given = folded(given, (head,), 1)
        return Lookup({name: values.reshape(-1).cpu().numpy() for name, values in given.items()})

    @cached_property
    def _static_lookup(self) -> Lookup:
        """For patterns without inputs; it keeps what was drawn."""
        return Lookup()

    # ---- attention ------------------------------------------------------------------------------------------

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        return_labels: Literal[True],
    ) -> tuple[Any, ...]: ...

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        return_labels: bool = False,
        **others: object,
    ) -> Tensor | tuple[Any, ...]:
        """Sparse attention, differentiable.

        query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], Hq a multiple of Hkv; float32, bfloat16,
        float16, or float64. scale defaults to D ** -0.5. Returns [B, Hq, Tq, Dv] in the inputs' dtype, and with
        return_lse the log-sum-exp [B, Hq, Tq] in float32 (float64 for float64). An empty row yields 0 and -inf, with
        gradient 0. Labels and selections that `inputs` leaves out are found from queries and keys; with return_labels
        the last that is returned are all of them by name, as `inputs` takes them. Under autocast the three are cast
        as for scaled_dot_product_attention. Work: O(live tiles x D). Raises InputError (E501, E502, E503, E505).
        """
        check_no_others(others)
        query, key, value = as_autocast(query), as_autocast(key), as_autocast(value)
        if return_lse and self.bound.merge == "mean":
            message = "a mean of several softmaxes has no log-sum-exp"
            raise input_error("E505", message, "leave return_lse out, or take `merge: multiset`")
        if return_labels:
            inputs = self.with_found(query, key, inputs)
        output: Tensor
        lse: Tensor | None
        if torch.compiler.is_compiling():
            output, lse = ops.traced(query, key, value, inputs, self._address, scale, want_lse=return_lse)
        else:
            train = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
            output, lse = self.attend(query, key, value, inputs, scale, train=train, want_lse=return_lse)
        results: tuple[Any, ...] = (output, lse) if return_lse else (output,)
        if return_labels:
            given = inputs or {}
            results += ({shape.name: given[shape.name] for shape in self.bound.found},)
        return results if len(results) > 1 else output

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        inputs: Inputs | None,
        scale: float | None,
        *,
        train: bool,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and lse, eagerly; lse may be None where it is not wanted. train: whether a backward pass follows."""
        check_tensors(query, key, value, self.bound, self.device)
        given = self.given(query, key, value, inputs)
        return self.run(query, key, value, given, checked_scale(scale, query.shape[-1]), train=train, want_lse=want_lse)

    def given(self, query: Tensor, key: Tensor, value: Tensor, inputs: Inputs | None) -> dict[str, Tensor]:
        """The inputs of a call, checked, with what learners and selectors find; the labels among these in narrow
        integers where only their order is asked for, see `Ordered`."""
        on_kernels = self.on_kernels(query, key, value)
        is_ordered, is_told = isinstance(on_kernels, Ordered), isinstance(on_kernels, Telling)
        if is_ordered and inputs is None and self._finds_all:  # and what we found needs no check
            labels = self._labels(key, self.bound.inputs)
            return {name: x for shape in self.bound.inputs for name, x in by_round(shape, labels[shape.name]).items()}
        lists = [shape.name for shape in self.bound.inputs if shape.selection is not None]
        found, named = self._with_found(query, key, inputs), inputs if isinstance(inputs, Mapping) else {}
        ours = [shape for shape in self.bound.inputs if is_told or shape.name not in named]
        return checked_inputs(
            self.bound,
            found,
            self.device,
            query.shape[0],
            narrow=[shape.name for shape in ours if is_ordered and shape.selection is None],
            unchanged=[shape.name for shape in ours if shape.selection is not None],
            whole=lists if isinstance(on_kernels, Slotted) else (),
        )

    @cached_property
    def _finds_all(self) -> bool:
        """Whether a call finds all that the pattern reads, from its keys."""
        return all(shape.learner is not None and shape.found_by == "call" for shape in self.bound.inputs)

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: dict[str, Tensor],
        scale: float,
        *,
        train: bool,
        want_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` of what was checked."""
        hold(self)
        query, scale = with_positive_scale(query, scale)
        on_kernels = self.on_kernels(query, key, value)
        if on_kernels is not None:
            return on_kernels(query, key, value, given, scale)
        in_chunks = self.in_chunks(query, key, value)
        if in_chunks is not None:
            return in_chunks(query, key, value, given, scale)
        if self.runs_as_parts(given):
            return self._parts.run(query, key, value, given, scale, train=train, want_lse=want_lse)
        match self.backend_for(query, key, value, train=train):
            case "oracle":
                output, lse = oracle.attend(query, key, value, self.dense(given), scale)
                return output.to(query.dtype), lse if query.dtype == torch.float64 else lse.float()
            case "flex":
                mask = self._block_mask(128, given)
                if self._flex is None:
                    self._flex = flex.compiled_flex()
                return flex.flex(self._flex, query, key, value, mask, scale=scale, want_lse=want_lse)
            case "planned":
                return self.planned(train=train)(query, key, value, scale)
            case "masked":
                return self.masked(query, key, value, given, scale)
            case "triton":
                return self.kernels(query, key, value, given, scale)
            case _:
                return gathered_attention(query, key, value, self.groups(given), scale=scale)

    def runs_as_parts(self, given: dict[str, Tensor]) -> bool:
        """Whether programs of parts run in its place. Generated kernels take heads whose inputs differ as they are."""
        return self._parts.are_needed(given) and not (self.bound.is_plain and self.backend == "triton")

    @cached_property
    def _parts(self) -> Parts:
        """What the pattern is composed of, each part a program that runs the same way."""

        def program_of(bound: Bound) -> Program:
            return Program(bound, self.text, self.device, self._asked, self._choice, self._constants_asked)

        return Parts(self.bound, program_of, takes_routes=self._asked not in ("oracle", "gathered", "triton"))

    def _refuse(self, what: str, given: dict[str, Tensor] | None) -> None:
        """Raises InputError (E505) where the relation is not all there is, or heads differ by inputs."""
        if given is not None and has_heads(given):
            raise input_error("E505", f"{what} of inputs that differ from head to head", "use mask()")
        if self.bound.fallback is not None:
            raise input_error("E505", f"{what} know no `fallback`", "use mask(), or leave the fallback out")
        if self.bound.merge != "set":
            raise input_error("E505", f"{what} hold each key once, and this is a multiset", "leave `merge` out")

    # ---- labels ---------------------------------------------------------------------------------------------

    def labels(self, key: Tensor) -> dict[str, Tensor]:
        """What learners say of key [B, Hkv, Tk, D]: int64 [B, heads, Tk], or [B, heads, rounds, Tk], by name.

        Query heads that share a key head share its labels. Without gradient. Learners that have a state, and labels
        that are given, are left out. Raises InputError (E505) where queries stand behind the last key.
        """
        return _wide(self._labels(key, self.bound.found))

    def selections(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """What selectors list for query [B, heads, Tq, D] of key [B, Hkv, Tk, D]: int64 [B, heads or 1, rows, width],
        by name; see `learn.topk`. Selections that layers or the caller make are left out."""
        return self._selections(query, key, self.bound.found)

    def _selections(self, query: Tensor, key: Tensor, shapes: Iterable[InputShape]) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for shape in shapes:
            if shape.selection is not None and shape.found_by == "call":
                found[shape.name] = topk_on(self.device)(query, key, shape.selection, self.bound.sizes.q_start)
        return found

    def _labels(self, key: Tensor, shapes: Iterable[InputShape]) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for shape in shapes:
            if shape.found_by != "call" or shape.learner is None:
                continue
            if shape.length != key.shape[2]:
                message = (
                    f"`{shape.name}` is found from keys, and there are {key.shape[2]} for {shape.length} positions"
                )
                raise input_error("E505", message, f'pass inputs={{"{shape.name}": ...}}')
            settings, heads = dict(shape.learner.settings), self.bound.num_heads
            found[shape.name] = labels_of_heads(key, settings, heads, hash_keys=hash_on(self.device))
        return found

    def with_found(self, query: Tensor, key: Tensor, inputs: Inputs | None) -> Inputs | None:
        """The inputs with what learners and selectors find, in int64, unless the caller says it."""
        found = self._with_found(query, key, inputs)
        if found is None or found is inputs:
            return inputs
        return {name: x if inputs and name in inputs else x.to(torch.int64) for name, x in found.items()}

    def _with_found(self, query: Tensor, key: Tensor, inputs: Inputs | None) -> Inputs | None:
        """The same in integers of any width."""
        if not (inputs is None or isinstance(inputs, Mapping)):
            return inputs  # which is refused where inputs are checked
        given = dict(inputs or {})
        missing = [shape for shape in self.bound.found if shape.name not in given]
        if not missing:
            return inputs
        return self._labels(key, missing) | self._selections(query, key, missing) | given

    def backend_for(self, query: Tensor, key: Tensor, value: Tensor, *, train: bool) -> str:
        """What runs these tensors. Chosen by rule, a backend leaves what it cannot do to another one, asked for it
        refuses that (InputError, E505): see `lower.fallback`."""
        says_itself = self.backend == "flex" and not self._chosen_by_rule  # what it refuses
        if self.backend not in ("flex", "planned", "masked", "triton") or says_itself:
            return self.backend
        rule = _left_by(self.backend, self.device.type, query, key, value)
        if rule is not None:
            if self._chosen_by_rule:
                return rule.to
            raise input_error(
                "E505", f"the {self.backend} backend does not take {rule.when}", f"use backend={rule.to!r}"
            )
        if not self._chosen_by_rule:
            return self.backend
        if self.backend == "planned" and not self.planned(train=train).takes(query, key, value):
            return FALLBACK
        if self.backend == "masked" and self.device.type == "cpu" and not is_finite(query, key, value):
            return FALLBACK
        return self.backend

    @cached_property
    def constants(self) -> Constants:
        """The machine that plans are made for, and where its constants come from."""
        return self._constants or constants_for(self.device)

    def explain(self, *, head_dim: int = 64, train: bool = False, on_event: OnEvent | None = None) -> Explanation:
        """The plan pass by pass with predicted times, the ways that were rejected, and when another backend runs.

        `str()` shows the plan for inference, or the one for training; `to_dict()` is all of it for JSON. head_dim: of
        the predictions; the plan itself is the one that runs, made for heads of 64.
        """
        head_dim = counted("head_dim", head_dim, 1, MAX_SIZE)
        if "plan" not in self.__dict__ and not self.bound.inputs:
            self.plan = self._made_plan(on_event)
        title = " ".join(self.text.rpartition("\nattend: ")[2].split())  # a spec ends with its expression
        return explanation(
            self.bound,
            title,
            None if self.bound.inputs else self.plan,
            self._static_lookup,
            constants=self.constants,
            device_type=self.device.type,
            backend=self.backend,
            is_by_rule=self._chosen_by_rule,
            head_dim=head_dim,
            train=train,
        )

    @cached_property
    def plan(self) -> Plan:
        """The passes that the planned backend runs, and the ways that were rejected; for patterns without inputs."""
        if self.bound.inputs:
            help = "its tiles depend on each call's inputs; use backend='gathered' or 'flex'"
            raise input_error("E505", "a pattern that reads inputs has no plan", help)
        return self._made_plan(None)

    def _made_plan(self, on_event: OnEvent | None) -> Plan:
        machine, lookup = self.constants.machine, self._static_lookup
        return make_plan(self.bound, lookup, machine, choice=self._choice, on_event=on_event)

    @cached_property
    def hulls(self) -> tuple[Hull, ...] | None:
        """Where a pattern with inputs can have pairs, whatever they are: see `lower.hulls`."""
        return hulls(self.bound, self.constants.machine)

    @cached_property
    def masked(self) -> Masked | Placed:
        """The hulls made ready. Raises InputError (E505) where there are none."""
        if self.hulls is None:
            help = "use backend='gathered', which finds tiles in each call"
            raise input_error("E505", "without its inputs the pattern could hold most pairs", help)
        if self.device.type != "cpu":
            return Placed(self.hulls, self.bound, self.device)
        return Masked(self.hulls, self.bound.num_heads, self.bound.sizes, self.device)

    def on_kernels(self, query: Tensor, key: Tensor, value: Tensor) -> Ordered | Telling | Slotted | None:
        """What runs these tensors in the place of all else where kernels take positions in the orders of a call, tiles
        that a call tells, or what it lists."""
        if self._on_kernels is None or _left_by("triton", self.device.type, query, key, value) is not None:
            return None
        return self._on_kernels

    @cached_property
    def _on_kernels(self) -> Ordered | Telling | Slotted | None:
        fallback = self.bound.fallback
        if self._asked not in ("auto", "masked") or not has_kernels(self.device):
            return None
        if can_tell(self.bound):
            return Telling(self.bound, self.device)
        if fallback is not None and not is_own_key(fallback):
            return None
        listed = slot_hulls(self.bound, self.constants.machine)
        if listed is not None:
            return Slotted(listed, self.bound, self.device)
        found = ordered_hulls(self.bound, self.constants.machine)
        return None if found is None else Ordered(found, self.bound, self.device)

    def in_chunks(self, query: Tensor, key: Tensor, value: Tensor) -> Chunked | None:
        """What runs these tensors on a CPU where the pattern is chunks in the orders of a call."""
        if self._in_chunks is None or _left_by("masked", self.device.type, query, key, value) is not None:
            return None
        return self._in_chunks if is_finite(query, key, value) else None

    @cached_property
    def _in_chunks(self) -> Chunked | None:
        if self._asked not in ("auto", "masked") or self.device.type != "cpu" or not self.bound.inputs:
            return None
        return Chunked.of(self.bound, self.constants.machine)

    @cached_property
    def kernels(self) -> Kernels:
        """The whole pattern over its tiles, on kernels of our own."""
        return Kernels(self.bound, self.device, lambda q, k, given: self._tiles_of(_TileKey(q, k), given, None))

    def planned(self, *, train: bool) -> Planned:
        """The passes made ready, for training or for inference."""
        return self._training if train else self._inference

    @cached_property
    def _inference(self) -> Planned:
        return Planned(passes_of(self.plan.forward), self.device, self._lengths)

    @cached_property
    def _training(self) -> Planned:
        plan = self.plan
        if plan.training == plan.forward:
            return self._inference
        return Planned(passes_of(plan.training), self.device, self._lengths)

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.bound.sizes.q_len, self.bound.sizes.kv_len

    def groups(self, given: dict[str, Tensor]) -> tuple[Group, ...]:
        """Batch rows and heads that share tiles, as the gathered backend takes them."""
        if not given:
            if self._static_groups is None:
                tiles = self._gather_tiles(self._static_lookup)
                self._static_groups = tuple(groups_of_row(self.bound, tiles, given, None, self.device))
            return self._static_groups
        rows = list(enumerate(lookups_of_rows(given)))
        return tuple(
            group
            for row, lookup in rows
            for group in groups_of_row(
                self.bound, self._gather_tiles(lookup), given, row if len(rows) > 1 else None, self.device
            )
        )

    def _gather_tiles(self, lookup: Lookup) -> tuple[Tiles, ...]:
        """The tiles that the gathered backend runs on; those of a pattern without inputs are found once."""
        if self._gathered is not None and not self.bound.inputs:
            return self._gathered
        found = tuple(gather_tiles(group.relation, self.bound.sizes, lookup) for group in self.bound.groups)
        if not self.bound.inputs:
            self._gathered = found
        return found

    # ---- data -----------------------------------------------------------------------------------------------

    def _inputs(self, inputs: Inputs | None) -> dict[str, Tensor]:
        return checked_inputs(self.bound, inputs, self.device)

    def _device_data(self, given: dict[str, Tensor]) -> DeviceData:
        if given:
            return device_data(self.bound.relation, self.bound.num_heads, given, self.device)
        if self._data is None:
            self._data = device_data(self.bound.relation, self.bound.num_heads, {}, self.device)
        return self._data

    def _tensor(self, array: object) -> Tensor:
        return torch.as_tensor(array, device=self.device)

    def save(self, path: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the plan as safetensors: the passes that run, or the tiles, and the canonical text in the metadata.
        See `load_program`.

        Raises PatternError (E602) where the file exists, unless overwrite, or cannot be written.
        """
        if not isinstance(path, str | PathLike):
            raise input_error("E602", f"a plan is written to a path, not {type(path).__name__}", "give a file's name")
        bound = self.bound
        has_passes = self.backend == "planned" and not bound.inputs
        stored = StoredPlan(
            self.text,
            bound.sizes,
            bound.num_heads,
            bound.layer,
            self.device.type,
            "auto" if self._chosen_by_rule else self.backend,
            chosen(self.plan) if has_passes else (),
            () if has_passes or bound.inputs else self._gather_tiles(Lookup()),
        )
        write_plan(stored, path, overwrite=overwrite)

    def adopt(self, stored: StoredPlan) -> None:
        """Takes what a plan of the same pattern and device holds instead of finding it again."""
        if stored.tiles:
            self._gathered = stored.tiles
        if stored.options and stored.device_type == self.device.type:
            self.plan = Plan(self.constants.machine, stored.options)


def _wide(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: label.to(torch.int64) for name, label in labels.items()}


def _left_by(backend: str, device_type: str, query: Tensor, key: Tensor, value: Tensor) -> Rule | None:
    """The rule by which the backend leaves a call to another one."""
    is_empty = not (query.numel() and key.numel() and value.numel())
    return _rule(backend, device_type, query.dtype, query.shape[-1], value.shape[-1], is_empty)


@lru_cache(maxsize=256)
def _rule(
    backend: str, device_type: str, dtype: torch.dtype, head_dim: int, value_dim: int, is_empty: bool
) -> Rule | None:
    return leaves(backend, device_type, Call(str(dtype).removeprefix("torch."), head_dim, value_dim, is_empty))


def _cannot_decode(found: NotDecodable, bound: Bound) -> PatternError:
    start, stop = found.decodable_from, bound.sizes.q_start + bound.sizes.q_len
    heads = f" in head {found.heads[0]}" if len(bound.groups) > 1 else ""
    message = f"query {found.q} attends key {found.k}, a later one{heads}: the pattern cannot be decoded token by token"
    help = "add `causal &`"
    if start < stop:
        help += f", or compile with q_start={start}: from there on no query looks ahead, what is before is prefilled"
    return error("E505", message, None, help)
