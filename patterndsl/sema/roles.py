"""Whose projections has a pair? Roles divide what is attended into pieces, in each of which all pairs have the same.

Roles are asked in the order of the spec, and the first one that has a pair and a projection of its own decides of that
projection. So a pair is in one piece, and pieces meet in the merge of results as other terms do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from patterndsl.diagnostics import Diagnostic
from patterndsl.ir.relation import NOTHING, And, Relation, conjunction, negation
from patterndsl.sema.model import ScoreDeclaration
from patterndsl.sema.scores import SCORES
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression


@dataclass(frozen=True, slots=True)
class Projections:
    """Whose query, key and value a pair has: names of roles, "" for those that every layer has."""

    query: str = ""
    key: str = ""
    value: str = ""

    @property
    def name(self) -> str:
        """The roles in one word: `global+g2l`, "" for none."""
        return "+".join(dict.fromkeys(filter(None, (self.query, self.key, self.value))))

    def owned(self) -> dict[ast.Projection, str]:
        """The role of each projection that some role has."""
        found: dict[ast.Projection, str] = {"query": self.query, "key": self.key, "value": self.value}
        return {what: role for what, role in found.items() if role}

    def and_of(self, role: ast.Role) -> Projections:
        """With those of a role that none before it has."""
        return replace(self, **{what: role.name for what in role.own if what not in self.owned()})


@dataclass(frozen=True, slots=True)
class Condition:
    """As it is written, and as a relation."""

    expr: ast.Expr
    relation: Relation


@dataclass(frozen=True, slots=True)
class Piece:
    """Pairs with the same projections: those that have some roles and have not some others."""

    projections: Projections = Projections()
    has: tuple[Condition, ...] = ()
    has_not: tuple[Condition, ...] = ()

    @property
    def relation(self) -> Relation:
        """All pairs that can be in it: A & ~(A & B) = A & ~B."""
        found = conjunction(item.relation for item in self.has)
        for item in self.has_not:
            rest = conjunction(term for term in _terms(item.relation) if term not in _terms(found))
            found = conjunction((found, negation(rest)))
        return found

    @property
    def conditions(self) -> tuple[ast.Expr, ...]:
        """What is said of its pairs, without what is plainly said already."""
        held = conjunction(item.relation for item in self.has)
        refused = (item.expr for item in self.has_not if not _is_contradiction(conjunction((held, item.relation))))
        parts = (*(item.expr for item in self.has), *map(_negated, refused))
        return tuple(dict.fromkeys(part for expr in parts for part in _parts(expr)))

    def of(self, attend: ast.Expr) -> ast.Expr:
        """What of a term is in the piece."""
        return _together((*_parts(attend), *self.conditions))

    def alone(self) -> ast.Expr:
        """All pairs that can be in it; there are conditions."""
        return _together(self.conditions)


def pieces(roles: Sequence[ast.Role], relations: Mapping[str, Relation]) -> tuple[Piece, ...]:
    """The pieces that all pairs are divided into, without those that are seen to be empty. relations: of each role."""
    found = [Piece()]
    for role in roles:
        condition = Condition(role.at, relations[role.name])
        found = [part for piece in found for part in _divided(piece, role, condition)]
    return tuple(found)


def _divided(piece: Piece, role: ast.Role, condition: Condition) -> Iterator[Piece]:
    theirs = piece.projections.and_of(role)
    within = replace(piece, projections=theirs, has=(*piece.has, condition))
    if theirs == piece.projections or _is_contradiction(within.relation):
        yield piece
        return
    outside = replace(piece, has_not=(*piece.has_not, condition))
    if not _is_contradiction(outside.relation):
        yield outside
    yield within


def mistakes(spec: ast.Spec, scores: Mapping[str, ScoreDeclaration]) -> Iterator[Diagnostic]:
    """Projections of roles that are read by no score of a branch, or that are not the role's alone."""
    own = {what for role in spec.roles for what in role.own}
    for branch in spec.branches:
        kind = SCORES[scores[branch.name].name].kind if branch.name in scores else "softmax"
        if branch.score is None or not own or kind == "softmax":
            continue
        place = branch.score.place
        if kind == "kernel":
            message = f"`{render_expression(branch.score)}` sums over keys, and roles ask for pairs"
            yield Diagnostic("E211", message, place, "score by softmax, or drop `roles`")
        elif own & {"query", "key"}:
            message = "scores that are made up ask for no query and no key, and a role has one of its own"
            yield Diagnostic("E211", message, place, "let roles own the value alone: own: value")
    for role in spec.roles if spec.share is not None else ():
        if not {"query", "key"}.isdisjoint(role.own):
            message = f"`share: {spec.share}` makes query and key one, and role `{role.name}` has its own"
            yield Diagnostic(
                "E304", message, role.place, "drop `share`, or let the role own the value alone: own: value"
            )


def _is_contradiction(relation: Relation) -> bool:
    """Whether it is empty by its form: it says something and its opposite."""
    terms = _terms(relation)
    return relation == NOTHING or any(negation(term) in terms for term in terms)


def _terms(relation: Relation) -> tuple[Relation, ...]:
    return relation.terms if isinstance(relation, And) else (relation,)


OPPOSITES: Mapping[str, str] = {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}


def _negated(expr: ast.Expr) -> ast.Expr:
    match expr:
        case ast.Comparison(ops=(op,)):
            return replace(expr, ops=(OPPOSITES[op],))
        case ast.Not(operand=operand):
            return operand
        case _:
            return ast.Not(expr, place=expr.place)


def _together(exprs: Sequence[ast.Expr]) -> ast.Expr:
    parts = tuple(dict.fromkeys(exprs))
    return ast.Logic("&", parts, place=parts[0].place) if len(parts) > 1 else parts[0]


def _parts(expr: ast.Expr) -> tuple[ast.Expr, ...]:
    """The parts of a conjunction, as the parser has them: without another one inside."""
    return expr.terms if isinstance(expr, ast.Logic) and expr.op == "&" else (expr,)
