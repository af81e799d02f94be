"""Keys that each call lists: chosen as a loop would choose them, and attended as if the lists had been given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl.diagnostics import InputError
from patterndsl.learn.index import Index
from patterndsl.lower.devices import CUDA
from patterndsl.lower.hulls import hulls
from patterndsl.nn import Attention
from patterndsl.runtime import strips
from patterndsl.runtime.data import checked_inputs
from patterndsl.runtime.placed import Placed
from patterndsl.sema.bind import BoundSelection

TOP = """
select:
  top: topk({k}, of = {of}, per = {per}, by = {by}, among = {among}, always = {always}, heads = {heads})
attend: {attend}
"""


def spec(
    k: int = 3,
    of: str = "blocks(4)",
    per: str = "blocks(4)",
    by: str = "mean",
    among: str = "k < q",
    always: str = "k == q",
    heads: str = "each",
    attend: str = "causal & top",
) -> str:
    return TOP.format(k=k, of=of, per=per, by=by, among=among, always=always, heads=heads, attend=attend)


def tensors_of(batch: int, heads: int, q_len: int, kv_len: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, number, length, 8) for number, length in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))]
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """softmax(scores + log counts) value; a row without keys is 0."""
    again = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(again, 1), value.repeat_interleave(again, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + counts.log()
    empty = (counts == 0).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) @ value


def check(program: patterndsl.Program, counts: Tensor, tensors: Sequence[Tensor], inputs: dict[str, Tensor]) -> None:
    """Outputs and gradients to 1e-9."""
    query, key, value = tensors
    out, expected = program(query, key, value, inputs=inputs), dense(query, key, value, counts)
    upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    pairs = zip(*(torch.autograd.grad(x, list(tensors), upstream) for x in (out, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def listed(lists: Tensor, n: int, of: int, per: int, keep: Callable[[int, int], bool]) -> Tensor:
    """0 or 1 for each pair [B, H, n, n], by a loop over all of them; lists [B, H, rows, width]."""
    counts = torch.zeros(*lists.shape[:2], n, n, dtype=torch.float64)
    for b in range(lists.shape[0]):
        for head in range(lists.shape[1]):
            for q in range(n):
                row = lists[b, head, q // per].tolist()
                for k in range(n):
                    counts[b, head, q, k] = k // of in row and keep(q, k)
    return counts


# ---- what is attended


@pytest.mark.parametrize("backend", ["auto", "gathered", "oracle"])
@pytest.mark.parametrize(("of", "per"), [(4, 4), (1, 1), (3, 5), (8, 1), (16, 2), (2, 16)])
@pytest.mark.parametrize("n", [1, 18, 37])
def test_given_lists_equal_a_loop(n: int, of: int, per: int, backend: str) -> None:
    """Lists of the caller, with doubles, with what is not there and with nothing."""
    text = (
        f"select: {{plan: 'given(4, of = blocks({of}), per = blocks({per}))'}}\nattend: causal & (plan | recent(3))\n"
    )
    program = patterndsl.parse(text).compile(n, heads=2, backend=backend)
    generator = torch.Generator().manual_seed(n)
    plan = torch.randint(-2, -(-n // of) + 2, (2, 2, -(-n // per), 4), generator=generator)
    counts = listed(plan, n, of, per, lambda q, k: k <= q).clamp(max=1)
    near = torch.tensor([[0 <= q - k < 3 for k in range(n)] for q in range(n)])
    check(program, torch.maximum(counts, near.double()), tensors_of(2, 2, n, n, 2), {"plan": plan})


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    of=st.sampled_from(["tokens", "blocks(3)", "blocks(4)", "blocks(16)"]),
    per=st.sampled_from(["tokens", "blocks(2)", "blocks(4)", "blocks(16)"]),
    k=st.integers(1, 5),
    by=st.sampled_from(["mean", "max"]),
    heads=st.sampled_from(["each", "group", "all"]),
    among=st.sampled_from(["all", "k <= q", "k % 2 == 0", "none"]),
    always=st.sampled_from(["none", "k == 0", "k == q"]),
    attend=st.sampled_from(
        [
            "top",
            "causal & top",
            "causal & (top | recent(5) | first(2))",
            "top & same(doc)",
            "causal & ((top | recent(4)) & same(doc))",
            "causal & (top - recent(3))",
            "head % 2 == 0 & top | head % 2 == 1 & recent(6)",
            "causal & (top | random(2, seed = 3))",
        ]
    ),
    start=st.integers(0, 20),
)
def test_every_backend_equals_the_oracle(
    n: int, of: str, per: str, k: int, by: str, heads: str, among: str, always: str, attend: str, start: int
) -> None:
    """Outputs, lse and gradients, of the lists that the program itself has found; also of queries that go on."""
    text = spec(k, of, per, by, among, always, heads, attend)
    text = ('inputs: {doc: "int[N]"}' if "doc" in attend else "") + text
    start = min(start, n - 1)
    q_len = n - start
    tensors = tensors_of(2, 4, q_len, n, 2, seed=n)
    inputs = {"doc": torch.randint(0, 3, (2, n), generator=torch.Generator().manual_seed(n))} if "doc" in attend else {}
    pattern = patterndsl.parse(text)
    fast = pattern.compile(n, heads=4, q_len=q_len, kv_len=n, q_start=start)
    out, lse, found = fast(*tensors, inputs=inputs, return_lse=True, return_labels=True)
    for backend in ("oracle", "gathered"):
        program = pattern.compile(n, heads=4, backend=backend, q_len=q_len, kv_len=n, q_start=start)
        truth, truth_lse = program(*tensors, inputs={**inputs, **found}, return_lse=True)
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-9)
        torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-9)
        upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        there = lse.isfinite()

        def loss(out: Tensor, lse: Tensor, upstream: Tensor = upstream, there: Tensor = there) -> Tensor:
            return (out * upstream).sum() + (lse.masked_fill(~there, 0.0) * upstream[..., 0]).sum()

        if not there.any():
            continue
        both = (torch.autograd.grad(loss(*x), tensors, retain_graph=True) for x in ((out, lse), (truth, truth_lse)))
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_two_selections_count_a_key_once_or_twice() -> None:
    text = "select: {a: 'given(2)', b: 'given(2)'}\nmerge: MERGE\nattend: a | b\n"
    n, generator = 9, torch.Generator().manual_seed(0)
    a, b = (torch.stack([torch.randperm(n, generator=generator)[:2] for _ in range(n)]) for _ in range(2))
    counts = sum(listed(x[None, None], n, 1, 1, lambda q, k: True) for x in (a, b))
    assert isinstance(counts, Tensor)
    assert counts.max() == 2
    for merge, expected in (("set", counts.clamp(max=1)), ("multiset", counts)):
        program = patterndsl.parse(text.replace("MERGE", merge)).compile(n, heads=2)
        check(program, expected, tensors_of(1, 2, n, n, 2), {"a": a, "b": b})


@pytest.mark.parametrize("backend", ["auto", "oracle"])
def test_a_mean_is_of_the_terms_that_have_keys(backend: str) -> None:
    n = 11
    program = patterndsl.parse("merge: mean\nattend: recent(3) | k == 2 * q | q < 2 & first(4)\n").compile(
        n, heads=2, backend=backend
    )
    tensors = tensors_of(2, 2, n, n, 2)
    q, k = torch.arange(n)[:, None], torch.arange(n)[None]
    terms = [(q - k >= 0) & (q - k < 3), k == 2 * q, (q < 2) & (k < 4)]
    parts = torch.stack([dense(tensors[0], tensors[1], tensors[2], term.double()) for term in terms])
    expected = parts.sum(0) / torch.stack(terms).any(2).sum(0)[:, None]
    out = program(*tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(out.sin().sum(), tensors), torch.autograd.grad(expected.sin().sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="no log-sum-exp"):
        program(*tensors, return_lse=True)


def test_padding_behind_a_sequence_changes_nothing() -> None:
    """Candidates are what the predicate says; what is padding is masked, and chosen blocks of it are empty."""
    text = "inputs: {there: 'bool[Nk]'}" + spec(
        attend="causal & top & k.there", of="tokens", per="tokens", among="k <= q"
    )
    pattern, tensors = patterndsl.parse(text), tensors_of(1, 2, 20, 20, 2)
    alone = patterndsl.parse(text).compile(13, heads=2)(
        *(x[:, :, :13] for x in tensors), inputs={"there": torch.ones(13, dtype=torch.bool)}
    )
    padded = pattern.compile(20, heads=2)(*tensors, inputs={"there": torch.arange(20) < 13})
    assert torch.equal(alone, padded[:, :, :13])


# ---- what is chosen


@pytest.mark.parametrize("by", ["mean", "max"])
@pytest.mark.parametrize(("of", "per", "start"), [(4, 4, 0), (1, 1, 0), (5, 3, 0), (4, 4, 6), (3, 1, 5)])
def test_lists_are_those_with_the_highest_scores(of: int, per: int, start: int, by: str) -> None:
    n, k = 23, 3
    text = spec(k, f"blocks({of})", f"blocks({per})", by, f"k * {of} <= q * {per}", "k == 1")
    pattern = patterndsl.parse(text)
    program = pattern.compile(n, heads=2, q_len=n - start, kv_len=n, q_start=start)
    query, key, _ = (x.detach() for x in tensors_of(1, 2, n - start, n, 2))
    found = program.selections(query, key)["top"]
    for head in range(2):
        for row in range(found.shape[2]):
            unit = row + start // per
            mine = query[0, head, max(0, unit * per - start) : (unit + 1) * per - start].mean(0)
            scores = {}
            for block in range(-(-n // of)):
                keys = key[0, head, block * of : (block + 1) * of]
                if by == "mean":
                    score = mine @ keys.mean(0)
                else:
                    score = torch.maximum(mine * keys.amax(0), mine * keys.amin(0)).sum()
                if block == 1:
                    scores[block] = math.inf
                elif block * of <= unit * per:
                    scores[block] = float(score)
            best = sorted(scores, key=lambda block: -scores[block])[:k]
            assert sorted(x for x in found[0, head, row].tolist() if x >= 0) == sorted(best)


def test_heads_that_share_a_key_head_share_lists() -> None:
    query, key, _ = tensors_of(1, 4, 16, 16, 2)
    lists = {
        heads: patterndsl.parse(spec(heads=heads)).compile(16, heads=4).selections(query, key)["top"].sort(-1).values
        for heads in ("each", "group", "all")
    }
    assert lists["all"].shape == (1, 1, 4, 3)
    assert torch.equal(lists["group"][:, 0], lists["group"][:, 1])
    assert not torch.equal(lists["each"][:, 0], lists["each"][:, 1])


def test_a_row_may_have_fewer_candidates_than_places() -> None:
    program = patterndsl.parse(spec(k=9)).compile(16, heads=1)
    query, key, value = tensors_of(1, 1, 16, 16, 1)
    out, found = program(query, key, value, return_labels=True)
    assert (found["top"] >= 0).sum(-1).tolist() == [[[1, 2, 3, 4]]]
    torch.testing.assert_close(out, dense(query, key, value, torch.ones(16, 16, dtype=torch.float64).tril()))


def test_scores_that_are_not_numbers_come_last() -> None:
    program = patterndsl.parse(spec(k=2, among="all", always="none")).compile(16, heads=1)
    query, key, _ = tensors_of(1, 1, 16, 16, 1)
    key = key.detach().clone()
    key[:, :, :8] = torch.nan
    assert sorted(program.selections(query, key)["top"].unique().tolist()) == [2, 3]


def test_lists_are_shorter_than_a_strip_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    from patterndsl.learn import topk

    program = patterndsl.parse(spec(per="tokens", among="k < q // 4", always="k == q // 4")).compile(40, heads=2)
    query, key, _ = tensors_of(1, 2, 40, 40, 2)
    whole = program.selections(query, key)["top"]
    monkeypatch.setattr(topk, "MAX_SCORES", 64)
    assert torch.equal(program.selections(query, key)["top"], whole)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 9, 9), (2, 0, 9), (2, 0, 0), (2, 3, 0)])
@pytest.mark.parametrize("per", ["tokens", "blocks(4)"])
def test_nothing_to_choose_from(batch: int, q_len: int, kv_len: int, per: str) -> None:
    program = patterndsl.parse(spec(per=per, always="none")).compile(9, heads=2, q_len=q_len, kv_len=kv_len)
    tensors = tensors_of(batch, 2, q_len, kv_len, 2)
    out = program(*tensors)
    assert out.shape == (batch, 2, q_len, 8)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


# ---- what is given


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (torch.zeros(4, 2), "has dtype float32"),
        (torch.zeros(4, 3, dtype=torch.int64), r"has shape \[4, 3\]"),
        (torch.zeros(5, 2, dtype=torch.int64), r"has shape \[5, 2\]"),
        (torch.zeros(3, 4, 2, dtype=torch.int64), "has 3 rows for a batch of 1"),
        (torch.zeros(1, 3, 4, 2, dtype=torch.int64), "has 3 heads for 2"),
        ([[0, 1]], "is list"),
        (None, "is missing"),
    ],
)
def test_lists_that_do_not_fit(plan: Any, said: str) -> None:
    program = patterndsl.parse("select: {plan: 'given(2, per = blocks(4))'}\nattend: plan\n").compile(16, heads=2)
    with pytest.raises(InputError, match=said):
        program(*tensors_of(1, 2, 16, 16, 2), inputs={} if plan is None else {"plan": plan})


# ---- what a GPU runs on single keys, which any device can


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize(("of", "per", "start"), [(1, 1, 0), (3, 2, 0), (2, 4, 5)])
def test_strips_of_gathered_keys(of: int, per: int, start: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of all batch rows or of each, with documents of each row, some queries at a time."""
    monkeypatch.setattr(strips, "MAX_ELEMENTS", 1 << 11)
    n, generator = 19, torch.Generator().manual_seed(rows)
    text = f"inputs: {{doc: 'int[N]'}}\nselect: {{top: 'given(4, of = blocks({of}), per = blocks({per}))'}}\n"
    pattern = patterndsl.parse(text + "attend: causal & top & same(doc)\n")
    program = pattern.compile(n, heads=4, q_len=n - start, kv_len=n, q_start=start, backend="oracle")
    shape = next(shape for shape in program.bound.inputs if shape.selection is not None)
    size = ((rows,) if rows else ()) + tuple(item or 0 for item in shape.inner)
    inputs = {
        "top": torch.randint(-1, -(-n // of), size, generator=generator),
        "doc": torch.randint(0, 2, (2, n), generator=generator),
    }
    query, key, value = tensors_of(2, 4, n - start, n, 2)
    truth, truth_lse = program(query, key, value, inputs=inputs, return_lse=True)
    placed = Placed(hulls(program.bound, CUDA) or (), program.bound, torch.device("cpu"))
    given = checked_inputs(program.bound, inputs, torch.device("cpu"), 2)
    out, lse = placed(query, key, value, given, 8**-0.5)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-9)
    grads = (torch.autograd.grad(x.sin().sum(), (query, key, value)) for x in (out, truth))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


# ---- layers


def test_a_layer_learns_what_it_selects_by() -> None:
    """The index follows attention: its lists hold more of it after training, and nothing else is moved by its loss."""
    torch.manual_seed(0)
    layer = Attention(patterndsl.parse(spec(by="learned", heads="all", k=3, always="none", among="k < q")), 16, 2)
    x = torch.randn(4, 64, 16) + torch.randn(4, 16, 16).repeat_interleave(4, 1)
    index = layer.indices["top"]
    assert isinstance(index, Index)
    optimizer = torch.optim.Adam(index.parameters(), 3e-2)
    losses = []
    for _ in range(60):
        layer(x)
        optimizer.zero_grad()
        layer.losses["top"].backward()
        assert layer.query_projection.weight.grad is None
        optimizer.step()
        losses.append(float(layer.losses["top"].detach()))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    layer.eval()
    layer(x)
    assert layer.losses == {}


def test_a_layer_is_the_same_again() -> None:
    torch.manual_seed(0)
    layer = Attention(patterndsl.parse(spec(by="learned", heads="all")), 16, 2).eval()
    other = Attention(patterndsl.parse(spec(by="learned", heads="all")), 16, 2).eval()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 21, 16)
    assert torch.equal(layer(x), other(x))
    last = layer(x[:, 20:], x, q_start=20)
    torch.testing.assert_close(last, layer(x)[:, 20:], rtol=1e-5, atol=1e-6)


