"""What is known of a pattern with several terms? What is known of each, taken together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from patterndsl.analysis.figure import Certainty, Figure
from patterndsl.analysis.keys import squared
from patterndsl.analysis.latex import Shown
from patterndsl.analysis.proof import prove
from patterndsl.analysis.report import FIGURES, Report
from patterndsl.analysis.selection import Causality, prove_causality
from patterndsl.analysis.verdict import Proven, Refuted, Unknown, Verdict
from patterndsl.ir.index import Const
from patterndsl.ir.relation import compare, conjunction, depends_on, disjunction
from patterndsl.sema.model import Resolved

SUMS = ("pairs", "flops", "backward_flops")


@dataclass(frozen=True, slots=True)
class CompositeReport(Shown):
    """The reports of all terms by name. Figures that are sums of theirs: pairs, flops, backward_flops; None where one
    of them is not known."""

    name: str
    n: int | None
    terms: Mapping[str, Report]

    @property
    def pairs(self) -> Figure | None:
        """Of all heads and terms."""
        return self._sum("pairs")

    @property
    def flops(self) -> Figure | None:
        return self._sum("flops")

    @property
    def backward_flops(self) -> Figure | None:
        return self._sum("backward_flops")

    @property
    def order(self) -> str | None:
        """The orders of the terms, the same once."""
        orders = [report.order for report in self.terms.values()]
        known = [order for order in orders if order is not None]
        return " + ".join(dict.fromkeys(known)) if len(known) == len(orders) else None

    def _sum(self, name: str) -> Figure | None:
        figures = [getattr(report, name) for report in self.terms.values()]
        if any(figure is None for figure in figures):
            return None
        certain: Certainty = "Exact"
        for worse in ("UpperBound", "Expected"):
            if any(figure.certainty == worse for figure in figures):
                certain = worse
        return Figure(sum(figure.value for figure in figures), certain, figures[0].unit, "the sum over the terms")

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        sums = {name: None if (found := self._sum(name)) is None else found.to_dict() for name in SUMS}
        terms = {name: report.to_dict() for name, report in self.terms.items()}
        return {"name": self.name, "n": self.n, "order": self.order, **sums, "terms": terms}

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [self.name]
        for name, report in self.terms.items():
            first, *rest = report.lines()
            found += [f"  of {name}" + first.removeprefix(report.name), *(f"  {line}" for line in rest)]
        if self.pairs is not None:
            found.append(f"  all terms at N = {self.n:,}")
            found += [f"    {label:<22} {figure}" for label, figure in self._labelled() if figure is not None]
        return found

    def _labelled(self) -> Iterator[tuple[str, Figure | None]]:
        yield "pairs, all heads", self.pairs
        yield "forward work", self.flops
        yield "backward work", self.backward_flops

    def latex(self) -> str:
        """The formulas of all terms in LaTeX."""
        return r" \\ ".join(filter(None, (report.latex() for report in self.terms.values())))

    def __str__(self) -> str:
        return "\n".join(self.lines())


assert set(SUMS) <= set(FIGURES)

Sides: TypeAlias = Mapping[str, tuple[Resolved, Resolved | None]]
"""Each term, and which of its keys depend on nothing after the query."""


def causality(claim: Causality, terms: Sides, *, n: int | None, fixed: Mapping[str, int]) -> Verdict:
    """Whether no query attends a key that depends on a later token, nor is told by one which keys to attend."""
    verdicts = {}
    for name, (resolved, seen) in terms.items():
        known = _known(resolved, fixed)
        if seen is None:
            verdicts[name] = prove_causality(claim, resolved, n=n, fixed=known)
            continue
        verdicts[name] = prove("within", resolved, seen, n=n, fixed=known)
        if resolved.labels or resolved.selections:
            chosen = prove_causality("pattern_causal", resolved, n=n, fixed=known)
            verdicts[name] = chosen if isinstance(verdicts[name], Proven) else verdicts[name]
    return in_each_term(claim, verdicts)


def _known(resolved: Resolved, fixed: Mapping[str, int]) -> dict[str, int]:
    names = {item.name for item in resolved.params}
    return {name: value for name, value in fixed.items() if name in names}


def in_each_term(claim: str, verdicts: Mapping[str, Verdict]) -> Verdict:
    """What holds where it holds of each term: one that fails is enough to refute it."""
    text = claim.replace("_", "-" if claim.endswith("_causal") else " ")
    for name, verdict in verdicts.items():
        if isinstance(verdict, Refuted):
            why = "the key depends on a later token" if verdict.why == "only the first has the pair" else verdict.why
            return Refuted(text, verdict.witness, f"in `{name}`, {why}" + f", key {verdict.witness.k} of its source")
    for name, verdict in verdicts.items():
        if isinstance(verdict, Unknown):
            return Unknown(text, f"in `{name}`, {verdict.reason}")
    scopes = dict.fromkeys(verdict.scope for verdict in verdicts.values() if isinstance(verdict, Proven))
    return Proven(text, ", and ".join(scopes))


def rows_nonempty(terms: Mapping[str, Resolved], *, n: int | None, fixed: Mapping[str, int]) -> Verdict:
    """Whether each query has a key in some term: in one of them, or in the union of those that have at most N keys."""
    together: list[Resolved] = []
    first: Verdict | None = None
    for resolved in terms.values():
        found = prove("rows_nonempty", resolved, n=n, fixed=_known(resolved, fixed))
        if isinstance(found, Proven):
            return found
        first = found if first is None else first
        together.append(squared(resolved))
    assert first is not None
    if len(together) == 1:
        return first
    relations = []
    for resolved in together:
        is_alike = resolved.num_keys is None
        if not is_alike and depends_on(resolved.relation, "k"):
            return Unknown(
                "rows nonempty", "no term alone has keys for all queries, and their unions are not looked at"
            )
        some = () if is_alike or resolved.num_keys is None else (compare("<=", Const(1), resolved.num_keys),)
        relations.append(conjunction((*some, resolved.relation)))
    params = {item.name: item for resolved in together for item in resolved.params}
    inputs = {item.name: item for resolved in together for item in resolved.inputs}
    union = replace(
        together[0],
        relation=disjunction(relations),
        params=tuple(params.values()),
        inputs=tuple(inputs.values()),
        requirements=tuple(dict.fromkeys(item for resolved in together for item in resolved.requirements)),
        labels=tuple({item.name: item for resolved in together for item in resolved.labels}.values()),
        selections=tuple({item.name: item for resolved in together for item in resolved.selections}.values()),
        num_keys=None,
    )
    return prove("rows_nonempty", union, n=n, fixed=_known(union, fixed))
