"""Linformer, linear, axial and Sinkhorn attention beside independent code of the same papers: outputs and gradients
with the same weights where both mean the same, and where not, what theirs does that ours must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patterndsl
from patterndsl.learn.sinkhorn import SortNet, sinkhorn
from patterndsl.nn import Attention
from patterndsl.source.sequence import Sequence
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
def linformer() -> Any:
    return pytest.importorskip("linformer.linformer")


@pytest.fixture
def linear() -> Any:
    return pytest.importorskip("linear_attention_transformer.linear_attention_transformer")


@pytest.fixture
def axial() -> Any:
    return pytest.importorskip("axial_attention.axial_attention")


@pytest.fixture
def sinkhorn_transformer() -> Any:
    return pytest.importorskip("sinkhorn_transformer.sinkhorn_transformer")


# ---- Linformer


def of_linformer(theirs: Any, share: str) -> tuple[Attention, Weights]:
    """A layer by its spec whose mixtures are shared so, and its weights: theirs has one E and one F for all heads."""
    pattern = str(example("sources/linformer", low=4, longest=16)).replace("longest)", f"longest, share = {share})")
    kv_heads = theirs.to_k.out_features // D
    tied = theirs.share_kv
    mixtures = torch.stack([theirs.proj_k.T, (theirs.proj_k if tied else theirs.proj_v).T])[:, None]
    if share == "none":
        mixtures = mixtures.expand(-1, kv_heads, -1, -1)
    value = theirs.to_k if tied else theirs.to_v
    weights = projections(theirs.to_q.weight, theirs.to_k.weight, value.weight, theirs.to_out)
    return layer_of(pattern, kv_heads=kv_heads), {
        **weights,
        "sources.mixtures.weights": mixtures[:1] if share == "keys" else mixtures,
    }


@pytest.mark.parametrize("n", [1, 11, 16])
@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize(("share_kv", "share"), [(False, "none"), (False, "heads"), (True, "heads"), (True, "keys")])
def test_linformer(linformer: Any, n: int, one_kv_head: bool, share_kv: bool, share: str) -> None:
    """All that it shares: E and F among heads, one key head, keys and values as well. Shorter sequences have the first
    columns."""
    theirs = seeded(linformer.LinformerSelfAttention, DIM, 16, 4, HEADS, one_kv_head=one_kv_head, share_kv=share_kv)
    layer, weights = of_linformer(theirs, share)
    x, context = states(BATCH, n, DIM), states(BATCH, 9, DIM, seed=3)
    leaves = list(theirs.parameters())
    assert_same(called(layer, weights, x), theirs(x), [x, *leaves])
    assert_same(called(layer, weights, x, context), theirs(x, context=context), [x, context, *leaves])


def test_linformer_takes_a_mask_and_lets_padding_into_every_mixture(linformer: Any) -> None:
    theirs = seeded(linformer.LinformerSelfAttention, DIM, 16, 4, HEADS)
    layer, weights = of_linformer(theirs, "heads")
    x = states(BATCH, 16, DIM)
    present = (torch.arange(16) < 9).expand(BATCH, -1)
    other = torch.where(present[..., None], x, 5 * states(BATCH, 16, DIM, seed=3))
    changed = theirs(other, input_mask=present) - theirs(x, input_mask=present)
    assert changed[:, :9].abs().amax(-1).min() > 1e-3
    ours = called(layer, weights, x, present=present)[:, :9]
    assert torch.equal(called(layer, weights, other, present=present)[:, :9], ours)
    torch.testing.assert_close(ours, theirs(x[:, :9]), atol=1e-9, rtol=1e-9)  # as without padding


# ---- linear attention


def features(x: Tensor) -> Tensor:
    return nn.functional.elu(x) + 1


def test_linear_attention_transformer_as_the_linear_transformer(linear: Any) -> None:
    """Its features are exponentials, of queries as shares of their sum: logarithms of elu(x) + 1 make it the linear
    transformer, and its scale is none of the paper's."""
    query, key, value = (states(BATCH, HEADS, 24, D, seed=seed) for seed in (1, 2, 3))
    logs = [features(x).log() for x in (query, key)]
    theirs = linear.causal_linear_attn(*logs, value, bucket_size=1)
    ours = patterndsl.attention(query, key, value, example("sources/linear-transformer"))
    assert_same(ours, theirs, [query, key, value])


