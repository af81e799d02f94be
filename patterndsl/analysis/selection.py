"""Do later tokens choose what a query attends? Causality of the keys (value-causal) and of the choice (pattern-causal).

Labels are functions of the tokens, and every token may have any label that its learner gives; inputs are brought by
the caller. A choice is proven by what the labels that it reads have seen, and refuted by two labels that differ in
later tokens only. How often a key counts, where terms are a multiset, is not looked at: only which keys there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from operator import add
from typing import Any, Literal, TypeAlias

import numpy as np

from patterndsl.analysis.budget import GaveUpError, check_time, within
from patterndsl.analysis.proof import free_params, prove, proven, scope_of
from patterndsl.analysis.verdict import Proven, Refuted, Unknown, Verdict, Witness
from patterndsl.analysis.witness import (
    attended,
    bound_at,
    input_shapes,
    least_length,
    lookup_of,
    num_values,
    small_inputs,
)
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import NK, Const, Facet, Index, K, Q, Read, Var, arithmetic
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import (
    NOTHING,
    Or,
    Relation,
    compare,
    conjunction,
    depends_on,
    disjunction,
    indices,
    inputs_read,
    lists_in,
    negation,
    substitute,
)
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound, BoundSelection, InputShape
from patterndsl.sema.learners import LEARNERS
from patterndsl.sema.model import Resolved, SelectionDeclaration

Causality: TypeAlias = Literal["causal", "value_causal", "pattern_causal"]
Labels: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
"""int64 [N], the label of each position."""

SHORT = range(2, 7)
"""Lengths at which all labels of two values are looked at."""
LONGER = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Lengths at which some are, for patterns that need many positions or chunks."""
MAX_LENGTH, MAX_PAIRS, FEW_ROWS = 1 << 17, 1 << 18, 8
"""The longest sequence that is looked at, how many pairs of it, and how many rows even so."""
SHORT_PARAMS, LONGER_PARAMS = 32, 4
"""Values of the parameters for each length."""
NUM_SURROUNDINGS = 6
"""Values of the inputs and labels that stay, for each size."""
OPERATIONS = 300_000
"""Of isl, for whether a label is read at a later position; some 0.1 s."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A label or selection through which later tokens may choose what a query attends: it has seen them, or is one of
    theirs."""

    label: str
    facet: Facet
    how: Literal[
        "sees the whole sequence",
        "is read at a later position",
        "is chosen for a block of queries, with later ones",
        "is chosen among keys that may be later",
    ]

    def __str__(self) -> str:
        facet = "" if self.facet == "value" else f".{self.facet}"
        return f"`{self.label}{facet}` {self.how}"


def prove_causality(
    claim: Causality, pattern: Resolved, *, n: int | None = None, fixed: Mapping[str, int] | None = None
) -> Verdict:
    """The verdict on what the past may depend on. n, fixed: see `proof.prove`.

    value_causal: no query attends a later key. pattern_causal: which keys a query attends is a function of the tokens
    up to its own. causal: both; where no label is read, every choice is made before there are tokens. Each of the two
    has the time of one question.
    """
    given = dict(fixed or {})
    if claim == "value_causal":
        return replace(prove("causal", pattern, n=n, fixed=given), claim="value-causal")
    if claim == "pattern_causal":
        return _selection(pattern, n, given, None)
    value = prove("causal", pattern, n=n, fixed=given)
    chooses = any(_label_reads(pattern)) or any(_selections(pattern))
    return _both(value, _selection(pattern, n, given, value)) if chooses else value


def _both(value: Verdict, selection: Verdict) -> Verdict:
    """The verdict on `causal`, which says how each of the two stands."""
    match value, selection:
        case Proven(), Proven() if value.scope == selection.scope:
            return replace(value, scope=f"{value.scope}: value-causal and pattern-causal")
        case Proven(), Proven():
            return replace(value, scope=f"value-causal {value.scope}, and pattern-causal {selection.scope}")
        case Refuted(), Refuted():
            return replace(value, why=f"neither value-causal nor pattern-causal: {value.why}")
        case Refuted(), _:
            return replace(value, why=f"{_standing('pattern', selection)}, but value-causal is not: {value.why}")
        case _, Refuted():
            but = "but" if isinstance(value, Proven) else "and"
            why = f"{_standing('value', value)}, {but} the selection is not: {selection.why}"
            return Refuted(value.claim, selection.witness, why)
        case _:
            return Unknown(value.claim, f"{_standing('value', value)}; {_standing('pattern', selection)}")


def _standing(which: Literal["value", "pattern"], verdict: Verdict) -> str:
    match verdict:
        case Proven(scope=scope):
            return f"{which}-causal is proven ({scope})"
        case Unknown(reason=reason):
            return f"{which}-causal is unknown ({reason})"
        case Refuted():
            return f"{which}-causal is refuted"


