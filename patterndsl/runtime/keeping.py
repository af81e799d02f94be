"""What does a decoder ask of a pattern? The keys of one query, and which keys it keeps, until when.

Both are found on the host, a line of inputs at a time, without a mask or tiles.
"""

from __future__ import annotations

from patterndsl.analysis.cache import CachePlan, NotDecodable, cache_plan
from patterndsl.diagnostics import PatternError, error, input_error
from patterndsl.lower.lookup import Array, Lookup
from patterndsl.lower.row import row_keys
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.heads import folded, has_heads, num_rows_of
from patterndsl.sema.bind import Bound
from patterndsl.sema.parameters import integer


def checked_place(bound: Bound, q: object, head: object) -> tuple[int, int]:
    """A query's absolute position and a head. Raises InputError (E406) where there is none such."""
    found = integer(q), integer(head)
    bounds = (("query", q, bound.sizes.q_start, bound.sizes.q_len), ("head", head, 0, bound.num_heads))
    for number, (name, given, start, length) in zip(found, bounds, strict=True):
        if number is None or not start <= number < start + length:
            help = f"give an integer in {start}..{start + length}"
            raise input_error("E406", f"there is no {name} {given!r}", help)
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


def keys_of_row(bound: Bound, lookup: Lookup, q: int, head: int) -> Array:
    """The ascending keys of one query."""
    relation = next(group.relation for group in bound.groups if head in group.heads)
    return row_keys(relation, bound.sizes, lookup, q)


def cache_plans(bound: Bound, lookup: Lookup) -> tuple[CachePlan, ...]:
    """The plan of each head group. Raises PatternError (E505) where a query attends a later key."""
    plans = []
    for group in bound.groups:
        found = cache_plan(group, bound.sizes, lookup)
        if isinstance(found, NotDecodable):
            raise _cannot_decode(found, bound)
        plans.append(found)
    return tuple(plans)


def on_host(given: Inputs, head: int | None = None) -> Lookup:
    """Checked inputs, of a head, as NumPy arrays. Raises InputError (E502) where they are of several rows, or differ
    from head to head and no head is named."""
    num_rows = num_rows_of(given)
    if num_rows not in (None, 1):
        raise input_error("E502", f"inputs of {num_rows} batch rows", "give those of one row: rows may differ")
    if has_heads(given):
        if head is None:
            raise input_error("E502", "inputs that differ from head to head", "give those of one head")
        given = folded(given, (head,), 1)
    return Lookup({name: values.reshape(-1).cpu().numpy() for name, values in given.items()})


def _cannot_decode(found: NotDecodable, bound: Bound) -> PatternError:
    start, stop = found.decodable_from, bound.sizes.q_start + bound.sizes.q_len
    heads = f" in head {found.heads[0]}" if len(bound.groups) > 1 else ""
    message = f"query {found.q} attends key {found.k}, a later one{heads}: the pattern cannot be decoded token by token"
    help = "add `causal &`"
    if start < stop:
        help += f", or compile with q_start={start}: from there on no query looks ahead, what is before is prefilled"
    return error("E505", message, None, help)