def test_linear_attention_transformer_over_all_keys_as_the_linear_transformer(linear: Any) -> None:
    """There keys are shares of their sum over positions, which queries that gain the sums take back."""
    query, key, value = (states(BATCH, HEADS, 24, D, seed=seed) for seed in (1, 2, 3))
    sums = features(key).sum(2, keepdim=True)
    theirs = linear.linear_attn((features(query) * sums).log(), features(key).log(), value) * D**0.5
    ours = patterndsl.attention(query, key, value, "score: elu\nattend: all")
    assert_same(ours, theirs, [query, key, value])


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_transformer_by_its_own_features(linear: Any, causal: bool) -> None:
    """The whole module. Over all keys nothing is divided by a sum, and a scale is left; causal, the scale cancels."""
    theirs = seeded(linear.SelfAttention, DIM, HEADS, causal)
    x = states(BATCH, 24, DIM)
    query, key, value = (by_head(x, module.weight) for module in (theirs.to_q, theirs.to_k, theirs.to_v))
    score = "linear(normalise = yes)" if causal else "linear"
    attended = patterndsl.attention(
        query.softmax(-1),
        key.exp() if causal else key.softmax(2),
        value,
        f"score: {score}\nattend: {'causal' if causal else 'all'}",
    )
    ours = theirs.to_out((attended if causal else attended * D**-0.5).transpose(1, 2).flatten(2))
    assert_same(ours, theirs(x), [x, *theirs.parameters()])


# ---- axial attention


def of_axis(attention: Any) -> Weights:
    key, value = attention.to_kv.weight.chunk(2)
    return projections(attention.to_q.weight, key, value, attention.to_out)


def along(axes: str) -> str:
    """Attention along a row or a column of axial.yaml, one of its variants."""
    return str(example("axial", cols=5)).replace("same(row) | same(col)", axes)


@pytest.mark.parametrize("channels", ["last", "first"])
@pytest.mark.parametrize("summed", [True, False])
def test_axial_attention(axial: Any, summed: bool, channels: str) -> None:
    """Columns, then rows, each a layer with its projections, summed or one after the other."""
    index = -1 if channels == "last" else 1
    theirs = seeded(axial.AxialAttention, DIM, heads=HEADS, dim_index=index, sum_axial_out=summed)
    layers = [layer_of(along(axes)) for axes in ("same(col)", "same(row)")]
    weights = [of_axis(part.fn) for part in theirs.axial_attentions]
    x = states(BATCH, 35, DIM)
    if summed:
        ours = called(layers[0], weights[0], x) + called(layers[1], weights[1], x)
    else:
        ours = called(layers[1], weights[1], called(layers[0], weights[0], x))
    image = x.view(BATCH, 7, 5, DIM)
    out = theirs(image) if channels == "last" else theirs(image.movedim(-1, 1)).movedim(1, -1)
    assert_same(ours, out.flatten(1, 2), [x, *theirs.parameters()])


def test_axial_attention_of_three_axes(axial: Any) -> None:
    theirs = seeded(axial.AxialAttention, DIM, num_dimensions=3, heads=HEADS, sum_axial_out=True)
    x = states(BATCH, 24, DIM)
    ours = torch.zeros_like(x)
    for axes, part in zip(("row,col", "time,col", "time,row"), theirs.axial_attentions, strict=True):
        fixed = " & ".join(f"same({axis})" for axis in axes.split(","))
        layer = layer_of(f"grid: {{time: N // 12, row: 3, col: 4}}\nattend: {fixed}")
        ours = ours + called(layer, of_axis(part.fn), x)
    assert_same(ours, theirs(x.view(BATCH, 2, 3, 4, DIM)).flatten(1, 3), [x, *theirs.parameters()])


