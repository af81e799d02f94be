"""Labels of each head: terms of the language, exact against enumeration, whoever finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import patterndsl
from patterndsl.learn.kmeans import KMeans
from patterndsl.learn.lsh import lsh_labels
from patterndsl.nn import Attention

LSH = """
params: {{m: 6}}
labels: {{bucket: "lsh(buckets = 10, rounds = {rounds}, seed = 3)"}}
merge: {merge}
fallback: q == k
attend: {causal}chunks(bucket, m, 1) & q != k
"""


def places(label: Sequence[int]) -> list[int]:
    """The place of each position in the stable order by label."""
    order = sorted(range(len(label)), key=lambda at: (label[at], at))
    found = [0] * len(label)
    for place, at in enumerate(order):
        found[at] = place
    return found


def multiplicity(labels: Sequence[Sequence[int]], m: int, *, causal: bool) -> Tensor:
    """How often each key counts over the rounds: own chunk of m in the order by label, and the one before."""
    n = len(labels[0])
    counts = torch.zeros(n, n, dtype=torch.float64)
    for label in labels:
        place = places(label)
        for q in range(n):
            for k in range(n):
                near = 0 <= place[q] // m - place[k] // m <= 1
                counts[q, k] += near and q != k and (k <= q or not causal)
    return counts


def dense(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """softmax(scores + log counts) value; counts [..., Tq, Tk] are whole numbers."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + counts.log()
    return torch.nan_to_num(scores.softmax(-1)) @ value


