"""What does a pattern cost? Formulas for every length, and figures at one: pairs, tiles, work, bytes, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from patterndsl.analysis.at_length import HeadFigures, head_figures
from patterndsl.analysis.budget import within
from patterndsl.analysis.cost import (
    Shape,
    backward_flops,
    checked_dtype,
    forward_flops,
    least_bytes,
    predicted,
    saved_bytes,
    state_bytes,
)
from patterndsl.analysis.crossover import is_quick, overtakes
from patterndsl.analysis.figure import Certainty, Figure, readable
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.heads import (
    PAIRS,
    PAIRS_AT_MOST,
    HeadReport,
    alike,
    figure_dict,
    group_dict,
    group_lines,
    head_reports,
)
from patterndsl.analysis.inputs import checked_inputs, expected_inputs
from patterndsl.analysis.keys import squared
from patterndsl.analysis.pairs import NoFormula
from patterndsl.analysis.policy import CachePolicy
from patterndsl.diagnostics import input_error
from patterndsl.ir.relation import depends_on, inputs_read
from patterndsl.lower.devices import DEVICES
from patterndsl.sema.bind import Bound, bind
from patterndsl.sema.fits import misfit
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, counted, param_values, self_sizes

MAX_DOMAIN = 60
"""Characters of a condition beside a formula in a table."""


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a pattern's cost. The figures are None where no length was given, or inputs were missing, and
    those of tiles and time where the tiles are too many to count.

    about: the head and layer that it is about, where that is a choice. missing: inputs that the figures need. Work and
    bytes are of all heads of one layer and one sequence; times are of whole tiles of `block` positions. state: keys and
    values that a decoder holds. times, dense_times: forward, by device; dense attention is causal where the pattern is.
    overtakes: the least length from which on the pattern is faster than dense, by device, or None.
    """

    name: str
    about: tuple[str, ...]
    groups: tuple[HeadReport, ...]
    missing: tuple[str, ...]
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
    def order_at_defaults(self) -> str | None:
        """The same with parameters at their defaults."""
        return self.groups[0].order_at_defaults

    @property
    def formula(self) -> Formula | NoFormula:
        """The formula of the first group of heads."""
        return self.groups[0].formula

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "n": self.n,
            "about": list(self.about),
            "missing": list(self.missing),
            "params": {name: list(value) if isinstance(value, tuple) else value for name, value in self.params.items()},
            "groups": [group_dict(group) for group in self.groups],
            **{name: figure_dict(getattr(self, name)) for name in FIGURES},
            "times": {name: figure.to_dict() for name, figure in self.times.items()},
            "dense_times": {name: figure.to_dict() for name, figure in self.dense_times.items()},
            "overtakes": {name: figure_dict(figure) for name, figure in self.overtakes.items()},
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [", ".join([self.name, *self.about])]
        for group in self.groups:
            found.extend(f"  {line}" for line in group_lines(group, len(self.groups) > 1))
        if self.n is None or self.shape is None:
            return [*found, "  figures: give a length, -n 65536"]
        values = ", ".join(f"{name} = {value}" for name, value in self.params.items())
        shape = self.shape
        at = f"  at N = {self.n:,}" + (f", {values}" if values else "")
        heads = f"{shape.num_q_heads:,} head{'s' * (shape.num_q_heads != 1)} of {shape.head_dim}"
        found.append(f"{at}; {heads}, {shape.dtype}")
        for label, figure in self.labelled():
            if figure is not None:
                found.append(f"    {label:<22} {figure}")
        for name, figure in self.times.items():
            found.append(f"    {'forward, ' + name:<22} {figure}; {self._beside_dense(name)}{self._rate(name)}")
        return [*found, *(f"    {text}" for text in self._left_out())]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _left_out(self) -> list[str]:
        """Which figures are not there, and what to do about it."""
        if self.missing:
            named, example = ", ".join(f"`{name}`" for name in self.missing), self.missing[0]
            give = f'--input-values {example}=0*100,1*156, or in Python inputs={{"{example}": ...}}'
            inputs = f"the input{'s' * (len(self.missing) > 1)} {named}"
            return [f"no figures: they depend on {inputs}, and a report draws none at random; give {give}"]
        if self.pairs is None:
            return ["no figures: the tiles are too many to count, and there is no formula; give a smaller N"]
        return [] if self.efficiency else ["tiles and times: left out, the tiles are too many to count"]

    def _rate(self, device: str) -> str:
        """Which dtype was measured, where it is another one."""
        measured, shape = DEVICES[device].dtype, self.shape
        return "" if shape is None or shape.dtype == measured else f" (at the rate of {measured})"

    def _beside_dense(self, device: str) -> str:
        dense, ratio = self.dense_times[device], self.dense_times[device].value / self.times[device].value
        least = self.overtakes.get(device)
        when = "" if least is None else f", from N = {least.value:,.0f} on"
        compared = f"{ratio:.1f}x faster{when}" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
        return f"{'causal ' * _is_causal(self.groups)}dense {readable(dense.value, 's')}, {compared}"

    def labelled(self) -> list[tuple[str, Figure | None]]:
        """The figures and what a terminal calls them."""
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
        """The formula of the first group of heads with its domain in one line; what bounds it, or why there is none."""
        group = self.groups[0]
        shown = group.formula if isinstance(group.formula, Formula) else group.upper
        if shown is None:
            assert isinstance(group.formula, NoFormula)
            return group.formula.reason
        domain = shown.where()
        if len(domain) > MAX_DOMAIN:
            domain = f" in the first of {len(shown.cells):,} cases" if len(shown.cells) > 1 else " for some lengths"
        lead = "" if shown is group.formula else "≤ "
        return f"{lead}{shown.text()}{' ' * bool(domain)}{domain}"

    def latex(self) -> str:
        """The formulas in LaTeX with their domains, one per group of heads."""
        found = []
        for group in self.groups:
            if isinstance(group.formula, Formula):
                found.append(group.formula.latex_cases(PAIRS))
            elif group.upper is not None:
                found.append(group.upper.latex_cases(PAIRS_AT_MOST))
        return r" \\ ".join(found)

    def _repr_latex_(self) -> str | None:
        shown = self.latex()
        return f"$${shown}$$" if shown else None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        found = {"text/plain": "\n".join(self.lines())}
        latex = self._repr_latex_()
        return found | ({"text/latex": latex} if latex else {})


