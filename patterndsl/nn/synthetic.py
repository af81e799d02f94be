"""What could a call of a pattern look like? Tensors that an initialised layer makes of random states, for trials."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from patterndsl.composite import Composite
from patterndsl.nn.attention import Attention
from patterndsl.pattern import Pattern
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.tensors import Shape, Tensors, check_memory, dtype_of
from patterndsl.sema.parameters import Sizes
from patterndsl.source.state import State


@torch.no_grad()
def synthetic(
    pattern: Pattern, sizes: Sizes, shape: Shape, inputs: Inputs | None, *, layer: int, seed: int
) -> tuple[Tensors, Inputs | None]:
    """All tensors of a call, and its inputs with what learners of a layer say; the same for one seed.

    A layer of width heads x head_dim is initialised and made a call to, in float32 on the host: states are normal
    deviates, those of earlier segments, as many as are remembered, and of other sequences too. Parameters that start at
    0, which would hide what they are for, are normal deviates. Raises PatternError: E4xx where sources do not fit,
    E503, E504.
    """
    dim = shape.heads * shape.head_dim
    check_memory(4 * shape.batch * (sizes.q_len + sizes.kv_len) * 6 * dim, shape.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads, head_dim = shape.heads, shape.head_dim
        made = Attention(pattern, dim, heads, kv_heads=shape.kv_heads, head_dim=head_dim, layer=layer).eval()
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(std=math.sqrt(1 / dim))
        own = torch.randn(shape.batch, sizes.q_len, dim)
        is_itself = sizes.q_len == sizes.kv_len and not sizes.q_start
        context = None if is_itself else torch.randn(shape.batch, sizes.kv_len, dim)
        others = {
            item.name: torch.randn(shape.batch, _num_keys(pattern, item.name, sizes), dim)
            for item in made.sources.of_kind("cross")
        }
        host = None if inputs is None else {name: x.cpu() for name, x in inputs.items()}
        state = _remembered(made, shape.batch) if made.sources.is_recurrent else None
        call = made.prepared(own, context, state, inputs=host, sources=others, q_start=sizes.q_start)
    tensors = Tensors(call.query, *call.keys, call.learned.tensors())
    found = None if call.inputs is None else {name: x.to(shape.device) for name, x in call.inputs.items()}
    # views of one product each become tensors of their own, as random ones are
    return tensors.each(lambda x: x.contiguous().to(shape.device, dtype_of(shape.dtype))), found


def _num_keys(pattern: Pattern, source: str, sizes: Sizes) -> int:
    assert isinstance(pattern, Composite)
    return pattern.num_keys(source, sizes.total)


def _remembered(layer: Attention, batch: int) -> State:
    """As many states of earlier segments as the layer remembers."""
    empty = layer.init_state(batch)
    assert isinstance(empty, State)

    def drawn(kind: str) -> dict[str, Tensor]:
        return {
            item.name: torch.randn(batch, int(item.settings["size"]), layer.dim) for item in layer.sources.of_kind(kind)
        }

    return replace(empty, recalled=drawn("recall"), compressed=drawn("compress"))
