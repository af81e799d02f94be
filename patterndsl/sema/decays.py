"""By what factor does a weight decay with each token? A real number of head and layer, for each head of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from patterndsl.diagnostics import error
from patterndsl.ir.index import HEAD, LAYER, Const, Index, Param, Read, Var
from patterndsl.ir.meaning import Point
from patterndsl.ir.real import Entry, OfIndex, Real, RealFunction, parts, put_index, real_value
from patterndsl.ir.relation import subexpressions, substitute_index
from patterndsl.sema.model import Resolved, ScoreDeclaration
from patterndsl.sema.parameters import param_values, put_size, self_sizes


def is_of_heads(real: Real) -> bool:
    """Whether it asks for no position, length, input or table."""
    for part in parts(real):
        if isinstance(part, Entry):
            return False
        if isinstance(part, OfIndex):
            asked = [leaf for leaf in subexpressions(part.index) if isinstance(leaf, Var | Read)]
            if any(leaf not in (HEAD, LAYER) for leaf in asked):
                return False
    return True


def decays(score: ScoreDeclaration, resolved: Resolved, num_heads: int, layer: int) -> tuple[float, ...] | None:
    """The factor of each head, parameters at their defaults for one token; None where weights do not decay.

    Raises PatternError: E402 where a factor is not above 0 and at most 1, E4xx where parameters have no value.
    """
    if score.decay is None:
        return None
    sizes = self_sizes(resolved, 1)
    values = param_values(resolved, {}, sizes)
    lists: dict[str, tuple[Index, ...]] = {
        name: tuple(map(Const, value)) for name, value in values.items() if isinstance(value, tuple)
    }

    def factor(head: int) -> float:
        def put(symbol: Var | Param) -> Index:
            return Const(head) if symbol == HEAD else put_size(symbol, sizes, values, layer)

        assert score.decay is not None
        return _number(put_index(score.decay, lambda index: substitute_index(index, put, lists)))

    found = tuple(map(factor, range(num_heads)))
    for head, value in enumerate(found):
        if not 0 < value <= 1:
            message = f"`decay` of head {head} in layer {layer} is {value:.6g}, and must be above 0 and at most 1"
            raise error("E402", message, score.place, "write the factor of one token, such as exp(-1 / 2 ** head)")
    return found


def _number(real: Real) -> float:
    """The value of a real number whose integers are constants; NaN where it has none."""
    try:
        value = real_value(real, Point(0, 0, 0, _NoData()), _Floats())
    except (ArithmeticError, ValueError):
        return math.nan
    return math.nan if isinstance(value, complex) else float(value)


class _Floats:
    """Python's numbers; see `ir.real.Numbers`."""

    def number(self, integers: Any) -> float:
        return float(integers)

    def call(self, name: RealFunction, arguments: tuple[Any, ...]) -> Any:
        functions: dict[RealFunction, Callable[..., Any]] = {
            "floor": math.floor,
            "log": math.log,
            "exp": math.exp,
            "sqrt": math.sqrt,
            "abs": abs,
            "min": min,
            "max": max,
        }
        # min and max of one number are that number
        return arguments[0] if len(arguments) == 1 and name in ("min", "max") else functions[name](*arguments)

    def entry(self, table: str, at: Any) -> Any:
        raise AssertionError(f"a decay that looks up `{table}`")


class _NoData:
    """A decay reads no inputs; see `ir.meaning.Data`."""

    def read(self, name: str, facet: str, index: Any) -> Any:
        raise AssertionError(f"a decay that reads `{name}`")

    def lists(self, node: object, row: Any, key: Any) -> Any:
        raise AssertionError("a decay that reads lists")

    def drawn(self, node: object, head: Any, q: Any) -> Any:
        raise AssertionError("a decay that draws keys")
