"""How does who was chosen run? Each runner is made ready when it is first asked for, and then makes calls ready."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.lower.choice import NO_HULLS, NO_PLAN, Choice, Runner
from patterndsl.lower.plan import Plan, passes_of
from patterndsl.lower.plan import plan as make_plan
from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime import flex, gathered, oracle
from patterndsl.runtime.chunked import Chunked
from patterndsl.runtime.function import Attending, Recorded
from patterndsl.runtime.heads import rows_of
from patterndsl.runtime.kernels.attention import Kernels
from patterndsl.runtime.masked import Masked
from patterndsl.runtime.ordered import Ordered
from patterndsl.runtime.parts import Part, Parts
from patterndsl.runtime.placed import Placed
from patterndsl.runtime.planned import Planned
from patterndsl.runtime.routed import Routed
from patterndsl.runtime.slotted import Slotted
from patterndsl.runtime.telling import Telling
from patterndsl.runtime.tilings import Tilings
from patterndsl.sema.bind import Bound


class Ready:
    """The runners of a pattern on a device. plan_number: the way that was asked for; program_of: makes the program of a
    part."""

    def __init__(
        self,
        bound: Bound,
        device: torch.device,
        choice: Choice,
        tilings: Tilings,
        plan_number: int | None,
        program_of: Callable[[Bound], Part],
    ) -> None:
        self.bound, self.device, self.choice, self.tilings = bound, device, choice, tilings
        self._plan_number = plan_number
        self.parts = Parts(bound, program_of, takes_routes=choice.takes_routes)

    def attending(
        self,
        who: Runner,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        given: dict[str, Tensor],
        scale: float,
        *,
        train: bool,
        want_lse: bool,
    ) -> Attending:
        """A call with checked tensors and inputs. train: whether a backward pass follows."""
        match who:
            case "told" | "slotted" | "ordered" | "chunked" | "routed":
                return self.by_inputs.run(query, key, value, given, scale)
            case "parts":
                how: dict[str, Any] = {"given": given, "scale": scale, "train": train, "want_lse": want_lse}
                return Recorded(partial(self.parts.run, **how))
            case "planned":
                return self.planned(train=train).run(query, key, value, scale)
            case "masked":
                return self.masked.run(query, key, value, given, scale)
            case "triton":
                return self.kernels.run(query, key, value, given, scale)
            case "flex":
                mask = self.tilings.block_mask(128, given)
                return Recorded(partial(flex.flex, self._flex, mask=mask, scale=scale, want_lse=want_lse))
            case "gathered":
                return gathered.run_of(self.tilings.groups(given), scale)
            case "oracle":
                sizes = self.bound.sizes
                positions = torch.arange(sizes.q_start, sizes.q_start + sizes.q_len, device=self.device)
                keep = oracle.membership_rows(self.bound, self.tilings.data(given), positions, rows_of(given))
                return Recorded(partial(oracle.rounded, keep=keep, scale=scale))

    def must_be_finite(self, who: Runner, *, train: bool) -> bool:
        """Whether what a pass masks is multiplied by 0, so that NaN and infinity spread."""
        return who in ("masked", "chunked", "routed") or (who == "planned" and self.planned(train=train).must_be_finite)

    # ---- plans

    @cached_property
    def plan(self) -> Plan:
        """The passes of the planned backend. Raises InputError (E505) where the pattern reads inputs."""
        if self.bound.inputs:
            raise input_error("E505", NO_PLAN.message, NO_PLAN.help)
        return self.find_plan(None)

    def find_plan(self, on_event: OnEvent | None) -> Plan:
        """The plan, found again. Raises InputError (E406) where there is none of the number that was asked for."""
        machine, lookup, number = self.choice.machine, self.tilings.lookup, self._plan_number
        found = make_plan(self.bound, lookup, machine, choice=number, on_event=on_event)
        if number is not None and number >= found.num_choices:
            raise input_error("E406", f"there is no plan {number}", f"give an integer in 0..{found.num_choices}")
        return found

    # ---- runners

    @cached_property
    def by_inputs(self) -> Telling | Slotted | Ordered | Chunked | Routed:
        """What runs `Choice.by_inputs`."""
        choice = self.choice
        if choice.by_inputs == "told":
            return Telling(self.bound, self.device)
        if choice.by_inputs == "slotted":
            assert choice.slots is not None
            return Slotted(choice.slots, self.bound, self.device)
        if choice.by_inputs == "chunked":
            assert choice.chunks is not None
            return Chunked(choice.chunks, self.bound)
        if choice.by_inputs == "routed":
            assert choice.routes is not None
            return Routed(choice.routes, self.bound)
        assert choice.ordered is not None
        return Ordered(choice.ordered, self.bound, self.device)

    @cached_property
    def masked(self) -> Masked | Placed:
        """The hulls. Raises InputError (E505) where there are none."""
        hulls = self.choice.hulls
        if hulls is None:
            raise input_error("E505", NO_HULLS.message, NO_HULLS.help)
        if self.device.type != "cpu":
            return Placed(hulls, self.bound, self.device)
        return Masked(hulls, self.bound.num_heads, self.bound.sizes, self.device)

    @cached_property
    def kernels(self) -> Kernels:
        """The whole pattern over its tiles, on kernels of our own."""
        tiles_of = self.tilings.of
        return Kernels(self.bound, self.device, lambda q_block, kv_block, given: tiles_of((q_block, kv_block), given))

    def planned(self, *, train: bool) -> Planned:
        """The passes of the plan, for training or for inference."""
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

    @cached_property
    def _flex(self) -> flex.Attend:
        return flex.compiled_flex()
