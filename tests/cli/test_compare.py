"""`patterndsl prove` and `diff` with an expression beside a spec."""

import json
from pathlib import Path

import pytest

from patterndsl.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("spec", "claim", "other", "code", "said"),
    [
        ("mistral", "equals", "window(w - 1, 0)", 0, "Proven: equals, for all N and all w ≥ 1"),
        ("mistral", "equals", "window(w, 0)", 1, "only the second has the pair: q = 1, k = 0 at N = 2, w = 1"),
        ("axial", "within", "q.row == k.row | q.col == k.col", 0, "Proven: within, for all N and all cols ≥ 1"),
        ("mistral", "equals", "window(x, 0)", 1, "unknown name `x`"),
    ],
)
def test_an_expression_sees_what_the_spec_declares(
    spec: str, claim: str, other: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prove", str(EXAMPLES / f"{spec}.yaml"), claim, other]) == code
    seen = capsys.readouterr()
    assert said in seen.out + seen.err


def test_dead_terms_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "window(3) | window(2)", "dead-terms", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [item["text"] for item in found["dead"]] == ["window(2)"]
    assert found["num_open"] == 0


def test_a_difference_is_data_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "difference.png"
    words = ["diff", "recent(w)", "recent(w + 1)", "--set", "w=3", "-n", "20", "-o", str(picture), "--json"]
    assert main(words) == 1
    assert json.loads(capsys.readouterr().out)["equals"]["verdict"] == "Refuted"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("diff examples/sources/linformer.yaml all -o x.png", "add --term mixtures"),
        ("prove causal equals examples/sources/alibi.yaml", "put it first, with --term self"),
        ("reach examples/sources/linformer.yaml -n 16", "add --term mixtures"),
        (
            "show examples/sources/native-sparse.yaml -n 64 -o x.png",
            "add --term compressed.compressed, then the same for each",
        ),
        ("compile examples/sources/linformer.yaml -n 16 -o x.safetensors", "add --term mixtures"),
    ],
)
def test_the_cure_is_an_option(line: str, cure: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert f"help: {cure}" in said and "patterndsl." not in said
