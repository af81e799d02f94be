"""What is a pattern? A set of pairs (q, k): a predicate built of comparisons between index expressions.

Each node's docstring is its set. The smart constructors fold what is constant and flatten what nests; every
other judgement about a relation is made elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

from patterndsl.diagnostics import SourceRange
from patterndsl.ir.index import (
    Arithmetic,
    Const,
    Function,
    Index,
    Param,
    Read,
    Select,
    Symbol,
    Var,
    arithmetic,
    function,
    operands,
    select,
)

CompareOp: TypeAlias = Literal["<", "<=", "==", "!="]


@dataclass(frozen=True, slots=True)
class Everything:
    """{(q, k)}: all pairs."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """{}: no pair."""


@dataclass(frozen=True, slots=True)
class Compare:
    """{(q, k) : left op right}."""

    op: CompareOp
    left: Index
    right: Index


@dataclass(frozen=True, slots=True)
class Holds:
    """{(q, k) : the truth value read is true}."""

    read: Read


@dataclass(frozen=True, slots=True)
class And:
    """The intersection of the terms."""

    terms: tuple[Relation, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """The union of the terms."""

    terms: tuple[Relation, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The complement of the term."""

    term: Relation


@dataclass(frozen=True, slots=True)
class Random:
    """{(q, k) : k' among `count` distinct keys drawn for q' from [0, num_k) outside `avoid`}.

    q', k', num_q and num_k are functions of the outer positions and lengths. `count`, `seed` and `avoid` live in
    the drawn frame: there q and k are q' and k', and the lengths are num_q and num_k.
    """

    count: Index
    seed: Index
    avoid: Relation
    q: Index
    k: Index
    num_q: Index
    num_k: Index
    place: SourceRange | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Listed:
    """{(q, k) : `key` is listed in row `row` of a table}: among its `width` values from index row * width on.

    Row and key are functions of the positions. The table is an input, read value by value; -1 lists nothing.
    """

    name: str
    width: Index
    row: Index
    key: Index


Relation: TypeAlias = Everything | Nothing | Compare | Holds | And | Or | Not | Random | Listed

EVERYTHING, NOTHING = Everything(), Nothing()

