"""Decoding against full attention: every row of every step, as the cache and the kernels of a GPU compute it.

Kernels run in Triton's interpreter in a process of its own, as in `test_triton`; it is slow, and sizes are small there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl import Cache, Pattern, PatternError
from patterndsl.runtime.decoding import gathered
from patterndsl.runtime.decoding.store import Store
from patterndsl.syntax.tree import Logic
from tests.interpreting import HAS_CUDA, IS_INTERPRETED, assert_passes_in_the_interpreter, compiles
from tests.strategies import Case, cases, many

USES_KERNELS = HAS_CUDA or IS_INTERPRETED
DEVICE = "cuda" if HAS_CUDA else "cpu"
BACKEND = "triton" if USES_KERNELS else "gathered"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if HAS_CUDA else [torch.float32]
DTYPES = DTYPES if USES_KERNELS else [torch.float64, torch.float32, torch.bfloat16]
N = 200 if not IS_INTERPRETED else 60
on_device = pytest.mark.cuda if HAS_CUDA else pytest.mark.filterwarnings("default")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest number; a row is a softmax over at most some hundred products of few channels, rounded once."""

PATTERNS = {
    "band and sinks": "causal & (recent(20) | first(4))",
    "all earlier": "causal",
    "band and stride": "causal & (recent(10) | strided(16))",
    "columns": "causal & (block(16) | columns(16, 3))",
    "a late key": "causal & (recent(17) | k == 30)",
    "blocks": "causal & blocks(8, window(2))",
    "key heads": "head < 2 & recent(9) | head >= 2 & causal",
    "query heads of a key head": "head % 2 == 0 & recent(9) | head == 1 & causal & first(5)",
    "empty rows": "causal & q > 20 & k < 10",
    "no diagonal": "causal & (strided(4) - recent(3))",
    "nothing": "none",
    "functions": "causal & (isqrt(q) == isqrt(k) | log2(1 + q) == log2(1 + k) & abs(q - k) < min(q, 9))",
}


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """Places that no token was written to are NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short as they are: a tile is as small as a page."""
    if IS_INTERPRETED:
        from patterndsl.runtime.kernels import steps

        monkeypatch.setattr(steps, "TILE_BYTES", 1)


def random_tensors(
    dtype: torch.dtype,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    value_dim: int = 8,
    n: int = N,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, value_dim)
    query, key, value = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return query, key, value


def assert_close(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    finite = truth.isfinite()
    assert torch.equal(found.isfinite(), finite)
    if finite.any():
        scale = truth[finite].abs().max().clamp_min(1.0)
        assert (found - truth)[finite].abs().max() <= TOLERANCE[dtype] * scale


def assert_decodes(
    pattern: Pattern,
    tensors: tuple[Tensor, Tensor, Tensor],
    schedule: Sequence[Sequence[int]],
    inputs: dict[str, Tensor] | None = None,
    *,
    scale: float | None = None,
    **options: Any,
) -> Cache:
    """Rows of full attention, while each step of the schedule appends so many tokens to each batch row."""
    query, key, value = tensors
    batch, heads, n, dim = query.shape
    given = inputs or {}
    full = {"inputs": inputs, "layer": options.get("layer", 0), "backend": "oracle", "scale": scale}
    truth, truth_lse = patterndsl.attention(*tensors, pattern, **full, return_lse=True)
    options = {"page": 16, "backend": BACKEND, "dtype": query.dtype, "device": DEVICE, **options}
    shape: Any = {"kv_heads": key.shape[1], "value_dim": value.shape[3], "head_dim": dim}
    cache = Cache(pattern, batch=batch, heads=heads, **shape, **options)
    lengths = [0] * batch
    for at_step, counts in enumerate(schedule):
        most = max(counts)

        def new(x: Tensor, starts: Sequence[int] = tuple(lengths), most: int = most) -> Tensor:
            """What is appended; tokens that are not counted are NaN."""
            rows = [x[row].narrow(-2, start, min(most, n - start)) for row, start in enumerate(starts)]
            return torch.stack(
                [torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[-2]), value=torch.nan) for x in rows]
            )

        values = {
            name: torch.stack(
                [
                    x[row, (start + torch.arange(most, device=DEVICE)).clamp(max=n - 1)]
                    for row, start in enumerate(lengths)
                ]
            )
            for name, x in given.items()
        }
        cache.append(new(key), new(value), counts=counts, inputs=values)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        assert cache.lengths == tuple(lengths)
        if IS_INTERPRETED and at_step + 1 < len(schedule):
            continue
        q_len = cache.max_queries
        at = torch.tensor(lengths, device=DEVICE)[:, None] - q_len + torch.arange(q_len, device=DEVICE)
        places = at.clamp(min=0)[:, None, :, None]
        before = (at < 0)[:, None]
        asked = query.gather(2, places.expand(-1, heads, -1, dim))
        out, lse = cache.attend(asked, scale=scale, return_lse=True)
        rows = truth.gather(2, places.expand(-1, heads, -1, truth.shape[3])).masked_fill(before[..., None], 0.0)
        assert_close(out, rows, query.dtype)
        rows_lse = truth_lse.gather(2, places[..., 0].expand(-1, heads, -1)).masked_fill(before, -torch.inf)
        assert_close(lse, rows_lse.to(lse.dtype), query.dtype)
    return cache


