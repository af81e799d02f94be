"""How does a program run on generated kernels? Its lists and its predicate are made ready, once where no input decides.

All heads and batch rows are in one launch of each kernel, whatever their tiles are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.ir.relation import Random
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.function import Run
from patterndsl.runtime.heads import has_heads
from patterndsl.runtime.kernels.asked import Asked, asked_of, draws_for
from patterndsl.runtime.kernels.calls import forward, gradients
from patterndsl.runtime.kernels.lists import Found, WorkLists
from patterndsl.sema.bind import Bound

FindTiles: TypeAlias = Callable[[int, int, dict[str, Tensor]], Found]
"""Tiles of so many queries by so many keys for checked inputs: of head groups, or of heads where inputs differ so."""


def has_kernels(device: torch.device) -> bool:
    """Whether kernels run there without being asked for."""
    return device.type == "cuda" and find_spec("triton") is not None


def check_can_run(device: torch.device) -> None:
    """Raises InputError (E505) where there is no Triton, or it has no such device."""
    if find_spec("triton") is None:
        raise input_error("E505", "the triton backend needs Triton, which is not installed", "use backend='auto'")
    from patterndsl.runtime.kernels.launch import is_interpreted

    if device.type != "cuda" and not is_interpreted():
        raise input_error("E505", f"the triton backend has no kernels for {device.type}", "compile for device='cuda'")


class Kernels:
    """A pattern made ready for generated kernels. Its inputs may differ from row to row and from head to head."""

    def __init__(self, bound: Bound, device: torch.device, find: FindTiles) -> None:
        self.bound, self.device, self.find = bound, device, find
        self._static = dict[int, WorkLists]()

    def run(self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Tensor], scale: float) -> Run:
        """One call with checked inputs: output in the tensors' dtype, lse in float32."""
        lists, asked = self.lists(query.shape[1] // key.shape[1], given), self._asked(given)
        return Run("triton", partial(forward, lists, asked, scale), partial(gradients, lists, asked, scale))

    def lists(self, kv_group: int, given: dict[str, Tensor]) -> WorkLists:
        """The work over the tiles of these inputs."""
        if given:
            return self._lists(kv_group, given)
        if kv_group not in self._static:
            self._static[kv_group] = self._lists(kv_group, {})
        return self._static[kv_group]

    def _lists(self, kv_group: int, given: dict[str, Tensor]) -> WorkLists:
        def find(q_block: int, kv_block: int) -> Found:
            return self.find(q_block, kv_block, given)

        group_of = range(self.bound.num_heads) if has_heads(given) else self._group_of
        sizes, relations = self.bound.sizes, () if given else [group.relation for group in self.bound.groups]
        return WorkLists(
            find, group_of, kv_group, sizes.kv_len, self.device, is_kept=not given, relations=relations, sizes=sizes
        )

    @cached_property
    def _group_of(self) -> Sequence[int]:
        of_heads = {head: at for at, group in enumerate(self.bound.groups) for head in group.heads}
        return [of_heads[head] for head in range(self.bound.num_heads)]

    def _asked(self, given: Inputs) -> Asked:
        return asked_of(self.bound.relation, self.bound.sizes, given, self._draws) if given else self._static_asked

    @cached_property
    def _static_asked(self) -> Asked:
        return asked_of(self.bound.relation, self.bound.sizes, {}, self._draws)

    @cached_property
    def _draws(self) -> dict[Random, Tensor]:
        return draws_for(self.bound.relation, self.bound.num_heads, self.device)
