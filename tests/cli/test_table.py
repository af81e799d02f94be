"""`patterndsl table`: the rows are what specs say, and the committed table is what the command writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import patterndsl
from patterndsl.cli import main
from patterndsl.cli.table_command import Row
from patterndsl.composite import Composite
from patterndsl.loading import load
from patterndsl.nn import Attention
from patterndsl.systems import parameters_added, system

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_committed_table_is_the_derived_one(tmp_path: Path) -> None:
    """And each cell in which the survey has something else has its reason."""
    target = tmp_path / "systems.md"
    assert main(["table", "-o", str(target)]) == 0
    text = target.read_text()
    assert text == (EXAMPLES / "systems.md").read_text()
    assert text.count("the survey has") == text.count("*") - 1 and "no reason known" not in text


WITH_PARAMETERS = sorted(path for folder in ("sources", "roles") for path in (EXAMPLES / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", WITH_PARAMETERS, ids=lambda path: path.stem)
def test_parameters_are_those_of_a_layer(path: Path) -> None:
    loaded = load(path)
    small = {"longest": 24, "length": 24, "b": 4} | dict.fromkeys(("low", "m", "memory", "compressed"), 5)
    names = {param.name for param in loaded.resolved.params}
    pattern = loaded.with_params(**{name: value for name, value in small.items() if name in names})
    assert isinstance(pattern, Composite)
    layer, plain = Attention(pattern, 24, 4), Attention("causal", 24, 4)
    added = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == parameters_added(pattern, 24, 4, 6)


def test_rows_of_own_specs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "causal", "causal & recent(64)", "all", "-n", "512", "--json"]) == 0
    dense, recent, full = json.loads(capsys.readouterr().out)
    assert (dense["classes"], dense["time"], dense["decodable"], dense["state"]) == ([], "Θ(N²)", "yes", "t + 1")
    assert (recent["classes"], recent["time"], recent["layers"]) == (["FP"], "Θ(N)", 9)
    assert (dense["time_certainty"], dense["memory"]) == ("Exact", "Θ(N)")
    assert (full["decodable"], full["state"], full["layers"]) == ("no", "-", 1)


@pytest.mark.parametrize(
    ("text", "time", "memory"),
    [
        ("attend: causal", "Θ(N²)", "Θ(N)"),
        ("attend: causal\nscore: synthesize(dense, length = 512)", "Θ(N²)", "Θ(N²)"),
        ("attend: causal\nscore: elu", "Θ(N)", "Θ(N)"),
        ('sources: {x: "sort(16, 512)"}\nattend: {self: recent(4), x: all}', "Θ(N²)", "Θ(N²)"),
        ("params: {r: {default: isqrt(N), min: 1}}\nattend: recent(r)", "Θ(N√N)", "Θ(N)"),
        ("attend: causal & k % 8 == 0 & q < 4", "Θ(N)", "Θ(N)"),
        ("labels: {a: lsh(buckets = 8)}\nattend: q.a == k.a & window(3)", "Θ(N·log N)", "Θ(N)"),
        ("select: {s: topk(4)}\nattend: s", "Θ(N²)", "Θ(N)"),
        ("inputs: {doc: 'int[N]'}\nattend: q.doc == k.doc", "≤ Θ(N²)", "Θ(N)"),
        ("inputs: {doc: 'int[N]'}\nattend: q.doc == k.doc & recent(9)", "Θ(N)", "Θ(N)"),
    ],
)
def test_growth(text: str, time: str, memory: str) -> None:
    pattern = patterndsl.parse(text)
    row = Row(system(pattern, n=512, heads=4, dim=32), pattern, None)
    assert row.cells()[2:4] == [time, memory]


def test_a_window_that_is_wider_than_the_sequence_is_no_memory() -> None:
    found = [system(patterndsl.parse(text), n=64, heads=1, dim=8) for text in ("recent(4096)", "recent(9) | k < 4")]
    assert [item.classes for item in found] == [("FP",), ("FP", "M")]


def test_layers_that_differ_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "layer % 2 == 0 & recent(4) | layer % 2 == 1 & causal", "-n", "64"]) == 0
    assert "its layers differ" in capsys.readouterr().out


def test_a_page_with_pictures(tmp_path: Path) -> None:
    target = tmp_path / "systems.html"
    assert main(["table", str(EXAMPLES / "sources" / "memory-compressed.yaml"), "-n", "256", "-o", str(target)]) == 0
    text = target.read_text()
    assert text.count("data:image/png;base64,") == 2  # of the tokens and of the summaries
    assert "memory-compressed" in text


def test_layers_to_reach_follow_what_keys_are_made_of() -> None:
    """A window of 64 takes 8 layers through 512 tokens; with means of all that is past, one is enough."""
    window = patterndsl.parse("sources: {x: memory(2)}\nattend: {self: recent(64), x: all}")
    pooled = patterndsl.parse("sources: {x: pool(16)}\nattend: {self: recent(64), x: causal}")
    assert [system(item, n=512, heads=4, dim=32).layers for item in (window, pooled)] == [9, 1]


def test_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "causal", "--dim", "100", "--heads", "8"]) == 2
    assert main(["table", "recnt(4)"]) == 1
    assert "did you mean `recent`" in capsys.readouterr().err
