"""Does every plan that the planner can choose compute the textbook's attention? Outputs, lse and gradients."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.runtime import sdpa
from patterndsl.runtime.sdpa import DensePass
from tests.property.test_program import assert_close, attend
from tests.strategies import Case, cases, many

MAX_CHOICES = 6


def check(
    program: patterndsl.Program,
    keep: Tensor,
    kv_group: int,
    seed: int,
    batch: int = 2,
    inputs: dict[str, Tensor] | None = None,
) -> None:
    """Outputs, lse and gradients against the textbook's. keep: bool, broadcastable to [batch, heads, q_len, kv_len]."""
    random = torch.Generator().manual_seed(seed)
    heads, sizes = program.bound.num_heads, program.bound.sizes

    def drawn(num_heads: int, length: int) -> Tensor:
        return torch.randn(batch, num_heads, length, 4, generator=random, dtype=torch.float64, requires_grad=True)

    query = drawn(heads, sizes.q_len)
    key, value = (drawn(heads // kv_group, sizes.kv_len) for _ in range(2))
    weight, lse_weight = torch.randn(query.shape, generator=random), torch.randn(query.shape[:3], generator=random)

    shared_key, shared_value = (part.repeat_interleave(kv_group, dim=1) for part in (key, value))
    expected, expected_lse = attend(query, shared_key, shared_value, keep)
    output, lse = program(query, key, value, inputs=inputs, return_lse=True)
    assert_close(output, expected)
    assert_close(lse, expected_lse)

    def loss(out: Tensor, total: Tensor) -> Tensor:
        kept = torch.where(expected_lse > -torch.inf, total, 0.0)
        return (out * weight).sum() + (kept * lse_weight).sum()

    tensors = (query, key, value)
    found = torch.autograd.grad(loss(output, lse), tensors)
    for gradient, wanted in zip(found, torch.autograd.grad(loss(expected, expected_lse), tensors), strict=True):
        assert_close(gradient, wanted)


@many(1.5)
@given(case=cases(max_length=200), seed=st.integers(0, 2**32 - 1), kv_group=st.sampled_from((1, 2)))
def test_random_patterns(case: Case, seed: int, kv_group: int) -> None:
    assume(not case.inputs)
    pattern = case.pattern()
    keep = torch.from_numpy(case.keep(pattern))
    assume(keep.numel())
    kv_group = kv_group if case.heads % kv_group == 0 else 1
    choice = num_choices = 0
    while choice <= min(num_choices, MAX_CHOICES):
        program = pattern.compile(
            case.sizes.get("n"), **case.keywords, heads=case.heads, layer=case.layer, backend="planned", plan=choice
        )
        num_choices = program.plan.num_choices - 1
        check(program, keep, kv_group, seed)
        choice += 1


PATTERNS = [
    "causal & (recent(16) | strided(16))",
    "recent(40)",
    "causal & dilated(15, 4)",
    "window(20) | global(5)",
    "causal & (block(16) | columns(16, 2))",
    "blocks(8, window(1) | global(1) | random(2))",
    "causal & (head % 2 == 0 & recent(20) | head % 2 == 1 & strided(16))",
    "causal & (head < 3 & recent(20) | head >= 3 & strided(16))",
    "q % 4 == 1 & k % 4 == 1 & block(64)",
    "k > q",
]


@pytest.mark.parametrize("n", [1, 63, 65, 127, 257])
@pytest.mark.parametrize("text", PATTERNS)
def test_odd_lengths_and_shared_heads(text: str, n: int) -> None:
    pattern = patterndsl.parse(text)
    choice = num_choices = 0
    while choice <= num_choices:
        program = pattern.compile(n, heads=4, backend="planned", plan=choice)
        num_choices, keep = program.plan.num_choices - 1, program.mask().expand(4, n, n)
        for kv_group in (1, 2, 4):
            check(program, keep, kv_group, seed=n)
        choice += 1


@pytest.mark.parametrize("text", [*PATTERNS, "causal & (recent(64) | strided(64))"])
def test_other_memory_orders_give_the_same(text: str) -> None:
    """[B, T, H, D] transposed, as layers have it, more than one batch row, and one of the heads of a larger tensor."""
    n, pattern = 130, patterndsl.parse(text)
    program = pattern.compile(n, heads=4, backend="planned")
    query, key, value = (torch.randn(3, n, 8, 4, dtype=torch.float64).transpose(1, 2)[:, ::2] for _ in range(3))
    expected = program(*(part.contiguous() for part in (query, key, value)))
    assert_close(program(query, key, value), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", PATTERNS)
def test_errors_are_at_most_twice_those_of_dense_attention(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(zlib.crc32(text.encode()))
    n, heads, dim = 300, 4, 16
    pattern = patterndsl.parse(text)
    program = pattern.compile(n, heads=heads, backend="planned")
    keep = program.mask().expand(heads, n, n)
    query, key, value = (torch.randn(2, heads, n, dim, dtype=torch.float64) for _ in range(3))
    low = [part.to(dtype).requires_grad_() for part in (query, key, value)]
    weight = torch.randn(2, heads, n, dim, dtype=torch.float64)

    def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        return [output, *torch.autograd.grad((output * weight.to(output.dtype)).sum(), tensors)]

    exact_inputs = [part.detach().double().requires_grad_() for part in low]
    exact = gradients(attend(exact_inputs[0], exact_inputs[1], exact_inputs[2], keep)[0], exact_inputs)
    ours = gradients(program(low[0], low[1], low[2]), low)
    theirs_out = torch.nn.functional.scaled_dot_product_attention(low[0], low[1], low[2], attn_mask=keep)
    dense = gradients(theirs_out, low)
    for found, theirs, wanted in zip(ours, dense, exact, strict=True):
        # norms: the largest of many thousand errors is a matter of chance, by more than a factor of two
        limit = 2 * (theirs.double().nan_to_num() - wanted).norm()
        assert (found.double() - wanted).norm() <= limit


@pytest.mark.parametrize("n", [100, 128, 131])
def test_hot_columns_in_chunks_of_queries(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the gradients of few keys are summed over chunks."""
    monkeypatch.setattr(sdpa, "row_chunk", lambda device: 16)
    program = patterndsl.parse("k < 3 | q < 2").compile(n, heads=2, backend="planned", plan=1)
    launches = [launch for item in program.plan.passes for launch in DensePass(item.piece, program.device).launches]
    assert any(launch.keys.groups and launch.keys.groups[0].stride == 0 for launch in launches), "nothing was cut"
    check(program, program.mask().expand(2, n, n), 1, seed=n)


def test_what_is_not_attended_may_be_anything() -> None:
    """NaN in keys and values that no query attends reaches nothing."""
    program = patterndsl.parse("causal & k < 100 & (recent(30) | strided(30))").compile(150, heads=2)
    query, key, value = (torch.randn(1, 2, 150, 8) for _ in range(3))
    expected = program(query, key, value)
    key[:, :, 100:], value[:, :, 100:] = torch.nan, torch.inf
    torch.testing.assert_close(program(query, key, value), expected)


def test_a_query_that_is_not_finite_is_not_hidden() -> None:
    """Its row is NaN where it attends anything, and 0 where it attends nothing, as everywhere else."""
    program = patterndsl.parse("window(3) & q != 20").compile(100, heads=2)
    query, key, value = (torch.randn(1, 2, 100, 8) for _ in range(3))
    expected = program(query, key, value)
    query[:, :, [10, 20]] = torch.nan
    found = program(query, key, value)
    assert found[:, :, 10].isnan().all() and (found[:, :, 20] == 0).all()
    others = [row for row in range(100) if row not in (10, 20)]
    torch.testing.assert_close(found[:, :, others], expected[:, :, others])


def test_the_same_bits_each_time() -> None:
    program = patterndsl.parse("causal & (recent(64) | strided(64)) | blocks(16, random(3))").compile(900, heads=2)
    query, key, value = (torch.randn(1, 2, 900, 8, requires_grad=True) for _ in range(3))

    def run() -> list[Tensor]:
        out = program(query, key, value)
        return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
