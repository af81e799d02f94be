"""Soft permutations against explicit loops, and what no row may see."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from patterndsl.diagnostics import InputError
from patterndsl.learn.sinkhorn import SortNet, causal_sinkhorn, mixed, sinkhorn

BATCH, HEADS, DIM = 2, 3, 4
LENGTHS = [(1, 1), (5, 5), (9, 4), (12, 4), (13, 4), (23, 3), (16, 1)]
"""T and block: one block, ragged last blocks of one token or more, whole ones, and tokens as blocks."""


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def tokens(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(BATCH, HEADS, length, DIM, dtype=dtype)


def net_of(max_blocks: int, hidden: int | None = None) -> SortNet:
    return SortNet(HEADS, DIM, max_blocks, hidden=hidden).double()


def balanced_by_loops(logits: np.ndarray, iterations: int, causal: bool) -> np.ndarray:
    """Of one matrix: weights that are divided by sums, entry by entry."""
    n = len(logits)
    kept = [(u, v) for u in range(n) for v in range(n) if not causal or v < u]
    weights = np.zeros((n, n))
    for u, v in kept:
        weights[u, v] = math.exp(logits[u, v])
    for _ in range(iterations):
        given = weights.copy()
        for u, v in kept:
            weights[u, v] = given[u, v] / math.fsum(given[u, other] for other in range(n))
        given = weights.copy()
        for u, v in kept:
            rows = range(u + 1) if causal else range(n)
            weights[u, v] = given[u, v] / math.fsum(given[other, v] for other in rows)
    return weights


def logits_by_loops(x: np.ndarray, layers: list[np.ndarray], block: int, causal: bool) -> np.ndarray:
    """Of one head's tokens [T, D]."""
    n = math.ceil(len(x) / block)
    logits = np.zeros((n, n))
    for u in range(n):
        start, stop = (0, u * block + 1) if causal else (u * block, min((u + 1) * block, len(x)))
        found = sum((x[token] for token in range(start, stop)), np.zeros(x.shape[1]))
        for at, layer in enumerate(layers):
            found = (found if at == 0 else np.maximum(found, 0)) @ layer
        logits[u] = found[:n]
    return logits


# ---- balancing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 16, 33])
def test_rows_and_columns_sum_to_one(n: int, dtype: torch.dtype) -> None:
    weights = sinkhorn(random(BATCH, HEADS, n, n, dtype=dtype), 50)
    assert weights.dtype == dtype
    for sums in (weights.sum(-1), weights.sum(-2)):
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_balancing_equals_loops(n: int, iterations: int, causal: bool) -> None:
    logits = 2 * random(BATCH, n, n)
    ours = (causal_sinkhorn if causal else sinkhorn)(logits, iterations)
    for one, given in zip(ours.numpy(), logits.numpy(), strict=True):
        np.testing.assert_allclose(one, balanced_by_loops(given, iterations, causal), rtol=0, atol=1e-12)


def test_clear_wishes_become_a_permutation() -> None:
    wanted = torch.tensor([2, 0, 3, 1])
    permutation = torch.eye(4)[wanted]
    torch.testing.assert_close(sinkhorn(100 * permutation, 3), permutation, rtol=0, atol=1e-6)


def test_the_causal_limit_is_the_block_before() -> None:
    """The one strictly causal matrix whose rows and columns sum to 1; other weights fall like 1 / iterations."""
    n = 6
    before = torch.ones(n - 1, dtype=torch.float64).diag(-1)
    few, many = (causal_sinkhorn(random(n, n), iterations) for iterations in (50, 500))
    assert torch.equal(few.diagonal(-1), torch.ones(n - 1, dtype=torch.float64))
    assert 0.005 < (few - before).max() < 0.05
    assert 0.0005 < (many - before).max() < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_causal_row_depends_on_no_later_row(dtype: torch.dtype) -> None:
    n = 9
    logits = random(BATCH, HEADS, n, n, dtype=dtype)
    expected = causal_sinkhorn(logits, 5)
    for row in range(n - 1):
        changed = logits.clone()
        changed[..., row + 1 :, :] = 100 * random(BATCH, HEADS, n - row - 1, n, seed=2)
        found = causal_sinkhorn(changed, 5)
        assert torch.equal(found[..., : row + 1, :], expected[..., : row + 1, :])
        if row + 2 < n:  # row 1 has one block to choose from
            assert not torch.equal(found[..., row + 2 :, :], expected[..., row + 2 :, :])


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("n", [1, 2, 7])
def test_row_zero_is_zeros_without_gradient(n: int) -> None:
    """And no NaN on the way, which anomaly detection would report."""
    logits = random(n, n, dtype=torch.float32).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        weights = causal_sinkhorn(logits, 5)
        (grad,) = torch.autograd.grad((weights * random(n, n, seed=2, dtype=torch.float32)).sum(), logits)
    assert torch.equal(weights[0], torch.zeros(n))
    assert grad.isfinite().all()
    assert torch.equal(grad.triu(), torch.zeros(n, n))
    assert n < 3 or grad[-1, :-1].ne(0).all()


