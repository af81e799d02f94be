"""What does a pattern cost? Formulas for every length, and figures at one: pairs, tiles, work, bytes, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import log2
from typing import Any

import numpy as np

from patterndsl.analysis.cost import (
    DEVICES,
    Shape,
    backward_flops,
    checked_dtype,
    forward_flops,
    least_bytes,
    predicted,
    saved_bytes,
)
from patterndsl.analysis.figure import Certainty, Figure, readable
from patterndsl.analysis.formula import Formula, order
from patterndsl.analysis.pairs import NoFormula, Symbolic, most_pairs, pairs, row_lengths, symbolic
from patterndsl.diagnostics import PatternError
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.sema.bind import Bound, bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import param_values, sizes_of

MAX_COUNTED = 1 << 25
"""Pairs of partial tiles that are looked at one by one where there is no formula."""


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One group of equal heads: its formula, what order it is of, and its figures at the length asked for."""

    heads: tuple[int, ...]
    formula: Formula | NoFormula
    upper: Formula | None
    order: str | None
    order_at_defaults: str | None
    pairs: Figure | None
    least_row: Figure | None
    greatest_row: Figure | None
    tiles: Figure | None
    computed_pairs: Figure | None


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a pattern's cost. The figures are None where no length was given, or inputs were missing.

    Work and bytes are of all heads of one layer and one sequence. computed: pairs in live tiles of `block` positions.
    """

    name: str
    groups: tuple[HeadReport, ...]
    params: Mapping[str, int | tuple[int, ...]]
    n: int | None
    shape: Shape | None
    block: int
    pairs: Figure | None
    efficiency: Figure | None
    density: Figure | None
    flops: Figure | None
    backward_flops: Figure | None
    memory: Figure | None
    saved: Figure | None
    intensity: Figure | None
    times: Mapping[str, Figure]
    dense_times: Mapping[str, Figure]

    @property
    def order(self) -> str | None:
        """The order of the first group of heads."""
        return self.groups[0].order

    @property
    def formula(self) -> Formula | NoFormula:
        """The formula of the first group of heads."""
        return self.groups[0].formula

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "n": self.n,
            "params": {name: list(value) if isinstance(value, tuple) else value for name, value in self.params.items()},
            "groups": [_group_dict(group) for group in self.groups],
            **{name: _figure_dict(getattr(self, name)) for name in FIGURES},
            "times": {name: figure.to_dict() for name, figure in self.times.items()},
            "dense_times": {name: figure.to_dict() for name, figure in self.dense_times.items()},
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [self.name]
        for group in self.groups:
            found.extend(f"  {line}" for line in _group_lines(group, len(self.groups) > 1))
        if self.n is None or self.shape is None:
            return [*found, "  figures: give a length, -n 65536"]
        values = ", ".join(f"{name} = {value}" for name, value in self.params.items())
        shape = self.shape
        at = f"  at N = {self.n:,}" + (f", {values}" if values else "")
        found.append(f"{at}; {shape.num_q_heads} heads of {shape.head_dim}, {shape.dtype}")
        for label, figure in self._labelled():
            if figure is not None:
                found.append(f"    {label:<22} {figure}")
        for name, figure in self.times.items():
            dense = self.dense_times[name]
            ratio = dense.value / figure.value
            found.append(f"    {'forward, ' + name:<22} {figure}; dense {readable(dense.value, 's')}, {ratio:.1f}x")
        return found

    def _labelled(self) -> list[tuple[str, Figure | None]]:
        group = self.groups[0]
        alone = len(self.groups) == 1
        return [
            ("pairs, all heads", self.pairs),
            ("density", self.density),
            ("keys of a query, least", group.least_row if alone else None),
            ("keys of a query, most", group.greatest_row if alone else None),
            (f"live tiles of {self.block}", group.tiles if alone else None),
            ("tile efficiency", self.efficiency),
            ("forward work", self.flops),
            ("backward work", self.backward_flops),
            ("moved at least", self.memory),
            ("saved for backward", self.saved),
            ("arithmetic intensity", self.intensity),
        ]

    def formula_text(self) -> str:
        """The formula of the first group of heads in one line; what bounds it, or why there is none."""
        group = self.groups[0]
        if isinstance(group.formula, Formula):
            return group.formula.text()
        return f"≤ {group.upper.text()}" if group.upper is not None else group.formula.reason

    def latex(self) -> str:
        """The formulas in LaTeX, one per group of heads."""
        shown = [group.formula if isinstance(group.formula, Formula) else group.upper for group in self.groups]
        return r" \\ ".join(formula.latex() for formula in shown if formula is not None)

    def _repr_latex_(self) -> str | None:
        shown = self.latex()
        return f"$${shown}$$" if shown else None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        found = {"text/plain": "\n".join(self.lines())}
        latex = self._repr_latex_()
        return found | ({"text/latex": latex} if latex else {})


FIGURES = ("pairs", "efficiency", "density", "flops", "backward_flops", "memory", "saved", "intensity")


def report(
    resolved: Resolved,
    name: str,
    *,
    n: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    layer: int = 0,
    block: int = 128,
    inputs: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a self-attention pattern; figures where n is given, and the inputs that it reads."""
    checked_dtype(dtype)
    if n is None:
        groups = tuple(_head_report(resolved, members, layer) for members in _alike(resolved, heads, layer))
        return _report(resolved, name, groups, None, None, block)
    bound = bind(resolved, sizes_of(n, None, None, 0), heads, layer)
    shape = Shape(n, n, heads, heads if kv_heads is None else kv_heads, head_dim, dtype)
    ready = all(item.name in (inputs or {}) for item in bound.inputs)
    lookup = Lookup({key: np.asarray(value, dtype=np.int64) for key, value in (inputs or {}).items()})
    found = []
    for group in bound.groups:
        base = _head_report(resolved, group.heads, layer)
        found.append(_at_length(base, resolved, bound, group.relation, lookup, block, layer) if ready else base)
    return _report(resolved, name, tuple(found), n, shape, block)


