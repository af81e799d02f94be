"""Does a claim about a pattern hold for every N and every parameter? Proven, Refuted with a pair, or Unknown with why.

A claim is a set that must be empty: `causal` is R & (k > q). Small sizes are searched first, so that a wrong claim is
refuted by its smallest counterexample, in the pattern's own terms; isl decides the rest for all sizes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from math import prod
from operator import add
from typing import Any, Literal, NoReturn, TypeAlias

import numpy as np

from patterndsl.analysis.conditions import assumptions
from patterndsl.analysis.digits import Affine, affine
from patterndsl.analysis.enclosing import enclosed, enclosing
from patterndsl.analysis.pairs import LENGTHS, Symbolic, draws_of, hints, symbolic
from patterndsl.analysis.radix import NotAffineError, Split, plain_name
from patterndsl.analysis.sets import MAX_OPERATIONS, GaveUpError, dim_names, limited, regions
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import NK, NQ, Const, Index, Param, Var
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import (
    Compare,
    Nothing,
    Relation,
    conjunction,
    disjunction,
    indices,
    negation,
    substitute,
)
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import Bound, bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import sizes_of

Claim: TypeAlias = Literal["causal", "rows_nonempty", "equals", "within", "symmetric"]
CLAIMS: tuple[Claim, ...] = ("causal", "rows_nonempty", "equals", "within", "symmetric")

MAX_SMALL = 10
MAX_SEARCHES = 2000
"""Masks that are looked at before isl is asked."""
MAX_DENSE = 1 << 22
MAX_INPUTS = 256
"""Inputs of one short length that are looked at: all with values below NUM_VALUES, where they are no more."""
NUM_VALUES = 3


@dataclass(frozen=True, slots=True)
class Witness:
    """Where a claim fails: sizes, parameters and the pair; k is None where a whole row is meant."""

    n: int
    params: Mapping[str, int]
    head: int
    layer: int
    q: int
    k: int | None
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = [f"N = {self.n:,}", *(f"{name} = {value}" for name, value in self.params.items())]
        sizes += [f"head = {self.head}"] * bool(self.head) + [f"layer = {self.layer}"] * bool(self.layer)
        sizes += [f"{name} = {list(values)}" for name, values in self.inputs.items()]
        where = f"q = {self.q}" if self.k is None else f"q = {self.q}, k = {self.k}"
        return f"{where} at {', '.join(sizes)}"


class _NoTruthValue:
    """There are three verdicts: that it is there says nothing."""

    __slots__ = ()

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a verdict is Proven, Refuted or Unknown, not true or false: {self}; ask isinstance(…, Proven)"
        )


@dataclass(frozen=True, slots=True)
class Proven(_NoTruthValue):
    """The claim holds; `scope` says for which sizes and parameters."""

    claim: str
    scope: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"claim": self.claim, "scope": self.scope}

    def __str__(self) -> str:
        return f"Proven: {self.claim}, {self.scope}"


@dataclass(frozen=True, slots=True)
class Refuted(_NoTruthValue):
    """The claim fails, at the smallest sizes that were found; `why` says what the witness does."""

    claim: str
    witness: Witness
    why: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        at = self.witness
        place = {"n": at.n, "params": dict(at.params), "head": at.head, "layer": at.layer, "q": at.q, "k": at.k}
        return {"claim": self.claim, "why": self.why, "witness": {**place, "inputs": dict(at.inputs)}}

    def __str__(self) -> str:
        return f"Refuted: {self.claim}; {self.why}: {self.witness}"


@dataclass(frozen=True, slots=True)
class Unknown(_NoTruthValue):
    """Neither a proof nor a counterexample; `reason` says what stands in the way."""

    claim: str
    reason: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"claim": self.claim, "reason": self.reason}

    def __str__(self) -> str:
        return f"Unknown: {self.claim}; {self.reason}"


Verdict: TypeAlias = Proven | Refuted | Unknown


def prove(
    claim: Claim,
    pattern: Resolved,
    other: Resolved | None = None,
    *,
    n: int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Verdict:
    """The verdict on a claim about self-attention, for all heads and layers.

    n, fixed: the length and parameters that have one value; the others are every value from their declared minimum,
    or from 0. Parameters of both patterns that have one name have one value. List parameters have their defaults.
    """
    problem = _Problem(claim, pattern, other, n, dict(fixed or {}))
    found = problem.search()
    return found if found is not None else problem.decide()


def proven(claim: Claim, pattern: Resolved, other: Resolved | None = None, *, operations: int) -> Proven | None:
    """The proof of a claim for all sizes, none assumed to divide another, if so many operations of isl find it.

    No time is spent on counterexamples.
    """
    verdict = _Problem(claim, pattern, other, None, {}, operations, is_hurried=True).decide()
    return verdict if isinstance(verdict, Proven) else None


@dataclass(frozen=True)
class _Problem:
    claim: Claim
    pattern: Resolved
    other: Resolved | None
    n: int | None
    fixed: Mapping[str, int]
    operations: int = MAX_OPERATIONS
    is_hurried: bool = False

    @property
    def text(self) -> str:
        return self.claim.replace("_", " ")

    def patterns(self) -> tuple[Resolved, ...]:
        return (self.pattern,) if self.other is None else (self.pattern, self.other)

    # ---- small sizes

    def free(self) -> dict[str, int]:
        """The parameters without a value, with the least that they may be."""
        found: dict[str, int] = {}
        for resolved in self.patterns():
            for item in resolved.params:
                if item.name not in self.fixed and not isinstance(item.default, tuple):
                    least = item.minimum.value if isinstance(item.minimum, Const) else 0
                    found[item.name] = max(least, found.get(item.name, 0))
        return found

    def sizes(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Lengths and parameters, small ones first; as many parameters for each length as the effort allows."""
        free = self.free()
        lengths = range(MAX_SMALL + 1) if self.n is None else [self.n]
        most = max(8, MAX_SEARCHES // (self.effort() * len(lengths)))
        above = islice(sorted(product(range(4), repeat=len(free)), key=lambda steps: (sum(steps), steps)), most)
        values = [dict(zip(free, map(add, free.values(), steps), strict=True)) for steps in above]
        yield from product(lengths, values)

    def effort(self) -> int:
        """What one size takes, in masks of a small pattern; a draw counts for several, as its keys are drawn first."""
        nodes = sum(1 for resolved in self.patterns() for _ in indices(resolved.relation))
        draws = sum(1 for resolved in self.patterns() for _ in draws_of(resolved.relation))
        num_inputs = 8 if any(resolved.inputs for resolved in self.patterns()) else 1
        return (
            num_inputs
            * (2 if self.uses("layer") else 1)
            * (4 if self.uses("head") else 1)
            * (1 + 8 * draws + nodes // 16)
        )

    def search(self) -> Refuted | None:
        for n, values in self.sizes():
            if n * n > MAX_DENSE:
                return None
            found = self.refuted_at(n, values)
            if found is not None:
                return found
        return None

    def refuted_at(self, n: int, values: Mapping[str, int]) -> Refuted | None:
        """A counterexample at one size, by looking at every pair."""
        for layer in range(2 if self.uses("layer") else 1):
            heads = 4 if self.uses("head") else 1
            try:
                bounds = [self.bound(resolved, n, values, heads, layer) for resolved in self.patterns()]
            except PatternError:
                continue  # sizes that the spec does not allow
            for inputs in _small_inputs(bounds):
                lookup = Lookup(inputs)
                for head in range(heads):
                    masks = [_mask(bound, head, n, lookup) for bound in bounds]
                    pair = self.counterexample(*masks)
                    if pair is not None:
                        shown = {name: tuple(map(int, array)) for name, array in inputs.items()}
                        witness = Witness(n, {**self.fixed, **values}, head, layer, pair[0], pair[1], shown)
                        return Refuted(self.text, witness, pair[2])
        return None

    def uses(self, name: Literal["head", "layer"]) -> bool:
        return any(Var(name) in _symbols(resolved.relation) for resolved in self.patterns())

    def bound(self, resolved: Resolved, n: int, values: Mapping[str, int], heads: int, layer: int) -> Bound:
        known = {item.name for item in resolved.params}
        overrides = {name: value for name, value in {**self.fixed, **values}.items() if name in known}
        return bind(resolved, sizes_of(n, None, None, 0), heads, layer, overrides)

    def counterexample(self, mask: Any, other: Any = None) -> tuple[int, int | None, str] | None:
        """(q, k, what is wrong) of the first pair or row against the claim."""
        n = mask.shape[0]
        match self.claim:
            case "causal":
                bad, why = mask & (np.arange(n)[:, None] < np.arange(n)), "the query attends a later key"
            case "rows_nonempty":
                rows = np.flatnonzero(~mask.any(axis=1))
                return (int(rows[0]), None, "the query attends no key") if rows.size else None
            case "within":
                bad, why = mask & ~other, "only the first has the pair"
            case "equals":
                bad, why = mask != other, "only one has the pair"
            case "symmetric":
                bad, why = mask & ~mask.T, "the pair is there, its mirror image is not"
        places = np.argwhere(bad)
        if not places.size:
            return None
        q, k = map(int, places[0])
        if self.claim == "equals":
            why = f"only the {'first' if mask[q, k] else 'second'} has the pair"
        return q, k, why

    # ---- all sizes

    def decide(self) -> Verdict:
        reasons = []
        forms = ((False, False), (True, False), (True, True))
        for digits, aligned in forms[:2] if self.is_hurried else forms:
            try:
                return self.decided(digits, aligned)
            except (NotAffineError, GaveUpError) as failed:
                reasons.append(str(failed))
        found = self.decided_by_a_bound()
        return Unknown(self.text, reasons[0]) if found is None else found

    def decided(self, digits: bool, aligned: bool) -> Verdict:
        given, known = self.given()
        return self.decided_of(self.asked(), given, known, digits, aligned)

    def decided_by_a_bound(self) -> Proven | None:
        """What is shown without the comparisons that are not affine: of more pairs that must not be there are none, or
        fewer pairs are enough."""
        given, known = self.given()
        bound = enclosed if self.claim == "rows_nonempty" else enclosing
        asked = self.asked()
        simpler = bound(asked, given, known)
        for digits, aligned in ((False, False), (True, False)) if simpler != asked else ():
            try:
                verdict = self.decided_of(simpler, given, known, digits, aligned, is_bound=True)
            except (NotAffineError, GaveUpError):
                continue
            return verdict if isinstance(verdict, Proven) else None
        return None

    def given(self) -> tuple[tuple[Relation, ...], dict[str, int]]:
        """What the specs demand, and what is likely of the parameters."""
        sides = [self.symbolic(resolved) for resolved in self.patterns()]
        return tuple(item for side in sides for item in side.given), hints(sides[0])

    def asked(self) -> Relation:
        """The pairs that must not be, or of which each row must have one."""
        sides = [self.symbolic(resolved) for resolved in self.patterns()]
        return sides[0].relation if self.claim == "rows_nonempty" else self.offending(sides)

    def decided_of(
        self,
        asked: Relation,
        given: Sequence[Relation],
        known: Mapping[str, int],
        digits: bool,
        aligned: bool,
        *,
        is_bound: bool = False,
    ) -> Verdict:
        if isinstance(asked, Nothing) and self.claim != "rows_nonempty":
            return Proven(self.text, self.scope(None))
        form = affine([asked], given, lengths=LENGTHS, hints=known, digits=digits, aligned=aligned)
        with limited(self.operations // 3) as context:  # three ways to write it are tried
            everywhere, (points,) = regions(context, form)
            if self.claim == "rows_nonempty":
                points = _empty_rows(everywhere, points, form)
            if points.is_empty():
                return Proven(self.text, self.scope(form))
            return Unknown(self.text, "a bound decides nothing") if is_bound else self.refuted_by(points, form)

    def symbolic(self, resolved: Resolved) -> Symbolic:
        """The relation with what is fixed put in."""
        known = {item.name for item in resolved.params}
        side = symbolic(resolved, fixed={name: value for name, value in self.fixed.items() if name in known})
        if self.n is None:
            return side
        length = Const(self.n)

        def put(found: Var | Param) -> Index:
            return length if found in (NQ, NK) else found

        pinned = Compare("==", NQ, length)
        given = (*(substitute(item, put) for item in side.given), pinned)
        return replace(side, relation=substitute(side.relation, put), given=given)

    def offending(self, sides: list[Symbolic]) -> Relation:
        """The pairs that must not be."""
        first = sides[0].relation
        match self.claim:
            case "causal":
                return conjunction([first, Compare("<", Var("q"), Var("k"))])
            case "within":
                return conjunction([first, negation(sides[1].relation)])
            case "equals":
                second = sides[1].relation
                return disjunction([conjunction([first, negation(second)]), conjunction([second, negation(first)])])
            case "symmetric":
                return conjunction([first, negation(_transposed(first))])
            case "rows_nonempty":
                raise AssertionError("rows are decided by projection")

    def refuted_by(self, points: Any, form: Affine) -> Verdict:
        """A point of isl, taken back to sizes and looked at there."""
        if self.is_hurried:
            return Unknown(self.text, "counterexamples are not looked for")
        values = _sample(points, form)
        if values is not None and values["N"] ** 2 <= MAX_DENSE:
            for n in range(values["N"] + 1) if self.n is None else [self.n]:
                found = self.refuted_at(n, {name: values.get(name, least) for name, least in self.free().items()})
                if found is not None:
                    return found
        if form.flags:
            return Unknown(self.text, "it depends on what the inputs or draws are")
        return Unknown(self.text, f"isl has a counterexample too large to look at (N = {values and values['N']})")

    def scope(self, form: Affine | None) -> str:
        """For which sizes and parameters the proof is."""
        length = "all N" if self.n is None else f"N = {self.n:,}"
        divisors = {
            name for item in (form.defined if form else ()) if isinstance(item, Split) for name in item.radix.symbols
        }
        free = [f"{name} ≥ {max(least, int(name in divisors))}" for name, least in self.free().items()]
        set_to = [f"{name} = {value}" for name, value in self.fixed.items()]
        text = f"for {length}" + (f" and all {', '.join(free)}" if free else "")
        text += f", with {', '.join(set_to)}" if set_to else ""
        if form and form.assumed:
            text += f", where {' and '.join(assumptions(form))}"
        return text


def _mask(bound: Bound, head: int, n: int, lookup: Lookup) -> Any:
    relation = next(group.relation for group in bound.groups if head in group.heads)
    q, k = np.arange(n, dtype=np.int64)[:, None], np.arange(n, dtype=np.int64)[None]
    return np.broadcast_to(member(relation, Point(q, k, head, lookup)), (n, n))


def _small_inputs(bounds: list[Bound]) -> Iterator[dict[str, Any]]:
    """Every input of few values where that are few enough; else some: constant, all different, in runs, mixed."""
    shapes = {item.name: item for bound in bounds for item in bound.inputs}
    if not shapes:
        yield {}
        return
    lengths = {name: 4 if shape.length is None else shape.length for name, shape in shapes.items()}
    values = {name: range(2 if shape.dtype == "bool" else NUM_VALUES) for name, shape in shapes.items()}
    if prod(len(values[name]) ** min(length, 16) for name, length in lengths.items()) <= MAX_INPUTS:
        every = (product(values[name], repeat=length) for name, length in lengths.items())
        for found in product(*every):
            yield {name: np.array(item, dtype=np.int64) for name, item in zip(shapes, found, strict=True)}
        return
    random = np.random.default_rng(0)
    makers: tuple[Callable[[int], Any], ...] = (
        lambda length: np.zeros(length, dtype=np.int64),
        lambda length: np.arange(length, dtype=np.int64),
        lambda length: np.arange(length, dtype=np.int64) // 2,
        *[lambda length: random.integers(0, 3, length)] * 5,
    )
    for make in makers:
        yield {name: make(lengths[name]) % (2 if shapes[name].dtype == "bool" else 2**62) for name in shapes}


def _symbols(relation: Relation) -> set[Index]:
    return {index for index in indices(relation) if isinstance(index, Var)}


def _transposed(relation: Relation) -> Relation:
    turned: dict[Index, Index] = {Var("q"): Var("k"), Var("k"): Var("q")}
    return substitute(relation, lambda found: turned.get(found, found))


def _empty_rows(everywhere: Any, points: Any, form: Affine) -> Any:
    """The rows of which no pair is certain, whatever the flags are."""
    import islpy

    kind = islpy.dim_type.set
    num_q, num_k, num_flags = len(form.q_digits), len(form.k_digits), len(form.flags)
    doubtful = everywhere.subtract(points).project_out(kind, num_q + num_k, num_flags)
    every_pair = everywhere.project_out(kind, num_q + num_k, num_flags)
    certain = every_pair.subtract(doubtful).project_out(kind, num_q, num_k)
    return every_pair.project_out(kind, num_q, num_k).subtract(certain)


def _sample(points: Any, form: Affine) -> dict[str, int] | None:
    """Lengths and parameters of some point, with as short a length as isl finds."""
    import islpy

    lengths = [name for name in form.values["N"].symbols if name in form.params]
    for bound in (16, 64, 256, 2048, None):
        part = points
        for name in lengths:
            if bound is None:
                break
            at = dim_names(part, islpy.dim_type.param).index(name)
            part = part.upper_bound_val(islpy.dim_type.param, at, islpy.Val(bound, context=points.get_ctx()))
        point = part.sample_point()
        if point.is_void():
            continue
        names = dim_names(part, islpy.dim_type.param)
        digits = {name: int(str(point.get_coordinate_val(islpy.dim_type.param, at))) for at, name in enumerate(names)}
        found = {}
        for name, value in form.values.items():
            if name not in ("q", "k") and value.symbols <= digits.keys():
                found[plain_name(name)] = int(value.at(digits))
        return found
    return None


__all__ = ["CLAIMS", "Claim", "Proven", "Refuted", "Unknown", "Verdict", "Witness", "prove", "proven"]