def test_axial_attention_sums_two_softmaxes(axial: Any) -> None:
    """With the same projections for both axes it is our sum of branches, in which a pixel meets itself twice, and not
    the one softmax of axial.yaml, in which it does once."""
    theirs = seeded(axial.AxialAttention, DIM, heads=HEADS)
    weights = of_axis(theirs.axial_attentions[0].fn)
    theirs.axial_attentions[1] = axial.PermuteToFrom(
        theirs.axial_attentions[1].permutation, theirs.axial_attentions[0].fn
    )
    x = states(BATCH, 35, DIM)
    out = theirs(x.view(BATCH, 7, 5, DIM)).flatten(1, 2) - weights["output_projection.bias"]
    branches = layer_of("grid: {row: N // 5, col: 5}\nbranches: {rows: same(row), columns: same(col)}\ncombine: sum")
    assert_same(called(branches, weights, x), out, [x, weights["output_projection.weight"]])
    assert (called(layer_of(example("axial", cols=5)), weights, x) - out).abs().max() > 1e-2


# ---- Sinkhorn


BLOCK, LONGEST = 3, 12


def of_sinkhorn(theirs: Any, pattern: Any) -> tuple[Attention, Weights]:
    """A layer and its weights. Their sort net scores blocks by the sums of their queries and keys, linear maps of the
    sums of states that ours scores them by: the products of the weights are ours."""
    query, (key, value) = theirs.to_q.weight, theirs.to_kv.weight.chunk(2)
    told = torch.cat([query.view(HEADS, D, DIM), key.view(HEADS, D, DIM)], 1)
    net = told.transpose(1, 2) @ theirs.sinkhorn_attention.sort_net.linear[0]
    return layer_of(pattern).eval(), {
        **projections(query, key, value, theirs.to_out),
        "sources.sorted.net.weights.0": net,
    }


