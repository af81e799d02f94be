"""What is known of the heads of a pattern at every length? For each group of equal heads its formula, order and cache.

Here they are also written, as lines and as data; what a pattern costs at one length is `report.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import log2

from patterndsl.analysis.at_length import HeadFigures
from patterndsl.analysis.figure import Figure
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.kept import without_seeds
from patterndsl.analysis.order import leading, order
from patterndsl.analysis.pairs import WAYS, NoFormula, Symbolic, Way, most_pairs, pairs_by, symbolic
from patterndsl.analysis.policy import ATTEMPTS, Attempt, CachePolicy, Policy, policy_by
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import Const
from patterndsl.ir.relation import Relation, draws_in, inputs_read
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import param_values, sizes_of

MOST_CASES, MANY_CASES = 4, 60
PAIRS, PAIRS_AT_MOST = r"\text{pairs} = ", r"\text{pairs} \le "


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One group of equal heads: its formula and order, its cache policy, its figures at the length asked for.

    leading: the largest terms of the formula with their factors, where these are known. reason: why the formula is for
    given parameters only (`Formula.fixed`). upper: what bounds the pairs where there is no formula for all of them.
    """

    heads: tuple[int, ...]
    formula: Formula | NoFormula
    upper: Formula | None
    order: str | None
    order_at_defaults: str | None
    cache: Policy
    figures: HeadFigures | None
    leading: str | None = None
    reason: str = ""


def alike(resolved: Resolved, heads: int, layer: int) -> list[tuple[int, ...]]:
    """The groups of heads that have the same pattern."""
    groups: dict[Relation, list[int]] = {}
    for head in range(heads):
        groups.setdefault(symbolic(resolved, head=head, layer=layer).relation, []).append(head)
    return [tuple(members) for members in groups.values()]


def head_reports(
    resolved: Resolved, groups: Sequence[tuple[int, ...]], layer: int, *, of_sequence: bool = True
) -> tuple[HeadReport, ...]:
    """What is known of each group. Groups that only draw other keys share it, and one is counted as the one before.

    of_sequence: whether keys are the sequence's own; of others there is no cache policy.
    """
    known: dict[Relation, HeadReport] = {}
    found, attempts = [], _Attempts(WAYS, ATTEMPTS if of_sequence else ())
    for heads in groups:
        pattern = symbolic(resolved, head=heads[0], layer=layer)
        key = without_seeds(pattern.relation)
        if key not in known:
            known[key], attempts = _head_report(resolved, pattern, heads, layer, attempts)
        found.append(replace(known[key], heads=heads))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Attempts:
    """How to count pairs and how to find policies, without what failed for another group."""

    ways: Sequence[Way]
    policies: Sequence[Attempt]


ALIGNED = WAYS.index({"aligned": True})
"""The ways of counting before this one assume nothing of lengths."""


def _head_report(
    resolved: Resolved, pattern: Symbolic, heads: tuple[int, ...], layer: int, attempts: _Attempts
) -> tuple[HeadReport, _Attempts]:
    """The report of a group, and the attempts for the next one."""
    found, ways = pairs_by(pattern, attempts.ways)
    if isinstance(found, NoFormula) and len(ways) < len(WAYS):
        found, ways = pairs_by(pattern, WAYS)
    # what is counted only where lengths are multiples has no policy in free digits either
    is_free = len(ways) > len(WAYS) - ALIGNED
    if not attempts.policies:
        cache: Policy = NoFormula("its keys are not the sequence")
        policies: Sequence[Attempt] = ()
    else:
        cache, policies = policy_by(pattern, attempts.policies if is_free else attempts.policies[-2:])
    if attempts.policies and isinstance(cache, NoFormula) and len(attempts.policies) < len(ATTEMPTS):
        cache, policies = policy_by(pattern, ATTEMPTS)
    attempts = _Attempts(ways, policies)
    reason = ""
    upper: Formula | NoFormula | None = None
    if isinstance(found, NoFormula):
        upper = most_pairs(pattern)
        values = {} if inputs_read(pattern.relation) or any(draws_in(pattern.relation)) else _constants(resolved)
        there = pairs_by(symbolic(resolved, head=heads[0], layer=layer, fixed=values), WAYS)[0] if values else found
        if isinstance(there, Formula):
            reason, found = found.reason, replace(there, fixed=values)
    bound = upper if isinstance(upper, Formula) else None
    shown = found if isinstance(found, Formula) else bound
    if shown is None:
        return HeadReport(heads, found, bound, None, None, cache, None), attempts
    value, affine = shown.cells[0].value, shown.affine
    plain, at_defaults = order(value, affine), order(value, affine, _growth(resolved))
    report = HeadReport(heads, found, bound, plain, at_defaults, cache, None, leading(value, affine), reason)
    return report, attempts