# ---- what is read


def _label_reads(pattern: Resolved) -> Iterator[Read]:
    """Every read of a label, in the pattern and its fallback."""
    names = {label.name for label in pattern.labels}
    for term in _terms(pattern):
        yield from (index for index in indices(term) if isinstance(index, Read) and index.name in names)


def _terms(pattern: Resolved) -> Iterator[Relation]:
    """The terms of the pattern's union, and of its fallback's."""
    for relation in (pattern.relation, pattern.fallback):
        if relation is not None:
            yield from relation.terms if isinstance(relation, Or) else (relation,)


def _selections(pattern: Resolved) -> Iterator[SelectionDeclaration]:
    """The selections that the pattern and its fallback ask, and that tokens have a say in."""
    names = {node.name for term in _terms(pattern) for node in lists_in(term)}
    yield from (item for item in pattern.selections if item.name in names and item.selector != "given")


def _choosing(pattern: Resolved) -> Resolved:
    """The pattern without the terms that read no label: tokens have no say in those, whatever keys they have."""
    names = {label.name for label in pattern.labels} | {item.name for item in pattern.selections}

    def chooses(term: Relation) -> bool:
        return not names.isdisjoint(inputs_read(term))

    return replace(pattern, relation=disjunction(filter(chooses, _terms(pattern))), fallback=None)


def leaks(pattern: Resolved) -> tuple[Leak, ...]:
    """The labels that a value-causal pattern reads and that may have seen later tokens, one leak of each.

    For a pair with k <= q, what has seen the tokens up to q or k gives nothing away. A learner says what a label has
    seen; the place in the order by value has seen all labels, the first position of a run those before it.
    """
    sees = {label.name: LEARNERS[label.learner].sees for label in pattern.labels}
    reads = tuple(dict.fromkeys(_label_reads(pattern)))
    found: dict[str, Leak] = {}
    for read in reads:
        if read.facet == "rank" or sees[read.name] == "sequence":
            found.setdefault(read.name, Leak(read.name, read.facet, "sees the whole sequence"))
    for read in reads:
        if read.name not in found and not _is_behind(read.index, pattern):
            found[read.name] = Leak(read.name, read.facet, "is read at a later position")
    for selection in _selections(pattern):
        how = _seen_by(selection, pattern)
        if how is not None:
            found[selection.name] = Leak(selection.name, "value", how)
    return tuple(found.values())


def _seen_by(
    selection: SelectionDeclaration, pattern: Resolved
) -> (
    Literal[
        "sees the whole sequence",
        "is chosen for a block of queries, with later ones",
        "is chosen among keys that may be later",
    ]
    | None
):
    """What the lists of a query have seen beyond it; None for nothing. What is always taken has no part in the choice
    of others, but takes a place."""
    if selection.label is not None:
        return "sees the whole sequence"
    if selection.per != Const(1):
        return "is chosen for a block of queries, with later ones"
    block = arithmetic("//", K, selection.of)
    put: dict[Index, Index] = {
        K: block,
        NK: arithmetic("//", arithmetic("+", NK, _less_one(selection.of)), selection.of),
    }
    choice = conjunction((selection.among, negation(selection.always)))
    among = substitute(choice, lambda symbol: put.get(symbol, symbol))
    last = arithmetic("+", arithmetic("*", block, selection.of), _less_one(selection.of))
    sides = (replace(pattern, relation=part, fallback=None) for part in (among, compare("<=", last, Q)))
    is_before = proven("within", *sides, operations=OPERATIONS) is not None
    return None if is_before else "is chosen among keys that may be later"


def _less_one(size: Index) -> Index:
    return arithmetic("-", size, Const(1))


def _is_behind(index: Index, pattern: Resolved) -> bool:
    """Whether it is known to be at most q wherever k <= q."""
    match index:
        case Var("q" | "k"):
            return True
        case Read(facet="start", index=at) if _is_behind(at, pattern):
            return True
    later = conjunction([compare("<=", K, Q), compare("<", Q, index)])
    sides = (replace(pattern, relation=relation, fallback=None) for relation in (later, NOTHING))
    return proven("within", *sides, operations=OPERATIONS) is not None


# ---- the choice


