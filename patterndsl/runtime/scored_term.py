"""How does a term run whose scores are more than products? As what its branch says of scores, over the tiles of its
program, with everything that a caller gives checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.ir.real import Real
from patterndsl.ir.relation import inputs_read
from patterndsl.runtime.arguments import check_tensors, checked_scale
from patterndsl.runtime.data import Inputs, checked_inputs
from patterndsl.runtime.function import without_autocast
from patterndsl.runtime.groups import groups_of_heads
from patterndsl.runtime.heads import has_heads
from patterndsl.runtime.program import Program
from patterndsl.runtime.scored import Scoring, Table, relation_of, scored_attention
from patterndsl.sema.biases import bound_bias
from patterndsl.sema.bind import bind
from patterndsl.source.sequence import Keys

if TYPE_CHECKING:
    from patterndsl.composite import Composite
    from patterndsl.terms import Branch, Term


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTerm:
    """A term with its program for the sizes of a call."""

    pattern: Composite
    term: Term
    program: Program

    @property
    def branch(self) -> Branch:
        return self.pattern.branches[self.term.branch]

    def attend(
        self,
        query: Tensor,
        keys: Keys,
        inputs: Inputs | None,
        tables: Mapping[str, Table],
        made: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse, differentiable; see `scored_attention`. inputs: of the call, among them those of other terms.
        tables, made: what the branch needs, by `Scoring`."""
        bound, branch = self.program.bound, self.branch
        check_tensors(query, *keys, bound, self.program.device)
        _check_made(branch.name, made, query, keys[0])
        found = self.program.with_found(query, keys[0], self.term.read_of(inputs))
        given = checked_inputs(bound, found, self.program.device, query.shape[0])
        assert bound.is_plain, "a multiset or a fallback beside scores, which the checks refuse"
        scoring = self.scoring(tables, made)
        looked_up = self.read_by_bias(scoring.bias, inputs, query, keys[0])
        scale = checked_scale(scale, query.shape[-1])
        by_head = has_heads(given)
        groups = tuple(groups_of_heads(bound, given, query.device)) if by_head else self.program.tilings.groups(given)
        with without_autocast(query.device.type):
            return scored_attention(query, *keys, groups, bound, looked_up, scoring, scale=scale)

    def scoring(self, tables: Mapping[str, Table], made: Tensor | None) -> Scoring:
        """What scores of its pairs are beside products."""
        branch, bound = self.branch, self.program.bound
        bias = branch.bias
        if bias is not None:
            bias = bound_bias(bias, self.pattern.resolved, self.term.position, bound.sizes, bound.layer)
        return Scoring(bias, branch.softcap, tables, made)

    def read_by_bias(self, bias: Real | None, inputs: Inputs | None, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        """The inputs that a bias reads, checked; labels that are not among them are found from the keys. Raises
        InputError (E501, E502)."""
        relation, bound = relation_of(bias), self.program.bound
        if not inputs_read(relation):
            return {}
        asked = bind(replace(self.pattern.resolved, relation=relation), bound.sizes, bound.num_heads, bound.layer)
        given = {shape.name: inputs[shape.name] for shape in asked.inputs if inputs and shape.name in inputs}
        found = Program(asked, self.program.text, query.device).with_found(query, key, given)
        return checked_inputs(asked, found, query.device, query.shape[0])


def _check_made(name: str, made: object, query: Tensor, key: Tensor) -> None:
    """Raises InputError (E502) on made scores that are not one for each pair."""
    if made is None:
        return
    of = f" of branch `{name}`" if name else ""
    help = f"give a floating-point tensor {[query.shape[0], *query.shape[1:3], key.shape[2]]} on {query.device}"
    help += ", or one row for the whole batch"
    if not isinstance(made, Tensor):
        raise input_error("E502", f"the made scores{of} are {type(made).__name__}", help)
    fits = made.dim() == 4 and made.shape[0] in (1, query.shape[0])
    fits = fits and tuple(made.shape[1:]) == (*query.shape[1:3], key.shape[2])
    if not fits or not made.is_floating_point() or made.device != query.device:
        raise input_error("E502", f"the made scores{of} are {list(made.shape)}, {made.dtype} on {made.device}", help)
