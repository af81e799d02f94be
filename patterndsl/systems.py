"""What is a system, in one line? Its class, cost, state and reach, derived from its spec alone.

The classes are those of Tay et al. 2020, "Efficient Transformers: A Survey", arXiv 2009.06732, section 3: patterns that
are fixed or learned, memory, low rank, kernels, recurrence. Nothing is declared: a pattern with `recall` is recurrent,
one that lets every query attend the first key without attending everything has a memory, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Literal, TypeAlias

import numpy as np

from patterndsl.analysis.budget import GaveUpError
from patterndsl.analysis.figure import readable
from patterndsl.analysis.pairs import NoFormula
from patterndsl.analysis.policy import CachePolicy, LooksAhead
from patterndsl.analysis.proof import proven
from patterndsl.analysis.report import Report
from patterndsl.analysis.verdict import Proven
from patterndsl.analysis.witness import attended, bound_at
from patterndsl.composite import Composite
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Or, Relation, compare, inputs_read
from patterndsl.lower.lookup import Lookup
from patterndsl.pattern import Pattern
from patterndsl.sema.model import Resolved
from patterndsl.syntax.render import render_expression
from patterndsl.syntax.tree import OWN_KEYS

Class: TypeAlias = Literal["FP", "LP", "M", "LR", "KR", "RC"]
CLASSES: Mapping[Class, str] = {
    "FP": "fixed pattern",
    "LP": "learned pattern",
    "M": "memory",
    "LR": "low rank",
    "KR": "kernel",
    "RC": "recurrence",
}
OPERATIONS = 200_000
SEEN_LENGTHS = (2048, 8192)
"""Where pairs are expected and not known, their growth is seen between these lengths."""
ORDERS = {0.0: "Θ(1)", 0.5: "Θ(√N)", 1.0: "Θ(N)", 1.5: "Θ(N√N)", 2.0: "Θ(N²)"}


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table.

    classes: in the survey's letters. time: how the work grows with N at the default parameters; is_expected: whether
    that was seen in expected counts. scores: how the scores that are looked at grow, which is the memory of a kernel
    that keeps them. pairs: the formula of one head. state: what a decoder keeps. decodable: whether a step can follow
    the other; "by value" where later tokens choose what earlier ones attend. parameters: more than four projections of
    `dim`, in one layer. layers: after which every position has reached every other that any number of layers connects;
    None where that was not found. pairs_at: of one layer at a length.
    """

    name: str
    classes: tuple[Class, ...]
    time: str
    is_expected: bool
    pairs: str
    state: str
    decodable: str
    parameters: int
    layers: int | None
    pairs_at: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "time": self.time,
            "is_expected": self.is_expected,
            "pairs": self.pairs,
            "state": self.state,
            "decodable": self.decodable,
            "parameters": self.parameters,
            "layers": self.layers,
            "pairs_at": self.pairs_at,
        }


