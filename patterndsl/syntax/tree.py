"""What did the user write? Expressions and specs as data, before any name is looked up.

Every node knows its place; places take no part in equality, so two trees are equal when their canonical
texts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias, assert_never

from patterndsl.diagnostics import SourceRange


def _place() -> Any:  # as dataclasses.field itself: what a checker takes as the default of any type
    return field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Number:
    """An integer literal."""

    value: int
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Real:
    """A decimal literal, which some settings take and no expression of positions does."""

    value: Decimal
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Name:
    """A bare name: a position, a length, a parameter or a definition without arguments."""

    name: str
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Attribute:
    """`q.doc`, `k.doc.start`: an attribute of a position."""

    position: str
    name: str
    facet: str | None
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Subscript:
    """`dilation[head]`, `prefix[q.doc]`: a list parameter or a table at an index."""

    name: str
    index: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a call; `name` is None where it is given by place."""

    name: str | None
    value: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Call:
    """`window(4, 0)`, `random(3, seed = 7)`."""

    name: str
    arguments: tuple[Argument, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Negative:
    """`-x`."""

    operand: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Binary:
    """`left op right` with op one of + - * // %; `-` between predicates is the difference. A bias has / and ** too."""

    op: str
    left: Expr
    right: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Comparison:
    """`a < b <= c`: operands one more than ops."""

    ops: tuple[str, ...]
    operands: tuple[Expr, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class InRange:
    """`x in start..stop`, half-open."""

    operand: Expr
    start: Expr
    stop: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class InSet:
    """`x in {a, b}`."""

    operand: Expr
    items: tuple[Expr, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Not:
    """`~p`."""

    operand: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Logic:
    """`a & b & c` or `a | b | c`, flat."""

    op: str
    terms: tuple[Expr, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class At:
    """`R at (q', k', N = n')`: R with its positions, and lengths, replaced."""

    relation: Expr
    query: Expr
    key: Expr
    lengths: tuple[Argument, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Broken:
    """An expression that did not parse; it was reported, and nothing that follows from it is."""

    place: SourceRange = _place()


Expr: TypeAlias = (
    Broken
    | Number
    | Real
    | Name
    | Attribute
    | Subscript
    | Call
    | Negative
    | Binary
    | Comparison
    | InRange
    | InSet
    | Not
    | Logic
    | At
)


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct subexpressions, left to right."""
    match expr:
        case Broken() | Number() | Real() | Name() | Attribute():
            return ()
        case Subscript(index=index):
            return (index,)
        case Call(arguments=arguments):
            return tuple(argument.value for argument in arguments)
        case Negative(operand=operand) | Not(operand=operand):
            return (operand,)
        case Binary(left=left, right=right):
            return (left, right)
        case Comparison(operands=operands):
            return operands
        case InRange(operand=operand, start=start, stop=stop):
            return (operand, start, stop)
        case InSet(operand=operand, items=items):
            return (operand, *items)
        case Logic(terms=terms):
            return terms
        case At(relation=relation, query=query, key=key, lengths=lengths):
            return (relation, query, key, *(length.value for length in lengths))
        case _:
            assert_never(expr)


def put(expr: Expr, found: Callable[[Expr], Expr | None]) -> Expr:
    """The expression with what is found for some of its parts in their place."""
    instead = found(expr)
    if instead is not None:
        return instead

    def each(exprs: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(put(part, found) for part in exprs)

    def every(arguments: tuple[Argument, ...]) -> tuple[Argument, ...]:
        return tuple(replace(argument, value=put(argument.value, found)) for argument in arguments)

    match expr:
        case Broken() | Number() | Real() | Name() | Attribute():
            return expr
        case Subscript(index=index):
            return replace(expr, index=put(index, found))
        case Call(arguments=arguments):
            return replace(expr, arguments=every(arguments))
        case Negative(operand=operand) | Not(operand=operand):
            return replace(expr, operand=put(operand, found))
        case Binary(left=left, right=right):
            return replace(expr, left=put(left, found), right=put(right, found))
        case Comparison(operands=operands):
            return replace(expr, operands=each(operands))
        case InRange(operand=operand, start=start, stop=stop):
            return replace(expr, operand=put(operand, found), start=put(start, found), stop=put(stop, found))
        case InSet(operand=operand, items=items):
            return replace(expr, operand=put(operand, found), items=each(items))
        case Logic(terms=terms):
            return replace(expr, terms=each(terms))
        case At(relation=relation, query=query, key=key, lengths=lengths):
            q, k = put(query, found), put(key, found)
            return replace(expr, relation=put(relation, found), query=q, key=k, lengths=every(lengths))
        case _:
            assert_never(expr)


@dataclass(frozen=True, slots=True)
class Definition:
    """`name(params) = body`, or `name = body`."""

    name: str
    params: tuple[str, ...]
    body: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: one integer expression, a list of them, or none if the user must give a value."""

    name: str
    default: Expr | tuple[Expr, ...] | None
    minimum: Expr | None = None
    doc: str | None = field(default=None, compare=False)
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Axis:
    """A grid axis: its size, or the axes that it is composed of (row = [tile_row, inner_row])."""

    name: str
    size: Expr | tuple[str, ...]
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor that the caller brings: `int[N]`, `bool[Nk]`, `int[8]`, `int[]` (a table of any length)."""

    name: str
    dtype: Literal["int", "bool"]
    size: Expr | None
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Label:
    """A label that a learner finds in each call: `lsh(buckets = 64)`, `given`."""

    name: str
    learner: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Selection:
    """Keys that a selector lists in each call: `topk(16, of = blocks(64), by = mean)`."""

    name: str
    selector: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class KeySource:
    """Where keys come from that are no tokens of the sequence: `memory(16)`, `pool(3, by = conv)`."""

    name: str
    maker: Expr
    place: SourceRange = _place()


OWN_KEYS = "self"
"""The source that every pattern has: the sequence's own keys."""


@dataclass(frozen=True, slots=True)
class Term:
    """What of one source is attended. source: a declared one, or `self`."""

    source: str
    attend: Expr
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Branch:
    """Terms that are normalised together. The only branch of a pattern has the name "".

    score: how a query and a key are scored, softmax of their product by default. bias: what is added to a score.
    softcap: what a score is kept below, by a tanh.
    """

    name: str
    terms: tuple[Term, ...]
    score: Expr | None = None
    bias: Expr | None = None
    softcap: Expr | None = None
    place: SourceRange = _place()


@dataclass(frozen=True, slots=True)
class Table:
    """What a layer learns for a bias to look up: `scalars(32)`, `vectors(9)`, `sinusoids`."""

    name: str
    maker: Expr
    place: SourceRange = _place()


Projection: TypeAlias = Literal["query", "key", "value"]
"""What a layer makes of a token's state by a linear map."""


@dataclass(frozen=True, slots=True)
class Role:
    """Pairs whose query, key or value is made by a projection of the role's own. at: which pairs; own: which of the
    three, in their order."""

    name: str
    at: Expr
    own: tuple[Projection, ...]
    place: SourceRange = _place()


Combine: TypeAlias = Literal["sum", "mean", "gate"]
"""How the outputs of branches become one: added, averaged, or added with weights that a layer learns."""
Merge: TypeAlias = Literal["set", "multiset", "mean"]
"""Whether a key that several terms of a union have counts once, or once for each; or each term is attended by itself,
and a query has the mean over those in which it has keys."""
Share: TypeAlias = Literal["query_key"]
"""Which projections of a layer are one."""


@dataclass(frozen=True, slots=True)
class Import:
    """Another spec under a local name, used as a definition whose parameters are keywords."""

    name: str
    spec: Spec
    place: SourceRange = _place()


ANY_NAME = "*"
"""In `Spec.broken`: a section that could not be read, and might have declared any name."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A whole spec. A bare expression is a spec with nothing but `attend`.

    branches: of a pattern with sources, branches, scores or roles; `attend` is then what its first term attends. keys:
    how many keys there are, where they are no sequence of N.
    """

    attend: Expr
    params: tuple[Param, ...] = ()
    grid: tuple[Axis, ...] = ()
    inputs: tuple[Input, ...] = ()
    labels: tuple[Label, ...] = ()
    select: tuple[Selection, ...] = ()
    imports: tuple[Import, ...] = ()
    define: tuple[Definition, ...] = ()
    merge: Merge = "set"
    fallback: Expr | None = None
    share: Share | None = None
    keys: Expr | None = None
    sources: tuple[KeySource, ...] = ()
    tables: tuple[Table, ...] = ()
    roles: tuple[Role, ...] = ()
    branches: tuple[Branch, ...] = ()
    combine: Combine = "sum"
    name: str | None = field(default=None, compare=False)
    doc: str | None = field(default=None, compare=False)
    cite: str | None = field(default=None, compare=False)
    broken: frozenset[str] = field(default=frozenset(), compare=False)  # names whose declaration was reported
    place: SourceRange = _place()
