"""What does a query attend to, if a pair's weight is the inner product of two features?

    output[q] = sum over keys k of (phi(q) . phi(k)) v(k), divided by the sum of the weights

in time linear in the keys, since phi(q) can be taken out of the sums. Which keys a row sees is all of them or those up
to itself; other patterns have no such sums. Which features these are is for `features`. No epsilon is added anywhere.
Weights may decay with the distance, by a factor of each head for every token, and need not be divided by their sum.

Sources: Katharopoulos et al. 2020, arXiv 2006.16236, section 3; Choromanski et al. 2020, arXiv 2009.14794; with decay
Sun et al. 2023, arXiv 2307.08621, equation 5; Qin et al. 2024, arXiv 2401.04658.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.device.graphs import remembered
from patterndsl.diagnostics import input_error
from patterndsl.score.causal import CHUNK, Summing, causal_outputs
from patterndsl.score.features import Elementwise, elementwise
from patterndsl.score.state import (
    State,
    empty_state,
    faded,
    merge_states,
    outputs_of_rows,
    rows_of_state,
    state_of_keys,
)

__all__ = ["State", "empty_state", "kernel_attention", "merge_states", "read", "step"]


def kernel_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    causal: bool,
    keep: Tensor | None = None,
    state: State | None = None,
    is_log: bool = False,
    phi: Elementwise = "linear",
    decay: Sequence[float] | None = None,
    normalise: bool = True,
) -> tuple[Tensor, State]:
    """Outputs [B, Hq, Tq, Dv] in the dtype of value, and the state of all keys, those of `state` with them.

    query_features: [B, Hq, Tq, M]; key_features: [B, Hkv, Tk, M]; value: [B, Hkv, Tk, Dv]; Hq a multiple of Hkv, each
    key head for the next Hq / Hkv query heads. is_log: the features are logarithms, of any size: no weight overflows,
    and a row's weights are exact beside its largest. Features that are no logs must be finite, and are summed as they
    are, or with phi as what it makes of them.
    causal: row q sees keys [0, q + 1) and needs Tq == Tk; otherwise it sees all. Every row also sees the keys of
    `state`, which are earlier ones. keep: bool [Tk] or [B, Tk]; a key that is not kept takes no part, whatever it
    holds. decay: of each key head a factor in (0, 1], by which the weight of a key is multiplied for each token between
    it and the row; rows that are not causal must then be one, which stands at the last key. normalise: whether weights
    are divided by their sum. A row without keys, or whose weights are all 0, is 0 with gradient 0. Nothing that a later
    key holds changes a row, not by one bit.
    Sums are in float32 at least, also under autocast. On CUDA causal sums run by kernels (`fused`, `fused_logs`), whose
    products of matrices are of the tensors' precision. Raises InputError (E502, E503). Work: O((Tq + Tk) M Dv), and
    causal O(T M (Dv + 64)); memory: see `causal`.
    """
    _check(query_features, key_features, value, causal, keep)
    _check_state(state, key_features, value)
    _check_decay(decay, query_features, key_features, causal)
    batch, kv_heads, kv_len, num_features = key_features.shape
    dtype = _sum_dtype(query_features, key_features, value, state)
    absent = -torch.inf if is_log else 0.0
    present = None if keep is None else keep.expand(batch, kv_len)[:, None, :, None]
    with torch.autocast(value.device.type, enabled=False):
        if causal and value.is_cuda and kv_len > 1:
            found = (
                _logs_by_kernels(query_features, key_features, value, present, state, decay, normalise)
                if is_log
                else _by_kernels(query_features, key_features, value, present, state, phi, decay, normalise)
            )
            if found is not None:
                return found
        query, key = (elementwise(phi, part.to(dtype)) for part in (query_features, key_features))
        values = value.to(dtype)
        if present is not None:
            key, values = torch.where(present, key, absent), torch.where(present, values, 0)
        if state is None:
            state = empty_state(batch, kv_heads, num_features, value.shape[-1], dtype=dtype, device=value.device)
        log_decay = None if decay is None else _logarithms(decay, dtype, value.device)
        summing = Summing(is_log, normalise, log_decay)
        if not causal or kv_len <= 1:
            state = _state_after(key, values, state, summing)
            return _read(query, state, is_log, normalise).to(value.dtype), state
        more = -kv_len % CHUNK
        output, state = causal_outputs(
            pad(_by_kv_head(query, kv_heads), (0, 0, 0, more)),
            pad(key, (0, 0, 0, more), value=absent),
            pad(values, (0, 0, 0, more)),
            state,
            summing,
            kv_len,
        )
    return output[..., :kv_len, :].flatten(1, 2).to(value.dtype), state


def _logarithms(decay: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H], kept: no call then waits for numbers of the host. In a graph of torch.compile a constant is."""
    found = _decays_told if torch.compiler.is_compiling() else _decays_kept
    return found(tuple(decay), dtype, device)


