"""What is found in each call: which learner finds a label, which selector a list, and with what settings?"""

from __future__ import annotations

from collections.abc import Mapping

from patterndsl.ir.index import NK, NQ, Const, Index, K, Q, arithmetic
from patterndsl.ir.relation import (
    EVERYTHING,
    NOTHING,
    Listed,
    Relation,
    conjunction,
    depends_on,
    disjunction,
    inputs_read,
    negation,
    substitute,
)
from patterndsl.sema.expand import Expander
from patterndsl.sema.learners import LEARNERS, Learner
from patterndsl.sema.model import LabelDeclaration, Requirement, SelectionDeclaration
from patterndsl.sema.scope import AttributeName, Scope
from patterndsl.sema.selectors import BYS, SELECTORS, SHARINGS
from patterndsl.sema.words import called, word
from patterndsl.syntax import tree as ast


def learned(expander: Expander, expr: ast.Expr, scope: Scope) -> tuple[Learner, tuple[tuple[str, Index], ...]]:
    """The learner that is called, and all of its settings."""
    name = called(expander, expr, LEARNERS, "learner", "a label is found by a learner", "the learners are")
    learner = LEARNERS[name]
    wanted = [setting.name for setting in learner.settings]
    given: dict[str, Index] = {}
    for argument in expr.arguments if isinstance(expr, ast.Call) else ():
        if argument.name is None:
            example = f"{wanted[0]} = ..." if wanted else ""
            message = f"`{name}` takes its settings by name"
            raise expander.report("E204", message, argument.place, f"write {name}({example})")
        expander.check_argument(name, argument.name, wanted, given, argument.place)
        given[argument.name] = expander.constant(argument.value, scope, f"`{argument.name}` of `{name}` must be")
    for setting in learner.settings:
        if setting.name not in given and setting.default is None:
            help = f"write {name}({setting.name} = ...)"
            raise expander.report("E204", f"`{name}` needs `{setting.name}`", expr.place, help)
        value = given.setdefault(setting.name, Const(setting.default or 0))
        label = f"{setting.name} of {name}"
        expander.require(Requirement("minimum", label, value, Const(setting.least), expr.place))
    return learner, tuple((name, given[name]) for name in wanted)


def selected(
    expander: Expander, declared: ast.Selection, scope: Scope, labels: Mapping[str, LabelDeclaration]
) -> SelectionDeclaration:
    """The selector that is called, and all of its settings."""
    expr = declared.selector
    name = called(expander, expr, SELECTORS, "selector", "a selection is made by a selector", "the selectors are")
    selector = SELECTORS[name]
    given: dict[str, ast.Expr] = {}
    for at, argument in enumerate(expr.arguments if isinstance(expr, ast.Call) else ()):
        if argument.name is None and at >= len(selector.needed):
            message = f"`{name}` takes this setting by name"
            raise expander.report("E204", message, argument.place, f"one of {', '.join(selector.settings)}")
        setting = argument.name or selector.settings[at]
        expander.check_argument(name, setting, selector.settings, given, argument.place)
        given[setting] = argument.value
    for setting in selector.needed:
        if setting not in given:
            help = "write " + ("members(label, top = ...)" if name == "members" else f"{name}(8)")
            raise expander.report("E204", f"`{name}` needs `{setting}`", expr.place, help)
    width = _at_least_one(expander, name, "top" if "top" in given else "k", given, scope)
    of, per = (_block_of(expander, name, setting, given, scope) for setting in ("of", "per"))
    among, always = (
        _candidates(expander, name, setting, given, scope, default)
        for setting, default in (("among", EVERYTHING), ("always", NOTHING))
    )
    by = word(expander, "by", given, BYS) or "mean"
    heads = word(expander, "heads", given, SHARINGS) or ("all" if by == "learned" else "each")
    if by == "learned" and heads != "all":
        raise expander.report("E204", "what a layer learns is for all heads", given["heads"].place, "write heads = all")
    label = _clustered(expander, given["label"], scope, labels) if "label" in given else None
    return SelectionDeclaration(declared.name, name, width, of, per, by, among, always, heads, label, declared.place)


def listed(found: SelectionDeclaration) -> Relation:
    """What a selection lists: of a route, pairs of its members; see `sema.bind` for all routes."""
    if found.label is not None:
        return conjunction(Listed(found.name, found.width, Const(0), position) for position in (Q, K))
    row, key = arithmetic("//", Q, found.per), arithmetic("//", K, found.of)
    put: dict[Index, Index] = {
        Q: row,
        K: key,
        NQ: arithmetic("//", arithmetic("+", NQ, arithmetic("-", found.per, Const(1))), found.per),
        NK: arithmetic("//", arithmetic("+", NK, arithmetic("-", found.of, Const(1))), found.of),
    }
    # disjoint, so that a multiset counts each key once
    may = disjunction((found.always, conjunction((found.among, negation(found.always)))))
    may = substitute(may, lambda symbol: put.get(symbol, symbol))
    return conjunction((Listed(found.name, found.width, row, key), may))


def _at_least_one(
    expander: Expander, selector: str, setting: str, given: Mapping[str, ast.Expr], scope: Scope
) -> Index:
    value = expander.constant(given[setting], scope, f"`{setting}` of `{selector}` must be")
    expander.require(Requirement("minimum", f"{setting} of {selector}", value, Const(1), given[setting].place))
    return value


def _block_of(expander: Expander, selector: str, setting: str, given: Mapping[str, ast.Expr], scope: Scope) -> Index:
    """`tokens`, or `blocks(b)`."""
    match given.get(setting):
        case None | ast.Name(name="tokens"):
            return Const(1)
        case ast.Call(name="blocks", arguments=(ast.Argument(name=None, value=size),)):
            return _at_least_one(expander, f"{selector}'s {setting}", "blocks", {"blocks": size}, scope)
        case wrong:
            message = f"`{setting}` of `{selector}` is neither tokens nor blocks of them"
            raise expander.report("E203", message, wrong.place, f"write {setting} = blocks(64), or {setting} = tokens")


def _candidates(
    expander: Expander, selector: str, setting: str, given: Mapping[str, ast.Expr], scope: Scope, default: Relation
) -> Relation:
    if setting not in given:
        return default
    relation = expander.predicate(given[setting], scope, f"`{setting}` of `{selector}` must be")
    if inputs_read(relation):
        message = f"`{setting}` of `{selector}` depends on an input, and it is between numbers of blocks"
        raise expander.report("E209", message, given[setting].place, "intersect what is selected: top & same(doc)")
    if depends_on(relation, "head"):
        message = f"`{setting}` of `{selector}` depends on the head, and candidates are those of all heads"
        raise expander.report("E209", message, given[setting].place, "intersect what is selected: top & recent(head)")
    return relation


def _clustered(expander: Expander, expr: ast.Expr, scope: Scope, labels: Mapping[str, LabelDeclaration]) -> str:
    """The name of a label whose centroids are known."""
    value = expander.wanted(expr, "attribute", "`members` takes", scope)
    name = value.meaning.name if isinstance(value, AttributeName) and value.meaning else ""
    if name not in labels or labels[name].learner != "kmeans":
        message = f"`{name}` has no centroids to be near to"
        raise expander.report("E202", message, expr.place, "name a label that kmeans finds")
    return name
