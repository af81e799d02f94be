"""What does a spec mean? Declares its parameters, grid, inputs, imports and definitions, and expands what it attends.

It knows nothing of sizes or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TypeVar, cast

from patterndsl.diagnostics import Diagnostic, PatternError, Source, SourceRange, nearest
from patterndsl.ir.index import NQ, Const, Index, Param, arithmetic
from patterndsl.ir.real import Real, reads
from patterndsl.ir.relation import (
    NOTHING,
    Relation,
)
from patterndsl.sema.biases import real
from patterndsl.sema.expand import Expander, Stop
from patterndsl.sema.found import learned, listed, selected
from patterndsl.sema.model import (
    InputDeclaration,
    LabelDeclaration,
    ParamDeclaration,
    Requirement,
    Resolved,
    RoleDeclaration,
    ScoreDeclaration,
    SelectionDeclaration,
    Side,
    SourceDeclaration,
    TableDeclaration,
)
from patterndsl.sema.roles import mistakes
from patterndsl.sema.scope import (
    RESERVED,
    AttributeName,
    GridAxis,
    Kind,
    ListValue,
    Scope,
    Value,
    depends_on_data,
    has_stand_in,
    product,
)
from patterndsl.sema.scores import SCORES, TABLES
from patterndsl.sema.settings import said_by, scored_by, settings_of
from patterndsl.sema.sources import SOURCES, Given, as_told, at_any_start
from patterndsl.sema.words import called
from patterndsl.syntax import tree as ast
from patterndsl.syntax.grammar import grammar_text
from patterndsl.syntax.parse import parse_definitions, snippet_of
from patterndsl.syntax.schema import SCORED

_Word = TypeVar("_Word", bound=str)


def resolve(spec: ast.Spec, found: Sequence[Diagnostic] = ()) -> Resolved:
    """The meaning of a spec. Raises PatternError with everything that is wrong with it, `found` included."""
    resolved, _, wrong = resolve_with_sources(spec, found)
    if resolved is None:
        raise PatternError(ordered(wrong))
    return resolved


@dataclass(frozen=True, slots=True)
class Told:
    """What a spec says of its sources, by name, of the scores of its branches, and of which pairs roles have."""

    given: Mapping[str, Given]
    scores: Mapping[str, ScoreDeclaration]
    biases: Mapping[str, Real]
    softcaps: Mapping[str, float]
    roles: Mapping[str, Relation]


def resolve_with_sources(
    spec: ast.Spec, found: Sequence[Diagnostic] = ()
) -> tuple[Resolved | None, Told, Sequence[Diagnostic]]:
    """`resolve`, with what is said of sources and scores, and what is wrong, which leaves no meaning. The relation of a
    spec with branches is none: what it attends is said by its terms, see `sema.terms`."""
    resolver = _Resolver(list(found))
    relation = resolver.spec(spec)
    told = Told(resolver.given, resolver.scores, resolver.biases, resolver.softcaps, resolver.roles)
    if resolver.diagnostics:
        return None, told, resolver.diagnostics
    assert relation is not None
    resolved = Resolved(
        relation,
        tuple(resolver.params),
        tuple(resolver.inputs.values()),
        tuple(dict.fromkeys(resolver.requirements)),
        tuple(resolver.labels.values()),
        spec.merge,
        resolver.fallback,
        spec.share,
        tuple(resolver.selections.values()),
        tuple(resolver.sources.values()),
        tuple(resolver.tables.values()),
        resolver.num_keys,
        tuple(RoleDeclaration(role.name, role.own, role.place) for role in spec.roles),
    )
    return resolved, told, ()


def ordered(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """By place in each file, each mistake once."""
    unique = {(d.code, d.message, d.where): d for d in diagnostics}
    files = list(dict.fromkeys(d.where.source.name for d in unique.values() if d.where))
    return sorted(
        unique.values(),
        key=lambda d: (files.index(d.where.source.name), d.where.start) if d.where else (-1, 0),
    )


@cache
def _prelude() -> Scope:
    source = Source("prelude.pat", grammar_text("prelude.pat"))
    scope = Scope()
    for definition in parse_definitions(snippet_of(source)):
        scope.definitions.setdefault(definition.name, []).append(definition)
    return scope


def prelude_names() -> tuple[str, ...]:
    """The names that the prelude defines, in its order."""
    return tuple(_prelude().definitions)


@dataclass
class _Resolver(Expander):
    params: list[ParamDeclaration] = field(default_factory=list)
    inputs: dict[str, InputDeclaration] = field(default_factory=dict)
    labels: dict[str, LabelDeclaration] = field(default_factory=dict)
    selections: dict[str, SelectionDeclaration] = field(default_factory=dict)
    sources: dict[str, SourceDeclaration] = field(default_factory=dict)
    given: dict[str, Given] = field(default_factory=dict)
    fallback: Relation | None = None
    num_keys: Index | None = None
    tables: dict[str, TableDeclaration] = field(default_factory=dict)
    scores: dict[str, ScoreDeclaration] = field(default_factory=dict)
    biases: dict[str, Real] = field(default_factory=dict)
    softcaps: dict[str, float] = field(default_factory=dict)
    roles: dict[str, Relation] = field(default_factory=dict)

    def spec(self, spec: ast.Spec) -> Relation | None:
        """The relation of the outermost spec."""
        scope = Scope(parent=_prelude())
        for at, param in enumerate(spec.params):
            self.later = frozenset(other.name for other in spec.params[at:])
            self.declare(param.name, param.place, scope)
            self.param(param, scope)
        self.later = frozenset()
        self.declarations(spec, scope)
        if spec.fallback is not None:
            fallback = self.attempt(partial(self.predicate, spec.fallback, scope, "`fallback` must be"))
            self.fallback = cast("Relation | None", fallback)
        if spec.keys is not None:
            keys = self.attempt(partial(self.constant, spec.keys, scope, "`keys` must be"))
            self.num_keys = cast("Index | None", keys)
            if self.num_keys is not None:
                self.require(Requirement("minimum", "keys", self.num_keys, Const(0), spec.keys.place))
        for source in spec.sources:
            self.declare(source.name, source.place, scope)
            self.attempt(partial(self.source, source, scope))
        for table in spec.tables:
            self.declare(table.name, table.place, scope)
            self.attempt(partial(self.table, table, scope))
        for branch in spec.branches:
            self.attempt(partial(self.scored, branch, scope))
        for role in spec.roles:
            self.attempt(partial(self.role, role, scope))
        if spec.branches:
            self.check_branches(spec)
            self.diagnostics.extend(mistakes(spec, self.scores))
            return NOTHING
        value = self.attempt(partial(self.predicate, spec.attend, scope, "a pattern must be"))
        return cast("Relation | None", value)

    # ---- sources ------------------------------------------------------------------------------------------

    def source(self, declared: ast.KeySource, scope: Scope) -> Value:
        """A source with all of its settings. Its keys are no value; what it returns is for `attempt`."""
        expr = declared.maker
        if declared.name == ast.OWN_KEYS:
            raise self.report("E208", "`self` are the sequence's own keys", declared.place, "choose another name")
        if declared.name in ("attend", *SCORED):
            raise self.report("E208", f"`{declared.name}` is a key of branches", declared.place, "choose another name")
        name = called(self, expr, SOURCES, "kind of source", "keys come from a source", "the sources are")
        kind = SOURCES[name]
        given = settings_of(self, kind, expr)
        settings = said_by(self, kind, given, scope, self.sources)
        if kind.name == "compress":
            past = str(dict(settings)["past"])
            given["past"] = self.given[past].settings["size"]
        self.given[declared.name] = Given(as_told(kind, given), given)
        self.sources[declared.name] = SourceDeclaration(declared.name, kind.name, settings, declared.place)
        return Const(0)

    # ---- scores -------------------------------------------------------------------------------------------

    def scored(self, branch: ast.Branch, scope: Scope) -> Value:
        """How a branch scores. What it returns is for `attempt`."""
        score = (
            ScoreDeclaration("softmax") if branch.score is None else scored_by(self, branch.score, scope, self.tables)
        )
        self.scores[branch.name] = score
        kind = SCORES[score.name].kind
        for word, expr in (("bias", branch.bias), ("softcap", branch.softcap)):
            if expr is not None and kind == "kernel":
                message = f"`{word}` beside the score `{score.name}`, which knows no single scores"
                raise self.report("E211", message, expr.place, "drop it, or score by softmax")
        if branch.bias is not None:
            self.biases[branch.name] = bias = real(branch.bias, self, scope, self.tables)
            for name in (read.name for read in reads(bias) if read.name in self.labels):
                if dict(self.labels[name].settings).get("rounds", Const(1)) != Const(1):
                    message = f"`{name}` has a value in each of several rounds, and a bias takes one"
                    raise self.report("E211", message, branch.bias.place, "let it read a label of one round")
        if branch.softcap is not None:
            cap = branch.softcap
            if not isinstance(cap, ast.Number | ast.Real) or not cap.value > 0:
                raise self.report("E203", "`softcap` must be a positive number", cap.place, "write it out: 50.0")
            self.softcaps[branch.name] = float(cap.value)
        return Const(0)

    def table(self, declared: ast.Table, scope: Scope) -> Value:
        """What a layer learns for a bias. What it returns is for `attempt`."""
        expr = declared.maker
        scope.broken.add(declared.name)
        name = called(self, expr, TABLES, "table", "a table is scalars(n), vectors(n) or sinusoids", "write")
        sizes = expr.arguments if isinstance(expr, ast.Call) else ()
        if len(sizes) != (name != "sinusoids") or any(size.name for size in sizes):
            written = "sinusoids" if name == "sinusoids" else f"{name}(32)"
            message = f"`{name}` takes no number" if name == "sinusoids" else f"`{name}` takes how many entries it has"
            raise self.report("E204", message, expr.place, f"write {written}")
        size = (
            self.constant(sizes[0].value, scope, f"how many entries `{declared.name}` has must be") if sizes else None
        )
        if size is not None:
            self.require(Requirement("minimum", f"entries of {declared.name}", size, Const(1), expr.place))
        self.tables[declared.name] = TableDeclaration(declared.name, name, size, declared.place)
        scope.broken.discard(declared.name)
        return Const(0)

    def check_branches(self, spec: ast.Spec) -> None:
        """Whether each term is of a source that there is, and that has positions where it is asked for them."""
        if spec.fallback is not None or spec.merge != "set":
            key, place = ("fallback", spec.fallback.place) if spec.fallback else ("merge", spec.place)
            help = "drop `roles`" if spec.roles else "write one expression under `attend`"
            self.report("E304", f"`{key}` is of a pattern with one term", place, help)
        for branch in spec.branches:
            for term in branch.terms:
                if term.source == ast.OWN_KEYS:
                    continue
                declared = {source.name for source in spec.sources}
                if term.source not in declared:
                    near = nearest(term.source, [*declared, ast.OWN_KEYS])
                    help = f"did you mean `{near}`?" if near else "declare it under `sources`"
                    self.report("E201", f"unknown source `{term.source}`", term.place, help)

    def role(self, role: ast.Role, scope: Scope) -> Value:
        """Which pairs have a role."""
        self.roles[role.name] = self.predicate(role.at, scope, f"role `{role.name}` must be")
        return self.roles[role.name]

    def param(self, param: ast.Param, scope: Scope) -> None:
        """A parameter's default may use the lengths and the parameters before it."""
        default: Index | tuple[Index, ...] | None = None
        where = f"parameter `{param.name}` must be"
        if isinstance(param.default, tuple):
            items = [self.attempt(partial(self.constant, item, scope, where)) for item in param.default]
            default = tuple(cast("Index", item) for item in items if item is not None)
            scope.values[param.name] = ListValue(param.name)
        else:
            if param.default is not None:
                expression = param.default
                default = cast("Index | None", self.attempt(partial(self.constant, expression, scope, where)))
            scope.values[param.name] = Param(param.name)
        if isinstance(param.default, ast.Broken):  # it may have been meant as a list
            scope.broken.add(param.name)
        minimum = None
        if param.minimum is not None:
            least = param.minimum
            minimum = cast("Index | None", self.attempt(partial(self.constant, least, scope, "`min` must be")))
        self.params.append(ParamDeclaration(param.name, default, minimum, param.doc, param.place))

    def declarations(self, spec: ast.Spec, scope: Scope) -> None:
        """Grid, inputs, imports and definitions of a spec into its scope; each definition is checked by itself."""
        scope.broken.update(spec.broken)
        self.grid(spec.grid, scope)
        for declared in spec.inputs:
            self.declare(declared.name, declared.place, scope)
            self.attempt(partial(self.input, declared, scope))
        for label in spec.labels:
            self.declare(label.name, label.place, scope)
            self.attempt(partial(self.label, label, scope))
        for imported in spec.imports:
            self.declare(imported.name, imported.place, scope)
            scope.imports[imported.name] = imported
        for definition in spec.define:
            same_name = scope.definitions.setdefault(definition.name, [])
            if any(len(other.params) == len(definition.params) for other in same_name) or not same_name:
                self.declare(definition.name, definition.place, scope, ignoring=same_name)
            same_name.append(definition)
            repeated = next((p for i, p in enumerate(definition.params) if p in definition.params[:i]), None)
            if repeated:
                self.report("E208", f"parameter `{repeated}` is named twice", definition.place, "rename one")
                scope.broken.add(definition.name)
            for param in definition.params:
                if param in RESERVED:
                    message = f"parameter `{param}` belongs to the language"
                    self.report("E208", message, definition.place, "choose another name")
        for selection in spec.select:
            self.declare(selection.name, selection.place, scope)
            self.attempt(partial(self.selection, selection, scope))
        alone = Scope(parent=scope)
        for definition in spec.define:
            told = replace(definition, body=at_any_start(spec.sources, definition.body))
            alone.definitions.setdefault(told.name, []).append(told)
        for definition in (item for items in alone.definitions.values() for item in items):
            self.attempt(partial(self.check_alone, definition, alone))

    def declare(
        self, name: str, place: SourceRange, scope: Scope, ignoring: Sequence[ast.Definition] | None = None
    ) -> None:
        if name in RESERVED:
            self.report("E208", f"`{name}` belongs to the language", place, "choose another name")
            scope.broken.add(name)
        elif (
            name in scope.values
            or name in scope.attributes
            or name in scope.imports
            or (scope.definitions.get(name) if ignoring is None else ignoring)
        ):
            self.report("E208", f"`{name}` is declared twice", place, "choose another name")
            scope.broken.add(name)

    def grid(self, axes: tuple[ast.Axis, ...], scope: Scope) -> None:
        """Base axes row-major, the last runs fastest; then the composed ones."""
        for axis in axes:
            self.declare(axis.name, axis.place, scope)
        base = [axis for axis in axes if not isinstance(axis.size, tuple)]
        sizes = [
            cast("Index | None", self.attempt(partial(self.axis_size, axis.name, axis.size, axis.place, scope)))
            for axis in base
            if not isinstance(axis.size, tuple)
        ]
        if None in sizes:
            for axis in axes:
                scope.attributes[axis.name] = GridAxis(axis.name, Const(1), Const(1), Const(1), True)
            return
        known = [size for size in sizes if size is not None]
        for at, axis in enumerate(base):
            stride = product(known[at + 1 :])
            others = product([*known[:at], *known[at + 1 :]])
            scope.attributes[axis.name] = GridAxis(axis.name, known[at], stride, others, at == 0)
        if base:
            self.require(Requirement("grid", "grid", product(known), NQ, base[0].place))
        for axis, size in zip(base, known, strict=True):
            self.require(Requirement("minimum", f"axis {axis.name}", size, Const(0), axis.place))
        for axis in axes:
            if isinstance(axis.size, tuple):
                self.composed_axis(axis, axis.size, scope)

    def axis_size(self, name: str, expr: ast.Expr, place: SourceRange, scope: Scope) -> Index:
        """How many coordinates a base axis has; a number is looked at before it divides anything."""
        size = self.constant(expr, scope, f"axis `{name}` must be")
        if isinstance(size, Const) and size.value < 1:
            message = f"axis `{name}` is {size.value}, and must be at least 1"
            raise self.report("E404", message, place, "give its number of positions")
        return size

    def composed_axis(self, axis: ast.Axis, names: tuple[str, ...], scope: Scope) -> None:
        parts = []
        for name in names:
            part = scope.attributes.get(name)
            if not isinstance(part, GridAxis) or part.parts:
                near = nearest(name, scope.attributes)
                help = f"did you mean `{near}`?" if near else "an axis is composed of axes that have a size"
                self.report("E202", f"`{name}` is no axis with a size", axis.place, help)
                continue
            parts.append(part)
        size = product([part.size for part in parts])
        scope.attributes[axis.name] = GridAxis(axis.name, size, Const(1), Const(1), False, tuple(parts))

    def input(self, declared: ast.Input, scope: Scope) -> Value:
        where = f"the size of input `{declared.name}` must be"
        length = None if declared.size is None else self.constant(declared.size, scope, where)
        side: Side = "table"
        if isinstance(declared.size, ast.Name):
            sides: dict[str, Side] = {"N": "both", "Nq": "query", "Nk": "key"}
            side = sides.get(declared.size.name, "table")
        declaration = InputDeclaration(declared.name, declared.dtype, side, length, declared.place)
        if length is not None and has_stand_in(length):
            scope.attributes[declared.name] = declaration
            return AttributeName(declaration)
        before = self.inputs.get(declared.name)
        if before is not None and (before.dtype, before.side, before.length) != (
            declared.dtype,
            side,
            length,
        ):
            scope.broken.add(declared.name)
            message = f"input `{declared.name}` has another type here than elsewhere"
            raise self.report("E208", message, declared.place, "rename it: inputs of one name are one tensor")
        self.inputs.setdefault(declared.name, declaration)
        scope.attributes[declared.name] = declaration
        return AttributeName(declaration)

    def label(self, declared: ast.Label, scope: Scope) -> Value:
        """A label is read as an input of its name, one integer for each position."""
        name, before = declared.name, self.labels.get(declared.name)
        is_input = before is None and name in self.inputs
        declaration = scope.attributes[name] = InputDeclaration(name, "int", "both", NQ, declared.place)
        learner, settings = learned(self, declared.learner, scope)
        label = LabelDeclaration(name, learner.name, settings, declared.place)
        if is_input or (before is not None and before != replace(label, place=before.place)):
            scope.broken.add(name)
            message = f"label `{name}` is something else elsewhere"
            raise self.report("E208", message, declared.place, "rename it: labels of one name are one tensor")
        self.labels.setdefault(name, label)
        self.inputs.setdefault(name, declaration)
        return AttributeName(declaration)

    def selection(self, declared: ast.Selection, scope: Scope) -> Value:
        """A selection is a relation by its name: what it lists, of what may be listed."""
        name = declared.name
        try:
            found = selected(self, declared, scope, self.labels)
        except (Stop, PatternError):
            scope.broken.add(name)
            raise
        before = self.selections.get(name)
        if (name in self.inputs and before is None) or (before or found) != replace(
            found, place=(before or found).place
        ):
            scope.broken.add(name)
            message = f"selection `{name}` is something else elsewhere"
            raise self.report("E208", message, declared.place, "rename it: selections of one name are one tensor")
        self.selections.setdefault(name, found)
        length = arithmetic("*", found.width, NQ)  # at most; binding knows the number of rows
        self.inputs.setdefault(name, InputDeclaration(name, "int", "table", length, declared.place))
        scope.values[name] = relation = listed(found)
        return relation

    def imported(
        self, imported: ast.Import, arguments: tuple[ast.Argument, ...], place: SourceRange, scope: Scope
    ) -> Relation:
        """An imported spec with its parameters given as keywords: its relation, in a scope of its own."""
        spec = imported.spec
        if spec.merge != "set" or spec.fallback is not None:
            key = "merge" if spec.merge != "set" else "fallback"
            help = f"give `{key}` in the spec that imports it"
            raise self.report("E304", f"`{imported.name}` has `{key}`, which is of a whole pattern", place, help)
        if spec.branches:
            message = f"`{imported.name}` has sources, branches, scores or roles, which are of a whole pattern"
            raise self.report("E304", message, place, "declare them in the spec that imports it")
        params = {param.name: param for param in spec.params}
        given: dict[str, Value] = {}
        for argument in arguments:
            if argument.name is None:
                names = ", ".join(params) or "none"
                help = f"write {imported.name}(name = ...); its parameters are {names}"
                raise self.report("E204", f"`{imported.name}` takes parameters by name", argument.place, help)
            self.check_argument(imported.name, argument.name, tuple(params), given, argument.place)
            wanted: Kind = "list" if isinstance(params[argument.name].default, tuple) else "integer"
            where = f"`{argument.name}` of `{imported.name}` must be"
            given[argument.name] = self.wanted(argument.value, wanted, where, scope)
        inner = Scope(parent=_prelude())
        with self.entered(imported, place):
            for param in spec.params:
                inner.values[param.name] = self.imported_param(imported, param, given, inner, place)
            self.declarations(spec, inner)
            return self.predicate(spec.attend, inner, "a pattern must be")

    def imported_param(
        self,
        imported: ast.Import,
        param: ast.Param,
        given: dict[str, Value],
        inner: Scope,
        place: SourceRange,
    ) -> Value:
        value = given.get(param.name)
        if value is None and param.default is None:
            help = f"write {imported.name}({param.name} = ...)"
            raise self.report("E402", f"`{imported.name}` needs a value for `{param.name}`", place, help)
        if value is None and isinstance(param.default, tuple):
            value = ListValue(tuple(self.constant(item, inner) for item in param.default))
        if value is None:
            value = self.constant(cast("ast.Expr", param.default), inner)
        if param.minimum is not None:
            least = self.constant(param.minimum, inner)
            items = value.items if isinstance(value, ListValue) else (cast("Index", value),)
            for item in (items,) if isinstance(items, str) else items:
                self.require(Requirement("minimum", f"{imported.name}.{param.name}", item, least, place))
        return value

    def require(self, required: Requirement) -> None:
        """To be checked when sizes are bound; what stands in for a definition's parameter has no size."""
        known = [part for part in (required.value, required.least) if not isinstance(part, str)]
        if required.value == "?" or any(map(has_stand_in, known)):
            return
        if any(map(depends_on_data, known)):
            message = f"`{required.label}` is checked when sizes are bound, and here depends on a position or an input"
            help = "let it depend on head, layer, N and parameters only"
            raise self.report("E209", message, required.place, help)
        self.requirements.append(required)
