"""What is said of a claim? Proven, Refuted with a witness, or Unknown with the reason; never a truth value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NoReturn, TypeAlias

from patterndsl.analysis.latex import Shown


@dataclass(frozen=True, slots=True)
class Witness:
    """Where a claim fails: sizes, parameters and the pair; k is None where a whole row is meant.

    changed: the labels with which the query does not attend the key, though no token up to its own is another one.
    """

    n: int
    params: Mapping[str, int]
    head: int
    layer: int
    q: int
    k: int | None
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    changed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """For JSON; `changed` only where there is something."""
        place = {"n": self.n, "params": dict(self.params), "head": self.head, "layer": self.layer}
        changed = {"changed": dict(self.changed)} if self.changed else {}
        return {**place, "q": self.q, "k": self.k, "inputs": dict(self.inputs), **changed}

    def __str__(self) -> str:
        sizes = [f"N = {self.n:,}", *(f"{name} = {value}" for name, value in self.params.items())]
        sizes += [f"head = {self.head}"] * bool(self.head) + [f"layer = {self.layer}"] * bool(self.layer)
        sizes += [_assigned(name, values) for name, values in self.inputs.items() if name not in self.changed]
        if self.changed:
            first = ", ".join(_assigned(name, self.inputs[name]) for name in self.changed)
            second = ", ".join(_assigned(name, values) for name, values in self.changed.items())
            return f"q = {self.q} attends key {self.k} with {first}, and not with {second}, at {', '.join(sizes)}"
        where = f"q = {self.q}" if self.k is None else f"q = {self.q}, k = {self.k}"
        return f"{where} at {', '.join(sizes)}"


MAX_LISTED = 40
"""Values of an input that are written one by one; more as the command line takes them, value*count."""


def _assigned(name: str, values: Sequence[int]) -> str:
    if len(values) <= MAX_LISTED:
        return f"{name} = {list(values)}"
    runs = ((value, len(list(run))) for value, run in groupby(values))
    return f"{name} = " + ",".join(f"{value}*{count}" if count > 1 else f"{value}" for value, count in runs)


class _Verdict(Shown):
    """There are three: that one is there says nothing."""

    __slots__ = ()

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a verdict is Proven, Refuted or Unknown, not true or false: {self}; ask isinstance(…, Proven)"
        )


@dataclass(frozen=True, slots=True)
class Proven(_Verdict):
    """The claim holds; `scope` says for which sizes and parameters."""

    claim: str
    scope: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"claim": self.claim, "scope": self.scope}

    def __str__(self) -> str:
        return f"Proven: {self.claim}, {self.scope}"


@dataclass(frozen=True, slots=True)
class Refuted(_Verdict):
    """The claim fails, at the smallest sizes that were found; `why` says what the witness does."""

    claim: str
    witness: Witness
    why: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"claim": self.claim, "why": self.why, "witness": self.witness.to_dict()}

    def __str__(self) -> str:
        return f"Refuted: {self.claim}; {self.why}: {self.witness}"


@dataclass(frozen=True, slots=True)
class Unknown(_Verdict):
    """Neither a proof nor a counterexample; `reason` says what stands in the way."""

    claim: str
    reason: str

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"claim": self.claim, "reason": self.reason}

    def __str__(self) -> str:
        return f"Unknown: {self.claim}; {self.reason}"


Verdict: TypeAlias = Proven | Refuted | Unknown
