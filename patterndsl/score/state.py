"""What do queries need to know of the keys before them? Sums over keys, of which any two can be added.

A state has no place for the order of its keys: which keys a row may see is decided by who makes the state.

Log features are summed as exp(log k - shift), with one shift for each feature: the largest log k that the state has
seen. So each denominator lies between 1 and the number of keys, whatever the norms of the keys are, and a key that
rounds to 0 is one that no query could have noticed. Features that are no logs have the shift 0.

Where weights decay with the distance, a state is what a query at the position of its last key would see, and `faded`
what one that stands later does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class State:
    """Sums over keys: of k v^T, numerator [B, H, M, Dv], and of k, denominator [B, H, M], both divided by exp(shift).

    shift: [B, H, M], -inf where there is no key yet. It is a constant under differentiation, since no output depends
    on it. A state's dtype is that of its sums, float32 at least.
    """

    numerator: Tensor
    denominator: Tensor
    shift: Tensor


def empty_state(
    batch: int,
    kv_heads: int,
    num_features: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state of no keys, which merged with another state is that state. Work: O(B H M Dv)."""
    sums = torch.zeros(batch, kv_heads, num_features, value_dim, dtype=dtype, device=device)
    shift = torch.full(sums.shape[:-1], -torch.inf, dtype=dtype, device=device)
    return State(sums, torch.zeros_like(shift), shift)


def merge_states(first: State, second: State) -> State:
    """The state of the keys of both: associative up to rounding, commutative, and with `empty_state` as unit.

    Work: O(B H M Dv).
    """
    shift = torch.maximum(first.shift, second.shift)
    one, other = _scaled(first, shift), _scaled(second, shift)
    return State(one.numerator + other.numerator, one.denominator + other.denominator, shift)


def _scaled(state: State, shift: Tensor) -> State:
    """The same sums divided by exp of a shift that is not below the state's."""
    factor = (state.shift - finite(shift)).exp()
    return State(state.numerator * factor[..., None], state.denominator * factor, shift)


def faded(state: State, log_factor: Tensor, is_log: bool) -> State:
    """The state with all weights times exp(log_factor [..., H]), which broadcasts to the sums without their features.

    Logs fade by their shift, which loses nothing however small the factor is.
    """
    if is_log:
        return State(state.numerator, state.denominator, state.shift + log_factor[..., None])
    factor = log_factor.exp()[..., None]
    return State(state.numerator * factor[..., None], state.denominator * factor, state.shift)


def faded_features(features: Tensor, log_factor: Tensor, is_log: bool) -> Tensor:
    """Features [..., T, M] times exp(log_factor [..., T])."""
    return features + log_factor[..., None] if is_log else features * log_factor.exp()[..., None]


def finite(shift: Tensor) -> Tensor:
    """The shift, and 0 where there is no key: -inf less -inf would be no number."""
    return torch.where(shift == -torch.inf, 0, shift)


def state_of_keys(key_features: Tensor, value: Tensor, is_log: bool) -> State:
    """The state of keys [..., T, M] with values [..., T, Dv], T at least 1. Work: O(T M Dv)."""
    if not is_log:
        shift = torch.zeros_like(key_features[..., 0, :])
        return State(key_features.mT @ value, key_features.sum(-2), shift)
    shift = key_features.detach().amax(-2)
    weights = (key_features - finite(shift)[..., None, :]).exp()
    return State(weights.mT @ value, weights.sum(-2), shift)


def rows_of_state(query_features: Tensor, state: State, is_log: bool) -> State:
    """What each row sums up over the keys of a state: a state with rows [..., T] in the place of features.

    Its shift is the largest log q + shift of the row, so that the row's denominator too is at least 1. Row by row:
    nothing of one row goes into another. Work: O(T M Dv).
    """
    if is_log:
        exponents = query_features + state.shift[..., None, :]
        shift = exponents.detach().amax(-1)
        weights = (exponents - finite(shift)[..., None]).exp()
    else:
        shift = torch.zeros_like(query_features[..., 0])
        weights = query_features
    return State(weights @ state.numerator, (weights @ state.denominator[..., None])[..., 0], shift)


def outputs_of_rows(rows: State, normalise: bool = True) -> Tensor:
    """[..., T, Dv]: numerator over denominator; 0, and gradient 0, where the denominator is 0. Not normalised: the
    numerator itself."""
    if not normalise:
        return rows.numerator * finite(rows.shift).exp()[..., None]
    is_empty = rows.denominator[..., None] == 0
    quotient = rows.numerator / torch.where(is_empty, 1, rows.denominator[..., None])
    return torch.where(is_empty, 0, quotient)