_COMPARE: dict[CompareOp, Callable[[int, int], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


def compare(op: CompareOp, left: Index, right: Index) -> Relation:
    """left op right; decided at once where both sides are constant or the same."""
    if isinstance(left, Const) and isinstance(right, Const):
        return EVERYTHING if _COMPARE[op](left.value, right.value) else NOTHING
    if left == right:
        return EVERYTHING if op in ("<=", "==") else NOTHING
    return Compare(op, left, right)


def conjunction(terms: Iterable[Relation]) -> Relation:
    """A & all = A, A & none = none, A & A = A; nested conjunctions are flattened."""
    flat: dict[Relation, None] = {}
    for term in terms:
        if isinstance(term, Nothing):
            return NOTHING
        if not isinstance(term, Everything):
            flat.update(dict.fromkeys(term.terms if isinstance(term, And) else (term,)))
    if not flat:
        return EVERYTHING
    return And(tuple(flat)) if len(flat) > 1 else next(iter(flat))


def disjunction(terms: Iterable[Relation]) -> Relation:
    """A | none = A, A | all = all, A | A = A; nested disjunctions are flattened."""
    flat: dict[Relation, None] = {}
    for term in terms:
        if isinstance(term, Everything):
            return EVERYTHING
        if not isinstance(term, Nothing):
            flat.update(dict.fromkeys(term.terms if isinstance(term, Or) else (term,)))
    if not flat:
        return NOTHING
    return Or(tuple(flat)) if len(flat) > 1 else next(iter(flat))


def negation(term: Relation) -> Relation:
    """~~A = A, ~all = none; a comparison is turned round."""
    match term:
        case Everything():
            return NOTHING
        case Nothing():
            return EVERYTHING
        case Not(term=inner):
            return inner
        case Compare("<", left, right):
            return Compare("<=", right, left)
        case Compare("<=", left, right):
            return Compare("<", right, left)
        case Compare("==", left, right):
            return Compare("!=", left, right)
        case Compare("!=", left, right):
            return Compare("==", left, right)
        case _:
            return Not(term)


def children(relation: Relation) -> tuple[Relation, ...]:
    """The direct subrelations that share the relation's positions; `avoid` of a Random has its own."""
    match relation:
        case And(terms=terms) | Or(terms=terms):
            return terms
        case Not(term=term):
            return (term,)
        case Everything() | Nothing() | Compare() | Holds() | Random() | Listed():
            return ()
        case _:
            assert_never(relation)


def direct_indices(relation: Relation) -> tuple[Index, ...]:
    """The index expressions of the node itself, in its own positions."""
    match relation:
        case Compare(left=left, right=right):
            return (left, right)
        case Holds(read=read):
            return (read,)
        case Random(q=q, k=k, num_q=num_q, num_k=num_k):
            return (q, k, num_q, num_k)
        case Listed(row=row, key=key):
            return (row, key)
        case Everything() | Nothing() | And() | Or() | Not():
            return ()
        case _:
            assert_never(relation)


def indices(relation: Relation) -> Iterator[Index]:
    """Every index expression in the relation and their subexpressions, those of drawn frames included."""
    for index in direct_indices(relation):
        yield from subexpressions(index)
    for child in children(relation):
        yield from indices(child)
    if isinstance(relation, Listed):
        yield from subexpressions(relation.width)
    if isinstance(relation, Random):
        yield from subexpressions(relation.count)
        yield from subexpressions(relation.seed)
        yield from indices(relation.avoid)


def subexpressions(index: Index) -> Iterator[Index]:
    """The expression and everything inside it."""
    pending = [index]
    while pending:
        found = pending.pop()
        yield found
        pending += reversed(operands(found))


def depends_on(relation: Relation, symbol: Symbol) -> bool:
    """Whether the symbol occurs in the relation."""
    return Var(symbol) in indices(relation)


def inputs_read(relation: Relation) -> frozenset[str]:
    """The names of the inputs that the relation reads, tables of lists among them."""
    read = (index.name for index in indices(relation) if isinstance(index, Read))
    return frozenset((*read, *(node.name for node in lists_in(relation))))


def atoms(relation: Relation) -> Iterator[Relation]:
    """What intersections, unions and complements make the relation of, each as often as it stands there."""
    parts = children(relation)
    if not parts:
        yield relation
    for part in parts:
        yield from atoms(part)


def draws_in(relation: Relation) -> Iterator[Random]:
    """The draws that the relation is made of, not those that they avoid."""
    return (atom for atom in atoms(relation) if isinstance(atom, Random))


def lists_in(relation: Relation) -> Iterator[Listed]:
    """The lists that the relation asks."""
    return (atom for atom in atoms(relation) if isinstance(atom, Listed))


def looks_nothing_up(relation: Relation) -> bool:
    """Whether it neither draws nor asks lists: arithmetic of positions and of single values tells of it."""
    return not any(isinstance(atom, Random | Listed) for atom in atoms(relation))


Replacement: TypeAlias = Callable[[Var | Param], Index]
"""What to put for a variable or parameter; returning it unchanged keeps it."""
Lists: TypeAlias = dict[str, tuple[Index, ...]]
"""The items of list parameters."""
Names: TypeAlias = Mapping[str, str]
"""Other names of inputs."""


Known: TypeAlias = Callable[[Relation], Relation | None]
"""What is said of an atom instead; None where nothing is known of it."""


def relation_in_words_of(relation: Relation, known: Known) -> Relation | None:
    """The relation with what `known` says in the place of its atoms; None where it says nothing of one."""
    if any(known(atom) is None for atom in atoms(relation)):
        return None
    return widened(relation, known)


def widened(relation: Relation, known: Known) -> Relation:
    """A relation that holds wherever this one does: atoms of which nothing is known are taken for true, under a
    complement for false. A & B is within A."""
    return _bound(relation, known, EVERYTHING)


def narrowed(relation: Relation, known: Known) -> Relation:
    """A relation that holds only where this one does. A is within A | B."""
    return _bound(relation, known, NOTHING)


def _bound(relation: Relation, known: Known, otherwise: Everything | Nothing) -> Relation:
    match relation:
        case And(terms):
            return conjunction(_bound(term, known, otherwise) for term in terms)
        case Or(terms):
            return disjunction(_bound(term, known, otherwise) for term in terms)
        case Not(term):
            return negation(_bound(term, known, NOTHING if otherwise == EVERYTHING else EVERYTHING))
        case Everything() | Nothing() | Compare() | Holds() | Random() | Listed():
            said = known(relation)
            return otherwise if said is None else said
        case _:
            assert_never(relation)


def with_lists(relation: Relation, change: Callable[[Listed], Listed]) -> Relation:
    """The relation with other lists."""
    return widened(relation, lambda atom: change(atom) if isinstance(atom, Listed) else atom)


def renamed(relation: Relation, name: str, other: str) -> Relation:
    """The relation that reads another input wherever it read the one of this name."""
    return substitute(relation, lambda symbol: symbol, None, {name: other})


def substitute_index(index: Index, put: Replacement, lists: Lists | None = None, names: Names | None = None) -> Index:
    """The expression with variables, parameters and list parameters replaced, and constants folded again."""
    match index:
        case Const():
            return index
        case Var() | Param():
            return put(index)
        case Arithmetic(op, left, right, place):
            return arithmetic(
                op, substitute_index(left, put, lists, names), substitute_index(right, put, lists, names), place
            )
        case Function(name, arguments, place):
            return function(name, tuple(substitute_index(item, put, lists, names) for item in arguments), place)
        case Select(items, at, place):
            if isinstance(items, str):
                values: str | tuple[Index, ...] = (lists or {}).get(items, items)
            else:
                values = tuple(substitute_index(item, put, lists, names) for item in items)
            return select(values, substitute_index(at, put, lists, names), place)
        case Read(name, facet, at):
            return Read((names or {}).get(name, name), facet, substitute_index(at, put, lists, names))
        case _:
            assert_never(index)


def substitute(
    relation: Relation, put: Replacement, lists: Lists | None = None, names: Names | None = None
) -> Relation:
    """The relation with variables and parameters replaced, and inputs read by other names. In a `Random` the drawn
    frame binds q, k and the lengths: `avoid`, `count` and `seed` see only head, layer and parameters replaced, and the
    lengths once num_q and num_k are constant."""

    def index(expression: Index) -> Index:
        return substitute_index(expression, put, lists, names)

    match relation:
        case Everything() | Nothing():
            return relation
        case Compare(op, left, right):
            return compare(op, index(left), index(right))
        case Holds(read):
            return Holds(Read((names or {}).get(read.name, read.name), read.facet, index(read.index)))
        case And(terms):
            return conjunction(substitute(term, put, lists, names) for term in terms)
        case Or(terms):
            return disjunction(substitute(term, put, lists, names) for term in terms)
        case Not(term):
            return negation(substitute(term, put, lists, names))
        case Listed(name, width, row, key):
            return Listed((names or {}).get(name, name), index(width), index(row), index(key))
        case Random():
            num_q, num_k = index(relation.num_q), index(relation.num_k)

            def put_in_frame(symbol: Var | Param) -> Index:
                if symbol == Var("Nq"):
                    return num_q if isinstance(num_q, Const) else symbol
                if symbol == Var("Nk"):
                    return num_k if isinstance(num_k, Const) else symbol
                return symbol if symbol in (Var("q"), Var("k")) else put(symbol)

            return Random(
                substitute_index(relation.count, put_in_frame, lists),
                substitute_index(relation.seed, put_in_frame, lists),
                substitute(relation.avoid, put_in_frame, lists),
                index(relation.q),
                index(relation.k),
                num_q,
                num_k,
                relation.place,
            )
        case _:
            assert_never(relation)


def at_head(relation: Relation, head: int) -> Relation:
    """The relation with the head put in."""
    number = Const(head)
    return substitute(relation, lambda symbol: number if symbol == Var("head") else symbol)
