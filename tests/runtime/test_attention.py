"""`patterndsl.attention`: programs are compiled once per pattern, shape and device."""

from __future__ import annotations

import pytest
import torch

import patterndsl
from patterndsl import attention as attention_function
from patterndsl.functional import cache_clear, cache_info


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    cache_clear()


def test_compiles_once_per_shape() -> None:
    x = torch.randn(1, 2, 64, 8)
    for _ in range(3):
        attention_function(x, x, x, "causal & recent(8)")
    assert cache_info()[:2] == (2, 1)
    attention_function(x[:, :, :32], x[:, :, :32], x[:, :, :32], "causal & recent(8)")
    assert cache_info().misses == 2


def test_equal_patterns_share_a_program() -> None:
    x = torch.randn(1, 2, 64, 8)
    attention_function(x, x, x, "causal&recent( 8 )")
    attention_function(x, x, x, patterndsl.parse("causal & recent(8)"))
    assert cache_info().hits == 1


def test_other_parameters_are_another_program() -> None:
    x = torch.randn(1, 1, 64, 8)
    pattern = patterndsl.parse("recent(w)", params={"w": 4})
    short = attention_function(x, x, x, pattern)
    long = attention_function(x, x, x, pattern.with_params(w=32))
    assert cache_info().misses == 2
    assert not torch.equal(short, long)


def test_the_cache_is_bounded() -> None:
    for n in range(1, 71):
        x = torch.randn(1, 1, n, 4)
        attention_function(x, x, x, "causal")
    assert cache_info().size == cache_info().max_size == 64


def test_causal_is_sdpa() -> None:
    q, k, v = (torch.randn(2, 4, 200, 16) for _ in range(3))
    ours = attention_function(q, k, v, "causal")
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_a_slice_of_queries_is_the_rows_of_the_whole() -> None:
    q, k, v = (torch.randn(1, 2, 90, 16) for _ in range(3))
    pattern = patterndsl.parse("causal & (recent(7) | strided(isqrt(N)))")
    whole = attention_function(q, k, v, pattern)
    part = attention_function(q[:, :, 60:70], k, v, pattern, q_start=60, n=90)
    torch.testing.assert_close(part, whole[:, :, 60:70])
