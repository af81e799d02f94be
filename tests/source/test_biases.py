"""What is added to scores, as loops over positions: outputs and gradients in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.nn import Attention
from patterndsl.runtime.scored import sinusoids

DIM, HEADS, KV_HEADS = 12, 4, 2
D = DIM // HEADS


def layer_of(pattern: Any, **options: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(pattern, DIM, HEADS, kv_heads=KV_HEADS, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def states(length: int) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)


def assert_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    torch.manual_seed(1)
    weight = torch.randn_like(ours)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    found, expected = (torch.autograd.grad((x * weight).sum(), leaves, **options) for x in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def by_pairs(layer: Attention, x: Tensor, keep: Any, extra: Any, cap: float | None = None, start: int = 0) -> Tensor:
    """keep(h, i, j) and extra(h, i, j, query, key), a term that stands beside query key, both over the root of D; or a
    pair of it and what is added as it is. Queries are those from `start` on."""
    rows = []
    for b in range(x.shape[0]):
        query, key, value = (
            (x[b] @ module.weight.T + module.bias).view(x.shape[1], -1, D)
            for module in (layer.query_projection, layer.key_projection, layer.value_projection)
        )
        out = []
        for i in range(start, x.shape[1]):
            heads = []
            for h in range(HEADS):
                kept = [j for j in range(x.shape[1]) if keep(h, i, j)]
                scores = []
                for j in kept:
                    q, k = query[i, h], key[j, h // 2]
                    inside, beside = extra(h, i, j, q, k)
                    score = (q @ k + inside) / math.sqrt(D)
                    score = score if cap is None else cap * torch.tanh(score / cap)
                    scores.append(score + beside)
                weights = torch.stack(scores).softmax(0)
                heads.append(sum((w * value[j, h // 2] for w, j in zip(weights, kept, strict=True)), torch.zeros(D)))
            out.append(torch.cat(heads) @ layer.output_projection.weight.T + layer.output_projection.bias)
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 7, 20])
def test_alibi(n: int) -> None:
    layer, x = layer_of(patterndsl.load("examples/sources/alibi.yaml").with_params(halvings=4)), states(n)

    def extra(h: int, i: int, j: int, q: Tensor, k: Tensor) -> tuple[float, float]:
        return 0.0, -(i - j) * 2.0 ** (-2 * (h + 1))

    assert_gradients(layer(x), by_pairs(layer, x, lambda h, i, j: j <= i, extra), [x, *layer.parameters()])


@pytest.mark.parametrize("n", [1, 7, 20])
def test_shaw(n: int) -> None:
    """A vector for each clipped distance meets the query (Shaw et al. 2018, equation 5)."""
    text = """
        params: {c: 3}
        tables: {near: vectors(2 * c + 1)}
        attend: window(5)
        bias: near[max(-c, min(q - k, c)) + c]
    """
    layer, x = layer_of(text), states(n)
    vectors: Any = layer.tables["near"].weight

    def extra(h: int, i: int, j: int, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
        return q @ vectors[h, max(-3, min(i - j, 3)) + 3], 0.0

    assert_gradients(layer(x), by_pairs(layer, x, lambda h, i, j: abs(i - j) <= 5, extra), [x, *layer.parameters()])


def test_buckets_are_those_of_t5() -> None:
    """Against transformers' own function, both sides and far beyond the longest distance."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    n, heads = 300, 2
    program: Any = patterndsl.load("examples/sources/t5.yaml").compile(n, heads=heads)
    table = torch.arange(heads * 32, dtype=torch.float64).view(heads, 32) / 64
    distance = torch.arange(n)[None] - torch.arange(n)[:, None]
    buckets = t5.T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    query, key, value = (torch.randn(1, heads, n, 4, dtype=torch.float64) for _ in range(3))
    ours = program(query, key, value, tables={"near": table}, scale=1.0)
    expected = (query @ key.transpose(-1, -2) + table[:, buckets]).softmax(-1) @ value
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layer_number", [0, 1])
def test_a_cap_of_scores(layer_number: int) -> None:
    pattern = patterndsl.load("examples/sources/gemma-2.yaml").with_params(w=3)
    layer, x = layer_of(str(pattern).replace("50.0", "0.7"), layer=layer_number), states(9)

    def keep(h: int, i: int, j: int) -> bool:
        return j <= i and (i - j < 3 or layer_number == 1)

    loops = by_pairs(layer, x, keep, lambda *_: (0.0, 0.0), cap=0.7)
    assert_gradients(layer(x), loops, [x, *layer.parameters()])