def _alike(resolved: Resolved, heads: int, layer: int) -> list[tuple[int, ...]]:
    groups: dict[Relation, list[int]] = {}
    for head in range(heads):
        groups.setdefault(symbolic(resolved, head=head, layer=layer).relation, []).append(head)
    return [tuple(members) for members in groups.values()]


def _head_report(resolved: Resolved, members: tuple[int, ...], layer: int) -> HeadReport:
    pattern = symbolic(resolved, head=members[0], layer=layer)
    found = pairs(pattern)
    upper = most_pairs(pattern) if isinstance(found, NoFormula) else None
    bound = upper if isinstance(upper, Formula) else None
    shown = found if isinstance(found, Formula) else bound
    plain = at_defaults = None
    if shown is not None:
        plain = order(shown.cells[0].value, shown.affine)
        at_defaults = order(shown.cells[0].value, shown.affine, _growth(resolved))
    return HeadReport(members, found, bound, plain, at_defaults, None, None, None, None, None)


def _growth(resolved: Resolved) -> dict[str, Fraction]:
    """What power of N each parameter's default grows as, seen at two large lengths."""
    small, large = 2**20, 2**36
    try:
        first, second = (param_values(resolved, {}, sizes_of(n, None, None, 0)) for n in (small, large))
    except PatternError:
        return {}
    found = {}
    for name, value in first.items():
        later = second[name]
        if isinstance(value, int) and isinstance(later, int) and value > 0 and later > 0:
            found[name] = Fraction(round(4 * log2(later / value) / 16), 4)
    return found


