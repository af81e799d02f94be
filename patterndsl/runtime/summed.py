"""How does a branch run whose score is a product of features? By sums over keys, which add up over its terms.

Terms with all of their keys are summed first; the sequence's own causal term, if there is one, goes on from there. Sums
of earlier segments are a state like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import EVERYTHING, Relation
from patterndsl.runtime.data import Inputs, checked_inputs, device_data
from patterndsl.runtime.heads import for_each_query_head
from patterndsl.runtime.summed_ops import causal_sums
from patterndsl.score.features import Elementwise, directions, favor_exponents
from patterndsl.score.linear import kernel_attention, read
from patterndsl.score.state import State
from patterndsl.sema.bind import bind
from patterndsl.sema.parameters import Sizes
from patterndsl.source.sequence import Keys

if TYPE_CHECKING:
    from patterndsl.terms import Term


@dataclass(frozen=True, slots=True)
class At:
    """Where a branch runs: at these sizes of the queries, in this layer."""

    sizes: Sizes
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The features of a branch. settings: of its score; drawn: directions [M, D] where FAVOR+ has its own; decay: the
    factor of each query head, None where weights do not decay."""

    score: str
    settings: Mapping[str, int | float | str]
    drawn: Tensor | None = None
    decay: tuple[float, ...] | None = None

    @property
    def is_log(self) -> bool:
        """Whether they are logarithms."""
        return self.score == "favor"

    @property
    def phi(self) -> Elementwise:
        """What is still made of the results of `of`, inside the sums."""
        return "linear" if self.is_log else cast("Elementwise", self.score)

    @property
    def normalise(self) -> bool:
        """Whether weights are divided by their sum."""
        return self.settings["normalise"] == "yes"

    def of(self, x: Tensor) -> Tensor:
        """Of queries or keys [B, H, T, D] the exponents of FAVOR+ [B, H, T, M], else x itself."""
        if not self.is_log:
            return x
        drawn = drawn_directions(self.settings, x.shape[-1]) if self.drawn is None else self.drawn
        return favor_exponents(x, drawn.to(x.device), self.settings["form"] == "hyperbolic")


def drawn_directions(settings: Mapping[str, int | float | str], head_dim: int, turn: int = 0) -> Tensor:
    """The directions of FAVOR+ as a spec tells them. turn: how often they were drawn before.

    Hyperbolic features are two for each direction.
    """
    features = int(settings["features"])
    number = -(-features // 2) if settings["form"] == "hyperbolic" else features
    return _directions(number, head_dim, settings["draws"] == "orthogonal", int(settings["seed"]) + turn)


@lru_cache(maxsize=64)
def _directions(number: int, head_dim: int, is_orthogonal: bool, seed: int) -> Tensor:
    return directions(number, head_dim, orthogonal=is_orthogonal, seed=seed)


def summed(
    features: Features,
    query: Tensor,
    keys: Sequence[tuple[Term, Keys]],
    at: At,
    inputs: Inputs | None,
    before: State | None,
) -> tuple[Tensor, State | None]:
    """Output [B, Hq, Tq, Dv] of a branch, and the sums of the sequence's own keys, those of `before` among them.

    keys: of each term. at: the sizes of the queries, and the layer. Where weights decay, each query head has sums of
    its own. Work: O(T M Dv). Raises InputError (E505) where a causal term has other keys than those up to the queries.
    """
    if features.decay is not None:
        heads = query.shape[1]
        keys = [(term, (for_each_query_head(key, heads), for_each_query_head(x, heads))) for term, (key, x) in keys]
    causal = next((item for item in keys if item[0].summable and item[0].summable.reach == "causal"), None)
    before_all = before
    for term, (key, value) in keys:
        if causal is None or term is not causal[0]:
            before_all = _sums(features, features.of(key), value, _kept(term, key, at, inputs), before_all)
    asked = features.of(query)
    if causal is None:
        assert before_all is not None
        found = read(asked, before_all, features.is_log, phi=features.phi, normalise=features.normalise)
        return found.to(keys[0][1][1].dtype), None
    term, (key, value) = causal
    of_keys, kept = features.of(key), _kept(term, key, at, inputs)
    start = key.shape[2] - query.shape[2]
    if start != at.sizes.q_start:
        message = f"{key.shape[2]} keys for queries from {at.sizes.q_start} to {at.sizes.q_start + query.shape[2]}"
        raise input_error("E505", message, "a causal sum takes the keys up to the last query, and no others")
    earlier, now = slice(0, start), slice(start, None)
    if start:
        before_all = _sums(features, of_keys[:, :, earlier], value[:, :, earlier], _part(kept, earlier), before_all)
    out, after = causal_sums(
        asked,
        of_keys[:, :, now],
        value[:, :, now],
        keep=_part(kept, now),
        state=before_all,
        is_log=features.is_log,
        phi=features.phi,
        decay=features.decay,
        normalise=features.normalise,
    )
    return out, after if len(keys) == 1 else _sums(features, of_keys, value, kept, before)


def _sums(features: Features, of_keys: Tensor, value: Tensor, kept: Tensor | None, before: State | None) -> State:
    """The sums over these keys and those before."""
    _, after = kernel_attention(
        of_keys[:, :, :0],
        of_keys,
        value,
        causal=False,
        keep=kept,
        state=before,
        is_log=features.is_log,
        phi=features.phi,
        decay=features.decay,
    )
    return after


def _part(kept: Tensor | None, part: slice) -> Tensor | None:
    return None if kept is None else kept[..., part]


def _kept(term: Term, key: Tensor, at: At, inputs: Inputs | None) -> Tensor | None:
    """Which keys take part, bool [Tk] or [B, Tk]; None for all."""
    assert term.summable is not None
    relation: Relation = term.summable.kept
    if relation == EVERYTHING:
        return None
    num_keys = key.shape[2]
    asked = replace(term.pattern.resolved, relation=relation, fallback=None)
    bound = bind(asked, replace(at.sizes, kv_len=num_keys), 1, at.layer)
    if bound.relation == EVERYTHING:
        return None
    names = {shape.name for shape in bound.inputs}
    given = {name: x for name, x in (inputs or {}).items() if name in names}
    checked = checked_inputs(bound, given, key.device, key.shape[0])
    data = device_data(bound.relation, 1, checked, key.device)
    is_batched = any(x.dim() > 1 for x in checked.values())
    row = torch.arange(key.shape[0], device=key.device)[:, None] if is_batched else 0
    found = member(bound.relation, Point(0, torch.arange(num_keys, device=key.device), 0, data.at_row(row)))
    return torch.as_tensor(found, device=key.device).expand((key.shape[0], num_keys) if is_batched else (num_keys,))
