"""What is a pattern with several key sources or branches to its user? Its terms, each a pattern, and how they meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from os import PathLike
from typing import TYPE_CHECKING, NoReturn

from patterndsl.diagnostics import Diagnostic, PatternError, input_error
from patterndsl.ir.index import Index
from patterndsl.ir.relation import (
    NOTHING,
)
from patterndsl.pattern import Pattern, checked_claim, constants_for, fixed_value
from patterndsl.sema.decays import decays
from patterndsl.sema.model import Resolved, RoleDeclaration
from patterndsl.sema.parameters import MAX_LAYER, MAX_SIZE, counted, param_values, self_sizes, sized, sizes_of
from patterndsl.sema.terms import ResolvedTerm, resolve_terms
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression
from patterndsl.terms import OPERATIONS, Branch, Term

if TYPE_CHECKING:
    import torch

    from patterndsl.analysis.composed import CompositeReport
    from patterndsl.analysis.explain_terms import WholeExplanation
    from patterndsl.analysis.policy import Policy
    from patterndsl.analysis.proof import Verdict
    from patterndsl.analysis.reach import Reach
    from patterndsl.analysis.redundancy import DeadTerm
    from patterndsl.lower.devices import Machine
    from patterndsl.lower.tiles import OnEvent
    from patterndsl.runtime.composed import CompositeProgram


OF_WHOLE_PATTERNS = ("W202", "W301", "W402")
"""Advice about what a part of a pattern need not have: all names used, keys for each query, full tiles."""


@dataclass(frozen=True, eq=False, repr=False)
class Composite(Pattern):
    """A checked pattern whose keys come from several sources, or which attends in several branches or roles.

    A branch is one softmax over the keys of all of its terms; branches are added, averaged or gated (`combine`). What
    belongs to a single relation, such as tiles, is asked of `terms`; `resolved` holds what the spec declares.
    written: the terms before roles divide them, which are the same pairs with whatever projections.

    It is a Pattern, so that reading a spec gives one type whatever it holds. Its program is not a `Program`: it has no
    tiles, block mask or plan, and says of whom to ask them.
    """

    terms: tuple[Term, ...] = field(default=())
    branches: Mapping[str, Branch] = field(default_factory=dict)
    written: tuple[Term, ...] = field(default=())

    @classmethod
    def of(cls, spec: ast.Spec, found: Sequence[Diagnostic] = ()) -> Composite:
        """The pattern of a spec with branches. Raises PatternError with everything that is wrong with it."""
        resolved, terms, told = resolve_terms(spec, found)
        written = tuple(map(_term, terms.written))
        empty = {projections for projections, pairs in terms.pieces.items() if _is_empty(pairs)}
        parts = [part for part in terms.divided if part.projections not in empty and part.resolved.relation != NOTHING]
        made = tuple(part for term in written for part in _divided(term, parts))
        branches = {
            branch.name: Branch(
                branch.name,
                tuple(term for term in made if term.branch == branch.name),
                told.scores[branch.name],
                told.biases.get(branch.name),
                told.softcaps.get(branch.name),
            )
            for branch in spec.branches
        }
        _check_sums(spec, branches)
        return cls(spec, resolved, made, branches, written)

    @property
    def whole(self) -> Pattern | None:
        """Which key of the sequence a query attends, by whatever score and projections; None where there are other
        sources, or several branches."""
        if len(self.written) > 1 or self.written[0].source != ast.OWN_KEYS:
            return None
        only = self.written[0].pattern
        return replace(only, spec=replace(only.spec, name=self.name))

    @property
    def title(self) -> str:
        """What reports are headed with: the spec's name, or what is attended of each source."""
        written = (
            f"{'.'.join(filter(None, (branch.name, term.source)))}: {render_expression(term.attend)}"
            for branch in self.spec.branches
            for term in branch.terms
        )
        return self.name or "; ".join(written)

    @property
    def combine(self) -> ast.Combine:
        """How branches become one output."""
        return self.spec.combine

    @property
    def projections(self) -> frozenset[ast.Projection]:
        """Which of `query` and `key` scores, learners and selections read: made scores alone read neither."""
        both: frozenset[ast.Projection] = frozenset({"query", "key"})
        makes_up = all(item.is_made_up and "product" not in item.score.makers for item in self.branches.values())
        if not makes_up or self.resolved.labels or self.resolved.selections:
            return both
        of_tables: dict[str, frozenset[ast.Projection]] = {
            "scalars": frozenset(),
            "vectors": frozenset({"query"}),
            "sinusoids": both,
        }
        return frozenset[ast.Projection]().union(*(of_tables[item.kind] for item in self.resolved.tables))

    @property
    def told(self) -> tuple[object, ...]:
        """All that is said beside what is attended: sources, tables and scores with their settings, who has which
        projections, and `combine`."""
        return (
            {item.name: (item.kind, item.settings) for item in self.resolved.sources},
            {item.name: (item.kind, item.size) for item in self.resolved.tables},
            {item.name: (item.score, item.bias, item.softcap) for item in self.branches.values()},
            {term.name: term.projections for term in self.terms},
            self.combine,
        )

    @property
    def listed_heads(self) -> int | None:
        """Of the terms; of lists in biases and decays nothing is known."""
        found = (term.pattern.listed_heads for term in self.terms)
        return min((heads for heads in found if heads is not None), default=None)

    def __repr__(self) -> str:
        return f"Composite({self.text!r})"

    # ---- what is asked of each term -------------------------------------------------------------------------

    def report(
        self,
        n: int | None = None,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int = 64,
        dtype: str | torch.dtype = "float32",
        layer: int = 0,
        block: int = 128,
        inputs: Mapping[str, object] | None = None,
    ) -> CompositeReport:
        """The report of each term, and what they come to; see `Pattern.report`. Of `recall` as many states are counted
        as there can be; terms that have no pairs in this layer are left out. Making the keys of a source costs more,
        which is not counted, and of a score that sums features no pair is: its work is that of the sums."""
        from patterndsl.analysis.composed import Part, composite_report

        found = {}
        for term in self.terms_at(layer):
            read = {item.name for item in term.pattern.resolved.inputs}
            report = term.pattern.report(
                n,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                layer=layer,
                block=block,
                inputs=None if inputs is None else {name: item for name, item in inputs.items() if name in read},
            )
            branch = self.branches[term.branch]
            if branch.runs != "planned":  # times are those of plans
                report = replace(report, times={}, dense_times={}, overtakes={})
            features = self.num_features(term.branch, head_dim)
            found[term.name] = Part(report, term.source, features, (term.projections.key, term.projections.value))
        return composite_report(self.title, found)

    def prove(
        self,
        claim: str,
        other: Pattern | None = None,
        *,
        n: int | None = None,
        params: Mapping[str, int] | None = None,
    ) -> Verdict:
        """Proven, Refuted with a witness, or Unknown with the reason; see `Pattern.prove`.

        Causal: no query attends a key that depends on a later token. rows_nonempty: each query has a key in some term.
        equals, within: term by term, with a pattern of the same terms. Raises InputError (E506) on other claims.
        """
        from patterndsl.analysis.composed import causality, in_each_term, rows_nonempty

        known = checked_claim(claim, other is not None)
        values = {name: fixed_value(name, value, [self]) for name, value in dict(params or {}).items()}
        n = None if n is None else counted("n", n, 0, MAX_SIZE)
        resolved = {term.name: (term.pattern.resolved, term.seen) for term in self.written}
        match known:
            case "causal" | "value_causal" | "pattern_causal":
                return causality(known, resolved, n=n, fixed=values)
            case "rows_nonempty":
                return rows_nonempty({name: item for name, (item, _) in resolved.items()}, n=n, fixed=values)
            case "equals" | "within":
                theirs = {term.name: term.pattern for term in other.terms} if isinstance(other, Composite) else {}
                ours = {term.name: term.pattern for term in self.terms}
                if not isinstance(other, Composite) or theirs.keys() != ours.keys() or self.told != other.told:
                    help = f"compare with a pattern of the terms {', '.join(ours)}, or term by term"
                    message = f"`{claim}` compares patterns with the same sources, branches, scores and roles"
                    raise input_error("E506", message, help)
                verdicts = {name: item.prove(claim, theirs[name], n=n, params=params) for name, item in ours.items()}
                return in_each_term(known, verdicts)
            case _ if self.whole is not None:
                return self.whole.prove(claim, n=n, params=params)
            case _:
                help = f"ask a term: --term {self.terms[0].name}, in Python pattern.terms[0].pattern"
                raise input_error("E506", f"`{claim}` is about one relation", help)

    def terms_at(self, layer: int) -> tuple[Term, ...]:
        """The terms that take part in a layer, all where none does."""
        return tuple(term for term in self.terms if term.takes_part(layer)) or self.terms

    def branches_at(self, layer: int) -> dict[str, tuple[Term, ...]]:
        """The branches that take part in a layer, and their terms there; the only branch always does."""
        found = {name: branch.terms_at(layer) for name, branch in self.branches.items()}
        if len(found) == 1:
            return {name: terms or self.branches[name].terms[:1] for name, terms in found.items()}
        return {name: terms for name, terms in found.items() if terms}

    def compile(  # type: ignore[override]  # several softmaxes are no Program, which has tiles and a mask
        self,
        n: int | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        q_start: int = 0,
        heads: int = 1,
        layer: int = 0,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        plan: int | None = None,
        machine: Machine | str | PathLike[str] | None = None,
    ) -> CompositeProgram:
        """An executable program for these sizes, see `Pattern.compile`; kv_len are the sequence's own keys.

        Raises PatternError: E4xx where the sizes do not fit the pattern, E505 where no term runs by the backend.
        """
        from patterndsl.runtime.composed import CompositeProgram

        if plan is not None:
            raise input_error("E505", "plans are made for each term", "compile a term: pattern.terms[0].pattern")
        sizes = sizes_of(n, q_len, kv_len, q_start)
        options = {"heads": heads, "layer": layer, "device": device, "backend": backend, "machine": machine}
        return CompositeProgram(self, sizes, options)

    def num_keys(self, source: str, n: int) -> int:
        """How many keys a source has for a sequence of n tokens; of `recall` and `compress` the most.

        Raises PatternError (E4xx) where parameters do not fit the length.
        """
        term = next(term for term in self.terms if term.source == source)
        return self_sizes(term.pattern.resolved, n).kv_len

    def settings(self, source: str, n: int = 1) -> dict[str, int | float | str]:
        """What a source is told, numbers at n tokens and the defaults of the parameters."""
        declared = next(item for item in self.resolved.sources if item.name == source)
        return self._told(declared.settings, n)

    def score_settings(self, branch: str, n: int = 1) -> dict[str, int | float | str]:
        """What the score of a branch is told, in the same way."""
        return self._told(self.branches[branch].score.settings, n)

    def decay(self, branch: str, heads: int, layer: int = 0) -> tuple[float, ...] | None:
        """By what factor weights of a branch decay with each token, for each head; None where they do not.

        Raises PatternError (E402) where one is not above 0 and at most 1.
        """
        return decays(self.branches[branch].score, self.resolved, heads, layer)

    def table_size(self, table: str, n: int = 1) -> int | None:
        """How many entries a table has; None for sinusoids."""
        size = next(item.size for item in self.resolved.tables if item.name == table)
        return None if size is None else int(self._told((("size", size),), n)["size"])

    def _told(self, settings: Iterable[tuple[str, Index | Decimal | str]], n: int) -> dict[str, int | float | str]:
        sizes = self_sizes(replace(self.resolved, num_keys=None), n)
        values = param_values(self.resolved, {}, sizes)
        found: dict[str, int | float | str] = {}
        for name, value in settings:
            match value:
                case str():
                    found[name] = value
                case Decimal():
                    found[name] = float(value)
                case _:
                    found[name] = sized(value, sizes, values)
        return found

    # ---- what belongs to a single relation ------------------------------------------------------------------

    def fit(self, n: int, *, heads: int = 1, layer: int = 0) -> None:
        """Raises PatternError (E4xx) where a source or term does not fit the sizes."""
        from patterndsl.sema.bind import bind

        for resolved in (self.resolved, *(term.pattern.resolved for term in self.terms)):
            bind(resolved, self_sizes(resolved, n), heads, layer)
        for branch in self.branches:
            self.decay(branch, heads, layer)

    def misfit(self, heads: int) -> PatternError | None:
        """What is wrong with a source or term at every length."""
        from patterndsl.sema.fits import misfit

        resolved = (self.resolved, *(term.pattern.resolved for term in self.terms))
        wrong = next((found for found in (misfit(item, heads) for item in resolved) if found is not None), None)
        if wrong is None and all(item.default is not None for item in self.resolved.params):
            try:
                for branch in self.branches:
                    self.decay(branch, heads)
            except PatternError as failed:
                return failed
        return wrong

    def bind(self, n: int | None = None, *, heads: int = 1, layer: int = 0, **sizes: int | None) -> NoReturn:
        """Refused (E505), after `fit`: each term is bound by itself."""
        if n is not None:
            self.fit(n, heads=heads, layer=layer)
        self._refuse("sizes are bound for one relation", "bind")

    def cache_policy(self, *, head: int = 0, layer: int = 0) -> Policy:
        """Refused (E505): each term has a policy of its own."""
        self._refuse("a cache policy is of one relation", "cache_policy")

    def reach(
        self,
        n: int,
        *,
        heads: int = 1,
        layers: int | None = None,
        inputs: Mapping[str, object] | None = None,
        on_event: OnEvent | None = None,
    ) -> Reach:
        """See `Pattern.reach`. Refused (E505) where there are sources or branches: it is told within one sequence."""
        whole = self.whole
        if whole is None:
            self._refuse("reach is told between positions of one sequence", "reach")
        return whole.reach(n, heads=heads, layers=layers, inputs=inputs, on_event=on_event)

    def dead_terms(self) -> tuple[DeadTerm, ...]:
        """Dead terms of each term's expression."""
        return tuple(dead for term in self.written for dead in term.pattern.dead_terms())

    def lint(self, n: int | None = None, *, heads: int | None = None, layer: int = 0) -> tuple[Diagnostic, ...]:
        """What is said of the terms that are the sequence's own keys, and of what no term uses."""
        from patterndsl.analysis.bias import not_finite
        from patterndsl.analysis.names import unused

        heads = (self.listed_heads or 8) if heads is None else heads
        places = {branch.name: branch.bias.place for branch in self.spec.branches if branch.bias is not None}
        biases = [
            item
            for term in self.terms
            if (bias := self.branches[term.branch].bias) is not None
            for item in not_finite(
                bias, self.resolved, term.pattern.resolved, term.position, places[term.branch], heads, layer
            )
        ]
        advice = [
            item
            for term in self.written
            if term.source == ast.OWN_KEYS
            for item in term.pattern.lint(n, heads=heads, layer=layer)
            if item.code not in OF_WHOLE_PATTERNS
        ]
        has_pairs = {role for term in self.terms for role in term.projections.owned().values()}
        without = [item for item in self.resolved.roles if item.name not in has_pairs]
        return tuple(dict.fromkeys((*unused(self.spec), *biases, *map(_never_asked, without), *advice)))

    def explain(  # type: ignore[override]  # a plan for each term, and what all of them take
        self,
        n: int | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        q_start: int = 0,
        heads: int = 1,
        layer: int = 0,
        head_dim: int = 64,
        device: str | PathLike[str] = "cpu",
        train: bool = False,
        on_event: OnEvent | None = None,
    ) -> WholeExplanation:
        """Which plan runs of each term of the layer, how results meet, and what all of it should take; see
        `Pattern.explain`. Terms that sum features, or whose scores are more than products, have no plan."""
        from patterndsl.analysis.explain import explained
        from patterndsl.analysis.explain_terms import Part, whole_explanation

        head_dim, constants, parts = counted("head_dim", head_dim, 1, MAX_SIZE), constants_for(device), []
        sizes = sizes_of(n, q_len, kv_len, q_start)
        for term in self.terms_at(counted("layer", layer, 0, MAX_LAYER)):
            num_keys = sizes.kv_len if term.source == ast.OWN_KEYS else self.num_keys(term.source, sizes.total)
            bound = term.pattern.bind(
                sizes.total, q_len=sizes.q_len, kv_len=num_keys, q_start=sizes.q_start, heads=heads, layer=layer
            )
            made, runs = None, self.branches[term.branch].runs
            if runs == "planned":
                title = term.pattern.title
                made = explained(bound, title, constants, head_dim=head_dim, train=train, on_event=on_event)
            parts.append(Part(term.name, term.branch, runs, bound, made, self.num_features(term.branch, head_dim)))
        return whole_explanation(self.title, parts, self.combine, constants, head_dim=head_dim, train=train)

    def num_features(self, branch: str, head_dim: int) -> int | None:
        """How many features a key has where the branch sums them."""
        if not self.branches[branch].is_kernel:
            return None
        return int(self.score_settings(branch).get("features", head_dim))

    def _refuse(self, why: str, name: str) -> NoReturn:
        names = ", ".join(term.name for term in self.terms)
        help = f"ask a term, of {names}: pattern.terms[0].pattern.{name}(...)"
        raise input_error("E505", f"{why}, and this pattern has {len(self.terms)}", help)


