"""Against routing-transformer's KmeansAttention: its own routes as lists, its rules in the words of the language.

What it does that the paper does not say, and how it is said here: keys at unit length are an argument; a token that has
nothing else in a route attends itself there, which is a second selection, `alone`; the mean is divided by count + 1e-5,
which is a factor; memory keys, and queries routed apart from keys, are positions of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import patterndsl
from patterndsl.learn.kmeans import KMeans
from patterndsl.nn import Attention

BATCH, HEADS, DIM = 2, 2, 8
SIZES = [(1, 1, 1), (12, 3, 4), (12, 5, 1), (31, 4, 7), (40, 3, 5), (65, 8, 16), (9, 2, 16), (128, 1, 128)]
"""N, centroids, members of a centroid: few enough for tokens in none, enough for tokens in several, and more than N."""
BACKENDS = ["auto", "gathered", "oracle"]

SHARED = """
params: {{clusters: {clusters}, w: {window}}}
inputs: {{valid: "bool[N]"}}
labels: {{c: kmeans(clusters = clusters)}}
select: {{route: "members(c, top = w)", alone: "members(c, top = w)"}}
share: query_key
merge: mean
attend: {causal}route & q != k & q.valid & k.valid | alone & q == k
"""

APART = """
params: {{clusters: {clusters}, w: {width}, n: {queries}, t: {keys}}}
labels: {{c: kmeans(clusters = clusters)}}
select: {{route: "members(c, top = w)"}}
merge: mean
attend: route & k >= n{causal}
"""
"""Queries at 0..n, which are no keys, then t keys, then memories; query q has the key at n + q."""

MERGED = """
labels: {{c: kmeans(clusters = {clusters})}}
select: {{route: "members(c, top = {window})"}}
merge: {merge}
attend: {causal}route
"""


def package() -> Any:
    pytest.importorskip("routing_transformer")
    return pytest.importorskip("routing_transformer.routing_transformer")


def layer(clusters: int, window: int, *, causal: bool, **options: Any) -> Any:
    torch.manual_seed(clusters + window)
    return package().KmeansAttention(clusters, window, HEADS, DIM, causal=causal, **options).double().eval()


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def chosen(theirs: Any, x: Tensor, window: int) -> Tensor:
    """int64 [B, H, clusters, window]: its own members of each centroid, in its order."""
    indices = package().distribution(theirs.kmeans(x)[0], min(window, x.shape[2]))
    return indices.view(*x.shape[:2], theirs.num_clusters, -1)


def alone(members: Tensor, *, causal: bool, valid: Tensor) -> Tensor:
    """Members that have nothing but themselves in a route; -1 for the others."""
    query, key = members[..., :, None], members[..., None, :]
    is_valid = valid[:, None, None].expand(*members.shape[:3], -1).gather(-1, members)
    keep = (query != key) & is_valid[..., :, None] & is_valid[..., None, :]
    if causal:
        keep = keep & (query >= key)
    return members.where(~keep.any(-1), -1)


def count_of(lists: Tensor, n: int) -> Tensor:
    """In how many lists each token is, [B, H, n]; -1 is none."""
    places = lists.flatten(2).where(lists.flatten(2) >= 0, n)
    found = torch.zeros(*places.shape[:2], n + 1, dtype=torch.float64)
    return found.scatter_add_(2, places, torch.ones_like(places, dtype=torch.float64))[..., :n]


def share(members: Tensor, n: int) -> Tensor:
    """count / (count + 1e-5) of each token, [B, H, n, 1]: what its mean is of the mean."""
    count = count_of(members, n)
    return (count / (count + 1e-5))[..., None]


def same(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Outputs, and their gradients in leaves of both."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    grad_out = random(*theirs.shape, seed=2)
    mine, others = (torch.autograd.grad(out, leaves, grad_out, materialize_grads=True) for out in (ours, theirs))
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# ---- shared queries and keys


def shared(
    x: Tensor, value: Tensor, members: Tensor, window: int, *, causal: bool, valid: Tensor, backend: str = "auto"
) -> Tensor:
    """Our output, divided by count + 1e-5 instead of the count."""
    n, clusters = x.shape[2], members.shape[2]
    text = SHARED.format(clusters=clusters, window=window, causal="causal & " if causal else "")
    program = patterndsl.parse(text).compile(n, heads=HEADS, backend=backend)
    inputs = {"route": members, "alone": alone(members, causal=causal, valid=valid), "valid": valid}
    return program(x, normalize(x, dim=-1), value, inputs=inputs) * share(members, n)


def leaves_of(*lengths: int) -> tuple[Tensor, ...]:
    return tuple(
        random(BATCH, HEADS, length, DIM, seed=at).requires_grad_() for at, length in enumerate(lengths, start=3)
    )


def all_valid(n: int) -> Tensor:
    return torch.ones(BATCH, n, dtype=torch.bool)


@pytest.mark.parametrize("backend", ["auto", "oracle"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "clusters", "window"), SIZES)
def test_equals_its_attention_of_shared_queries_and_keys(
    n: int, clusters: int, window: int, causal: bool, backend: str
) -> None:
    theirs = layer(clusters, window, causal=causal, shared_qk=True)
    x, value = leaves_of(n, n)
    members = chosen(theirs, x, window)
    ours = shared(x, value, members, window, causal=causal, valid=all_valid(n), backend=backend)
    same(ours, theirs(x, x, value)[0], (x, value))


def test_equals_it_by_tiles_of_each_route() -> None:
    theirs = layer(3, 4, causal=True, shared_qk=True)
    x, value = leaves_of(12, 12)
    ours = shared(x, value, chosen(theirs, x, 4), 4, causal=True, valid=all_valid(12), backend="gathered")
    same(ours, theirs(x, x, value)[0], (x, value))


@pytest.mark.parametrize("backend", ["auto", "oracle"])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_it_where_rows_are_padded(causal: bool, backend: str) -> None:
    """Padding is routed as well, attends itself and is attended by nothing else."""
    n, clusters, window = 31, 4, 7
    theirs = layer(clusters, window, causal=causal, shared_qk=True)
    x, value = leaves_of(n, n)
    valid = all_valid(n)
    valid[0, 20:], valid[1, :3] = False, False
    members = chosen(theirs, x, window)
    ours = shared(x, value, members, window, causal=causal, valid=valid, backend=backend)
    same(ours, theirs(x, x, value, query_mask=valid)[0], (x, value))


# ---- queries routed apart from keys


@pytest.mark.parametrize("backend", ["auto", "oracle"])
@pytest.mark.parametrize(
    ("n", "keys", "clusters", "window", "key_window", "num_mem_kv", "causal"),
    [
        (31, 31, 4, 7, 7, 0, True),
        (31, 31, 4, 7, 7, 3, True),
        (31, 31, 4, 7, 7, 0, False),
        (40, 40, 3, 5, 5, 2, False),
        (24, 41, 3, 8, 11, 0, False),
        (9, 5, 2, 16, 16, 1, False),
    ],
)
def test_equals_it_where_queries_are_routed_apart(
    n: int, keys: int, clusters: int, window: int, key_window: int, num_mem_kv: int, causal: bool, backend: str
) -> None:
    """Where it is causal, it has one memory at least."""
    options = {"num_mem_kv": num_mem_kv, "receives_context": n != keys, "context_window_size": key_window}
    theirs = layer(clusters, window, causal=causal, **options)
    query, key, value = leaves_of(n, keys, keys)
    dists = theirs.kmeans(torch.cat((query, key), dim=2))[0].split((n, keys), dim=2)
    windows = min(window, n), min(key_window, keys)
    q_members, k_members = (
        package().distribution(found, width).view(BATCH, HEADS, clusters, width)
        for found, width in zip(dists, windows, strict=True)
    )
    num_memories = clusters * theirs.num_mem_kv
    memories = n + keys + torch.arange(num_memories).view(clusters, -1).expand(BATCH, HEADS, -1, -1)
    lists = torch.cat((q_members, n + k_members, memories), dim=-1)

    before = " & (q >= k - n | k >= n + t)" if causal else ""
    text = APART.format(clusters=clusters, width=lists.shape[-1], queries=n, keys=keys, causal=before)
    program = patterndsl.parse(text).compile(n + keys + num_memories, q_len=n, heads=HEADS, backend=backend)
    nothing = query.new_zeros(BATCH, HEADS, n, DIM)
    learned = (memory.flatten(1, 2).expand(BATCH, -1, -1, -1) for memory in (theirs.mem_key, theirs.mem_value))
    mine = (torch.cat((nothing, x, memory), dim=2) for x, memory in zip((key, value), learned, strict=True))
    ours = program(query, *mine, inputs={"route": lists}) * share(q_members, n)
    same(ours, theirs(query, key, value)[0], (query, key, value, theirs.mem_key, theirs.mem_value))


# ---- where it differs


def test_a_fallback_is_of_rows_and_its_own_is_of_routes() -> None:
    """`fallback: q == k` is what a query attends that has no key in any route. In the library a token that is first in
    one route and not in another attends itself in the one, and that is averaged in; only those rows differ."""
    n, clusters, window = 65, 8, 16
    theirs = layer(clusters, window, causal=True, shared_qk=True)
    x, value = leaves_of(n, n)
    members = chosen(theirs, x, window)
    text = MERGED.format(clusters=clusters, window=window, merge="mean\nfallback: q == k", causal="q != k & causal & ")
    program = patterndsl.parse(text).compile(n, heads=HEADS)
    found = program(x, normalize(x, dim=-1), value, inputs={"route": members})
    expected = theirs(x, x, value)[0]

    firsts, routed = alone(members, causal=True, valid=all_valid(n)), count_of(members, n)
    num_first = count_of(firsts, n)
    is_mixed = (num_first > 0) & (num_first < routed)
    is_unrouted = routed == 0
    assert is_mixed.any() and is_unrouted.any()
    alike = ~is_mixed & ~is_unrouted
    torch.testing.assert_close((found * share(members, n))[alike], expected[alike], rtol=0, atol=1e-9)
    assert ((found - expected)[is_mixed].abs().amax(-1) > 1e-3).all()
    assert (expected[is_unrouted] == 0).all()
    assert (found[is_unrouted] == value[is_unrouted]).all()


def test_it_attends_itself_where_others_score_less_than_its_constant() -> None:
    """A token's own key is not masked there but scores -5e4: where all others score less, it has all of the weight."""
    theirs = layer(1, 2, causal=False, shared_qk=True)
    x = torch.zeros(BATCH, HEADS, 2, DIM, dtype=torch.float64)
    x[..., 0, 0], x[..., 1, 0] = 1e6, -1.0  # query 0 and key 1: -1e6 / sqrt(8)
    (value,) = leaves_of(2)
    members = torch.arange(2).expand(BATCH, HEADS, 1, 2)
    ours = shared(x, value, members, 2, causal=False, valid=all_valid(2))
    found = theirs(x, x, value)[0]
    torch.testing.assert_close(ours * (1 + 1e-5), value.flip(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(found * (1 + 1e-5), value[:, :, [0, 0]], rtol=0, atol=1e-9)


def test_its_centroids_are_averages_of_unit_means() -> None:
    """A step there averages the directions of means, one for each batch; here counts and sums are averaged, and a
    centroid is their quotient, as in the paper. Without memory the directions are the same, and the lengths are not."""
    theirs, x = layer(4, 8, causal=False, shared_qk=True, ema_decay=0.0), random(BATCH, HEADS, 40, DIM)
    ours = learner(theirs, x, decay=0.0)
    theirs.train()
    theirs(x, x, x)
    theirs.kmeans.update()
    ours.update(x)
    torch.testing.assert_close(normalize(ours.centroids, dim=-1), theirs.kmeans.means, rtol=0, atol=1e-9)
    assert (ours.centroids.norm(dim=-1) < 0.9).all()


# ---- members and centroids


def learner(theirs: Any, x: Tensor, **options: Any) -> KMeans:
    """Ours with the centroids that its first call finds."""
    theirs.kmeans(x)
    ours = KMeans(HEADS, DIM, theirs.num_clusters, **options).double()
    ours.centroids.copy_(theirs.kmeans.means)
    ours.is_begun.fill_(True)
    return ours


@pytest.mark.parametrize(("n", "clusters", "window"), SIZES)
def test_members_are_its_own(n: int, clusters: int, window: int) -> None:
    theirs, x = layer(clusters, window, causal=False, shared_qk=True), random(BATCH, HEADS, n, DIM).requires_grad_()
    ours = learner(theirs, x)
    assert torch.equal(ours.members(x, min(window, n)), chosen(theirs, x, window).sort(-1).values)
    assert torch.equal(ours(x), package().dists_and_buckets(normalize(x, dim=-1), theirs.kmeans.means)[1])
    same(ours.commitment(x) * theirs.kmeans.commitment, theirs(x, x, x)[1], (x,))


@pytest.mark.parametrize(("n", "clusters", "top"), [(1, 1, 1), (12, 3, 4), (12, 5, 1), (9, 2, 16), (65, 8, 16)])
def test_members_equal_a_loop(n: int, clusters: int, top: int) -> None:
    ours, key = KMeans(HEADS, DIM, clusters, seed=5).double(), random(BATCH, HEADS, n, DIM)
    found = ours.members(key, top)
    assert found.shape == (BATCH, HEADS, clusters, min(top, n))
    for b in range(BATCH):
        for head in range(HEADS):
            for c in range(clusters):
                cosine = [
                    float(ours.centroids[head, c] @ key[b, head, k]) / float(key[b, head, k].norm()) for k in range(n)
                ]
                nearest = sorted(sorted(range(n), key=lambda k: -cosine[k])[:top])
                assert found[b, head, c].tolist() == nearest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("merge", ["mean", "multiset", "set"])
@pytest.mark.parametrize("n", [1, 33])
def test_one_centroid_of_all_tokens_is_dense_attention(n: int, merge: str, causal: bool, backend: str) -> None:
    text = MERGED.format(clusters=1, window="N", merge=merge, causal="causal & " if causal else "")
    query, key, value = leaves_of(n, n, n)
    members = KMeans(HEADS, DIM, 1).double().members(key, n)
    ours = patterndsl.parse(text).compile(n, heads=HEADS, backend=backend)(query, key, value, inputs={"route": members})
    same(ours, scaled_dot_product_attention(query, key, value, is_causal=causal), (query, key, value))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", ["mean", "multiset", "set"])
def test_rows_in_no_route_are_zero(merge: str, backend: str) -> None:
    n, clusters, window = 31, 3, 4
    query, key, value = leaves_of(n, n, n)
    members = KMeans(HEADS, DIM, clusters).double().members(key, window)
    is_unrouted = count_of(members, n) == 0
    program = patterndsl.parse(MERGED.format(clusters=clusters, window=window, merge=merge, causal="causal & "))
    out = program.compile(n, heads=HEADS, backend=backend)(query, key, value, inputs={"route": members})
    gradients = torch.autograd.grad(out, (query, key, value), random(*out.shape))
    assert is_unrouted.any(-1).all()
    for x in (out, *gradients):
        assert (x[is_unrouted] == 0).all() and (x[~is_unrouted].abs().sum(-1) > 0).any()


# ---- lengths, and what is not attended


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", ["mean", "multiset", "set"])
def test_later_queries_have_the_rows_of_all(merge: str, backend: str) -> None:
    n, q_start = 31, 9
    query, key, value = leaves_of(n, n, n)
    lists = {"route": KMeans(HEADS, DIM, 3).double().members(key, 7)}
    pattern = patterndsl.parse(MERGED.format(clusters=3, window=7, merge=merge, causal="causal & "))
    ours = pattern.compile(n, q_start=q_start, heads=HEADS, backend=backend)(
        query[:, :, q_start:], key, value, inputs=lists
    )
    expected = pattern.compile(n, heads=HEADS, backend="oracle")(query, key, value, inputs=lists)
    same(ours, expected[:, :, q_start:], (query, key, value))


def test_a_centroid_has_as_many_members_as_there_are_keys() -> None:
    pattern = patterndsl.parse(MERGED.format(clusters=1, window=8, merge="mean", causal=""))
    (route,) = pattern.bind(q_len=3, kv_len=12).inputs
    assert route.selection is not None and route.selection.width == 8


@pytest.mark.parametrize(
    "merge",
    [
        "mean",
        "multiset",
        "set",
    ],
)
def test_members_that_are_not_attended_may_be_anything(merge: str) -> None:
    n = 8
    query, key, value = leaves_of(n, n, n)
    lists = {"route": torch.arange(n)[None]}
    program = patterndsl.parse(MERGED.format(clusters=1, window=n, merge=merge, causal="causal & ")).compile(
        n, heads=HEADS
    )
    expected = program(query, key, value, inputs=lists)[:, :, :-1]
    is_last = torch.arange(n)[:, None] == n - 1
    key, value = key.masked_fill(is_last, torch.inf), value.masked_fill(is_last, torch.nan)
    torch.testing.assert_close(program(query, key, value, inputs=lists)[:, :, :-1], expected, rtol=0, atol=1e-9)


# ---- in a layer


def test_a_layer_attends_as_it_does() -> None:
    """Scores of a layer that shares queries and keys are products with unit keys, without the library's
    1 / sqrt(head_dim)."""
    n, clusters, window, dim = 31, 3, 5, HEADS * DIM
    torch.manual_seed(0)
    text = MERGED.format(clusters=clusters, window=window, merge="mean\nshare: query_key", causal="q != k & ")
    mine = Attention(text, dim, HEADS, bias=False).double().eval()
    x = random(BATCH, n, dim).requires_grad_()
    query, value = (
        projection(x).view(BATCH, n, HEADS, DIM).transpose(1, 2)
        for projection in (mine.query_projection, mine.value_projection)
    )
    theirs = layer(clusters, window, causal=False, shared_qk=True)
    members = chosen(theirs, query, window)
    found = mine.learners["c"]
    assert isinstance(found, KMeans)
    found.centroids.copy_(theirs.kmeans.means)
    attended = theirs(query * DIM**0.5, query, value)[0] / share(members, n).where(share(members, n) > 0, 1.0)
    expected = mine.output_projection(attended.transpose(1, 2).flatten(2))
    same(mine(x), expected, (x, *mine.parameters()))