def _decays_told(decay: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([log(factor) for factor in decay], dtype=torch.float64).to(device, dtype)


@remembered(64)
def _decays_kept(decay: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _decays_told(decay, dtype, device)


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present: Tensor | None,
    state: State | None,
    phi: Elementwise,
    decay: Sequence[float] | None,
    normalise: bool,
) -> tuple[Tensor, State] | None:
    """The causal sums of features that are no logs, on CUDA; None where there are no kernels for them."""
    from patterndsl.score.fused import Sums, causal_sums, takes

    if not takes(query, key, value, state):
        return None
    key_phi = phi
    if present is not None:  # the features of what is absent are 0, which those of no number are
        key, value, key_phi = torch.where(present, elementwise(phi, key), 0), torch.where(present, value, 0), "linear"
    log_decay = None if decay is None else _logarithms(decay, torch.float32, value.device)
    return causal_sums(query, key, value, state, Sums(phi, key_phi, normalise, log_decay))


def _logs_by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present: Tensor | None,
    state: State | None,
    decay: Sequence[float] | None,
    normalise: bool,
) -> tuple[Tensor, State] | None:
    """The causal sums of logarithms, on CUDA; None where there are no kernels for them."""
    from patterndsl.score.fused_logs import causal_log_sums, takes

    if decay is not None or not normalise or not takes(query, key, value, state):
        return None
    if present is not None:
        key, value = torch.where(present, key, -torch.inf), torch.where(present, value, 0)
    return causal_log_sums(query, key, value, state)


def _state_after(key: Tensor, value: Tensor, before: State, summing: Summing) -> State:
    """The state of keys [B, H, T, M], as their last one would see it, and of those before."""
    kv_len = key.shape[2]
    if not kv_len:  # sums of nothing, whose gradients are
        return State(before.numerator + key.mT @ value, before.denominator + key.sum(-2), before.shift)
    ahead = torch.arange(kv_len - 1, -1, -1, device=key.device)
    if summing.log_decay is not None:
        before = faded(before, summing.log_decay * kv_len, summing.is_log)
    return merge_states(before, state_of_keys(summing.faded(key, ahead), value, summing.is_log))


def step(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    state: State,
    is_log: bool = False,
    *,
    phi: Elementwise = "linear",
    decay: Sequence[float] | None = None,
    normalise: bool = True,
) -> tuple[Tensor, State]:
    """The next token: outputs [B, Hq, 1, Dv] that see the keys of `state` and the token's own, and the state of both.

    query_features: [B, Hq, 1, M]; key_features: [B, Hkv, 1, M]; value: [B, Hkv, 1, Dv]. The same as
    `kernel_attention` from `state` on, up to rounding. Raises InputError (E502, E503). Work: O(M Dv) for each head.
    """
    if query_features.shape[-2] != 1 or key_features.shape[-2] != 1:
        message = f"a step of {query_features.shape[-2]} queries and {key_features.shape[-2]} keys"
        raise input_error("E503", message, "give one token, or call kernel_attention with a state")
    return kernel_attention(
        query_features,
        key_features,
        value,
        causal=False,
        state=state,
        is_log=is_log,
        phi=phi,
        decay=decay,
        normalise=normalise,
    )