@pytest.mark.parametrize("balance", [sinkhorn, causal_sinkhorn])
def test_logits_far_apart_stay_finite(balance) -> None:
    logits = (1e4 * random(8, 8, dtype=torch.float32)).requires_grad_()
    weights = balance(logits, 8)
    (grad,) = torch.autograd.grad(weights.square().sum(), logits)
    assert weights.isfinite().all() and grad.isfinite().all()
    assert weights.max() <= 1 + 1e-3


@pytest.mark.parametrize("balance", [sinkhorn, causal_sinkhorn])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradients_of_balancing(balance, n: int) -> None:
    assert torch.autograd.gradcheck(lambda logits: balance(logits, 3), random(2, n, n).requires_grad_())


# ---- sort nets


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize(("length", "block"), LENGTHS)
def test_a_sort_net_equals_loops(length: int, block: int, hidden: int | None, causal: bool) -> None:
    x, net = tokens(length), net_of(16, hidden)
    ours = net(x, block, tau=0.75, iterations=4, causal=causal, noise=False).detach().numpy()
    layers = [weight.detach().numpy() for weight in net.weights]
    n = math.ceil(length / block)
    assert ours.shape == (BATCH, HEADS, n, n)
    for batch in range(BATCH):
        for head in range(HEADS):
            logits = logits_by_loops(x[batch, head].numpy(), [layer[head] for layer in layers], block, causal)
            expected = balanced_by_loops(logits / 0.75, 4, causal)
            np.testing.assert_allclose(ours[batch, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [None, 6])
def test_what_comes_later_is_not_seen(hidden: int | None, dtype: torch.dtype) -> None:
    """Row u sees tokens up to the first of block u; the blocks that it mixes are whole before it."""
    block, num_blocks = 4, 6
    x, net = tokens(block * num_blocks - 1, dtype), SortNet(HEADS, DIM, num_blocks, hidden=hidden)

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        weights = net(x, block, tau=0.75, iterations=5, causal=True, noise=False)
        return weights, mixed(x, weights, block)

    expected, expected_mix = of(x)
    for blk in range(num_blocks):
        for start, num_same in ((blk * block, blk), (blk * block + 1, blk + 1)):
            changed = x.clone()
            changed[:, :, start : (blk + 1) * block] *= -100
            weights, mix = of(changed)
            assert torch.equal(weights[:, :, :num_same], expected[:, :, :num_same])
            assert torch.equal(mix[:, :, : num_same * block], expected_mix[:, :, : num_same * block])
            if blk + 1 < num_blocks:
                assert not torch.equal(weights[:, :, blk + 1 :], expected[:, :, blk + 1 :])


def test_without_causal_every_row_sees_every_block() -> None:
    x, net = tokens(23), net_of(6)
    expected = net(x, 4, tau=0.75, iterations=5, causal=False, noise=False)
    for blk in range(6):
        changed = x.clone()
        changed[:, :, blk * 4 : blk * 4 + 4] *= 2
        found = net(changed, 4, tau=0.75, iterations=5, causal=False, noise=False)
        assert (found != expected).any(-1).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [None, 3])