def one_by_one(prompt: int, n: int = N, step: int = 1, batch: int = 2) -> list[list[int]]:
    return [[prompt] * batch, *([step] * batch for _ in range((n - prompt) // step))]


@on_device
@pytest.mark.parametrize("max_queries", [1, 3] if not IS_INTERPRETED else [2])
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_rows_are_those_of_full_attention(text: str, max_queries: int) -> None:
    dtype = DTYPES[0]
    schedule = one_by_one(17, step=max_queries) if not IS_INTERPRETED else [[17, 17], [20, 3], [1, 1]]
    assert_decodes(patterndsl.parse(text), random_tensors(dtype), schedule, max_queries=max_queries)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", ["causal & (recent(37) | first(3))", "causal & (recent(9) | strided(5))"])
def test_rows_of_different_lengths(text: str, dtype: torch.dtype) -> None:
    """A row waits, the other goes on; both come to an empty ring, a full one, and around it."""
    schedule = [(0, 0), (5, 0), (1, 1), (0, 40), (0, 1), (30, 2), (1, 0), (2, 1)]
    assert_decodes(patterndsl.parse(text), random_tensors(dtype), schedule, max_queries=2)


@on_device
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"), [(1, 1, 1, 3), (6, 2, 24, 40), (16, 1, 16, 5), (3, 3, 80, 64)]
)
def test_shapes(heads: int, kv_heads: int, dim: int, value_dim: int) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim}
    assert_decodes(
        patterndsl.parse("causal & (recent(20) | first(2))"), random_tensors(DTYPES[0], **sizes), [[25, 30], [1, 1]]
    )


@pytest.mark.skipif(not USES_KERNELS, reason="it is about kernels")
@on_device
@pytest.mark.parametrize("text", ["causal & (recent(37) | first(3))", "causal & (recent(9) | strided(5))"])
@pytest.mark.parametrize(
    ("page", "tile_bytes", "programs", "merged"),
    [(16, 1, 528, 128), (16, 1, 12, 128), (16, 1, 528, 2), (64, 1, 4, 128), (16, 1 << 20, 528, 128)],
    ids=["a tile in a split", "splits of one and two", "merged in turns", "several tiles in a page", "pages in a tile"],
)
def test_splits_are_merged(
    text: str, page: int, tile_bytes: int, programs: int, merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However pages, tiles and splits lie, and the same bits again."""
    from patterndsl.runtime.kernels import steps

    monkeypatch.setattr(steps, "PROGRAMS", programs)
    monkeypatch.setattr(steps, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(steps, "MERGED_SPLITS", merged)
    monkeypatch.setattr(steps, "MERGED_NUMBERS", 32)  # of the 16 channels at least that a row is padded to
    tensors = random_tensors(DTYPES[0])
    cache = assert_decodes(patterndsl.parse(text), tensors, [[50, 3], [2, 1]], page=page)
    query = tensors[0][:, :, :1]
    first, again = (cache.attend(query, return_lse=True) for _ in range(2))
    assert all(torch.equal(*both) for both in zip(first, again, strict=True))


@pytest.mark.parametrize("heads", [1, 8, 16, 48, 64, 128, 256, 529])
@pytest.mark.parametrize("num_places", [0, 1, 16, 4096, 4160, 1 << 20])
def test_a_step_is_cut_into_equal_splits(num_places: int, heads: int) -> None:
    """So many programs as run at a time, none with more than a tile more than another, and each place in one."""
    pytest.importorskip("triton")
    from patterndsl.runtime.kernels import steps

    tile, num_tiles = 64, -(-num_places // 64)
    splits, span, shorter = steps.cut(num_places, tile, heads)
    assert splits * heads <= max(steps.PROGRAMS, heads)
    assert (splits + 1) * heads > steps.PROGRAMS or splits == max(1, num_tiles)
    assert 0 < shorter <= splits
    assert splits * span + (splits - shorter) * tile == num_tiles * tile


@pytest.mark.skipif(USES_KERNELS, reason="it is about plain operations")
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
def test_pages_are_read_where_they_lie(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what is gathered: rows of different lengths, pages that wait for others, and one that none holds any more."""
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)  # what is NaN is left to what gathers
    monkeypatch.setattr(gathered, "MUCH", 0.0)
    read, results = gathered._read, list[bool]()

    def counted(store: Store, query: Tensor, keep: Tensor) -> tuple[Tensor, Tensor] | None:
        found = read(store, query, keep)
        results.append(found is not None)
        return found

    monkeypatch.setattr(gathered, "_read", counted)
    pattern, tensors = patterndsl.parse(text), random_tensors(torch.float64)
    schedule = [(0, 0), (5, 0), (1, 1), (0, 40), (0, 1), (60, 2), (1, 0), (2, 1)]
    cache = assert_decodes(pattern, tensors, schedule, max_queries=2)
    assert all(results)
    assert results
    query, key, value = tensors
    cache.reset([0])
    cache.append(key[:, :, :3], value[:, :, :3], counts=[3, 0])
    first, its_key, its_value = (x[:1, :, :3] for x in tensors)
    truth = patterndsl.attention(first, its_key, its_value, pattern, backend="oracle")
    assert_close(cache.attend(query[:, :, 1:3])[:1], truth[:, :, 1:], torch.float64)


@on_device
def test_many_queries_at_once() -> None:
    """More rows than a tile of a kernel has."""
    tensors = random_tensors(DTYPES[0], heads=8, kv_heads=1)
    assert_decodes(patterndsl.parse("recent(11)"), tensors, [[30, 20], [11, 2], [9, 9]], max_queries=11)


@on_device
@pytest.mark.parametrize(
    "spec", ["recent(30) & same(doc)", "causal & within(doc, recent(20) | first(2))", "causal & (same(doc) | first(1))"]
)
def test_inputs_come_with_their_tokens(spec: str) -> None:
    doc = torch.stack([torch.arange(N) // 13, torch.arange(N) // 7 % 3]).to(DEVICE)
    pattern = patterndsl.parse(spec, inputs={"doc": "int[N]"})
    assert_decodes(pattern, random_tensors(DTYPES[0]), [(20, 12), (1, 1), (0, 3), (17, 1), (1, 2)], {"doc": doc})


@on_device
def test_draws_and_lengths() -> None:
    """The pattern depends on N, which is given."""
    pattern = patterndsl.parse("causal & (random(5, seed = head) | recent(isqrt(N)))")
    assert_decodes(pattern, random_tensors(DTYPES[0]), [[30, 3], [1, 1], [1, 7]], n=N)


@on_device
def test_reset_rows_begin_anew() -> None:
    """Pages of a row that was reset are used again, and what they held is not seen."""
    pattern, tensors = patterndsl.parse("causal & (recent(20) | k % 3 == 0)"), random_tensors(DTYPES[0])
    cache = assert_decodes(pattern, tensors, [[45, 40], [1, 1]])
    held = cache.nbytes
    cache.reset([1])
    assert cache.lengths == (46, 0)
    query, key, value = (x.flip(2) for x in tensors)
    truth = patterndsl.attention(query, key, value, pattern, backend="oracle")
    for start, stop in ((0, 30), (30, 31)):
        cache.append(key[:, :, start:stop], value[:, :, start:stop], counts=[0, stop - start])
        found = cache.attend(query[:, :, stop - 1 : stop])
        assert_close(found[1], truth[1, :, stop - 1 : stop], query.dtype)
    assert cache.nbytes == held
    cache.reset()
    assert cache.lengths == (0, 0)
    assert not cache.attend(query[:, :, :1]).any()


@on_device
@pytest.mark.parametrize("text", ["causal & recent(40) & strided(8)", "causal & (strided(8) | first(1))"])
def test_what_no_query_attends_is_not_read(text: str) -> None:
    """Neither in a bounded cache nor in a growing one."""
    query, key, value = random_tensors(DTYPES[0], n=50)
    is_kept = patterndsl.parse(text).compile(50).mask()[0, -1].to(DEVICE)
    expected = patterndsl.attention(query, key, value, text, backend="oracle")[:, :, -1:]
    for x in (key, value):
        x[:, :, ~is_kept] = torch.nan
    cache = Cache(text, batch=2, heads=4, kv_heads=2, head_dim=8, page=16, dtype=key.dtype, device=DEVICE)
    cache.append(key, value)
    assert_close(cache.attend(query[:, :, -1:]), expected, query.dtype)


@pytest.mark.skipif(USES_KERNELS, reason="kernels take finite keys and values")
@pytest.mark.parametrize("anything", [torch.nan, torch.inf])
def test_what_a_query_does_not_attend_may_be_anything(anything: float) -> None:
    pattern = patterndsl.parse("head == 0 & recent(4) | head == 1 & recent(2)")
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 2, 4), torch.randn(1, 1, 6, 4)
    key[:, :, 3] = anything  # what head 0 attends, and head 1 does not in its last row
    cache = Cache(pattern, batch=1, heads=2, kv_heads=1, head_dim=4, max_queries=2)
    cache.append(key, key)
    expected = patterndsl.attention(query, key, key, pattern, q_start=4)
    assert expected[0, 1, 1].isfinite().all()
    torch.testing.assert_close(cache.attend(query)[0, 1, 1], expected[0, 1, 1])


@pytest.mark.skipif(USES_KERNELS, reason="it is of no kernel")
def test_a_bounded_cache_stays_as_small() -> None:
    pattern = patterndsl.parse("causal & (recent(100) | first(4))")
    sizes = []
    for length in (1_000, 100_000):
        cache = Cache(pattern, batch=1, heads=1, head_dim=4)
        cache.append(torch.ones(1, 1, length, 4), torch.ones(1, 1, length, 4))
        assert cache.kind == "bounded"
        sizes.append(cache.nbytes)
    slots = 2 * 64 + 64  # pages of the ring, and one for the sinks
    assert sizes == [slots * 2 * 4 * 4 + 4 * 4 + 4 * 4] * 2  # and the table of pages, and which keys last


@pytest.mark.skipif(USES_KERNELS, reason="it is of no kernel")
def test_key_heads_hold_what_their_own_query_heads_need() -> None:
    tensors = random_tensors(torch.float64)
    cache = assert_decodes(patterndsl.parse("head < 2 & recent(9) | head >= 2 & causal"), tensors, one_by_one(100))
    alone = assert_decodes(patterndsl.parse("causal"), tensors, one_by_one(100))
    assert cache.kind == "growing"
    assert cache.nbytes < 0.7 * alone.nbytes


def causal(pattern: Pattern) -> Pattern:
    """The pattern without what looks ahead."""
    limit = patterndsl.parse("k <= q").spec.attend
    return Pattern.of(replace(pattern.spec, attend=Logic("&", (limit, pattern.spec.attend), place=limit.place)))


@pytest.mark.skipif(HAS_CUDA or IS_INTERPRETED, reason="it is about plain operations")
@many(0.2)
@given(data=st.data(), case=cases(max_length=60))
def test_random_patterns(data: st.DataObject, case: Case) -> None:
    """What is decodable is decoded right, with and without a length; what is not says so."""
    pattern, n = causal(case.pattern()), case.lengths.total
    kv_heads = data.draw(st.sampled_from([at for at in range(1, case.heads + 1) if case.heads % at == 0]))
    tensors = random_tensors(torch.float64, heads=case.heads, kv_heads=kv_heads, dim=3, value_dim=2, n=n)
    max_queries = data.draw(st.integers(1, 3))
    schedule, left = list[list[int]](), [n, n]
    while len(schedule) < 8 and any(left):
        counts = [data.draw(st.sampled_from(sorted({0, min(1, most), most // 3, most}))) for most in left]
        schedule.append(counts)
        left = [most - count for most, count in zip(left, counts, strict=True)]
    options: Any = {"layer": case.layer, "n": data.draw(st.sampled_from([n, None])), "max_queries": max_queries}
    try:
        read = {shape.name for shape in pattern.bind(n, heads=case.heads, layer=case.layer).inputs}
        Cache(pattern, batch=2, heads=case.heads, head_dim=3, **options)
    except PatternError:
        reject()
    given = {name: torch.tensor((case.inputs[name] * n)[:n]) for name in read}
    inputs = {name: torch.stack([values, values.flip(0)]) for name, values in given.items()}
    assert_decodes(pattern, tensors, schedule, inputs, **options)


@on_device
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-42])
def test_every_scale(scale: float) -> None:
    pattern = patterndsl.parse(PATTERNS["band and stride"])
    assert_decodes(pattern, random_tensors(DTYPES[-1]), [[N, 3]], scale=scale)


@compiles
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert_passes_in_the_interpreter(__file__)
