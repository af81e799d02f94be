"""How do scores that are more than products run inside torch.compile? As one operator, patterndsl::scored.

What `ops` is to plain patterns, this is to terms of a branch with a bias, a cap or made scores. The tensors that have
gradients are one list: query, key, value, those of the tables, and made scores. Backward runs the term again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, autocast

from patterndsl.diagnostics import input_error
from patterndsl.runtime import flex
from patterndsl.runtime.data import Inputs
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
    given = inputs or {}
    names = sorted(given)
    tensors = [query, *keys, *(x for table in tables.values() for x in tensors_of(table))]
    found: tuple[Tensor, Tensor] = torch.ops.patterndsl.scored(
        tensors if made is None else [*tensors, made],
        [given[name] for name in names],
        ",".join(names),
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
    given = dict(zip(names.split(","), inputs, strict=True)) if names else None
    with autocast(query.device.type, enabled=False):
        return found.attend(query, (key, value), given, looked_up, made, scale)


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
    """Gradients of the wanted tensors."""
    with flex.with_derivatives():
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(tensors, wanted, strict=True)]
        results = _run(leaves, *asked)
        pairs = zip(results, (grad_out, grad_lse), strict=True)
        given = [(x, grad) for x, grad in pairs if grad is not None and x.requires_grad]
        asked_of = [x for x in leaves if x.requires_grad]
        # made scores are no products: query and key have no part in them
        found = torch.autograd.grad(
            [x for x, _ in given], asked_of, [grad for _, grad in given], allow_unused=True, materialize_grads=True
        )
    return [grad.contiguous() for grad in found]


# ---- what the compiler and autograd know of them


@scored.register_fake
def _(tensors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    query, value = tensors[0], tensors[2]
    rows = query.shape[:3]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*rows, value.shape[3]), query.new_empty(rows, dtype=wide)


@scored_backward.register_fake
def _(tensors: Sequence[Tensor], wanted: Sequence[bool], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, given, ctx.asked = inputs[0], inputs[1], inputs[2:]
    ctx.num_tensors = len(tensors)
    ctx.wanted = [x.requires_grad for x in tensors]
    ctx.set_materialize_grads(False)  # most callers use no lse, and its gradient costs
    ctx.save_for_backward(*tensors, *given)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    tensors, given = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
    found = iter(torch.ops.patterndsl.scored_backward(tensors, ctx.wanted, grad_out, grad_lse, given, *ctx.asked))
    grads = [next(found) if is_wanted else None for is_wanted in ctx.wanted]
    return grads, [None] * len(given), *(None,) * len(ctx.asked)


def _no_second(ctx: Any, *_: Any) -> Any:
    raise input_error("E505", "second derivatives of compiled attention", "leave torch.compile out")


scored.register_autograd(_backward, setup_context=_keep_for_backward)
scored_backward.register_autograd(_no_second)
