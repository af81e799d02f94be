"""Labels, members and the commitment on kernels, against plain code: in Triton's interpreter, and on a GPU.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patterndsl.learn import kmeans as kmeans_module
from patterndsl.learn.kmeans import KMeans
from tests.strategies import many

pytest.importorskip("triton")

from patterndsl.learn import nearest
from tests.interpreting import HAS_CUDA, IS_INTERPRETED, assert_passes_in_the_interpreter, compiles, runs

DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 4e-6
"""Of scores of unit keys and centroids in float32, made in two ways."""

on_cuda = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies what bfloat16 looks like as an integer."""
    if not IS_INTERPRETED:
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    product = InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != bfloat16:
            return x
        return TensorHandle((x.data.astype("uint32") << 16).view("float32"), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def learner(heads: int, dim: int, clusters: int) -> KMeans:
    return KMeans(heads, dim, clusters).to(DEVICE)


def signs(*shape: int, seed: int) -> Tensor:
    """1 and -1: of 16 or 64 channels the lengths are powers of two, so scores are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).float().to(DEVICE)


def in_plain_order(scores: Tensor, tops: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Labels and members by scores [B, H, clusters, T], the earlier of equal ones first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    labels = scores.transpose(-1, -2).sort(dim=-1, descending=True, stable=True).indices[..., 0]
    return labels, {top: order[..., :top].sort(-1).values for top in tops}


# ---- what is found


@runs
@on_cuda
@many(0.3)
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    clusters=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 15, 16, 17, 63, 128, 129, 300]),
    dim=st.sampled_from([16, 64]),
    tops=st.lists(st.sampled_from([1, 2, 7, 16, 40, 1000]), max_size=2, unique=True),
    seed=st.integers(0, 1000),
)
def test_of_equal_scores_the_first(
    dtype: torch.dtype, batch: int, heads: int, clusters: int, length: int, dim: int, tops: list[int], seed: int
) -> None:
    key, centroids = signs(batch, heads, length, dim, seed=seed), signs(heads, clusters, dim, seed=seed + 1)
    if seed % 3 == 0:
        key[:, :, length // 2 :] = key[:, :, :1]  # the same scores again and again
    if seed % 3 == 1:
        key[:, :, ::2] = 0
    found = nearest.assigned(key.to(dtype), centroids, tops)
    expected = in_plain_order(centroids @ (key / dim**0.5).transpose(-1, -2), tops)
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for top in tops:
        assert torch.equal(found[1][top], expected[1][top])


@runs
@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [64, 65])
def test_several_tiles_of_centroids(dtype: torch.dtype, clusters: int) -> None:
    key, centroids = signs(1, 1, 140, 16, seed=0), signs(1, clusters, 16, seed=1)
    centroids[0, 40:] = centroids[0, : clusters - 40]
    labels, members = nearest.assigned(key.to(dtype), centroids, (3,))
    expected = in_plain_order(centroids @ (key / 4).transpose(-1, -2), (3,))
    assert torch.equal(labels, expected[0])
    assert torch.equal(members[3], expected[1][3])


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@many(0.3)
@given(
    dtype=st.sampled_from(DTYPES),
    clusters=st.sampled_from([1, 5]),
    length=st.sampled_from([1, 31, 200, 513]),
    dim=st.sampled_from([1, 7, 16, 48, 128]),
    tops=st.sampled_from([(), (1,), (5, 33), (600,)]),
    is_turned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_token_that_is_left_out_scores_higher(
    dtype: torch.dtype, clusters: int, length: int, dim: int, tops: tuple[int, ...], is_turned: bool, seed: int
) -> None:
    """Up to how float32 rounds; keys of any length, some of which have none."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    key = torch.randn(2, length, 2, dim, device=DEVICE, generator=generator).transpose(1, 2)
    key = (key * torch.rand(2, 2, length, 1, device=DEVICE, generator=generator) * 9).to(dtype)
    key[0, 0, length // 2, dim // 2], key[1, 1, 0], key[1, 0, -1] = torch.nan, torch.inf, 0
    if is_turned:
        key = key.transpose(-1, -2).contiguous().transpose(-1, -2)
    ours = learner(2, dim, clusters)
    labels, members = ours.assigned(key, tops)
    scores = ours.centroids.double() @ ours._unit(key).double().transpose(-1, -2)
    of_label = scores.gather(2, labels[:, :, None]).squeeze(2)
    assert (of_label >= scores.amax(2) - TOLERANCE).all()
    assert members.keys() == set(tops)
    for top, found in members.items():
        assert found.shape == (2, 2, clusters, min(top, length))
        assert (found.diff(dim=-1) > 0).all() and (found >= 0).all() and (found < length).all()
        is_out = torch.ones_like(scores, dtype=torch.bool).scatter_(3, found, False)
        least = scores.gather(3, found).amin(-1)
        assert (scores.masked_fill(~is_out, -torch.inf).amax(-1) <= least + TOLERANCE).all()


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's, where there is no GPU."""
    monkeypatch.setattr(kmeans_module, "has_kernels", lambda _: True)


@runs
@on_cuda
def test_long_sequences_have_longer_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "MOST_PLACES", 256)
    key, centroids = signs(1, 1, 8100, 16, seed=0), signs(1, 3, 16, seed=1)
    assert nearest._chunk_of(8100, (3,)) == 64
    found = nearest.assigned(key, centroids, (3,))
    expected = in_plain_order(centroids @ (key / 4).transpose(-1, -2), (3,))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][3], expected[1][3])


