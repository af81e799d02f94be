"""What does a spec mean, read a second time? Membership from the syntax tree, one (q, k) at a time.

It shares nothing with sema, ir and lower: a tree is written out as Python text in which every definition stands in
full, and Python does the arithmetic. The standard library is the table of the design page, not grammar/prelude.pat.
Only the order in which a query draws random keys comes from the package; see `tests/property/test_draws.py` for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np

from patterndsl.ir.draws import _permuted, draw
from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.relation import NOTHING, Random
from patterndsl.syntax import tree as ast

Values: TypeAlias = Sequence[int] | Sequence[bool]


@dataclass(frozen=True)
class Lengths:
    """Queries [q_start, q_start + q_len) of a sequence of `total`, keys [0, kv_len)."""

    q_len: int
    kv_len: int
    q_start: int
    total: int


def lengths(n: int | None = None, q_len: int | None = None, kv_len: int | None = None, q_start: int = 0) -> Lengths:
    total = q_start + (q_len or 0) if n is None else n
    return Lengths(total - q_start if q_len is None else q_len, total if kv_len is None else kv_len, q_start, total)


def keep(
    spec: ast.Spec, sizes: Lengths, heads: int = 1, layer: int = 0, inputs: Mapping[str, Values] | None = None
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool [heads, q_len, kv_len]: which query attends which key."""
    reading = Reading(sizes)
    text = reading.predicate(spec.attend, reading.outermost(spec))
    queries = f"range({sizes.q_start}, {sizes.q_start + sizes.q_len})"
    rows = f"lambda Nq, Nk: [[{text} for k in range({sizes.kv_len})] for q in {queries}]"
    names = {**LIBRARY, "layer": layer, **{f"input_{name}": Input(values) for name, values in (inputs or {}).items()}}
    masks = []
    for head in range(heads if "head" in text or reading.drawings else 1):
        known = names | {"head": head}
        known |= {name: drawing.compiled(known) for name, drawing in reading.drawings.items()}
        found = eval(rows, known)(sizes.total, sizes.kv_len)
        masks.append(np.array(found, dtype=bool).reshape(sizes.q_len, sizes.kv_len))
    return np.stack([masks[head % len(masks)] for head in range(heads)])


# ---- what the written-out Python calls ----------------------------------------------------------------------


class Input:
    """A tensor of the caller; -1 or False outside its range."""

    def __init__(self, values: Values) -> None:
        self.values = list(values)
        self.missing: int | bool = False if self.values and isinstance(self.values[0], bool) else -1
        order = sorted(range(len(self.values)), key=lambda at: (self.values[at], at))
        self.ranks = [0] * len(self.values)
        for rank, at in enumerate(order):
            self.ranks[at] = rank
        self.starts = list(range(len(self.values)))
        for at in range(1, len(self.values)):
            if self.values[at] == self.values[at - 1]:
                self.starts[at] = self.starts[at - 1]

    def value(self, at: int) -> int | bool:
        return self.values[at] if 0 <= at < len(self.values) else self.missing

    def start(self, at: int) -> int:
        return self.starts[at] if 0 <= at < len(self.values) else -1

    def rank(self, at: int) -> int:
        return self.ranks[at] if 0 <= at < len(self.values) else -1


def coordinates(sizes: tuple[int, ...], position: int) -> list[int]:
    """Row-major; the outermost axis goes on beyond its size."""
    found = []
    for size in reversed(sizes[1:]):
        position, inner = divmod(position, size)
        found.append(inner)
    return [position, *reversed(found)]


@lru_cache(maxsize=1 << 16)
def coordinate(sizes: tuple[int, ...], axis: int, position: int) -> int:
    return coordinates(sizes, position)[axis]


@cache
def axis_start(sizes: tuple[int, ...], axis: int, position: int) -> int:
    """The first position of the run of equal coordinates."""
    if axis > 0 and sizes[axis] == 1:
        return 0  # it never changes
    here = coordinates(sizes, position)[axis]
    while coordinates(sizes, position - 1)[axis] == here:
        position -= 1
    return position


@cache
def axis_order(sizes: tuple[int, ...], axis: int) -> list[int]:
    """All positions by coordinate, stable."""
    return sorted(range(math.prod(sizes)), key=lambda at: coordinates(sizes, at)[axis])


