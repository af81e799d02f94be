"""What do roles have in a layer? Projections of their own, beside those that every pair has.

A role's tensors are made for the positions alone that it has pairs of, where conditions on one side tell these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from patterndsl.composite import Composite
from patterndsl.lower.needed import keys_needed, queries_needed
from patterndsl.pattern import Pattern
from patterndsl.runtime.projected import read_by, wanted_of
from patterndsl.sema.parameters import Sizes
from patterndsl.source.named import Named
from patterndsl.syntax.tree import OWN_KEYS, Projection
from patterndsl.terms import Term


class Role(nn.Module):
    """The projections of a role, by `query_projection` and so on, which start as copies of the layer's."""

    def __init__(self, own: tuple[Projection, ...], of_layer: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.own = own
        for what in own:
            self.add_module(f"{what}_projection", deepcopy(of_layer[what]))

    def projection(self, what: str) -> nn.Linear:
        """Its own one of query, key or value. Raises AttributeError where the role has none."""
        return cast("nn.Linear", getattr(self, f"{what}_projection"))

    @torch.no_grad()
    def copy_from(self, of_layer: Mapping[str, nn.Linear]) -> None:
        """Starts again from the layer's."""
        for what in self.own:
            self.projection(what).load_state_dict(of_layer[what].state_dict())


class Roles(Named):
    """The roles of a pattern by name."""

    def __init__(self, pattern: Pattern, of_layer: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.wanted = wanted_of(pattern) if isinstance(pattern, Composite) else {}  # before a role of that name
        for role in pattern.resolved.roles:
            self[role.name] = Role(role.own, of_layer)

    def role(self, name: str) -> Role:
        """The projections of a role. Raises KeyError where there is no such role."""
        return cast("Role", self[name])

    def own_tensors(
        self,
        pattern: Composite,
        states: Mapping[str, Tensor],
        sizes: Callable[[], Sizes],
        heads: int,
        layer: int,
        by_head: Callable[[str, Tensor], Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Each role's query, key and value of the sequence, as far as terms read them.

        states: [B, T, dim] that each is projected of; by_head: makes [B, H, T, D] of what was projected. Zero where the
        role has no pair. Work: that of a projection, for the positions between the first and the last that are needed.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, wanted in self.wanted.items():
            for what in wanted:
                if "." in what:
                    continue  # of a source, which `of_sources` names
                x = states[what]
                needed = self._needed(pattern, name, what, sizes, heads, layer, x.shape[1])
                made = self.role(name).projection(what)(x[:, needed.start : needed.stop])
                made = pad(made, (0, 0, needed.start, x.shape[1] - needed.stop)) if len(needed) < x.shape[1] else made
                found.setdefault(name, {})[what] = by_head(what, made)
        return found

    def _needed(
        self, pattern: Composite, role: str, what: str, sizes: Callable[[], Sizes], heads: int, layer: int, length: int
    ) -> range:
        if torch.compiler.is_compiling():  # ranges are for one length each, and so are sizes
            return range(length)
        return _needed(pattern, role, what, sizes(), heads, layer)

    def of_sources(self) -> list[str]:
        """The roles that keys of sources are made for."""
        return [name for name, wanted in self.wanted.items() if any("." in what for what in wanted)]


@lru_cache(maxsize=256)
def _needed(pattern: Composite, role: str, what: str, sizes: Sizes, heads: int, layer: int) -> range:
    """The rows or keys of a sequence that terms read a tensor of a role for."""

    def of(term: Term) -> range:
        bound = term.pattern.bind(
            sizes.total, q_len=sizes.q_len, kv_len=sizes.kv_len, q_start=sizes.q_start, heads=heads, layer=layer
        )
        return queries_needed(bound) if what == "query" else keys_needed(bound)

    reading = [term for term in pattern.terms if (role, what) in read_by(term).values()]
    if any(term.source != OWN_KEYS for term in reading):  # their keys are not as many as the sequence's
        return range(sizes.q_len)
    ranges = [needed for needed in map(of, reading) if needed]
    return range(min(item.start for item in ranges), max(item.stop for item in ranges)) if ranges else range(0)
