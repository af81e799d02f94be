"""Do patterns with inputs, run on their hulls, compute the textbook's attention? Outputs, lse and gradients."""

from __future__ import annotations

from dataclasses import replace
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
from patterndsl.ir.relation import Relation
from patterndsl.lower import hulls, inside
from patterndsl.lower.devices import CPU
from patterndsl.lower.hulls import hull_of
from patterndsl.lower.lookup import Lookup
from patterndsl.runtime import documents, masked
from patterndsl.runtime.documents import Documents, spans_of
from patterndsl.runtime.function import attended
from patterndsl.runtime.masked import Masked
from tests.property.test_plans import check
from tests.property.test_program import attend, program_of
from tests.strategies import Case, cases, many


@many(1)
@given(case=cases(max_length=130), seed=st.integers(0, 2**32 - 1), kv_group=st.sampled_from((1, 2)))
def test_random_patterns(case: Case, seed: int, kv_group: int) -> None:
    """With inputs or without: what has no dense hull is refused."""
    program, inputs, keep = program_of(case, "masked")
    if program.hulls is None:
        shape = (1, case.heads, program.bound.sizes.q_len, 4)
        with pytest.raises(InputError, match="E505"):
            program(torch.zeros(shape), *(torch.zeros(1, case.heads, keep.shape[2], 4),) * 2, inputs=inputs)
        return
    check(program, keep, kv_group if case.heads % kv_group == 0 else 1, seed, inputs=inputs)


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


@many(5)
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
    check(program, program.mask(inputs), kv_group, seed, inputs=inputs)


@many(2)
@given(case=cases(max_length=60))
def test_a_hull_holds_every_pair(case: Case) -> None:
    pattern = case.pattern()
    bound, keep = case.bound(pattern), case.keep(pattern)
    for group in bound.groups:
        held = keep[group.heads[0]]
        assert (holds(hull_of(group.relation, None), held.shape, bound.sizes.q_start) | ~held).all()
        for shape in bound.inputs:
            if shape.side != "both" or bound.sizes.q_start or held.shape[0] != held.shape[1]:
                continue
            order = np.argsort(np.asarray(case.inputs[shape.name], dtype=int)[: held.shape[0]], kind="stable")
            assert (holds(hull_of(group.relation, shape.name), held.shape, 0) | ~held[np.ix_(order, order)]).all()


def holds(hull: Relation, shape: tuple[int, int], q_start: int) -> Any:
    point = Point(np.arange(shape[0])[:, None] + q_start, np.arange(shape[1]), 0, Lookup())
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


IN_DOCUMENTS = (
    "within(doc, causal & (first(2) | recent(5) | strided(7)))",
    "same(doc) & (head % 2 == 0 & strided(3) | head % 2 == 1 & q.doc % 2 == 0 & k <= q)",
    "within(doc, q % 4 == k % 4) & (q + k) % 3 > 0",
)


