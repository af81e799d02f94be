"""Synthesizers against the formula of each logit, their gradients, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patterndsl.diagnostics import InputError
from patterndsl.nn import Attention
from patterndsl.score.synthesize import Dense, FactoredDense, FactoredRandom, Mixture, Random, Synthesizer

DIM, HEADS, LENGTH = 5, 2, 12


def mixture(dim: int, heads: int, length: int) -> Mixture:
    members = [Dense(dim, heads, length, hidden=3), FactoredRandom(dim, heads, length, rank=2)]
    return Mixture(dim, heads, length, members=members)


KINDS: dict[str, Callable[[int, int, int], Synthesizer]] = {
    "dense": lambda *sizes: Dense(*sizes, hidden=4),
    "dense_wide": Dense,
    "random": Random,
    "factored_dense": FactoredDense,
    "factored_random": lambda *sizes: FactoredRandom(*sizes, rank=3),
    "mixture": mixture,
}


def made(kind: str, length: int = LENGTH) -> Synthesizer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = KINDS[kind](DIM, HEADS, length).double()
        for parameter in module.parameters():
            nn.init.normal_(parameter)
    return module


def states(length: int) -> Tensor:
    return torch.randn(3, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logit(module: nn.Module, x: Tensor, head: int, q: int, k: int) -> Tensor:
    """One logit, of a query's state x [dim], by the paper's formula."""
    match module:
        case Dense(first=first, second=second):
            hidden = (x @ first.weight[head] + first.bias[head, 0]).relu()
            return hidden @ second.weight[head, :, k] + second.bias[head, 0, k]
        case Random():
            return module.weight[head, q, k]
        case FactoredDense(inner=inner, outer=outer):
            num_inner = inner.bias.shape[-1]
            a = x @ inner.weight[head] + inner.bias[head, 0]
            b = x @ outer.weight[head] + outer.bias[head, 0]
            tiled, repeated = a.repeat(len(b)), b.repeat_interleave(num_inner)
            return tiled[k] * repeated[k]
        case FactoredRandom():
            return module.rows[head, q] @ module.columns[head, k]
        case Mixture():
            shares = module.weight.exp() / module.weight.exp().sum()
            return torch.stack([s * logit(m, x, head, q, k) for s, m in zip(shares, module.members, strict=True)]).sum()
    raise AssertionError(module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q_len", "num_keys"), [(12, 12), (7, 7), (1, 12), (5, 1), (3, 10)])
def test_each_logit_is_the_formula(kind: str, q_len: int, num_keys: int) -> None:
    module, x = made(kind), states(q_len).requires_grad_()
    found = module(x, num_keys)
    assert found.shape == (1 if "random" in kind else 3, HEADS, q_len, num_keys)
    found = found.expand(3, -1, -1, -1)
    expected = torch.stack(
        [
            logit(module, x[b, q], head, q, k)
            for b in range(3)
            for head in range(HEADS)
            for q in range(q_len)
            for k in range(num_keys)
        ]
    ).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *module.parameters()]
    pull = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    have = torch.autograd.grad((found * pull).sum(), leaves, materialize_grads=True)
    want = torch.autograd.grad((expected * pull).sum(), leaves, materialize_grads=True)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_depends_on_no_other_token(kind: str) -> None:
    module, x = made(kind), states(9)
    other = x.clone()
    other[:, 4:] = 1e6
    assert torch.equal(module(x, 9)[:, :, :4], module(other, 9)[:, :, :4])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    module = made(kind, 4)
    assert torch.autograd.gradcheck(lambda x: module(x, 3) * x.sum(), states(2)[:1].requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str) -> None:
    module, other = made(kind), KINDS[kind](DIM, HEADS, LENGTH).double()
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(states(8), 8), other(states(8), 8))


def test_random_with_the_products_copied_in_is_attention() -> None:
    q, k, v = torch.randn(3, HEADS, LENGTH, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    module = Random(DIM, HEADS, LENGTH).double()
    with torch.no_grad():
        module.weight.copy_(q @ k.mT / 2)
    found = module(states(LENGTH), LENGTH).softmax(-1) @ v
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [Random, FactoredRandom])
def test_fixed_draws_are_not_trained_but_saved(kind: type[Random] | type[FactoredRandom]) -> None:
    module = kind(DIM, HEADS, LENGTH, trainable=False)
    assert not module(states(4).float(), 4).requires_grad
    assert len(module.state_dict()) == len(kind(DIM, HEADS, LENGTH).state_dict())


def test_first_draws() -> None:
    """Logits of both random kinds vary as much; a mixture begins with equal shares."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = states(1).float().expand(-1, 100, -1)
        for kind in (Random(DIM, 8, 100), FactoredRandom(DIM, 8, 100, rank=32)):
            assert abs(kind(x, 100).std().item() - 1) < 0.1
    module = mixture(DIM, HEADS, LENGTH)
    assert module.weight.softmax(0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("length", "factors"), [(1, (1, 1)), (4, (2, 2)), (12, (3, 4)), (64, (8, 8)), (1022, (14, 73))]
)
def test_factors_are_nearest_to_the_root(length: int, factors: tuple[int, int]) -> None:
    module = FactoredDense(DIM, HEADS, length)
    assert (module.inner.bias.shape[-1], module.outer.bias.shape[-1]) == factors


