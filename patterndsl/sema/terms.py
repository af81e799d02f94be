"""What are the terms of a pattern with several sources or branches? Patterns, each between queries and numbers of keys.

What a term says of positions is said of the numbers of its source's keys, so that it is an ordinary spec with an
ordinary meaning: it is proven, counted, planned and run like any other, and terms meet in the merge of results alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from patterndsl.diagnostics import Diagnostic, PatternError
from patterndsl.ir.index import NK, Index, K
from patterndsl.ir.relation import Compare, indices
from patterndsl.sema.model import Resolved
from patterndsl.sema.resolve import Told, ordered, resolve, resolve_with_sources
from patterndsl.sema.roles import Piece, Projections, pieces
from patterndsl.sema.sources import Given, in_numbers, keys_of, seen_by_query, where_keys_stand, with_starts
from patterndsl.syntax import tree as ast
from patterndsl.syntax.used import reached


@dataclass(frozen=True, slots=True)
class ResolvedTerm:
    """What of one source is attended in one branch, with the same projections.

    spec, resolved: the term as a pattern of its own. seen: of the same queries and keys, which keys depend on nothing
    after the query; None where a key is its own position.
    """

    branch: str
    source: str
    spec: ast.Spec
    resolved: Resolved
    seen: Resolved | None
    position: Index = K
    projections: Projections = Projections()


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a pattern as they are written, and divided into the pieces of its roles. pieces: all pairs that each
    piece can have, where roles are several and can leave it none."""

    written: tuple[ResolvedTerm, ...]
    divided: tuple[ResolvedTerm, ...]
    pieces: Mapping[Projections, Resolved]


def resolve_terms(spec: ast.Spec, found: Sequence[Diagnostic] = ()) -> tuple[Resolved, Terms, Told]:
    """What a spec with branches declares, its terms, and what it says of their scores. Raises PatternError with
    everything that is wrong."""
    resolved, told, declared_wrong = resolve_with_sources(spec, found)
    terms: list[ResolvedTerm] = []
    divided: list[ResolvedTerm] = []
    wrong = list(declared_wrong)
    parts = () if declared_wrong or not spec.roles else pieces(spec.roles, told.roles)
    for branch in spec.branches:
        for term in branch.terms:
            given = told.given.get(term.source)
            if term.source != ast.OWN_KEYS and given is None:
                continue  # said already
            try:
                if declared_wrong:  # what is attended may be wrong too
                    attend = term.attend if given is None else in_numbers(given, term.attend)
                    resolve(_alone(spec, attend, None), declared_wrong)
                terms.append(_resolved(spec, branch, term, given))
                divided += [_of_piece(spec, branch, term, given, piece) for piece in parts]
            except PatternError as failed:
                wrong.extend(failed.diagnostics)
    if wrong:
        raise PatternError(ordered(wrong))
    assert resolved is not None
    several = [piece for piece in parts if len(spec.roles) > 1 and piece.conditions]
    alone = {piece.projections: resolve(_alone(spec, piece.alone(), None)) for piece in several}
    return resolved, Terms(tuple(terms), tuple(divided), alone), told


def _of_piece(spec: ast.Spec, branch: ast.Branch, term: ast.Term, given: Given | None, piece: Piece) -> ResolvedTerm:
    if given is not None and given.kind.position is None:
        for at in piece.conditions:
            _check_says_nothing_of_keys(spec, replace(term, attend=at), given)
    resolved = _resolved(spec, branch, replace(term, attend=piece.of(term.attend)), given)
    return replace(resolved, projections=piece.projections)


def _resolved(spec: ast.Spec, branch: ast.Branch, term: ast.Term, given: Given | None) -> ResolvedTerm:
    if given is None:
        alone = _alone(spec, term.attend, None)
        return ResolvedTerm(branch.name, term.source, alone, resolve(alone), None)
    if given.kind.position is None:
        _check_says_nothing_of_keys(spec, term, given)
    keys = keys_of(given)
    spec = replace(spec, define=tuple(replace(item, body=with_starts(given, item.body)) for item in spec.define))
    spec, keys = _with_size(spec, term.source, keys)
    alone = _alone(spec, in_numbers(given, term.attend), keys)
    seen = resolve(_alone(spec, seen_by_query(given), keys))
    at = resolve(_alone(spec, where_keys_stand(given), keys)).relation
    position = at.left if isinstance(at, Compare) else K
    return ResolvedTerm(branch.name, term.source, alone, resolve(alone), seen, position)


def _with_size(spec: ast.Spec, source: str, keys: ast.Expr) -> tuple[ast.Spec, ast.Expr]:
    """A number of keys as a parameter with a name, so that formulas hold for every number, unless the name is taken."""
    name = f"{source}_size"
    groups = (spec.params, spec.inputs, spec.labels, spec.select, spec.imports, spec.define, spec.grid)
    if not isinstance(keys, ast.Number) or any(item.name == name for group in groups for item in group):
        return spec, keys
    param = ast.Param(name, keys, ast.Number(1, place=keys.place), place=keys.place)
    return replace(spec, params=(*spec.params, param)), ast.Name(name, place=keys.place)


def _check_says_nothing_of_keys(spec: ast.Spec, term: ast.Term, given: Given) -> None:
    """Raises PatternError (E210) where the positions of keys are asked for, and there are none."""
    relation = resolve(_alone(spec, term.attend, None)).relation
    if not {K, NK}.isdisjoint(indices(relation)):
        what = "sorted block of a cut" if given.kind.name == "sort" else "key"
        message = f"each {what} of `{term.source}` is made of the whole sequence, so it stands at no position `k`"
        help = "write `all`; for a causal pattern summarise by `pool`, whose keys stand at their last token"
        raise PatternError([Diagnostic("E210", message, term.attend.place, help)])


def _alone(spec: ast.Spec, attend: ast.Expr, keys: ast.Expr | None) -> ast.Spec:
    """A term as a spec, with what it uses of the declarations."""
    plain = replace(
        spec,
        attend=attend,
        keys=keys,
        sources=(),
        tables=(),
        roles=(),
        branches=(),
        combine="sum",
        name=None,
        share=None,
    )
    used = reached(plain, attend, *([] if keys is None else [keys]), *(_axis_sizes(spec)))
    return replace(
        plain,
        params=tuple(item for item in spec.params if item.name in used),
        inputs=tuple(item for item in spec.inputs if item.name in used),
        labels=tuple(item for item in spec.labels if item.name in used),
        select=tuple(item for item in spec.select if item.name in used),
        imports=tuple(item for item in spec.imports if item.name in used),
        define=tuple(item for item in spec.define if item.name in used),
    )


def _axis_sizes(spec: ast.Spec) -> list[ast.Expr]:
    return [axis.size for axis in spec.grid if not isinstance(axis.size, tuple)]
