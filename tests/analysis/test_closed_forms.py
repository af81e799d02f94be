"""Are the formulas those of the literature? Closed forms written by hand, at random lengths and parameters.

The texts that a user reads are evaluated too: of the conditions exactly one holds, and its formula has the same value.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from math import floor
from pathlib import Path
from types import CodeType
from typing import TypeAlias

import pytest

import patterndsl
from patterndsl.analysis.formula import Formula

EXAMPLES = Path(__file__).parents[2] / "examples"
POINTS = 60

Values: TypeAlias = Mapping[str, int]
Draw: TypeAlias = Callable[[random.Random], Values]


@dataclass(frozen=True)
class Closed:
    """`pattern` is an attend expression, or the file name of an example. minimums: the parameters of an expression.
    pairs: the closed form. values: draws its arguments where it holds, N and the parameters in this order."""

    label: str
    pattern: str
    pairs: Callable[..., int | Fraction]
    values: Draw
    minimums: Values | None = None
    grid: Mapping[str, str] | None = None
    layer: int = 0


@cache
def formula_of(label: str) -> Formula:
    row = next(row for row in CLOSED if row.label == label)
    (group,) = pattern_of(row).report(layer=row.layer).groups
    assert isinstance(group.formula, Formula), group.formula
    return group.formula


def pattern_of(row: Closed) -> patterndsl.Pattern:
    if row.pattern.endswith(".yaml"):
        return patterndsl.load(EXAMPLES / row.pattern)
    lines = [f"  {name}: {{default: {max(least, 4)}, min: {least}}}" for name, least in (row.minimums or {}).items()]
    params = "params:\n" + "\n".join(lines) + "\n" if lines else ""
    axes = "grid:\n" + "\n".join(f"  {name}: {size}" for name, size in row.grid.items()) + "\n" if row.grid else ""
    return patterndsl.parse(f'{params}{axes}attend: "{row.pattern}"\n')


def value_of(text: str, values: Values) -> Fraction | bool:
    """A formula or a condition as it is shown, read as mathematics."""
    names = {name: Fraction(value) for name, value in values.items()}
    return eval(read(text), {"Fraction": Fraction, "floor": floor, "always": True, "never": False}, names)


@cache
def read(text: str) -> CodeType:
    for shown, meant in (("·", "*"), ("⌊", "floor("), ("⌋", ")"), ("≥", ">="), ("≤", "<="), (" = ", " == ")):
        text = text.replace(shown, meant)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"**{found[0].translate(SUPERSCRIPTS)}", text)
    return compile(re.sub(r"\b\d+\b", r"Fraction(\g<0>)", text), "formula", "eval")


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def triangle(n: int) -> int:
    return n * (n + 1) // 2


# ---- closed forms -----------------------------------------------------------------------------------------------


def strided(N: int, stride: int) -> int:
    """Every stride-th token before, and the token itself."""
    whole, rest = divmod(N, stride)
    return N + stride * triangle(whole - 1) + whole * rest


def fixed_columns(N: int, size: int, c: int) -> int:
    whole, rest = divmod(N, size)
    ragged = triangle(max(0, rest - (size - c)))
    return c * size * triangle(whole - 1) + whole * triangle(c) + rest * whole * c + ragged


def fixed(N: int, size: int, c: int) -> int:
    whole, rest = divmod(N, size)
    return whole * triangle(size) + c * size * triangle(whole - 1) + triangle(rest) + rest * whole * c


def image_1d(N: int, lq: int, lm: int) -> int:
    sizes = [min(lq, N - start) for start in range(0, N, lq)]
    return sum(triangle(size) + size * min(lm, block * lq) for block, size in enumerate(sizes))


def image_2d(N: int, th: int, tw: int, across: int, fh: int, fw: int) -> int:
    size, found = th * tw, 0
    for down in range(N // (size * across)):
        for tile in range(across):
            left, right = min(fw, tile * tw), min(fw, (across - 1 - tile) * tw)
            found += triangle(size) + size * (min(fh, down * th) * (left + tw + right) + th * left)
    return found


def compressed(N: int, f: int) -> int:
    """The first token, and one summary for every f tokens that are over."""
    whole, rest = divmod(N, f)
    return N + f * triangle(whole - 1) + whole * rest


def compressed_with_null(N: int, f: int) -> int:
    """A null key, and one summary for every f tokens, padded at the front, the last of them just attended."""
    blocks = -(-N // f)
    return N + blocks + f * triangle(blocks - 1)


def overlapping_blocks(N: int, length: int, step: int) -> int:
    """Compressed blocks of `length` every `step`, each visible once its last token is past."""
    whole, rest = divmod(max(0, N - length + 1), step)
    return step * triangle(whole) + rest * (whole + 1)


def shifted_windows(N: int, m: int, cols: int) -> int:
    """Squares of m cut at half their size: a short window at both ends of each axis."""
    half = m // 2
    rows_kept, cols_kept = ((size // m - 1) * m * m + half**2 + (m - half) ** 2 for size in (N // cols, cols))
    return rows_kept * cols_kept


def longnet(N: int, w: int) -> Fraction:
    """Per 4 w tokens: the three branches, less what the second has of the first, and the third of the second."""
    half = triangle(w // 2)
    return Fraction(N, 4 * w) * (4 * triangle(w) + 2 * triangle(w) - 4 * half + triangle(w) - 2 * half)


def blocks_back(N: int, b: int, t: int) -> int:
    """Own block up to the token at hand, and t - 1 blocks before it: as many as routed attention picks."""
    blocks, before = N // b, t - 1
    return blocks * triangle(b) + b * b * (blocks * before - triangle(before))


# ---- where they hold --------------------------------------------------------------------------------------------


def drawn(least_n: Callable[..., int] | None = None, **ranges: tuple[int, int]) -> Draw:
    """Parameters within ranges, and a length from the least one of these parameters, also just that one."""

    def draw(dice: random.Random) -> Values:
        params = {name: dice.randint(*bounds) for name, bounds in ranges.items()}
        least = least_n(*params.values()) if least_n else 1
        return {"N": max(1, least + dice.choice((0, 1, 2, dice.randint(3, 3000)))), **params}

    return draw


def times(of: Callable[..., int], least: int = 1, most: int = 40, **ranges: tuple[int, int]) -> Draw:
    """Parameters within ranges, and a multiple of a number that they make."""

    def draw(dice: random.Random) -> Values:
        params = {name: dice.randint(*bounds) for name, bounds in ranges.items()}
        return {"N": of(*params.values()) * dice.randint(least, most), **params}

    return draw


def summary_columns(dice: random.Random) -> Values:
    size = dice.randint(1, 40)
    return {"N": dice.randint(1, 3000), "l": size, "c": dice.randint(0, size)}


def segments(dice: random.Random) -> Values:
    r, kept = dice.randint(1, 8), dice.randint(1, 20)
    return {"N": r * kept * dice.randint(1, 40), "w": r * kept, "r": r}


def squares(dice: random.Random) -> Values:
    m, down, right = dice.randint(1, 9), dice.randint(1, 8), dice.randint(1, 8)
    return {"N": m * down * m * right * m, "m": m, "cols": m * right * m}


def neighbourhoods(dice: random.Random) -> Values:
    kernel = dice.randint(1, 9)
    cols = kernel + dice.randint(0, 20)
    return {"N": cols * (kernel + dice.randint(0, 20)), "kernel": kernel, "cols": cols}


def routed(dice: random.Random) -> Values:
    b, blocks = dice.randint(1, 20), dice.randint(1, 30)
    return {"N": b * blocks, "b": b, "t": dice.randint(1, blocks)}


W = {"w": 0}
GRID = {"row": "N // W", "col": "W"}
IMAGE = times(lambda W: W, W=(1, 50))
ANY = (0, 60)
SOME = (1, 60)

CLOSED = [
    # Longformer: sliding, dilated, causal, with a prefix of global tokens
    Closed("sliding", "window(w)", lambda N, w: N * (2 * w + 1) - w * (w + 1), drawn(lambda w: w, w=ANY), W),
    Closed(
        "sliding-causal",
        "causal & window(w)",
        lambda N, w: N * (w + 1) - triangle(w),
        drawn(lambda w: w, w=ANY),
        W,
    ),
    Closed(
        "dilated",
        "dilated(w, d)",
        lambda N, w, d: N * (2 * w + 1) - d * w * (w + 1),
        drawn(lambda w, d: w * d, w=ANY, d=(1, 9)),
        {"w": 0, "d": 1},
    ),
    Closed(
        "dilated-causal",
        "causal & dilated(w, d)",
        lambda N, w, d: N * (w + 1) - d * triangle(w),
        drawn(lambda w, d: w * d, w=ANY, d=(1, 9)),
        {"w": 0, "d": 1},
    ),
    Closed(
        "longformer",
        "longformer.yaml",
        lambda N, w, g: 2 * g * N - g * g + (N - g) * (2 * w + 1) - w * (w + 1),
        drawn(lambda w, g: w + g, w=ANY, g=ANY),
    ),
    # ETC: g global and n long tokens
    Closed(
        "etc",
        "etc.yaml",
        lambda N, g, r: g * g + 2 * g * (N - g) + (N - g) * (2 * r + 1) - r * (r + 1),
        drawn(lambda g, r: g + r, g=ANY, r=ANY),
    ),
    # Sparse Transformer
    Closed(
        "sparse-local",
        "causal & recent(l)",
        lambda N, size: N * size - triangle(size - 1),
        drawn(lambda size: size, l=SOME),
        {"l": 1},
    ),
    Closed(
        "sparse-local-of-the-paper",
        "causal & recent(l + 1)",
        lambda N, size: N * (size + 1) - triangle(size),
        drawn(lambda size: size, l=SOME),
        {"l": 1},
    ),
    Closed("sparse-strided-second", "causal & strided(l)", strided, drawn(l=SOME), {"l": 1}),
    Closed(
        "sparse-strided-merged",
        "sparse-transformer-strided.yaml",
        lambda N, stride: N * stride - triangle(stride - 1) + strided(N, stride) - N,
        drawn(lambda size: size, l=SOME),
    ),
    Closed("sparse-fixed-second", "causal & columns(l, c)", fixed_columns, summary_columns, {"l": 1, "c": 0}),
    Closed("sparse-fixed-merged", "sparse-transformer-fixed.yaml", fixed, summary_columns),
    # Axial Transformer, W columns
    Closed("axial", "axial.yaml", lambda N, cols: N * (cols + N // cols - 1), times(lambda cols: cols, cols=(1, 50))),
    Closed("axial-row", "same(row)", lambda N, W: N * W, IMAGE, {"W": 1}, GRID),
    Closed("axial-column", "same(col)", lambda N, W: N * (N // W), IMAGE, {"W": 1}, GRID),
    Closed("axial-row-masked", "same(row) & causal", lambda N, W: N * (W + 1) // 2, IMAGE, {"W": 1}, GRID),
    Closed("axial-column-masked", "same(col) & causal", lambda N, W: N * (N // W + 1) // 2, IMAGE, {"W": 1}, GRID),
    # BigBird without its random blocks
    Closed(
        "bigbird",
        "blocks(b, window(1) | q in {0, N - 1} | k in {0, N - 1})",
        lambda N, b: b * b * (7 * (N // b) - 12),
        times(lambda b: b, least=4, b=(1, 64)),
        {"b": 1},
    ),
    # Image Transformer
    Closed("image-1d", "image-transformer-1d.yaml", image_1d, drawn(lq=SOME, lm=(0, 200))),
    Closed(
        "image-2d",
        "image-transformer-2d.yaml",
        image_2d,
        times(lambda th, tw, across, *_: th * tw * across, th=(1, 6), tw=(1, 6), across=(1, 6), fh=(0, 20), fw=(0, 20)),
    ),
    # Memory Compressed Transformer, its local layers; and blocks of which each looks at t
    Closed(
        "blockwise",
        "blockwise.yaml",
        lambda N, b: N // b * triangle(b) + triangle(N % b),
        drawn(b=SOME),
    ),
    Closed("blocks", "block(b)", lambda N, b: N // b * b * b + (N % b) ** 2, drawn(b=SOME), {"b": 1}),
    Closed("blocks-back", "causal & q // b - k // b < t", blocks_back, routed, {"b": 1, "t": 1}),
    # its compressed layers: of the keys that a shorter sequence has, each summary as its number
    Closed("compressed", "k * f <= q", compressed, drawn(f=SOME), {"f": 1}),
    Closed(
        "compressed-with-null",
        "(k + 1) * f <= q + 1 + ceildiv(N, f) * f - N",
        lambda N, f: compressed_with_null(N, f) - N,
        drawn(f=SOME),
        {"f": 1},
    ),
    # Native Sparse Attention: blocks of `length` every `step`
    Closed("overlapping-blocks", "k * d + l <= q + 1", overlapping_blocks, drawn(l=SOME, d=SOME), {"l": 1, "d": 1}),
    # the segment behind a memory, of Transformer-XL and the Compressive Transformer, as the rows of one sequence
    Closed(
        "segment",
        "causal & q >= m",
        lambda N, m: (N - m) * m + triangle(N - m),
        drawn(lambda m: m, m=ANY),
        {"m": 0},
    ),
    Closed("segment-same-length", "recent(m) & q >= m", lambda N, m: (N - m) * m, drawn(lambda m: m, m=ANY), {"m": 0}),
    # sliding windows and sinks of decoders
    Closed("mistral", "mistral.yaml", lambda N, w: N * w - triangle(w - 1), drawn(lambda w: w - 1, w=SOME)),
    Closed("flash-window", "window(w, 0)", lambda N, w: N * (w + 1) - triangle(w), drawn(lambda w: w, w=ANY), W),
    Closed(
        "sinks",
        "streaming-sinks.yaml",
        lambda N, s, w: triangle(min(N, s + w)) + (N - min(N, s + w)) * (s + w),
        drawn(s=ANY, w=SOME),
    ),
    Closed(
        "prefix-lm",
        "prefix-lm.yaml",
        lambda N, prefix: prefix * prefix + triangle(N) - triangle(prefix),
        drawn(lambda prefix: prefix, prefix=ANY),
    ),
    Closed("gemma-global-layer", "gemma.yaml", lambda N, w, period: triangle(N), drawn(w=SOME, period=(6, 6)), layer=5),
    # LongNet: one branch, and the union of three
    Closed(
        "longnet-branch",
        "causal & block(w) & q % r == 0 & k % r == 0",
        lambda N, w, r: N // w * triangle(w // r),
        segments,
        {"w": 1, "r": 1},
    ),
    Closed(
        "longnet",
        "longnet.yaml",
        longnet,
        lambda dice: {"N": 4 * (w := 4 * dice.randint(1, 9)) * dice.randint(1, 40), "w": w},
    ),
    # Neighborhood attention on one axis and on two; Swin, unshifted and shifted
    Closed(
        "neighborhood",
        "0 <= k - clamp(q - w // 2, 0, N - w) < w",
        lambda N, w: N * w,
        drawn(lambda w: w, w=SOME),
        {"w": 1},
    ),
    Closed("neighborhood-2d", "neighborhood-2d.yaml", lambda N, kernel, cols: N * kernel * kernel, neighbourhoods),
    Closed("swin", "swin.yaml", lambda N, m, cols: N * m * m, squares),
    Closed("swin-shifted", "swin.yaml", shifted_windows, squares, layer=1),
]


@pytest.mark.parametrize("row", CLOSED, ids=lambda row: row.label)
def test_the_formula_is_the_closed_form(row):
    dice = random.Random(row.label)
    formula = formula_of(row.label)
    conditions = [formula.condition(cell) for cell in formula.cells]
    text_of = cache(lambda at: formula.text(formula.cells[at]))
    for _ in range(POINTS):
        values = row.values(dice)
        expected = row.pairs(*values.values())
        assert formula.at(values) == expected, values
        assert all(value_of(text, values) for text in formula.assumes), values
        held = [at for at, condition in enumerate(conditions) if value_of(condition, values)]
        assert [value_of(text_of(at), values) for at in held] == [expected], (values, conditions)


STATED = [
    ("sliding", "N > w", lambda q, k, w: abs(q - k) <= w, lambda w: w),
    ("longformer", "N > g + w", lambda q, k, w, g: abs(q - k) <= w or q < g or k < g, lambda w, g: w + g),
    ("etc", "N ≥ g + r and N > g", lambda q, k, g, r: abs(q - k) <= r or q < g or k < g, lambda g, r: g + r),
    ("mistral", "N + 1 ≥ w", lambda q, k, w: 0 <= q - k < w, lambda w: w - 1),
    ("segment", "N > m", lambda q, k, m: m <= q >= k, lambda m: m),
    ("prefix-lm", "N > prefix", lambda q, k, prefix: k <= q or k < prefix, lambda prefix: prefix),
]


@pytest.mark.parametrize(("label", "stated", "attends", "least_n"), STATED, ids=[row[0] for row in STATED])
def test_the_condition_is_where_the_closed_form_holds(label, stated, attends, least_n):
    """It holds from some N on and never before. There, where neighbouring cases have the same value, one is stated."""
    (row,) = (row for row in CLOSED if row.label == label)
    formula = formula_of(label)
    assert formula.cases()[0][1] == stated
    names = [item.name for item in pattern_of(row).resolved.params]
    for params in (dict(zip(names, found, strict=True)) for found in product(range(1, 7), repeat=len(names))):
        for n in range(1, 16):
            count = sum(attends(q, k, **params) for q in range(n) for k in range(n))
            assert formula.at({"N": n, **params}) == count
            holds = row.pairs(n, *params.values()) == count
            assert holds == (n >= least_n(**params)), (n, params)
            assert holds or not value_of(stated, {"N": n, **params})
            assert not holds or n == least_n(**params) or value_of(stated, {"N": n, **params})