def check(
    program: patterndsl.Program, counts: Tensor, tensors: Sequence[Tensor], inputs: dict[str, Tensor] | None
) -> None:
    """Outputs and gradients to 1e-9."""
    query, key, value = tensors
    out = program(query, key, value, inputs=inputs)
    expected = dense(query, key, value, counts)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    found = torch.autograd.grad(out, list(tensors), upstream)
    wanted = torch.autograd.grad(expected, list(tensors), upstream)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def tensors_of(batch: int, heads: int, n: int, dim: int = 8, kv_heads: int | None = None) -> list[Tensor]:
    shapes = [(batch, number, n, dim) for number in (heads, kv_heads or heads, kv_heads or heads)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("merge", ["set", "multiset"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "gathered", "oracle"])
def test_hashing_equals_enumeration(rounds: int, merge: str, causal: bool, backend: str) -> None:
    """Reformer's chunks with its rule for a query alone, in one round and in several, by set and by multiset."""
    text = LSH.format(rounds=rounds, merge=merge, causal="causal & " if causal else "")
    n, heads = 45, 3
    program = patterndsl.parse(text).compile(n, heads=heads, backend=backend)
    tensors = tensors_of(2, heads, n)
    _, labels = program(*tensors, return_labels=True)
    label = labels["bucket"].reshape(2, heads, rounds, n)
    counts = torch.stack(
        [torch.stack([multiplicity(head.tolist(), 6, causal=causal) for head in row]) for row in label]
    )
    counts = (counts > 0).double() if merge == "set" else counts
    alone = counts.sum(-1, keepdim=True) == 0
    check(program, torch.where(alone, torch.eye(n, dtype=torch.float64), counts), tensors, None)
    check(program, torch.where(alone, torch.eye(n, dtype=torch.float64), counts), tensors, labels)


@pytest.mark.parametrize("backend", ["auto", "gathered", "oracle"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_labels_compose_with_static_terms_and_documents(kv_heads: int, backend: str) -> None:
    """Heads with labels of their own, heads without, documents that differ between batch rows, grouped keys."""
    text = """
inputs: {doc: "int[N]"}
labels: {topic: given}
attend: causal & (chunks(topic, 4, 1) & head >= 1 | recent(5) | first(2)) & same(doc)
"""
    n, heads = 37, 4
    program = patterndsl.parse(text).compile(n, heads=heads, backend=backend)
    generator = torch.Generator().manual_seed(2)
    topic = torch.randint(0, 5, (2, heads, n), generator=generator)
    doc = torch.stack([torch.arange(n) // 20, torch.arange(n) // 11])
    counts = torch.zeros(2, heads, n, n, dtype=torch.float64)
    for row in range(2):
        for head in range(heads):
            place = places(topic[row, head].tolist())
            for q in range(n):
                for k in range(q + 1):
                    near = head >= 1 and 0 <= place[q] // 4 - place[k] // 4 <= 1
                    counts[row, head, q, k] = (near or q - k < 5 or k < 2) and doc[row, q] == doc[row, k]
    inputs = {"doc": doc, "topic": topic}
    tensors = tensors_of(2, heads, n, kv_heads=kv_heads)
    query, key, value = tensors
    spread = [query, *(x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))]
    out, expected = program(*tensors, inputs=inputs), dense(spread[0], spread[1], spread[2], counts)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=generator)
    grads = [torch.autograd.grad(x, tensors, upstream) for x in (out, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    assert torch.equal(program.mask(inputs), counts > 0)
    assert torch.equal(program.block_mask(16, inputs).to_dense().bool(), _blocks(counts > 0, 16))
    indices, numbers = program.gather_indices(16, inputs)
    for row, head, block in ((0, 0, 0), (1, 3, 2)):
        wanted = (counts[row, head, block * 16 : block * 16 + 16] > 0).any(0).nonzero()[:, 0]
        assert indices[row, head, block, : numbers[row, head, block]].tolist() == wanted.tolist()
    one = {name: values[:1] for name, values in inputs.items()}
    assert program.row(30, head=2, inputs=one).tolist() == (counts[0, 2, 30] > 0).nonzero()[:, 0].tolist()


def _blocks(mask: Tensor, block: int) -> Tensor:
    """Which blocks have a pair."""
    short = -mask.shape[-1] % block
    padded = torch.nn.functional.pad(mask, (0, short, 0, short))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).any(-1).any(-2)


def test_a_multiset_counts_a_key_for_each_term() -> None:
    program = patterndsl.parse("merge: multiset\nattend: causal & (recent(4) | strided(3) | recent(4))").compile(20)
    q, k = torch.arange(20)[:, None], torch.arange(20)
    counts = ((q >= k) & (q - k < 4)).double() + ((q >= k) & ((q - k) % 3 == 0)).double()
    check(program, counts, tensors_of(1, 1, 20), None)


def test_heads_of_a_multiset_differ() -> None:
    text = "merge: multiset\nattend: causal & (recent(4) | strided(3) & head % 2 == 1)"
    program = patterndsl.parse(text).compile(20, heads=3)
    q, k = torch.arange(20)[:, None], torch.arange(20)
    near, far = ((q >= k) & (q - k < 4)).double(), ((q >= k) & ((q - k) % 3 == 0)).double()
    check(program, torch.stack([near, near + far, near]), tensors_of(1, 3, 20), None)


def test_a_fallback_is_for_rows_without_keys() -> None:
    program = patterndsl.parse("fallback: first(2)\nattend: q % 3 == 1 & recent(2)").compile(11)
    q, k = torch.arange(11)[:, None], torch.arange(11)
    counts = torch.where(q % 3 == 1, ((q >= k) & (q - k < 2)).double(), (k < 2).double())
    check(program, counts, tensors_of(1, 1, 11), None)
    assert torch.equal(program.mask()[0], counts > 0)


def test_compiled_it_is_the_same() -> None:
    text = LSH.format(rounds=2, merge="multiset", causal="causal & ")
    layer = Attention(f"share: query_key{text}", dim=16, heads=2)
    x = torch.randn(1, 40, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)


# ---- learners


def test_one_direction_and_its_opposite_are_buckets() -> None:
    """argmax of [x R; -x R]: opposite keys are half the buckets apart, length has no part in it."""
    key = torch.randn(1, 2, 50, 16)
    label = lsh_labels(key, buckets=8, rounds=2, seed=1)
    assert torch.equal(lsh_labels(-3 * key, buckets=8, rounds=2, seed=1), (label + 4) % 8)
    assert not torch.equal(label[:, :, 0], label[:, :, 1])
    assert not torch.equal(label, lsh_labels(key, buckets=8, rounds=2, seed=2))


@pytest.mark.parametrize("buckets", [2, 10, 128, 256, 1000, 1018])
def test_every_bucket_is_in_range(buckets: int) -> None:
    label = lsh_labels(torch.randn(1, 1, 4000, 32), buckets=buckets, rounds=1, seed=0)
    assert label.min() >= 0
    assert label.max() < buckets
    assert len(label.unique()) > buckets // 2


def test_recall_of_the_nearest_key_rises_with_rounds() -> None:
    """The share of queries whose most similar other key shares a bucket in some round."""
    key = normalize(torch.randn(1, 1, 600, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    similar = (key @ key.transpose(-1, -2))[0, 0].fill_diagonal_(-1)
    nearest = similar.argmax(-1)
    label = lsh_labels(key, buckets=16, rounds=16, seed=0)[0, 0]
    same = label == label[:, nearest]
    recalls = [float(same[:rounds].any(0).double().mean()) for rounds in (1, 2, 4, 8, 16)]
    assert recalls == sorted(recalls)
    assert recalls[0] > 2 / 16  # far more than chance
    assert recalls[-1] > 0.95


def test_centroids_are_running_means() -> None:
    """Counts and sums decayed step by step, in plain loops."""
    heads, dim, clusters, decay = 2, 4, 3, 0.9
    learner = KMeans(heads, dim, clusters, decay=decay).double()
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(2, heads, 7, dim, dtype=torch.float64, generator=generator) for _ in range(4)]
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 4:] = False
    for head in range(heads):
        first = [normalize(steps[0][b, head, t], dim=-1) * keep[b, t] for b in range(2) for t in range(7)]
        centroids = [first[c * 14 // clusters].clone() for c in range(clusters)]
        assert all(bool(c.any()) for c in centroids)
        counts, sums = [1.0] * clusters, [c.clone() for c in centroids]
        for step in steps:
            number, total = [0.0] * clusters, [torch.zeros(dim, dtype=torch.float64) for _ in range(clusters)]
            for b in range(2):
                for t in range(7):
                    if keep[b, t]:
                        x = normalize(step[b, head, t], dim=-1)
                        at = max(range(clusters), key=lambda c: float(x @ centroids[c]))
                        number[at], total[at] = number[at] + 1, total[at] + x
            counts = [decay * old + (1 - decay) * new for old, new in zip(counts, number, strict=True)]
            sums = [decay * old + (1 - decay) * new for old, new in zip(sums, total, strict=True)]
            whole = sum(counts)
            smoothed = [(c + 1e-5) / (whole + clusters * 1e-5) * whole for c in counts]
            centroids = [s / c for s, c in zip(sums, smoothed, strict=True)]
        if head == 0:
            for step in steps:
                learner.update(step, keep)
        torch.testing.assert_close(learner.centroids[head], torch.stack(centroids), rtol=0, atol=1e-12)


def test_what_is_no_number_moves_no_centroid() -> None:
    torch.manual_seed(0)
    key = torch.randn(2, 2, 9, 8)
    key[0, 1, 0, 3], key[1, 0, 4] = torch.nan, torch.inf
    learner, zero = KMeans(2, 8, 3), key.clone()
    zero[0, 1, 0], zero[1, 0, 4] = 0, 0
    other = KMeans(2, 8, 3)
    for step in (learner, other):
        for _ in range(2):
            step.update(key if step is learner else zero)
    assert learner.centroids.isfinite().all()
    assert torch.equal(learner.centroids, other.centroids)
    assert torch.equal(learner.members(key, 2), other.members(zero, 2))


def test_a_layer_learns_its_clusters_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = Attention("labels: {c: kmeans(clusters = 4)}\nattend: causal & (same(c) | recent(4))", 32, 4, kv_heads=2)
    learner = layer.learners["c"]
    assert isinstance(learner, KMeans)
    x = torch.randn(2, 50, 32)
    before = learner.centroids.clone()
    layer(x)
    assert not torch.equal(before, learner.centroids)
    layer.losses["c"].backward()
    assert layer.key_projection.weight.grad is not None
    layer.eval()
    before = learner.centroids.clone()
    layer(x)
    assert torch.equal(before, learner.centroids)
    assert not layer.losses
    with pytest.raises(patterndsl.InputError, match=r"nn\.Attention, which learns it"):
        patterndsl.attention(x[None], x[None], x[None], layer.pattern)


def test_shared_query_and_key_is_one_projection_at_unit_length() -> None:
    torch.manual_seed(0)
    layer = Attention("share: query_key\nattend: causal", 16, 2).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    query = layer.query_projection(x).view(1, 20, 2, 8).transpose(1, 2)
    value = layer.value_projection(x).view(1, 20, 2, 8).transpose(1, 2)
    scores = (query @ normalize(query, dim=-1).transpose(-1, -2)).masked_fill(
        torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf
    )
    expected = layer.output_projection((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(patterndsl.InputError, match="needs as many"):
        Attention("share: query_key\nattend: causal", 16, 2, kv_heads=1)


# ---- what does not fit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('labels: {b: "lsh(buckets = 40)"}\nattend: same(b)', "40 buckets for 20 positions"),
        ('labels: {b: "lsh(buckets = 7)"}\nattend: same(b)', "odd number"),
        ('labels: {b: "lsh(buckets = 0)"}\nattend: same(b)', "must be at least 2"),
        ('labels: {b: "kmeans(clusters = 21)"}\nattend: same(b)', "21 clusters for 20 positions"),
    ],
)
def test_refused_when_sizes_are_known(text: str, message: str) -> None:
    with pytest.raises(patterndsl.PatternError, match=message):
        patterndsl.parse(text).compile(20)


def test_all_tokens_in_one_bucket_cost_what_chunks_cost() -> None:
    """Chunks are of places, so a label that tells nothing apart leaves them as large as ever."""
    program = patterndsl.parse("labels: {b: given}\nattend: chunks(b, 5, 1)").compile(40, heads=2)
    inputs = {"b": torch.zeros(1, 2, 40, dtype=torch.int64)}
    assert int(program.mask(inputs).sum()) == 2 * (40 * 10 - 5 * 5)


def test_labels_of_the_wrong_shape_are_refused() -> None:
    text = 'labels: {b: "lsh(buckets = 4, rounds = 2)"}\nattend: same(b)'
    program = patterndsl.parse(text).compile(10, heads=2)
    for shape in ((10,), (3, 10), (1, 3, 2, 10), (1, 1, 2, 2, 10)):
        with pytest.raises(patterndsl.InputError, match=r"give an integer tensor \[2, 10\]"):
            program.mask({"b": torch.zeros(shape, dtype=torch.int64)})
    with pytest.raises(patterndsl.InputError, match="dtype float32"):
        program.mask({"b": torch.zeros(2, 10)})
    with pytest.raises(patterndsl.InputError, match="input `b` is missing"):
        program.mask()
