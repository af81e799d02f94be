"""How does a layer run token by token? What it projects goes into a cache, and a call attends to what that holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from patterndsl.composite import Composite
from patterndsl.decoding import BACKENDS, Cache
from patterndsl.diagnostics import input_error
from patterndsl.functional import attention
from patterndsl.pattern import Pattern
from patterndsl.runtime.data import Inputs
from patterndsl.source.sequence import Keys

if TYPE_CHECKING:
    from patterndsl.nn.attention import Attention


def is_cached(pattern: Pattern) -> bool:
    """Whether a cache can be the state of a layer by this pattern; whether it is decodable, the cache says."""
    return not isinstance(pattern, Composite) and not pattern.resolved.labels and not pattern.resolved.selections


def start(
    layer: Attention,
    batch: int,
    device: torch.device | str,
    dtype: torch.dtype,
    n: int | None,
    max_queries: int,
) -> Cache:
    """The empty cache of a layer, which decodes by the layer's backend where that is one of a cache's."""
    return Cache(
        layer.pattern,
        batch=batch,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        layer=layer.layer,
        n=n,
        max_queries=max_queries,
        dtype=dtype,
        device=device,
        backend=layer.backend if layer.backend in BACKENDS else "auto",
    )


def check(layer: Attention, cache: Cache, batch: int, *, others: tuple[object, ...], q_start: int) -> None:
    """Raises InputError (E503) where the cache is another layer's or of other rows, (E505) where a call has more than
    tokens."""
    if cache.pattern != layer.pattern:
        raise input_error("E503", "the state is of another pattern", "state = layer.init_state(batch)")
    if (cache.layer, cache.heads, cache.kv_heads) != (layer.layer, layer.heads, layer.kv_heads):
        theirs, ours = (f"layer {x.layer} with {x.heads} heads over {x.kv_heads}" for x in (cache, layer))
        message = f"the state is of {theirs}, and this is {ours}"
        raise input_error("E503", message, "keep a state for each layer: state = layer.init_state(batch)")
    if cache.batch != batch:
        help = f"state = layer.init_state({batch})"
        raise input_error("E503", f"the state is of {cache.batch} batch rows, and x has {batch}", help)
    if q_start or any(item is not None for item in others):
        message = "a call with a cache takes the next tokens alone"
        raise input_error("E505", message, "leave out context, sources, present and q_start: the cache knows the rest")


@torch.no_grad()
def attended(
    cache: Cache, query: Tensor, keys: Keys, inputs: Inputs | None, scale: float | None, backend: str
) -> Tensor:
    """The rows of the next tokens, which the cache then holds: [B, Hq, T, Dv].

    A prompt for an empty cache is one parallel attention, by the backend; tokens that come later are attended as many
    at a time as the cache is made for.
    """
    key, value = keys
    num_tokens = query.shape[2]
    cache.check_next(num_tokens, inputs)  # of all, before any is appended
    if not any(cache.lengths) and num_tokens > cache.max_queries:
        given = _up_to(cache.n, inputs)
        at, n = cache.layer, cache.n
        out = attention(query, key, value, cache.pattern, inputs=given, layer=at, n=n, scale=scale, backend=backend)
        cache.append(key, value, inputs=inputs)
        return out
    parts = []
    for start in range(0, num_tokens, cache.max_queries):
        here = slice(start, min(num_tokens, start + cache.max_queries))
        cache.append(key[:, :, here], value[:, :, here], inputs=_at(inputs, here))
        parts.append(cache.attend(query[:, :, here], scale=scale))
    return torch.cat(parts, 2) if parts else query


def _up_to(n: int | None, inputs: Inputs | None) -> Inputs | None:
    """Inputs of all positions, of which the later ones are not known and do not matter."""
    if inputs is None or n is None:
        return inputs
    return {name: pad(x, (0, n - x.shape[-1])) for name, x in inputs.items()}


def _at(inputs: Inputs | None, tokens: slice) -> Inputs | None:
    return None if inputs is None else {name: x[..., tokens] for name, x in inputs.items()}
