"""Does a pattern fit any length? What is wrong with its constants is wrong at every length, and said without one."""

from __future__ import annotations

from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import HEAD, NK, Select
from patterndsl.ir.relation import indices
from patterndsl.sema.bind import bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_SIZE, param_values, self_sizes, sized

TRIED = (4096, 1024, 65_536, 1 << 20)
ABOUT_SIZES = {"E404", "E406"}
"""Mistakes that another length may not have."""


def fitting(resolved: Resolved, n: int, most: int = MAX_SIZE) -> int | None:
    """n, or a length near it, and at most so long, that the grids multiply to."""
    for _ in range(4):
        sizes = self_sizes(resolved, n)
        try:
            values = param_values(resolved, {}, sizes)
            grids = [item.value for item in resolved.requirements if item.kind == "grid"]
            products = {sized(grid, sizes, values) for grid in grids if not isinstance(grid, str)}
        except PatternError:
            return None
        if products <= {n}:
            return n
        n = next(iter(products - {n}))
        if not 0 < n <= most:
            return None
    return None


def listed_heads(resolved: Resolved) -> int | None:
    """How many heads the lists have items for that are indexed by `head` itself: as many as the shortest has; None
    where there is none."""
    sizes = {item.name: len(item.default) for item in resolved.params if isinstance(item.default, tuple)}
    relations = [relation for relation in (resolved.relation, resolved.fallback) if relation is not None]
    found = (index for relation in relations for index in indices(relation) if isinstance(index, Select))
    return min(
        (sizes[item.items] for item in found if item.index == HEAD and isinstance(item.items, str)), default=None
    )


def misfit(resolved: Resolved, num_heads: int, layer: int = 0) -> PatternError | None:
    """What is wrong with a self-attention of any length, at the defaults of the parameters.

    None where some length fits, or lengths are wrong in different ways.
    """
    if any(item.default is None for item in resolved.params) or NK in indices(resolved.relation):
        return None
    failures = []
    for length in TRIED:
        n = fitting(resolved, length)
        try:
            bind(resolved, self_sizes(resolved, length if n is None else n), num_heads, layer)
        except PatternError as failed:
            failures.append(failed)
        else:
            return None
    said = {tuple((item.code, item.message) for item in failed.diagnostics) for failed in failures}
    is_of_sizes = any(item.code in ABOUT_SIZES for item in failures[0].diagnostics)
    return failures[0] if len(said) == 1 and not is_of_sizes else None
