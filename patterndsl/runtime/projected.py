"""Whose query, key and value does a term read? Those that every call has, or those of a role.

Tensors of a role are named by what they are: query, key, value of the sequence, and `past.key`, `past.value` of a
source `past`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from patterndsl.diagnostics import input_error, nearest
from patterndsl.source.sequence import Keys
from patterndsl.syntax.tree import OWN_KEYS

if TYPE_CHECKING:
    from patterndsl.composite import Composite
    from patterndsl.terms import Term

Roles: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""The tensors of each role by name. Each is of the shape of the tensor in whose place it stands; rows and keys that the
role has no pair of are not read."""


def read_by(term: Term) -> dict[str, tuple[str, str]]:
    """What a term reads of roles: for query, key and value the role and the name of its tensor."""
    prefix = "" if term.source == OWN_KEYS else f"{term.source}."
    return {what: (role, what if what == "query" else prefix + what) for what, role in term.projections.owned().items()}


def tensors_of(term: Term, query: Tensor, keys: Keys, roles: Roles) -> tuple[Tensor, Keys]:
    """The query and the keys that a term reads. query, keys: where no role has its own."""
    found: dict[str, Tensor] = dict(zip(("query", "key", "value"), (query, *keys), strict=True))
    found |= {what: roles[role][name] for what, (role, name) in read_by(term).items()}
    return found["query"], (found["key"], found["value"])


def wanted_of(pattern: Composite) -> dict[str, list[str]]:
    """The names of the tensors of each role that some term reads."""
    found: dict[str, list[str]] = {role.name: [] for role in pattern.resolved.roles}
    for term in pattern.terms:
        for role, name in read_by(term).values():
            found[role] += [] if name in found[role] else [name]
    return found


def check_roles(pattern: Composite, roles: object, query: Tensor, keys: Mapping[str, Keys]) -> None:
    """Raises InputError where tensors of roles are missing or unknown (E501), or no tensors of the shape that the
    tensors in whose place they stand have (E503). keys: of each source, `self` among them."""
    wanted = wanted_of(pattern)
    if not isinstance(roles, Mapping):
        raise input_error("E501", f"roles is {type(roles).__name__}", "give {'globals': {'query': [B, Hq, Tq, D]}}")
    for name in roles:
        if name not in wanted:
            near = nearest(str(name), wanted)
            help = f"did you mean `{near}`?" if near else f"its roles are {', '.join(wanted) or 'none'}"
            raise input_error("E501", f"the pattern has no role `{name}`", help)
    for name, names in wanted.items():
        given = roles.get(name, {})
        if not isinstance(given, Mapping):
            message = f"role `{name}` is given {type(given).__name__}"
            raise input_error("E501", message, f"give its tensors by name: {', '.join(names)}")
        _check_names(name, names, given)
        for what, tensor in given.items():
            _check_tensor(f"{what} of role `{name}`", tensor, _instead_of(what, query, keys))


def _check_names(role: str, wanted: list[str], given: Mapping[str, object]) -> None:
    for what in given:
        if what not in wanted:
            near = nearest(str(what), wanted)
            help = f"did you mean `{near}`?" if near else f"it reads {', '.join(wanted) or 'nothing'}"
            raise input_error("E501", f"role `{role}` reads no `{what}`", help)
    for what in wanted:
        if what not in given:
            help = f"give roles={{{role!r}: {{{what!r}: tensor}}}}, or use patterndsl.nn.Attention, which makes them"
            raise input_error("E501", f"`{what}` of role `{role}` is missing", help)


def _instead_of(what: str, query: Tensor, keys: Mapping[str, Keys]) -> Tensor:
    """The tensor in whose place a role's stands."""
    if what == "query":
        return query
    source, _, name = what.rpartition(".")
    return keys[source or OWN_KEYS][name == "value"]


def _check_tensor(what: str, tensor: object, like: Tensor) -> None:
    help = f"give {list(like.shape)}, as it is without the role"
    if not isinstance(tensor, Tensor):
        raise input_error("E503", f"{what} is {type(tensor).__name__}", help)
    if tensor.shape != like.shape:
        raise input_error("E503", f"{what} is {list(tensor.shape)}", help)