FIGURES = ("pairs", "efficiency", "density", "flops", "backward_flops", "memory", "saved", "intensity", "state")


@within()
def report(
    resolved: Resolved,
    name: str,
    *,
    n: int | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: object = "float32",
    layer: int = 0,
    block: int = 128,
    inputs: Mapping[str, Any] | None = None,
) -> Report:
    """The report of a self-attention pattern; figures where n is given, and the inputs that it reads."""
    dtype = checked_dtype(dtype)
    block = counted("block", block, 1, 2**20)
    head_dim, heads = counted("head_dim", head_dim, 1, 2**16), counted("heads", heads, 1, MAX_HEADS)
    kv_heads = counted("kv_heads", heads if kv_heads is None else kv_heads, 1, heads)
    if heads % kv_heads:
        raise input_error("E406", f"{heads} heads do not share {kv_heads} key heads", "give a divisor of the heads")
    layer = counted("layer", layer, 0, MAX_LAYER)
    about = _about(resolved, heads, layer)
    asked, resolved = resolved, squared(resolved)
    is_own = asked.num_keys is None
    if n is None:
        if (wrong := misfit(resolved, heads, layer)) is not None:
            raise wrong
        groups = head_reports(resolved, alike(resolved, heads, layer), layer, of_sequence=is_own)
        return _report(resolved, name, about, groups, None, None, block)
    bound = bind(resolved, self_sizes(resolved, n), heads, layer)
    shape = Shape(n, self_sizes(asked, n).kv_len, heads, kv_heads, head_dim, dtype)
    plain = head_reports(resolved, [group.heads for group in bound.groups], layer, of_sequence=is_own)
    left = [item for item in bound.inputs if item.name not in (inputs or {})]
    expected = expected_inputs(left)
    if expected is None:
        if inputs:
            checked_inputs(bound.inputs, inputs)  # says which is missing
        missing = tuple(item.name for item in left)
        return _report(resolved, name, about, plain, n, shape, block, missing=missing)
    lookup = checked_inputs([item for item in bound.inputs if item not in left], inputs or {}, expected)
    values = _values(resolved, n)
    figured = []
    for group, found in zip(bound.groups, plain, strict=True):
        figures = head_figures(group, bound, lookup, block, found.formula, found.upper, found.cache, values)
        is_drawn = not inputs_read(group.relation).isdisjoint(name for item in left for name in item.names)
        figured.append(replace(found, figures=_expected(figures) if is_drawn and figures is not None else figures))

    def at(length: int) -> Bound:
        return bind(resolved, self_sizes(resolved, length), heads, layer)

    is_counted = all(group.figures is not None and group.figures.computed is not None for group in figured)
    is_tried = is_counted and not bound.inputs and is_own and is_quick(bound)
    least = overtakes(at, shape, tuple(DEVICES.values()), _is_causal(plain)) if is_tried else {}
    return _report(resolved, name, about, tuple(figured), n, shape, block, least)


