"""What does one call compute? Attention over lists of work, and its gradients, each from tensors to tensors.

Blocks follow from the tensors. Triton is imported here, when the first call comes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from patterndsl.lower.blocks import Blocks, Pipeline, Role
from patterndsl.runtime.kernels.asked import Asked
from patterndsl.runtime.kernels.lists import WorkLists
from patterndsl.runtime.kernels.shapes import blocks_for
from patterndsl.runtime.kernels.told_lists import ToldLists
from patterndsl.runtime.kernels.work import Work

QUERIES: Role = "queries"
KEYS: Role = "keys"


def forward(
    lists: WorkLists | ToldLists,
    asked: Asked,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
    *,
    goes_on: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and lse, as `launch.forward` has them. into: where they are written; goes_on: whether they are merged with
    what is there. scale: above 0, see `arguments.with_positive_scale`."""
    from patterndsl.runtime.kernels.launch import forward as launched

    beside = () if into is None else into[:1]
    blocks = blocks_for("forward", lists, query, key, value, *beside, ordered=asked.orders is not None)
    return launched(query, key, value, lists.rows(blocks), blocks, asked, scale, into, goes_on=goes_on)


def gradients(
    lists: WorkLists | ToldLists,
    asked: Asked,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    adds: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value, from the output and lse of all keys. into: where they are written; adds: whether
    those of queries, and those of keys and values, are added to what is there."""
    from patterndsl.runtime.kernels.launch import gradient_of_queries, gradients_of_keys

    beside, is_ordered = (out, grad_out, *(into or ())), asked.orders is not None
    of_queries, of_keys = (
        blocks_for(role, lists, query, key, value, *beside, ordered=is_ordered) for role in (QUERIES, KEYS)
    )
    rows, tensors = lists.rows(of_queries), (query, key, value)
    into_query, into_keys = into and into[0], into and into[1:]
    grad_query, delta = gradient_of_queries(
        *tensors, out, lse, grad_out, grad_lse, rows, of_queries, asked, scale, into_query, adds=adds[0]
    )
    for turn, columns in enumerate(_columns(lists, asked, of_keys)):
        into_keys = gradients_of_keys(
            *(*tensors, lse, grad_out, delta, columns, of_keys, asked, scale, into_keys),
            turn=turn,
            adds=adds[1] or turn > 0,
        )
    assert into_keys is not None
    return grad_query, *into_keys


def _columns(lists: WorkLists | ToldLists, asked: Asked, blocks: Blocks | Pipeline) -> Iterator[Work]:
    """All query heads of a head of keys at once; where its keys stand by the order of each, one after the other."""
    has_turns = asked.orders is not None and asked.orders.is_of_heads and lists.kv_group > 1
    if not has_turns or isinstance(lists, ToldLists):
        yield lists.columns(blocks)
        return
    assert isinstance(blocks, Blocks), "orders are for Triton's kernels"
    for turn in range(lists.kv_group):
        yield lists.columns_of(blocks, turn)