def _constants(resolved: Resolved) -> dict[str, int]:
    """The parameters that are numbers by default."""
    return {item.name: item.default.value for item in resolved.params if isinstance(item.default, Const)}


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


# ---- as text --------------------------------------------------------------------------------------------------


def group_lines(group: HeadReport, several: bool) -> list[str]:
    """For a terminal; the heads are named where there are several groups."""
    if not several:
        return _lines_of(group)
    first, *others = _lines_of(group)
    return [f"head{'s' * (len(group.heads) > 1)} {_ranges(group.heads)}: {first}", *(f"  {line}" for line in others)]


def _lines_of(group: HeadReport) -> list[str]:
    if isinstance(group.formula, NoFormula):
        lines = [f"pairs: no formula, {group.formula.reason}"]
        if group.upper is not None:
            bound = _case_lines(group.upper, "at most ", f"UpperBound, {group.order},")
            lines.extend(f"  {line}" for line in bound)
        return [*lines, _cache_line(group.cache)]
    lines = _case_lines(group.formula, "pairs = ", "Exact")
    if group.reason:
        lines.append(f"  for every value: no formula, {group.reason}")
    orders = [f"order {group.order}"]
    if group.order_at_defaults not in (group.order, None):
        orders.append(f"{group.order_at_defaults} at the defaults")
    if group.leading is not None:
        orders.append(f"leading {group.leading}")
    return [*lines, "; ".join(orders), _cache_line(group.cache)]


def _case_lines(formula: Formula, lead: str, certain: str) -> list[str]:
    """The cases and where they hold, the first few of them."""
    most = MOST_CASES if len(formula.cells) <= MANY_CASES else 1
    (first, _), *others = formula.shown(most)
    domain = formula.where()
    lines = [f"{lead}{first}  ({(certain + domain).removesuffix(',')})"]
    lines.extend(f"  {text}  where {condition}" for text, condition in others)
    more = len(formula.cells) - most
    if more > 0:
        lines.append(f"  and {more} more case{'s' * (more > 1)} of short sequences or large parameters")
    return lines


def _cache_line(policy: Policy) -> str:
    if isinstance(policy, NoFormula):
        return f"cache: no formula, {policy.reason}"
    certain = f" ({policy.certainty})" if isinstance(policy, CachePolicy) else ""
    return f"cache: {policy}{certain}"


def _ranges(heads: tuple[int, ...]) -> str:
    return ", ".join(map(str, heads[:6])) + (", ..." if len(heads) > 6 else "")


# ---- as data --------------------------------------------------------------------------------------------------


def group_dict(group: HeadReport) -> dict[str, object]:
    """For JSON."""
    formula: dict[str, object]
    if isinstance(group.formula, Formula):
        formula = {"certainty": "Exact", **_cases_dict(group.formula, PAIRS)}
        formula |= {"reason": group.reason} if group.reason else {}
    else:
        formula = {"certainty": "Unknown", "reason": group.formula.reason}
        if group.upper is not None:
            formula["upper_bound"] = _cases_dict(group.upper, PAIRS_AT_MOST)
    figures = ("pairs", "least_row", "greatest_row", "tiles", "computed", "cache")
    return {
        "heads": list(group.heads),
        "formula": formula,
        "order": group.order,
        "order_at_defaults": group.order_at_defaults,
        "leading": group.leading,
        "cache_policy": _policy_dict(group.cache),
        **{name: figure_dict(getattr(group.figures, name, None)) for name in figures},
    }


def _cases_dict(formula: Formula, lead: str) -> dict[str, object]:
    cases = [
        {"pairs": text, "where": condition, "expr": formula.python(cell)}
        for cell, (text, condition) in zip(formula.cells, formula.cases(), strict=True)
    ]
    return {
        "cases": cases,
        "latex": formula.latex_cases(lead),
        "assumes": list(formula.assumes),
        "at": dict(formula.fixed),
    }


def _policy_dict(policy: Policy) -> dict[str, object]:
    return {"kind": "unknown", "reason": policy.reason} if isinstance(policy, NoFormula) else policy.to_dict()


def figure_dict(figure: Figure | None) -> dict[str, object] | None:
    """For JSON."""
    return None if figure is None else figure.to_dict()
