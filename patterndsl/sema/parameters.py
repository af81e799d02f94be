"""What are the lengths and parameters worth? Sizes as the caller gives them, and parameters evaluated at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from patterndsl.diagnostics import PatternError, error, nearest
from patterndsl.ir.index import Const, Index, Param, Var
from patterndsl.ir.relation import substitute_index
from patterndsl.sema.model import ParamDeclaration, Resolved

MAX_SIZE = 2**40

ParamValue: TypeAlias = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Queries are the positions [q_start, q_start + q_len) of a sequence of `total`; keys are [0, kv_len)."""

    q_len: int
    kv_len: int
    q_start: int
    total: int


def sizes_of(n: int | None, q_len: int | None, kv_len: int | None, q_start: int) -> Sizes:
    """Sizes from what the caller gave: `n` alone for self-attention, or the lengths of both sides.

    N in the pattern is `n` where given, else q_start + q_len: a slice of queries sees the pattern of the whole
    sequence. Raises PatternError (E406) where the lengths contradict each other.
    """
    for name, given in (("n", n), ("q_len", q_len), ("kv_len", kv_len), ("q_start", q_start)):
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            raise error("E406", f"{name} must be an integer, not {type(given).__name__}")
    if n is None and q_len is None:
        raise error("E406", "no length is given", None, "give n=, or q_len= and kv_len=")
    total = n if n is not None else q_start + (q_len or 0)
    if q_len is None:
        q_len = total - q_start
    if kv_len is None:
        kv_len = total
    for name, size in (("n", total), ("q_len", q_len), ("kv_len", kv_len), ("q_start", q_start)):
        if not 0 <= size <= MAX_SIZE:
            raise error("E406", f"{name} is {size}; it must be from 0 to 2^40")
    if q_start + q_len > total:
        message = f"queries {q_start} to {q_start + q_len} do not lie in a sequence of {total}"
        raise error("E406", message, None, "lower q_start or q_len, or raise n")
    return Sizes(q_len, kv_len, q_start, total)


def param_values(
    resolved: Resolved, overrides: Mapping[str, ParamValue], sizes: Sizes
) -> dict[str, int | tuple[int, ...]]:
    """The value of each parameter: overridden, or its default at these sizes. Raises PatternError (E401, E402)."""
    known = {param.name: param for param in resolved.params}
    for name in overrides:
        if name not in known:
            raise unknown_parameter(name, known)
    values: dict[str, int | tuple[int, ...]] = {}
    for param in resolved.params:
        if param.name in overrides:
            values[param.name] = checked_override(param, overrides[param.name])
        elif param.default is None:
            raise error("E402", f"parameter `{param.name}` has no value", param.place, f"give it: {param.name}=...")
        elif isinstance(param.default, tuple):
            values[param.name] = tuple(sized(item, sizes, values) for item in param.default)
        else:
            values[param.name] = sized(param.default, sizes, values)
        _check_minimum(param, values[param.name], sizes, values)
    return values


def unknown_parameter(name: str, known: Mapping[str, object]) -> PatternError:
    """What to say to a parameter that the pattern has not."""
    near = nearest(name, known)
    listed = f"the parameters are {', '.join(known)}" if known else "the pattern has none"
    return error("E401", f"unknown parameter `{name}`", None, f"did you mean `{near}`?" if near else listed)


def checked_override(param: ParamDeclaration, value: ParamValue) -> int | tuple[int, ...]:
    """The value, if the parameter can have it. Raises PatternError (E402)."""
    is_list = not isinstance(value, int)
    if is_list != isinstance(param.default, tuple) and param.default is not None:
        wanted = "a list" if isinstance(param.default, tuple) else "one integer"
        raise error("E402", f"parameter `{param.name}` is {wanted}", param.place, f"give it as {wanted}")
    values = tuple(value) if not isinstance(value, int) else (value,)
    if any(isinstance(item, bool) or not isinstance(item, int) for item in values) or not values:
        raise error("E402", f"parameter `{param.name}` must be whole numbers", param.place, "give integers")
    return values if is_list else values[0]


def _check_minimum(
    param: ParamDeclaration,
    value: int | tuple[int, ...],
    sizes: Sizes,
    values: Mapping[str, int | tuple[int, ...]],
) -> None:
    if param.minimum is None:
        return
    least = sized(param.minimum, sizes, values)
    smallest = min(value) if isinstance(value, tuple) else value
    if smallest < least:
        message = f"parameter `{param.name}` is {smallest}, and must be at least {least}"
        raise error("E402", message, param.place, f"give {param.name}={least} or more")


def sized(index: Index, sizes: Sizes, values: Mapping[str, int | tuple[int, ...]]) -> int:
    """An expression of lengths and parameters as a number."""

    def put(symbol: Var | Param) -> Index:
        return put_size(symbol, sizes, values, 0)

    lists: dict[str, tuple[Index, ...]] = {
        name: tuple(map(Const, value)) for name, value in values.items() if isinstance(value, tuple)
    }
    result = substitute_index(index, put, lists)
    assert isinstance(result, Const), f"{result} depends on more than sizes"
    return result.value


def put_size(symbol: Var | Param, sizes: Sizes, values: Mapping[str, int | tuple[int, ...]], layer: int) -> Index:
    """What stands for a symbol at these sizes; positions and heads stay."""
    if isinstance(symbol, Param):
        value = values[symbol.name]
        assert isinstance(value, int)
        return Const(value)
    match symbol.name:
        case "Nq":
            return Const(sizes.total)
        case "Nk":
            return Const(sizes.kv_len)
        case "layer":
            return Const(layer)
        case _:
            return symbol
