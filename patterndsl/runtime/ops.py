"""How does attention run inside torch.compile? As one operator, patterndsl::attend, that no compiler looks into.

A graph knows a program, or a pattern whose programs are found by the sizes of each call, by its address: a string. So
it compiles once for all lengths. Eager calls do not pass here. Backward is an operator too, from output and
log-sum-exp; what a block-sparse pass on CUDA keeps for it in eager mode, it computes again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, autocast

from patterndsl.diagnostics import input_error
from patterndsl.runtime import flex
from patterndsl.runtime.arguments import checked_scale, with_positive_scale
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.function import Attends, Run, attended
from patterndsl.runtime.merge import wide
from patterndsl.runtime.operators import apart, by_name

MAX_KEPT = 64


class Call(NamedTuple):
    """What a call asks for beside the tensors. n: -1 where the pattern's N is the number of queries."""

    layer: int = 0
    q_start: int = 0
    n: int = -1


class Callee(Attends, Protocol):
    """What is asked of a program by graphs."""

    def given(self, query: Tensor, key: Tensor, value: Tensor, inputs: Inputs | None) -> dict[str, Tensor]:
        """The inputs of a call, checked, with what is found."""
        ...

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
        """Output and lse, eagerly; lse may be None where it is not wanted."""
        ...


Find: TypeAlias = Callable[[str, Tensor, Tensor, Call], Callee]

finders: dict[str, Find] = {}
"""By the kind of an address, the part before the first colon, what finds the program of the rest."""

T = TypeVar("T")


class Living(Generic[T]):
    """What graphs know by a number, valid as long as somebody holds it; the last MAX_KEPT that graphs have run are
    held here."""

    def __init__(self) -> None:
        self._numbers = count()
        self._living: WeakValueDictionary[str, T] = WeakValueDictionary()
        self._kept: OrderedDict[str, T] = OrderedDict()

    def add(self, program: T) -> str:
        """Its number."""
        number = str(next(self._numbers))
        self._living[number] = program
        return number

    def find(self, number: str) -> T:
        """What has the number. Raises InputError (E505) where it is gone."""
        program = self._living.get(number)
        if program is None:
            help = "hold it as long as the compiled function, or call patterndsl.attention"
            raise input_error("E505", "the program that was compiled into this function is gone", help)
        self._kept[number] = program
        self._kept.move_to_end(number)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return program


_programs: Living[Callee] = Living()


def register(program: Callee) -> str:
    """The address of a program."""
    return f"program:{_programs.add(program)}"


finders["program"] = lambda number, *_: _programs.find(number)


def traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Inputs | None,
    address: str,
    scale: float | None,
    call: Call = Call(),  # noqa: B008 - it is frozen
    *,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and lse as a node of a graph; see `Program.__call__`. To be called while torch.compile traces."""
    given, names = apart(inputs)
    train = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    found: tuple[Tensor, Tensor] = torch.ops.patterndsl.attend(
        query, key, value, given, names, address, *call, scale, train, want_lse
    )
    return found


# ---- the operators

_ASKED = "Tensor[] inputs, str names, str address, SymInt layer, SymInt q_start, SymInt n, float? scale"
_attend_schema = f"(Tensor query, Tensor key, Tensor value, {_ASKED}, bool train, bool want_lse) -> (Tensor, Tensor)"
_backward_schema = (
    "(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse, "
    f"{_ASKED}) -> (Tensor, Tensor, Tensor)"
)


def _program(address: str, query: Tensor, key: Tensor, call: Call) -> Callee:
    kind, _, rest = address.partition(":")
    return finders[kind](rest, query, key, call)


@torch.library.custom_op("patterndsl::attend", mutates_args=(), schema=_attend_schema)
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inputs: Sequence[Tensor],
    names: str,
    address: str,
    layer: int,
    q_start: int,
    n: int,
    scale: float | None,
    train: bool,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output and lse of a program, in their usual order in memory; lse is of NaN where it is neither known nor asked
    for."""
    program = _program(address, query, key, Call(layer, q_start, n))
    given = by_name(inputs, names)
    with autocast(query.device.type, enabled=False):
        out, lse = program.attend(query, key, value, given, scale, train=train, want_lse=want_lse)
    if lse is None:
        lse = torch.full(query.shape[:3], torch.nan, dtype=wide(query.dtype), device=query.device)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("patterndsl::attend_backward", mutates_args=(), schema=_backward_schema)
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Sequence[Tensor],
    names: str,
    address: str,
    layer: int,
    q_start: int,
    n: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    program = _program(address, query, key, Call(layer, q_start, n))
    given = by_name(inputs, names)
    with autocast(query.device.type, enabled=False):
        grads = _gradients(program, (query, key, value), given, scale, (out, lse), (grad_out, grad_lse))
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _gradients(
    program: Callee,
    tensors: tuple[Tensor, Tensor, Tensor],
    inputs: Inputs | None,
    scale: float | None,
    results: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, ...]:
    query, key, value = tensors
    given, scale = program.given(query, key, value, inputs), checked_scale(scale, query.shape[-1])
    asked, positive = with_positive_scale(query, scale)
    run = program.attending(asked, key, value, given, positive, train=True, want_lse=True)
    if isinstance(run, Run) and asked is query:
        return run.gradients(*tensors, *results, *grads)
    with flex.with_derivatives():  # it runs again, and PyTorch records it
        leaves = [x.detach().requires_grad_() for x in tensors]
        found = attended(with_positive_scale(leaves[0], scale)[0], leaves[1], leaves[2], run)
    wanted = [(x, grad.to(x.dtype)) for x, grad in zip(found, grads, strict=True) if x is not None and grad is not None]
    return torch.autograd.grad([x for x, _ in wanted], leaves, [grad for _, grad in wanted])


# ---- what the compiler and autograd know of them


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty(*rows, value.shape[3]), query.new_empty(rows, dtype=wide(query.dtype))


@attend_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    grads = [x.new_empty(x.shape) for x in (query, key, value)]
    return grads[0], grads[1], grads[2]


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, given, *rest = inputs
    ctx.asked, ctx.num_inputs = rest[:-2], len(given)
    ctx.set_materialize_grads(False)  # most callers use no lse, and its gradient costs
    ctx.save_for_backward(query, key, value, *output, *given)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *given = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.patterndsl.attend_backward(query, key, value, out, lse, grad_out, grad_lse, given, *ctx.asked)
    return *grads, [None] * ctx.num_inputs, *(None,) * (len(ctx.asked) + 2)


def _no_second(ctx: Any, *_: Any) -> Any:
    raise input_error("E505", "second derivatives of compiled attention", "use backend='oracle' without torch.compile")


attend.register_autograd(_backward, setup_context=_keep_for_backward)
attend_backward.register_autograd(_no_second)
