"""Does a claim about a pattern hold for every N and every parameter? Proven, Refuted with a pair, or Unknown with why.

A claim is a set that must be empty: `causal` is R & (k > q). Small sizes are searched first, so that a wrong claim is
refuted by its smallest counterexample, in the pattern's own terms; isl decides the rest for all sizes at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, product
from operator import add
from typing import Any, Literal

from patterndsl.analysis.budget import check_time, within
from patterndsl.analysis.conditions import assumptions
from patterndsl.analysis.digits import Affine, affine
from patterndsl.analysis.enclosing import enclosed, enclosing
from patterndsl.analysis.formula import digits_at
from patterndsl.analysis.glance import is_empty, mirrored, not_symmetric
from patterndsl.analysis.keys import squared
from patterndsl.analysis.pairs import Symbolic, hints, symbolic, usual
from patterndsl.analysis.radix import NotAffineError
from patterndsl.analysis.sets import MAX_OPERATIONS, GaveUpError, limited, regions
from patterndsl.analysis.verdict import Proven, Refuted, Unknown, Verdict, Witness
from patterndsl.analysis.witness import (
    Claim,
    Place,
    allowed,
    attended,
    bound_at,
    failure,
    first_failure,
    input_shapes,
    least_length,
    least_point,
    lookup_of,
    small_inputs,
)
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import NK, NQ, Arithmetic, Const, Index, Param, Var
from patterndsl.ir.relation import (
    EVERYTHING,
    Compare,
    Relation,
    conjunction,
    depends_on,
    disjunction,
    draws_in,
    indices,
    negation,
    substitute,
)
from patterndsl.sema.bind import Bound
from patterndsl.sema.fits import listed_heads
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_HEADS, MAX_SIZE

CLAIMS: tuple[Claim, ...] = ("causal", "rows_nonempty", "equals", "within", "symmetric")

MAX_SMALL = 10
MAX_SEARCHES = 2000
"""Masks that are looked at before isl is asked."""
MAX_DENSE = 1 << 22
MAX_NEAR = 40
"""Lengths that are all looked at where inputs or draws decide."""


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
    Labels are any integers; a counterexample has only such as their learners give.
    """
    pattern, other = squared(pattern), None if other is None else squared(other)
    if claim == "rows_nonempty" and pattern.fallback is not None:
        # a row has a key where either part of the pattern gives it one
        enough = prove(claim, _only_fallback(pattern), n=n, fixed=fixed)
        if isinstance(enough, Proven):
            return enough
        pattern = _united(pattern)
    problem = _Problem(claim, pattern, other, n, dict(fixed or {}))
    with within():
        try:
            problem.check_sizes()
            if pattern == other:  # written alike, each has what the other has
                return Proven(problem.text, problem.scope(None))
            found = problem.search()
        except GaveUpError as failed:
            return Unknown(problem.text, str(failed))
        if found is not None:
            return found
        has_fallback = any(side.fallback is not None for side in problem.patterns())
        return problem.verdict_beside_a_fallback() if has_fallback else problem.verdict()


def proven(claim: Claim, pattern: Resolved, other: Resolved | None = None, *, operations: int) -> Proven | None:
    """The proof of a claim for all sizes, none assumed to divide another, if so many operations of isl find it.

    No time is spent on counterexamples.
    """
    verdict = _Problem(claim, pattern, other, None, {}, operations, is_hurried=True).decide()
    return verdict if isinstance(verdict, Proven) else None


def scope_of(pattern: Resolved, *, n: int | None, fixed: Mapping[str, int]) -> str:
    """The scope of what holds of a pattern by its form alone. Raises PatternError where no sizes fit what is fixed."""
    problem = _Problem("causal", pattern, None, n, fixed)
    problem.check_sizes()
    return problem.scope(None)


