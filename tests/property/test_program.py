"""Does a compiled program attend to exactly the pairs of a second reading, and with the softmax of the textbook?

The expected output, log-sum-exp and gradients are computed here, in float64, from the brute-force mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from patterndsl import Program
from tests.strategies import Case, cases, many

TOLERANCE = 1e-9


def program_of(case: Case, backend: str = "auto") -> tuple[Program, dict[str, Tensor], Tensor]:
    """The program, the inputs that it reads, and the mask that it should have: bool [heads, q_len, kv_len]."""
    pattern = case.pattern()
    program = pattern.compile(case.sizes.get("n"), **case.keywords, heads=case.heads, layer=case.layer, backend=backend)
    inputs = {shape.name: torch.tensor(case.inputs[shape.name]) for shape in program.bound.inputs}
    return program, inputs, torch.from_numpy(case.keep(pattern))


@many(5)
@given(cases())
def test_the_mask_is_that_of_the_second_reading(case: Case) -> None:
    program, inputs, keep = program_of(case)
    assert torch.equal(program.mask(inputs).expand(keep.shape), keep)


@many(5)
@given(case=cases(), q_block=st.sampled_from((64, 1, 7, 128)))
def test_gather_indices_are_the_union_over_the_rows_of_a_block(case: Case, q_block: int) -> None:
    program, inputs, keep = program_of(case)
    found = program.gather_indices(q_block, inputs)
    num_heads = found.counts.shape[0]
    assert num_heads in (1, case.heads)
    assert found.indices.dtype == found.counts.dtype == torch.int64
    for head in range(case.heads):
        for q_blk, rows in enumerate(keep[head].split(q_block)):
            keys = rows.any(0).nonzero().flatten().tolist()
            padding = [-1] * (found.indices.shape[-1] - len(keys))
            assert found.counts[head % num_heads, q_blk] == len(keys)
            assert found.indices[head % num_heads, q_blk].tolist() == keys + padding


def attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row softmax over the kept keys; an empty row yields 0 and -inf."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    top = scores.detach().masked_fill(~keep, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = torch.where(keep, torch.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdim=True)
    output = weights / torch.where(total > 0, total, 1.0) @ value
    return output, (top + total.log()).squeeze(-1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["gathered", "oracle"])
@many(5)
@given(case=cases(max_length=130), seed=st.integers(0, 2**32 - 1), kv_group=st.sampled_from((1, 2)))
def test_attention_is_the_textbook_softmax(case: Case, seed: int, kv_group: int, backend: str) -> None:
    program, inputs, keep = program_of(case, backend)
    kv_group = kv_group if case.heads % kv_group == 0 else 1
    random = torch.Generator().manual_seed(seed)
    sizes = case.lengths

    def drawn(heads: int, length: int, width: int) -> Tensor:
        return torch.randn(2, heads, length, width, generator=random, dtype=torch.float64, requires_grad=True)

    query = drawn(case.heads, sizes.q_len, 4)
    key, value = (drawn(case.heads // kv_group, sizes.kv_len, width) for width in (4, 3))
    weight = torch.randn(2, case.heads, sizes.q_len, 3, generator=random, dtype=torch.float64)

    shared_key, shared_value = (part.repeat_interleave(kv_group, dim=1) for part in (key, value))
    expected, expected_lse = attend(query, shared_key, shared_value, keep)
    output, lse = program(query, key, value, inputs=inputs, return_lse=True)
    assert_close(output, expected)
    assert_close(lse, expected_lse)

    gradients = torch.autograd.grad((output * weight).sum(), (query, key, value))
    for found, wanted in zip(gradients, gradient_of(expected, weight, query, key, value), strict=True):
        assert_close(found, wanted)


def gradient_of(output: Tensor, weight: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    return torch.autograd.grad((output * weight).sum(), tensors)


@pytest.mark.parametrize("keep", [[[True, True]], [[True, False]], [[False, False]]])
def test_the_textbook_is_right_about_two_keys(keep: list[list[bool]]) -> None:
    query, key = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
    output, lse = attend(query, key, key, torch.tensor(keep))
    kept = [value for value, holds in zip((1.0, 3.0), keep[0], strict=True) if holds]
    total = sum(np.exp(kept))
    assert output.item() == pytest.approx(sum(np.exp(x) * x for x in kept) / total if kept else 0.0)
    assert lse.item() == pytest.approx(np.log(total) if kept else -np.inf)
