"""Scores that sum features or are made up, as layers: loops over pairs, outputs and gradients in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl import PatternError, Proven
from patterndsl.nn import Attention

DIM, HEADS, KV_HEADS = 12, 4, 2
D = DIM // HEADS


def layer_of(pattern: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(pattern, DIM, HEADS, kv_heads=KV_HEADS).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def states(length: int) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)


def projected(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, D] each of x [T, dim]."""
    found = [
        module(x).view(x.shape[0], -1, D)
        for module in (layer.query_projection, layer.key_projection, layer.value_projection)
    ]
    return found[0], found[1], found[2]


def by_weights(
    layer: Attention,
    x: Tensor,
    weight: Callable[..., Tensor],
    keep: Callable[[int, int], bool],
    feature: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Weights of pairs, divided by their sum: weight(b, h, i, j, query, key). feature: of each channel of these two."""
    out = []
    for b in range(x.shape[0]):
        query, key, value = projected(layer, x[b])
        query, key = feature(query), feature(key)
        rows = []
        for i in range(x.shape[1]):
            heads = []
            for h in range(HEADS):
                kept = [j for j in range(x.shape[1]) if keep(i, j)]
                if not kept:
                    heads.append(torch.zeros(D, dtype=torch.float64))
                    continue
                weights = torch.stack([weight(b, h, i, j, query[i, h], key[j, h // 2]) for j in kept])
                heads.append(weights @ value[kept, h // 2] / weights.sum())
            rows.append(torch.cat(heads) @ layer.output_projection.weight.T + layer.output_projection.bias)
        out.append(torch.stack(rows))
    return torch.stack(out)


def assert_same(layer: Attention, x: Tensor, ours: Tensor, loops: Tensor) -> None:
    torch.testing.assert_close(ours, loops, atol=1e-9, rtol=1e-9)
    leaves = [x, *layer.parameters()]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    torch.manual_seed(1)
    weight = torch.randn_like(ours)
    found, expected = (torch.autograd.grad((y * weight).sum(), leaves, **options) for y in (ours, loops))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


REACHES: dict[str, Callable[[int, int], bool]] = {"causal": lambda i, j: j <= i, "all": lambda i, j: True}


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("n", [1, 2, 7, 70])
def test_linear_transformer(reach: str, n: int) -> None:
    text = str(patterndsl.load("examples/sources/linear-transformer.yaml")).replace("causal", reach)
    layer, x = layer_of(text), states(n)
    loops = by_weights(layer, x, lambda b, h, i, j, q, k: q @ k, REACHES[reach], elu)
    assert_same(layer, x, layer(x), loops)


@pytest.mark.parametrize("form", ["positive", "hyperbolic"])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("n", [1, 7, 12])
def test_performer(form: str, reach: str, n: int) -> None:
    """With the directions that the layer has drawn."""
    layer, x = layer_of(f"score: favor(10, form = {form})\nattend: {reach}"), states(n)
    drawn: Any = layer.scores["only_"]
    w = drawn.directions.double()
    assert w.shape == (5 if form == "hyperbolic" else 10, D)

    def features(y: Tensor) -> Tensor:
        y = y * D**-0.25
        along = w @ y
        along = torch.cat([along, -along]) if form == "hyperbolic" else along
        return (along - y @ y / 2).exp() / math.sqrt(10)

    loops = by_weights(layer, x, lambda b, h, i, j, q, k: features(q) @ features(k), REACHES[reach])
    assert_same(layer, x, layer(x), loops)


def test_relu() -> None:
    layer, x = layer_of("score: relu\nattend: causal"), states(9)

    def weight(b: int, h: int, i: int, j: int, q: Tensor, k: Tensor) -> Tensor:
        return (q.clamp(min=0) + 1e-3) @ (k.clamp(min=0) + 1e-3)

    assert_same(layer, x, layer(x), by_weights(layer, x, weight, REACHES["causal"]))


def test_directions_are_drawn_anew_in_training_alone() -> None:
    layer = Attention("score: favor(8, redraw = 2)\nattend: causal", DIM, HEADS)
    drawn: Any = layer.scores["only_"]
    seen = []
    for _ in range(5):
        layer(torch.randn(1, 3, DIM))
        seen.append(drawn.directions.clone())
    other: Any = Attention("score: favor(8)\nattend: all", DIM, HEADS).scores["only_"]
    assert torch.equal(seen[0], other.directions)
    assert [torch.equal(a, b) for a, b in pairwise(seen)] == [False, True, False, True]
    layer.eval()
    layer(torch.randn(1, 3, DIM))
    assert torch.equal(drawn.directions, seen[-1])


@pytest.mark.parametrize("score", ["elu", "relu", "favor(12)"])
@pytest.mark.parametrize("lengths", [[1] * 9, [4, 3, 2], [0, 9]], ids=str)
def test_step_by_step_is_all_at_once(score: str, lengths: list[int]) -> None:
    layer, x = layer_of(f"score: {score}\nattend: causal"), states(9)
    state, found = layer.init_state(2), []
    for segment in x.split(lengths, 1):
        out, state = layer(segment, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), layer(x), atol=1e-12, rtol=1e-12)


def test_a_state_has_no_gradient() -> None:
    layer, x = layer_of("score: elu\nattend: causal"), states(6)
    out, state = layer(x[:, :3], layer.init_state(2))
    out.sum().backward()
    layer(x[:, 3:], state)[0].sum().backward()
    assert not state.sums[""].numerator.requires_grad


def test_memory_beside_a_causal_sum_is_no_part_of_the_state() -> None:
    text = "sources: {rows: memory(3)}\nscore: elu\nattend: {self: causal, rows: all}"
    layer, x = layer_of(text), states(8)
    memory: Any = layer.sources["rows"]
    state, found = layer.init_state(2), []
    for segment in x.split([3, 1, 4], 1):
        out, state = layer(segment, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), layer(x), atol=1e-12, rtol=1e-12)
    joined = torch.cat([memory.rows.expand(2, -1, -1), x], 1)

    def keep(i: int, j: int) -> bool:
        return i >= 3 and j <= i

    loops = by_weights(layer, joined, lambda b, h, i, j, q, k: elu(q) @ elu(k), keep)[:, 3:]
    assert_same(layer, x, layer(x), loops)


def test_conditions_on_keys() -> None:
    """Padding and classes of keys take no part; a row without keys is 0."""
    text = 'inputs: {there: "bool[Nk]"}\nscore: elu\nattend: causal & k.there & k % 3 != 1'
    layer, x = layer_of(text), states(9)
    there = torch.tensor([[False, True, True, True, False, True, True, True, True], [True] * 8 + [False]])
    ours = layer(x, inputs={"there": there})

    def of_row(b: int) -> Tensor:
        def is_attended(i: int, j: int) -> bool:
            return j <= i and bool(there[b, j]) and j % 3 != 1

        return by_weights(layer, x[b : b + 1], lambda _, h, i, j, q, k: elu(q) @ elu(k), is_attended)

    loops = torch.cat([of_row(b) for b in range(2)])
    assert_same(layer, x, ours, loops)


@pytest.mark.parametrize("name", ["synthesizer-dense", "synthesizer-random", "synthesizer-factored"])
@pytest.mark.parametrize("n", [1, 5, 12])
def test_synthesizers(name: str, n: int) -> None:
    pattern: Any = patterndsl.load(f"examples/sources/{name}.yaml").with_params(longest=12)
    layer, x = layer_of(pattern), states(n)
    module: Any = layer.scores["only_"]

    def dense(m: Any, b: int, h: int, i: int, j: int) -> Tensor:
        hidden = (x[b, i] @ m.first.weight[h] + m.first.bias[h, 0]).relu()
        return hidden @ m.second.weight[h][:, j] + m.second.bias[h, 0, j]

    def factored_dense(m: Any, b: int, h: int, i: int, j: int) -> Tensor:
        a = x[b, i] @ m.inner.weight[h] + m.inner.bias[h, 0]
        c = x[b, i] @ m.outer.weight[h] + m.outer.bias[h, 0]
        return a[j % 3] * c[j // 3]

    def weight(b: int, h: int, i: int, j: int, q: Tensor, k: Tensor) -> Tensor:
        if name == "synthesizer-dense":
            score = dense(module, b, h, i, j)
        elif name == "synthesizer-random":
            score = module.weight[h, i, j]
        else:
            first, second = module.made.members
            shares, outer = module.made.weight.softmax(0), module.weight.softmax(0)
            made = shares[0] * factored_dense(first, b, h, i, j) + shares[1] * (
                second.rows[h, i] @ second.columns[h, j]
            )
            score = outer[0] * (q @ k) / math.sqrt(D) + outer[1] * made
        return score.exp()

    assert_same(layer, x, layer(x), by_weights(layer, x, weight, REACHES["causal"]))


def test_a_window_and_sums() -> None:
    layer, x = layer_of(patterndsl.load("examples/sources/window-and-sums.yaml").with_params(w=3)), states(9)
    assert layer.gate is not None
    near = by_weights(layer, x, lambda b, h, i, j, q, k: ((q @ k) / math.sqrt(D)).exp(), lambda i, j: 0 <= i - j < 3)
    far = by_weights(layer, x, lambda b, h, i, j, q, k: elu(q) @ elu(k), REACHES["causal"])
    gates = (x @ layer.gate.weight.T + layer.gate.bias).sigmoid().view(2, 9, HEADS, 2).repeat_interleave(D, 2)
    weight, bias = layer.output_projection.weight, layer.output_projection.bias
    near, far = (
        (part - bias) @ torch.linalg.inv(weight.T) for part in (near, far)
    )  # what stands before the projection
    loops = (gates[..., 0] * near + gates[..., 1] * far) @ weight.T + bias
    torch.testing.assert_close(layer(x), loops, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("attend", ["recent(8)", "block(4)", "causal & (recent(3) | first(2))", "head == 0 & causal"])
def test_what_cannot_be_summed_is_refused(attend: str) -> None:
    with pytest.raises(PatternError, match="E211"):
        patterndsl.parse(f"score: elu\nattend: {attend}")


@pytest.mark.parametrize("attend", ["q >= k", "causal & all", "window(q, 0)", "causal | k < 0"])
def test_what_says_the_same_as_causal_is_summed(attend: str) -> None:
    pattern: Any = patterndsl.parse(f"score: elu\nattend: {attend}")
    assert pattern.terms[0].summable.reach == "causal"
    assert isinstance(pattern.prove("causal"), Proven)


def test_a_prime_length_has_no_factors() -> None:
    with pytest.raises(PatternError, match="prime"):
        Attention("score: synthesize(factored_dense, length = 13)\nattend: all", DIM, HEADS)


def test_no_state_where_keys_are_kept_otherwise() -> None:
    layer = layer_of(patterndsl.load("examples/sources/window-and-sums.yaml"))
    with pytest.raises(PatternError, match="E505"):
        layer.init_state(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_directions_stay_exact_whatever_the_layer_is_of(dtype: torch.dtype) -> None:
    """Rounded ones are not orthogonal any more."""
    layer = Attention("score: favor(8, redraw = 2)\nattend: causal", 16, 2)
    drawn: Any = layer.scores["only_"]
    before = drawn.directions.clone()
    layer.to(dtype)
    assert drawn.directions.dtype == torch.float32 and torch.equal(drawn.directions, before)
    for _ in range(2):
        layer(torch.randn(1, 3, 16, dtype=dtype))
    after = drawn.directions
    assert after.dtype == torch.float32 and not torch.equal(after, before)
    products = after @ after.mT
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-5, rtol=0)
    layer.to("meta")
    assert drawn.directions.is_meta
    assert layer.to_empty(device="cpu") is layer and drawn.directions.device.type == "cpu"


@pytest.mark.parametrize("score", ["elu", "relu", "linear", "favor(6)"])
@pytest.mark.parametrize("reach", REACHES)
def test_no_tokens_have_gradients_of_no_numbers(score: str, reach: str) -> None:
    """Zeros, and not None, which other code would trip over."""
    tensors = [torch.zeros(1, 2, 0, D, requires_grad=True) for _ in range(3)]
    query, key, value = tensors
    out = patterndsl.attention(query, key, value, f"score: {score}\nattend: {reach}")
    grads = torch.autograd.grad(out.sum(), tensors)
    assert [grad.shape for grad in grads] == [x.shape for x in tensors]
    layer = layer_of(f"score: {score}\nattend: {reach}")
    layer(torch.zeros(2, 0, DIM, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_state_of_sums_is_of_one_pattern_and_layer() -> None:
    x = states(3)
    _, state = (layer := layer_of("score: linear\nattend: causal"))(x, layer.init_state(2))
    with pytest.raises(PatternError, match=r"E503.*the state is of another pattern"):
        layer_of("score: elu\nattend: causal")(x, state)
    with pytest.raises(PatternError, match=r"E503.*the state is of layer 0, and this is layer 1"):
        Attention("score: linear\nattend: causal", DIM, HEADS, kv_heads=KV_HEADS, layer=1).double()(x, state)
    with pytest.raises(PatternError, match=r"E505.*n and max_queries are of a cache"):
        layer.init_state(2, max_queries=4)
    with pytest.raises(PatternError, match=r"E505.*n and max_queries are of a cache"):
        layer.init_state(2, n=64)


def test_what_is_wrong_with_a_decay_is_said_of_a_decay() -> None:
    for text in ("log(0)", "1 / 0"):
        with pytest.raises(PatternError) as found:
            patterndsl.parse(f"score: linear(decay = {text})\nattend: causal")
        assert "bias" not in str(found.value)
