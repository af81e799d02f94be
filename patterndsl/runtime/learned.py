"""What does a call have beside query, key and value of the sequence? What layers make for its pattern, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor

from patterndsl.diagnostics import input_error, nearest
from patterndsl.runtime.projected import Roles
from patterndsl.runtime.scored import Table, table_of, tables_read
from patterndsl.score.state import State
from patterndsl.source.sequence import Keys
from patterndsl.syntax.tree import OWN_KEYS

if TYPE_CHECKING:
    from patterndsl.composite import Composite

Path: TypeAlias = tuple[str, ...]
"""What a tensor is of, and its names: ("source", "past", "key"), ("gate", "near"), ("score", ""), ("table", "r",
"weight"), ("role", "globals", "query")."""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What layers make for a call, by name: keys of sources, gates and made scores of branches, tables of biases; of
    roles their own tensors; of branches that sum features their random directions and the sums of earlier segments.
    after: those sums with this call's keys, which it fills in."""

    sources: Mapping[str, Keys] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    sums: Mapping[str, State] = field(default_factory=dict)
    after: dict[str, State] = field(default_factory=dict)
    roles: Roles = field(default_factory=dict)

    def keys_of(self, source: str, own: Keys) -> Keys:
        """The keys of a source; own: those of the sequence itself."""
        return own if source == OWN_KEYS else self.sources[source]

    def tensors(self) -> dict[Path, Tensor]:
        """All that gradients go to. Tables are made already."""
        found: dict[Path, Tensor] = {}
        for name, keys in self.sources.items():
            found |= {("source", name, what): x for what, x in zip(("key", "value"), keys, strict=True)}
        found |= {("gate", name): x for name, x in self.gates.items()}
        found |= {("score", name): x for name, x in self.scores.items()}
        for name, table in self.tables.items():
            found |= {("table", name, part.name): getattr(table, part.name) for part in fields(table)}
        for name, role in self.roles.items():
            found |= {("role", name, what): x for what, x in role.items()}
        return found


def learned_of(pattern: Composite, tensors: Mapping[Path, Tensor]) -> Learned:
    """What `Learned.tensors` took apart."""
    named: dict[str, dict[str, Any]] = {kind: {} for kind in ("source", "gate", "score", "table", "role")}
    for (kind, name, *part), x in tensors.items():
        if part:
            named[kind].setdefault(name, {})[part[0]] = x
        else:
            named[kind][name] = x
    kinds = {item.name: item.kind for item in pattern.resolved.tables}
    tables: dict[str, Table] = {
        name: table_of(kinds[name], list(parts.values()))[0] for name, parts in named["table"].items()
    }
    sources = {name: (parts["key"], parts["value"]) for name, parts in named["source"].items()}
    return Learned(sources, named["gate"], named["score"], tables, roles=named["role"])


def check_learned(pattern: Composite, learned: Learned) -> None:
    """Raises InputError: E501 where something that is learned is missing or unknown, E503 on a source's keys that are
    no pair of tensors."""
    branches = pattern.branches
    declared = [item.name for item in pattern.resolved.sources]
    gated = list(branches) if pattern.combine == "gate" else []
    made = [name for name, branch in branches.items() if branch.is_made_up]
    known = [item.name for item in pattern.resolved.tables]
    read = {name for branch in branches.values() for name in tables_read(branch.bias)}
    check_names(pattern, "source", learned.sources, declared, {term.source for term in pattern.terms} - {OWN_KEYS})
    for name, keys in learned.sources.items():
        _check_pair(name, keys)
    check_names(pattern, "gate", learned.gates, gated, set(gated))
    check_names(pattern, "score", learned.scores, made, set(made))
    check_names(pattern, "table", learned.tables, known, read)


def _check_pair(name: str, keys: object) -> None:
    is_pair = isinstance(keys, tuple | list) and len(keys) == 2 and all(isinstance(x, Tensor) for x in keys)
    if not is_pair or any(x.dim() != 4 for x in cast("Sequence[Tensor]", keys)):
        help = f"give sources={{{name!r}: (key, value)}}, tensors [B, Hkv, T, D]"
        raise input_error("E503", f"source `{name}` is no pair of such tensors", help)


def check_gates(gates: Mapping[str, object], query: Tensor) -> None:
    """Raises InputError (E502) on a gate that is no weight of branch, head and query."""
    rows = query.shape[:3]
    for name, gate in gates.items():
        help = f"give a floating-point tensor {list(rows)}, or what broadcasts to it, on {query.device}"
        if not isinstance(gate, Tensor):
            raise input_error("E502", f"gate `{name}` is {type(gate).__name__}", help)
        sizes = (1,) * (3 - gate.dim()) + tuple(gate.shape)
        fits = len(sizes) == 3 and all(size in (1, whole) for size, whole in zip(sizes, rows, strict=True))
        if not fits or not gate.is_floating_point() or gate.device != query.device:
            raise input_error("E502", f"gate `{name}` is {list(gate.shape)}, {gate.dtype} on {gate.device}", help)


def check_names(
    pattern: Composite, what: str, given: Mapping[str, object], known: Sequence[str], wanted: set[str]
) -> None:
    """Raises InputError (E501) where names are missing or unknown, or there are none."""
    if not isinstance(given, Mapping):
        raise input_error("E501", f"{what}s is {type(given).__name__}", f"give {what}s by name: {', '.join(known)}")
    for name in given:
        if name not in known:
            near = nearest(str(name), known)
            help = f"did you mean `{near}`?" if near else f"it takes {', '.join(known) or 'none'}"
            raise input_error("E501", f"the pattern has no {what} `{name}`", help)
    for name in sorted(wanted - given.keys()):
        if what != "source":
            shape = {"gate": "[B, H, Tq]", "score": "[B, H, Tq, Tk]", "table": "[H, size]"}[what]
            help = f"give {what}s={{{name!r}: {shape}}}, or use patterndsl.nn.Attention, which makes them"
            raise input_error("E501", f"{what} `{name}` is missing" if name else f"{what}s are missing", help)
        declared = next(item for item in pattern.resolved.sources if item.name == name)
        help = f"give sources={{{name!r}: (key, value)}}, or use patterndsl.nn.Attention, which makes them"
        if declared.kind in ("recall", "compress"):
            help = f"give what is recalled as sources={{{name!r}: (key, value)}}, of length 0 at first"
        raise input_error("E501", f"source `{name}`, made by {declared.kind}, is missing", help)
