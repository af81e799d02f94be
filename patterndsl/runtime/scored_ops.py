"""How do scores that are more than products run inside torch.compile? As one operator, patterndsl::scored.

What `ops` is to plain patterns, this is to terms of a branch with a bias, a cap or made scores. The tensors that have
gradients are one list: query, key, value, those of the tables, and made scores. Backward runs the term again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, autocast

from patterndsl.runtime.data import Inputs
from patterndsl.runtime.merge import wide
from patterndsl.runtime.operators import apart, by_name, gradients_again, in_places, like_wanted, no_second
from patterndsl.runtime.ops import Call
from patterndsl.runtime.scored import Table, kind_of, table_of, tensors_of
from patterndsl.runtime.scored_term import ScoredTerm
from patterndsl.source.sequence import Keys

Find: TypeAlias = Callable[[str, Tensor, Tensor, Call], ScoredTerm]

finders: dict[str, Find] = {}
"""As `ops.finders`, of terms."""


def traced(
    query: Tensor,
    keys: Keys,
    inputs: Inputs | None,
    tables: Mapping[str, Table],
    made: Tensor | None,
    address: str,
    scale: float | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """Output and lse as a node of a graph; see `ScoredTerm.attend`. To be called while torch.compile traces."""
    given, names = apart(inputs)
    tensors = [query, *keys, *(x for table in tables.values() for x in tensors_of(table))]
    found: tuple[Tensor, Tensor] = torch.ops.patterndsl.scored(
        tensors if made is None else [*tensors, made],
        given,
        names,
        ",".join(f"{name}:{kind_of(table)}" for name, table in tables.items()),
        address,
        *call,
        scale,
    )
    return found


# ---- the operators

_ASKED = "Tensor[] inputs, str names, str tables, str address, SymInt layer, SymInt q_start, SymInt n, float? scale"
_schema = f"(Tensor[] tensors, {_ASKED}) -> (Tensor, Tensor)"
_backward_schema = f"(Tensor[] tensors, bool[] wanted, Tensor? grad_out, Tensor? grad_lse, {_ASKED}) -> Tensor[]"


def _run(
    tensors: Sequence[Tensor],
    inputs: Sequence[Tensor],
    names: str,
    tables: str,
    address: str,
    layer: int,
    q_start: int,
    n: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    query, key, value = tensors[:3]
    rest = tensors[3:]
    kind, _, where = address.partition(":")
    found = finders[kind](where, query, key, Call(layer, q_start, n))
    looked_up = dict[str, Table]()
    for named in tables.split(",") if tables else ():
        name, _, form = named.partition(":")
        looked_up[name], rest = table_of(form, rest)
    made = rest[0] if rest else None
    with autocast(query.device.type, enabled=False):
        return found.attend(query, (key, value), by_name(inputs, names), looked_up, made, scale)


@torch.library.custom_op("patterndsl::scored", mutates_args=(), schema=_schema)
def scored(tensors: Sequence[Tensor], *asked: Any) -> tuple[Tensor, Tensor]:
    """Output and lse of a term, in their usual order in memory."""
    with torch.no_grad():
        out, lse = _run(tensors, *asked)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("patterndsl::scored_backward", mutates_args=(), schema=_backward_schema)
def scored_backward(
    tensors: Sequence[Tensor], wanted: Sequence[bool], grad_out: Tensor | None, grad_lse: Tensor | None, *asked: Any
) -> list[Tensor]:
    """Gradients of the wanted tensors; made scores are no products, so that query and key may have no part in them."""
    return gradients_again(lambda leaves: _run(leaves, *asked), tensors, wanted, (grad_out, grad_lse))


# ---- what the compiler and autograd know of them


@scored.register_fake
def _(tensors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    query, value = tensors[0], tensors[2]
    rows = query.shape[:3]
    return query.new_empty(*rows, value.shape[3]), query.new_empty(rows, dtype=wide(query.dtype))


@scored_backward.register_fake
def _(tensors: Sequence[Tensor], wanted: Sequence[bool], *_: Any) -> list[Tensor]:
    return like_wanted(tensors, wanted)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, given, ctx.asked = inputs[0], inputs[1], inputs[2:]
    ctx.num_tensors = len(tensors)
    ctx.wanted = [x.requires_grad for x in tensors]
    ctx.set_materialize_grads(False)  # most callers use no lse, and its gradient costs
    ctx.save_for_backward(*tensors, *given)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    tensors, given = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
    found = torch.ops.patterndsl.scored_backward(tensors, ctx.wanted, grad_out, grad_lse, given, *ctx.asked)
    return in_places(found, ctx.wanted), [None] * len(given), *(None,) * len(ctx.asked)


scored.register_autograd(_backward, setup_context=_keep_for_backward)
scored_backward.register_autograd(no_second)
