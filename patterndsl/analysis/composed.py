"""What is known of a pattern with several terms? What is known of each, taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

from patterndsl.analysis.cost import backward_flops, forward_flops, least_bytes, saved_bytes
from patterndsl.analysis.figure import Figure
from patterndsl.analysis.heads import figure_dict
from patterndsl.analysis.keys import squared
from patterndsl.analysis.proof import prove
from patterndsl.analysis.report import FIGURES, Report, least_certain
from patterndsl.analysis.selection import Causality, prove_causality
from patterndsl.analysis.verdict import Proven, Refuted, Unknown, Verdict
from patterndsl.ir.index import Const
from patterndsl.ir.relation import compare, conjunction, depends_on, disjunction
from patterndsl.sema.model import Resolved


@dataclass(frozen=True, slots=True)
class Part:
    """A term's report. source: where its keys come from. features: where they are summed, how many each key has; then
    no pair is looked at. roles: whose its keys and values are, see `sema.roles`."""

    report: Report
    source: str
    features: int | None = None
    roles: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class CompositeReport(Report):
    """The reports of all terms by name, and as a Report what they come to. groups are those of all terms; figures that
    belong to one relation, such as tiles and times, are None or empty."""

    parts: Mapping[str, Part]

    @property
    def terms(self) -> Mapping[str, Report]:
        """The report of each term."""
        return {name: part.report for name, part in self.parts.items()}

    @property
    def order(self) -> str | None:
        """The orders of the terms, the same once."""
        return self._joined([_linear(part) or part.report.order for part in self.parts.values()])

    @property
    def order_at_defaults(self) -> str | None:
        """The same where parameters have their defaults."""
        return self._joined([_linear(part) or part.report.order_at_defaults for part in self.parts.values()])

    def _joined(self, orders: Sequence[str | None]) -> str | None:
        known = [order for order in orders if order is not None]
        return " + ".join(dict.fromkeys(known)) if len(known) == len(orders) else None

    def formula_text(self) -> str:
        """The formulas of all terms in one line."""
        texts = {name: SUMMED if part.features else part.report.formula_text() for name, part in self.parts.items()}
        return "; ".join(f"{name}: {text}" for name, text in texts.items())

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        figures = {name: figure_dict(getattr(self, name)) for name in FIGURES}
        terms = {
            name: {**part.report.to_dict(), "source": part.source, "features": part.features}
            for name, part in self.parts.items()
        }
        return {"name": self.name, "n": self.n, "order": self.order, **figures, "terms": terms}

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [self.name]
        for name, part in self.parts.items():
            first, *rest = part.report.lines()
            found.append(f"  of {name}" + first.removeprefix(part.report.name))
            found += [f"    pairs = {SUMMED}"] if part.features else [f"  {line}" for line in rest]
        if self.pairs is not None:
            found.append(f"  all terms at N = {self.n:,}")
            found += [f"    {label:<22} {figure}" for label, figure in self.labelled() if figure is not None]
        return found

    def labelled(self) -> list[tuple[str, Figure | None]]:
        """The figures of all terms together; what is of one head is said of each."""
        names = {label: figure for label, figure in Report.labelled(self) if figure is not None}
        return [(label, figure) for label, figure in names.items() if not label.startswith(("keys of", "live tiles"))]

    def latex(self) -> str:
        """The formulas of all terms in LaTeX."""
        return r" \\ ".join(filter(None, (report.latex() for report in self.terms.values())))

    def __str__(self) -> str:
        return "\n".join(self.lines())


SUMMED = "0, sums of features"


def _linear(part: Part) -> str | None:
    return "Θ(N)" if part.features else None


def composite_report(name: str, parts: Mapping[str, Part]) -> CompositeReport:
    """What the terms come to: pairs and work added up, queries and outputs moved once, and keys of each source once.

    Work of sums is that of their recurrence, a product to add a key and one to read. Making keys is not counted.
    """
    reports = [part.report for part in parts.values()]
    first = reports[0]
    params = {key: value for report in reports for key, value in report.params.items()}
    missing = tuple(dict.fromkeys(item for report in reports for item in report.missing))
    about = tuple(dict.fromkeys(item for report in reports for item in report.about))
    known = {item.name: getattr(first, item.name) for item in fields(Report)} | dict.fromkeys(FIGURES)
    known |= {"name": name, "about": about, "missing": missing, "params": params}
    known |= {"groups": tuple(group for report in reports for group in report.groups)}
    known |= {"times": {}, "dense_times": {}, "overtakes": {}}
    empty = CompositeReport(**known, parts=parts)
    shapes = {part.source: part.report.shape for part in parts.values()}
    moved = {(part.source, part.roles): part.report.shape for part in parts.values()}
    shape = next(iter(shapes.values()))
    if shape is None or any(report.pairs is None for report in reports):
        return empty
    figures = [part.report.pairs for part in parts.values() if not part.features]
    looked_at = [figure for figure in figures if figure is not None]
    certain, num_pairs = least_certain(looked_at), sum(figure.value for figure in looked_at)
    sums = sum(_summed_flops(part) for part in parts.values())
    whole = replace(shape, kv_len=sum(item.kv_len for item in shapes.values() if item is not None))
    area = whole.q_len * whole.kv_len * whole.num_q_heads
    whole = replace(shape, kv_len=sum(item.kv_len for item in moved.values() if item is not None))
    num_bytes = least_bytes(whole)
    work = forward_flops(num_pairs, shape.head_dim) + sums
    return replace(
        empty,
        pairs=Figure(num_pairs, certain, "pairs", "the sum over the terms"),
        density=Figure(num_pairs / area if area else 0.0, certain),
        flops=Figure(work, certain, "FLOP"),
        backward_flops=None if sums else Figure(backward_flops(num_pairs, shape.head_dim), certain, "FLOP"),
        memory=Figure(num_bytes, "Exact", "bytes", "query, output, and keys and values of each source and role once"),
        saved=Figure(saved_bytes(whole), "Exact", "bytes"),
        intensity=Figure(work / num_bytes if num_bytes else 0.0, certain, "FLOP/byte"),
    )


def _summed_flops(part: Part) -> float:
    """Of each key phi(k) v^T is added up and of each query phi(q) S is read: a multiplication and addition for each
    feature and channel, and one more for the denominator."""
    shape = part.report.shape
    if part.features is None or shape is None:
        return 0.0
    return 2.0 * (shape.q_len + shape.kv_len) * part.features * (shape.head_dim + 1) * shape.num_q_heads


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
