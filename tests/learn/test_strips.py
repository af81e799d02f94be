"""Labels and members in strips of tokens, against all scores at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patterndsl.learn import strips
from patterndsl.learn.kmeans import KMeans
from tests.strategies import many


@many(1)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    clusters=st.sampled_from([1, 3, 64, 65, 130]),
    length=st.sampled_from([1, 7, 8, 9, 63, 64, 65, 129, 300]),
    tops=st.lists(st.sampled_from([1, 2, 7, 16, 40, 1000]), max_size=2, unique=True),
    sizes=st.sampled_from([(strips.MAX_SCORES, strips.STRIP), (1, 1), (300 * 66, 64 * 40)]),
    is_equal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_strips_are_as_all_at_once(
    batch: int,
    heads: int,
    clusters: int,
    length: int,
    tops: list[int],
    sizes: tuple[int, int],
    is_equal: bool,
    seed: int,
) -> None:
    """Where scores are equal, members may be others, of the same scores."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, heads, length, 16, dtype=torch.float64, generator=generator)
    ours = KMeans(heads, 16, clusters).double()
    if is_equal:  # lengths are powers of two, so scores are exact
        key, ours.centroids = key.sign(), ours.centroids.sign()
    key[0, 0, length // 2, 3], key[-1, -1, 0] = torch.nan, torch.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "MAX_SCORES", sizes[0])
        patch.setattr(strips, "STRIP", sizes[1])
        labels, members = strips.assigned(key, ours.centroids, tops)
    expected = ours.assigned(key, tops)
    assert not strips.takes(key, ours.centroids)  # so the twin is plain
    assert torch.equal(labels, expected.labels)
    scores = ours.centroids @ ours._unit(key).transpose(-1, -2)
    assert members.keys() == set(tops)
    for top, found in members.items():
        assert found.shape == (batch, heads, clusters, min(top, length))
        assert (found.diff(dim=-1) > 0).all()
        mine, theirs = (scores.gather(3, at).sort(-1).values for at in (found, expected.members[top]))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


def test_long_sequences_go_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.randn(1, 2, 2100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = KMeans(2, 8, 130).double()
    assert strips.takes(key, ours.centroids)
    found = ours.assigned(key, (50,))
    monkeypatch.setattr(strips, "takes", lambda *_: False)
    expected = ours.assigned(key, (50,))
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.members[50], expected.members[50])


def test_the_commitment_goes_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key without length, and one that is shorter than what is divided by."""
    monkeypatch.setattr(strips, "NUMBERS", 300)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 70, 3, 16, dtype=torch.float64, generator=generator).transpose(1, 2)
    key[0, 0, 0], key[1, 1, -1] = 0.0, 1e-14
    ours, key = KMeans(3, 16, 5).double(), key.requires_grad_()
    labels = ours(key)
    assert not strips.takes(key, ours.centroids)  # so the twin is plain
    found, expected = strips.commitment(key, ours.centroids, labels), ours.commitment(key, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(3 * x, key)[0] for x in (found, expected)), rtol=1e-9, atol=1e-15)
