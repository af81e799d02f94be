"""What are the lengths and parameters worth? Sizes as the caller gives them, and parameters evaluated at them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex, TypeAlias, cast

from patterndsl.diagnostics import PatternError, error, input_error, nearest
from patterndsl.ir.index import Const, Index, Param, Var
from patterndsl.ir.relation import substitute_index
from patterndsl.sema.model import ParamDeclaration, Resolved

MAX_SIZE = 2**40
MAX_HEADS = 2**16
MAX_LAYER = 2**20
MAX_VALUE = 2**62

ParamValue: TypeAlias = SupportsIndex | Iterable[SupportsIndex]
"""An integer, or integers in a row, of any library."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Queries are the positions [q_start, q_start + q_len) of a sequence of `total`; keys are [0, kv_len)."""

    q_len: int
    kv_len: int
    q_start: int
    total: int


def integer(value: object) -> int | None:
    """The value as an int if it is an integer, of whatever library; truth values and arrays are none."""
    if type(value) is int:  # nearly always, and the protocol below is slow to ask
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or getattr(value, "ndim", None):
        return None
    if str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # what holds a float may promise an index as well
        return None


def integers(values: object) -> tuple[int, ...] | None:
    """Integers in a row, as a tuple; None where it is something else."""
    in_a_row = isinstance(values, Sequence) or getattr(values, "ndim", None) == 1
    if not in_a_row or not isinstance(values, Iterable) or isinstance(values, str | bytes):
        return None
    found = tuple(map(integer, values))
    return None if None in found else cast("tuple[int, ...]", found)


def shown_integer(value: int) -> str:
    """The number as a message can hold it; Python itself refuses to write numbers of thousands of digits."""
    return str(value) if abs(value) < 2**80 else "beyond 80 bits"


def counted(name: str, value: object, least: int, most: int) -> int:
    """The value as an int in [least, most]. Raises InputError (E406)."""
    found = integer(value)
    if found is not None and least <= found <= most:
        return found
    help = f"give an integer from {least} to {most if most < 2**20 else f'2^{most.bit_length() - 1}'}"
    shown = f"{name} must be an integer, not {type(value).__name__}"
    raise input_error("E406", shown if found is None else f"{name} is {shown_integer(found)}", help)


def sizes_of(n: int | None, q_len: int | None, kv_len: int | None, q_start: int) -> Sizes:
    """Sizes from what the caller gave: `n` alone for self-attention, or the lengths of both sides.

    N in the pattern is `n` where given, else q_start + q_len: a slice of queries sees the pattern of the whole
    sequence. Raises InputError (E406) where the lengths contradict each other.
    """
    n, q_len, kv_len = (
        None if given is None else counted(name, given, 0, MAX_SIZE)
        for name, given in (("n", n), ("q_len", q_len), ("kv_len", kv_len))
    )
    q_start = counted("q_start", q_start, 0, MAX_SIZE)
    if n is None and q_len is None:
        raise input_error("E406", "no length is given", "give n=, or q_len= and kv_len=")
    total = n if n is not None else counted("q_start + q_len", q_start + (q_len or 0), 0, MAX_SIZE)
    if q_len is None and q_start > total:
        raise input_error("E406", f"q_start is {q_start}, behind a sequence of {total}", "lower q_start, or raise n")
    q_len = total - q_start if q_len is None else q_len
    kv_len = total if kv_len is None else kv_len
    if q_start + q_len > total:
        message = f"queries {q_start} to {q_start + q_len} do not lie in a sequence of {total}"
        raise input_error("E406", message, "lower q_start or q_len, or raise n")
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


def self_sizes(resolved: Resolved, n: int, overrides: Mapping[str, ParamValue] | None = None) -> Sizes:
    """The sizes of a self-attention: as many keys as positions, unless the pattern says how many there are.

    Raises PatternError (E4xx) where parameters do not fit the length.
    """
    sizes = sizes_of(n, None, None, 0)
    if resolved.num_keys is None:
        return sizes
    num_keys = sized(resolved.num_keys, sizes, param_values(resolved, overrides or {}, sizes))
    return replace(sizes, kv_len=counted("keys", num_keys, 0, MAX_SIZE))


def unknown_parameter(name: str, known: Mapping[str, object]) -> PatternError:
    """What to say to a parameter that the pattern has not."""
    near = nearest(name, known)
    listed = f"the parameters are {', '.join(known)}" if known else "the pattern has none"
    return error("E401", f"unknown parameter `{name}`", None, f"did you mean `{near}`?" if near else listed)


def checked_override(param: ParamDeclaration, value: ParamValue) -> int | tuple[int, ...]:
    """The value, if the parameter can have it. Raises PatternError (E402)."""
    number, listed = integer(value), integers(value)
    if number is None and listed is None:
        raise error("E402", f"parameter `{param.name}` must be whole numbers", param.place, "give integers")
    if listed == ():
        raise error("E402", f"parameter `{param.name}` is an empty list", param.place, "give one integer or more")
    if (number is None) != isinstance(param.default, tuple) and param.default is not None:
        wanted = "a list" if isinstance(param.default, tuple) else "one integer"
        raise error("E402", f"parameter `{param.name}` is {wanted}", param.place, f"give it as {wanted}")
    return number if number is not None else listed or ()


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
        raise too_small(param, smallest, least)


def too_small(param: ParamDeclaration, value: int, least: int) -> PatternError:
    """What to say to a value below the declared minimum."""
    message = f"parameter `{param.name}` is {value}, and must be at least {least}"
    return error("E402", message, param.place, f"give {param.name}={least} or more")


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
