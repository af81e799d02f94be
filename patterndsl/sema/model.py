"""What does a checked spec mean? The relation, symbolic in N and the parameters, and what it needs to be bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal, TypeAlias

from patterndsl.diagnostics import SourceRange
from patterndsl.ir.index import Index
from patterndsl.ir.real import Real
from patterndsl.ir.relation import Relation
from patterndsl.sema.scores import Maker
from patterndsl.sema.selectors import By, Sharing
from patterndsl.syntax.tree import Merge, Projection, Share

Side: TypeAlias = Literal["both", "query", "key", "table"]
"""Which positions an input has a value for; a table has none, it is indexed by integers."""


@dataclass(frozen=True, slots=True)
class InputDeclaration:
    """A tensor that the caller brings. `length` is None for a table of any length."""

    name: str
    dtype: Literal["int", "bool"]
    side: Side
    length: Index | None
    place: SourceRange


@dataclass(frozen=True, slots=True)
class LabelDeclaration:
    """A label of each position and head, and how it is found. The relation reads it as an input of that name.

    learner: a key of `sema.learners.LEARNERS`; settings: all of its settings, symbolic in N and the parameters.
    """

    name: str
    learner: str
    settings: tuple[tuple[str, Index], ...]
    place: SourceRange


@dataclass(frozen=True, slots=True)
class SelectionDeclaration:
    """Keys that are listed in each call: in row q // per, up to `width` of the blocks k // of.

    selector: a key of `sema.selectors.SELECTORS`. The relation asks an input of that name. among, always: candidates,
    and those that are taken first, between numbers of blocks. label: whose centroids have members, each a row.
    """

    name: str
    selector: str
    width: Index
    of: Index
    per: Index
    by: By
    among: Relation
    always: Relation
    heads: Sharing
    label: str | None
    place: SourceRange


@dataclass(frozen=True, slots=True)
class SourceDeclaration:
    """Where keys come from. kind: a key of `sema.sources.SOURCES`; settings: all of its settings, numbers symbolic in N
    and the parameters, words and names of sources as they are."""

    name: str
    kind: str
    settings: tuple[tuple[str, Index | Decimal | str], ...]
    place: SourceRange


@dataclass(frozen=True, slots=True)
class ScoreDeclaration:
    """How a branch scores. name: a key of `sema.scores.SCORES`; settings: all that it has. makers: of a synthesizer,
    who makes scores up. decay: of a kernel, the factor of a weight for each token between query and key."""

    name: str
    settings: tuple[tuple[str, Index | Decimal | str], ...] = ()
    makers: tuple[Maker, ...] = ()
    decay: Real | None = None
    place: SourceRange | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TableDeclaration:
    """What a layer learns for a bias to look up. kind: a key of `sema.scores.TABLES`; size: how many entries it has,
    None for sinusoids, which have one for each distance."""

    name: str
    kind: str
    size: Index | None
    place: SourceRange


@dataclass(frozen=True, slots=True)
class RoleDeclaration:
    """Pairs with projections of their own. own: which."""

    name: str
    own: tuple[Projection, ...]
    place: SourceRange


@dataclass(frozen=True, slots=True)
class ParamDeclaration:
    """A parameter: one value, a list of values, or None where the user must give it."""

    name: str
    default: Index | tuple[Index, ...] | None
    minimum: Index | None
    doc: str | None
    place: SourceRange


@dataclass(frozen=True, slots=True)
class Requirement:
    """value >= least for every head, or value == least for a grid, whose `least` is N; checked when sizes are bound.

    A value that is a list is written by the list's name.
    """

    kind: Literal["minimum", "grid"]
    label: str
    value: Index | str
    least: Index
    place: SourceRange


@dataclass(frozen=True, slots=True)
class Resolved:
    """A spec with every name looked up and every kind checked. num_keys: where they are not as many as the caller
    gives, N in a self-attention."""

    relation: Relation
    params: tuple[ParamDeclaration, ...]
    inputs: tuple[InputDeclaration, ...]
    requirements: tuple[Requirement, ...]
    labels: tuple[LabelDeclaration, ...] = ()
    merge: Merge = "set"
    fallback: Relation | None = None
    share: Share | None = None
    selections: tuple[SelectionDeclaration, ...] = ()
    sources: tuple[SourceDeclaration, ...] = ()
    tables: tuple[TableDeclaration, ...] = ()
    num_keys: Index | None = None
    roles: tuple[RoleDeclaration, ...] = ()
