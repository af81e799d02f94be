"""What is a system, in one line? Its class, cost, state and reach, derived from its spec alone.

The classes are those of Tay et al. 2020, "Efficient Transformers: A Survey", arXiv 2009.06732, section 3: patterns that
are fixed or learned, memory, low rank, kernels, recurrence. Nothing is declared: a pattern with `recall` is recurrent,
one that lets every query attend the first key without attending everything has a memory, and so on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Literal, TypeAlias

import numpy as np

from patterndsl.analysis.budget import GaveUpError
from patterndsl.analysis.composed import CompositeReport, Part
from patterndsl.analysis.figure import Certainty, readable
from patterndsl.analysis.heads import HeadReport
from patterndsl.analysis.order import SUPERSCRIPTS
from patterndsl.analysis.pairs import NoFormula
from patterndsl.analysis.policy import CachePolicy, LooksAhead
from patterndsl.analysis.proof import proven
from patterndsl.analysis.verdict import Proven
from patterndsl.analysis.witness import attended, bound_at
from patterndsl.composite import Composite
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import And, Not, Or, Random, Relation, children, compare, depends_on, inputs_read
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
"""Where learners decide, the growth of expected pairs is seen between these lengths."""
FAR = 1 << 20
"""A length beyond windows: who attends the first key from there attends it from everywhere."""


@dataclass(frozen=True, order=True, slots=True)
class Growth:
    """N to a power, times log N or not."""

    power: float
    has_log: bool = False

    def __str__(self) -> str:
        whole, part = divmod(self.power, 1)
        plain = {0: "", 1: "N"}.get(int(whole), f"N{str(int(whole)).translate(SUPERSCRIPTS)}") + "√N" * (part == 0.5)
        text = plain if part in (0, 0.5) else f"N^{self.power:g}"
        return f"Θ({'·'.join(filter(None, (text, 'log N' * self.has_log))) or '1'})"


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table, of one layer; of the first where layers differ.

    classes: in the survey's letters. time: how the work grows with N at the default parameters, keys and scores that
    are made for it counted; time_certainty: Expected where it was seen in expected counts, UpperBound where inputs
    decide. memory: how that beside parameters grows, where scores of products are never kept. pairs: the formula of one
    head. state: what a decoder keeps. decodable: whether a step can follow the other; "by value" where later tokens
    choose what earlier ones attend. parameters: more than four projections of `dim`. layers: after which every position
    has reached every other that any number of layers connects; None where that was not found. pairs_at: at a length.
    layers_differ: whether other layers have other patterns.
    """

    name: str
    classes: tuple[Class, ...]
    time: str
    time_certainty: Certainty
    memory: str
    pairs: str
    state: str
    decodable: str
    parameters: int
    layers: int | None
    pairs_at: str
    layers_differ: bool

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def system(pattern: Pattern, *, n: int, heads: int, dim: int) -> System:
    """The row of a pattern. Raises PatternError where n does not fit it."""
    composite = _composite(pattern)
    verdict = pattern.prove("causal")
    by_value = isinstance(verdict, Proven) or isinstance(pattern.prove("value_causal"), Proven)
    decodable = "yes" if isinstance(verdict, Proven) else "by value" if by_value else "no"
    report = pattern.report(heads=heads)
    terms = report.parts if isinstance(report, CompositeReport) else {"": Part(report, OWN_KEYS)}
    time, certainty = _time(pattern, terms, heads)
    return System(
        pattern.name or pattern.title,
        _classes(pattern, n, heads),
        str(time),
        certainty,
        str(_memory(pattern)),
        report.formula_text(),
        _state(composite, terms) if decodable != "no" else "-",
        decodable,
        0 if composite is None else parameters_added(composite, dim, heads, dim // heads),
        layers_to_reach(pattern, n, heads),
        _pairs_at(pattern, n, heads),
        any(_is_of_layers(resolved.relation) for resolved in _of_all_layers(pattern)),
    )


def _composite(pattern: Pattern) -> Composite | None:
    return pattern if isinstance(pattern, Composite) else None


def _parts(pattern: Pattern) -> list[Resolved]:
    """The relations that a pattern is made of in its first layer."""
    composite = _composite(pattern)
    return [pattern.resolved] if composite is None else [term.in_its_layers for term in composite.terms_at(0)]


def _of_all_layers(pattern: Pattern) -> list[Resolved]:
    composite = _composite(pattern)
    return [pattern.resolved] if composite is None else [term.pattern.resolved for term in composite.terms]


def _written(pattern: Pattern) -> list[Resolved]:
    """Those of its first layer, before roles divide them."""
    composite = _composite(pattern)
    return (
        [pattern.resolved]
        if composite is None
        else [term.in_its_layers for term in composite.written if term.takes_part(0)]
    )


def _is_of_layers(relation: Relation) -> bool:
    """Whether layers have different patterns, other draws alone apart."""
    if isinstance(relation, And | Or | Not):
        return any(map(_is_of_layers, children(relation)))
    return not isinstance(relation, Random) and depends_on(relation, "layer")


# ---- class ----------------------------------------------------------------------------------------------------


def _classes(pattern: Pattern, n: int, heads: int) -> tuple[Class, ...]:
    """Who attends key 0 is looked at, far out; all else follows from the form of the spec, and from proofs."""
    composite = _composite(pattern)
    found: set[Class] = set()
    kinds = {source.kind for source in pattern.resolved.sources}
    found |= {"RC"} if "recall" in kinds else set()
    found |= {"LR"} if "project" in kinds else set()
    found |= {"LP"} if "sort" in kinds else set()
    found |= {"M"} if kinds & {"memory", "pool", "compress", "cross"} and "recall" not in kinds else set()
    attending = {term.branch for term in composite.terms_at(0)} if composite is not None else ()
    for branch in (composite.branches[name] for name in attending) if composite is not None else ():
        found |= {"KR"} if branch.is_kernel else set()
        found |= {"LP"} if branch.is_made_up else set()
        found |= {"LR"} if any("factored" in maker for maker in branch.score.makers) else set()
    learned = _learned(pattern)
    for resolved in _written(pattern):
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
    """Whether some term of a union asks no learner."""
    terms: Sequence[Relation] = resolved.relation.terms if isinstance(resolved.relation, Or) else ()
    return any(not inputs_read(term) for term in terms)


def _is_heard_by_all(resolved: Resolved, n: int, heads: int) -> bool:
    """Whether every query attends the first key: far out, or at n where the pattern has no such length."""
    try:
        bound = bound_at(resolved, FAR, {}, heads, 0)
    except PatternError:
        bound = bound_at(resolved, n, {}, heads, 0)
    if bound.inputs or bound.sizes.kv_len == 0:
        return False
    queries = np.arange(bound.sizes.q_len, dtype=np.int64)
    points = ((group.relation, Point(queries, 0, group.heads[0], Lookup({}))) for group in bound.groups)
    return all(bool(np.all(np.broadcast_to(member(relation, point), queries.shape))) for relation, point in points)


# ---- cost -----------------------------------------------------------------------------------------------------


def _time(pattern: Pattern, terms: Mapping[str, Part], heads: int) -> tuple[Growth, Certainty]:
    """The greatest growth of what is made and of the pairs of all terms and heads, and what is known of it."""
    found: list[tuple[Growth, Certainty]] = [(growth, "Exact") for growth in _made(pattern)]
    for part, resolved in zip(terms.values(), _parts(pattern), strict=True):
        if part.features is None:  # else no pair is looked at
            found += [_pairs_growth(pattern, group, resolved, heads) for group in part.report.groups]
    greatest = max(growth for growth, _ in found)
    certainties = [certainty for growth, certainty in found if growth == greatest]
    return greatest, "Exact" if "Exact" in certainties else certainties[0]


def _pairs_growth(pattern: Pattern, group: HeadReport, resolved: Resolved, heads: int) -> tuple[Growth, Certainty]:
    """How the pairs of a head grow. What draws and lists can be at most grows as they do; what learners choose is
    seldom as much as it can be, and is seen in expected counts."""
    read = inputs_read(resolved.relation)
    most = ALL if group.order_at_defaults is None else _growth(group.order_at_defaults)
    if not isinstance(group.formula, NoFormula) or not read:
        return most or ALL, "Exact" if most is not None else "UpperBound"
    seen = _seen_growth(pattern, heads) if read & _learned(pattern) and most in (None, ALL) else None
    return (most or ALL, "UpperBound") if seen is None else (seen, "Expected")


ALL = Growth(2.0)


def _growth(order: str) -> Growth | None:
    """An order in N as reports write it: Θ(N√N), Θ(N·log N)."""
    found = re.fullmatch(r"Θ\((?:1|(N[²³]?)?(√N)?(?:N\^\((\d+)/(\d+)\))?)(·?log N)?\)", order)
    if found is None:
        return None
    whole, root, top, bottom, has_log = found.groups()
    power = {None: 0, "N": 1, "N²": 2, "N³": 3}[whole] + 0.5 * (root is not None)
    return Growth(int(top) / int(bottom) if top else power, has_log is not None)


def _seen_growth(pattern: Pattern, heads: int) -> Growth | None:
    """How expected pairs grow between two lengths, to a quarter; None where they are not known."""
    try:
        counts = [pattern.report(n, heads=heads).pairs for n in SEEN_LENGTHS]
    except PatternError:
        return None
    less, more = (0.0 if count is None else count.value for count in counts)
    if not less or not more:
        return None
    return Growth(round(4 * log(more / less) / log(SEEN_LENGTHS[1] / SEEN_LENGTHS[0])) / 4)


def _made(pattern: Pattern) -> Iterator[Growth]:
    """How the work grows that is done before pairs are looked at, besides that of every layer on its N tokens."""
    yield Growth(1.0)
    if _keeps_a_matrix(pattern) or any(item.selector == "topk" for item in pattern.resolved.selections):
        yield ALL  # each query, or each block of them, has a score for each block of keys
    if any(item.learner == "lsh" for item in pattern.resolved.labels):
        yield Growth(1.0, has_log=True)  # positions are sorted by their hashes


def _memory(pattern: Pattern) -> Growth:
    """Scores of products are computed again where they are needed; those that are made up are kept."""
    return ALL if _keeps_a_matrix(pattern) else Growth(1.0)


def _keeps_a_matrix(pattern: Pattern) -> bool:
    """Whether a layer makes a matrix of all tokens or blocks: scores that are made up, or the order of all blocks."""
    composite = _composite(pattern)
    if composite is None:
        return False
    kinds = {source.kind for source in pattern.resolved.sources}
    return "sort" in kinds or any(branch.is_made_up for branch in composite.branches.values())


def _learned(pattern: Pattern) -> set[str]:
    """The labels and selections of a pattern."""
    labels, selections = pattern.resolved.labels, pattern.resolved.selections
    return {item.name for item in labels} | {item.name for item in selections}


def _pairs_at(pattern: Pattern, n: int, heads: int) -> str:
    figure = pattern.report(n, heads=heads).pairs
    if figure is None:
        return "needs inputs"
    return MARKS[figure.certainty] + readable(round(figure.value / heads))


MARKS: Mapping[Certainty, str] = {"Exact": "", "Expected": "≈ ", "UpperBound": "≤ ", "LowerBound": "≥ ", "Measured": ""}
"""What stands before a figure that is not exact."""


def _state(composite: Composite | None, terms: Mapping[str, Part]) -> str:
    """What a decoder keeps of each source, in keys of a head, by the kinds of heads."""
    found = []
    for name, part in terms.items():
        texts = [_sums_text(composite, name)] if part.features is not None else []
        for group in part.report.groups if part.features is None else ():
            policy = group.cache
            if isinstance(policy, CachePolicy):
                most = policy.most_text()
                texts.append(
                    most if policy.kind == "bounded" and most else {"growing": "t + 1"}.get(policy.kind, "bounded")
                )
            else:
                texts.append(
                    "-" if isinstance(policy, LooksAhead) else "?" if composite is None else _keys_text(composite, name)
                )
        text = " or ".join(dict.fromkeys(texts))
        found.append(f"{name}: {text}" if len(terms) > 1 and part.features is None else text)
    return "; ".join(dict.fromkeys(found))


def _sums_text(composite: Composite | None, name: str) -> str:
    """The numbers of a head that are kept instead of keys: sums of products, and those of features to divide by."""
    assert composite is not None
    term = next(term for term in composite.terms if term.name == name)
    is_normalised = composite.score_settings(term.branch)["normalise"] == "yes"
    return "sums: M · d + M" if is_normalised else "sums: M · d"


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
    """Numbers that a layer learns beside the projections of queries, keys, values and outputs, less those of these that
    it has no use for."""
    total = (len(pattern.projections) - 2) * (dim + 1) * heads * head_dim
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
    total += sum((dim + 1) * heads * head_dim for role in pattern.resolved.roles for _ in role.own)
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
