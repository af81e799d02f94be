"""What does each row sum up over the keys up to its own, without a state for each row?

The sequence is cut into chunks. A row sees the state of all chunks before its own, and the keys of its own chunk up to
itself. The states before each chunk come from a scan, O(T / chunk) of them; the rows' sums are made again in the
backward pass, so nothing of size T x M x Dv is ever stored, nor T x M for more than a group of chunks.

Within a chunk, log features need shifts, and a shift that knows the whole chunk would let a later key round an earlier
row's keys to 0. So a chunk is halved again and again: the right half of each part sees *all* keys of the left half,
whose maxima are then the row's own, and a row sees itself by exp(log q + log k) directly. Each of the log2(chunk)
levels is a product of matrices, and no number that depends on a later key goes into a row, not even times 0.

Where weights decay with the distance, a row at place i of its chunk sees the state before it faded i + 1 times, and a
state fades once for each token that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from patterndsl.score.state import (
    State,
    faded,
    faded_features,
    finite,
    merge_states,
    outputs_of_rows,
    rows_of_state,
    state_of_keys,
)

CHUNK = 64
"""Tokens of a chunk, a power of 2: about where the product with a state costs as much as that with the chunk's keys."""

GROUP = 16
"""Chunks whose rows are computed at once."""


@dataclass(frozen=True, slots=True)
class Summing:
    """What rows make of features. is_log: features are logarithms. normalise: weights are divided by their sum.
    log_decay: [H], the logarithm of the factor by which weights decay with each token, None where they do not."""

    is_log: bool
    normalise: bool = True
    log_decay: Tensor | None = None

    def faded(self, features: Tensor, steps: Tensor) -> Tensor:
        """Features [B, H, ..., T, M] decayed by steps [T], or [chunks, T] of each chunk."""
        if self.log_decay is None:
            return features
        by_head = self.log_decay.view(-1, *[1] * (features.dim() - 3))
        return faded_features(features, by_head * steps, self.is_log)


def causal_outputs(
    query: Tensor, key: Tensor, value: Tensor, start: State, summing: Summing, kv_len: int
) -> tuple[Tensor, State]:
    """Outputs [B, Hkv, G, T, Dv] and the state of `start` and all keys.

    query [B, Hkv, G, T, M], G query heads for each head of key [B, Hkv, T, M] and value [B, Hkv, T, Dv]; T is a
    multiple of CHUNK, of which kv_len are tokens, and absent keys are -inf as logs or else 0. `start` is the state of
    the keys before the sequence. Rows without a key are 0. Work: O(T M (Dv + CHUNK)) and O(T / CHUNK log(T / CHUNK) M
    Dv) for the scan; memory O(T (M + Dv) + T / CHUNK M Dv).
    """
    keys = torch.unflatten(key, 2, (-1, CHUNK))
    values = torch.unflatten(value, 2, (-1, CHUNK))
    queries = torch.unflatten(query, 3, (-1, CHUNK)).movedim(2, 3)  # [B, Hkv, chunks, G, CHUNK, M]
    tokens = (kv_len - CHUNK * torch.arange(keys.shape[2], device=key.device)).clamp(max=CHUNK)
    ahead = (tokens[:, None] - 1 - torch.arange(CHUNK, device=key.device)).clamp(min=0)
    of_chunks = state_of_keys(summing.faded(keys, ahead), values, summing.is_log)
    before, whole = _prefixes(of_chunks, start, summing, tokens)
    outputs = []
    for first in range(0, keys.shape[2], GROUP):
        part = slice(first, first + GROUP)
        tensors = (
            queries[:, :, part],
            keys[:, :, part],
            values[:, :, part],
            before.numerator[:, :, part],
            before.denominator[:, :, part],
            before.shift[:, :, part],
        )
        outputs.append(_made_again(*tensors, summing) if torch.is_grad_enabled() else _group_outputs(*tensors, summing))
    return torch.cat(outputs, dim=2).movedim(3, 2).flatten(3, 4), whole


def _prefixes(chunks: State, start: State, summing: Summing, tokens: Tensor) -> tuple[State, State]:
    """The states before each chunk, and after the last: chunks [B, H, chunks, M, ...] merged from the left.

    The distance doubles: after n steps each place holds itself and the 2^n - 1 before it; `start` is the first place.
    tokens: [chunks], how often a state fades over each.
    """
    states = _joined(_each(start, lambda part: part.unsqueeze(2)), chunks)
    number, step = states.shift.shape[2], 1
    lengths = pad(tokens, (1, 0))
    while step < number:
        earlier, later = _places(states, 0, number - step), _places(states, step, number)
        if summing.log_decay is not None:
            earlier = faded(earlier, summing.log_decay[:, None] * lengths[step:], summing.is_log)
        states = _joined(_places(states, 0, step), merge_states(earlier, later))
        lengths = torch.cat([lengths[:step], lengths[:-step] + lengths[step:]])
        step *= 2
    return _places(states, 0, number - 1), _each(states, lambda part: part[:, :, -1])