@cache
def axis_rank(sizes: tuple[int, ...], axis: int, position: int) -> int:
    """The place in the stable order by coordinate."""
    total = math.prod(sizes)
    if 0 <= position < total:
        return axis_order(sizes, axis).index(position)
    # beyond the grid the same arithmetic goes on: so many of each coordinate, and those of its own before it
    here, others, stride = coordinates(sizes, position)[axis], total // sizes[axis], math.prod(sizes[axis + 1 :])
    before = position % stride if axis == 0 else position // (stride * sizes[axis]) * stride + position % stride
    return here * others + before


def item(items: Sequence[int], at: int) -> int:
    if not 0 <= at < len(items):
        raise IndexError(at)
    return items[at]


def log2(x: int) -> int:
    if x < 1:
        raise ValueError(x)
    return x.bit_length() - 1


LIBRARY: dict[str, Any] = {
    "axis": coordinate,
    "axis_start": axis_start,
    "axis_rank": axis_rank,
    "item": item,
    "isqrt": math.isqrt,
    "log2": log2,
}


@dataclass
class Drawing:
    """`random(count, seed, avoid)` as Python texts in the positions and lengths where it stands."""

    count: str
    seed: str
    avoid: str | None

    def compiled(self, names: dict[str, Any]) -> Callable[[int, int, int, int], bool]:
        """Whether query q of a frame of Nq queries and Nk keys draws key k."""
        count, seed = (eval(f"lambda Nq, Nk: {text}", names) for text in (self.count, self.seed))
        avoid = eval(f"lambda q, k, Nq, Nk: {self.avoid}", names) if self.avoid else None

        @cache
        def drawn(q: int, num_q: int, num_k: int) -> frozenset[int]:
            how_many, source = max(0, count(num_q, num_k)), seed(num_q, num_k)
            if avoid is None:
                return frozenset(first_keys(how_many, source, num_q, num_k)[q]) - {-1}
            free = (k for k in key_order(source, num_q, num_k)[q] if not avoid(q, k, num_q, num_k))
            return frozenset(k for k, _ in zip(free, range(how_many), strict=False))

        def holds(q: int, k: int, num_q: int, num_k: int) -> bool:
            return 0 <= q < num_q and 0 <= k < num_k and k in drawn(q, num_q, num_k)

        return holds


@lru_cache(maxsize=1024)
def first_keys(count: int, seed: int, num_q: int, num_k: int) -> list[list[int]]:
    """The first keys of each query's order, -1 behind them."""
    drawn: list[list[int]] = draw(Random(Const(count), Const(seed), NOTHING, Q, K, Const(num_q), Const(num_k))).tolist()
    return drawn


@lru_cache(maxsize=64)
def key_order(seed: int, num_q: int, num_k: int) -> list[list[int]]:
    """All keys in the order in which each query draws them."""
    found: list[list[int]] = _permuted(np.arange(num_k), np.arange(num_q)[:, None], seed, num_k).tolist()
    return found


# ---- the standard library -----------------------------------------------------------------------------------

PRELUDE: dict[str, str] = {
    "all": "True",
    "none": "False",
    "causal": "k <= q",
    "window(w)": "abs(q - k) <= {w}",
    "window(left, right)": "-{right} <= q - k <= {left}",
    "recent(n)": "0 <= q - k < {n}",
    "block(b)": "q // {b} == k // {b}",
    "strided(s)": "(q - k) % {s} == 0",
    "dilated(w, d)": "(q - k) % {d} == 0 and abs(q - k) <= {w} * {d}",
    "columns(s, c)": "k % {s} >= {s} - {c}",
    "first(g)": "k < {g}",
    "global(g)": "q < {g} or k < {g}",
    "same(a)": "{a.q} == {a.k}",
    "within(a, R)": "{a.q} == {a.k} and (lambda q, k: {R})(q - {a.q.start}, k - {a.k.start})",
    "blocks(b, R)": "(lambda q, k, Nq, Nk: {R})(q // {b}, k // {b}, -(-Nq // {b}), -(-Nk // {b}))",
    "transpose(R)": "(lambda q, k, Nq, Nk: {R})(k, q, Nk, Nq)",
    "shifted(R, d)": "(lambda k: {R})(k + {d})",
    "chunks(label, m, back)": "0 <= {label.q.rank} // {m} - {label.k.rank} // {m} <= {back}",
}


