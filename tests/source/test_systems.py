"""Systems whose keys are no tokens, as loops over positions: outputs and gradients of layers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.nn import Attention

FOLDER = Path(__file__).parents[2] / "examples" / "sources"
DIM, HEADS, KV_HEADS = 12, 4, 2
D = DIM // HEADS
Row = list[tuple[Tensor, Tensor]]
"""Keys and values that one query of one head and batch row attends, each [D]."""


def layer_of(name: str, **params: int) -> Attention:
    torch.manual_seed(len(name))
    pattern = patterndsl.load(FOLDER / f"{name}.yaml").with_params(**params)
    layer = Attention(pattern, DIM, HEADS, kv_heads=KV_HEADS).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def source(layer: Attention, name: str) -> Any:
    """The module of a source."""
    return layer.sources[name]


def states(length: int, batch: int = 2) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)


def linear(module: Any, x: Tensor, heads: int) -> Tensor:
    """[T, heads, D] of [T, dim], by the definition of a linear map."""
    return (x @ module.weight.T + module.bias).view(x.shape[0], heads, D)


def softmax_row(query: Tensor, row: Row) -> Tensor:
    if not row:
        return torch.zeros_like(query)
    scores = [(query * key).sum() / math.sqrt(D) for key, _ in row]
    highest = max(score.item() for score in scores)
    weights = [(score - highest).exp() for score in scores]
    total = sum(weights[1:], weights[0])
    return sum((w * value for w, (_, value) in zip(weights, row, strict=True)), torch.zeros_like(query)) / total


def by_loops(layer: Attention, x: Tensor, rows: Callable[[int, int, int], list[Row]]) -> Tensor:
    """rows: for batch row, query head and position, what each branch attends; branches are weighted by gates."""
    found = []
    for b in range(x.shape[0]):
        queries = linear(layer.query_projection, x[b], HEADS)
        out = []
        for i in range(x.shape[1]):
            heads = []
            for h in range(HEADS):
                parts = [softmax_row(queries[i, h], row) for row in rows(b, h, i)]
                if layer.gate is not None:
                    gates = (x[b, i] @ layer.gate.weight.T + layer.gate.bias).sigmoid().view(HEADS, len(parts))
                    parts = [gate * part for gate, part in zip(gates[h], parts, strict=True)]
                heads.append(sum(parts[1:], parts[0]))
            out.append(torch.cat(heads) @ layer.output_projection.weight.T + layer.output_projection.bias)
        found.append(torch.stack(out))
    return torch.stack(found)


def keys_of(layer: Attention, x: Tensor, h: int) -> Row:
    """The keys and values of states [T, dim] for a query head."""
    kv = h // (HEADS // KV_HEADS)
    keys, values = linear(layer.key_projection, x, KV_HEADS), linear(layer.value_projection, x, KV_HEADS)
    return [(keys[j, kv], values[j, kv]) for j in range(x.shape[0])]


def assert_same(layer: Attention, x: Tensor, ours: Tensor, loops: Tensor, *more: Tensor) -> None:
    torch.testing.assert_close(ours, loops, atol=1e-9, rtol=1e-9)
    leaves = [x, *more, *layer.parameters()]
    torch.manual_seed(1)
    weight = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), leaves, allow_unused=True),
        torch.autograd.grad((loops * weight).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if mine is None else mine,
            zero.expand_as(mine) if theirs is None and mine is not None else theirs if theirs is not None else zero,
            atol=1e-9,
            rtol=1e-9,
            check_dtype=False,
        )


def convolved(weight: Tensor, bias: Tensor, window: list[Tensor]) -> Tensor:
    """A convolution at one place: weight [out, in, size], window of vectors [in]."""
    total = bias
    for t, vector in enumerate(window):
        total = total + weight[:, :, t] @ vector
    return total


LENGTHS = (1, 2, 7, 12, 13)


@pytest.mark.parametrize("n", LENGTHS)
def test_memory_compressed(n: int) -> None:
    layer, x, f = layer_of("memory-compressed", f=3), states(n), 3
    conv = source(layer, "summary").conv

    def rows(b: int, h: int, i: int) -> list[Row]:
        blocks = [
            convolved(conv.weight, conv.bias, list(x[b, c * f : (c + 1) * f]))
            for c in range(n // f)
            if (c + 1) * f <= i
        ]
        found = keys_of(layer, x[b], h)[:1]
        return [found + (keys_of(layer, torch.stack(blocks), h) if blocks else [])]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


@pytest.mark.parametrize("n", LENGTHS)
def test_memory_compressed_null(n: int) -> None:
    """Left padding; one convolution for keys and values, each head by itself; a null key and value of each head."""
    layer, x, f = layer_of("memory-compressed-null", f=3), states(n), 3
    conv, null = source(layer, "summary").conv, source(layer, "nothing").rows
    padded = -(-n // f)

    def rows(b: int, h: int, i: int) -> list[Row]:
        kv, own = h // (HEADS // KV_HEADS), keys_of(layer, x[b], h)
        zero = torch.zeros(D, dtype=torch.float64)
        weight, bias = conv.weight[kv * D : (kv + 1) * D], conv.bias[kv * D : (kv + 1) * D]
        row = [(null[0, kv, 0], null[1, kv, 0])]
        for c in range(padded):
            places = [c * f + t - (padded * f - n) for t in range(f)]
            if places[-1] <= i:
                pair = [[own[p][part] if p >= 0 else zero for p in places] for part in range(2)]
                row.append((convolved(weight, bias, pair[0]), convolved(weight, bias, pair[1])))
        return [row]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


@pytest.mark.parametrize("n", LENGTHS)
def test_linformer(n: int) -> None:
    layer, x = layer_of("linformer", low=4, longest=16), states(n)
    e, f = source(layer, "mixtures").weights

    def mixed(weights: Tensor, own: Row, part: int) -> Tensor:
        return sum((weights[j] * own[j][part] for j in range(n)), torch.zeros(D, dtype=torch.float64))

    def rows(b: int, h: int, i: int) -> list[Row]:
        kv, own = h // (HEADS // KV_HEADS), keys_of(layer, x[b], h)
        return [[(mixed(e[kv, m], own, 0), mixed(f[kv, m], own, 1)) for m in range(4)]]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


@pytest.mark.parametrize("share", ["none", "heads", "keys"])
def test_the_sharing_modes_of_linformer(share: str) -> None:
    """Fewer weights say the same as many equal ones; the size that each mode has."""
    text = "sources: {{low: 'project(4, 16, share = {})'}}\nattend: {{low: all}}"
    shared = Attention(text.format(share), DIM, HEADS, kv_heads=KV_HEADS).double()
    full = Attention(text.format("none"), DIM, HEADS, kv_heads=KV_HEADS).double()
    weights = source(shared, "low").weights
    assert weights.shape == {"none": (2, 2, 4, 16), "heads": (2, 1, 4, 16), "keys": (1, 1, 4, 16)}[share]
    full.load_state_dict(
        {**shared.state_dict(), "sources.low.weights": weights.expand(2, KV_HEADS, 4, 16).contiguous()}
    )
    x = states(11)
    torch.testing.assert_close(shared(x), full(x))


def test_linformer_with_identity_is_attention() -> None:
    layer = Attention("sources: {low: 'project(9, 9)'}\nattend: {low: all}", DIM, HEADS, kv_heads=KV_HEADS).double()
    with torch.no_grad():
        source(layer, "low").weights.copy_(torch.eye(9).expand(2, KV_HEADS, 9, 9))
    dense = Attention("all", DIM, HEADS, kv_heads=KV_HEADS).double()
    dense.load_state_dict({name: x for name, x in layer.state_dict().items() if "sources" not in name})
    x = states(9)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-12, rtol=1e-12)


def test_padding_takes_no_part_in_mixtures() -> None:
    layer, x = layer_of("linformer", low=4, longest=16), states(9)
    present = torch.arange(9).expand(2, 9) < 6
    other = torch.where(present[..., None], x, 1e3 * torch.randn_like(x))
    torch.testing.assert_close(layer(other, present=present)[:, :6], layer(x[:, :6]), atol=1e-9, rtol=1e-9)


def sinkhorn_weights(r: Tensor, iterations: int) -> Tensor:
    """Rows, then columns, in turn."""
    s = r.exp()
    for _ in range(iterations):
        s = s / s.sum(1, keepdim=True)
        s = s / s.sum(0, keepdim=True)
    return s


def causal_weights(r: Tensor, iterations: int) -> Tensor:
    """Row u has earlier blocks alone; a column's normaliser for row u sums the rows up to u."""
    n = r.shape[0]
    s = [[r[u, v].exp() for v in range(u)] for u in range(n)]
    for _ in range(iterations):
        s = [[w / sum(row[1:], row[0]) for w in row] for row in s]
        done: list[list[Tensor]] = []
        for u in range(n):
            column = [sum((s[t][v] for t in range(v + 1, u + 1)), torch.zeros((), dtype=r.dtype)) for v in range(u)]
            done.append([s[u][v] / column[v] for v in range(u)])
        s = done
    zero = torch.zeros((), dtype=r.dtype)
    return torch.stack([torch.stack(row + [zero] * (n - len(row))) for row in s])