def relative(layer: Attention) -> Any:
    """Terms b, c and d of Transformer-XL."""
    table: Any = layer.tables["r"]

    def extra(h: int, i: int, j: int, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
        angles = torch.tensor([(i - j) * 10_000 ** (-2 * c / DIM) for c in range(DIM // 2)], dtype=torch.float64)
        r = torch.cat([angles.sin(), angles.cos()])
        return table.u[h] @ k + (q + table.v[h]) @ (table.weight[h] @ r), 0.0

    return extra


@pytest.mark.parametrize("name", ["transformer-xl", "transformer-xl-same-length"])
@pytest.mark.parametrize("lengths", [[5], [4, 4], [3, 6, 2]], ids=str)
def test_transformer_xl(name: str, lengths: list[int]) -> None:
    """Each segment beside the states before it, whose gradient is stopped."""
    m = 4
    layer, x = layer_of(patterndsl.load(f"examples/sources/{name}.yaml").with_params(m=m)), states(sum(lengths))
    state, found, expected = layer.init_state(2), [], []
    for segment, stop in zip(x.split(lengths, 1), torch.tensor(lengths).cumsum(0).tolist(), strict=True):
        out, state = layer(segment, state)
        found.append(out)
        start = stop - segment.shape[1]
        past = x[:, max(0, start - m) : start].detach()

        def keep(h: int, i: int, j: int) -> bool:
            return j <= i and ("same" not in name or i - j < m)

        joined = torch.cat([past, segment], 1)
        expected.append(by_pairs(layer, joined, keep, relative(layer), start=past.shape[1]))
    assert_gradients(torch.cat(found, 1), torch.cat(expected, 1), [x, *layer.parameters()])


@pytest.mark.parametrize("seed", range(3))
def test_sums_over_all_pairs_are_as_exact_as_dense_ones(seed: int) -> None:
    """In float32 what is learned for all keys alike: its gradient is small beside what it is a sum of."""
    n, width = 600, 64
    program: Any = patterndsl.parse("tables: {r: sinusoids}\nbias: r[q - k]\nattend: causal").compile(n, heads=2)
    torch.manual_seed(seed)
    shapes = ((1, 2, n, width),) * 3 + ((2, width, width), (2, width), (2, width))
    leaves = [torch.randn(shape, dtype=torch.float64) * (1.0 if len(shape) == 4 else 0.1) for shape in shapes]
    upstream = torch.randn(1, 2, n, width, dtype=torch.float64)

    def dense(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        rows = torch.einsum("hdc,sc->hsd", weight, sinusoids(torch.arange(n), width).to(weight.dtype))
        at = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).expand(1, 2, n, n)
        near = torch.einsum("bhqd,hsd->bhqs", query + v[:, None], rows).gather(-1, at)
        scores = ((query + u[:, None]) @ key.mT + near) * width**-0.5
        return scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1) @ value

    def ours(query: Tensor, key: Tensor, value: Tensor, *table: Tensor) -> Tensor:
        return program(query, key, value, tables={"r": table})

    def gradient(attend: Any, dtype: torch.dtype) -> Tensor:
        mine = [x.to(dtype).requires_grad_() for x in leaves]
        return torch.autograd.grad(attend(*mine), mine[4], upstream.to(dtype))[0].double()

    exact = gradient(dense, torch.float64)
    found, expected = ((gradient(attend, torch.float32) - exact).abs().max() for attend in (ours, dense))
    assert found <= 2 * expected


def test_enough_memory_is_full_causal_attention() -> None:
    """With the same relative scores, exactly."""
    layer = layer_of(patterndsl.load("examples/sources/transformer-xl.yaml").with_params(m=20))
    whole = Attention("tables: {r: sinusoids}\nbias: r[q - k]\nattend: causal", DIM, HEADS, kv_heads=KV_HEADS).double()
    whole.load_state_dict(layer.state_dict())
    x, state, found = states(17), layer.init_state(2), []
    for segment in x.split([3, 6, 1, 7], 1):
        out, state = layer(segment, state)
        found.append(out)
    torch.testing.assert_close(torch.cat(found, 1), whole(x), atol=1e-12, rtol=1e-12)


def test_a_bias_of_inputs_and_of_a_source() -> None:
    """Positions of pooled keys are those of their last tokens, and inputs are read there."""
    text = """
        inputs: {doc: "int[N]"}
        sources: {past: pool(3)}
        attend: {self: recent(3), past: causal}
        bias: (q.doc - k.doc) / 10 - abs(q - k) / 4
    """
    layer, n = layer_of(text), 11
    x, doc = states(n), torch.randint(0, 5, (11,))
    means = x[:, :9].view(2, 3, 3, DIM).mean(2)
    joined = torch.cat([x, means], 1)
    position = [*range(n), 2, 5, 8]

    def keep(h: int, i: int, j: int) -> bool:
        return 0 <= i - j < 3 if j < n else position[j] <= i

    def extra(h: int, i: int, j: int, q: Tensor, k: Tensor) -> tuple[float, float]:
        if i >= n:  # a row of the pooled keys, which is thrown away
            return 0.0, 0.0
        at = position[j]
        return 0.0, (int(doc[i]) - int(doc[at])) / 10 - abs(i - at) / 4

    loops = by_pairs(layer, joined, lambda h, i, j: i < n and keep(h, i, j) if i < n else j == i, extra)[:, :n]
    assert_gradients(layer(x, inputs={"doc": doc}), loops, [x, *layer.parameters()])


def test_empty_rows_and_no_keys() -> None:
    layer = layer_of("attend: k < q\nbias: -(q - k) / 2")
    x = states(3)
    out = layer(x)
    torch.testing.assert_close(out[:, 0], layer.output_projection.bias.expand(2, -1))
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    assert layer(states(0)).shape == (2, 0, DIM)
