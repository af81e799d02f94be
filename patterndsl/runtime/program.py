"""What can be done with a pattern at given sizes? A Program: its mask, its tiles, its gather indices, its attention.

Each is a module of its own: `lower.choice` says who runs a call, `ready` makes that one ready, `tilings` has the tiles,
`finds` the labels and lists of a call, and `keeping` answers decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from os import PathLike
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from patterndsl.analysis.cache import CachePlan
from patterndsl.analysis.explain import Explanation, explanation
from patterndsl.device.graphs import hold
from patterndsl.diagnostics import input_error
from patterndsl.lower.choice import Choice, Refusal, Runner, Verdict
from patterndsl.lower.devices import Machine
from patterndsl.lower.fallback import Call
from patterndsl.lower.hulls import Hull
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.machine import Constants
from patterndsl.lower.plan import Plan
from patterndsl.lower.stored import chosen
from patterndsl.lower.tiles import OnEvent, Tiles
from patterndsl.runtime import ops, oracle
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
from patterndsl.runtime.constants import constants_for, given_constants
from patterndsl.runtime.data import Inputs, checked_inputs, route_by_route
from patterndsl.runtime.finds import Finds
from patterndsl.runtime.finite import is_finite
from patterndsl.runtime.function import Attending, attended, with_unchanged
from patterndsl.runtime.heads import has_heads, num_rows_of, rows_of
from patterndsl.runtime.keeping import cache_plans, checked_place, keys_of_row, on_host
from patterndsl.runtime.kernels.attention import check_can_run, has_kernels
from patterndsl.runtime.plan import StoredPlan
from patterndsl.runtime.plan import write as write_plan
from patterndsl.runtime.ready import Ready
from patterndsl.runtime.tilings import GatherIndices, Tilings
from patterndsl.sema.bind import Bound
from patterndsl.sema.parameters import MAX_SIZE, Sizes, counted


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
        self._asked, self._plan_number, self._machine = backend, choice, machine
        self._constants = None if machine is None else given_constants(machine, self.device)
        self.tilings = Tilings(bound, self.device)
        self._has_kernels = has_kernels(self.device)  # what graphs of torch.compile ask is known before
        self._finds = Finds(bound, self.device)
        self._address = ops.register(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by what it was made of: what it found is found again, and graphs know the copy apart."""
        made_of = self.bound, self.text, self.device, self._asked, self._plan_number, self._machine
        return type(self), made_of

    def __repr__(self) -> str:
        sizes = self.bound.sizes
        lengths = f"q_len={sizes.q_len}, kv_len={sizes.kv_len}, q_start={sizes.q_start}"
        return f"Program({lengths}, heads={self.bound.num_heads}, device={self.device}, backend={self.backend!r})"

    @property
    def backend(self) -> str:
        """What was asked for, or what `auto` means here."""
        return self.choice.backend

    @cached_property
    def choice(self) -> Choice:
        """Who runs it."""
        machine, kind = self.constants.machine, self.device.type
        return Choice(self.bound, machine, kind, self._asked, has_kernels=self._has_kernels)

    @cached_property
    def ready(self) -> Ready:
        """What runs it."""
        program_of = partial(  # that of a part, which runs the same way
            Program,
            text=self.text,
            device=self.device,
            backend=self._asked,
            choice=self._plan_number,
            machine=self._machine,
        )
        return Ready(self.bound, self.device, self.choice, self.tilings, self._plan_number, program_of)

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
        return self.ready.parts.averaged_counts(positions, given)

    def counted(self, positions: Tensor, given: dict[str, Tensor]) -> Tensor:
        """`counts` of checked positions and inputs, with a dimension for batch rows; bool where none counts twice."""
        if not self.bound.is_plain or has_heads(given):
            return self.ready.parts.counts(positions, given)
        return oracle.membership_rows(self.bound, self.tilings.data(given), positions, rows_of(given))

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
        blocks = checked_block(q_block), checked_block(q_block if kv_block is None else kv_block)
        return self.tilings.of(blocks, self._inputs(inputs), on_event)

    def block_mask(self, block: int = 128, inputs: Inputs | None = None) -> BlockMask:
        """FlexAttention's BlockMask, [batch or 1, heads or 1, ...], equal to create_block_mask's, without its N x N.

        Above flex.MAX_DENSE_BLOCKS blocks the index tensors hold live columns only: enough for flex_attention, not for
        `to_dense` and slicing.
        """
        given, block = self._inputs(inputs), checked_block(block)
        self._refuse_more("block masks")
        return self.tilings.block_mask(block, given)

    def gather_indices(self, q_block: int = 64, inputs: Inputs | None = None) -> GatherIndices:
        """The keys that each block of q_block queries needs. Raises InputError (E504) where there are too many."""
        given, q_block = self._inputs(inputs), checked_block(q_block)
        return self.tilings.gather_indices(q_block, given)

    # ---- decoding -------------------------------------------------------------------------------------------

    def row(self, q: int, head: int = 0, inputs: Inputs | None = None) -> Tensor:
        """int64 [num_keys]: the ascending keys of one query, an absolute position; found without a mask or tiles.

        Work: O(keys x log kv_len). Raises InputError: E406 for a query or head that is not there, E502 for inputs of
        more than one batch row.
        """
        place = checked_place(self.bound, q, head)
        lookup = self._on_host(inputs, place[1])
        return torch.as_tensor(keys_of_row(self.bound, lookup, *place), device=self.device)

    def cache_plan(self, inputs: Inputs | None = None) -> tuple[CachePlan, ...]:
        """Which keys a decoder keeps, in which slots, until when: one plan per head group, see `analysis.cache`.

        Raises PatternError (E505) where a query attends a later key, and InputError (E502) for inputs of more than one
        batch row.
        """
        self._refuse_more("cache plans")
        return cache_plans(self.bound, self._on_host(inputs))

    def _on_host(self, inputs: Inputs | None, head: int | None = None) -> Lookup:
        given = self._inputs(inputs)
        return on_host(given, head) if given else self.tilings.lookup

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
        hold(self)
        given = self.given(query, key, value, inputs)
        query, scale = with_positive_scale(query, checked_scale(scale, query.shape[-1]))
        made = self.attending(query, key, value, given, scale, train=train, want_lse=want_lse)
        return attended(query, key, value, made)

    def given(self, query: Tensor, key: Tensor, value: Tensor, inputs: Inputs | None) -> dict[str, Tensor]:
        """The inputs of a call, checked, with what learners and selectors find, as who runs it takes them."""
        if inputs is None and not self.bound.inputs:
            return {}
        return self._finds.given(query, key, inputs, self.choice.by_inputs_of(_call(query, key, value, by_head=False)))

    def attending(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: dict[str, Tensor],
        scale: float,
        *,
        train: bool,
        want_lse: bool,
    ) -> Attending:
        """How a call with checked tensors and inputs is attended, made ready."""
        who = self.who(query, key, value, given=given, train=train)
        if who != "routed" and self.choice.by_inputs == "routed":  # others take lists by the names of their routes
            given = route_by_route(self.bound, given)
        how: dict[str, Any] = {"train": train, "want_lse": want_lse}
        made = self.ready.attending(who, query, key, value, given, scale, **how)
        return with_unchanged(given, made) if train and given else made

    def who(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        given: Mapping[str, Tensor] | None = None,
        train: bool = False,
    ) -> Runner:
        """Who runs these tensors with these checked inputs. Raises InputError (E505) where the backend that was asked
        for does not."""
        found: Verdict | Refusal | Runner = self.choice.of(_call(query, key, value, by_head=has_heads(given or {})))
        if isinstance(found, Verdict):
            other = found.if_not_finite
            if other is None or not self.ready.must_be_finite(found.who, train=train) or is_finite(query, key, value):
                return found.who
            found = other
        if isinstance(found, Refusal):
            raise input_error("E505", found.message, found.help)
        return found

    def _refuse_more(self, what: str) -> None:
        """Raises InputError (E505) where the relation is not all there is."""
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
        return _wide(self._finds.labels(key, self.bound.found))

    def selections(self, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """What selectors list for query [B, heads, Tq, D] of key [B, Hkv, Tk, D]: int64 [B, heads or 1, rows, width],
        by name; see `learn.topk`. Selections that layers or the caller make are left out."""
        return self._finds.selections(query, key, self.bound.found)

    def with_found(self, query: Tensor, key: Tensor, inputs: Inputs | None) -> Inputs | None:
        """The inputs with what learners and selectors find, in int64, unless the caller says it."""
        found = self._finds.with_found(query, key, inputs)
        if found is None or found is inputs:
            return inputs
        return {name: x if inputs and name in inputs else x.to(torch.int64) for name, x in found.items()}

    # ---- plans ----------------------------------------------------------------------------------------------

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
        if "plan" not in self.ready.__dict__ and not self.bound.inputs:
            self.ready.plan = self.ready.find_plan(on_event)
        title = " ".join(self.text.rpartition("\nattend: ")[2].split())  # a spec ends with its expression
        return explanation(
            self.bound,
            title,
            None if self.bound.inputs else self.plan,
            self.tilings.lookup,
            constants=self.constants,
            choice=self.choice,
            head_dim=head_dim,
            train=train,
        )

    @property
    def plan(self) -> Plan:
        """The passes that the planned backend runs, and the ways that were rejected; for patterns without inputs."""
        return self.ready.plan

    @property
    def hulls(self) -> tuple[Hull, ...] | None:
        """Where a pattern with inputs can have pairs, whatever they are: see `lower.hulls`."""
        return self.choice.hulls

    def _inputs(self, inputs: Inputs | None) -> dict[str, Tensor]:
        return checked_inputs(self.bound, inputs, self.device)

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
            self._asked,
            chosen(self.plan) if has_passes else (),
            () if has_passes or bound.inputs else self.tilings.to_gather,
        )
        write_plan(stored, path, overwrite=overwrite)

    def adopt(self, stored: StoredPlan) -> None:
        """Takes what a plan of the same pattern and device holds instead of finding it again."""
        if stored.tiles:
            self.tilings.to_gather = stored.tiles
        if stored.options and stored.device_type == self.device.type:
            self.ready.plan = Plan(self.constants.machine, stored.options)


def _wide(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: label.to(torch.int64) for name, label in labels.items()}


def _call(query: Tensor, key: Tensor, value: Tensor, *, by_head: bool) -> Call:
    is_empty = not (query.numel() and key.numel() and value.numel())
    return _call_of(query.dtype, query.shape[-1], value.shape[-1], is_empty, by_head)


@lru_cache(maxsize=256)
def _call_of(dtype: torch.dtype, head_dim: int, value_dim: int, is_empty: bool, by_head: bool) -> Call:
    return Call(str(dtype).removeprefix("torch."), head_dim, value_dim, is_empty, by_head)
