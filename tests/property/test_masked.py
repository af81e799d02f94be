"""Do patterns with inputs, run on their hulls, compute the textbook's attention? Outputs, lse and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl import InputError
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.hulls import hull_of
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import bind
from tests.property.test_program import assert_close, attend, program_of
from tests.strategies import Case, cases, many


def check(program: patterndsl.Program, inputs: dict[str, Tensor], keep: Tensor, kv_group: int, seed: int) -> None:
    """keep: bool, broadcastable to [2, heads, q_len, kv_len]."""
    random = torch.Generator().manual_seed(seed)
    heads, sizes = program.bound.num_heads, program.bound.sizes

    def drawn(num_heads: int, length: int) -> Tensor:
        return torch.randn(2, num_heads, length, 4, generator=random, dtype=torch.float64, requires_grad=True)

    query = drawn(heads, sizes.q_len)
    key, value = (drawn(heads // kv_group, sizes.kv_len) for _ in range(2))
    shared = [part.repeat_interleave(kv_group, dim=1) for part in (key, value)]
    expected, expected_lse = attend(query, shared[0], shared[1], keep)
    output, lse = program(query, key, value, inputs=inputs, return_lse=True)
    assert_close(output, expected)
    assert_close(lse, expected_lse)
    weight, lse_weight = torch.randn(query.shape, generator=random), torch.randn(query.shape[:3], generator=random)

    def loss(out: Tensor, total: Tensor) -> Tensor:
        return (out * weight).sum() + (torch.where(expected_lse > -torch.inf, total, 0.0) * lse_weight).sum()

    tensors = (query, key, value)
    found = torch.autograd.grad(loss(output, lse), tensors)
    for gradient, wanted in zip(found, torch.autograd.grad(loss(expected, expected_lse), tensors), strict=True):
        assert_close(gradient, wanted)


@many(1)
@given(case=cases(max_length=130), seed=st.integers(0, 2**32 - 1), kv_group=st.sampled_from((1, 2)))
def test_random_patterns(case: Case, seed: int, kv_group: int) -> None:
    assume(case.inputs)
    program, inputs, keep = program_of(case, "masked")
    assume(program.bound.inputs and program.hulls is not None and keep.numel())
    check(program, inputs, keep, kv_group if case.heads % kv_group == 0 else 1, seed)


TERMS = st.sampled_from(
    (
        "chunks(bucket, 8, 1)",
        "same(bucket)",
        "all",
        "chunks(bucket, 16, 0)",
        "chunks(bucket, m, 2)",
        "same(bucket) & recent(40)",
        "recent(9)",
        "first(3)",
        "window(5)",
        "strided(7)",
        "q.bucket.rank < 20 & k.bucket.rank < 5",
        "q.bucket.rank // 8 == k.bucket.rank // 8 & recent(30)",
        "head % 2 == 0 & chunks(bucket, 8, 0) | head % 2 == 1 & recent(12)",
        "within(doc, recent(6)) & recent(6)",
    )
)
AROUND = st.sampled_from(("", "causal & ", "same(doc) & ", "causal & same(doc) & ", "q.doc != k.doc & "))


@many(8)
@given(
    terms=st.lists(TERMS, min_size=1, max_size=3, unique=True),
    around=AROUND,
    n=st.integers(1, 150),
    m=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    kv_group=st.sampled_from((1, 2, 4)),
    alike=st.booleans(),
    sorted_docs=st.booleans(),
)
def test_hybrids_of_labels_documents_and_windows(
    terms: list[str], around: str, n: int, m: int, seed: int, kv_group: int, alike: bool, sorted_docs: bool
) -> None:
    """Batch rows with the same inputs, or each with its own."""
    text = f"{around}({' | '.join(terms)})"
    random = np.random.default_rng(seed)
    doc = random.integers(0, 4, (2, n))
    given = {
        "bucket": torch.tensor(random.integers(0, 5, (2, n))),
        "doc": torch.tensor(np.sort(doc) if sorted_docs else doc),
    }
    pattern = patterndsl.parse(text, inputs={"bucket": "int[N]", "doc": "int[N]"}, params={"m": m})
    program = pattern.compile(n, heads=4, backend="masked")
    inputs = {shape.name: given[shape.name][0] if alike else given[shape.name] for shape in program.bound.inputs}
    if not inputs:
        return  # a plan is for that
    keep = program.mask(inputs)
    check(
        program, inputs, keep.expand(2, 4, n, n) if keep.dim() == 4 else keep[None].expand(2, 4, n, n), kv_group, seed
    )


@many(2)
@given(case=cases(max_length=60))
def test_a_hull_holds_every_pair(case: Case) -> None:
    assume(case.inputs)
    pattern = case.pattern()
    bound = bind(pattern.resolved, case.bound(pattern).sizes, case.heads, case.layer)
    assume(bound.sizes.q_start == 0)
    keep = case.keep(pattern)
    for group in bound.groups:
        held = keep[group.heads[0]]
        assert (holds(hull_of(group.relation, None), held.shape) | ~held).all()
        for shape in bound.inputs:
            if shape.side != "both" or held.shape[0] != held.shape[1]:
                continue
            order = np.argsort(np.asarray(case.inputs[shape.name], dtype=int)[: held.shape[0]], kind="stable")
            assert (holds(hull_of(group.relation, shape.name), held.shape) | ~held[np.ix_(order, order)]).all()


def holds(hull: Any, shape: tuple[int, int]) -> Any:
    point = Point(np.arange(shape[0])[:, None], np.arange(shape[1]), 0, Lookup())
    return np.broadcast_to(member(hull, point), shape)


def test_the_work_of_chunks_follows_the_chunks() -> None:
    """65,536 positions in chunks of 64 and the one before: 128 pairs each, and the ends."""
    program = patterndsl.parse("chunks(bucket, 64, 1)", inputs={"bucket": "int[N]"}).compile(65_536, heads=2)
    assert program.backend == "masked" and program.hulls is not None
    computed = sum(item.piece.num_computed for hull in program.hulls for item in hull.passes)
    assert computed <= 130 * 65_536


def test_where_inputs_decide_alone_tiles_are_found_in_each_call() -> None:
    pattern = patterndsl.parse("causal & q.doc < k.doc", inputs={"doc": "int[N]"})
    assert pattern.compile(8192).backend == "gathered"
    assert "gathered" in str(pattern.explain(8192))
    tensors = [torch.randn(1, 1, 8192, 8) for _ in range(3)]
    with pytest.raises(InputError, match="most pairs"):
        pattern.compile(8192, backend="masked")(*tensors, inputs={"doc": torch.arange(8192) // 100})


def test_documents_are_runs() -> None:
    """However long: what runs hold is known in a call alone."""
    for text, runs in (("causal & same(doc)", "causal"), ("same(doc)", "full")):
        program = patterndsl.parse(text, inputs={"doc": "int[N]"}).compile(1 << 20)
        assert program.hulls is not None and [hull.runs for hull in program.hulls] == [runs]
    joined = patterndsl.parse("causal & (recent(9) | same(doc))", inputs={"doc": "int[N]"}).compile(4096)
    assert joined.hulls is not None and [hull.runs for hull in joined.hulls] == ["causal", None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_dense_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n = 300
    pattern = patterndsl.parse(
        "causal & (chunks(bucket, 32, 1) | recent(20)) & same(doc)", inputs={"bucket": "int[N]", "doc": "int[N]"}
    )
    inputs = {"bucket": torch.randint(0, 9, (n,)), "doc": torch.arange(n) // 110}
    program = pattern.compile(n, heads=2, backend="masked")
    keep = program.mask(inputs)
    low = [torch.randn(1, 2, n, 16).to(dtype).requires_grad_() for _ in range(3)]
    exact = [part.detach().double().requires_grad_() for part in low]

    def results(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    truth = results(attend(exact[0], exact[1], exact[2], keep)[0], exact)
    ours = results(program(low[0], low[1], low[2], inputs=inputs), low)
    dense = results(torch.nn.functional.scaled_dot_product_attention(low[0], low[1], low[2], attn_mask=keep[None]), low)
    for found, theirs, wanted in zip(ours, dense, truth, strict=True):
        assert (found.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm()


def test_nan_that_nobody_attends_reaches_nothing() -> None:
    text, kinds = "causal & chunks(bucket, 16, 1) & k.live", {"bucket": "int[N]", "live": "bool[N]"}
    pattern = patterndsl.parse(text, inputs=kinds)
    inputs = {"bucket": torch.randint(0, 5, (100,)), "live": torch.arange(100) % 3 > 0}
    query, key, value = (torch.randn(1, 2, 100, 8) for _ in range(3))
    program = pattern.compile(100, heads=2)
    expected = program(query, key, value, inputs=inputs)
    key[:, :, ::3], value[:, :, ::3] = torch.nan, torch.inf
    torch.testing.assert_close(program(query, key, value, inputs=inputs), expected)