def system(pattern: Pattern, *, n: int, heads: int, dim: int) -> System:
    """The row of a pattern. Raises PatternError where n does not fit it."""
    composite = _composite(pattern)
    verdict = pattern.prove("causal")
    by_value = isinstance(verdict, Proven) or isinstance(pattern.prove("value_causal"), Proven)
    decodable = "yes" if isinstance(verdict, Proven) else "by value" if by_value else "no"
    parts = _parts(pattern)
    time, is_expected = _time(pattern, parts, heads)
    return System(
        pattern.name or pattern.title,
        _classes(pattern, n, heads),
        time,
        is_expected,
        "; ".join(_formula(name, report, summed) for name, report, summed in _reports(pattern, heads)),
        _state(pattern, heads) if decodable != "no" else "-",
        decodable,
        0 if composite is None else parameters_added(composite, dim, heads, dim // heads),
        layers_to_reach(pattern, n, heads),
        _pairs_at(pattern, n, heads),
    )


def _composite(pattern: Pattern) -> Composite | None:
    return pattern if isinstance(pattern, Composite) else None


def _parts(pattern: Pattern) -> list[Resolved]:
    """The relations that a pattern is made of."""
    composite = _composite(pattern)
    return [pattern.resolved] if composite is None else [term.pattern.resolved for term in composite.terms]


# ---- class ----------------------------------------------------------------------------------------------------


def _classes(pattern: Pattern, n: int, heads: int) -> tuple[Class, ...]:
    """Key 0 is looked at for n positions; all else follows from the form of the spec, and from proofs."""
    composite = _composite(pattern)
    found: set[Class] = set()
    kinds = {source.kind for source in pattern.resolved.sources}
    found |= {"RC"} if "recall" in kinds else set()
    found |= {"LR"} if "project" in kinds else set()
    found |= {"LP"} if "sort" in kinds else set()
    found |= {"M"} if kinds & {"memory", "pool", "compress", "cross"} and "recall" not in kinds else set()
    for branch in composite.branches.values() if composite is not None else ():
        found |= {"KR"} if branch.is_kernel else set()
        found |= {"LP"} if branch.is_made_up else set()
        found |= {"LR"} if any("factored" in maker for maker in branch.score.makers) else set()
    learned = _learned(pattern)
    for resolved in _parts(pattern):
        found |= {"LP"} if learned & inputs_read(resolved.relation) else set()
        if resolved.num_keys is None and not _is_whole(resolved):
            found |= {"FP"} if not learned & inputs_read(resolved.relation) or _has_static_term(resolved) else set()
            found |= {"M"} if _is_heard_by_all(resolved, n, heads) else set()
    return tuple(name for name in CLASSES if name in found)


def _is_whole(resolved: Resolved) -> bool:
    """All pairs, or all up to the query."""
    for whole in (compare("<=", Const(0), K), compare("<=", K, Q)):
        sides = (replace(resolved, fallback=None), replace(resolved, relation=whole, fallback=None))
        if proven("equals", *sides, operations=OPERATIONS) is not None:
            return True
    return False


def _has_static_term(resolved: Resolved) -> bool:
    """Whether some term of a union, or the pattern of some head, asks no learner."""
    terms: Sequence[Relation] = resolved.relation.terms if isinstance(resolved.relation, Or) else ()
    return any(not inputs_read(term) for term in terms)


def _is_heard_by_all(resolved: Resolved, n: int, heads: int) -> bool:
    """Whether every query attends the first key, at a length."""
    bound = bound_at(resolved, n, {}, heads, 0)
    if bound.inputs or n == 0:
        return False
    queries = np.arange(n, dtype=np.int64)
    points = ((group.relation, Point(queries, 0, group.heads[0], Lookup({}))) for group in bound.groups)
    return all(bool(np.all(np.broadcast_to(member(relation, point), (n,)))) for relation, point in points)


# ---- cost -----------------------------------------------------------------------------------------------------


def _reports(pattern: Pattern, heads: int) -> list[tuple[str, Report, bool]]:
    """The report of each term, with its name and whether it is summed and no pair looked at."""
    composite = _composite(pattern)
    if composite is None:
        return [("", pattern.report(heads=heads), False)]
    several = len(composite.terms) > 1
    return [
        (term.name * several, term.pattern.report(heads=heads), composite.branches[term.branch].is_kernel)
        for term in composite.terms
    ]


def _formula(name: str, report: Report, is_summed: bool) -> str:
    text = "0, sums of features" if is_summed else report.formula_text()
    return f"{name}: {text}" if name else text


def _time(pattern: Pattern, parts: Sequence[Resolved], heads: int) -> tuple[str, bool]:
    """The greatest order of all terms and heads, and whether it was seen in expected counts."""
    orders: list[float] = []
    is_expected = False
    for _, report, is_summed in _reports(pattern, heads):
        if is_summed:
            orders.append(1.0)
            continue
        for group in report.groups:
            # what draws can be at most grows as they do; what learners choose is seldom as much as it can be
            is_known = not isinstance(group.formula, NoFormula) or not _is_learned(pattern)
            exponent = _exponent(group.order_at_defaults) if is_known else None
            if exponent is None:
                exponent, is_expected = _seen_exponent(pattern, heads), True
            orders.append(exponent)
    greatest = max(orders, default=0.0)
    return ORDERS.get(greatest, f"Θ(N^{greatest:g})"), is_expected


def _learned(pattern: Pattern) -> set[str]:
    """The labels and selections of a pattern."""
    labels, selections = pattern.resolved.labels, pattern.resolved.selections
    return {item.name for item in labels} | {item.name for item in selections}


def _is_learned(pattern: Pattern) -> bool:
    learned = _learned(pattern)
    return any(learned & inputs_read(resolved.relation) for resolved in _parts(pattern))


def _exponent(order: str | None) -> float | None:
    return next((power for power, text in ORDERS.items() if text == order), None)


def _seen_exponent(pattern: Pattern, heads: int) -> float:
    """How expected pairs grow between two lengths, to a quarter."""
    counts = []
    for n in SEEN_LENGTHS:
        pairs = pattern.report(n, heads=heads).pairs
        if pairs is None or pairs.value == 0:
            return 2.0
        counts.append(pairs.value)
    return round(4 * log(counts[1] / counts[0]) / log(SEEN_LENGTHS[1] / SEEN_LENGTHS[0])) / 4


def _pairs_at(pattern: Pattern, n: int, heads: int) -> str:
    composite = _composite(pattern)
    reports = [pattern.report(n, heads=heads)] if composite is None else []
    if composite is not None:
        kept = [term for term in composite.terms if not composite.branches[term.branch].is_kernel]
        reports = [term.pattern.report(n, heads=heads) for term in kept]
    figures = [report.pairs for report in reports]
    if any(figure is None for figure in figures):
        return "needs inputs"
    known = [figure for figure in figures if figure is not None]
    total = sum(figure.value for figure in known) / heads
    marks = {"Exact": "", "Expected": "≈ "}
    worst = next((item.certainty for item in known if item.certainty != "Exact"), "Exact")
    return marks.get(worst, "≤ ") + readable(round(total))


def _state(pattern: Pattern, heads: int) -> str:
    """What a decoder keeps of each source, in keys of a head."""
    composite = _composite(pattern)
    found = []
    for name, report, is_summed in _reports(pattern, heads):
        if is_summed:
            found.append("sums: M · d + M")
            continue
        policy = report.groups[-1].cache
        if isinstance(policy, CachePolicy):
            most = policy.most_text()
            text = most if policy.kind == "bounded" and most else "t + 1" if policy.kind == "growing" else "bounded"
        elif isinstance(policy, LooksAhead):
            text = "-"
        else:
            assert composite is not None or isinstance(policy, NoFormula)
            text = _keys_text(composite, name) if composite is not None else "?"
        found.append(f"{name}: {text}" if name else text)
    return "; ".join(dict.fromkeys(found))


def _keys_text(composite: Composite, name: str) -> str:
    term = next(term for term in composite.terms if term.name == name or len(composite.terms) == 1)
    keys = term.pattern.spec.keys
    if keys is None:
        return "?"
    params = {item.name: item for item in term.pattern.spec.params}
    text = render_expression(keys)
    declared = params.get(text)
    if text.endswith("_size") and declared is not None and declared.default is not None:
        return render_expression(declared.default) if not isinstance(declared.default, tuple) else text
    return text


# ---- parameters -----------------------------------------------------------------------------------------------


def parameters_added(pattern: Composite, dim: int, heads: int, head_dim: int) -> int:
    """Numbers that a layer learns beside the projections of queries, keys, values and outputs."""
    total = 0
    for source in pattern.resolved.sources:
        told = pattern.settings(source.name)

        def of(name: str, told: Mapping[str, int | float | str] = told) -> int:
            return int(told[name])

        match source.kind:
            case "memory":
                total += of("size") * (dim if told["of"] == "states" else 2 * heads * head_dim)
            case "pool" if told["by"] == "conv":
                width, groups = (dim, 1) if told["of"] == "states" else (heads * head_dim, heads)
                total += of("size") * width * width // groups + width
            case "project":
                number, shared = (1 if told["share"] == "keys" else 2), (heads if told["share"] == "none" else 1)
                total += number * shared * of("size") * of("length")
            case "sort":
                blocks, hidden = -(-of("length") // of("blocks")), of("hidden")
                total += heads * (dim * hidden + hidden * blocks if hidden else dim * blocks)
            case "compress":
                total += (of("rate") * dim * dim + dim) * (told["by"] in ("conv", "dilated"))
                total += (of("rate") * dim * dim + dim) * (told["loss"] == "states")
    for table in pattern.resolved.tables:
        size = pattern.table_size(table.name) or 0
        sizes = {"scalars": heads * size, "vectors": heads * size * head_dim}
        total += sizes.get(table.kind, heads * head_dim * dim + 2 * heads * head_dim)
    if pattern.combine == "gate":
        total += (dim + 1) * heads * len(pattern.branches)
    for name, branch in pattern.branches.items():
        if branch.is_made_up:
            total += _made_up(branch.score.makers, pattern.score_settings(name), dim, heads)
    return total


def _made_up(makers: Sequence[str], told: Mapping[str, int | float | str], dim: int, heads: int) -> int:
    length, rank = int(told["length"]), int(told["rank"])
    inner = next(factor for factor in range(int(length**0.5), 0, -1) if length % factor == 0)
    is_learned = told["learned"] == "yes"
    sizes = {
        "dense": heads * ((dim + 1) * dim + (dim + 1) * length),
        "random": heads * length * length * is_learned,
        "factored_dense": heads * (dim + 1) * (inner + length // inner),
        "factored_random": 2 * heads * length * rank * is_learned,
    }
    members = [maker for maker in makers if maker != "product"]
    total = sum(sizes[maker] for maker in members)
    return total + len(members) * (len(members) > 1) + 2 * ("product" in makers)


# ---- reach ----------------------------------------------------------------------------------------------------

REACHED_AT = 512
MAX_LAYERS = 64


def layers_to_reach(pattern: Pattern, n: int, heads: int) -> int | None:
    """Layers after which everything is connected that ever is. Of patterns with sources it is told at 512 positions, by
    the tokens that each key is made of; what is recalled is no part of the sequence."""
    composite = _composite(pattern)
    if composite is None:
        try:
            figure = pattern.reach(n, heads=heads).layers_to_connect
        except (PatternError, GaveUpError):
            return None
        return int(figure.value) if figure.certainty == "Exact" else None
    size = min(n, REACHED_AT)
    try:
        step = _one_layer(composite, size, heads)
    except PatternError:
        return None
    if step is None:
        return None
    reached = np.eye(size, dtype=np.float32)
    for layer in range(MAX_LAYERS):
        further = ((step @ reached) > 0).astype(np.float32)
        if np.array_equal(further, reached):
            return layer or None
        reached = further
    return None


def _one_layer(pattern: Composite, n: int, heads: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]] | None:
    """[n, n]: whether a token goes into what a query reads; None where inputs decide."""

    total = np.eye(n, dtype=bool)
    for term in pattern.terms:
        resolved = term.pattern.resolved
        if inputs_read(resolved.relation):
            return None
        bound = bound_at(resolved, n, {}, heads, 0)
        union = np.zeros((n, bound.sizes.kv_len), dtype=bool)
        for head in range(heads):
            union |= attended(bound, head, range(n), Lookup({}))
        total |= (
            union if term.source == OWN_KEYS else (union.astype(np.float32) @ _made_of(pattern, term.source, n)) > 0
        )
    return total.astype(np.float32)


def _made_of(pattern: Composite, source: str, n: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """[keys, n]: the tokens that each key is made of."""
    kind = next(item.kind for item in pattern.resolved.sources if item.name == source)
    told, num_keys = pattern.settings(source), pattern.num_keys(source, n)
    tokens = np.arange(n)[None]
    match kind:
        case "pool":
            size, stride = int(told["size"]), int(told["stride"])
            front = size - stride + -n % stride if told["pad"] == "left" else 0
            start = np.arange(num_keys)[:, None] * stride - front
            return ((tokens >= start) & (tokens < start + size)).astype(np.float32)
        case "project":
            return np.ones((num_keys, n), dtype=np.float32)
        case "sort":
            block = int(told["blocks"])
            own = np.arange(num_keys)[:, None] // block * block
            return (tokens < own).astype(np.float32) if told["sees"] == "prefix" else np.ones((num_keys, n), np.float32)
        case _:
            return np.zeros((num_keys, n), dtype=np.float32)