def sinkhorn_of_theirs(module: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Their layer with the paper's sort matrix: without a ReLU and a logarithm before its scores are balanced, with
    noise by the draws that ours makes, and only where it trains."""

    def drawn(shape: Any, *_: Any) -> Tensor:
        training = theirs.training
        return -torch.empty(shape, dtype=torch.float64).exponential_().log() if training else torch.zeros(())

    monkeypatch.setattr(module, "log", lambda x, *_: x)
    monkeypatch.setattr(module, "sample_gumbel", drawn)
    made: dict[str, Any] = {"heads": HEADS, "non_permutative": False, "use_simple_sort_net": True, **options}
    theirs = seeded(module.SinkhornSelfAttention, DIM, BLOCK, LONGEST, **made)
    theirs.sinkhorn_attention.sort_net.act = nn.Identity()
    with torch.no_grad():
        theirs.sinkhorn_attention.sort_net.linear.mul_(0.3)  # far from one block for each
    return theirs.eval()


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_the_sort_matrix_of_sinkhorn_transformer(sinkhorn_transformer: Any, iterations: int) -> None:
    logits = states(BATCH, 6, 6)
    assert_same(
        sinkhorn(logits, iterations), sinkhorn_transformer.sinkhorn_sorting_operator(logits, iterations), [logits]
    )


def test_sinkhorn_transformer_takes_sorted_keys_for_sorted_values(
    sinkhorn_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is the same: given keys in the place of sorted values, ours says what theirs does."""
    theirs = sinkhorn_of_theirs(sinkhorn_transformer, monkeypatch)
    pattern = example("sources/sinkhorn", b=BLOCK, longest=LONGEST)
    layer, weights = of_sinkhorn(theirs, pattern)
    x = states(BATCH, LONGEST, DIM)
    query, key, value = (by_head(x, weights[f"{name}_projection.weight"]) for name in ("query", "key", "value"))

    def attended(values: Tensor) -> Tensor:
        net = {"net.weights.0": weights["sources.sorted.net.weights.0"]}
        keys = called(layer.sources["sorted"], net, Sequence(x, (key, values), lambda _: (key, values)))
        found = patterndsl.attention(query, key, value, pattern, sources={"sorted": keys})
        output: Tensor = theirs.to_out(found.transpose(1, 2).flatten(2))
        return output

    assert_same(attended(key), theirs(x), [x, *theirs.parameters()])
    assert_same(attended(value), called(layer, weights, x), [x, *theirs.parameters()])
    assert (called(layer, weights, x) - theirs(x)).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("beside", [True, False])
def test_sinkhorn_transformer_sortcut(
    sinkhorn_transformer: Any, monkeypatch: pytest.MonkeyPatch, beside: bool, training: bool
) -> None:
    """The first two sorted blocks; and the block of the query beside them, unless it is of another size."""
    kv_block = BLOCK if beside else 2
    theirs = sinkhorn_of_theirs(sinkhorn_transformer, monkeypatch, n_sortcut=2, kv_bucket_size=kv_block)
    pattern = example("sources/sortcut", b=kv_block, blocks=2, longest=LONGEST)
    layer, weights = of_sinkhorn(theirs, f"{pattern}\n  self: block(b)" if beside else pattern)
    x, found = states(BATCH, LONGEST, DIM), []
    for call in (lambda: called(layer.train(training), weights, x), lambda: theirs.train(training)(x)):
        torch.manual_seed(1)  # of the noise
        found.append(call())
    assert_same(found[0], found[1], [x, *theirs.parameters()])


def test_sinkhorn_transformer_tells_no_negative_scores_apart(
    sinkhorn_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes log(relu(r) + 1e-6) of what its net says, which has no gradient below 0."""
    monkeypatch.setattr(sinkhorn_transformer, "sample_gumbel", lambda shape, *_: torch.zeros(shape))
    scores = -states(1, 4, 4).abs() - 0.1
    theirs = sinkhorn_transformer.gumbel_sinkhorn(torch.relu(scores), 5, 0.75)
    torch.testing.assert_close(theirs, torch.full_like(theirs, 1 / 4))
    weight = states(1, 4, 4, seed=2)
    assert not torch.autograd.grad((theirs * weight).sum(), scores)[0].any()
    ours = sinkhorn(scores / 0.75, 5)
    assert (ours - 1 / 4).abs().max() > 0.1
    assert torch.autograd.grad((ours * weight).sum(), scores)[0].all()


def test_sinkhorn_transformer_draws_noise_when_it_does_not_train(sinkhorn_transformer: Any) -> None:
    options = {"heads": HEADS, "non_permutative": False, "use_simple_sort_net": True}
    theirs = seeded(sinkhorn_transformer.SinkhornSelfAttention, DIM, BLOCK, LONGEST, **options).eval()
    layer, weights = of_sinkhorn(theirs, example("sources/sinkhorn", b=BLOCK, longest=LONGEST))
    x = states(BATCH, LONGEST, DIM)
    assert (theirs(x) - theirs(x)).abs().max() > 1e-2
    assert torch.equal(called(layer, weights, x), called(layer, weights, x))


def test_sinkhorn_transformer_lets_padding_into_sorted_blocks(
    sinkhorn_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of blocks sum padding too, and a sorted block has the mask of the block that weighs most in it."""
    theirs = sinkhorn_of_theirs(sinkhorn_transformer, monkeypatch)
    pattern = str(example("sources/sinkhorn", b=BLOCK, longest=LONGEST)).replace("block(b)", "block(b) & k.there", 1)
    layer, weights = of_sinkhorn(theirs, f"{pattern}\ninputs: {{there: 'bool[Nk]'}}")
    present = torch.arange(LONGEST) < 8
    x = states(BATCH, LONGEST, DIM)
    other = torch.where(present[:, None], x, 5 * states(BATCH, LONGEST, DIM, seed=3))
    mask = present.expand(BATCH, -1)
    changed = (theirs(other, input_mask=mask) - theirs(x, input_mask=mask))[:, :8]
    assert changed.abs().amax(-1).min() > 1e-3
    ours, again = (called(layer, weights, y, present=mask, inputs={"there": present})[:, :8] for y in (x, other))
    assert torch.equal(ours, again)


def test_sinkhorn_transformer_has_no_shorter_sequences(
    sinkhorn_transformer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its simple net scores as many blocks as the longest sequence has, ours those that there are."""
    theirs = sinkhorn_of_theirs(sinkhorn_transformer, monkeypatch)
    layer, weights = of_sinkhorn(theirs, example("sources/sinkhorn", b=BLOCK, longest=LONGEST))
    x = states(BATCH, 2 * BLOCK, DIM)
    with pytest.raises(RuntimeError):
        theirs(x)
    assert called(layer, weights, x).isfinite().all()


def test_sinkhorn_transformer_sortcut_by_attention_adds_all_blocks(sinkhorn_transformer: Any) -> None:
    """One row of scores, whose columns are normalised last: each weight is 1, whatever the queries and keys say."""
    theirs = sinkhorn_transformer.AttentionSortNet(1, BLOCK, BLOCK, D, False, 0.75, 5, n_sortcut=1)
    query, key = states(2, LONGEST, D), states(2, LONGEST, D, seed=2)
    torch.testing.assert_close(theirs(query, key), torch.ones(2, 1, 4, dtype=torch.float64))
    ours = SortNet(1, D, 4).double()(key[:, None], BLOCK, tau=0.75, iterations=5, causal=False, noise=False)
    assert ours[:, 0, 0].sum(-1).max() < 2


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("simple", [False, True])
def test_what_causal_sinkhorn_transformer_attends(sinkhorn_transformer: Any, simple: bool, top: int) -> None:
    """Another operator: no balancing, but the best of the earlier blocks and of `top` null blocks, each times its share
    in a softmax; half of the heads on a sequence that is rotated, which we cannot say. In the other half the attention
    is ours, own block and sorted blocks in one softmax, given the blocks that theirs selects."""
    make = sinkhorn_transformer.SinkhornCausalAttention
    options = {"use_simple_sort_net": simple, "n_top_buckets": top}
    theirs = seeded(make, BLOCK, DIM, D, HEADS, LONGEST, **options)
    query, key, value = (states(1, HEADS, LONGEST, D, seed=seed) for seed in (1, 2, 3))
    half = slice(0, HEADS // 2)
    chosen = theirs.sort_net(*_rotated(query[0], key[0]), topk=top)[half]
    assert ((chosen > 0).sum(-1) == 1).all()  # top rows for each block
    assert (chosen <= 1).all()

    def blocks(x: Tensor, null: Tensor) -> Tensor:
        before = null[half].expand(-1, top * BLOCK, -1)
        whole = torch.cat([before, x[0, half]], 1).unflatten(1, (-1, BLOCK))
        return torch.einsum("huv,hvtd->hutd", chosen, whole).flatten(1, 2)[None]

    pattern = f"""
        sources: {{sorted: cross({top} * N)}}
        attend: {{self: causal & block({BLOCK}), sorted: q // {BLOCK} == k // {top * BLOCK}}}
    """
    keys = blocks(key, theirs.null_keys), blocks(value, theirs.null_values)
    ours = patterndsl.attention(query[:, half], key[:, half], value[:, half], pattern, sources={"sorted": keys})
    assert_same(ours, theirs(query, key, value)[:, half], [query, key, value, *theirs.parameters()])


def _rotated(*tensors: Tensor) -> list[Tensor]:
    """What their sort net is given: the second half of the heads begins with the last token of the first block."""
    half = HEADS // 2
    return [torch.cat([x[:half], x[half:].roll(1 - BLOCK, 1)]) for x in tensors]
