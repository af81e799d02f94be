"""Is a bias a number? Computed at all pairs of a short sequence, with tables of zeros."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np

from patterndsl.diagnostics import Diagnostic, PatternError, SourceRange
from patterndsl.ir.index import Index
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.real import Real, RealFunction, reads, real_value
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.biases import bound_bias
from patterndsl.sema.bind import bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import self_sizes

LENGTHS = (16, 64, 256)
"""Of which the first is taken that fits the pattern."""


class _Arrays:
    """See `ir.real.Numbers`."""

    def number(self, integers: Any) -> Any:
        return np.asarray(integers, np.float64)

    def call(self, name: RealFunction, arguments: tuple[Any, ...]) -> Any:
        if name in ("min", "max"):
            return reduce(np.minimum if name == "min" else np.maximum, arguments)
        return getattr(np, name)(arguments[0])

    def entry(self, table: str, at: Any) -> Any:
        return np.zeros_like(at)


def not_finite(
    bias: Real, declared: Resolved, term: Resolved, position: Index, place: SourceRange | None, heads: int, layer: int
) -> Iterator[Diagnostic]:
    """Whether the bias of a term is infinite or no number at a pair that is attended; -inf drops a pair, and may not
    drop all. Nothing is said where inputs decide. declared: the whole pattern; position: see `bound_bias`."""
    if term.inputs or any(True for _ in reads(bias)):
        return
    for n in LENGTHS:
        try:
            bound = bind(term, self_sizes(term, n), heads, layer)
        except PatternError:  # said where sizes are bound
            continue
        break
    else:
        return
    found = bound_bias(bias, declared, position, bound.sizes, layer)
    q, k = np.arange(n)[:, None], np.arange(bound.sizes.kv_len)
    has_pairs = has_numbers = False
    for group in bound.groups:
        keep = np.broadcast_to(member(group.relation, Point(q, k, 0, Lookup())), (n, len(k)))
        for head in group.heads:
            with np.errstate(all="ignore"):
                added = real_value(found, Point(q, k, np.int64(head), Lookup()), _Arrays())
            added = np.broadcast_to(np.asarray(added, np.float64), keep.shape)
            wrong = np.argwhere(keep & (np.isnan(added) | (added == np.inf)))
            if len(wrong):
                at_q, at_k = wrong[0]
                what = "no number" if np.isnan(added[at_q, at_k]) else "infinite"
                message = f"the bias of query {at_q} and key {at_k} is {what} in head {head} (N = {n})"
                yield Diagnostic("W305", message, place, "keep it finite, such as by max(q - k, 1), or drop the pair")
                return
            has_pairs = has_pairs or bool(keep.any())
            has_numbers = has_numbers or bool((keep & (added > -np.inf)).any())
    if has_pairs and not has_numbers:
        yield Diagnostic(
            "W305", f"the bias is -inf at all pairs (N = {n})", place, "nothing is attended so: keep it finite"
        )
