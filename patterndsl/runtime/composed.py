"""How does a pattern with several terms run? Each term by its own program, over the keys of its source; results meet in
the merge, branch by branch, and branches are added, averaged or gated.

Keys of a source have any length that the caller gives them, so the program of a term is made when its keys are seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from patterndsl.analysis.explain_terms import Part, WholeExplanation, whole_explanation
from patterndsl.diagnostics import Diagnostic, MissingError, input_error
from patterndsl.ir.relation import inputs_read
from patterndsl.lower.choice import refusal_of_terms
from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime import ops, scored_ops
from patterndsl.runtime.arguments import as_autocast
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.joined import merged
from patterndsl.runtime.learned import Learned, check_gates, check_learned, check_names
from patterndsl.runtime.program import Program
from patterndsl.runtime.projected import Roles, check_roles, tensors_of
from patterndsl.runtime.scored import as_table, relation_of, tables_read
from patterndsl.runtime.scored_term import ScoredTerm
from patterndsl.runtime.summed import At, Features, summed
from patterndsl.sema.bind import InputShape, bind
from patterndsl.sema.parameters import MAX_SIZE, Sizes, counted
from patterndsl.source.sequence import Keys
from patterndsl.syntax.tree import OWN_KEYS

if TYPE_CHECKING:
    from patterndsl.composite import Composite
    from patterndsl.terms import Branch, Term

MAX_LENGTHS = 16
"""Programs of a term that are kept, each for one number of keys."""


class CompositeProgram:
    """A pattern with sources or branches, compiled for lengths, heads and a device."""

    def __init__(self, pattern: Composite, sizes: Sizes, options: Mapping[str, Any]) -> None:
        self.pattern, self.sizes, self.options = pattern, sizes, dict(options)
        self._programs: OrderedDict[tuple[str, int], Program] = OrderedDict()
        self._number = _living.add(self)
        for term in pattern.terms:  # what does not fit is said now
            self.program(term.name, self.usual_keys(term))
        check_terms(pattern, self.layer, str(self.options["backend"]))  # its branches are found before a graph is made

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by what it was made of, as a Program."""
        return type(self), (self.pattern, self.sizes, self.options)

    def __repr__(self) -> str:
        terms = ", ".join(term.name for term in self.pattern.terms)
        lengths = f"q_len={self.sizes.q_len}, kv_len={self.sizes.kv_len}, q_start={self.sizes.q_start}"
        return f"CompositeProgram({terms}: {lengths})"

    def __getattr__(self, name: str) -> NoReturn:
        """Says of whom to ask what a program of one relation has."""
        if name.startswith("_") or not hasattr(Program, name):
            raise AttributeError(f"a CompositeProgram has no attribute {name!r}")
        first = self.pattern.terms[0].name
        help = f"ask a term: program.program({first!r}, num_keys).{name}"
        raise MissingError(Diagnostic("E505", f"`{name}` is of one relation", None, help))

    def usual_keys(self, term: Term) -> int:
        """How many keys a term has where the caller does not say."""
        return self.sizes.kv_len if term.source == OWN_KEYS else self.pattern.num_keys(term.source, self.sizes.total)

    def term(self, name: str) -> Term:
        """The term of a name. Raises InputError (E505) where there is none."""
        named = {term.name: term for term in self.pattern.terms}
        if name not in named:
            raise input_error("E505", f"there is no term {name!r}", f"the terms are {', '.join(named)}")
        return named[name]

    def program(self, name: str, num_keys: int) -> Program:
        """The program of a term for so many keys of its source."""
        key = (name, num_keys)
        if key not in self._programs:
            self._programs[key] = self.term(name).pattern.compile(
                self.sizes.total,
                q_len=self.sizes.q_len,
                kv_len=num_keys,
                q_start=self.sizes.q_start,
                **self.options,
            )
            if len(self._programs) > MAX_LENGTHS * len(self.pattern.terms):
                self._programs.popitem(last=False)
        return self._programs[key]

    @property
    def layer(self) -> int:
        """What `layer` is in the pattern."""
        return int(self.options["layer"])

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._usual(self.pattern.terms[0]).device

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return int(self.options["heads"])

    @property
    def text(self) -> str:
        """The canonical text of the pattern."""
        return self.pattern.text

    @property
    def backend(self) -> str:
        """How the terms of this layer run, each way once: backends of plain ones, and scored or summed."""
        return ", ".join(dict.fromkeys(self._runs(term) for term in self.pattern.terms_at(self.layer)))

    def _runs(self, term: Term) -> str:
        how = self.pattern.branches[term.branch].runs
        return self._usual(term).backend if how == "planned" else how

    def _usual(self, term: Term) -> Program:
        return self.program(term.name, self.usual_keys(term))

    @property
    def inputs(self) -> tuple[InputShape, ...]:
        """What a call reads of inputs, labels and selections, in terms and in biases."""
        found = {shape.name: shape for term in self.pattern.terms for shape in self._usual(term).bound.inputs}
        for branch in self.pattern.branches.values():
            relation = relation_of(branch.bias)
            if inputs_read(relation):
                asked = replace(self.pattern.resolved, relation=relation)
                found |= {item.name: item for item in bind(asked, self.sizes, self.num_heads, self.layer).inputs}
        return tuple(found.values())

    def with_found(self, query: Tensor, own: Keys, learned: Learned, inputs: Inputs | None) -> Inputs | None:
        """The inputs with what learners and selectors of terms find; see `Program.with_found`."""
        found = dict(inputs or {})
        for term in self.pattern.terms_at(self.layer):
            key, _ = learned.keys_of(term.source, own)
            found |= self.program(term.name, key.shape[2]).with_found(query, key, term.read_of(found)) or {}
        return found or inputs

    def explain(self, *, head_dim: int = 64, train: bool = False, on_event: OnEvent | None = None) -> WholeExplanation:
        """The passes of each term, how their results meet, and what all should take; see `Program.explain`."""
        pattern, parts, head_dim = self.pattern, [], counted("head_dim", head_dim, 1, MAX_SIZE)
        for term in pattern.terms_at(self.layer):
            branch, program = pattern.branches[term.branch], self._usual(term)
            is_planned = branch.runs == "planned"
            made = program.explain(head_dim=head_dim, train=train, on_event=on_event) if is_planned else None
            features = pattern.num_features(term.branch, head_dim)
            parts.append(Part(term.name, term.branch, branch.runs, program.bound, made, features))
        constants = self._usual(pattern.terms[0]).constants
        return whole_explanation(pattern.title, parts, pattern.combine, constants, head_dim=head_dim, train=train)

    # ---- what is attended -----------------------------------------------------------------------------------

    def masks(self, inputs: Inputs | None = None, num_keys: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The mask of each term by name: bool [heads or 1, q_len, keys of its source], see `Program.mask`."""
        found = {}
        for term in self.pattern.terms:
            program = self.program(term.name, (num_keys or {}).get(term.source, self.usual_keys(term)))
            found[term.name] = program.mask(term.read_of(inputs))
        return found

    def mask(self, inputs: Inputs | None = None) -> Tensor:
        """bool [heads, q_len, keys of all sources], one source's keys after the other's, whatever role a pair has.

        Raises InputError (E505) for several branches, which have a softmax each: see `masks`.
        """
        if len(self.pattern.branches) > 1:
            raise input_error("E505", "each branch is a softmax of its own", "use masks(), one for each term")
        found: dict[str, Tensor] = {}
        for term, mask in zip(self.pattern.terms, self.masks(inputs).values(), strict=True):
            found[term.source] = found[term.source] | mask if term.source in found else mask
        masks = list(found.values())
        heads = max(mask.shape[-3] for mask in masks)
        return torch.cat([mask.expand(*mask.shape[:-3], heads, -1, -1) for mask in masks], -1)

    # ---- attention ------------------------------------------------------------------------------------------

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sources: Mapping[str, Keys] | None = None,
        gates: Mapping[str, Tensor] | None = None,
        scores: Mapping[str, Tensor] | None = None,
        tables: Mapping[str, Any] | None = None,
        roles: Roles | None = None,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool = False,
        return_labels: bool = False,
    ) -> Tensor | tuple[Any, ...]:
        """Attention over the keys of all sources, differentiable; see `Program.__call__`.

        sources: key and value of each source by name, [B, Hkv, any length, D]; `patterndsl.nn.Attention` makes them.
        gates: where branches are gated, a weight for each branch by name, [B, H, Tq] or what broadcasts to it. scores:
        of branches that synthesize, [B or 1, H, Tq, Tk], by name, "" for the only one. tables: what biases look up,
        [H, size], or [H, size, D] of vectors. roles: what each role has of its own, {"globals": {"query": tensor}}, see
        `runtime.projected`. return_labels: with the inputs of the call, labels and selections among them, as the last
        that is returned. A row without keys in a branch gets 0 from it, and -inf as its log-sum-exp. Raises InputError:
        E501 on what is missing or unknown, E502 on inputs and gates, E503 on tensors that do not fit, E505 where
        several branches, or one that knows no single scores, are asked for a log-sum-exp.
        """
        learned = Learned(sources or {}, gates or {}, scores or {}, tables or {}, roles={} if roles is None else roles)
        if return_labels:
            check_learned(self.pattern, learned)
            inputs = self.with_found(query, (key, value), learned, inputs)
        found = self.attend(query, key, value, learned, inputs=inputs, scale=scale, return_lse=return_lse)
        if not return_labels:
            return found
        return (*found, dict(inputs or {})) if isinstance(found, tuple) else (found, dict(inputs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        learned: Learned,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The same with all that a layer makes as one."""
        asked = ops.Call(self.layer)
        call = Call(self.program, self.sizes, inputs, scale, f"term:{self._number}", asked)
        return combined(self.pattern, call, query, (key, value), learned, return_lse=return_lse)


def check_terms(pattern: Composite, layer: int, backend: str) -> None:
    """Raises InputError (E505) where no term of a layer runs by the backend that was asked for."""
    runs = {pattern.branches[name].runs for name in pattern.branches_at(layer)}
    refusal = refusal_of_terms(runs, backend)
    if refusal is not None:
        raise input_error("E505", refusal.message, refusal.help)


_living: ops.Living[CompositeProgram] = ops.Living()


def _found(where: str, _query: Tensor, key: Tensor, _call: ops.Call) -> ScoredTerm:
    """What a graph asks for of a compiled program."""
    name, _, number = where.partition(":")
    program = _living.find(number)
    return ScoredTerm(program.pattern, program.term(name), program.program(name, key.shape[2]))


ops.finders["term"] = lambda *asked: _found(*asked).program
scored_ops.finders["term"] = _found


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What the terms of a call have in common. program: of a term's name and the number of its keys. home: where graphs
    find the programs. asked: what they ask for."""

    program: Callable[[str, int], Program]
    sizes: Sizes
    inputs: Inputs | None
    scale: float | None
    home: str
    asked: ops.Call

    def address(self, term: Term) -> str:
        """What graphs know a term by: the kind of address, the term, and the home of both."""
        kind, _, home = self.home.partition(":")
        return f"{kind}:{term.name}:{home}"

    def attend(self, term: Term, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Output and lse of a term by its program."""
        if torch.compiler.is_compiling():
            query, key, value = (as_autocast(x) for x in (query, *keys))
            address = self.address(term)
            return ops.traced(query, key, value, term.read_of(self.inputs), address, self.scale, want_lse=True)
        program = self.program(term.name, keys[0].shape[2])
        return program(query, *keys, inputs=term.read_of(self.inputs), scale=self.scale, return_lse=True)


def combined(
    pattern: Composite, call: Call, query: Tensor, own: Keys, learned: Learned, *, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """What all terms come to; see `CompositeProgram.__call__`. own: the sequence's own keys."""
    branches = pattern.branches
    check_learned(pattern, learned)
    check_roles(pattern, learned.roles, query, {**learned.sources, OWN_KEYS: own})
    resolved = pattern.resolved
    known = [
        *(item.name for item in resolved.inputs),
        *(item.name for item in resolved.labels),
        *(item.name for item in resolved.selections),
    ]
    check_names(pattern, "input", call.inputs or {}, known, set())
    if return_lse and (len(branches) > 1 or any(branch.is_kernel for branch in branches.values())):
        what = f"the {pattern.combine} of several softmaxes" if len(branches) > 1 else "a sum of features"
        raise input_error("E505", f"{what} has no log-sum-exp", "leave return_lse out")
    outputs: dict[str, Tensor] = {}
    for name, terms in pattern.branches_at(call.asked.layer).items():
        branch = branches[name]
        keys = [(term, learned.keys_of(term.source, own)) for term in terms]
        if branch.is_kernel:
            settings, decay = pattern.score_settings(name), pattern.decay(name, query.shape[1], call.asked.layer)
            features = Features(branch.score.name, settings, learned.directions.get(name), decay)
            before, at = learned.sums.get(name), At(call.sizes, call.asked.layer)
            outputs[name], after = summed(features, query, keys, at, call.inputs, before)
            if after is not None:
                learned.after[name] = after
            continue
        results = merged([_attended(pattern, branch, call, query, *item, learned) for item in keys])
        if return_lse:
            return results
        outputs[name] = results[0]
    if pattern.combine == "gate":
        check_gates(learned.gates, query)
        outputs = {name: out * learned.gates[name][..., None].to(out.dtype) for name, out in outputs.items()}
    if not outputs:
        return query.new_zeros((*query.shape[:3], own[1].shape[3]))
    total = torch.stack(list(outputs.values())).sum(0) if len(outputs) > 1 else next(iter(outputs.values()))
    return total / len(outputs) if pattern.combine == "mean" else total  # of the branches that have a part in the layer


def _attended(
    pattern: Composite, branch: Branch, call: Call, query: Tensor, term: Term, keys: Keys, learned: Learned
) -> tuple[Tensor, Tensor]:
    """Output and lse of a term in a branch with softmax."""
    if term.projections.name:
        call = _with_found(call, term, query, keys)
        query, keys = tensors_of(term, query, keys, learned.roles)
    if branch.runs == "planned":
        return call.attend(term, query, keys)
    kinds = {item.name: item.kind for item in pattern.resolved.tables}
    tables = {
        name: as_table(name, kinds[name], pattern.table_size(name), learned.tables[name], query)
        for name in tables_read(branch.bias)
    }
    made = learned.scores[branch.name] if branch.is_made_up else None
    query, key, value = (as_autocast(x) for x in (query, *keys))
    if torch.compiler.is_compiling():
        address = call.address(term)
        return scored_ops.traced(query, (key, value), call.inputs, tables, made, address, call.scale, call.asked)
    scored = ScoredTerm(pattern, term, call.program(term.name, key.shape[2]))
    return scored.attend(query, (key, value), call.inputs, tables, made, call.scale)


def _with_found(call: Call, term: Term, query: Tensor, keys: Keys) -> Call:
    """With what labels and selections find of the tensors that no role has: of a pair all roles say the same."""
    resolved = term.pattern.resolved
    if not resolved.labels and not resolved.selections:
        return call
    program = call.program(term.name, keys[0].shape[2])
    found = program.with_found(query, keys[0], term.read_of(call.inputs))
    return replace(call, inputs={**(call.inputs or {}), **(found or {})})
