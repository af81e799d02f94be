"""Who runs a pattern, and why? One answer for programs, which follow it, and for `explain`, which says it.

It follows from the pattern, the device, what was asked for, and what the tensors of a call are. Chosen by rule, a
backend leaves what it cannot do to another one, see `lower.fallback`; one that was asked for by name refuses that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, cast

from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import compare
from patterndsl.lower.chunks import may_be_chunks, only_chunks, route_hulls
from patterndsl.lower.devices import Machine
from patterndsl.lower.fallback import FALLBACK, NOT_FINITE, Backend, Call, Rule, leaves, rules_of, usual_backend
from patterndsl.lower.hulls import Hull, hulls, hulls_of_summands
from patterndsl.lower.kernel_hulls import SlotHulls, ordered_hulls, slot_hulls
from patterndsl.lower.listings import can_tell
from patterndsl.sema.bind import Bound

ByInputs: TypeAlias = Literal["told", "slotted", "ordered", "chunked", "routed"]
"""What takes a pattern that reads inputs as a whole. Generated kernels: on tiles that each call tells, with a slot for
each route that a query is in or block that it lists, in the orders by inputs. On a CPU: chunks in the orders by
inputs, routes whose results are averaged."""
Runner: TypeAlias = Backend | ByInputs | Literal["parts"]
"""A backend, what runs in its place, or programs of the parts of a pattern."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nobody runs it, and what helps."""

    message: str
    help: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who runs a call. rule: by which the backend leaves it to this one. if_not_finite: who may take its place for
    tensors with NaN or infinity, as only a look at the numbers says, or why nobody does."""

    who: Runner
    rule: Rule | None = None
    if_not_finite: Runner | Refusal | None = None


NO_PLAN = Refusal(
    "a pattern that reads inputs has no plan",
    "its tiles depend on each call's inputs; use backend='gathered' or 'flex'",
)
NO_HULLS = Refusal(
    "without its inputs the pattern could hold most pairs", "use backend='gathered', which finds tiles in each call"
)


class Choice:
    """Who runs a pattern on a kind of device. asked: a backend's name, or "auto"; has_kernels: whether generated ones
    run there without being asked for. What decides is found when it is first needed."""

    def __init__(self, bound: Bound, machine: Machine, device_type: str, asked: str, *, has_kernels: bool) -> None:
        self.bound, self.machine, self.device_type = bound, machine, device_type
        self.asked, self.has_kernels = asked, has_kernels
        self._known = dict[Call, Verdict | Refusal]()

    @property
    def is_by_rule(self) -> bool:
        """Whether nobody asked for a backend."""
        return self.asked == "auto"

    @cached_property
    def backend(self) -> Backend:
        """What was asked for, or what `auto` means here."""
        if not self.is_by_rule:
            return cast("Backend", self.asked)
        has_inputs = bool(self.bound.inputs)
        has_hulls = has_inputs and self.hulls is not None
        return usual_backend(self.device_type, has_inputs, len(self.bound.groups), has_hulls)

    @cached_property
    def by_inputs(self) -> ByInputs | None:
        """What runs in the place of all else, whatever heads or rows have inputs of their own; None where the pattern,
        the device or what was asked has none."""
        fallback = self.bound.fallback
        if self.asked not in ("auto", "masked"):
            return None
        if self.has_kernels and can_tell(self.bound):
            return "told"
        if fallback is not None and not is_own_key(fallback):
            return None
        if not self.has_kernels:
            return self._by_inputs_on_cpu if self.device_type == "cpu" else None
        if self.slots is not None:
            return "slotted"
        return None if self.ordered is None else "ordered"

    @property
    def _by_inputs_on_cpu(self) -> ByInputs | None:
        if self.chunks is not None:
            return "chunked"
        return None if self.routes is None else "routed"

    @property
    def usual(self) -> Runner:
        """Who runs what nothing is in the way of."""
        return self.by_inputs or self.backend

    @property
    def rules(self) -> Sequence[Rule]:
        """The calls that the backend leaves to others, or refuses."""
        return tuple(rules_of(self.backend, self.device_type))

    @cached_property
    def refusal(self) -> Refusal | None:
        """Why the backend that was asked for runs nothing, whatever the tensors are."""
        if self.backend == "planned" and self.bound.inputs:
            return NO_PLAN
        if self.backend == "masked" and self.by_inputs is None and self.bound.is_plain and self.hulls is None:
            return NO_HULLS
        return None

    @property
    def takes_routes(self) -> bool:
        """Whether all routes of a selection are one part of a pattern, and not a program each."""
        return self.asked not in ("oracle", "gathered", "triton")

    # ---- what decides

    @cached_property
    def hulls(self) -> tuple[Hull, ...] | None:
        """Where a pattern with inputs can have pairs, whatever they are."""
        return hulls(self.bound, self.machine)

    @cached_property
    def slots(self) -> SlotHulls | None:
        """Its lists as kernels with slots take them."""
        return slot_hulls(self.bound, self.machine)

    @cached_property
    def ordered(self) -> tuple[Hull, ...] | None:
        """Its hulls as kernels take them in the orders by inputs."""
        return ordered_hulls(self.bound, self.machine)

    @cached_property
    def chunks(self) -> tuple[Hull, ...] | None:
        """Its hulls where they are chunks in the orders by inputs: of each term of a multiset, and whatever the
        fallback."""
        if not may_be_chunks(self.bound):
            return None
        # those of a set are asked for again where they are no chunks
        return only_chunks(self.hulls if self.bound.merge == "set" else hulls_of_summands(self.bound, self.machine))

    @cached_property
    def routes(self) -> tuple[Hull, ...] | None:
        """Its lists where they are routes of few members each, and their results averaged."""
        return route_hulls(self.bound, self.machine)

    # ---- a call

    def by_inputs_of(self, call: Call) -> ByInputs | None:
        """`by_inputs` where that takes the call."""
        if self.by_inputs is None or leaves("triton" if self.has_kernels else "masked", self.device_type, call):
            return None
        return self.by_inputs

    def of(self, call: Call) -> Verdict | Refusal:
        """Who runs a call; found once for each kind of call."""
        if call not in self._known:
            self._known[call] = self._of(call)
        return self._known[call]

    def _of(self, call: Call) -> Verdict | Refusal:
        by_inputs, backend = self.by_inputs_of(call), self.backend
        # kernels of a whole pattern take heads whose inputs differ as they are
        in_parts = not self.bound.is_plain or (call.by_head and backend != "triton")
        if by_inputs is not None:
            return Verdict(
                by_inputs, None, None if self.has_kernels else self._careful("parts" if in_parts else FALLBACK)
            )
        if in_parts:
            return Verdict("parts")
        if self.refusal is not None:
            return self.refusal
        rule = leaves(backend, self.device_type, call)
        if rule is None:
            may_mask = self.device_type == "cpu" and backend in ("planned", "masked")
            return Verdict(backend, None, self._careful(FALLBACK) if may_mask else None)
        if self.is_by_rule:
            return Verdict(rule.to, rule)
        return self._refused(rule.when, rule.to)

    def _careful(self, other: Runner) -> Runner | Refusal:
        """What takes the place of passes that mask."""
        return other if self.is_by_rule else self._refused(NOT_FINITE, FALLBACK)

    def _refused(self, what: str, to: Backend) -> Refusal:
        return Refusal(f"the {self.backend} backend does not take {what}", f"use backend={to!r}")


def refusal_of_terms(runs: Collection[str], asked: str) -> Refusal | None:
    """Why terms do not run by the backend that was asked for, where none of them does. runs: how each runs, see
    `terms.Branch.runs`; those that are scored gather their tiles as "gathered" does, sums look at no pair."""
    if asked == "auto" or not runs or "planned" in runs or (asked == "gathered" and "scored" in runs):
        return None
    how = "scores that are more than products" if "scored" in runs else "sums of features"
    return Refusal(f"the {asked} backend does not take {how}", "leave the backend to `auto`")


def is_own_key(bound: Bound) -> bool:
    """Whether each query attends itself and nothing else."""
    is_square = bound.sizes.q_start == 0 and bound.sizes.q_len == bound.sizes.kv_len
    return is_square and bound.is_plain and bound.relation == compare("==", Q, K)
