"""The gathered backend against dense attention written out here: outputs, lse and gradients, on any mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.lower import segments
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.runtime import gathered
from patterndsl.runtime.gathered import BlockLists, Group, gathered_attention
from patterndsl.sema.parameters import Sizes

MASKS = {
    "nothing": lambda q, k: (q < 0) & (k < 0),
    "everything": lambda q, k: (q >= 0) & (k >= 0),
    "band": lambda q, k: (q - k >= 0) & (q - k < 40),
    "stride": lambda q, k: (q - k) % 7 == 0,
    "global row and column": lambda q, k: (q == 70) | (k == 3),
    "empty rows": lambda q, k: (q % 3 == 0) & (k <= q),
    "hash": lambda q, k: (q * 7919 + k * 104729) % 11 == 0,
    "late keys": lambda q, k: k > 2 * q + 5,
}
SIZES = [(1, 1), (63, 63), (65, 130), (127, 64), (300, 17)]


Triple = tuple[Tensor, Tensor, Tensor]


def dense(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention with the textbook's formula. keep: [B, H, Tq, Tk]."""
    kv_group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(kv_group, 1), value.repeat_interleave(kv_group, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ value, lse


def lists_of(keep: Tensor, q_block: int, kv_block: int) -> BlockLists:
    """The live tiles of a dense mask [Tq, Tk], by looking at each."""
    offsets, kv_blks, is_full = [0], [], []
    for q in range(0, keep.shape[0], q_block):
        for kv_blk, k in enumerate(range(0, keep.shape[1], kv_block)):
            tile = keep[q : q + q_block, k : k + kv_block]
            if tile.any():
                kv_blks.append(kv_blk)
                is_full.append(bool(tile.all()))
        offsets.append(len(kv_blks))
    return BlockLists(
        q_block, kv_block, torch.tensor(offsets), torch.tensor(kv_blks, dtype=torch.int64), torch.tensor(is_full).bool()
    )


def group_of(
    keep: Tensor, rows: tuple[int, ...] | None, heads: tuple[int, ...] | None, q_block: int, kv_block: int
) -> Group:
    return Group(rows, heads, lists_of(keep, q_block, kv_block), lambda q, k: keep[q, k])


def tensors(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dtype: torch.dtype = torch.float64
) -> Triple:
    torch.manual_seed(q_len * 1000 + kv_len)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=dtype, requires_grad=True)

    return random(heads, q_len, 8), random(kv_heads, kv_len, 8), random(kv_heads, kv_len, 6)


def mask(name: str, q_len: int, kv_len: int) -> Tensor:
    return torch.as_tensor(MASKS[name](torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]))