def read(
    query_features: Tensor,
    state: State,
    is_log: bool = False,
    *,
    phi: Elementwise = "linear",
    normalise: bool = True,
) -> Tensor:
    """[B, Hq, Tq, Dv] in the dtype of the state: what queries [B, Hq, Tq, M] see of the keys of a state.

    Hq is a multiple of the state's heads. A row is 0 where the state has no key. phi, normalise: as for
    `kernel_attention`. Raises InputError (E503). Work: O(Tq M Dv) for each head.
    """
    batch, kv_heads, num_features = state.shift.shape
    shape = query_features.shape
    if len(shape) != 4 or shape[0] != batch or shape[1] % kv_heads or shape[3] != num_features:
        message = f"query features {[*shape]} for a state of shift {[*state.shift.shape]}"
        raise input_error("E503", message, "give [B, Hq, Tq, M] with the state's B and M, Hq a multiple of its H")
    with torch.autocast(query_features.device.type, enabled=False):
        return _read(elementwise(phi, query_features.to(state.numerator.dtype)), state, is_log, normalise)


def _read(query: Tensor, state: State, is_log: bool, normalise: bool) -> Tensor:
    """The query heads of one key head are rows of one product, so that no state is copied for each of them."""
    grouped = _by_kv_head(query, state.shift.shape[1])
    output = outputs_of_rows(rows_of_state(grouped.flatten(2, 3), state, is_log), normalise)
    return torch.unflatten(output, 2, grouped.shape[2:4]).flatten(1, 2)


def _by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """[B, Hkv, Hq / Hkv, Tq, M]."""
    return torch.unflatten(query, 1, (kv_heads, query.shape[1] // kv_heads))


def _sum_dtype(query: Tensor, key: Tensor, value: Tensor, state: State | None) -> torch.dtype:
    dtype = torch.float32
    for tensor in (query, key, value, *(() if state is None else (state.numerator,))):
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check(query: Tensor, key: Tensor, value: Tensor, causal: bool, keep: Tensor | None) -> None:
    for name, tensor in (("query_features", query), ("key_features", key), ("value", value)):
        if tensor.ndim != 4 or not tensor.is_floating_point():
            message = f"{name} is {tensor.dtype} of shape {[*tensor.shape]}"
            raise input_error("E502", message, "give a floating-point tensor [B, H, T, M]")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        shapes = ", ".join(str([*tensor.shape]) for tensor in (query, key, value))
        raise input_error(
            "E503",
            f"query features, key features and values of shapes {shapes} do not fit together",
            "give [B, Hq, Tq, M], [B, Hkv, Tk, M] and [B, Hkv, Tk, Dv]",
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        message = f"{query.shape[1]} query heads for {key.shape[1]} heads of keys"
        raise input_error("E503", message, "give a multiple of the heads of keys")
    if causal and query.shape[2] != key.shape[2]:
        message = f"causal, with {query.shape[2]} queries and {key.shape[2]} keys"
        raise input_error("E503", message, "give the keys of the queries' own tokens, and earlier ones as `state`")
    if keep is not None and (keep.dtype != torch.bool or keep.shape not in (key.shape[2:3], key.shape[0:3:2])):
        message = f"keep is {keep.dtype} of shape {[*keep.shape]}"
        raise input_error("E502", message, f"give bool [{key.shape[2]}] or [{key.shape[0]}, {key.shape[2]}]")


def _check_state(state: State | None, key: Tensor, value: Tensor) -> None:
    wanted = (*key.shape[:2], key.shape[3], value.shape[3])
    if state is not None and state.numerator.shape != wanted:
        message = f"a state of shape {[*state.numerator.shape]} for keys and values that make {[*wanted]}"
        raise input_error("E503", message, "give the state of the same heads, features and values")


def _check_decay(decay: Sequence[float] | None, query: Tensor, key: Tensor, causal: bool) -> None:
    if decay is None:
        return
    if len(decay) != key.shape[1] or not all(0 < factor <= 1 for factor in decay):
        message = f"decay is {list(decay)} for {key.shape[1]} heads of keys"
        raise input_error("E503", message, "give a factor above 0 and at most 1 for each head of keys")
    if not causal and query.shape[2] > 1:
        message = f"decay, not causal, with {query.shape[2]} queries"
        raise input_error("E503", message, "give one query, which stands at the last key, or causal=True")
