"""What does an expression mean? Looks up its names, checks its kinds, and expands definitions into index expressions
and relations.

A definition is a function of the positions and lengths where it stands, so an argument is put in as it is written:
`R at (q // b, k // b)` means R with its positions replaced, whatever R is made of. Mistakes are collected; what follows
from a reported mistake is silent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, assert_never, cast

from patterndsl.diagnostics import Diagnostic, PatternError, SourceRange, error, nearest
from patterndsl.ir.index import (
    HEAD,
    LAYER,
    NK,
    NQ,
    ArithmeticOp,
    Const,
    Facet,
    Index,
    K,
    Param,
    Q,
    Read,
    Var,
    arithmetic,
    function,
    select,
)
from patterndsl.ir.relation import (
    EVERYTHING,
    CompareOp,
    Holds,
    Nothing,
    Random,
    Relation,
    compare,
    conjunction,
    disjunction,
    inputs_read,
    lists_in,
    negation,
    subexpressions,
    substitute,
    substitute_index,
)
from patterndsl.sema.infer import param_kinds
from patterndsl.sema.model import InputDeclaration, Requirement, Side
from patterndsl.sema.scope import (
    FUNCTIONS,
    POSITIONS,
    PRIMITIVES,
    STAND_IN,
    AttributeName,
    GridAxis,
    Kind,
    ListValue,
    Scope,
    Value,
    coordinate,
    depends_on_data,
    kind_of,
)
from patterndsl.sema.wording import A_KIND, FORMS, OTHER_WORDS, counted, given_count, wrong_kind
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression

MAX_EXPANSION = 50_000
"""Nodes that one spec may expand to; definitions that double at each step reach it quickly."""

_UNDECLARED = (
    "declare it under `params`, `define` or `inputs`; for an expression, by params= and inputs= (--set, --declare)"
)
_UNDECLARED_ATTRIBUTE = (
    "declare it under `grid` or `inputs`; for an expression, by grid= and inputs= (--grid, --declare)"
)

_T = TypeVar("_T")


class Stop(Exception):
    """The mistake was reported; what contains it is silent."""


@dataclass
class Expander(ABC):
    """Expands expressions in scopes; what an imported spec means is left to the subclass."""

    diagnostics: list[Diagnostic]
    requirements: list[Requirement] = field(default_factory=list)
    active: list[ast.Definition | ast.Import] = field(default_factory=list)
    recursive: set[int] = field(default_factory=set)
    library_call: tuple[str, SourceRange] | None = None
    expanded: int = 0
    later: frozenset[str] = frozenset()
    """Parameters that are declared, but not before what is read now."""

    @abstractmethod
    def require(self, required: Requirement) -> None:
        """To be checked when sizes are bound."""

    @abstractmethod
    def imported(
        self, imported: ast.Import, arguments: tuple[ast.Argument, ...], place: SourceRange, scope: Scope
    ) -> Relation:
        """The relation of an imported spec, its parameters given as keywords."""

    def report(self, code: str, message: str, place: SourceRange, help: str | None = None, label: str = "") -> Stop:
        if self.library_call is not None:
            name, place = self.library_call
            message = f"in `{name}`: {message}"
        self.diagnostics.append(Diagnostic(code, message, place, help, label))
        return Stop()

    def place(self, expr: ast.Expr) -> SourceRange:
        """Where to point at: what the user wrote, not the inside of the standard library."""
        return expr.place if self.library_call is None else self.library_call[1]

    def attempt(self, make: Callable[[], Value]) -> Value | None:
        """The value, or None where a mistake was reported."""
        try:
            return make()
        except Stop:
            return None
        except PatternError as failed:  # folding found a bad constant, or the expansion went too far
            if self.expanded > MAX_EXPANSION:
                raise
            self.diagnostics.extend(failed.diagnostics)
            return None

    def constant(self, expr: ast.Expr, scope: Scope, where: str = "a size must be") -> Index:
        """An integer that depends on lengths and parameters only."""
        value = self.integer(expr, scope, where)
        if any(index in (Q, K, HEAD, LAYER) or isinstance(index, Read) for index in subexpressions(value)):
            message = "a size or parameter cannot depend on a position, head, layer or input"
            raise self.report("E209", message, expr.place, "use numbers, N and the parameters before it")
        return value

    def integer(self, expr: ast.Expr, scope: Scope, where: str) -> Index:
        return cast("Index", self.wanted(expr, "integer", where, scope))

    def predicate(self, expr: ast.Expr, scope: Scope, where: str) -> Relation:
        return cast("Relation", self.wanted(expr, "predicate", where, scope))

    def integers(self, exprs: Iterable[ast.Expr], scope: Scope, where: str) -> list[Index]:
        return self.each(partial(self.integer, where=where), exprs, scope)

    def wanted(self, expr: ast.Expr, wanted: Kind | None, where: str, scope: Scope) -> Value:
        """The value of an expression of the wanted kind, or of any where it is None."""
        return self.checked(self.value(expr, scope), expr, wanted, where)

    def checked(self, value: Value, expr: ast.Expr, wanted: Kind | None, where: str) -> Value:
        """The value, if it is of the wanted kind."""
        kind = kind_of(value)
        if wanted in (kind, None):
            return value
        text = render_expression(expr)
        if kind == "list":
            help = f"index it: {text}[head] or {text}[layer]"
            raise self.report("E207", f"`{text}` is a list, and one value belongs here", expr.place, help)
        found, help = wrong_kind(wanted, kind, expr, text, own=self.library_call is None)
        raise self.report("E203", f"{where} {A_KIND[wanted]}, and this is {found}", expr.place, help)

    def each(self, read: Callable[[ast.Expr, Scope], _T], exprs: Iterable[ast.Expr], scope: Scope) -> list[_T]:
        """All values; a mistake in one expression does not hide a mistake in the next."""
        values: list[_T] = []
        stopped = False
        for expr in exprs:
            try:
                values.append(read(expr, scope))
            except Stop:
                stopped = True
        if stopped:
            raise Stop
        return values

    def value(self, expr: ast.Expr, scope: Scope) -> Value:
        self.expanded += 1
        if self.expanded > MAX_EXPANSION:
            message = f"the definitions expand to more than {MAX_EXPANSION:,} nodes"
            raise error("E206", message, self.place(expr), "let each definition use the one before it once")
        match expr:
            case ast.Broken():
                raise Stop
            case ast.Number(value=number):
                return Const(number)
            case ast.Real():
                message = f"`{render_expression(expr)}` is no whole number"
                raise self.report("E203", message, self.place(expr), "positions and sizes are integers")
            case ast.Name(name=name, place=place):
                return self.name(name, place, scope)
            case ast.Attribute():
                return self.attribute(expr, scope)
            case ast.Subscript():
                return self.subscript(expr, scope)
            case ast.Call():
                return self.call(expr, scope)
            case ast.Negative(operand=operand):
                return arithmetic("-", Const(0), self.integer(operand, scope, "`-` takes"), self.place(expr))
            case ast.Binary():
                return self.binary(expr, scope)
            case ast.Comparison(ops=ops, operands=operands):
                values = self.integers(operands, scope, "a comparison takes")
                return conjunction(map(_comparison, ops, values, values[1:]))
            case ast.InRange(operand=operand, start=start, stop=stop):
                x, low, high = self.integers((operand, start, stop), scope, "`in` takes")
                return conjunction((compare("<=", low, x), compare("<", x, high)))
            case ast.InSet(operand=operand, items=items):
                x, *members = self.integers((operand, *items), scope, "`in` takes")
                return disjunction(compare("==", x, member) for member in members)
            case ast.Not(operand=operand):
                return negation(self.predicate(operand, scope, "`~` takes"))
            case ast.Logic(op=op, terms=terms):
                relations = self.each(partial(self.predicate, where=f"`{op}` takes"), terms, scope)
                return conjunction(relations) if op == "&" else disjunction(relations)
            case ast.At():
                return self.at(expr, scope)
            case _:
                assert_never(expr)

    def binary(self, expr: ast.Binary, scope: Scope) -> Value:
        """Arithmetic, or the difference of two predicates: both sides are of one kind."""
        if expr.op in ("/", "**"):
            cure = "integers only: write `//` for floor division" if expr.op == "/" else "write the product"
            raise self.report("E203", f"`{expr.op}` gives no whole number", self.place(expr), cure)
        left, right = self.each(self.value, (expr.left, expr.right), scope)
        kind: Kind = "predicate" if expr.op == "-" and kind_of(left) == "predicate" else "integer"
        left = self.checked(left, expr.left, kind, f"`{expr.op}` takes")
        right = self.checked(right, expr.right, kind, f"`{expr.op}` takes")
        if kind == "predicate":
            return conjunction((cast("Relation", left), negation(cast("Relation", right))))
        return arithmetic(cast("ArithmeticOp", expr.op), cast("Index", left), cast("Index", right), self.place(expr))

    def name(self, name: str, place: SourceRange, scope: Scope) -> Value:
        within: Scope | None = scope
        while within is not None:
            if name in within.broken:
                raise Stop
            if name in within.values:
                for required in within.requirements.get(name, ()):
                    self.require(required)
                return within.values[name]
            if name in within.definitions:
                return self.expand(name, (), place, scope, within)
            if name in within.imports:
                return self.imported(within.imports[name], (), place, scope)
            if name in within.attributes:
                return AttributeName(within.attributes[name])
            within = within.parent
        if name in POSITIONS:
            return POSITIONS[name]
        if name in PRIMITIVES or name in FUNCTIONS:
            raise self.report("E204", f"`{name}` needs arguments", place, f"write {FORMS[name]}")
        raise self.unknown(name, place, scope)

    def unknown(self, name: str, place: SourceRange, scope: Scope) -> Stop:
        if scope.is_open():
            return Stop()
        if name in self.later:
            message = f"`{name}` is not known before its own declaration"
            return self.report("E201", message, place, "a parameter may use those that are declared before it")
        near = OTHER_WORDS.get(name.casefold()) or nearest(name, scope.names())
        help = f"did you mean `{near}`?" if near else _UNDECLARED
        only_name = SourceRange(place.source, place.start, min(place.stop, place.start + len(name)))
        return self.report("E201", f"unknown name `{name}`", only_name, help)

    def call(self, expr: ast.Call, scope: Scope) -> Value:
        name, place = expr.name, expr.place
        within: Scope | None = scope
        while within is not None:
            if name in within.broken:
                raise Stop
            if name in within.definitions:
                return self.expand(name, expr.arguments, place, scope, within)
            if name in within.imports:
                return self.imported(within.imports[name], expr.arguments, place, scope)
            if name in within.values or name in within.attributes:
                is_hidden = within.parent is not None and name in within.parent.names()
                help = f"rename yours, which hides the usual `{name}`" if is_hidden else f"write `{name}`"
                raise self.report("E204", f"`{name}` takes no arguments", place, help)
            within = within.parent
        if name == "random":
            return self.random(expr, scope)
        if name == "along":
            return self.along(expr, scope)
        if name in FUNCTIONS:
            return self.function(expr, scope)
        if name in POSITIONS:
            raise self.report("E204", f"`{name}` takes no arguments", place, f"write `{name}`")
        raise self.unknown(name, place, scope)

    def function(self, expr: ast.Call, scope: Scope) -> Index:
        least, most = FUNCTIONS[expr.name]
        named = next((argument for argument in expr.arguments if argument.name), None)
        if named or len(expr.arguments) < least or (most is not None and len(expr.arguments) > most):
            counts = f"{least} or more arguments" if most is None else counted(least)
            given = "it is given by place, not by name" if named else given_count(len(expr.arguments))
            raise self.report(
                "E204", f"`{expr.name}` takes {counts}, and {given}", expr.place, f"write {FORMS[expr.name]}"
            )
        values = tuple(self.integers((argument.value for argument in expr.arguments), scope, f"`{expr.name}` takes"))
        match expr.name:
            case "clamp":
                x, low, high = values
                return function("max", (low, function("min", (x, high))))
            case "ceildiv":
                x, step = values
                return arithmetic("//", arithmetic("+", x, arithmetic("-", step, Const(1))), step, self.place(expr))
            case "abs" | "min" | "max" | "isqrt" | "log2" as name:
                return function(name, values, self.place(expr))
            case name:
                raise AssertionError(f"function {name} has no meaning")

    def expand(
        self, name: str, arguments: tuple[ast.Argument, ...], place: SourceRange, scope: Scope, home: Scope
    ) -> Value:
        """A definition with its arguments put in; overloads differ in their number of parameters."""
        overloads = home.definitions[name]
        definition = next((item for item in overloads if len(item.params) == len(arguments)), None)
        if definition is None:
            forms = " or ".join(f"{name}({', '.join(item.params)})" if item.params else name for item in overloads)
            counts = counted(*(len(item.params) for item in overloads))
            message = f"`{name}` takes {counts}, and {given_count(len(arguments))}"
            raise self.report("E204", message, place, f"write {forms}")
        by_name: dict[str, ast.Argument] = {}
        for at, argument in enumerate(arguments):
            param = argument.name or definition.params[at]
            self.check_argument(name, param, definition.params, by_name, argument.place)
            by_name[param] = argument
        kinds = param_kinds(definition, home)
        inner = Scope(parent=home)
        stopped = False
        for param in definition.params:
            before = len(self.requirements)
            try:
                value = self.wanted(by_name[param].value, kinds[param], f"`{param}` of `{name}` must be", scope)
                inner.values[param] = value
            except Stop:
                stopped = True
            inner.requirements[param] = self.requirements[before:]  # they count where the argument stands
            del self.requirements[before:]
        if stopped:
            raise Stop
        with self.entered(definition, place):
            if home.parent is not None or self.library_call is not None:
                return self.value(definition.body, inner)
            self.library_call = (name, place)
            try:
                return self.value(definition.body, inner)
            finally:
                self.library_call = None

    def check_argument(
        self, name: str, param: str, params: Sequence[str], given: Container[str], place: SourceRange
    ) -> None:
        """An argument belongs to a parameter that has none yet."""
        if param in given:
            raise self.report("E204", f"`{param}` is given twice", place, "keep one of the two")
        if param not in params:
            near = nearest(param, params)
            listed = f"its parameters are {', '.join(params)}" if params else "it has no parameters"
            help = f"did you mean `{near}`?" if near else listed
            raise self.report("E204", f"`{name}` has no parameter `{param}`", place, help)

    @contextmanager
    def entered(self, item: ast.Definition | ast.Import, place: SourceRange) -> Iterator[None]:
        """Guards against a definition that uses itself; the definitions of a cycle are silent once it is reported."""
        if id(item) in self.recursive:
            raise Stop
        at = next((at for at, other in enumerate(self.active) if item is other), None)
        if at is not None:
            cycle = self.active[at:]
            self.recursive.update(map(id, cycle))
            chain = " -> ".join([*(other.name for other in cycle), item.name])
            raise self.report("E205", f"`{item.name}` uses itself: {chain}", place, "definitions cannot recurse")
        self.active.append(item)
        try:
            yield
        finally:
            self.active.pop()

    def check_alone(self, definition: ast.Definition, scope: Scope) -> Value:
        """A definition is checked even where nothing uses it, with stand-ins for its parameters."""
        stand_ins: dict[Kind, Value] = {
            "integer": STAND_IN,
            "predicate": compare("==", STAND_IN, Const(0)),
            "attribute": AttributeName(None),
            "list": ListValue("?"),
        }
        kinds = param_kinds(definition, scope)
        inner = Scope(parent=scope, values={param: stand_ins[kinds[param] or "integer"] for param in definition.params})
        before = len(self.requirements)
        with self.entered(definition, definition.place):
            value = self.value(definition.body, inner)
        del self.requirements[before:]  # where it is used, they count
        return value

    # ---- attributes, lists, tables ------------------------------------------------------------------------

    def attribute(self, expr: ast.Attribute, scope: Scope) -> Value:
        if expr.position not in ("q", "k"):
            help = f"write q.{expr.name} or k.{expr.name}"
            raise self.report("E202", f"`{expr.position}` has no attributes; only q and k have", expr.place, help)
        position = Q if expr.position == "q" else K
        meaning = self.attribute_meaning(expr, scope)
        if expr.facet not in (None, "start", "rank"):
            near = nearest(expr.facet, ("start", "rank"))
            help = f"did you mean `{near}`?" if near else "write .start or .rank"
            raise self.report("E202", f"an attribute has no `.{expr.facet}`", expr.place, help)
        facet = cast("Facet", expr.facet or "value")
        if meaning is None:
            return Read("?", facet, position)
        if isinstance(meaning, GridAxis):
            if meaning.parts and facet != "value":
                message = f"the composed axis `{meaning.name}` has no `.{facet}`"
                raise self.report("E202", message, expr.place, "use the axes that it is composed of")
            return coordinate(meaning, facet, position)
        sides: dict[str, Side] = {"q": "query", "k": "key"}
        if meaning.side not in ("both", sides[expr.position]):
            what = "a table" if meaning.side == "table" else f"per {meaning.side}"
            use = f"{meaning.name}[...]" if meaning.side == "table" else f"{meaning.side[0]}.{meaning.name}"
            raise self.report("E202", f"`{meaning.name}` is {what}", expr.place, f"write {use}")
        return _read(meaning, facet, position)

    def attribute_meaning(self, expr: ast.Attribute, scope: Scope) -> GridAxis | InputDeclaration | None:
        """The axis or input of that name; a definition's parameter stands for the attribute it was given."""
        known: set[str] = set()
        within: Scope | None = scope
        while within is not None:
            if expr.name in within.broken:
                raise Stop
            value = within.values.get(expr.name)
            if isinstance(value, AttributeName):
                return value.meaning
            if expr.name in within.attributes:
                return within.attributes[expr.name]
            known |= set(within.attributes)
            within = within.parent
        if scope.is_open():
            raise Stop
        near = nearest(expr.name, known)
        help = f"did you mean `{expr.position}.{near}`?" if near else _UNDECLARED_ATTRIBUTE
        raise self.report("E202", f"unknown attribute `{expr.name}`", expr.place, help)

    def subscript(self, expr: ast.Subscript, scope: Scope) -> Value:
        """`list[head]` or `table[integer]`."""
        target = self.name(expr.name, expr.place, scope)
        index = self.integer(expr.index, scope, "an index must be")
        if isinstance(target, AttributeName) and (
            target.meaning is None or isinstance(target.meaning, InputDeclaration)
        ):
            return Read("?", "value", index) if target.meaning is None else _read(target.meaning, "value", index)
        if not isinstance(target, ListValue):
            help = "only lists under `params` and tables under `inputs` are indexed"
            raise self.report("E207", f"`{expr.name}` is {A_KIND[kind_of(target)]}, not a list", expr.place, help)
        if depends_on_data(index):
            message = f"the list `{expr.name}` is indexed by a position or an input"
            help = "lists are indexed by head and layer; declare a table under `inputs` for more"
            raise self.report("E207", message, expr.index.place, help)
        return select(target.items, index, self.place(expr))

    # ---- primitives ---------------------------------------------------------------------------------------

    def at(self, expr: ast.At, scope: Scope) -> Relation:
        """`R at (q', k')`. `N = f(N)` rescales both lengths by f; `Nq = ` and `Nk = ` each its own."""
        before = len(self.requirements)
        relation = self.predicate(expr.relation, scope, "`at` takes")
        query, key = self.integers((expr.query, expr.key), scope, "a position must be")
        lengths: dict[str, Index] = {}
        for length in expr.lengths:
            if length.name not in ("N", "Nq", "Nk") or length.name in lengths:
                message = f"`at` rescales the lengths N, Nq or Nk once each, not `{length.name}`"
                raise self.report("E204", message, length.place, "write R at (q', k', N = ceildiv(N, b))")
            lengths[length.name] = self.integer(length.value, scope, f"`{length.name}` must be")
        both = lengths.get("N")
        num_q = lengths.get("Nq", both or NQ)
        num_k = lengths.get("Nk", substitute_index(both, lambda v: NK if v == NQ else v) if both else NK)
        put: dict[Index, Index] = {Q: query, K: key, NQ: num_q, NK: num_k}

        def put_symbol(symbol: Var | Param) -> Index:
            return put.get(symbol, symbol)

        moved, self.requirements[before:] = self.requirements[before:], []
        for required in moved:
            value, least = required.value, substitute_index(required.least, put_symbol)
            if not isinstance(value, str):
                value = substitute_index(value, put_symbol)
            self.require(replace(required, value=value, least=least))
        if query != Q and any(lists_in(relation)):
            message = "a selection lists keys for the queries of the sequence, and here they are others"
            raise self.report("E209", message, expr.query.place, "let a selection stand outside `at` and `blocks`")
        return substitute(relation, put_symbol)

    def random(self, expr: ast.Call, scope: Scope) -> Relation:
        """`random(r, seed = 0, avoid = none)`."""
        given: dict[str, ast.Expr] = {}
        for at, argument in enumerate(expr.arguments):
            if argument.name is None and at >= len(PRIMITIVES["random"]):
                help = "write random(r, seed = 7, avoid = R)"
                raise self.report("E204", "`random` takes up to 3 arguments", argument.place, help)
            name = argument.name or PRIMITIVES["random"][at]
            self.check_argument("random", name, PRIMITIVES["random"], given, argument.place)
            given[name] = argument.value
        if "r" not in given:
            raise self.report("E204", "`random` needs the number of keys to draw", expr.place, "write random(3)")
        count, seed = (
            self.integer(given[name], scope, f"`{name}` of `random` must be") if name in given else Const(0)
            for name in ("r", "seed")
        )
        avoid: Relation = Nothing()
        if "avoid" in given:
            avoid = self.predicate(given["avoid"], scope, "`avoid` of `random` must be")
        for name, value in (("r", count), ("seed", seed)):
            if depends_on_data(value):
                message = f"`{name}` of `random` depends on a position or an input"
                raise self.report("E209", message, given[name].place, "it may depend on head, layer, N and parameters")
        if inputs_read(avoid):
            message = "what `random` avoids depends on an input, which is known only at run time"
            raise self.report("E209", message, given["avoid"].place, "draw freely and subtract: random(r) - R")
        return Random(count, seed, avoid, Q, K, NQ, NK, self.place(expr))

    def along(self, expr: ast.Call, scope: Scope) -> Relation:
        """All grid coordinates but this axis's are equal."""
        if len(expr.arguments) != 1:
            raise self.report("E204", "`along` takes one axis", expr.place, "write along(row)")
        value = self.wanted(expr.arguments[0].value, "attribute", "`along` takes", scope)
        assert isinstance(value, AttributeName)
        axis = value.meaning
        if axis is None:
            return EVERYTHING
        if not isinstance(axis, GridAxis):
            raise self.report(
                "E202", f"`{axis.name}` is no grid axis", expr.arguments[0].place, "name an axis of `grid`"
            )
        grid: dict[str, GridAxis] = {}
        within: Scope | None = scope
        while within is not None:
            grid.update({a.name: a for a in within.attributes.values() if isinstance(a, GridAxis) and not a.parts})
            within = within.parent
        others = (other for other in grid.values() if other.name not in axis.base_names())
        return conjunction(compare("==", coordinate(o, "value", Q), coordinate(o, "value", K)) for o in others)


def _read(declared: InputDeclaration, facet: Facet, index: Index) -> Value:
    read = Read(declared.name, facet, index)
    return Holds(read) if declared.dtype == "bool" and facet == "value" else read


def _comparison(op: str, left: Index, right: Index) -> Relation:
    if op in (">", ">="):
        return compare("<" if op == ">" else "<=", right, left)
    return compare(cast("CompareOp", op), left, right)