def _macros() -> dict[tuple[str, int], tuple[tuple[str, ...], str]]:
    macros = {}
    for head, body in PRELUDE.items():
        name, _, params = head.rstrip(")").partition("(")
        names = tuple(params.split(", ")) if params else ()
        macros[name, len(names)] = (names, body)
    return macros


MACROS = _macros()

# ---- from trees to Python -----------------------------------------------------------------------------------

Kind: TypeAlias = Literal["integer", "predicate"]


@dataclass(frozen=True)
class Grid:
    """The base axes of a spec with the texts of their sizes, and the composed ones by the axes they are made of."""

    sizes: dict[str, str]
    composed: dict[str, tuple[str, ...]]

    def text(self, name: str, facet: str | None, position: str) -> str:
        if name in self.composed:
            total = "0"
            for part in self.composed[name]:
                total = f"({total} * {self.sizes[part]} + {self.text(part, None, position)})"
            return total
        call = {None: "axis", "start": "axis_start", "rank": "axis_rank"}[facet]
        return f"{call}(({', '.join(self.sizes.values())},), {list(self.sizes).index(name)}, {position})"


@dataclass(frozen=True)
class Argument:
    """An expression as it was written, with the names that it sees; it is read where its parameter stands."""

    expr: ast.Expr
    scope: Names


@dataclass
class Names:
    """What an expression sees."""

    parent: Names | None = None
    values: dict[str, Argument | str | list[str]] = field(default_factory=dict)
    grid: Grid | None = None
    inputs: dict[str, ast.Input] = field(default_factory=dict)
    definitions: dict[tuple[str, int], ast.Definition] = field(default_factory=dict)
    imports: dict[str, ast.Spec] = field(default_factory=dict)

    def axis(self, name: str) -> bool:
        return self.grid is not None and (name in self.grid.sizes or name in self.grid.composed)


@dataclass(frozen=True)
class AttributeText:
    """`{a.q}`, `{a.k.start}` of the table above: the Python text of an attribute that stands as an argument."""

    read: Callable[[str, str | None], str]
    position: str | None = None

    def __getattr__(self, name: str) -> Any:
        if self.position is None:
            return AttributeText(self.read, name)
        return self.read(self.position, name)

    def __str__(self) -> str:
        assert self.position is not None
        return self.read(self.position, None)


