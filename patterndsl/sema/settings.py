"""What are sources, scores and their like told? Each setting as an expression, or by its default, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal

from patterndsl.diagnostics import nearest
from patterndsl.ir.index import Const, Index
from patterndsl.ir.real import OfIndex, Real
from patterndsl.sema.biases import real
from patterndsl.sema.decays import is_of_heads
from patterndsl.sema.expand import Expander
from patterndsl.sema.model import Requirement, ScoreDeclaration, SourceDeclaration, TableDeclaration
from patterndsl.sema.scope import Scope
from patterndsl.sema.scores import MAKERS, SCORES, Maker, ScoreKind
from patterndsl.sema.sources import SourceKind, SourceSetting, text_of_setting
from patterndsl.sema.words import called, word
from patterndsl.syntax import tree as ast


def settings_of(expander: Expander, kind: SourceKind | ScoreKind, expr: ast.Expr) -> dict[str, ast.Expr]:
    """The expression of each setting, those left out by their defaults."""
    names = tuple(setting.name for setting in kind.settings)
    given: dict[str, ast.Expr] = {}
    for at, argument in enumerate(expr.arguments if isinstance(expr, ast.Call) else ()):
        if not names:
            raise expander.report("E204", f"`{kind.name}` takes no settings", argument.place, f"write {kind.name}")
        if argument.name is None and at >= max(1, len(kind.needed)):
            message = f"`{kind.name}` takes this setting by name"
            raise expander.report("E204", message, argument.place, f"one of {', '.join(names)}")
        name = argument.name or names[at]
        expander.check_argument(kind.name, name, names, given, argument.place)
        given[name] = argument.value
    found: dict[str, ast.Expr] = {}
    for setting in kind.settings:
        if setting.name not in given and setting.default is None:
            needed = ", ".join(f"{name} = ..." for name in kind.needed)
            raise expander.report(
                "E204", f"`{kind.name}` needs `{setting.name}`", expr.place, f"write {kind.name}({needed})"
            )
        default = text_of_setting(str(setting.default))
        value = given.get(setting.name, default)
        # a default may be another setting
        found[setting.name] = ast.put(value, lambda part: _setting_named(part, found)) if value is default else value
    return found


def _setting_named(part: ast.Expr, settings: Mapping[str, ast.Expr]) -> ast.Expr | None:
    return settings.get(part.name) if isinstance(part, ast.Name) else None


def said_by(
    expander: Expander,
    kind: SourceKind | ScoreKind,
    given: Mapping[str, ast.Expr],
    scope: Scope,
    sources: Mapping[str, SourceDeclaration],
) -> tuple[tuple[str, Index | Decimal | str], ...]:
    """What each setting says. sources: those before it, which it may name."""
    known = {setting.name: setting for setting in kind.settings}
    return tuple((name, _value(expander, kind, known[name], value, scope, sources)) for name, value in given.items())


def _value(
    expander: Expander,
    kind: SourceKind | ScoreKind,
    setting: SourceSetting,
    value: ast.Expr,
    scope: Scope,
    sources: Mapping[str, SourceDeclaration],
) -> Index | Decimal | str:
    what = f"`{setting.name}` of `{kind.name}`"
    match setting.takes:
        case "integer":
            number = expander.constant(value, scope, f"{what} must be")
            label = f"{setting.name} of {kind.name}"
            if isinstance(number, Const) and number.value < setting.least:  # before it divides anything
                message = f"`{label}` is {number.value}, and must be at least {setting.least}"
                raise expander.report("E402", message, value.place, f"give {setting.least} or more")
            expander.require(Requirement("minimum", label, number, Const(setting.least), value.place))
            return number
        case "real":
            if isinstance(value, ast.Number | ast.Real) and value.value > 0:
                return Decimal(value.value)
            raise expander.report("E203", f"{what} must be a positive number", value.place, "write it out: 0.75")
        case "word":
            return word(expander, setting.name, {setting.name: value}, setting.words) or setting.words[0]
        case "source":
            name = value.name if isinstance(value, ast.Name) else ""
            if name not in sources or sources[name].kind != "recall":
                known = [item.name for item in sources.values() if item.kind == "recall"]
                near = nearest(name, known)
                help = f"did you mean `{near}`?" if near else "name a source that is declared before as recall(...)"
                raise expander.report("E202", f"{what} is no source that recalls", value.place, help)
            return name
        case "factor":
            raise AssertionError("a factor is for `decay`")


def scored_by(
    expander: Expander, expr: ast.Expr, scope: Scope, tables: Mapping[str, TableDeclaration]
) -> ScoreDeclaration:
    """The score that is called, with all of its settings."""
    name = called(expander, expr, SCORES, "score", "a score is a name, or a name with settings", "the scores are")
    kind = SCORES[name]
    makers: tuple[Maker, ...] = ()
    if kind.kind == "synthesized" and isinstance(expr, ast.Call):
        named = [argument for argument in expr.arguments if argument.name is None]
        makers = tuple(
            word(expander, "a synthesizer", {"a synthesizer": item.value}, MAKERS) or "dense" for item in named
        )
        expr = replace(expr, arguments=tuple(item for item in expr.arguments if item.name is not None))
    if kind.kind == "synthesized" and set(makers) <= {"product"}:
        help = f"write synthesize(dense, length = 4096); there are {', '.join(MAKERS)}"
        raise expander.report("E204", "`synthesize` needs to be told who makes scores up", expr.place, help)
    given = settings_of(expander, kind, expr)
    factors = {setting.name: given.pop(setting.name) for setting in kind.settings if setting.takes == "factor"}
    settings = said_by(expander, kind, given, scope, {})
    decay = _decay(expander, factors["decay"], scope, tables) if "decay" in factors else None
    return ScoreDeclaration(name, settings, makers, decay, factors["decay"].place if decay else expr.place)


def _decay(expander: Expander, expr: ast.Expr, scope: Scope, tables: Mapping[str, TableDeclaration]) -> Real | None:
    """The factor of each token; None where it is 1."""
    found = real(expr, expander, scope, tables, "decay")
    if not is_of_heads(found):
        message = "`decay` cannot depend on a position, length, input or table"
        raise expander.report("E209", message, expr.place, "make it of head, layer, numbers and parameters")
    return None if found == OfIndex(Const(1)) else found
