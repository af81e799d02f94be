"""How is a pattern counted that has another number of keys than queries? As a square one with fewer pairs."""

from __future__ import annotations

from dataclasses import replace

from patterndsl.ir.index import NK, NQ, Arithmetic, Const, Function, Index, K, Param, arithmetic
from patterndsl.ir.relation import EVERYTHING, NOTHING, Relation, compare, conjunction, disjunction, substitute
from patterndsl.sema.model import Resolved


def squared(resolved: Resolved) -> Resolved:
    """The same pairs among N queries and N keys, where there are never more than N: the keys after the last have none.

    Its formulas are in N alone. A pattern whose keys may be more stays as it is, and so does one with as many keys as a
    parameter says, which formulas have as a symbol of their own.
    """
    num_keys = resolved.num_keys
    if num_keys is None or isinstance(num_keys, Param) or not _is_at_most_n(num_keys):
        return resolved
    put: dict[Index, Index] = {NK: num_keys}
    relation = substitute(resolved.relation, lambda found: put.get(found, found))
    # that there are not fewer than none is checked at each length
    requirements = tuple(item for item in resolved.requirements if item.value != num_keys)
    whole = conjunction((_below(num_keys), relation))
    return replace(resolved, relation=whole, requirements=requirements, num_keys=None)


def _is_at_most_n(index: Index) -> bool:
    """Whether its form says so: N, the least of N and others, or something less divided."""
    match index:
        case Function("min", arguments):
            return any(map(_is_at_most_n, arguments))
        case Function("max", arguments):
            return all(map(_is_at_most_n, arguments))
        case Arithmetic("//", left, _):
            return _is_at_most_n(left)
        case Const(value):
            return value <= 0
        case _:
            return index == NQ


def _below(index: Index) -> Relation:
    """k < index, without the divisions that can be multiplied out: k < a // d is (k + 1) d <= a."""
    match index:
        case Function("min", arguments):
            return conjunction(map(_below, arguments))
        case Function("max", arguments):
            return disjunction(map(_below, arguments))
        case Arithmetic("//", left, right):
            return _at_least(left, arithmetic("*", arithmetic("+", K, Const(1)), right))
        case _:
            return EVERYTHING if index == NQ else compare("<", K, index)


def _at_least(index: Index, least: Index) -> Relation:
    """least <= index, of something that is at least 1."""
    match index:
        case Const(value) if value <= 0:
            return NOTHING
        case Function("min", arguments):
            return conjunction(_at_least(argument, least) for argument in arguments)
        case Function("max", arguments):
            return disjunction(_at_least(argument, least) for argument in arguments)
        case _:
            return compare("<=", least, index)
