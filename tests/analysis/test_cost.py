"""Figures of a report: device rates as measured, the order with roots and logarithms, arguments that cannot be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patterndsl
from patterndsl import PatternError
from patterndsl.lower.devices import DEVICES

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "file"), [("h200", "device_rates_h200.json"), ("cpu-2-core", "device_rates_cpu.json")]
)
def test_device_rates_are_the_measured_ones(name: str, file: str) -> None:
    measured = json.loads((RESULTS / file).read_text())["rates"]
    for rate, value in measured.items():
        assert getattr(DEVICES[name], rate) == pytest.approx(value, rel=0.05), rate


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("causal & recent(isqrt(N))", "Θ(N√N)"),
        ("causal & window(isqrt(N))", "Θ(N√N)"),
        ("recent(log2(N) + 1)", "Θ(N·log N)"),
        ("causal & strided(isqrt(N) + 1)", None),
        ("recent(64)", "Θ(N)"),
        ("causal", "Θ(N²)"),
    ],
)
def test_orders(text: str, order: str | None) -> None:
    found = patterndsl.parse(text).report().order
    assert found == order or order is None


@pytest.mark.parametrize(
    ("keywords", "code"),
    [
        ({"head_dim": -1}, "E406"),
        ({"heads": 8, "kv_heads": 3}, "E406"),
        ({"heads": 8, "kv_heads": 0}, "E406"),
        ({"block": 0}, "E406"),
        ({"block": 1.5}, "E406"),
        ({"n": 2**41}, "E406"),
        ({"layer": -1}, "E406"),
        ({"dtype": "float7"}, "E502"),
        ({"inputs": {"doc": np.zeros(3, dtype=int)}}, "E502"),
        ({"inputs": {"doc": np.zeros(64) + 0.5}}, "E502"),
        ({"inputs": {"x": [1]}}, "E501"),
    ],
)
def test_what_a_report_cannot_be_asked(keywords: dict[str, Any], code: str) -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    with pytest.raises(PatternError) as caught:
        pattern.report(**{"n": 64, **keywords})
    assert caught.value.diagnostics[0].code == code


@pytest.mark.parametrize("n", [10**8, 10**12])
def test_figures_of_formulas_have_no_limit(n: int) -> None:
    report = patterndsl.parse("causal & recent(w)", params={"w": 3}).report(n)
    assert report.pairs is not None and report.pairs.value == 3 * n - 3
    assert report.efficiency is None and not report.times
    assert report.lines()[-1].endswith("tiles and times: left out, the tiles are too many to count")


def test_no_more_tiles_are_counted_than_seconds_allow() -> None:
    report = patterndsl.parse("causal & (block(16) | columns(16, 2))").report(2**20)
    assert report.pairs is not None and report.pairs.certainty == "Exact"
    assert report.groups[0].figures is not None and report.groups[0].figures.tiles is None


def test_draws_at_a_length_without_tiles_are_bounded() -> None:
    report = patterndsl.parse("causal & (recent(4) | random(3))").report(10**9)
    assert report.pairs is not None and report.pairs.certainty == "UpperBound"
    unknown = patterndsl.parse("q * k % 7 == 3").report(10**9)
    assert unknown.pairs is None
    assert unknown.lines()[-1].strip().startswith("no figures: the tiles are too many to count")


def test_missing_inputs_are_named_with_the_cure() -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    report = pattern.report(64)
    assert report.missing == ("doc",)
    cure = "and a report draws none at random; give --input-values doc=0*100,1*156, or in Python inputs={"
    assert f"`doc`, {cure}" in str(report)
    counted = pattern.report(64, inputs={"doc": [0] * 64}).pairs
    assert counted is not None and counted.value == 64 * 65 // 2


def test_dtypes_of_pytorch_and_whose_rate_it_is() -> None:
    pattern = patterndsl.parse("causal & recent(4)")
    assert str(pattern.report(64, dtype=torch.bfloat16)) == str(pattern.report(64, dtype="bfloat16"))
    gpu, cpu = (line for line in pattern.report(64).lines() if "forward, " in line)
    assert gpu.endswith(" (at the rate of bfloat16)") and "rate" not in cpu


def test_head_and_layer_are_said_where_they_matter() -> None:
    pattern = patterndsl.parse("causal & recent(w[head % 2]) & layer >= 0", params={"w": [2, 4]})
    assert pattern.report(layer=3).lines()[0] == f"{pattern.title}, head 0 of 1, layer 3"
    assert "\n" not in pattern.title
    assert pattern.report(heads=2, layer=3).lines()[0] == f"{pattern.title}, layer 3"
    assert patterndsl.parse("causal").report(layer=3).lines()[0] == "causal"


def test_what_cannot_be_proven() -> None:
    pattern = patterndsl.parse("params: {w: {default: 3, min: 1}}\nattend: recent(w)")
    for keywords in ({"n": -3}, {"n": "x"}, {"params": {"w": 2.5}}, {"params": {"w": 0}}, {"params": {"v": 1}}):
        with pytest.raises(PatternError):
            pattern.prove("causal", **keywords)
    text: Any = "causal"  # where a pattern is wanted
    with pytest.raises(PatternError):
        pattern.prove("within", text)


def test_small_tiles_do_not_search_small_lengths() -> None:
    report = patterndsl.parse("causal & (recent(3) | strided(4))").report(24, block=4)
    mask = patterndsl.parse("causal & (recent(3) | strided(4))").compile(24).mask()
    assert report.pairs is not None and report.pairs.value == int(mask.sum())


def test_a_cache_that_follows_the_length_is_bounded() -> None:
    policy = patterndsl.parse("causal & k in N // 2..N // 2 + w | q == k", params={"w": 2}).cache_policy()
    assert str(policy).startswith("bounded(w + 1); keep ")