def _at_length(
    base: HeadReport, resolved: Resolved, bound: Bound, relation: Relation, lookup: Lookup, block: int, layer: int
) -> HeadReport:
    """The figures of one group of heads, per head."""
    n = bound.sizes.total
    values = _values(resolved, n)
    tiles = find_tiles(relation, bound.sizes, lookup, block, block, effort=1 << 16)
    computed = Figure(_area(tiles, n), "Exact" if not tiles.num_guessed else "UpperBound", "pairs")
    pattern = symbolic(resolved, head=base.heads[0], layer=layer)
    rows = row_lengths(pattern, values) if isinstance(base.formula, Formula) else None
    if rows is None and n * n <= MAX_COUNTED:
        every = np.arange(n, dtype=np.int64)
        kept_pairs = member(relation, Point(every[:, None], every[None], 0, lookup))
        rows = np.broadcast_to(kept_pairs, (n, n)).sum(axis=1)
    number = base.formula.at(values) if isinstance(base.formula, Formula) else None
    if number is not None:
        kept = Figure(number, "Exact", "pairs", "formula")
    else:
        kept = _enumerated(relation, bound, lookup, tiles, n)
    return HeadReport(
        base.heads,
        base.formula,
        base.upper,
        base.order,
        base.order_at_defaults,
        kept,
        Figure(int(rows.min()), "Exact", "keys") if rows is not None and n else None,
        Figure(int(rows.max()), "Exact", "keys") if rows is not None and n else None,
        Figure(tiles.num_tiles, "Exact" if not tiles.num_guessed else "UpperBound", "tiles"),
        computed,
    )


def _values(resolved: Resolved, n: int) -> dict[str, int]:
    values = param_values(resolved, {}, sizes_of(n, None, None, 0))
    return {"N": n} | {name: value for name, value in values.items() if isinstance(value, int)}


def _area(tiles: Tiles, n: int) -> int:
    """Pairs in live tiles: whole blocks, but no position that is not there."""
    rows = np.minimum(tiles.q_block, n - tiles.q_blks * tiles.q_block)
    columns = np.minimum(tiles.kv_block, n - tiles.kv_blks * tiles.kv_block)
    return int((rows * columns).sum())


def _enumerated(relation: Relation, bound: Bound, lookup: Lookup, tiles: Tiles, n: int) -> Figure:
    """Pairs by looking at every pair of the partial tiles; the tiles' area where those are too many."""
    if int((~tiles.is_full).sum()) * tiles.q_block * tiles.kv_block > MAX_COUNTED:
        return Figure(_area(tiles, n), "UpperBound", "pairs", "area of the live tiles")
    total = 0
    inside = np.arange(tiles.q_block, dtype=np.int64)
    for q_blk, kv_blk, full in zip(tiles.q_blks, tiles.kv_blks, tiles.is_full, strict=True):
        q, k = q_blk * tiles.q_block + inside, kv_blk * tiles.kv_block + inside
        q, k = q[q < n][:, None], k[k < n][None]
        total += (
            q.size * k.size
            if full
            else int(np.broadcast_to(member(relation, Point(q, k, 0, lookup)), (q.size, k.size)).sum())
        )
    return Figure(total, "Exact", "pairs", "enumeration")


