"""How are inputs and tensors of some heads those of a call? Heads are taken out, and become batch rows and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patterndsl.device.graphs import remembered
from patterndsl.runtime.data import Inputs


def num_rows_of(given: Inputs) -> int | None:
    """Rows of batched inputs; None where no input has a batch dimension."""
    return max((values.shape[0] for values in given.values() if values.dim() > 1), default=None)


def rows_of(given: Inputs) -> int:
    """The same, where inputs of no batch dimension are one row for all."""
    found = num_rows_of(given)
    return 1 if found is None else found


def has_heads(given: Inputs) -> bool:
    """Whether some input differs from head to head."""
    return any(values.dim() == 3 for values in given.values())


def folded(given: Inputs, heads: Sequence[int], batch: int) -> dict[str, Tensor]:
    """The inputs of these heads of all batch rows, [batch * heads, length]; [length] or [1, length] where all agree."""
    found: dict[str, Tensor] = {}
    for name, values in given.items():
        if values.dim() == 3:
            mine = _of_heads(values, heads).expand(batch, -1, -1).flatten(0, 1)
        elif values.dim() == 2 and values.shape[0] > 1:
            mine = values.repeat_interleave(len(heads), 0)
        else:
            mine = values
        found[name] = mine
    return found


def only_heads(given: Inputs, heads: Sequence[int]) -> dict[str, Tensor]:
    """The inputs as these heads have them."""
    return {name: _of_heads(values, heads) if values.dim() == 3 else values for name, values in given.items()}


def _of_heads(values: Tensor, heads: Sequence[int]) -> Tensor:
    """Those of [rows, all heads, length]."""
    is_all = tuple(heads) == tuple(range(values.shape[1]))
    return values if is_all else values.index_select(1, _numbers(tuple(heads), values.device))


@remembered(256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, as a copy from the host waits for the device."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Some heads of query, key and value."""

    heads: tuple[int, ...]
    num_heads: int

    @property
    def is_all(self) -> bool:
        return self.heads == tuple(range(self.num_heads))

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, heads, T, D] each; query heads that share a key head each have a copy of it unless all heads are here."""
        if self.is_all:
            return query, key, value
        heads, again = _numbers(self.heads, query.device), query.shape[1] // key.shape[1]
        kv_heads = heads // again
        return query.index_select(1, heads), key.index_select(1, kv_heads), value.index_select(1, kv_heads)

    def rows(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B * heads, 1, T, D] each: heads as batch rows."""
        query, key, value = self.take(query, key, value)
        key, value = (for_each_query_head(x, query.shape[1]) for x in (key, value))
        q, k, v = (x.flatten(0, 1).unsqueeze(1) for x in (query, key, value))
        return q, k, v

    def unfold(self, x: Tensor, batch: int) -> Tensor:
        """[B, heads, ...] of [B * heads, 1, ...]."""
        return x.reshape(batch, len(self.heads), *x.shape[2:])


def for_each_query_head(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values [B, Hkv, T, D] with a copy for each query head that shares a key head, [B, num_heads, T, D];
    as they are where none do."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def assembled(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """[B, H, ...] of the parts of disjoint heads, [B, heads, ...] each."""
    if len(parts) == 1:
        return parts[0][1]
    order = [head for heads, _ in parts for head in heads]
    places = _numbers(tuple(sorted(range(len(order)), key=order.__getitem__)), parts[0][1].device)
    return torch.cat([x for _, x in parts], dim=1).index_select(1, places)
