"""Advice: what is said of what, that the numbers in it are right, and that nothing is said of what is well.

specs/CODE-name.yaml and the lines of expressions.pat draw the warnings in the .txt beside them, which `--update-golden`
rewrites; comments say at which length. The lines of clean.pat draw none. Numbers are counted here a second time, from
masks, with code of its own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import patterndsl
from patterndsl import PatternError
from patterndsl.diagnostics import CODES, MAX_ERRORS, Diagnostic, render
from tests import brute
from tests.strategies import Case, cases

HERE = Path(__file__).parent
SPECS = sorted((HERE / "specs").glob("*.yaml"))
EXPRESSIONS = (HERE / "expressions.pat").read_text().splitlines()
CLEAN = (HERE / "clean.pat").read_text().splitlines()
INPUTS = {"doc": "int[N]", "chosen": "bool[N]"}


def advice(pattern: patterndsl.Pattern, text: str) -> tuple[Diagnostic, ...]:
    sizes = {name: int(size) for name, size in re.findall(r"# (n|heads|layer): (\d+)$", text, re.MULTILINE)}
    return pattern.lint(**sizes)


def parsed(text: str) -> patterndsl.Pattern:
    named = re.search(r"# inputs: (.*)$", text)
    return patterndsl.parse(text, inputs={name: INPUTS[name] for name in named[1].split()} if named else None)


def compare(found: str, expected: Path, update: bool) -> None:
    if update:
        expected.write_text(found)
    assert found == expected.read_text()


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_warnings_of_a_spec(path: Path, monkeypatch: pytest.MonkeyPatch, update_golden: bool) -> None:
    monkeypatch.chdir(path.parent)
    found = advice(patterndsl.load(path.name), path.read_text())
    assert {item.code for item in found} == {path.stem.split("-")[0]}
    assert {item.severity for item in found} == {"warning"}
    compare(render(found) + "\n", path.with_suffix(".txt"), update_golden)


def test_warnings_of_expressions(update_golden: bool) -> None:
    found = [render(advice(patterndsl.parse(text), text)) for text in EXPRESSIONS]
    assert all(found[:-1])
    compare("\n\n".join(found).rstrip() + "\n", HERE / "expressions.txt", update_golden)


@pytest.mark.parametrize("text", CLEAN)
def test_nothing_is_said_of_what_is_well(text: str) -> None:
    assert advice(parsed(text), text) == ()


def test_every_code_has_an_example() -> None:
    shown = set(re.findall(r"warning\[(W\d+)\]", (HERE / "expressions.txt").read_text()))
    shown |= {path.stem.split("-")[0] for path in SPECS}
    assert shown == {code for code in CODES if code.startswith("W")}


def test_a_length_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(PatternError, match="E404"):
        patterndsl.parse("same(row)", grid={"row": 8, "col": 8}).lint(65)


@pytest.mark.parametrize("text", ["window(q * q)", "random(900, seed = 1, avoid = k % 100 > 0)"])
def test_what_would_take_long_draws_no_warning(text: str) -> None:
    before = time.process_time()
    assert {item.code for item in patterndsl.parse(text).lint()} <= {"W304"}
    assert time.process_time() - before < 3


@pytest.mark.parametrize("n", [0, 1, 2, 63, 127, 128, 129, 130])
@pytest.mark.parametrize("text", ["all", "causal", "none", "k < q", "random(200, seed = 1)", "q % 64 == k % 64"])
def test_short_texts(text: str, n: int) -> None:
    codes = [item.code for item in patterndsl.parse(text).lint(n)]
    assert ("W301" in codes) == (n > 0 and text in ("none", "k < q"))
    assert ("W403" in codes) == (n > 128 and text != "none")


# ---- the numbers, a second time -----------------------------------------------------------------------------


def distances(n: int) -> Any:
    at = np.arange(n)
    return at[:, None] - at[None]


def times(mask: Any, block: int, rows: Any = None, columns: Any = None) -> float:
    """Pairs of the live tiles of a mask for each of its own, its rows and columns in some order."""
    n = len(mask)
    mask = mask[np.arange(n) if rows is None else rows][:, np.arange(n) if columns is None else columns]
    tiles = mask.reshape(n // block, block, n // block, block).any(axis=(1, 3))
    return float(tiles.sum() * block**2 / mask.sum())


def numbers(found: Sequence[Diagnostic], code: str) -> list[float]:
    """What is said to be so many times, in the order of the text."""
    (item,) = (item for item in found if item.code == code)
    return [float(number) for number in re.findall(r"([\d.]+)x", f"{item.message} {item.help}")]


def rounded(factor: float) -> float:
    return round(factor) if factor >= 9.95 else round(factor, 1)


def test_a_stride_in_its_classes() -> None:
    mask = (distances(4096) >= 0) & (distances(4096) % 64 == 0)
    order = np.concatenate([np.arange(start, 4096, 64) for start in range(64)])
    said = numbers(patterndsl.parse("causal & strided(64)").lint(), "W401")
    found = [times(mask, 128), times(mask, 128, order, order), times(mask, 64, order, order)]
    assert said == [rounded(item) for item in found] == [65, 3.9, 2.0]


def test_columns_of_a_grid() -> None:
    at = np.arange(4096)
    mask = at[:, None] % 64 == at[None] % 64
    order = at.reshape(64, 64).T.ravel()
    said = numbers(patterndsl.parse("same(row) | same(col)", grid={"row": 64, "col": 64}).lint(), "W401")
    assert said == [
        rounded(times(mask, 128)),
        rounded(times(mask, 128, order, order)),
        rounded(times(mask, 64, order, order)),
    ]


def test_keys_alone() -> None:
    mask = np.broadcast_to(np.arange(4096) % 32 == 0, (4096, 4096))
    order = np.argsort(np.arange(4096) % 32, stable=True)
    said = numbers(patterndsl.parse("k % 32 == 0").lint(), "W401")
    assert said == [rounded(times(mask, 128)), rounded(times(mask, 128, None, order))] == [32, 1.0]


def test_patches_of_a_grid() -> None:
    row, column = np.divmod(np.arange(4096), 64)
    patch = row // 8 * 8 + column // 8
    mask = patch[:, None] == patch[None]
    order = np.argsort(patch, stable=True)
    grid = {"row": 64, "col": 64}
    text = "q.row // 8 == k.row // 8 & q.col // 8 == k.col // 8"
    said = numbers(patterndsl.parse(text, grid=grid).lint(), "W401")
    assert said[:2] == [rounded(times(mask, 128)), rounded(times(mask, 128, order, order))]


def test_smaller_tiles() -> None:
    mask = (distances(4096) >= 0) & (distances(4096) < 64)
    found = {block: rounded(times(mask, block)) for block in (32, 64, 128, 256)}
    said = numbers(patterndsl.parse("recent(64)").lint(), "W402")
    assert said == [found[128], found[64], *found.values()]


def test_a_ragged_length() -> None:
    live = np.add.reduceat(np.add.reduceat(distances(4100) >= 0, range(0, 4100, 128)), range(0, 4100, 128), axis=1) > 0
    (found,) = patterndsl.parse("causal").lint(4100)
    edge = live[-1].sum() + live[:-1, -1].sum()
    assert f"cost {edge} of {live.sum()} live tiles of 128, {edge / live.sum():.0%} (N = 4,100)" in found.message


def test_almost_causal() -> None:
    mask = (distances(4096) >= 0) & (distances(4096) < 256) | (np.arange(4096)[:, None] < 4)
    (found,) = patterndsl.parse("causal & recent(256) | q < 4").lint()
    assert f"attend {(mask & (distances(4096) < 0)).sum():,} later keys" in found.message


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        ("window(sliding_window, 0)", "-512 <= k - q <= 0", "recent(512)"),
        ("causal & window(sliding_window)", "causal & abs(q - k) <= 512", "recent(512)"),
        ("window(attention_window)", "abs(q - k) <= 512", "window(256)"),
        ("recent(window_size_left)", "0 <= q - k < 512", "window(512, 0)"),
        ("window(kernel_size)", "abs(q - k) <= 512", "-256 <= q - k < 256"),
        ("dilated(kernel_size, 1)", "abs(q - k) <= 512", "-256 <= q - k < 256"),
    ],
)
def test_keys_of_a_window(text: str, ours: str, theirs: str) -> None:
    """The query in the middle of a long text has as many keys as is said."""
    (name,) = re.findall(r"\w+_\w+", text)
    found = [item for item in patterndsl.parse(text, params={name: 512}).lint() if item.code == "W201"]
    said = [int(number.replace(",", "")) for number in re.findall(r"gives (?:a query )?([\d,]*\d)", found[0].message)]
    counts = [patterndsl.parse(pattern).compile(4096).mask()[0, 2048].sum().item() for pattern in (ours, theirs)]
    assert said == counts


# ---- random specs -------------------------------------------------------------------------------------------


@given(cases(max_length=40))
def test_random_specs(case: Case) -> None:
    """Nothing is raised, with a length or without; empty rows are those that a second reading finds."""
    pattern = case.pattern()
    assert len(pattern.lint(heads=case.heads, layer=case.layer)) <= MAX_ERRORS
    if "n" not in case.sizes:
        return
    n = case.sizes["n"]
    found = pattern.lint(n, heads=case.heads, layer=case.layer)
    assert list(found) == sorted(set(found), key=found.index)
    if pattern.bind(n, heads=case.heads, layer=case.layer).inputs:
        return
    keep = brute.keep(pattern.spec, brute.lengths(n), case.heads, case.layer, case.inputs)
    most = (~keep.any(axis=2)).sum(axis=1).max()
    said = [item.message for item in found if item.code == "W301"]
    assert bool(said) == bool(most)
    if said and not said[0].startswith(("no query", "quer")):
        number = re.match(r"(?:the (?:first|last) )?(\d+)", said[0])
        assert number is not None
        assert int(number[1]) == most


@pytest.mark.parametrize(("n", "shown"), [(4096, 4096), (8192, 4096), (16_384, 4096), (65_536, 4096)])
def test_a_text_with_too_many_pairs_is_told_from_a_shorter_one(n: int, shown: int) -> None:
    found = patterndsl.parse("causal & (block(16) | columns(16, 2))").lint(n, heads=1)
    (advice,) = (item for item in found if item.code == "W401")
    assert advice.message.endswith(f"(N = {shown:,})")