def _report(
    resolved: Resolved, name: str, groups: tuple[HeadReport, ...], n: int | None, shape: Shape | None, block: int
) -> Report:
    params: Mapping[str, int | tuple[int, ...]] = {}
    if n is not None:
        params = param_values(resolved, {}, sizes_of(n, None, None, 0))
    kept, computed = (_summed(groups, name) for name in ("pairs", "computed_pairs"))
    empty = dict.fromkeys(FIGURES)
    if n is None or shape is None or kept is None or computed is None:
        return Report(name, groups, params, n, shape, block, **empty, times={}, dense_times={})
    num_bytes = least_bytes(shape)
    work = forward_flops(kept.value, shape.head_dim)
    dense = forward_flops(n * n * shape.num_q_heads, shape.head_dim)
    computed_work = forward_flops(computed.value, shape.head_dim)
    return Report(
        name,
        groups,
        params,
        n,
        shape,
        block,
        pairs=kept,
        efficiency=Figure(kept.value / computed.value if computed.value else 1.0, computed.certainty),
        density=Figure(kept.value / (n * n * shape.num_q_heads) if n else 0.0, kept.certainty),
        flops=Figure(work, kept.certainty, "FLOP"),
        backward_flops=Figure(backward_flops(kept.value, shape.head_dim), kept.certainty, "FLOP"),
        memory=Figure(num_bytes, "Exact", "bytes", "query, key, value and output once"),
        saved=Figure(saved_bytes(shape), "Exact", "bytes"),
        intensity=Figure(work / num_bytes if num_bytes else 0.0, kept.certainty, "FLOP/byte"),
        times={key: predicted(device, computed_work, num_bytes) for key, device in DEVICES.items()},
        dense_times={key: predicted(device, dense, num_bytes) for key, device in DEVICES.items()},
    )


def _summed(groups: tuple[HeadReport, ...], name: str) -> Figure | None:
    """A figure per head, summed over all heads."""
    found = [(getattr(group, name), len(group.heads)) for group in groups]
    if any(figure is None for figure, _ in found):
        return None
    certain: Certainty = "Exact" if all(figure.certainty == "Exact" for figure, _ in found) else "UpperBound"
    total = sum(figure.value * count for figure, count in found)
    return Figure(total, certain, "pairs", found[0][0].how)


def _group_lines(group: HeadReport, several: bool) -> list[str]:
    lead = f"heads {_ranges(group.heads)}: " if several else ""
    if isinstance(group.formula, NoFormula):
        lines = [f"{lead}pairs: no formula, {group.formula.reason}"]
        if group.upper is not None:
            lines.append(f"  at most {group.upper.text()}  (UpperBound, {group.order})")
        return lines
    formula = group.formula
    first, *others = formula.cases(4)
    lines = [f"{lead}pairs = {first[0]}  (Exact{_where(first[1], formula)})"]
    lines.extend(f"  {text}  where {condition}" for text, condition in others)
    if len(formula.cells) > 4:
        lines.append(f"  and {len(formula.cells) - 4} more cases of short sequences or large parameters")
    at_defaults = (
        "" if group.order_at_defaults in (group.order, None) else f"; {group.order_at_defaults} at the defaults"
    )
    lines.append(f"order {group.order}{at_defaults}")
    return lines


def _where(condition: str, formula: Formula) -> str:
    assumed = [f"{text}" for text in formula.assumes]
    parts = [*assumed, *([] if condition == "always" else [condition])]
    return f" for {' and '.join(parts)}" if parts else ""


def _ranges(heads: tuple[int, ...]) -> str:
    return ", ".join(map(str, heads[:6])) + (", ..." if len(heads) > 6 else "")


def _figure_dict(figure: Figure | None) -> dict[str, object] | None:
    return None if figure is None else figure.to_dict()


def _group_dict(group: HeadReport) -> dict[str, object]:
    formula: dict[str, object]
    if isinstance(group.formula, Formula):
        cases = [{"pairs": text, "where": condition} for text, condition in group.formula.cases()]
        latex = group.formula.latex()
        formula = {"certainty": "Exact", "cases": cases, "latex": latex, "assumes": list(group.formula.assumes)}
    else:
        formula = {"certainty": "Unknown", "reason": group.formula.reason}
        if group.upper is not None:
            formula["upper_bound"] = group.upper.text()
    figures = ("pairs", "least_row", "greatest_row", "tiles", "computed_pairs")
    return {
        "heads": list(group.heads),
        "formula": formula,
        "order": group.order,
        "order_at_defaults": group.order_at_defaults,
        **{name: _figure_dict(getattr(group, name)) for name in figures},
    }


__all__ = ["HeadReport", "Report", "Symbolic", "report"]
