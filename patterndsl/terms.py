"""What are the terms of a pattern that has several? Each is a pattern of its own, with the source of its keys and the
branch whose scores it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal

from patterndsl.ir.index import Const, Index, K, Q
from patterndsl.ir.real import Real
from patterndsl.ir.relation import (
    EVERYTHING,
    And,
    Relation,
    compare,
    conjunction,
    depends_on,
    inputs_read,
    substitute,
)
from patterndsl.pattern import Pattern
from patterndsl.sema.model import Resolved, ScoreDeclaration
from patterndsl.sema.parameters import param_values, put_size, sizes_of
from patterndsl.sema.roles import Projections
from patterndsl.sema.scores import SCORES
from patterndsl.syntax import tree as ast

if TYPE_CHECKING:
    import torch


OPERATIONS = 100_000
"""Of isl, to find out whether a term is all pairs or all up to the query, where its form does not say so."""


@dataclass(frozen=True, slots=True)
class Summable:
    """How keys can be summed: all that are kept, or those up to the query. kept: a condition on keys alone."""

    reach: Literal["all", "causal"]
    kept: Relation


def _is_of_queries(relation: Relation) -> bool:
    return any(depends_on(relation, symbol) for symbol in ("q", "head"))


@dataclass(frozen=True, eq=False, repr=False)
class Term:
    """What of one source is attended in one branch. pattern: of the same queries and the numbers of the source's keys.
    projections: the roles that its query, keys and values are projected by.

    seen: which of these keys depend on nothing after the query; None where a key is its own position. position: where
    key number k stands.
    """

    branch: str
    source: str
    pattern: Pattern
    seen: Resolved | None
    position: Index = K
    projections: Projections = Projections()
    _known: dict[int, bool] = field(default_factory=dict, init=False)
    """In which layers it was found to take part: a table, which torch.compile reads as it does no cache."""

    @cached_property
    def reads(self) -> frozenset[str]:
        """The inputs, labels and selections that it reads."""
        return inputs_read(self.pattern.resolved.relation)

    def read_of(self, inputs: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """Those of a call's inputs that it reads."""
        return None if inputs is None else {name: values for name, values in inputs.items() if name in self.reads}

    @cached_property
    def summable(self) -> Summable | None:
        """How its keys can be summed, None where they cannot: each query has all of some keys, or all up to itself."""
        from patterndsl.analysis.proof import proven

        conditions = _conditions(self.pattern.resolved)
        of_keys = tuple(item for item in conditions if not _is_of_queries(item))
        rest = conjunction(item for item in conditions if _is_of_queries(item))
        kept = conjunction(of_keys)
        if rest == EVERYTHING:
            return Summable("all", kept)
        causal = compare("<=", K, Q)
        if self.source == ast.OWN_KEYS and rest == causal:
            return Summable("causal", kept)
        alone = replace(self.pattern.resolved, relation=rest, fallback=None)
        if proven("within", replace(alone, relation=EVERYTHING), alone, operations=OPERATIONS) is not None:
            return Summable("all", kept)
        sides = (alone, replace(alone, relation=causal))
        is_causal = self.source == ast.OWN_KEYS and proven("equals", *sides, operations=OPERATIONS) is not None
        return Summable("causal", kept) if is_causal else None

    def takes_part(self, layer: int) -> bool:
        """Whether it has pairs in a layer, as far as conditions on the layer alone say so."""
        if layer not in self._known:
            self._known[layer] = _takes_part(self, layer)
        return self._known[layer]

    @property
    def in_its_layers(self) -> Resolved:
        """What it means in layers in which it takes part: without the conditions that say in which."""
        rest = (item for item in _conditions(self.pattern.resolved) if not _is_of_layers_alone(item))
        return replace(self.pattern.resolved, relation=conjunction(rest))

    @property
    def name(self) -> str:
        """What reports call it: `source`, with the branch before it and roles behind, where there are some."""
        return ".".join(filter(None, (self.branch, self.source, self.projections.name)))

    def __repr__(self) -> str:
        return f"Term({self.name!r}, {self.pattern.text!r})"


def _takes_part(term: Term, layer: int) -> bool:
    resolved = term.pattern.resolved
    of_layers = [item for item in _conditions(resolved) if _is_of_layers_alone(item)]
    if not of_layers:
        return True
    sizes = sizes_of(1, None, None, 0)
    values = param_values(resolved, {}, sizes)
    lists: dict[str, tuple[Index, ...]] = {
        name: tuple(map(Const, value)) for name, value in values.items() if isinstance(value, tuple)
    }
    put = partial(put_size, sizes=sizes, values=values, layer=layer)
    return all(substitute(item, put, lists) == EVERYTHING for item in of_layers)


def _conditions(resolved: Resolved) -> tuple[Relation, ...]:
    return resolved.relation.terms if isinstance(resolved.relation, And) else (resolved.relation,)


def _is_of_layers_alone(relation: Relation) -> bool:
    others = any(depends_on(relation, symbol) for symbol in ("q", "k", "head", "Nq", "Nk"))
    return depends_on(relation, "layer") and not others and not inputs_read(relation)


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """Terms that are normalised together, and how they score: see `syntax.tree.Branch`."""

    name: str
    terms: tuple[Term, ...]
    score: ScoreDeclaration
    bias: Real | None
    softcap: float | None

    @property
    def is_kernel(self) -> bool:
        """Whether features are summed, and no pair is looked at."""
        return SCORES[self.score.name].kind == "kernel"

    def terms_at(self, layer: int) -> tuple[Term, ...]:
        """The terms that take part in a layer."""
        return tuple(term for term in self.terms if term.takes_part(layer))

    @property
    def is_made_up(self) -> bool:
        """Whether scores are no products of query and key."""
        return SCORES[self.score.name].kind == "synthesized"

    @property
    def runs(self) -> Literal["planned", "scored", "summed"]:
        """How terms run: as any pattern; block by block, with something between product and softmax; as sums."""
        if self.is_kernel:
            return "summed"
        is_plain = self.bias is None and self.softcap is None and not self.is_made_up
        return "planned" if is_plain else "scored"
