"""Kernel attention beside linear-attention-transformer and performer-pytorch: the same where they mean the same, and
where they do not, what theirs does that ours must not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from patterndsl.score.features import directions, favor_exponents
from patterndsl.score.linear import kernel_attention
from tests.peers import imported

DTYPE = torch.float64
DIM, LENGTH = 4, 24


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def query_key_value() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = normal(3, 2, 2, LENGTH, DIM, seed=1)
    return query, key, value


@pytest.fixture
def linear() -> ModuleType:
    return imported("linear_attention_transformer.linear_attention_transformer")


@pytest.fixture
def performer() -> ModuleType:
    return imported("performer_pytorch.performer_pytorch")


@pytest.mark.parametrize("kept", [LENGTH, 17, 1])
def test_linear_attention_transformer_over_all_keys(linear: ModuleType, kept: int) -> None:
    """Its queries are softmaxes over features and its keys softmaxes over positions, so that all denominators are 1."""
    query, key, value = query_key_value()
    keep = torch.arange(LENGTH) < kept
    theirs = linear.linear_attn(query.clone(), key.clone(), value.clone(), kv_mask=keep.expand(2, -1))
    shares = key.masked_fill(~keep[:, None], -torch.inf).log_softmax(-2)
    ours, state = kernel_attention(query.log_softmax(-1), shares, value, causal=False, keep=keep, is_log=True)
    torch.testing.assert_close(theirs, ours * DIM**-0.5, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.denominator * state.shift.exp(), torch.ones(2, 2, DIM, dtype=DTYPE))


def test_linear_attention_transformer_causal(linear: ModuleType) -> None:
    """Position by position it is ours, as long as its denominators are above the floor that it gives them."""
    query, key, value = query_key_value()
    theirs = linear.causal_linear_attn(query, key, value, bucket_size=1)
    ours, _ = kernel_attention(query.log_softmax(-1), key, value, causal=True, is_log=True)
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)


def test_linear_attention_transformer_is_blind_to_its_own_bucket(linear: ModuleType) -> None:
    """By buckets a row sees the buckets before its own only: in the first one nothing, not even itself."""
    query, key, value = query_key_value()
    theirs = linear.causal_linear_attn(query, key, value, bucket_size=8)
    ours, _ = kernel_attention(query.log_softmax(-1), key, value, causal=True, is_log=True)
    assert (theirs[:, :, :8] == 0).all()
    torch.testing.assert_close(ours[:, :, 0], value[:, :, 0])
    _, before = kernel_attention(query[:, :, :8], key[:, :, :8], value[:, :, :8], causal=True, is_log=True)
    none = torch.full_like(key[:, :, :8], -torch.inf)
    seen, _ = kernel_attention(
        query[:, :, 8:16].log_softmax(-1), none, value[:, :, 8:16], causal=True, state=before, is_log=True
    )
    torch.testing.assert_close(theirs[:, :, 8:16], seen, rtol=1e-9, atol=1e-12)


def test_linear_attention_transformer_shrinks_what_is_below_its_floor(linear: ModuleType) -> None:
    query, key, value = query_key_value()
    theirs = linear.causal_linear_attn(query, key - 40, value, bucket_size=1)
    ours, _ = kernel_attention(query.log_softmax(-1), key - 40, value, causal=True, is_log=True)
    unmoved, _ = kernel_attention(query.log_softmax(-1), key, value, causal=True, is_log=True)
    torch.testing.assert_close(ours, unmoved, rtol=1e-9, atol=1e-12)
    assert theirs.abs().max() < 1e-9 < 0.1 < ours.abs().max()


@pytest.mark.parametrize("later", ["same", "long", "along a direction"])
def test_performer_pytorch_lets_a_later_key_change_earlier_rows(performer: ModuleType, later: str) -> None:
    """Keys lose the maximum of the whole sequence and gain an epsilon beside it: a large later key leaves the epsilon
    alone of the earlier ones."""
    query, key, value = query_key_value()
    w = directions(16, DIM, orthogonal=True, seed=1, dtype=DTYPE)
    changed = key.clone()
    match later:
        case "long":
            changed[:, :, -1] *= 20
        case "along a direction":  # no key has a larger feature of that direction
            changed[:, :, -1] = DIM**0.25 * w[w.norm(dim=-1).argmax()]

    def theirs(key: Tensor) -> Tensor:
        phi_query = performer.softmax_kernel(query, projection_matrix=w, is_query=True)
        phi_key = performer.softmax_kernel(key, projection_matrix=w, is_query=False)
        out: Tensor = performer.causal_linear_attention_noncuda(phi_query, phi_key, value, chunk_size=3)
        return out[:, :, :-1]

    def ours(key: Tensor) -> Tensor:
        logs = [favor_exponents(part, w, False) for part in (query, key)]
        return kernel_attention(logs[0], logs[1], value, causal=True, is_log=True)[0][:, :, :-1]

    assert torch.equal(ours(changed), ours(key))
    difference = (theirs(changed) - theirs(key)).abs().max()
    assert difference == 0 if later == "same" else difference > 0.1 if later == "long" else difference > 1e-4


def test_performer_pytorch_draws_rotations_that_are_not_uniform(performer: ModuleType) -> None:
    """LAPACK's signs: the first entry of the first column of Q is never positive; it should be half the time."""
    torch.manual_seed(0)
    theirs = torch.stack([performer.orthogonal_matrix_chunk(DIM)[0, 0] for _ in range(200)])
    ours = torch.stack([directions(DIM, DIM, orthogonal=True, seed=seed)[0, 0] for seed in range(200)])
    assert (theirs <= 0).all()
    assert 70 <= int((ours > 0).sum()) <= 130  # 100 of 200, within four standard deviations