def assert_same_with_gradients(inputs: Triple, groups: list[Group], keep: Tensor) -> None:
    """Outputs and lse to 1e-10, and the gradients of a function of both."""
    ours = gathered_attention(*inputs, groups, scale=0.3)
    theirs = dense(*inputs, keep, 0.3)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-10, rtol=0)

    def loss(out: Tensor, lse: Tensor) -> Tensor:
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        return (out * weight).sum() + (lse.masked_fill(lse == -torch.inf, 0) * weight[..., 0]).sum()

    if not all(x.numel() for x in inputs):
        return
    for our, their in zip(
        torch.autograd.grad(loss(*ours), inputs), torch.autograd.grad(loss(*theirs), inputs), strict=True
    ):
        assert not our.isnan().any()
        torch.testing.assert_close(our, their.nan_to_num(0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kv_block", [1, 16, 64])
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_equals_dense(name: str, q_len: int, kv_len: int, kv_block: int) -> None:
    keep = mask(name, q_len, kv_len)
    inputs = tensors(1, 2, 2, q_len, kv_len)
    assert_same_with_gradients(inputs, [group_of(keep, None, None, 32, kv_block)], keep.expand(1, 2, -1, -1))


@pytest.mark.parametrize("limit", [1, 64, 5000])
def test_small_chunks_and_segments_change_nothing(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(gathered, "MAX_SCORES", limit)
    monkeypatch.setattr(segments, "MAX_SEGMENT", 48)
    for name in MASKS:
        keep = mask(name, 100, 130)
        inputs = tensors(2, 4, 2, 100, 130)
        assert_same_with_gradients(inputs, [group_of(keep, None, None, 32, 16)], keep.expand(2, 4, -1, -1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_groups_of_rows_and_heads(kv_heads: int) -> None:
    """Heads split across a key head, rows apart: every part with a pattern of its own."""
    names = iter(MASKS)
    keep = torch.zeros(2, 4, 65, 70, dtype=torch.bool)
    groups = []
    for row in range(2):
        for heads in ((0, 3), (1,), (2,)):
            part = mask(next(names), 65, 70)
            keep[row, list(heads)] = part
            groups.append(group_of(part, (row,), heads, 16, 8))
    assert_same_with_gradients(tensors(2, 4, kv_heads, 65, 70), groups, keep)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(q_len: int, kv_len: int) -> None:
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    inputs = tensors(1, 1, 1, q_len, kv_len)
    out, lse = gathered_attention(*inputs, [group_of(keep, None, None, 4, 4)], scale=1.0)
    assert out.shape == (1, 1, q_len, 6)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    out.sum().backward()


def test_strided_inputs() -> None:
    keep = mask("band", 60, 60)

    def random() -> Tensor:
        return torch.randn(1, 60, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()

    inputs = random(), random(), random()
    assert_same_with_gradients(inputs, [group_of(keep, None, None, 16, 16)], keep.expand(1, 3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["everything", "band", "hash"])
def test_error_is_at_most_twice_sdpas(name: str, dtype: torch.dtype) -> None:
    keep = mask(name, 300, 300)

    def leaves(originals: Triple, kind: torch.dtype) -> Triple:
        query, key, value = (x.detach().to(kind).requires_grad_() for x in originals)
        return query, key, value

    low = leaves(tensors(1, 4, 4, 300, 300), dtype)
    exact = leaves(low, torch.float64)
    truth, _ = dense(*exact, keep.expand(1, 4, -1, -1), 8**-0.5)
    ours, _ = gathered_attention(*low, [group_of(keep, None, None, 64, 64)], scale=8**-0.5)
    low_sdpa = leaves(low, dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*low_sdpa, attn_mask=keep)
    grad = torch.randn_like(truth)
    pairs = [(ours, sdpa, truth)]
    results = [torch.autograd.grad(o, i, grad.to(o.dtype)) for o, i in ((ours, low), (sdpa, low_sdpa), (truth, exact))]
    pairs += list(zip(*results, strict=True))
    for our, their, true in pairs:
        assert (our.double() - true).abs().max() <= 2 * (their.double() - true).abs().max() + 1e-7


@pytest.mark.parametrize("name", ["band", "stride", "everything"])
@pytest.mark.parametrize("kv_block", [1, 16])
def test_a_value_that_is_not_finite_reaches_the_rows_that_attend_it(name: str, kv_block: int) -> None:
    keep = mask(name, 90, 90)
    query, key, value = (x.detach() for x in tensors(1, 1, 1, 90, 90))
    value[0, 0, 33, 2] = torch.nan
    out, _ = gathered_attention(query, key, value, [group_of(keep, None, None, 32, kv_block)], scale=0.3)
    assert torch.equal(out[0, 0, :, 2].isnan(), keep[:, 33])
    assert not out[..., [0, 1, 3, 4, 5]].isnan().any()


def test_a_query_and_a_key_that_are_not_finite() -> None:
    keep = mask("band", 90, 90)
    query, key, value = (x.detach() for x in tensors(1, 1, 1, 90, 90))
    query[0, 0, 5, 0] = torch.nan
    key[0, 0, 50, 0] = torch.nan
    out, lse = gathered_attention(query, key, value, [group_of(keep, None, None, 32, 16)], scale=0.3)
    spoiled = keep[:, 50] | (torch.arange(90) == 5)
    assert torch.equal(out.isnan().any(-1)[0, 0], spoiled)
    assert torch.equal(lse.isnan()[0, 0], spoiled)


def test_twice_the_same_bits() -> None:
    keep = mask("hash", 200, 200)
    results = []
    for _ in range(2):
        inputs = tensors(2, 2, 1, 200, 200, torch.float32)
        out, _ = gathered_attention(*inputs, [group_of(keep, None, None, 32, 8)], scale=0.3)
        out.sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck() -> None:
    keep = mask("empty rows", 9, 9)
    inputs = tensors(1, 2, 1, 9, 9)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return gathered_attention(query, key, value, [group_of(keep, None, None, 4, 2)], scale=0.5)[0]

    assert torch.autograd.gradcheck(run, inputs)


# ---- how lists are worked through


def stairs(length: int) -> Tensor:
    """Each four blocks of 16 queries have the same keys, every other block of those before."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    return (q // 64 > k // 64) & (k // 16 % 2 == 0)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("of", [1, 3])
def test_query_blocks_with_the_same_keys_are_one(kv_heads: int, of: int) -> None:
    """`of`: some keys of those blocks are masked, or none."""
    keep = stairs(260) & (torch.arange(260)[:, None] % of == 0)
    group = group_of(keep, None, None, 16, 16)
    assert {segment.alike for segment in group.lists.segments} >= {4}
    assert_same_with_gradients(tensors(2, 2, kv_heads, 260, 260), [group], keep.expand(2, 2, -1, -1))


@pytest.mark.parametrize("most", [16, 48, 64])
@pytest.mark.parametrize("name", ["everything", "band", "global row and column"])
def test_long_lists_in_parts_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, most: int) -> None:
    monkeypatch.setattr(gathered, "MAX_KEYS", most)
    keep = mask(name, 128, 192)
    group = group_of(keep, None, None, 32, 16)
    assert_same_with_gradients(tensors(2, 4, 2, 128, 192), [group], keep.expand(2, 4, -1, -1))


def test_keys_that_follow_each_other_are_not_copied() -> None:
    keep = torch.ones(64, 96, dtype=torch.bool)
    (segment,) = group_of(keep, None, None, 16, 16).lists.segments
    assert (segment.alike, segment.first_q_blk, segment.first_kv_blk) == (4, 0, 0)


@pytest.mark.parametrize(("most", "expected"), [(16, [4, 4]), (3, [2, 2]), (1, [1, 1])])
def test_so_many_are_one_that_scores_stay_few(monkeypatch: pytest.MonkeyPatch, most: int, expected: list[int]) -> None:
    monkeypatch.setattr(gathered, "MAX_SCORES", most * 16 * 16 * 2)
    keep = stairs(192)
    assert [segment.alike for segment in group_of(keep, None, None, 16, 16).lists.segments][:1] == expected[:1]


def test_a_value_that_is_not_finite_spoils_no_other_block_of_the_same_keys() -> None:
    keep = stairs(192) & (torch.arange(192)[:, None] % 3 != torch.arange(192) % 3)
    query, key, value = (x.detach() for x in tensors(2, 4, 2, 192, 192))
    value[1, 1, 34, 2] = torch.nan
    out, _ = gathered_attention(query, key, value, [group_of(keep, None, None, 16, 16)], scale=0.3)
    assert not out[0].isnan().any()
    assert not out[1, :2].isnan().any()
    for head in (2, 3):
        assert torch.equal(out[1, head, :, 2].isnan(), keep[:, 34])


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([7], []),
        ([0, 1, 0, 2], [(0, 1), (2, 3)]),
        ([0] * 16 + [1, 1, 1], [(15, 18)]),
        ([0] * 16 + [1, 9, 1], [(15, 16), (16, 17), (17, 18)]),
    ],
)
def test_lists_of_similar_length_share_a_segment_but_many_of_one(
    numbers: list[int], expected: list[tuple[int, int]]
) -> None:
    assert list(segments.length_ranges(numbers, segments.LARGE // 100)) == expected


@pytest.mark.parametrize("limit", [16, 64, 4096])
def test_segments_are_counted_beforehand(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(segments, "MAX_SEGMENT", limit)
    for text in ("causal", "causal & (block(16) | columns(16, 2))", "window(20) | global(3)", "q % 64 < 32 & k < 40"):
        tiles = find_tiles(patterndsl.parse(text).bind(500).relation, Sizes(500, 500, 0, 500), Lookup(), 16, 8)
        lists = gathered.block_lists(tiles, torch.device("cpu"))
        assert segments.num_segments(tiles) == len(lists.segments), text


@pytest.mark.parametrize("scores", [1 << 12, 1 << 19])  # one query block at a time, or all that are alike
@pytest.mark.parametrize("backend", ["gathered", "auto", "oracle"])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_no_other_document(
    number: float, which: int, backend: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither outputs nor gradients, though tiles reach over documents."""
    monkeypatch.setattr(gathered, "MAX_SCORES", scores)
    torch.manual_seed(0)
    n, doc = 150, torch.arange(150) // 50
    pattern = patterndsl.parse("window(60) & same(doc)", inputs={"doc": "int[N]"})
    program, others = pattern.compile(n, heads=4, backend=backend), doc != 1
    tensors = [torch.randn(2, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2)]

    def results(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = program(*leaves, inputs={"doc": doc}, return_lse=True)
        out, lse = out[:, :, others], lse[:, :, others]
        found = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)
        return [out, lse, *(grad[:, :, others] for grad in found)]

    truth = results(tensors)
    tensors[which][:, :, 60:70] = number
    for found, wanted in zip(results(tensors), truth, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
