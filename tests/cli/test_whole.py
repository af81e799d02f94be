"""Commands that run, explain, race and compare take a pattern with sources, scores, branches or roles as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl.cli import main
from patterndsl.runtime import contest, flex, trial

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = [spec for folder in ("sources", "roles", "selected", "learned") for spec in (EXAMPLES / folder).glob("*.yaml")]
N = 25
SMALL = {
    **dict.fromkeys(("longest", "length"), 32),
    **dict.fromkeys(("b", "f", "page", "features", "w"), 8),
    **dict.fromkeys(("memory", "compressed", "m", "low", "budget"), 5),
    **dict.fromkeys(("l", "n", "r", "top", "clusters", "blocks"), 3),
    "d": 2,
}
"""Parameters of the examples for a short sequence."""
GIVEN = {
    "hashed-documents": "doc=0*10,1*15",
    "selected-documents": "doc=0*10,1*15",
    "topics-and-strides": "topic=0*5,1*5,2*15",
    "bigbird-plan": "plan=0,1,2,1,2,3,2,3,0,3,0,1",
}
"""What only a caller knows."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex._attend)
    monkeypatch.setattr(contest, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(contest, "TRIES", 1)


Said = Callable[..., Any]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(command: str, *words: object, code: int = 0) -> Any:
        assert main([command, *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def spec(path: Path) -> list[str]:
    names = {param.name for param in patterndsl.load(path).resolved.params}
    return [str(path), *(word for name in SMALL if name in names for word in ("--set", f"{name}={SMALL[name]}"))]


def inputs(path: Path) -> list[str]:
    return ["--input-values", GIVEN[path.stem]] if path.stem in GIVEN else []


SIZES = ("-n", N, "--heads", 2, "--head-dim", 16)
each = pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)


@each
def test_run(path: Path, said: Said) -> None:
    found = said("run", *spec(path), *inputs(path), *SIZES, "--backward", "--seed", 0)
    check = found["check"]
    assert check["passed"] and check["every_row"] and 0 < check["num_pairs"] <= check["num_all"]
    assert {"output", "query gradient", "value gradient"} <= {item["what"] for item in check["deviations"]}
    assert found["program"]["forward"]["seconds"] > 0 and found["dense"]["forward"] is not None


@each
def test_explain(path: Path, said: Said) -> None:
    found = said("explain", *spec(path), "-n", N, "--heads", 2)
    assert found["forward_s"] >= 0
    for name, term in found.get("terms", {}).items():
        assert (term["expected"] is None) <= (name in found["unknown"])


@each
def test_bench(path: Path, said: Said) -> None:
    found = said("bench", *spec(path), *inputs(path), *SIZES, "--seconds", 0)
    (pattern,) = found["patterns"]
    entries = {entry["label"]: entry for entry in pattern["contest"]["entries"]}
    assert entries["patterndsl"]["forward"]["seconds"]["median"] > 0
    assert all(entry["forward"] for label, entry in entries.items() if label.startswith("dense"))
    why = entries["FlexAttention"]["skipped"]
    assert UNSAID[path.stem] in why if path.stem in UNSAID else why is None


UNSAID = {
    **dict.fromkeys(("linear-transformer", "performer", "lightning", "window-and-sums"), "no sums of features"),
    **dict.fromkeys(("synthesizer-dense", "synthesizer-factored", "synthesizer-random"), "made up"),
    **dict.fromkeys(("transformer-xl", "transformer-xl-same-length", "compressive"), "neither query nor key"),
    **dict.fromkeys(("etc-projections", "longformer-projections"), "roles"),
    **dict.fromkeys(("reformer", "routing-transformer"), "counts a key once"),
}
"""Why FlexAttention has no part."""


@each
def test_diff(path: Path, said: Said) -> None:
    found = said("diff", path, path, "-n", 100, *(["--input-values", AT_100[path.stem]] if path.stem in AT_100 else []))
    terms = found.get("terms", {"": found})
    assert {term["equals"]["verdict"] for term in terms.values()} == {"Proven"}
    assert not any(term["only_first"] or term["only_second"] for term in terms.values()) and not found["besides"]


AT_100 = {
    "hashed-documents": "doc=0*50,1*50",
    "selected-documents": "doc=0*50,1*50",
    "bigbird-plan": "plan=0,1,0,0,1,1",
    "topics-and-strides": "topic=0*50,1*50",
}
