"""Figures of a report: device rates as measured, the order with roots and logarithms, arguments that cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest

import patterndsl
from patterndsl import PatternError
from patterndsl.analysis.cost import DEVICES

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
        ({"n": 2**40}, "E504"),
        ({"dtype": "float7"}, "E502"),
        ({"inputs": {"doc": np.zeros(3, dtype=int)}}, "E502"),
        ({"inputs": {"doc": np.zeros(64) + 0.5}}, "E502"),
        ({"inputs": {"x": [1]}}, "E501"),
    ],
)
def test_what_a_report_cannot_be_asked(keywords: dict[str, object], code: str) -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    with pytest.raises(PatternError) as caught:
        pattern.report(**{"n": 64, **keywords})  # type: ignore[arg-type]
    assert caught.value.diagnostics[0].code == code


def test_what_cannot_be_proven() -> None:
    pattern = patterndsl.parse("params: {w: {default: 3, min: 1}}\nattend: recent(w)")
    for keywords in ({"n": -3}, {"n": "x"}, {"params": {"w": 2.5}}, {"params": {"w": 0}}, {"params": {"v": 1}}):
        with pytest.raises(PatternError):
            pattern.prove("causal", **keywords)
    with pytest.raises(PatternError):
        pattern.prove("within", "causal")  # type: ignore[arg-type]


def test_small_tiles_do_not_search_small_lengths() -> None:
    report = patterndsl.parse("causal & (recent(3) | strided(4))").report(24, block=4)
    mask = patterndsl.parse("causal & (recent(3) | strided(4))").compile(24).mask()
    assert report.pairs is not None and report.pairs.value == int(mask.sum())


def test_a_cache_that_follows_the_length_is_bounded() -> None:
    policy = patterndsl.parse("causal & k in N // 2..N // 2 + w | q == k", params={"w": 2}).cache_policy()
    assert str(policy).startswith("bounded(w + 1); keep ")