def _made_again(*arguments: Tensor | Summing) -> Tensor:
    """`_group_outputs`, of which the backward pass keeps the arguments only."""
    found = checkpoint(_group_outputs, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


def _group_outputs(
    query: Tensor, key: Tensor, value: Tensor, numerator: Tensor, denominator: Tensor, shift: Tensor, summing: Summing
) -> Tensor:
    """[B, H, n, G, CHUNK, Dv] of query [B, H, n, G, CHUNK, M], key [B, H, n, CHUNK, M] and the states before them."""
    before = State(numerator, denominator, shift)
    asked = summing.faded(query, torch.arange(1, CHUNK + 1, device=query.device))
    past = rows_of_state(asked.flatten(3, 4), before, summing.is_log)
    past = _each(past, lambda part: torch.unflatten(part, 3, query.shape[3:5]))
    rows_of_chunk = _log_rows if summing.is_log else _plain_rows
    rows = rows_of_chunk(query, key.unsqueeze(3), value.unsqueeze(3), summing)
    return outputs_of_rows(merge_states(past, rows), summing.normalise)


def _plain_rows(query: Tensor, key: Tensor, value: Tensor, summing: Summing) -> State:
    """Rows [B, H, n, G, C] of features that are no logs. Later keys are multiplied by 0, so they must be finite."""
    weights = query @ key.mT
    if summing.log_decay is not None:
        places = torch.arange(query.shape[4], device=query.device)
        steps = (places[:, None] - places).clamp(min=0)
        weights = weights * (summing.log_decay[:, None, None, None, None] * steps).exp()
    weights = weights.tril()
    total = weights.sum(-1)
    return State(weights @ value, total, torch.zeros_like(total))


def _log_rows(query: Tensor, key: Tensor, value: Tensor, summing: Summing) -> State:
    """Rows [B, H, n, G, C] of log features, level by level: first each row by itself, then ever longer left halves."""
    exponents = query + key
    shift = exponents.detach().amax(-1)
    total = (exponents - finite(shift)[..., None]).exp().sum(-1)
    rows = State(total[..., None] * value, total, shift)
    half = 1
    while half < query.shape[4]:
        left, right = _halves(rows, half, 0), _halves(rows, half, 1)
        steps = torch.arange(half, device=query.device)
        asked = summing.faded(_half(query, half, 1), steps + 1)
        keys = summing.faded(_half(key, half, 0), half - 1 - steps)
        rows = _joined_halves(left, merge_states(right, _crossing(asked, keys, _half(value, half, 0))))
        half *= 2
    return rows


def _crossing(query: Tensor, key: Tensor, value: Tensor) -> State:
    """Rows [..., h] of queries [..., h, M] that see all the keys [..., h, M].

    No state of size M x Dv is made: weights h x h cost less here. All exponents are at most 0, and the largest of each
    row is 0.
    """
    highest = key.detach().amax(-2, keepdim=True)
    exponents = query + highest
    shift = exponents.detach().amax(-1)
    weights = (exponents - finite(shift)[..., None]).exp() @ (key - finite(highest)).exp().mT
    return State(weights @ value, weights.sum(-1), shift)


def _half(part: Tensor, half: int, side: int) -> Tensor:
    """[B, H, n, G, parts, half, ...]: of [B, H, n, G, C, ...] the left (0) or right (1) halves of its parts."""
    return torch.unflatten(part, 4, (-1, 2, half)).select(5, side)


def _halves(rows: State, half: int, side: int) -> State:
    return _each(rows, lambda part: _half(part, half, side))


def _joined_halves(left: State, right: State) -> State:
    """What `_halves` took apart."""

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a, b], dim=5).flatten(4, 6)

    return _pairwise(left, right, joined)


def _joined(first: State, second: State) -> State:
    """One after the other along dimension 2."""
    return _pairwise(first, second, lambda a, b: torch.cat([a, b], dim=2))


def _places(states: State, start: int, stop: int) -> State:
    """The states at places [start, stop) of dimension 2."""
    return _each(states, lambda part: part[:, :, start:stop])


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    return State(change(state.numerator), change(state.denominator), change(state.shift))


def _pairwise(first: State, second: State, change: Callable[[Tensor, Tensor], Tensor]) -> State:
    return State(
        change(first.numerator, second.numerator),
        change(first.denominator, second.denominator),
        change(first.shift, second.shift),
    )
