"""Does every published pattern have the number of pairs that its paper's geometry gives? Counts of enumerated sets.

One head, one layer. Where paper and released code differ, both are here, under names that say which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl.analysis.formula import Formula

EXAMPLES = Path(__file__).parents[2] / "examples"


@dataclass(frozen=True)
class Count:
    """`pattern` is an expression or the file name of an example; `sizes` are n, or q_len and so on, and layer."""

    label: str
    pattern: str
    pairs: int
    sizes: Mapping[str, Any]
    params: Mapping[str, int] = field(default_factory=dict)
    grid: Mapping[str, int | str] | None = None


def count(label: str, pattern: str, pairs: int, n: int | None = None, **params: int) -> Count:
    return Count(label, pattern, pairs, {"n": n} if n is not None else {}, params)


def program_of(row: Count) -> patterndsl.Program:
    if row.pattern.endswith(".yaml"):
        pattern = patterndsl.load(EXAMPLES / row.pattern).with_params(**row.params)
    else:
        pattern = patterndsl.parse(row.pattern, params=row.params, grid=row.grid)
    return pattern.compile(**row.sizes)


SIX_BY_EIGHT = {"row": 6, "col": 8}
PADDED_IN_FRONT = "k * f <= q + 1 + ceildiv(Nq, f) * f - Nq"

GOLDEN = [
    # Liu et al. 2018: the local layers
    count("block-causal-N64-b16", "blockwise.yaml", 544, 64, b=16),
    count("block-causal-N70-b16", "blockwise.yaml", 565, 70, b=16),
    count("block-full-N64-b16", "block(b)", 1024, 64, b=16),
    count("block-full-N70-b16", "block(b)", 1060, 70, b=16),
    # its compressed layers: the first token (or a null key), then a summary of every f tokens that are over; the ragged
    # last tokens are dropped, or there is padding in front
    Count("compressed-N64-f3", "k * f <= q", 715, {"n": 64, "kv_len": 22}, {"f": 3}),
    Count("compressed-N100-f4", "k * f <= q", 1300, {"n": 100, "kv_len": 26}, {"f": 4}),
    Count("compressed-N13-f3", "k * f <= q", 35, {"n": 13, "kv_len": 5}, {"f": 3}),
    Count("compressed-null-N64-f3", PADDED_IN_FRONT, 779, {"n": 64, "kv_len": 23}, {"f": 3}),
    Count("compressed-null-N13-f3", PADDED_IN_FRONT, 48, {"n": 13, "kv_len": 6}, {"f": 3}),
    Count("compressed-null-N12-f3", PADDED_IN_FRONT, 34, {"n": 12, "kv_len": 5}, {"f": 3}),
    # Parmar et al. 2018
    count("image1d-N64-lq16-lm16", "image-transformer-1d.yaml", 1312, 64, lq=16, lm=16),
    count("image1d-N70-lq16-lm16", "image-transformer-1d.yaml", 1429, 70, lq=16, lm=16),
    count("image1d-N16-lq16-lm16", "image-transformer-1d.yaml", 136, 16, lq=16, lm=16),
    count("image1d-N70-lq16-lm8", "image-transformer-1d.yaml", 997, 70, lq=16, lm=8),
    count("image1d-N70-lq16-lm40", "image-transformer-1d.yaml", 2213, 70, lq=16, lm=40),
    count("image2d-12x16-tile4x4-flange2,2", "image-transformer-2d.yaml", 4576, 192, th=4, tw=4, across=4, fh=2, fw=2),
    # Child et al. 2019
    count("sparse-local-code-N64-l8", "causal & recent(l)", 484, 64, l=8),
    count("sparse-local-paper-N64-l8", "causal & recent(l + 1)", 540, 64, l=8),
    count("sparse-strided-second-N64-l8", "causal & strided(l)", 288, 64, l=8),
    count("sparse-strided-second-N70-l8", "causal & strided(l)", 342, 70, l=8),
    count("sparse-strided-merged-N64-l8", "sparse-transformer-strided.yaml", 708, 64, l=8),
    count("sparse-strided-merged-N70-l8", "sparse-transformer-strided.yaml", 804, 70, l=8),
    count("sparse-fixed-second-N64-l8-c2", "causal & columns(l, c)", 472, 64, l=8, c=2),
    count("sparse-fixed-second-N64-l16-c4", "causal & columns(l, c)", 424, 64, l=16, c=4),
    count("sparse-fixed-merged-N64-l8-c2", "sparse-transformer-fixed.yaml", 736, 64, l=8, c=2),
    count("sparse-fixed-merged-N64-l16-c4", "sparse-transformer-fixed.yaml", 928, 64, l=16, c=4),
    # its parts in turns, by layer, and by head for two heads
    Count(
        "sparse-strided-layer0-code-N64-l8",
        "sparse-transformer-strided-by-layer.yaml",
        484,
        {"n": 64, "layer": 0},
        {"l": 8, "w": 8},
    ),
    Count(
        "sparse-strided-layer0-paper-N64-l8",
        "sparse-transformer-strided-by-layer.yaml",
        540,
        {"n": 64, "layer": 0},
        {"l": 8, "w": 9},
    ),
    Count(
        "sparse-strided-layer1-N64-l8",
        "sparse-transformer-strided-by-layer.yaml",
        288,
        {"n": 64, "layer": 1},
        {"l": 8, "w": 8},
    ),
    Count(
        "sparse-strided-layer1-N70-l8",
        "sparse-transformer-strided-by-layer.yaml",
        342,
        {"n": 70, "layer": 1},
        {"l": 8, "w": 8},
    ),
    Count(
        "sparse-fixed-layer0-N64-l8",
        "sparse-transformer-fixed-by-layer.yaml",
        288,
        {"n": 64, "layer": 0},
        {"l": 8, "c": 2},
    ),
    Count(
        "sparse-fixed-layer0-N64-l16",
        "sparse-transformer-fixed-by-layer.yaml",
        544,
        {"n": 64, "layer": 0},
        {"l": 16, "c": 4},
    ),
    Count(
        "sparse-fixed-layer1-N64-l8-c2",
        "sparse-transformer-fixed-by-layer.yaml",
        472,
        {"n": 64, "layer": 1},
        {"l": 8, "c": 2},
    ),
    Count(
        "sparse-fixed-layer1-N64-l16-c4",
        "sparse-transformer-fixed-by-layer.yaml",
        424,
        {"n": 64, "layer": 1},
        {"l": 16, "c": 4},
    ),
    Count(
        "sparse-strided-heads-code-N64-l8",
        "sparse-transformer-strided-by-head.yaml",
        484 + 288,
        {"n": 64, "heads": 2},
        {"l": 8, "w": 8},
    ),
    Count(
        "sparse-strided-heads-paper-N64-l8",
        "sparse-transformer-strided-by-head.yaml",
        540 + 288,
        {"n": 64, "heads": 2},
        {"l": 8, "w": 9},
    ),
    Count(
        "sparse-fixed-heads-N64-l8-c2",
        "sparse-transformer-fixed-by-head.yaml",
        288 + 472,
        {"n": 64, "heads": 2},
        {"l": 8, "c": 2},
    ),
    Count(
        "sparse-fixed-heads-N64-l16-c4",
        "sparse-transformer-fixed-by-head.yaml",
        544 + 424,
        {"n": 64, "heads": 2},
        {"l": 16, "c": 4},
    ),
    # Ho et al. 2019; the layers of the paper, and their union
    Count("axial-6x8-row", "same(row)", 384, {"n": 48}, grid=SIX_BY_EIGHT),
    Count("axial-6x8-col", "same(col)", 288, {"n": 48}, grid=SIX_BY_EIGHT),
    Count("axial-6x8-row-masked", "same(row) & causal", 216, {"n": 48}, grid=SIX_BY_EIGHT),
    Count("axial-6x8-col-masked", "same(col) & causal", 168, {"n": 48}, grid=SIX_BY_EIGHT),
    Count("axial-6x8-row-by-along", "along(col)", 384, {"n": 48}, grid=SIX_BY_EIGHT),
    count("axial-6x8-union", "axial.yaml", 624, 48, cols=8),
    # Beltagy et al. 2020; dilation counted in steps
    count("sliding-N64-w4", "window(w)", 556, 64, w=4),
    count("sliding-N64-w4-step3", "dilated(w, 3)", 516, 64, w=4),
    count("sliding-causal-N64-w4", "causal & window(w)", 310, 64, w=4),
    count("sliding-causal-N64-w4-step3", "causal & dilated(w, 3)", 290, 64, w=4),
    count("longformer-N64-w4-g2", "longformer.yaml", 790, 64, w=4, g=2),
    count("longformer-N64-w4-g8", "longformer.yaml", 1444, 64, w=4, g=8),
    # Ainslie et al. 2020: 6 global and 40 long tokens
    count("etc-g6-long40-r5", "etc.yaml", 926, 46, g=6, r=5),
    # Zaheer et al. 2020: clipped window, first and last block global, distinct random blocks
    count("bigbird-16x4-r3", "bigbird.yaml", 2272, 64, b=4, r=3),
    count("bigbird-8x16-r3", "bigbird.yaml", 15872, 128, b=16, r=3),
    count("bigbird-64x64-r3", "bigbird.yaml", 2547712, 4096, b=64, r=3),
    # Dai et al. 2019: a segment of 16 behind a memory of 24
    Count("txl-16-memory24", "causal", 520, {"q_len": 16, "kv_len": 40, "q_start": 24}),
    Count("txl-16-memory24-same-length", "recent(24)", 384, {"q_len": 16, "kv_len": 40, "q_start": 24}),
    # Rae et al. 2019: a segment of 16 behind 24 states and 8 compressed ones
    Count("compressive-16-memory24-compressed8", "causal", 648, {"q_len": 16, "kv_len": 48, "q_start": 32}),
    # Jiang et al. 2023, and the window that FlashAttention calls (16, 0)
    count("mistral-N64-w16", "mistral.yaml", 904, 64, w=16),
    count("flash-window-N64-16,0", "window(16, 0)", 952, 64),
    # Xiao et al. 2023
    count("sinks-N64-s4-w16", "streaming-sinks.yaml", 1090, 64, s=4, w=16),
    # Ding et al. 2023: each branch by itself
    count("longnet-N64-w16-step1", "causal & block(w)", 544, 64, w=16),
    count("longnet-N64-w32-step2", "causal & block(w) & q % r == 0 & k % r == 0", 272, 64, w=32, r=2),
    count("longnet-N64-w64-step4", "causal & block(w) & q % r == 0 & k % r == 0", 136, 64, w=64, r=4),
    # Hassani et al. 2022, one axis: clamped; causal clipped
    count("natten-N64-k7", "0 <= k - clamp(q - w // 2, 0, N - w) < w", 448, 64, w=7),
    count("natten-N64-k7-as-one-column", "neighborhood-2d.yaml", 448, 64, kernel=7, cols=1),
    count("natten-causal-N64-k7", "recent(7)", 427, 64),
    # Liu et al. 2021
    count("swin-8x8-m4", "swin.yaml", 1024, 64, m=4, cols=8),
    Count("swin-8x8-m4-shifted", "swin.yaml", 576, {"n": 64, "layer": 1}, {"m": 4, "cols": 8}),
    # the shifted mask of a 16 x 16 map, as enumerated from the released code's roll and mask
    Count("swin-16x16-m4-shifted", "swin.yaml", 3136, {"n": 256, "layer": 1}, {"m": 4, "cols": 16}),
    # Yuan et al. 2025 (NSA): compressed blocks of 32 every 16, visible once their last token is past
    Count("nsa-compressed-N256-l32-d16", "k * 16 + 31 <= q", 1695, {"n": 256, "kv_len": 15}),
    # Lu et al. 2025 (MoBA), top 3 blocks with the own one; DeepSeek 2025, top 10 keys. The only counts of patterns that
    # are not static: which keys these are is up to the data, how many is not, so that draws stand in for the choice
    count("moba-N64-b8-top3", "causal & block(b) | blocks(b, random(2, avoid = k >= q))", 1120, 64, b=8),
    count("topk-causal-N64-k10", "random(top, avoid = ~causal)", 595, 64, top=10),
]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row.label)
def test_pairs(row):
    assert program_of(row).mask().sum() == row.pairs


SELF_ATTENTION = [
    row
    for row in GOLDEN
    if row.sizes.keys() <= {"n", "layer"} and row.pattern != "bigbird.yaml" and "random" not in row.pattern
]


@pytest.mark.parametrize("row", SELF_ATTENTION, ids=lambda row: row.label)
def test_the_formula_gives_the_same(row):
    """In N and all parameters at once; draws and other lengths of the keys are below."""
    if row.pattern.endswith(".yaml"):
        pattern = patterndsl.load(EXAMPLES / row.pattern)
    else:
        pattern = patterndsl.parse(row.pattern, params=row.params, grid=row.grid)
    (group,) = pattern.report(layer=row.sizes.get("layer", 0)).groups
    assert isinstance(group.formula, Formula), group.formula
    assert group.formula.at({"N": row.sizes["n"], **row.params}) == row.pairs


BY_HEAD = [row for row in GOLDEN if row.sizes.keys() == {"n", "heads"}]


@pytest.mark.parametrize("row", BY_HEAD, ids=lambda row: row.label)
def test_the_formulas_of_heads_give_the_same_together(row):
    first, second = patterndsl.load(EXAMPLES / row.pattern).report(heads=2).groups
    assert isinstance(first.formula, Formula), first.formula
    assert isinstance(second.formula, Formula), second.formula
    at = {"N": row.sizes["n"], **row.params}
    pairs = [first.formula.at(at), second.formula.at(at)]
    assert None not in pairs
    assert sum(filter(None, pairs)) == row.pairs


def in_one_sequence(label: str, pattern: str, pairs: int, n: int, **params: int) -> Count:
    return Count(label, pattern, pairs, {"n": n}, params)


IN_ONE_SEQUENCE = [
    # as many keys as there are summaries are keys of the sequence; the null key is attended by every query besides
    in_one_sequence("compressed-N64-f3", "k * f <= q", 715, 64, f=3),
    in_one_sequence("compressed-N100-f4", "k * f <= q", 1300, 100, f=4),
    in_one_sequence("compressed-N13-f3", "k * f <= q", 35, 13, f=3),
    in_one_sequence("compressed-null-N64-f3", "(k + 1) * f <= q + 1 + ceildiv(N, f) * f - N", 779 - 64, 64, f=3),
    in_one_sequence("compressed-null-N13-f3", "(k + 1) * f <= q + 1 + ceildiv(N, f) * f - N", 48 - 13, 13, f=3),
    in_one_sequence("compressed-null-N12-f3", "(k + 1) * f <= q + 1 + ceildiv(N, f) * f - N", 34 - 12, 12, f=3),
    in_one_sequence("nsa-compressed-N256-l32-d16", "k * d + l <= q + 1", 1695, 256, l=32, d=16),
    # a segment's queries are the last ones of a sequence that begins with the memory
    in_one_sequence("txl-16-memory24", "causal & q >= memory", 520, 40, memory=24),
    in_one_sequence("txl-16-memory24-same-length", "recent(memory) & q >= memory", 384, 40, memory=24),
    in_one_sequence("compressive-16-memory24-compressed8", "causal & q >= memory", 648, 48, memory=32),
    # the nearest blocks and keys, which are as many as the best ones
    in_one_sequence("moba-N64-b8-top3", "causal & q // b - k // b < top", 1120, 64, b=8, top=3),
    in_one_sequence("topk-causal-N64-k10", "recent(top)", 595, 64, top=10),
]


@pytest.mark.parametrize("row", IN_ONE_SEQUENCE, ids=lambda row: row.label)
def test_the_formula_of_one_sequence(row):
    """Formulas are of self-attention: what has other keys is said of one sequence with as many pairs."""
    lines = [f"  {name}: {{default: {value}, min: 1}}" for name, value in row.params.items()]
    pattern = patterndsl.parse("\n".join(["params:", *lines, f"attend: {row.pattern}"]))
    (group,) = pattern.report().groups
    assert isinstance(group.formula, Formula), group.formula
    assert group.formula.at({"N": row.sizes["n"], **row.params}) == row.pairs
    assert pattern.compile(n=row.sizes["n"]).mask().sum() == row.pairs


@pytest.mark.parametrize("row", [row for row in GOLDEN if row.pattern == "bigbird.yaml"], ids=lambda row: row.label)
def test_bigbird_by_formula(row):
    """Exactly without draws, and r whole blocks more for each row of blocks between the first and the last."""
    pattern = patterndsl.parse("blocks(b, window(1) | q in {0, N - 1} | k in {0, N - 1})", params={"b": 4})
    (group,) = pattern.report().groups
    b, r, n = row.params["b"], row.params["r"], row.sizes["n"]
    assert isinstance(group.formula, Formula), group.formula
    assert group.formula.at({"N": n, "b": b}) == row.pairs - b * b * r * (n // b - 2)
    (bounded,) = patterndsl.load(EXAMPLES / row.pattern).report().groups
    assert bounded.upper is not None
    assert bounded.upper.at({"N": n, "b": b, "r": r, "w": 1, "seed": 0}) >= row.pairs


def test_image2d_interior_tile(tmp_path):
    """A tile that has all of its flange: 16 queries, 2 x 8 keys above, 4 x 2 beside, and its own triangle."""
    sizes = {"th": 4, "tw": 4, "across": 4, "fh": 2, "fw": 2}
    pattern = patterndsl.load(EXAMPLES / "image-transformer-2d.yaml").with_params(**sizes)
    tile = torch.arange(5 * 16, 6 * 16)  # second row of tiles, second tile
    assert pattern.compile(n=192).rows(tile).sum() == 520
    given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    spec = tmp_path / "tile.yaml"
    spec.write_text(
        f"import: {{image: {EXAMPLES / 'image-transformer-2d.yaml'}}}\nattend: image({given}) & q // 16 == 5\n"
    )
    (group,) = patterndsl.load(spec).report().groups
    assert isinstance(group.formula, Formula), group.formula
    assert group.formula.at({"N": 192}) == 520


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16, 17, 63, 64, 65, 127])
def test_closed_forms_hold_at_any_length(n):
    """The formulas behind the figures, where they are simple enough to be written down."""

    def pairs(name: str, layer: int = 0, **params: int) -> int:
        pattern = patterndsl.load(EXAMPLES / f"{name}.yaml").with_params(**params)
        return int(pattern.compile(n=n, layer=layer).mask().sum())

    whole, rest = divmod(n, 16)
    assert pairs("blockwise", b=16) == whole * 136 + rest * (rest + 1) // 2
    assert pairs("sparse-transformer-strided", l=16) == sum(min(16, q + 1) + q // 16 for q in range(n))
    band = [min(w, n) * n - min(w, n) * (min(w, n) - 1) // 2 for w in (16, 17)]
    stride = n + 16 * whole * (whole - 1) // 2 + whole * rest
    blocks = whole * 136 + rest * (rest + 1) // 2
    ends = sum(min(3, max(0, q + 1 - end)) for q in range(n) for end in range(13, n, 16))
    for layer, counts in ((0, (*band, blocks)), (1, (stride, stride, ends))):
        assert pairs("sparse-transformer-strided-by-layer", layer, l=16, w=16) == counts[0]
        assert pairs("sparse-transformer-strided-by-layer", layer, l=16, w=17) == counts[1]
        assert pairs("sparse-transformer-fixed-by-layer", layer, l=16, c=3) == counts[2]
    w = min(5, n)
    assert pairs("mistral", w=5) == n * w - w * (w - 1) // 2
    full = min(n, 3 + 5)
    assert pairs("streaming-sinks", s=3, w=5) == full * (full + 1) // 2 + (n - full) * (3 + 5)
    assert pairs("longformer", w=3, g=0) == sum(min(n, q + 4) - max(0, q - 3) for q in range(n))
    prefix = min(n, 10)
    assert pairs("prefix-lm", prefix=10) == prefix * prefix + sum(range(prefix + 1, n + 1))