@pytest.mark.parametrize(
    ("length", "cure"), [(2, "length=4 (2 x 2)"), (3, "length=4 (2 x 2)"), (127, "length=126 (9 x 14) or 128 (8 x 16)")]
)
def test_a_prime_length_has_no_factors(length: int, cure: str) -> None:
    with pytest.raises(InputError, match="E505") as caught:
        FactoredDense(DIM, HEADS, length)
    assert cure in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_longer_sequences_are_refused(kind: str) -> None:
    module = made(kind)
    for q_len, num_keys in ((13, 12), (12, 13)):
        with pytest.raises(InputError, match="E503"):
            module(states(q_len), num_keys)
    with pytest.raises(InputError, match="E502"):
        module(states(4)[..., :3], 4)


def test_sizes_and_members_that_cannot_be() -> None:
    with pytest.raises(InputError, match="E406"):
        Random(DIM, 0, LENGTH)
    with pytest.raises(InputError, match="E406"):
        Dense(DIM, HEADS, LENGTH, hidden=0)
    with pytest.raises(InputError, match="E406"):
        FactoredRandom(DIM, HEADS, LENGTH, rank=0)
    with pytest.raises(InputError, match="E503"):
        Mixture(DIM, HEADS, LENGTH, members=[])
    with pytest.raises(InputError, match="E503"):
        Mixture(DIM, HEADS, LENGTH, members=[Random(DIM, HEADS, 8)])


MADE = "score: synthesize({makers}, length = 16)\nattend: causal\n"


@pytest.mark.parametrize(
    "text",
    [
        MADE.format(makers="dense"),
        MADE.format(makers="random, factored_dense"),
        MADE.format(makers="dense, product"),
        MADE.format(makers="dense") + "tables: {near: scalars(16)}\nbias: near[q - k]",
        MADE.format(makers="dense") + "tables: {near: vectors(16)}\nbias: near[q - k]",
        "branches: {a: {attend: causal, score: 'synthesize(dense, length = 16)'}, b: causal}",
    ],
)
def test_a_layer_has_no_parameter_that_learns_nothing(text: str) -> None:
    """DistributedDataParallel waits for the gradient of each."""
    layer = Attention(text, 16, 4, kv_heads=2)
    layer(torch.randn(2, 9, 16)).square().sum().backward()
    silent = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
    assert silent == []
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    reads_both = "product" in text or "branches" in text
    assert ("key_projection" in names) == reads_both
    assert ("query_projection" in names) == (reads_both or "vectors" in text)