@many(2)
@given(
    text=st.sampled_from(IN_DOCUMENTS),
    n=st.integers(1, 90),
    most=st.sampled_from((1, 40, 1 << 21)),
    seed=st.integers(0, 2**32 - 1),
    sorted_docs=st.booleans(),
)
def test_patterns_inside_documents_are_masked_runs(text: str, n: int, most: int, seed: int, sorted_docs: bool) -> None:
    """Where no static hull is small; in strips of queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hulls, "SMALL", 0)
        patch.setattr(masked, "MASK_PAIRS", most)
        program = patterndsl.parse(text, inputs={"doc": "int[N]"}).compile(n, heads=2, backend="masked")
        assume(program.hulls is not None)
        assert program.hulls is not None
        assert text != IN_DOCUMENTS[0] or [hull.runs for hull in program.hulls] == ["masked"]
        doc = np.random.default_rng(seed).integers(0, 4, (2, n))
        inputs = {"doc": torch.tensor(np.sort(doc) if sorted_docs else doc)}
        check(program, program.mask(inputs), 1, seed, inputs=inputs)


PLACES = (
    "causal & (first(2) | recent(5) | strided(7))",
    "causal & (first(4) | recent(32) | strided(32))",
    "window(6) | global(3)",
    "window(2, 40)",
    "k == q + 2",  # the last rows of a document are empty
    "dilated(12, 4)",
    "(head % 2 == 0 & recent(9)) | (head % 2 == 1 & strided(5) & causal)",
)


def packed(seed: int, n: int, kind: str) -> Tensor:
    """int [2, n]: two rows of documents of any lengths; "broken" where numbers come back later."""
    random = np.random.default_rng(seed)
    if kind == "broken":
        return torch.tensor(random.integers(0, 3, (2, n)))
    chance = random.choice([0.02, 0.1, 0.5])
    rising = torch.tensor((random.random((2, n)) < chance).cumsum(1))
    return rising if kind == "rising" else 7 - rising


@many(4)
@given(
    text=st.sampled_from(PLACES),
    n=st.integers(1, 280),
    kv_group=st.sampled_from((1, 2, 4)),
    short=st.sampled_from((1, 20, 512)),
    kind=st.sampled_from(("rising", "falling", "broken")),
    alike=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_pattern_of_places_runs_by_passes_in_unbroken_documents(
    text: str, n: int, kv_group: int, short: int, kind: str, alike: bool, seed: int
) -> None:
    """Cut to the length of each, or one mask where it is short; where a document is broken, as masked runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hulls, "SMALL", 0)
        patch.setattr(inside, "MAX_SHARE", 4.0)
        patch.setattr(inside, "SHORT", short)
        pattern = patterndsl.parse(f"within(doc, {text})", inputs={"doc": "int[N]"})
        program = pattern.compile(n, heads=4, backend="masked")
        assume(program.hulls is not None)
        assert program.hulls is not None
        doc = packed(seed, n, kind)
        inputs = {"doc": doc[0] if alike else doc}
        assume(any(hull.inside is not None for hull in program.hulls))
        check(program, program.mask(inputs), kv_group, seed, inputs=inputs)


@pytest.mark.parametrize("seed", range(3))
def test_passes_of_documents_and_masked_runs_are_the_same(seed: int) -> None:
    """Outputs, lse and gradients of the plain way: hulls without passes."""
    torch.manual_seed(seed)
    n = 1500
    bound = patterndsl.load("examples/packed-sinks-strided.yaml").bind(n, heads=2)
    found = hulls.hulls(bound, CPU)
    assert found is not None and all(hull.inside is not None for hull in found)
    plain = [replace(hull, inside=None) for hull in found]
    query, key, value = (torch.randn(2, 2, n, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    doc = (torch.rand(2, n) < 0.004).cumsum(1)
    grads = torch.randn(2, 2, n, 16, dtype=torch.float64), torch.randn(2, 2, n, dtype=torch.float64)
    results = []
    for some in (found, plain):
        run = Masked(some, 2, bound.sizes, query.device).run(query, key, value, {"doc": doc}, 0.3)
        out, lse = attended(query, key, value, run)
        results.append((out, lse, *torch.autograd.grad((out, lse), (query, key, value), grads)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_which_documents_run_by_passes() -> None:
    """Those that are unbroken, in whatever order; a row of a batch by itself."""
    assert spans_of(torch.tensor([4, 4, 4, 9, 2, 2])) == [(0, 3), (3, 1), (4, 2)]
    assert spans_of(torch.tensor([4, 4, 9, 4])) is None
    program = patterndsl.load("examples/packed-sinks-strided.yaml").compile(4096, heads=1)
    assert isinstance(program.ready.masked, Masked)
    doc = torch.stack([torch.arange(4096) // 700, torch.arange(4096) % 3])
    query, key, value = (torch.randn(2, 1, 4096, 8) for _ in range(3))
    program(query, key, value, inputs={"doc": doc})
    (hull,) = program.ready.masked.hulls
    assert hull.inside is not None and set(hull.inside.lengths) == {700, 596}


def test_lengths_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_KEPT", 20_000)
    (hull,) = patterndsl.load("examples/packed-sinks-strided.yaml").compile(4096, heads=1).hulls or ()
    assert hull.inside is not None
    ready = Documents(hull.inside, torch.device("cpu"))
    assert ready.of(30) is ready.of(30)
    for length in range(1, 80):
        ready.of(length)
    assert 0 < len(ready.lengths) < 20


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
