"""What does a call look up? Its inputs, checked, with the labels and lists that learners and selectors find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.learn.lsh import labels_of_heads
from patterndsl.lower.choice import ByInputs
from patterndsl.runtime.chosen import hash_on, topk_on
from patterndsl.runtime.data import Inputs, by_round, checked_inputs
from patterndsl.sema.bind import Bound, InputShape


class Finds:
    """What is found in the calls of a pattern on a device."""

    def __init__(self, bound: Bound, device: torch.device) -> None:
        self.bound, self.device = bound, device

    def given(self, query: Tensor, key: Tensor, inputs: Inputs | None, who: ByInputs | None) -> dict[str, Tensor]:
        """The inputs of a call, checked, with what is found; the labels among these in narrow integers where only their
        order is asked for, see `Ordered`. who: the kernels that run it."""
        shapes = self.bound.inputs
        if who == "ordered" and inputs is None and self._finds_all:  # and what we found needs no check
            labels = self.labels(key, shapes)
            return {name: x for shape in shapes for name, x in by_round(shape, labels[shape.name]).items()}
        lists = [shape.name for shape in shapes if shape.selection is not None]
        found, named = self.with_found(query, key, inputs), inputs if isinstance(inputs, Mapping) else {}
        ours = [shape for shape in shapes if who == "told" or shape.name not in named]
        return checked_inputs(
            self.bound,
            found,
            self.device,
            query.shape[0],
            narrow=[shape.name for shape in ours if who == "ordered" and shape.selection is None],
            unchanged=[shape.name for shape in ours if shape.selection is not None],
            whole=lists if who in ("slotted", "routed") else (),
        )

    @cached_property
    def _finds_all(self) -> bool:
        """Whether a call finds all that the pattern reads, from its keys."""
        return all(shape.learner is not None and shape.found_by == "call" for shape in self.bound.inputs)

    def with_found(self, query: Tensor, key: Tensor, inputs: Inputs | None) -> Inputs | None:
        """The inputs with what learners and selectors find, in integers of any width, unless the caller says it."""
        if not (inputs is None or isinstance(inputs, Mapping)):
            return inputs  # which is refused where inputs are checked
        given = dict(inputs or {})
        missing = [shape for shape in self.bound.found if shape.name not in given]
        if not missing:
            return inputs
        return self.labels(key, missing) | self.selections(query, key, missing) | given

    def labels(self, key: Tensor, shapes: Iterable[InputShape]) -> dict[str, Tensor]:
        """What learners say of keys [B, Hkv, Tk, D]; see `Program.labels`."""
        found: dict[str, Tensor] = {}
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

    def selections(self, query: Tensor, key: Tensor, shapes: Iterable[InputShape]) -> dict[str, Tensor]:
        """What selectors list for queries [B, heads, Tq, D]; see `Program.selections`."""
        found: dict[str, Tensor] = {}
        for shape in shapes:
            if shape.selection is not None and shape.found_by == "call":
                found[shape.name] = topk_on(self.device)(query, key, shape.selection, self.bound.sizes.q_start)
        return found
