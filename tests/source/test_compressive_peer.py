"""Compressive attention beside compressive-transformer-pytorch: outputs, gradients, memories and losses with the same
weights where both mean the same, and where not, what theirs does that ours must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patterndsl
from patterndsl.nn import Attention
from tests.peers import (
    BATCH,
    DIM,
    HEADS,
    D,
    Weights,
    assert_same,
    by_head,
    called,
    example,
    layer_of,
    projections,
    seeded,
    states,
)


@pytest.fixture
def compressive() -> Any:
    return pytest.importorskip("compressive_transformer_pytorch.compressive_transformer_pytorch")


def by_number(memory: int, compressed: int, segment: int, rate: int) -> patterndsl.Pattern:
    """compressive.yaml with a vector for each distance, where compressed states are one key apart, as theirs are, and
    not `rate` positions. Distances are in parts of a key, so that each token of a compressed state has another."""
    pattern = str(example("sources/compressive", memory=memory, compressed=compressed, rate=rate))
    size = rate * (memory + compressed + segment)
    forgotten = "max(0 - memory - k, 0)"
    distance = f"rate * (q - max(k, 0 - memory)) + {forgotten} + min({forgotten}, 1) * (rate - 1)"
    return patterndsl.parse(pattern.replace("sinusoids", f"vectors({size})").replace("q - k", distance))


def of_compressive(theirs: Any) -> tuple[Attention, Weights, Tensor]:
    """A layer, its weights and among them the vectors of distances."""
    key, value = theirs.to_kv.weight.chunk(2)
    weights = projections(theirs.to_q.weight, key, value, theirs.to_out)
    weights |= {f"sources.old.conv.{name}": x for name, x in theirs.compress_mem_fn.conv.named_parameters()}
    rate = theirs.cmem_ratio
    layer = layer_of(by_number(theirs.mem_len, theirs.cmem_len, theirs.seq_len, rate))
    near = states(HEADS, rate * (theirs.mem_len + theirs.cmem_len + theirs.seq_len), D)
    return layer, {**weights, "tables.r.weight": near}, near


def step(theirs: Any, near: Tensor, x: Tensor, memories: Any) -> tuple[Tensor, Any, Tensor]:
    """A segment of theirs, and the memories without gradient, as their model passes them on."""
    out, memories, loss = theirs(x, memories, near[:, :: theirs.cmem_ratio].flip(1))
    return out, tuple(x.detach() for x in memories), loss


@pytest.mark.parametrize(("memory", "compressed"), [(4, 3), (4, 5), (6, 1)])
@pytest.mark.parametrize("rate", [1, 2])
def test_compressive_transformer(compressive: Any, memory: int, compressed: int, rate: int) -> None:
    """Segments as long as it asks for, and a rate that divides what is forgotten."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, memory, compressed, rate, HEADS).eval()
    x = states(BATCH, 24, DIM)
    layer, weights, near = of_compressive(theirs)
    leaves = [x, near, theirs.to_q.weight, theirs.to_kv.weight, *theirs.to_out.parameters()]
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for segment in x.split(4, 1):
        ours, state = called(layer, weights, segment, state)
        out, memories, _ = step(theirs, near, segment, memories)
        assert_same(ours, out, leaves)
        for mine, other in zip((state.recalled["past"], state.compressed["old"]), memories, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)
    assert state.compressed["old"].shape[1] == compressed


def test_the_reconstruction_loss_of_compressive_transformer(compressive: Any) -> None:
    """The same where a segment forgets all of the memory."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, 4, 5, 2, HEADS)
    x = states(BATCH, 16, DIM)
    layer, weights, near = of_compressive(theirs)
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for at, segment in enumerate(x.split(4, 1)):
        _, state = called(layer, weights, segment, state)
        _, memories, loss = step(theirs, near, segment, memories)
        if at:
            assert_same(layer.losses["old"], loss, list(theirs.compress_mem_fn.parameters()))


def test_compressive_transformer_compares_compressed_states_with_the_whole_memory(compressive: Any) -> None:
    """Also with what is not yet forgotten, where the memory is longer than a segment."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, 8, 5, 2, HEADS)
    x = states(BATCH, 12, DIM)
    layer, weights, near = of_compressive(theirs)
    query, key, value = (weights[f"{name}_projection.weight"].detach() for name in ("query", "key", "value"))
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for segment in x.split(4, 1):
        _, state = called(layer, weights, segment, state)
        _, memories, loss = step(theirs, near, segment, memories)

    def read(old: Tensor) -> Tensor:
        asked = by_head(x[:, 8:].detach(), query)
        found: Tensor = nn.functional.scaled_dot_product_attention(asked, by_head(old, key), by_head(old, value))
        return found

    old, conv = x[:, :8].detach(), theirs.compress_mem_fn
    of_forgotten, of_all = ((read(part) - read(conv(old[:, :4]))).square().mean() for part in (old[:, :4], old))
    assert_same(layer.losses["old"], of_forgotten, list(conv.parameters()))
    assert_same(loss, of_all, list(conv.parameters()))
    assert (of_all - of_forgotten).abs() > 1e-3


