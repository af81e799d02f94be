"""How does a program run on generated kernels? Its lists and its predicate are made ready, once where no input decides.

All heads and batch rows are in one launch of each kernel, whatever their tiles are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TypeAlias

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.ir.relation import Random
from patterndsl.lower.tiles import Tiles
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.function import Run, attended
from patterndsl.runtime.kernels.asked import Asked, asked_of, draws_for
from patterndsl.runtime.kernels.shapes import Blocks, Shapes, shapes_for
from patterndsl.runtime.kernels.work import Work, lists_of, transposed, work_of
from patterndsl.sema.bind import Bound

FindTiles: TypeAlias = Callable[[int, int, dict[str, Tensor]], Sequence[Sequence[Tiles]]]
"""Tiles of so many queries by so many keys for checked inputs, of each batch row, or one for all: of head groups, or
of heads."""


def check_can_run(device: torch.device) -> None:
    """Raises InputError (E505) where there is no Triton, or it has no such device."""
    if find_spec("triton") is None:
        raise input_error("E505", "the triton backend needs Triton, which is not installed", "use backend='auto'")
    from patterndsl.runtime.kernels.launch import is_interpreted

    if device.type != "cuda" and not is_interpreted():
        raise input_error("E505", f"the triton backend has no kernels for {device.type}", "compile for device='cuda'")


@dataclass(frozen=True, slots=True, eq=False)
class _Lists:
    """The work of one call's tiles, made when it is asked for."""

    find: Callable[[int, int], Sequence[Sequence[Tiles]]]
    bound: Bound
    kv_group: int
    device: torch.device
    made: dict[tuple[Blocks, bool], Work] = field(default_factory=dict)

    def rows(self, blocks: Blocks) -> Work:
        """Lists of keys for each block of queries."""
        return self._made(blocks, self._rows, is_transposed=False)

    def columns(self, blocks: Blocks) -> Work:
        """Lists of queries for each block of keys."""
        return self._made(blocks, self._columns, is_transposed=True)

    def _made(self, blocks: Blocks, make: Callable[..., Work], *, is_transposed: bool) -> Work:
        known = Blocks(blocks.q_block, blocks.kv_block, 0, 0), is_transposed
        if known not in self.made:
            self.made[known] = make(self.find(blocks.q_block, blocks.kv_block))
        return self.made[known]

    def _rows(self, rows: Sequence[Sequence[Tiles]]) -> Work:
        lists = []
        for row, found in enumerate(rows):
            heads = self._heads(found)
            for at, tiles in enumerate(found):
                places = [(row, head) for head, group in enumerate(heads) if group == at]
                lists.append((lists_of(tiles, self.bound.sizes.kv_len, self.device), places))
        return work_of(lists, is_shared=len(rows) == 1)

    def _columns(self, rows: Sequence[Sequence[Tiles]]) -> Work:
        lists = []
        for row, found in enumerate(rows):
            heads = self._heads(found)
            shared = dict[tuple[int, ...], list[tuple[int, int]]]()
            for kv_head in range(len(heads) // self.kv_group):
                mine = tuple(heads[kv_head * self.kv_group : (kv_head + 1) * self.kv_group])
                shared.setdefault(mine, []).append((row, kv_head))
            for groups, places in shared.items():
                lists.append((transposed([found[group] for group in groups], self.device), places))
        return work_of(lists, is_shared=len(rows) == 1)

    def _heads(self, found: Sequence[Tiles]) -> Sequence[int]:
        """Of each head, where its tiles are."""
        if len(found) == self.bound.num_heads:
            return range(len(found))
        group_of = {head: at for at, group in enumerate(self.bound.groups) for head in group.heads}
        return [group_of[head] for head in range(self.bound.num_heads)]


class Kernels:
    """A pattern made ready for generated kernels; call it with tensors and checked inputs.

    The relation may read inputs that differ from row to row and from head to head.
    """

    def __init__(self, bound: Bound, device: torch.device, find: FindTiles) -> None:
        self.bound, self.device, self.find = bound, device, find
        self._static = dict[int, _Lists]()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Tensor], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [B, Hq, Tq, Dv] in the inputs' dtype and lse [B, Hq, Tq] in float32; differentiable in both."""
        lists = self.lists(query.shape[1] // key.shape[1], given)
        forward = partial(self._forward, lists=lists, given=given, scale=scale)
        gradients = partial(self._gradients, lists=lists, given=given, scale=scale)
        return attended(query, key, value, Run("triton", forward, gradients))

    def gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        given: dict[str, Tensor],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of query, key and value, from what a forward pass gave."""
        lists = self.lists(query.shape[1] // key.shape[1], given)
        return self._gradients(query, key, value, out, lse, grad_out, grad_lse, lists, given, scale)

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, lists: _Lists, given: Inputs, scale: float
    ) -> tuple[Tensor, Tensor]:
        from patterndsl.runtime.kernels.launch import forward

        query, scale = _positive(query, scale)
        blocks = self.shapes(query, value).forward
        return forward(query, key, value, lists.rows(blocks), blocks, self._asked(given), scale)

    def _gradients(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        lists: _Lists,
        given: Inputs,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from patterndsl.runtime.kernels.launch import gradient_of_queries, gradients_of_keys

        shapes, asked = self.shapes(query, value), self._asked(given)
        work = lists.rows(shapes.queries), lists.columns(shapes.keys)
        tensors = query, key, value
        grad_query, delta = gradient_of_queries(
            *tensors, out, lse, grad_out, grad_lse, work[0], shapes.queries, asked, scale
        )
        grad_key, grad_value = gradients_of_keys(*tensors, lse, grad_out, delta, work[1], shapes.keys, asked, scale)
        return grad_query, grad_key, grad_value

    def shapes(self, query: Tensor, value: Tensor) -> Shapes:
        return shapes_for(query.dtype, max(query.shape[3], value.shape[3]))

    def lists(self, kv_group: int, given: dict[str, Tensor]) -> _Lists:
        if given:
            return _Lists(lambda q, k: self.find(q, k, given), self.bound, kv_group, self.device)
        if kv_group not in self._static:
            self._static[kv_group] = _Lists(lambda q, k: self.find(q, k, {}), self.bound, kv_group, self.device)
        return self._static[kv_group]

    def _asked(self, given: Inputs) -> Asked:
        return asked_of(self.bound, given, self._draws)

    @cached_property
    def _draws(self) -> dict[Random, Tensor]:
        return draws_for(self.bound, self.device)


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0, for which the greatest score is the greatest product."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