def _selection(pattern: Resolved, n: int | None, fixed: Mapping[str, int], value: Verdict | None) -> Verdict:
    """Whether which keys a query attends is a function of the tokens up to its own. value: of `causal`, where known."""
    text = "pattern-causal"
    scope = scope_of(pattern, n=n, fixed=fixed)
    if not (any(_label_reads(pattern)) or any(_selections(pattern))) or (n is not None and n < 2):
        return Proven(text, scope)
    with within():
        suspects = leaks(pattern)
    if not suspects:
        known = prove("causal", pattern, n=n, fixed=fixed) if value is None else value
        if not isinstance(known, Proven):
            known = prove("causal", _choosing(pattern), n=n, fixed=fixed)
        if isinstance(known, Proven):
            return replace(known, claim=text)
        reads = {read.name: read for read in _label_reads(pattern)}.values()
        suspects = tuple(Leak(read.name, read.facet, "is read at a later position") for read in reads)
    what = "labels" if any(_label_reads(pattern)) else "lists"
    open_because = f"{' and '.join(map(str, suspects))}; no {what} were found with which that matters"
    if n is not None and n > MAX_LENGTH:
        return Unknown(text, f"{open_because}: N is above {MAX_LENGTH:,}")
    with within():
        try:
            found = _search(pattern, suspects, n, fixed)
        except GaveUpError as failed:
            return Unknown(text, f"{open_because}: {failed}")
    return Unknown(text, open_because) if found is None else Refuted(text, found[0], str(found[1]))


def _search(
    pattern: Resolved, suspects: Sequence[Leak], n: int | None, fixed: Mapping[str, int]
) -> tuple[Witness, Leak] | None:
    """The first place found where later tokens change what a query attends, and the label through which."""
    parts = [part for part in (pattern.relation, pattern.fallback) if part is not None]
    heads = range(4) if any(depends_on(part, "head") for part in parts) else range(1)
    layers = range(2) if any(depends_on(part, "layer") for part in parts) else range(1)
    for length, values in _sizes(pattern, n, fixed):
        for layer in layers:
            try:
                bound = bound_at(pattern, length, {**fixed, **values}, len(heads), layer)
            except PatternError:
                continue  # sizes that the spec does not allow
            for leak, head in product(suspects, heads):
                place = _Place(bound, {**fixed, **values}, head, leak.label, _sees_all(pattern, leak.label))
                is_list = any(item.name == leak.label for item in pattern.selections)
                witness = place.witness_of_lists() if is_list else place.witness()
                if witness is not None:
                    return witness, leak
    return None


def _sees_all(pattern: Resolved, label: str) -> bool:
    return any(item.name == label and LEARNERS[item.learner].sees == "sequence" for item in pattern.labels)


def _sizes(pattern: Resolved, n: int | None, fixed: Mapping[str, int]) -> Iterator[tuple[int, dict[str, int]]]:
    """Lengths and parameters, small ones first; at longer lengths the defaults too."""
    free = free_params((pattern,), fixed)
    steps = sorted(product(range(4), repeat=len(free)), key=lambda steps: (sum(steps), steps))
    least = [dict(zip(free, map(add, free.values(), above), strict=True)) for above in steps[:SHORT_PARAMS]]
    usual = {
        item.name: item.default.value
        for item in pattern.params
        if item.name in free and isinstance(item.default, Const)
    }
    few = least[:LONGER_PARAMS]
    few += [values for values in [{**free, **usual}] if values not in few]
    longer = sorted({*LONGER, max(2, least_length(pattern))} - set(SHORT))
    for length in [*SHORT, *longer] if n is None else [n]:
        if length <= MAX_LENGTH:
            yield from ((length, values) for values in (least if length in SHORT else few))


@dataclass(frozen=True, slots=True)
class _Place:
    """A head of a pattern at one size, and the label that is changed. sees_all: its learner has seen all tokens."""

    bound: Bound
    params: Mapping[str, int]
    head: int
    label: str
    sees_all: bool

    def witness(self) -> Witness | None:
        """A query that attends a key with one label and not with one that differs in later tokens only.

        It is enough to change one position of one label at a time: of several changes, one after the other, some one
        makes the difference. What has seen all tokens may change anywhere.
        """
        n, shapes = self.bound.sizes.kv_len, input_shapes([self.bound])
        if self.label not in shapes:
            return None
        rows = _rows(n)
        for others in _surroundings(shapes, self.label):
            keys = self.keys_by_labels(others, rows, shapes)
            for first, second, at in _changes(n, num_values(shapes[self.label])):
                num_alike = int(np.searchsorted(rows, n - 1 if self.sees_all else at))
                with_first, with_second = keys(first)[:num_alike], keys(second)[:num_alike]
                differing = np.argwhere(with_first != with_second)
                if differing.size:
                    row, k = map(int, differing[0])
                    pair = (first, second) if with_first[row, k] else (second, first)
                    return self.shown(int(rows[row]), k, pair, others)
        return None

    def witness_of_lists(self) -> Witness | None:
        """A query that attends a key with one list and not with another, which differs by what later tokens choose."""
        shapes = input_shapes([self.bound])
        shape = shapes.get(self.label)
        if shape is None or shape.selection is None:
            return None
        rows = _rows(self.bound.sizes.kv_len)
        for others in _surroundings(shapes, self.label):
            keys = self.keys_by_labels(others, rows, shapes)
            for first, second, before in _list_changes(shape.selection, self.bound.sizes.kv_len):
                differing = np.argwhere((keys(first) != keys(second)) & (rows < before)[:, None])
                if differing.size:
                    row, k = map(int, differing[0])
                    pair = (first, second) if keys(first)[row, k] else (second, first)
                    return self.shown(int(rows[row]), k, pair, others)
        return None

    def keys_by_labels(
        self, others: Mapping[str, Labels], rows: Labels, shapes: Mapping[str, InputShape]
    ) -> Callable[[Labels], Any]:
        """bool [rows, N]: what the queries attend with some labels; looked at once for each."""
        seen: dict[bytes, Any] = {}

        def keys(labels: Labels) -> Any:
            check_time()
            name = labels.tobytes()
            if name not in seen:
                lookup = lookup_of({**others, self.label: labels}, shapes)
                seen[name] = attended(self.bound, self.head, rows.tolist(), lookup)
            return seen[name]

        return keys

    def shown(self, q: int, k: int, pair: tuple[Labels, Labels], others: Mapping[str, Labels]) -> Witness:
        inputs = {self.label: tuple(pair[0].tolist()), **{name: tuple(it.tolist()) for name, it in others.items()}}
        changed = {self.label: tuple(pair[1].tolist())}
        n, layer = self.bound.sizes.kv_len, self.bound.layer
        return Witness(n, self.params, self.head, layer, q, k, inputs, changed)


