"""What does a pattern cost? Formulas for every length, and figures at one: pairs, tiles, work, bytes, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import log2
from typing import Any

from patterndsl.analysis.at_length import HeadFigures, head_figures
from patterndsl.analysis.cost import (
    DEVICES,
    Shape,
    backward_flops,
    checked_dtype,
    forward_flops,
    least_bytes,
    predicted,
    saved_bytes,
    state_bytes,
)
from patterndsl.analysis.crossover import overtakes
from patterndsl.analysis.figure import Certainty, Figure, readable
from patterndsl.analysis.formula import Formula, order
from patterndsl.analysis.inputs import checked_inputs
from patterndsl.analysis.pairs import NoFormula, Symbolic, most_pairs, pairs, symbolic
from patterndsl.analysis.policy import CachePolicy, Policy, cache_policy
from patterndsl.diagnostics import PatternError, error, input_error
from patterndsl.ir.relation import Relation
from patterndsl.sema.bind import Bound, bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_HEADS, counted, param_values, sizes_of

MAX_LENGTH = 1 << 24
"""Beyond this, tiles are too many to count; formulas have no limit."""


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One group of equal heads: its formula and order, its cache policy, its figures at the length asked for."""

    heads: tuple[int, ...]
    formula: Formula | NoFormula
    upper: Formula | None
    order: str | None
    order_at_defaults: str | None
    cache: Policy
    figures: HeadFigures | None


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a pattern's cost. The figures are None where no length was given, or inputs were missing.

    Work and bytes are of all heads of one layer and one sequence; times are of whole tiles of `block` positions. state:
    keys and values that a decoder holds. times, dense_times: forward, by device; dense attention is causal where the
    pattern is. overtakes: the least length from which on the pattern is faster than dense, by device, or None.
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
    state: Figure | None
    times: Mapping[str, Figure]
    dense_times: Mapping[str, Figure]
    overtakes: Mapping[str, Figure | None]

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
            "overtakes": {name: _figure_dict(figure) for name, figure in self.overtakes.items()},
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
            found.append(f"    {'forward, ' + name:<22} {figure}; {self._beside_dense(name)}")
        return found

    def _beside_dense(self, device: str) -> str:
        dense, ratio = self.dense_times[device], self.dense_times[device].value / self.times[device].value
        least = self.overtakes.get(device)
        when = "" if least is None else f", from N = {least.value:,.0f} on"
        compared = f"{ratio:.1f}x faster{when}" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
        return f"{'causal ' * _is_causal(self.groups)}dense {readable(dense.value, 's')}, {compared}"

    def _labelled(self) -> list[tuple[str, Figure | None]]:
        alone = self.groups[0].figures if len(self.groups) == 1 else None
        return [
            ("pairs, all heads", self.pairs),
            ("density", self.density),
            ("keys of a query, least", alone.least_row if alone else None),
            ("keys of a query, most", alone.greatest_row if alone else None),
            (f"live tiles of {self.block}", alone.tiles if alone else None),
            ("tile efficiency", self.efficiency),
            ("forward work", self.flops),
            ("backward work", self.backward_flops),
            ("moved at least", self.memory),
            ("saved for backward", self.saved),
            ("arithmetic intensity", self.intensity),
            ("decode state", self.state),
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


FIGURES = ("pairs", "efficiency", "density", "flops", "backward_flops", "memory", "saved", "intensity", "state")


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
    block = counted("block", block, 1, 2**20)
    head_dim, heads = counted("head_dim", head_dim, 1, 2**16), counted("heads", heads, 1, MAX_HEADS)
    kv_heads = counted("kv_heads", heads if kv_heads is None else kv_heads, 1, heads)
    if heads % kv_heads:
        raise input_error("E406", f"{heads} heads do not share {kv_heads} key heads", "give a divisor of the heads")
    if n is None:
        groups = tuple(_head_report(resolved, members, layer) for members in _alike(resolved, heads, layer))
        return _report(resolved, name, groups, None, None, block)
    bound = bind(resolved, sizes_of(n, None, None, 0), heads, layer)
    if n > MAX_LENGTH:
        help = "the formulas hold at every N: leave it out, or give a smaller one"
        raise error("E504", f"N = {n:,} has too many tiles to count", None, help)
    shape = Shape(n, n, heads, kv_heads, head_dim, dtype)
    plain = tuple(_head_report(resolved, group.heads, layer) for group in bound.groups)
    if bound.inputs and not inputs:
        return _report(resolved, name, plain, n, shape, block)
    lookup = checked_inputs(bound.inputs, inputs or {})
    values = _values(resolved, n)
    figured = []
    for group, found in zip(bound.groups, plain, strict=True):
        figures = head_figures(group, bound, lookup, block, found.formula, found.cache, values)
        figured.append(replace(found, figures=figures))

    def at(length: int) -> Bound:
        return bind(resolved, sizes_of(length, None, None, 0), heads, layer)

    least = overtakes(at, shape, tuple(DEVICES.values()), _is_causal(plain)) if not bound.inputs else {}
    return _report(resolved, name, tuple(figured), n, shape, block, least)


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
    return HeadReport(members, found, bound, plain, at_defaults, cache_policy(pattern), None)


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


def _values(resolved: Resolved, n: int) -> dict[str, int]:
    values = param_values(resolved, {}, sizes_of(n, None, None, 0))
    return {"N": n} | {name: value for name, value in values.items() if isinstance(value, int)}


def _report(
    resolved: Resolved,
    name: str,
    groups: tuple[HeadReport, ...],
    n: int | None,
    shape: Shape | None,
    block: int,
    least: Mapping[str, Figure | None] | None = None,
) -> Report:
    params: Mapping[str, int | tuple[int, ...]] = {}
    if n is not None:
        params = param_values(resolved, {}, sizes_of(n, None, None, 0))
    figures = [(group.figures, len(group.heads)) for group in groups if group.figures is not None]
    empty = dict.fromkeys(FIGURES)
    if n is None or shape is None or not figures:
        return Report(name, groups, params, n, shape, block, **empty, times={}, dense_times={}, overtakes={})
    kept = _summed([(found.pairs, count) for found, count in figures])
    computed = _summed([(found.computed, count) for found, count in figures])
    num_bytes = least_bytes(shape)
    work = forward_flops(kept.value, shape.head_dim)
    dense = forward_flops((n * (n + 1) // 2 if _is_causal(groups) else n * n) * shape.num_q_heads, shape.head_dim)
    computed_work = forward_flops(computed.value, shape.head_dim)
    return Report(
        name,
        groups,
        params,
        n,
        shape,
        block,
        pairs=kept,
        efficiency=Figure(kept.value / computed.value if computed.value else 1.0, _least_certain([kept, computed])),
        density=Figure(kept.value / (n * n * shape.num_q_heads) if n else 0.0, kept.certainty),
        flops=Figure(work, kept.certainty, "FLOP"),
        backward_flops=Figure(backward_flops(kept.value, shape.head_dim), kept.certainty, "FLOP"),
        memory=Figure(num_bytes, "Exact", "bytes", "query, key, value and output once"),
        saved=Figure(saved_bytes(shape), "Exact", "bytes"),
        intensity=Figure(work / num_bytes if num_bytes else 0.0, kept.certainty, "FLOP/byte"),
        state=_state([found.cache for found, _ in figures], shape, n),
        times={key: predicted(device, computed_work, num_bytes) for key, device in DEVICES.items()},
        dense_times={key: predicted(device, dense, num_bytes, dense=True) for key, device in DEVICES.items()},
        overtakes=least or {},
    )


def _is_causal(groups: Sequence[HeadReport]) -> bool:
    """Whether no head looks ahead, as far as is known."""
    return all(isinstance(group.cache, CachePolicy) for group in groups)


def _state(held: Sequence[Figure | None], shape: Shape, n: int) -> Figure | None:
    """Keys and values of all key heads. Where heads differ, a key head may hold what each of them needs."""
    known = [figure for figure in held if figure is not None]
    if len(known) < len(held):
        return None
    num_keys = min(n, int(sum(figure.value for figure in known)))
    certain = known[0].certainty if len(known) == 1 else "UpperBound"
    how = f"{num_keys:,} keys of each head, {known[0].how}"
    return Figure(state_bytes(shape, num_keys), certain, "bytes", how)


def _summed(found: Sequence[tuple[Figure, int]]) -> Figure:
    """A figure per head, summed over all heads."""
    figures = [figure for figure, _ in found]
    total = sum(figure.value * count for figure, count in found)
    return Figure(total, _least_certain(figures), "pairs", figures[0].how)


def _least_certain(figures: Sequence[Figure]) -> Certainty:
    found = {figure.certainty for figure in figures}
    return next((certainty for certainty in ("Expected", "UpperBound") if certainty in found), "Exact")


def _group_lines(group: HeadReport, several: bool) -> list[str]:
    lead = f"heads {_ranges(group.heads)}: " if several else ""
    if isinstance(group.formula, NoFormula):
        lines = [f"{lead}pairs: no formula, {group.formula.reason}"]
        if group.upper is not None:
            lines.append(f"  at most {group.upper.text()}  (UpperBound, {group.order})")
        return [*lines, _cache_line(group.cache)]
    formula = group.formula
    first, *others = formula.cases(4)
    lines = [f"{lead}pairs = {first[0]}  (Exact{_where(first[1], formula)})"]
    lines.extend(f"  {text}  where {condition}" for text, condition in others)
    if len(formula.cells) > 4:
        lines.append(f"  and {len(formula.cells) - 4} more cases of short sequences or large parameters")
    at_defaults = (
        "" if group.order_at_defaults in (group.order, None) else f"; {group.order_at_defaults} at the defaults"
    )
    return [*lines, f"order {group.order}{at_defaults}", _cache_line(group.cache)]


def _cache_line(policy: Policy) -> str:
    if isinstance(policy, NoFormula):
        return f"cache: no formula, {policy.reason}"
    certain = f" ({policy.certainty})" if isinstance(policy, CachePolicy) else ""
    return f"cache: {policy}{certain}"


def _where(condition: str, formula: Formula) -> str:
    assumed = [f"{text}" for text in formula.assumes]
    parts = [*assumed, *([] if condition == "always" else [condition])]
    return f" for {' and '.join(parts)}" if parts else ""


def _ranges(heads: tuple[int, ...]) -> str:
    return ", ".join(map(str, heads[:6])) + (", ..." if len(heads) > 6 else "")


def _policy_dict(policy: Policy) -> dict[str, object]:
    return {"kind": "unknown", "reason": policy.reason} if isinstance(policy, NoFormula) else policy.to_dict()


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
    figures = ("pairs", "least_row", "greatest_row", "tiles", "computed", "cache")
    return {
        "heads": list(group.heads),
        "formula": formula,
        "order": group.order,
        "order_at_defaults": group.order_at_defaults,
        "cache_policy": _policy_dict(group.cache),
        **{name: _figure_dict(getattr(group.figures, name, None)) for name in figures},
    }


__all__ = ["HeadReport", "Report", "Symbolic", "report"]