EXPECTED = "labels and lists at random, balanced"
"""The model of what learners and selectors say, where the caller gives none."""


def _expected(figures: HeadFigures) -> HeadFigures:
    """Figures for inputs that were drawn."""

    def so(figure: Figure | None) -> Figure | None:
        return (
            None
            if figure is None or figure.certainty == "UpperBound"
            else replace(figure, certainty="Expected", how=", ".join(filter(None, (figure.how, EXPECTED))))
        )

    found = {item.name: getattr(figures, item.name) for item in fields(figures)}
    changed = {name: so(value) for name, value in found.items() if isinstance(value, Figure)}
    return replace(figures, **{name: value for name, value in changed.items() if value is not None})


def _about(resolved: Resolved, heads: int, layer: int) -> tuple[str, ...]:
    """The only head, and the layer, of a pattern that asks for them: of others there would be another report."""
    found = []
    if depends_on(resolved.relation, "head") and heads == 1:
        found.append("head 0 of 1")
    if depends_on(resolved.relation, "layer"):
        found.append(f"layer {layer}")
    return tuple(found)


def _values(resolved: Resolved, n: int) -> dict[str, int]:
    sizes = self_sizes(resolved, n)
    values = param_values(resolved, {}, sizes)
    return {"N": n, "Nk": sizes.kv_len} | {name: value for name, value in values.items() if isinstance(value, int)}


def _report(
    resolved: Resolved,
    name: str,
    about: tuple[str, ...],
    groups: tuple[HeadReport, ...],
    n: int | None,
    shape: Shape | None,
    block: int,
    least: Mapping[str, Figure | None] | None = None,
    missing: tuple[str, ...] = (),
) -> Report:
    params: Mapping[str, int | tuple[int, ...]] = {}
    if n is not None:
        params = param_values(resolved, {}, self_sizes(resolved, n))
    figures = [(group.figures, len(group.heads)) for group in groups if group.figures is not None]
    empty = dict.fromkeys(FIGURES)
    known = Report(
        name, about, groups, missing, params, n, shape, block, **empty, times={}, dense_times={}, overtakes={}
    )
    if n is None or shape is None or len(figures) < len(groups):
        return known
    kept = _summed([(found.pairs, count) for found, count in figures])
    num_bytes = least_bytes(shape)
    num_pairs = n * shape.kv_len * shape.num_q_heads
    work = forward_flops(kept.value, shape.head_dim)
    counted = replace(
        known,
        pairs=kept,
        density=Figure(kept.value / num_pairs if num_pairs else 0.0, kept.certainty),
        flops=Figure(work, kept.certainty, "FLOP"),
        backward_flops=Figure(backward_flops(kept.value, shape.head_dim), kept.certainty, "FLOP"),
        memory=Figure(num_bytes, "Exact", "bytes", "query, key, value and output once"),
        saved=Figure(saved_bytes(shape), "Exact", "bytes"),
        intensity=Figure(work / num_bytes if num_bytes else 0.0, kept.certainty, "FLOP/byte"),
        state=_state([found.cache for found, _ in figures], shape, n),
    )
    tiled = [(found.computed, count) for found, count in figures if found.computed is not None]
    if len(tiled) < len(figures):
        return counted
    computed = _summed(tiled)
    dense = forward_flops(
        (n * (n + 1) // 2 if _is_causal(groups) else n * shape.kv_len) * shape.num_q_heads, shape.head_dim
    )
    computed_work = forward_flops(computed.value, shape.head_dim)
    return replace(
        counted,
        efficiency=Figure(kept.value / computed.value if computed.value else 1.0, least_certain([kept, computed])),
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
    how = f"{num_keys:,} key{'s' * (num_keys != 1)} of each head, {known[0].how}"
    return Figure(state_bytes(shape, num_keys), certain, "bytes", how)


def _summed(found: Sequence[tuple[Figure, int]]) -> Figure:
    """A figure per head, summed over all heads."""
    figures = [figure for figure, _ in found]
    total = sum(figure.value * count for figure, count in found)
    return Figure(total, least_certain(figures), "pairs", figures[0].how)


def least_certain(figures: Sequence[Figure]) -> Certainty:
    """How certain what follows from all of them is."""
    found = {figure.certainty for figure in figures}
    return next((certainty for certainty in ("Expected", "UpperBound") if certainty in found), "Exact")


__all__ = ["HeadReport", "Report", "report"]