def _rows(n: int) -> Labels:
    """The queries that are looked at, ascending; all of them where they are few."""
    num_rows = min(n, max(FEW_ROWS, MAX_PAIRS // n))
    return np.unique(np.linspace(0, n - 1, num_rows).astype(np.int64))


def _surroundings(shapes: Mapping[str, InputShape], label: str) -> Iterator[dict[str, Labels]]:
    """Values of all that does not change."""
    found = list(small_inputs({name: shape for name, shape in shapes.items() if name != label}))
    yield from islice(found[:: -(-len(found) // NUM_SURROUNDINGS)], NUM_SURROUNDINGS)


def _changes(n: int, num_labels: int) -> Iterator[tuple[Labels, Labels, int]]:
    """Two labels and the one position where they differ: all of two values where they are few, else some."""
    if num_labels < 2:
        return
    if n in SHORT:
        for item, at in product(product(range(2), repeat=n), reversed(range(n))):
            if not item[at]:
                yield _changed(np.array(item, dtype=np.int64), at, 2)
        return
    places, random, few = np.arange(n, dtype=np.int64), np.random.default_rng(0), min(num_labels, 8)
    halves = places * 2 // n
    two = [(base, 2) for base in (places * 0 + 1, 1 - halves, halves, places % 2)]
    several = [(random.integers(0, few, n), few) for _ in range(3)]
    for (base, number), at in product([*two, *several], sorted({n - 1, n - n // 3, n // 2}, reverse=True)):
        yield _changed(base, at, number)


def _list_changes(selection: BoundSelection, n: int) -> Iterator[tuple[Labels, Labels, int]]:
    """Two tables of lists that later tokens choose between, and the first of these tokens: what a query before it
    attends is not to change. All that differs is which candidate has the last place."""
    width, of, per = selection.width, selection.of, selection.per
    if selection.label is not None:  # the first members, or the last token instead of the first of them
        if 1 < width < n:
            first = np.arange(width, dtype=np.int64)
            yield first, np.append(first[1:], n - 1), n - 1
        return
    rows, blocks = np.arange(selection.num_rows)[:, None], np.arange(selection.num_blocks)[None]
    among, always = (
        np.broadcast_to(np.asarray(member(part, Point(rows, blocks, 0, Lookup({})))), (rows.size, blocks.size))
        for part in (selection.among, selection.always)
    )
    for row in range(rows.size):
        fixed = np.flatnonzero(always[row])[:width]
        choice = np.flatnonzero(among[row] & ~always[row])
        places = width - fixed.size
        if not 0 < places < choice.size:
            continue
        latest_key = min(n, (int(choice[-1]) + 1) * of) - 1
        latest = max(latest_key, min(n, (row + 1) * per) - 1)
        tables = []
        for chosen in (choice[:places], np.append(choice[: places - 1], choice[-1])):
            table = np.full((rows.size, width), -1, dtype=np.int64)
            listed = np.sort(np.append(fixed, chosen))
            table[row, : listed.size] = listed
            tables.append(table.ravel())
        yield tables[0], tables[1], latest


def _changed(labels: Labels, at: int, num_labels: int) -> tuple[Labels, Labels, int]:
    other = labels.copy()
    other[at] = (other[at] + 1) % num_labels
    return labels, other, at