def sort_rows(layer: Attention, x: Tensor, b: int, h: int, block: int, causal: bool) -> list[Row]:
    """The sorted blocks for a query head."""
    n = x.shape[1]
    num = -(-n // block)
    kv = h // (HEADS // KV_HEADS)
    (weight,) = source(layer, "sorted").net.weights
    own = keys_of(layer, x[b], h)
    told = []
    for u in range(num):
        tokens = range(u * block + 1) if causal else range(u * block, min(n, (u + 1) * block))
        told.append(sum((x[b, t] for t in tokens), torch.zeros(DIM, dtype=torch.float64)))
    logits = torch.stack(told) @ weight[kv][:, :num] / 0.75
    s = causal_weights(logits, 5) if causal else sinkhorn_weights(logits, 5)
    zero = torch.zeros(D, dtype=torch.float64)
    blocks = []
    for u in range(num):
        row: Row = []
        for t in range(block):
            parts = []
            for part in range(2):
                at = [own[v * block + t][part] if v * block + t < n else zero for v in range(num)]
                parts.append(sum((s[u, v] * at[v] for v in range(num)), zero))
            row.append((parts[0], parts[1]))
        blocks.append(row)
    return blocks


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn-causal", "sortcut"])
@pytest.mark.parametrize("n", LENGTHS)
def test_sinkhorn(name: str, n: int) -> None:
    layer, x, block = layer_of(name, b=3, longest=15).eval(), states(n, batch=1), 3
    causal = name == "sinkhorn-causal"

    def rows(b: int, h: int, i: int) -> list[Row]:
        blocks = sort_rows(layer, x, b, h, block, causal)
        if name == "sortcut":
            return [[pair for row in blocks[:2] for pair in row]]
        u, own = i // block, keys_of(layer, x[b], h)
        local = [own[j] for j in range(u * block, min(n, (u + 1) * block)) if j <= i or not causal]
        return [local + ([] if causal and u == 0 else blocks[u])]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


def test_noise_is_for_training_alone() -> None:
    layer, x = layer_of("sinkhorn", b=3, longest=15), states(12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("n", LENGTHS)
def test_native_sparse(n: int) -> None:
    layer, x = layer_of("native-sparse", l=4, d=2, b=2, n=4, w=3), states(n)
    conv = source(layer, "compressed").conv
    queries = [linear(layer.query_projection, x[b], HEADS) for b in range(2)]

    def chosen(b: int, kv: int, i: int) -> set[int]:
        """The blocks that both query heads of a key head take: scores are added over the group."""
        own = keys_of(layer, x[b], kv * 2)
        scores = {}
        for c in range(i // 2 + 1):
            tokens = [own[j][0] for j in range(2 * c, min(n, 2 * c + 2))]
            mean = sum(tokens[1:], tokens[0]) / len(tokens)
            scores[c] = sum((queries[b][i, h] * mean).sum().item() for h in (kv * 2, kv * 2 + 1))
        always = {c for c in scores if c == 0 or 0 <= i // 2 - c < 2}
        among = {c for c in scores if 2 * c + 2 <= i + 1} - always
        best = sorted(among, key=lambda c: -scores[c])[: 4 - len(always)]
        return always | set(best)

    def rows(b: int, h: int, i: int) -> list[Row]:
        kv, own = h // 2, keys_of(layer, x[b], h)
        weight, bias = conv.weight[kv * D : (kv + 1) * D], conv.bias[kv * D : (kv + 1) * D]
        compressed: Row = []
        for c in range(max(0, (n - 4) // 2 + 1)):
            if 2 * c + 3 <= i:
                parts = [convolved(weight, bias, [own[2 * c + t][part] for t in range(4)]) for part in range(2)]
                compressed.append((parts[0], parts[1]))
        blocks = chosen(b, kv, i)
        return [compressed, [own[j] for j in range(i + 1) if j // 2 in blocks], own[max(0, i - 2) : i + 1]]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


def test_encoder_decoder() -> None:
    layer, x, other = layer_of("encoder-decoder"), states(7), states(5)

    def rows(b: int, h: int, i: int) -> list[Row]:
        return [keys_of(layer, x[b], h)[: i + 1] + keys_of(layer, other[b], h)]

    assert_same(layer, x, layer(x, sources={"encoded": other}), by_loops(layer, x, rows), other)


@pytest.mark.parametrize("n", [1, 5, 17, 20])
def test_pooled_past(n: int) -> None:
    layer, x = layer_of("pooled-past", w=6, r=4), states(n)
    memory = source(layer, "rows").rows

    def rows(b: int, h: int, i: int) -> list[Row]:
        means = [x[b, 4 * c : 4 * c + 4].mean(0) for c in range(n // 4) if 4 * c + 3 <= i - 6]
        far = keys_of(layer, torch.stack(means), h) if means else []
        return [keys_of(layer, x[b], h)[max(0, i - 5) : i + 1] + far + keys_of(layer, memory, h)]

    assert_same(layer, x, layer(x), by_loops(layer, x, rows))


# ---- recurrence


def segmented(layer: Attention, x: Tensor, lengths: list[int]) -> tuple[Tensor, Any]:
    state = layer.init_state(x.shape[0])
    found = []
    for segment in x.split(lengths, dim=1):
        out, state = layer(segment, state)
        found.append(out)
    return torch.cat(found, 1), state


SEGMENTS = ([4, 4, 4], [1, 1, 1], [5, 2, 6], [13])


def test_earlier_segments_have_no_gradient() -> None:
    layer, x = layer_of("transformer-xl", m=20), states(8)
    state = layer.init_state(2)
    _, state = layer(x[:, :4], state)
    out, _ = layer(x[:, 4:], state)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].any()


COMPRESSORS: Mapping[str, Callable[[Attention, list[Tensor]], Tensor]] = {
    "conv": lambda layer, old: convolved(source(layer, "old").conv.weight, source(layer, "old").conv.bias, old),
    "mean": lambda layer, old: torch.stack(old).mean(0),
    "max": lambda layer, old: torch.stack(old).amax(0),
}


@pytest.mark.parametrize("by", COMPRESSORS)
@pytest.mark.parametrize("lengths", [*SEGMENTS, [3, 3, 3, 3, 3], [2, 7, 7]], ids=str)
def test_compressive(by: str, lengths: list[int]) -> None:
    """Python lists of states: what a memory forgets waits until there are `rate` of it, and becomes one."""
    text = f"""
        sources: {{past: recall(4), old: "compress(past, 2, 3, by = {by})"}}
        attend: {{self: causal, past: causal, old: causal}}
    """
    torch.manual_seed(0)
    layer, x = Attention(patterndsl.parse(text), DIM, HEADS, kv_heads=KV_HEADS).double(), states(sum(lengths))
    starts = [sum(lengths[:at]) for at in range(len(lengths)) for _ in range(lengths[at])]
    memories: dict[int, list[Tensor]] = {}
    for b in range(2):
        memory: list[Tensor] = []
        waiting: list[Tensor] = []
        compressed: list[Tensor] = []
        for start in dict.fromkeys(starts):
            memories[start * 2 + b] = [*compressed, *memory]
            stop = start + lengths[list(dict.fromkeys(starts)).index(start)]
            memory += [state.detach() for state in x[b, start:stop]]
            waiting, memory = waiting + memory[: max(0, len(memory) - 4)], memory[-4:]
            while len(waiting) >= 2:
                compressed = [*compressed, COMPRESSORS[by](layer, waiting[:2]).detach()][-3:]
                waiting = waiting[2:]

    def rows(b: int, h: int, i: int) -> list[Row]:
        start = starts[i]
        kept = memories[start * 2 + b]
        before = keys_of(layer, torch.stack(kept), h) if kept else []
        return [before + keys_of(layer, x[b, start:], h)[: i - start + 1]]

    assert_same(layer, x, segmented(layer, x, lengths)[0], by_loops(layer, x, rows))


def test_the_reconstruction_loss_moves_the_compression_alone() -> None:
    layer, x = layer_of("compressive", memory=4, compressed=3, rate=2), states(16)
    state = layer.init_state(2)
    losses: list[Tensor] = []
    for segment in x.split(4, dim=1):
        out, state = layer(segment, state)
        losses += layer.losses.values()
    assert len(losses) == 3  # the first segment forgets nothing
    compression = set(source(layer, "old").parameters())
    leaves = [x, *layer.parameters()]
    for leaf, gradient in zip(
        leaves, torch.autograd.grad(torch.stack(losses).sum(), leaves, allow_unused=True), strict=True
    ):
        assert (gradient is not None and bool(gradient.any())) == (leaf in compression)
    for leaf in compression:
        assert torch.autograd.grad(out.sum(), leaf, allow_unused=True, retain_graph=True)[0] is None


def test_the_reconstruction_loss_by_loops() -> None:
    layer, x = layer_of("compressive", memory=4, compressed=3, rate=2), states(8)
    state = layer.init_state(2)
    _, state = layer(x[:, :4], state)
    layer(x[:, 4:], state)
    conv = source(layer, "old").conv
    squares = []
    for b in range(2):
        old = x[b, :4].detach()
        new = torch.stack([convolved(conv.weight, conv.bias, list(old[t : t + 2])) for t in (0, 2)])
        queries = linear(layer.query_projection, x[b, 4:], HEADS)
        for i in range(4):
            for h in range(HEADS):
                was, is_now = (softmax_row(queries[i, h], keys_of(layer, kept, h)) for kept in (old, new))
                squares.append((was - is_now).square())
    torch.testing.assert_close(layer.losses["old"], torch.stack(squares).mean())


def test_states_are_told_from_compressed_ones() -> None:
    text = "sources: {past: recall(2), old: 'compress(past, 2, 4, loss = states)'}\nattend: {self: causal, old: all}"
    layer, x = Attention(patterndsl.parse(text), DIM, HEADS).double(), states(4)
    state = layer.init_state(2)
    _, state = layer(x[:, :2], state)
    layer(x[:, 2:], state)
    module = source(layer, "old")
    new = module(x[:, :2].detach())
    told = module.decoder(new.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(layer.losses["old"], (told - x[:, :2].detach()).square().mean())


def test_the_most_used_are_kept() -> None:
    """What had most of the attention of all heads and queries while it was recalled, in its order."""
    text = (
        "sources: {past: recall(4), old: 'compress(past, 2, 8, by = most_used)'}\nattend: {self: causal, past: causal}"
    )
    layer, x = Attention(patterndsl.parse(text), DIM, HEADS, kv_heads=KV_HEADS).double(), states(12, batch=1)
    _, state = segmented(layer, x, [4, 4, 4])
    usage = torch.zeros(12, dtype=torch.float64)
    for start in (4, 8):
        for i in range(start, start + 4):
            for h in range(HEADS):
                query = linear(layer.query_projection, x[0], HEADS)[i, h]
                row = keys_of(layer, x[0], h)[start - 4 : i + 1]
                weights = torch.stack([(query * key).sum() / math.sqrt(D) for key, _ in row]).softmax(0)
                usage[start - 4 : start] += weights[:4].detach()
    kept = []
    for start in (0, 4):
        best = usage[start : start + 4].topk(2).indices.sort().values + start
        kept += [x[0, t] for t in best]
    torch.testing.assert_close(state.compressed["old"][0], torch.stack(kept).detach())


def test_without_compression_it_is_transformer_xl() -> None:
    """A rate of 1 by the mean: a longer memory, as far as positions are not asked for."""
    sources = "{past: recall(4), old: 'compress(past, 1, 6, by = mean)'}"
    text = f"sources: {sources}\nattend: {{self: causal, past: all, old: all}}"
    layer = Attention(patterndsl.parse(text), DIM, HEADS).double()
    longer = Attention("sources: {past: recall(10)}\nattend: {self: causal, past: all}", DIM, HEADS).double()
    longer.load_state_dict(layer.state_dict())
    x = states(30)
    torch.testing.assert_close(segmented(layer, x, [5] * 6)[0], segmented(longer, x, [5] * 6)[0])