CAUSALITY = [
    (spec(per="tokens", among="k < q // 4", always="k == q // 4"), True),
    (spec(of="tokens", per="tokens", among="k <= q", always="none"), True),
    (spec(per="tokens", among="k < q // 4", always="k == q // 4", by="learned", heads="all"), True),
    (spec(), False),
    (spec(per="tokens", among="k <= q // 4", always="none"), False),
    (spec(of="tokens", per="tokens", among="all", always="none"), False),
    (
        "labels: {c: kmeans(clusters = 4)}\nselect: {r: 'members(c, top = 6)'}\nmerge: mean\n"
        "attend: causal & r | q == k\n",
        False,
    ),
    ("labels: {b: lsh(buckets = 4)}\nattend: causal & (same(b) | q == k)\n", True),
    ("labels: {b: lsh(buckets = 4)}\nattend: causal & (chunks(b, 3, 1) | q == k)\n", False),
    ("attend: causal & recent(5)", True),
    ("attend: window(2)", False),
]


@pytest.mark.parametrize(("text", "is_causal"), CAUSALITY)
def test_what_later_tokens_change(text: str, is_causal: bool) -> None:
    """Where the verdict says that the future has no part in the past, no change of a token, however large, moves a row
    before it by more than rounding; where it says otherwise, some change does."""
    torch.manual_seed(0)
    pattern = patterndsl.parse(text)
    verdict = pattern.prove("causal")
    assert isinstance(verdict, patterndsl.Proven) == is_causal, str(verdict)
    assert isinstance(verdict, patterndsl.Refuted) != is_causal, str(verdict)
    n = 24
    moved = False
    for seed in range(6 if is_causal else 40):
        torch.manual_seed(seed)
        layer = Attention(pattern, 16, 2).double().eval()
        x = torch.randn(1, n, 16, dtype=torch.float64)
        before = layer(x)
        for t in range(1, n, 1 if is_causal else 5):
            for size in (1.0, 100.0):
                changed = x.clone()
                changed[:, t] = size * torch.randn(16, dtype=torch.float64)
                # sums of other rows' keys may be cut otherwise, which rounds otherwise
                difference = float((layer(changed) - before)[:, :t].abs().max().detach())
                assert difference < 1e-13 or not is_causal, f"token {t} moves what is before it"
                moved |= difference > 1e-3
        if moved:
            break
    assert moved != is_causal


def test_the_selection_that_is_bound() -> None:
    (shape,) = patterndsl.parse(spec()).compile(18, heads=1).bound.inputs
    assert isinstance(shape.selection, BoundSelection)
    assert (shape.selection.num_rows, shape.selection.num_blocks, shape.inner) == (5, 5, (5, 3))