def test_gradients_of_a_sort_net_and_what_it_mixes(hidden: int | None, causal: bool) -> None:
    net = SortNet(2, 3, 4, hidden=hidden).double()
    x = random(1, 2, 8, 3, seed=3).requires_grad_()

    def of(x: Tensor, *weights: Tensor) -> Tensor:
        given = {f"weights.{at}": weight for at, weight in enumerate(weights)}
        options = {"tau": 0.75, "iterations": 2, "causal": causal, "noise": False}
        return mixed(x, torch.func.functional_call(net, given, (x, 3), options), 3)

    assert torch.autograd.gradcheck(of, (x, *net.weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_computed_in_float32(causal: bool, dtype: torch.dtype) -> None:
    x, net = tokens(13, dtype), SortNet(HEADS, DIM, 4)
    expected = net(x.float(), 4, tau=0.75, iterations=5, causal=causal, noise=False)
    expected_mix = mixed(x.float(), expected, 4)
    weights = net(x, 4, tau=0.75, iterations=5, causal=causal, noise=False)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)
    assert torch.equal(mixed(x, weights, 4), expected_mix.to(dtype))
    balance = causal_sinkhorn if causal else sinkhorn
    logits = random(5, 5, dtype=dtype)
    assert torch.equal(balance(logits, 5), balance(logits.float(), 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x.float(), 4, tau=0.75, iterations=5, causal=causal, noise=False), expected)
        assert torch.equal(mixed(x.float(), expected, 4), expected_mix)


def test_noise_only_where_it_is_asked() -> None:
    x, net = tokens(12), net_of(3)

    def of(seed: int, noise: bool) -> Tensor:
        torch.manual_seed(seed)
        return net(x, 4, tau=0.75, iterations=5, causal=False, noise=noise)

    state = torch.manual_seed(3).get_state()
    net(x, 4, tau=0.75, iterations=5, causal=False, noise=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(of(1, noise=False), of(2, noise=False))
    assert torch.equal(of(1, noise=True), of(1, noise=True))
    assert not torch.equal(of(1, noise=True), of(2, noise=True))
    assert not torch.equal(of(1, noise=True), of(1, noise=False))


def test_noise_is_gumbels_and_comes_before_tau() -> None:
    torch.manual_seed(0)
    x, net, tau = random(4, HEADS, 100, DIM), net_of(100), 0.5
    log_weights = net(x, 1, tau=tau, iterations=0, causal=False, noise=True).log()
    noise = log_weights * tau - net.logits(x, 1, causal=False)
    assert noise.mean().item() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    assert torch.corrcoef(noise.flatten(1))[0, 1:].abs().max() < 0.03  # drawn for each sequence


def test_more_blocks_than_a_sort_net_has() -> None:
    net = net_of(5)
    assert net(tokens(20), 4, tau=1.0, iterations=1, causal=False, noise=False).shape[-1] == 5
    with pytest.raises(InputError) as caught:
        net(tokens(21), 4, tau=1.0, iterations=1, causal=False, noise=False)
    (found,) = caught.value.diagnostics
    assert found.code == "E505"
    assert found.message == "6 blocks of 4 tokens for a sort net of 5 blocks"
    assert found.help == "make it with max_blocks = 6 or more, or take blocks of 5 tokens or more"


def test_a_seed_is_a_start() -> None:
    one, same, other = (SortNet(HEADS, DIM, 8, hidden=5, seed=seed) for seed in (1, 1, 2))
    assert [tuple(weight.shape) for weight in one.weights] == [(HEADS, DIM, 5), (HEADS, 5, 8)]
    for mine, equal, different in zip(one.weights, same.weights, other.weights, strict=True):
        assert torch.equal(mine, equal)
        assert not torch.equal(mine, different)


# ---- mixing


def padded(x: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))


@pytest.mark.parametrize(("length", "block"), LENGTHS)
def test_the_identity_leaves_blocks_as_they_are(length: int, block: int) -> None:
    x = tokens(length)
    identity = torch.eye(math.ceil(length / block), dtype=torch.float64).expand(BATCH, HEADS, -1, -1)
    assert torch.equal(mixed(x, identity, block), padded(x, block))


def test_a_permutation_moves_whole_blocks() -> None:
    x, order = tokens(11), torch.tensor([2, 0, 1])
    weights = torch.eye(3, dtype=torch.float64)[order].expand(BATCH, HEADS, -1, -1)
    expected = torch.cat([padded(x, 4)[:, :, 4 * blk : 4 * blk + 4] for blk in order], dim=2)
    assert torch.equal(mixed(x, weights, 4), expected)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("length", "block"), LENGTHS)
def test_mixing_equals_the_kronecker_product(length: int, block: int, rows: int) -> None:
    x = tokens(length)
    weights = random(BATCH, HEADS, rows, math.ceil(length / block), seed=2)
    ours = mixed(x, weights, block)
    for batch in range(BATCH):
        for head in range(HEADS):
            whole = torch.kron(weights[batch, head], torch.eye(block, dtype=torch.float64))
            expected = whole @ padded(x, block)[batch, head]
            torch.testing.assert_close(ours[batch, head], expected, rtol=0, atol=1e-12)


def test_gradients_of_mixing() -> None:
    x, weights = random(1, 2, 8, 3).requires_grad_(), random(1, 2, 2, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weights: mixed(x, weights, 3), (x, weights))


@pytest.mark.parametrize("causal", [False, True])
def test_no_tokens_have_no_blocks(causal: bool) -> None:
    x = tokens(0)
    weights = net_of(4)(x, 4, tau=1.0, iterations=2, causal=causal, noise=True)
    assert weights.shape == (BATCH, HEADS, 0, 0)
    assert mixed(x, weights, 4).shape == x.shape