def free_params(patterns: Sequence[Resolved], fixed: Mapping[str, int]) -> dict[str, int]:
    """The parameters without a value, with the least that they may be."""
    found: dict[str, int] = {}
    for resolved in patterns:
        for item in resolved.params:
            if item.name not in fixed and not isinstance(item.default, tuple):
                least = item.minimum.value if isinstance(item.minimum, Const) else 0
                found[item.name] = max(least, found.get(item.name, 0))
    return found


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
        return free_params(self.patterns(), self.fixed)

    def sizes(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Lengths and parameters, small ones first; as many parameters for each length as the effort allows."""
        free = self.free()
        least = max(map(least_length, self.patterns()))
        first = least if least > MAX_SMALL else 0
        lengths = range(first, first + MAX_SMALL + 1) if self.n is None else [self.n]
        most = max(8, MAX_SEARCHES // (self.effort() * len(lengths) * max(1, lengths[-1] // MAX_SMALL) ** 2))
        above = islice(sorted(product(range(4), repeat=len(free)), key=lambda steps: (sum(steps), steps)), most)
        values = [dict(zip(free, map(add, free.values(), steps), strict=True)) for steps in above]
        yield from product(lengths, values)

    def effort(self) -> int:
        """What one size takes, in masks of a small pattern; a draw counts for several, as its keys are drawn first."""
        nodes = sum(1 for resolved in self.patterns() for _ in indices(resolved.relation))
        draws = sum(1 for resolved in self.patterns() for _ in draws_in(resolved.relation))
        num_inputs = 8 if any(resolved.inputs for resolved in self.patterns()) else 1
        return (
            num_inputs
            * (2 if self.uses_layer else 1)
            * (4 if self.max_heads > 1 else 1)
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

    def refuted_at(
        self, n: int, values: Mapping[str, int], heads: Sequence[int] = range(4), layers: Sequence[int] = range(2)
    ) -> Refuted | None:
        """A counterexample at one size, by looking at every pair."""
        heads = [head for head in heads if head < self.max_heads]
        for layer in layers if self.uses_layer else (0,):
            try:
                bounds = [self.bound(resolved, n, values, heads[-1] + 1, layer) for resolved in self.patterns()]
            except PatternError:
                continue  # sizes that the spec does not allow
            shapes = input_shapes(bounds)
            for inputs in small_inputs(shapes):
                lookup = lookup_of(inputs, shapes)
                for head in heads:
                    check_time()
                    pair = first_failure(self.claim, *(attended(bound, head, range(n), lookup) for bound in bounds))
                    if pair is not None:
                        shown = {name: tuple(map(int, array)) for name, array in inputs.items()}
                        witness = Witness(n, {**self.fixed, **values}, head, layer, pair[0], pair[1], shown)
                        return Refuted(self.text, witness, pair[2])
        return None

    @cached_property
    def max_heads(self) -> int:
        """How many heads can differ: one where none does, else as many as the shortest list has items for."""
        if not self._uses("head"):
            return 1
        listed = (listed_heads(resolved) for resolved in self.patterns())
        return min((number for number in listed if number is not None), default=MAX_HEADS)

    @cached_property
    def uses_layer(self) -> bool:
        return self._uses("layer")

    def _uses(self, name: Literal["head", "layer"]) -> bool:
        return any(depends_on(_united(resolved).relation, name) for resolved in self.patterns())

    def bound(self, resolved: Resolved, n: int, values: Mapping[str, int], heads: int, layer: int) -> Bound:
        return bound_at(resolved, n, {**self.fixed, **values}, heads, layer)

    # ---- all sizes

    def check_sizes(self) -> None:
        """Raises PatternError where the length and the fixed parameters fit no values of the others."""
        if self.n is None:
            return
        try:
            given, known = self.given()
            form = affine([EVERYTHING], given, lengths=self.lengths(), hints=known)
            with limited(self.operations // 10) as context:
                is_impossible = regions(context, form)[0].is_empty()
        except (NotAffineError, GaveUpError):
            return
        if is_impossible and self.n:
            for resolved in self.patterns():
                self.bound(resolved, self.n, {}, 1, 0)  # says what does not fit

    def verdict_beside_a_fallback(self) -> Verdict:
        """For all sizes, where rows without keys attend something else: they are none, or it changes nothing."""
        sides = [replace(side, fallback=None) for side in self.patterns()]
        found = replace(self, pattern=sides[0], other=None if self.other is None else sides[1]).verdict()
        match self.claim, found:
            case "causal", Refuted() | Unknown():
                return found
            case "causal", Proven(scope=scope):
                other = replace(self, pattern=_only_fallback(self.pattern)).verdict()
                if isinstance(other, Proven):
                    is_same = scope == other.scope
                    return found if is_same else replace(found, scope=f"{scope}, and its fallback {other.scope}")
            case "equals", Proven() if len({side.fallback for side in self.patterns()}) == 1:
                return found
        rows = (_Problem("rows_nonempty", side, None, self.n, self.fixed).verdict() for side in sides)
        if all(isinstance(row, Proven) for row in rows):
            return found
        return Unknown(self.text, "what the fallback gives to rows that have no keys of their own may break it")

    def verdict(self) -> Verdict:
        """For all sizes; where that is open, what the default parameters say of it."""
        found = self.decide()
        usually = replace(self, fixed={**self.fixed, **self.defaults()})
        if not isinstance(found, Unknown) or usually.fixed == self.fixed:
            return found
        try:
            counterexample = usually.search()
            settled = usually.decide() if counterexample is None else counterexample
        except GaveUpError:
            return found
        if not isinstance(settled, Proven):
            return settled if isinstance(settled, Refuted) else found
        values = ", ".join(f"{name} = {value}" for name, value in self.defaults().items())
        return Unknown(self.text, f"{found.reason}; at the defaults {values} it is proven for {self.length()}")

    def defaults(self) -> dict[str, int]:
        """Numbers that free parameters have by default."""
        declared = (item for resolved in reversed(self.patterns()) for item in resolved.params)
        return {
            item.name: item.default.value
            for item in declared
            if item.name not in self.fixed and isinstance(item.default, Const)
        }

    def decide(self) -> Verdict:
        if self.claim == "symmetric" and self.is_symmetric_by_parts():
            return Proven(self.text, self.scope(None))
        reasons = []
        forms = ((False, False), (True, False), (True, True))
        for digits, aligned in forms[:2] if self.is_hurried else forms:
            try:
                return self.decided(digits, aligned)
            except (NotAffineError, GaveUpError) as failed:
                reasons.append(str(failed))
        found = self.decided_by_a_bound()
        return Unknown(self.text, reasons[0]) if found is None else found

    def is_symmetric_by_parts(self) -> bool:
        """Whether unions and intersections of what is symmetric make the pattern."""
        parts = not_symmetric(self.pattern.relation)
        if parts == (self.pattern.relation,):
            return False
        problems = (replace(self, pattern=replace(self.pattern, relation=part)) for part in parts)
        return all(item.decide() == Proven(self.text, item.scope(None)) for item in problems)

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

    def lengths(self) -> Mapping[str, str]:
        """The symbols of the numbers of queries and keys, of both patterns the same."""
        return self.symbolic(self.pattern).lengths

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
        if self.claim != "rows_nonempty" and is_empty(asked):
            return Proven(self.text, self.scope(None))
        form = affine([asked], given, lengths=self.lengths(), hints=known, digits=digits, aligned=aligned)
        with limited(self.operations // 3) as context:  # three ways to write it are tried
            everywhere, (points,) = regions(context, form)
            if self.claim == "rows_nonempty":
                points = _empty_rows(everywhere, points, form)
            if points.is_empty():
                if form.assumed and not self.is_usual(form):
                    raise NotAffineError(f"it would have to assume that {' and '.join(assumptions(form))}")
                return Proven(self.text, self.scope(form))
            return Unknown(self.text, "a bound decides nothing") if is_bound else self.refuted_by(points, form)

    def symbolic(self, resolved: Resolved) -> Symbolic:
        """The relation with what is fixed put in."""
        known = {item.name for item in resolved.params}
        side = symbolic(resolved, fixed={name: value for name, value in self.fixed.items() if name in known})
        if self.n is None:
            return side
        length = Const(self.n)
        known_lengths = (NQ, NK) if resolved.num_keys is None else (NQ,)

        def put(found: Var | Param) -> Index:
            return length if found in known_lengths else found

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
                return conjunction([first, negation(mirrored(first))])
            case "rows_nonempty":
                raise AssertionError("rows are decided by projection")

    def is_usual(self, form: Affine) -> bool:
        """Whether the default parameters fit what the form assumes, at some length."""
        found: list[dict[str, int]] = [{}]
        for resolved in self.patterns():
            known = {item.name for item in resolved.params}
            values = {name: value for name, value in self.fixed.items() if name in known}
            found = [{**item, **more} for more in usual(resolved, values, self.n) for item in found[:1]]
        return not found or any(digits_at(form, values) is not None for values in found)

    def refuted_by(self, points: Any, form: Affine) -> Verdict:
        """The first point of isl, taken back to sizes and looked at there."""
        if self.is_hurried:
            return Unknown(self.text, "counterexamples are not looked for")
        points.get_ctx().reset_operations()
        points = allowed(points, form)
        if points.is_empty():
            return Proven(self.text, self.scope(form, f"N ≤ 2^{MAX_SIZE.bit_length() - 1}"))
        place = least_point(points, form)
        values = {name: place.params.get(name, least) for name, least in self.free().items()}
        if form.flags:
            found = self.refuted_near(place, values)
            return Unknown(self.text, "it depends on what the inputs or draws are") if found is None else found
        found = self.refuted_there(replace(place, params=values))
        if "N" in form.params and found is not None:
            return found
        # its length need not be the least, or it rests on what isl does not know of these parameters
        there = replace(self, fixed={**self.fixed, **values}).decide() if values else found
        if isinstance(there, Refuted):
            return there
        return Unknown(self.text, f"the counterexample of isl is none (N = {place.n:,})") if found is None else found

    def refuted_there(self, place: Place) -> Refuted | None:
        """The witness, if it is one in the pattern's own terms."""
        try:
            bounds = [
                self.bound(resolved, place.n, place.params, place.head + 1, place.layer) for resolved in self.patterns()
            ]
        except PatternError:
            return None
        relations = [group.relation for bound in bounds for group in bound.groups if place.head in group.heads]
        why = failure(self.claim, relations, place, bounds[0].sizes.kv_len)
        params = {**self.fixed, **place.params}
        witness = Witness(place.n, params, place.head, place.layer, place.q, place.k)
        return None if why is None else Refuted(self.text, witness, why)

    def refuted_near(self, place: Place, values: Mapping[str, int]) -> Refuted | None:
        """A counterexample with some inputs or draws, where a place has one with others."""
        heads, layers = sorted({*range(4), place.head}), sorted({0, 1, place.layer})
        shortest = max(place.q, place.k or 0) + 1
        lengths = sorted({*range(MAX_SMALL + 1, min(place.n, MAX_NEAR) + 1), shortest, place.n})
        for n in lengths if self.n is None else [self.n]:
            if n * n <= MAX_DENSE:
                found = self.refuted_at(n, values, heads, layers)
                if found is not None:
                    return found
        return None

    def length(self) -> str:
        return "all N" if self.n is None else f"N = {self.n:,}"

    def scope(self, form: Affine | None, length: str = "") -> str:
        """For which sizes and parameters the proof is."""
        # of what is divided by in the patterns, whether the proof had to look at it or not
        divisors = {name for side in self.patterns() for name in _divisors(side.relation)}
        free = [f"{name} ≥ {max(least, int(name in divisors))}" for name, least in self.free().items()]
        set_to = [f"{name} = {value}" for name, value in self.fixed.items()]
        text = f"for {length or self.length()}" + (f" and all {', '.join(free)}" if free else "")
        text += f", with {', '.join(set_to)}" if set_to else ""
        if form and form.assumed:
            text += f", where {' and '.join(assumptions(form))}"
        return text


def _divisors(relation: Relation) -> Iterator[str]:
    """The parameters that something is divided by, alone or in a product: they are at least 1 where it is defined."""
    for index in indices(relation):
        if isinstance(index, Arithmetic) and index.op in ("//", "%"):
            yield from _factors(index.right)


def _factors(index: Index) -> Iterator[str]:
    match index:
        case Param(name):
            yield name
        case Arithmetic("*", left, right):
            yield from _factors(left)
            yield from _factors(right)


def _only_fallback(resolved: Resolved) -> Resolved:
    """What rows attend that have no keys of their own."""
    assert resolved.fallback is not None
    return replace(resolved, relation=resolved.fallback, fallback=None)


def _united(resolved: Resolved) -> Resolved:
    """The pattern in which every row has the keys that the fallback gives it."""
    if resolved.fallback is None:
        return resolved
    return replace(resolved, relation=disjunction([resolved.relation, resolved.fallback]), fallback=None)


def _empty_rows(everywhere: Any, points: Any, form: Affine) -> Any:
    """The rows of which no pair is certain, whatever the flags are."""
    import islpy

    kind = islpy.dim_type.set
    num_q, num_k, num_flags = len(form.q_digits), len(form.k_digits), len(form.flags)
    doubtful = everywhere.subtract(points).project_out(kind, num_q + num_k, num_flags)
    every_pair = everywhere.project_out(kind, num_q + num_k, num_flags)
    certain = every_pair.subtract(doubtful).project_out(kind, num_q, num_k)
    return every_pair.project_out(kind, num_q, num_k).subtract(certain)


__all__ = ["CLAIMS", "Claim", "Proven", "Refuted", "Unknown", "Verdict", "Witness", "prove", "proven"]