def _term(term: ResolvedTerm) -> Term:
    pattern = Pattern(term.spec, term.resolved)
    return Term(term.branch, term.source, pattern, term.seen, term.position, term.projections)


def _divided(term: Term, parts: Sequence[ResolvedTerm]) -> Sequence[Term]:
    """The pieces of a term that have pairs; the term itself where there are none."""
    return [_term(part) for part in parts if (part.branch, part.source) == (term.branch, term.source)] or [term]


def _is_empty(pairs: Resolved) -> bool:
    """Whether there are none, for all sizes."""
    from patterndsl.analysis.proof import proven

    return proven("within", pairs, replace(pairs, relation=NOTHING), operations=OPERATIONS) is not None


def _never_asked(role: RoleDeclaration) -> Diagnostic:
    message = f"role `{role.name}` is of no pair that is attended, or roles before it have them all"
    return Diagnostic("W202", message, role.place, "drop it, or put it before the others")


def _check_sums(spec: ast.Spec, branches: Mapping[str, Branch]) -> None:
    """Raises PatternError (E211) where a score sums features and a term's keys cannot be summed."""
    wrong = []
    for declared, branch in zip(spec.branches, branches.values(), strict=True):
        if branch.runs == "planned":
            continue
        source = {term.source: term for term in branch.terms}
        for written in declared.terms:
            term = source[written.source]
            if branch.is_kernel and term.summable is None:
                text = render_expression(written.attend)
                message = f"`{branch.score.name}` sums over all keys, or all up to the query, and `{text}` is neither"
                help = "write `all` or `causal`, with conditions on keys; a window can be a branch with softmax scores"
                wrong.append(Diagnostic("E211", message, written.attend.place, help))
            elif branch.score.decay is not None and (term.summable is None or term.summable.reach != "causal"):
                text = render_expression(written.attend)
                message = (
                    f"weights decay with each token since the key, and `{text}` is not every token up to the query"
                )
                help = "attend `causal` of the sequence's own keys, or drop `decay`"
                wrong.append(Diagnostic("E211", message, written.attend.place, help))
            if branch.is_made_up and term.source != ast.OWN_KEYS:
                message = (
                    f"scores that are made up are of the sequence's own keys, and `{term.source}` is another source"
                )
                help = "attend it in a branch of its own"
                wrong.append(Diagnostic("E211", message, written.place, help))
    if wrong:
        raise PatternError(wrong)