# ---- the commitment


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "dim"), [(1, 16), (70, 24), (129, 64)])
def test_the_commitment_and_its_gradient(dtype: torch.dtype, length: int, dim: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(length)
    key = torch.randn(2, length, 2, dim, device=DEVICE, generator=generator).to(dtype).transpose(1, 2)
    key.requires_grad_()
    ours, plain = learner(2, dim, 5), learner(2, dim, 5).double()
    labels = plain(key.detach())
    loss = ours.commitment(key, labels)
    ours.centroids.zero_()  # as a step that moves them
    (grad,) = torch.autograd.grad(loss * key.numel(), key)
    wide = key.detach().double().requires_grad_()
    expected = plain.commitment(wide, labels)
    (expected_grad,) = torch.autograd.grad(expected * key.numel(), wide)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    rounding = max(1e-6, torch.finfo(dtype).eps)  # of the result, which the interpreter cuts off
    scale = float(expected_grad.abs().max())
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=1e-5 * scale)


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_keys_without_a_direction_are_committed_as_plainly() -> None:
    """A key of zeros is as far as its centroid is long; NaN is NaN."""
    ours, key = learner(1, 16, 3), signs(1, 1, 9, 16, seed=0)
    key[0, 0, 4] = 0
    labels = torch.arange(9, device=DEVICE)[None, None] % 3
    plain = learner(1, 16, 3).double()
    torch.testing.assert_close(ours.commitment(key, labels).double(), plain.commitment(key, labels), rtol=1e-5, atol=0)
    key[0, 0, 4, 3] = torch.nan
    assert ours.commitment(key, labels).isnan()


@runs
@on_cuda
@pytest.mark.usefixtures("with_kernels")
def test_a_step_is_that_of_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    key = torch.randn(2, 2, 90, 16, device=DEVICE, generator=generator, requires_grad=True)
    found = []
    for is_plain in (False, True):
        if is_plain:
            monkeypatch.setattr(kmeans_module, "has_kernels", lambda _: False)
        ours = learner(2, 16, 4).train()
        with ours.step(key, (7,)) as assigned:
            loss = ours.commitment(key, assigned.labels)
        (grad,) = torch.autograd.grad(loss, key)
        found.append((*assigned.members.values(), assigned.labels, loss, grad, ours.centroids))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


# ---- what others run


@pytest.mark.parametrize(
    ("key", "tops"),
    [
        (torch.empty(1, 1, 8, 16, dtype=torch.float64), ()),
        (torch.empty(1, 1, 0, 16), ()),
        (torch.empty(1, 1, 8, 256), ()),
        (torch.empty(1, 1, 8, 16).expand(1, 1, 8, 16), (1 << 20,)),
        (torch.empty(1, 1, 1, 16).expand(1, 1, 1 << 17, 16), (1 << 12,)),
        (torch.empty(1, 1, 1, 16).expand(1, 1, 1 << 21, 16), (1,)),
        (torch.empty(1, 1, 1, 16).expand(1, 1, 1 << 21, 16), ()),
        (torch.empty(1, 1, 1, 16).expand(1, 1, 1 << 20, 16), (256,)),
    ],
    ids=["float64", "no keys", "wide", "more members than keys", "many members", "very long", "labels alone", "long"],
)
def test_which_there_are_kernels_for(key: Tensor, tops: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    takes = request.node.callspec.id in ("more members than keys", "labels alone", "long")
    assert nearest.takes(key, torch.empty(1, 4, key.shape[3]), tops) == takes


# ---- on a GPU, and without one


@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.cuda
def test_the_same_bits_in_a_graph() -> None:
    key = torch.randn(1, 4, 5000, 64, device="cuda", dtype=torch.bfloat16)
    ours = learner(4, 64, 70)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        labels, members = ours.assigned(key, (32,))
        return labels, members[32], ours.commitment(key, labels)

    expected = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_kernels_compile(dtype: torch.dtype, dim: int) -> None:
    from tests.compiling import compiling

    with compiling() as found:
        for clusters, length, tops in ((128, 16384, (128,)), (100, 3001, (5, 4000)), (1, 1, (1,))):
            key = torch.empty(1, 2, length, dim, dtype=dtype, requires_grad=True)
            labels, _ = nearest.assigned(key, torch.empty(2, clusters, dim), tops)
            nearest.commitment(key, torch.empty(2, clusters, dim), labels).backward()
    assert {"split_kernel", "nearest_kernel", "members_kernel"} <= set(found.compiled)
    assert {"commitment_kernel", "commitment_gradient_kernel"} <= set(found.compiled)


@compiles
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