class Reading:
    """Writes trees as Python; collects what they draw."""

    def __init__(self, sizes: Lengths) -> None:
        self.sizes = sizes
        self.drawings: dict[str, Drawing] = {}

    # ---- specs --------------------------------------------------------------------------------------------

    def outermost(self, spec: ast.Spec) -> Names:
        """Parameters are numbers: those of the whole sequence's lengths, wherever they stand."""
        names = Names()
        for param in spec.params:
            assert param.default is not None
            items = param.default if isinstance(param.default, tuple) else (param.default,)
            numbers = [str(self.number(expr, names)) for expr in items]
            names.values[param.name] = numbers if isinstance(param.default, tuple) else f"({numbers[0]})"
        return self.declared(spec, names)

    def number(self, expr: ast.Expr, names: Names) -> int:
        number: int = eval(f"lambda Nq, Nk: {self.integer(expr, names)}", dict(LIBRARY))(
            self.sizes.total, self.sizes.kv_len
        )
        return number

    def declared(self, spec: ast.Spec, names: Names) -> Names:
        base = {axis.name: axis.size for axis in spec.grid if not isinstance(axis.size, tuple)}
        names.grid = Grid(
            {name: self.integer(size, names) for name, size in base.items()},
            {axis.name: axis.size for axis in spec.grid if isinstance(axis.size, tuple)},
        )
        names.inputs = {declared.name: declared for declared in spec.inputs}
        names.definitions = {(item.name, len(item.params)): item for item in spec.define}
        names.imports = {imported.name: imported.spec for imported in spec.imports}
        return names

    def imported(self, spec: ast.Spec, arguments: Sequence[ast.Argument], scope: Names) -> tuple[Kind, str]:
        """A spec as a definition: its parameters are arguments, its lengths those where it stands."""
        given = {argument.name: argument.value for argument in arguments}
        inner = Names()
        for param in spec.params:
            if param.name in given:
                inner.values[param.name] = Argument(given[param.name], scope)
            elif isinstance(param.default, tuple):
                inner.values[param.name] = [self.integer(expr, inner) for expr in param.default]
            else:
                assert param.default is not None
                inner.values[param.name] = Argument(param.default, inner)
        return "predicate", self.predicate(spec.attend, self.declared(spec, inner))

    # ---- names --------------------------------------------------------------------------------------------

    def called(self, name: str, arguments: Sequence[ast.Argument], scope: Names) -> tuple[Kind, str]:
        within: Names | None = scope
        while within is not None:
            if name in within.values:
                return self.valued(within.values[name])
            definition = within.definitions.get((name, len(arguments)))
            if definition is not None:
                inner = Names(within, dict(self.given(definition.params, arguments, scope)))
                return self.text(definition.body, inner)
            if name in within.imports:
                return self.imported(within.imports[name], arguments, scope)
            within = within.parent
        if (name, len(arguments)) in MACROS:
            params, body = MACROS[name, len(arguments)]
            given = dict(self.given(params, arguments, scope))
            return "predicate", "(" + body.format(**{param: self.filled(given[param]) for param in params}) + ")"
        return self.primitive(name, arguments, scope)

    def given(
        self, params: Sequence[str], arguments: Sequence[ast.Argument], scope: Names
    ) -> Sequence[tuple[str, Argument]]:
        return [
            (argument.name or param, Argument(argument.value, scope))
            for param, argument in zip(params, arguments, strict=True)
        ]

    def filled(self, argument: Argument) -> str | AttributeText:
        """The Python of an argument of the standard library."""
        if isinstance(argument.expr, ast.Name):
            source = self.attribute_of(argument.expr.name, argument.scope)
            if source is not None:
                return AttributeText(lambda position, facet: self.attribute(*source, facet, position)[1])
        return self.text(argument.expr, argument.scope)[1]

    def valued(self, value: Argument | str | list[str]) -> tuple[Kind, str]:
        assert not isinstance(value, list), "a list stands for itself only under an index"
        return ("integer", value) if isinstance(value, str) else self.text(value.expr, value.scope)

    def attribute_of(self, name: str, scope: Names) -> tuple[str, Names] | None:
        """The axis or input of that name, and the spec that declares it."""
        within: Names | None = scope
        while within is not None:
            value = within.values.get(name)
            if isinstance(value, Argument) and isinstance(value.expr, ast.Name):
                return self.attribute_of(value.expr.name, value.scope)
            if within.axis(name) or name in within.inputs:
                return name, within
            within = within.parent
        return None

    def attribute(self, name: str, home: Names, facet: str | None, position: str) -> tuple[Kind, str]:
        if home.axis(name):
            assert home.grid is not None
            return "integer", home.grid.text(name, facet, position)
        truth = home.inputs[name].dtype == "bool" and facet is None
        return ("predicate" if truth else "integer"), f"input_{name}.{facet or 'value'}({position})"

    def primitive(self, name: str, arguments: Sequence[ast.Argument], scope: Names) -> tuple[Kind, str]:
        if name in ("q", "k", "head", "layer", "Nq", "Nk"):
            return "integer", name
        if name == "N":
            return "integer", "Nq"
        if name == "along":
            found = self.attribute_of(getattr(arguments[0].value, "name", ""), scope)
            assert found is not None
            axis, home = found
            assert home.grid is not None
            others = set(home.grid.sizes) - set(home.grid.composed.get(axis, (axis,)))
            pairs = [f"{home.grid.text(o, None, 'q')} == {home.grid.text(o, None, 'k')}" for o in others]
            return "predicate", f"({' and '.join(pairs) or 'True'})"
        if name == "random":
            return self.random(arguments, scope)
        texts = [self.integer(argument.value, scope) for argument in arguments]
        match name, texts:
            case "clamp", [x, low, high]:
                return "integer", f"max({low}, min({x}, {high}))"
            case "ceildiv", [x, step]:
                return "integer", f"(-(-{x} // {step}))"
            case "abs" | "min" | "max" | "isqrt" | "log2", _:
                return "integer", f"{name}({', '.join(texts)})"
        raise AssertionError(f"no meaning for {name}")

    def random(self, arguments: Sequence[ast.Argument], scope: Names) -> tuple[Kind, str]:
        names = [argument.name or ("r", "seed", "avoid")[at] for at, argument in enumerate(arguments)]
        given = dict(zip(names, (argument.value for argument in arguments), strict=True))
        seed = self.integer(given["seed"], scope) if "seed" in given else "0"
        avoid = self.predicate(given["avoid"], scope) if "avoid" in given else None
        label = f"random_{len(self.drawings)}"
        self.drawings[label] = Drawing(self.integer(given["r"], scope), seed, avoid)
        return "predicate", f"{label}(q, k, Nq, Nk)"

    # ---- expressions --------------------------------------------------------------------------------------

    def integer(self, expr: ast.Expr, scope: Names) -> str:
        kind, text = self.text(expr, scope)
        assert kind == "integer", expr
        return text

    def predicate(self, expr: ast.Expr, scope: Names) -> str:
        kind, text = self.text(expr, scope)
        assert kind == "predicate", expr
        return text

    def text(self, expr: ast.Expr, scope: Names) -> tuple[Kind, str]:
        """The expression's kind, and its Python in terms of q, k, Nq, Nk, head and layer."""
        match expr:
            case ast.Number(value=value):
                return "integer", str(value)
            case ast.Name(name=name):
                return self.called(name, (), scope)
            case ast.Call(name=name, arguments=arguments):
                return self.called(name, arguments, scope)
            case ast.Attribute(position=position, name=name, facet=facet):
                source = self.attribute_of(name, scope)
                assert source is not None, name
                return self.attribute(*source, facet, position)
            case ast.Subscript(name=name, index=index):
                return self.subscript(name, self.integer(index, scope), scope)
            case ast.Negative(operand=operand):
                return "integer", f"(-{self.integer(operand, scope)})"
            case ast.Binary(op=op, left=left, right=right):
                (kind, a), (_, b) = self.text(left, scope), self.text(right, scope)
                return kind, f"({a} {op} {b})" if kind == "integer" else f"({a} and not {b})"
            case ast.Comparison(ops=ops, operands=operands):
                first, *rest = (self.integer(operand, scope) for operand in operands)
                return "predicate", f"({first}{''.join(f' {op} {b}' for op, b in zip(ops, rest, strict=True))})"
            case ast.InRange(operand=operand, start=start, stop=stop):
                x, low, high = (self.integer(part, scope) for part in (operand, start, stop))
                return "predicate", f"({low} <= {x} < {high})"
            case ast.InSet(operand=operand, items=items):
                x, *members = (self.integer(part, scope) for part in (operand, *items))
                return "predicate", f"({x} in ({', '.join(members)},))"
            case ast.Not(operand=operand):
                return "predicate", f"(not {self.predicate(operand, scope)})"
            case ast.Logic(op=op, terms=terms):
                word = " and " if op == "&" else " or "
                return "predicate", f"({word.join(self.predicate(term, scope) for term in terms)})"
            case ast.At():
                return "predicate", self.at(expr, scope)
        raise AssertionError(f"no meaning for {expr}")

    def subscript(self, name: str, index: str, scope: Names) -> tuple[Kind, str]:
        within: Names | None = scope
        while within is not None:
            value = within.values.get(name)
            if isinstance(value, list):
                return "integer", f"item([{', '.join(value)}], {index})"
            if isinstance(value, Argument) and isinstance(value.expr, ast.Name):
                return self.subscript(value.expr.name, index, value.scope)
            if name in within.inputs:
                return self.attribute(name, within, None, index)
            within = within.parent
        raise AssertionError(f"no list {name}")

    def at(self, expr: ast.At, scope: Names) -> str:
        """`N = f` is f of each length; `Nq = ` and `Nk = ` are of one."""
        lengths = {length.name: self.integer(length.value, scope) for length in expr.lengths}
        both = lengths.get("N")
        num_q = lengths.get("Nq", both or "Nq")
        num_k = lengths.get("Nk", f"(lambda Nq: {both})(Nk)" if both else "Nk")
        relation = self.predicate(expr.relation, scope)
        query, key = self.integer(expr.query, scope), self.integer(expr.key, scope)
        return f"(lambda q, k, Nq, Nk: {relation})({query}, {key}, {num_q}, {num_k})"