def test_compressive_transformer_drops_tokens_that_the_rate_does_not_divide(compressive: Any) -> None:
    """It puts as many zeros before as the remainder is, and not what is missing: of 4 by a rate of 3 the last two are
    lost, and a zero is compressed with the first two. Ours compresses three, and the fourth waits for the next two."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, 4, 5, 3, HEADS).eval()
    x = states(BATCH, 12, DIM).detach()
    layer, weights, near = of_compressive(theirs)
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for segment in x.split(4, 1):
        _, state = called(layer, weights, segment, state)
        _, memories, _ = step(theirs, near, segment, memories)
    zero, conv = torch.zeros(BATCH, 1, DIM, dtype=torch.float64), theirs.compress_mem_fn
    padded = [torch.cat([zero, x[:, start : start + 2]], 1) for start in (0, 4)]
    torch.testing.assert_close(memories[1], conv(torch.cat(padded, 1)).detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state.compressed["old"], conv(x[:, :6]).detach(), atol=1e-12, rtol=1e-12)
    assert torch.equal(state.waiting["old"], x[:, 6:8])


def test_compressive_transformer_forgets_short_segments(compressive: Any) -> None:
    """What is shorter than the length that it is made for is not remembered; by ours it is, whatever its length."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, 4, 5, 2, HEADS).eval()
    x = states(BATCH, 7, DIM)
    layer, weights, near = of_compressive(theirs)
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for segment in x.split([3, 4], 1):
        ours, state = called(layer, weights, segment, state)
        out, memories, _ = step(theirs, near, segment, memories)
    assert torch.equal(out, step(theirs, near, x[:, 3:], None)[0])
    assert (ours - out).abs().max() > 1e-2
    remembered, *_ = step(theirs, near, x[:, 3:], (x[:, :3].detach(), None))
    torch.testing.assert_close(ours, remembered, atol=1e-9, rtol=1e-9)


def test_compressive_transformer_stops_training_keys_and_values(compressive: Any) -> None:
    """By the first segment that compresses: the weight is taken from the graph for the loss, and stays out of it."""
    theirs = seeded(compressive.SelfAttention, DIM, 4, 4, 5, 2, HEADS)
    x = states(BATCH, 12, DIM)
    layer, weights, near = of_compressive(theirs)
    layer.load_state_dict({name: x.detach() for name, x in weights.items()})
    state: Any = layer.init_state(BATCH)
    memories: Any = None
    for segment in x.split(4, 1):
        ours, state = layer(segment, state)
        out, memories, loss = step(theirs, near, segment, memories)
        (ours.square().mean() + sum(layer.losses.values())).backward()
        (out.square().mean() + loss).backward()
    weight = theirs.to_kv.weight
    assert not weight.requires_grad
    early = weight.grad.clone()
    theirs.zero_grad(set_to_none=True)
    layer.zero_grad(set_to_none=True)
    ours, state = layer(x[:, :4], state)
    out, *_ = step(theirs, near, x[:, :4], memories)
    ours.square().mean().backward()
    out.square().mean().backward()
    assert early.any()
    assert weight.grad is None
    for module in (layer.key_projection, layer.value_projection):
        assert module.weight.grad is not None and module.weight.grad.any()


def test_compressive_transformer_moves_distances_while_memories_fill(compressive: Any) -> None:
    """The reason why its attention stands here and not its model. That takes the front of its table, as long as there
    are keys, whose last vector is for distance 0: another one in each segment until memories are full."""
    model = seeded(compressive.CompressiveTransformer, 5, DIM, 4, 1, mem_len=4, cmem_len=4, cmem_ratio=2, heads=HEADS)
    taken: list[Tensor] = []
    attention = model.attn_layers[0].fn.fn
    attention.register_forward_pre_hook(lambda _, __, options: taken.append(options["pos_emb"]), with_kwargs=True)
    with torch.no_grad():
        model.pos_emb.copy_(torch.arange(12)[None, :, None].expand(HEADS, -1, D))
    tokens, memories = torch.zeros(BATCH, 4, dtype=torch.long), None
    for _ in range(4):
        _, memories, _ = model(tokens, memories)
    newest = [int(vectors[0, -1, 0]) for vectors in taken]
    assert newest == [3, 7, 9, 11]
