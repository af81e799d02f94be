"""How does a pattern with several terms run? Each term by its own program, over the keys of its source; results meet in
the merge, branch by branch, and branches are added, averaged or gated.

Keys of a source have any length that the caller gives them, so the program of a term is made when its keys are seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error, nearest
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.parts import merged
from patterndsl.runtime.program import Program
from patterndsl.sema.parameters import Sizes
from patterndsl.syntax.tree import OWN_KEYS

if TYPE_CHECKING:
    from patterndsl.composite import Composite, Term

Keys: TypeAlias = tuple[Tensor, Tensor]
"""Key [B, Hkv, T, D] and value [B, Hkv, T, Dv] of a source."""
MAX_LENGTHS = 16
"""Programs of a term that are kept, each for one number of keys."""


class CompositeProgram:
    """A pattern with sources or branches, compiled for lengths, heads and a device."""

    def __init__(self, pattern: Composite, sizes: Sizes, options: Mapping[str, Any]) -> None:
        self.pattern, self.sizes, self.options = pattern, sizes, dict(options)
        self._programs: OrderedDict[tuple[str, int], Program] = OrderedDict()
        for term in pattern.terms:  # what does not fit is said now
            self.program(term.name, self.usual_keys(term))

    def __repr__(self) -> str:
        terms = ", ".join(term.name for term in self.pattern.terms)
        lengths = f"q_len={self.sizes.q_len}, kv_len={self.sizes.kv_len}, q_start={self.sizes.q_start}"
        return f"CompositeProgram({terms}: {lengths})"

    def usual_keys(self, term: Term) -> int:
        """How many keys a term has where the caller does not say."""
        return self.sizes.kv_len if term.source == OWN_KEYS else self.pattern.num_keys(term.source, self.sizes.total)

    def program(self, name: str, num_keys: int) -> Program:
        """The program of a term for so many keys of its source."""
        key = (name, num_keys)
        if key not in self._programs:
            term = next(term for term in self.pattern.terms if term.name == name)
            self._programs[key] = term.pattern.compile(
                self.sizes.total,
                q_len=self.sizes.q_len,
                kv_len=num_keys,
                q_start=self.sizes.q_start,
                **self.options,
            )
            if len(self._programs) > MAX_LENGTHS * len(self.pattern.terms):
                self._programs.popitem(last=False)
        return self._programs[key]

    # ---- what is attended -----------------------------------------------------------------------------------

    def masks(self, inputs: Inputs | None = None, num_keys: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """The mask of each term by name: bool [heads or 1, q_len, keys of its source], see `Program.mask`."""
        found = {}
        for term in self.pattern.terms:
            program = self.program(term.name, (num_keys or {}).get(term.source, self.usual_keys(term)))
            read = None if inputs is None else {name: x for name, x in inputs.items() if name in term.reads}
            found[term.name] = program.mask(read)
        return found

    def mask(self, inputs: Inputs | None = None) -> Tensor:
        """bool [heads, q_len, keys of all terms], one term's keys after the other's.

        Raises InputError (E505) for several branches, which have a softmax each: see `masks`.
        """
        if len(self.pattern.branches) > 1:
            raise input_error("E505", "each branch is a softmax of its own", "use masks(), one for each term")
        masks = list(self.masks(inputs).values())
        heads = max(mask.shape[-3] for mask in masks)
        return torch.cat([mask.expand(*mask.shape[:-3], heads, -1, -1) for mask in masks], -1)

    # ---- attention ------------------------------------------------------------------------------------------

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sources: Mapping[str, Keys] | None = None,
        gates: Mapping[str, Tensor] | None = None,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sources: Mapping[str, Keys] | None = None,
        gates: Mapping[str, Tensor] | None = None,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]: ...

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sources: Mapping[str, Keys] | None = None,
        gates: Mapping[str, Tensor] | None = None,
        inputs: Inputs | None = None,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the keys of all sources, differentiable; see `Program.__call__`.

        sources: key and value of each source by name, [B, Hkv, any length, D]; `patterndsl.nn.Attention` makes them.
        gates: where branches are gated, a weight for each branch by name, [B, H, Tq] or what broadcasts to it. A row
        without keys in a branch gets 0 from it, and -inf as its log-sum-exp. Raises InputError: E501 on sources and
        gates that are missing or unknown, E505 where several branches are asked for a log-sum-exp.
        """

        def attend(term: Term, keys: Keys) -> tuple[Tensor, Tensor]:
            program = self.program(term.name, keys[0].shape[2])
            read = None if inputs is None else {name: x for name, x in inputs.items() if name in term.reads}
            return program(query, *keys, inputs=read, scale=scale, return_lse=True)

        return combined(self.pattern, attend, (key, value), sources or {}, gates, return_lse=return_lse)


Attend: TypeAlias = Callable[["Term", Keys], tuple[Tensor, Tensor]]
"""Output and lse of a term over the keys of its source."""


def combined(
    pattern: Composite,
    attend: Attend,
    own: Keys,
    sources: Mapping[str, Keys],
    gates: Mapping[str, Tensor] | None,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """What all terms come to; see `CompositeProgram.__call__`. own: the sequence's own keys."""
    is_gated = pattern.combine == "gate"
    declared = [item.name for item in pattern.resolved.sources]
    _check(pattern, "source", sources, declared, {term.source for term in pattern.terms} - {OWN_KEYS})
    branches = list(pattern.branches) if is_gated else []
    _check(pattern, "gate", gates or {}, branches, set(branches))
    if return_lse and len(pattern.branches) > 1:
        message = f"the {pattern.combine} of several softmaxes has no log-sum-exp"
        raise input_error("E505", message, "leave return_lse out, or ask each branch")
    results = {
        branch: merged([attend(term, own if term.source == OWN_KEYS else sources[term.source]) for term in terms])
        for branch, terms in pattern.branches.items()
    }
    if return_lse:
        return next(iter(results.values()))
    outputs = {branch: out for branch, (out, _) in results.items()}
    if is_gated:
        assert gates is not None
        outputs = {branch: out * gates[branch][..., None].to(out.dtype) for branch, out in outputs.items()}
    total = torch.stack(list(outputs.values())).sum(0) if len(outputs) > 1 else next(iter(outputs.values()))
    return total / len(outputs) if pattern.combine == "mean" else total


def _check(pattern: Composite, what: str, given: Mapping[str, object], known: Sequence[str], wanted: set[str]) -> None:
    """Raises InputError (E501) where names are missing or unknown."""
    for name in given:
        if name not in known:
            near = nearest(name, known)
            help = f"did you mean `{near}`?" if near else f"it takes {', '.join(known) or 'none'}"
            raise input_error("E501", f"the pattern has no {what} `{name}`", help)
    for name in sorted(wanted - given.keys()):
        if what == "gate":
            raise input_error("E501", f"gate `{name}` is missing", "give gates={name: [B, H, Tq], ...}")
        declared = next(item for item in pattern.resolved.sources if item.name == name)
        help = f"give sources={{{name!r}: (key, value)}}, or use patterndsl.nn.Attention, which makes them"
        if declared.kind in ("recall", "compress"):
            help = f"give what is recalled as sources={{{name!r}: (key, value)}}, of length 0 at first"
        raise input_error("E501", f"source `{name}`, made by {declared.kind}, is missing", help)
