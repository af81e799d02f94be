"""`patterndsl check`: what is right, what is wrong, and as data."""

import json
from pathlib import Path

import pytest

from patterndsl.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_all_examples_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(map(str, EXAMPLES.glob("*.yaml")))
    assert main(["check", *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: ok" for path in paths]


def test_says_what_is_wrong_with_each_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "wrong.yaml"
    spec.write_text("attend: causal & windw(3)\nparms: {}\n")
    assert main(["check", str(spec), "causal", "1 +"]) == 1
    out, err = capsys.readouterr()
    assert out == "causal: ok\n"
    assert "error[E201]: unknown name `windw`" in err
    assert f"{spec}:1:18" in err
    assert "^^^^" in err
    assert "did you mean `window`?" in err
    assert "did you mean `params`?" in err
    assert "error[E101]" in err
    assert "\x1b" not in err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal", "causal & windw(3)", "--json"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["ok"] is False
    assert found["files"][0] == {"spec": "causal", "ok": True, "errors": []}
    (mistake,) = found["files"][1]["errors"]
    assert (mistake["code"], mistake["line"], mistake["column"]) == ("E201", 1, 10)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["window(w)"], 1),
        (["window(w)", "--set", "w=3"], 0),
        (["window(w)", "--set", "w=isqrt(N)"], 0),
        (["window(w[head])", "--set", "w=[1,2,4]"], 0),
        (["q.row == k.row"], 1),
        (["q.row == k.row", "--grid", "row=8,col=8"], 0),
        (["q.row == k.row", "--grid", "row=8,col=8", "-n", "64"], 0),
        (["q.row == k.row", "--grid", "row=8,col=8", "-n", "65"], 1),
        (["same(doc)"], 1),
        (["same(doc)", "--declare", "doc=int[N]"], 0),
        (["same(doc)", "--declare", "doc=float[N]"], 1),
        ([str(EXAMPLES / "longformer.yaml"), "--set", "w=8"], 0),
        ([str(EXAMPLES / "longformer.yaml"), "--set", "w=isqrt(N)"], 0),
        ([str(EXAMPLES / "longformer.yaml"), "--set", "nothing=8"], 1),
        ([str(EXAMPLES / "longformer.yaml"), "--grid", "row=8"], 1),
    ],
    ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else None,
)
def test_parameters_grids_and_inputs(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == code
    assert ("error[E" in capsys.readouterr().err) == (code != 0)


def test_paths_that_nearly_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLES / "longfomer.yaml")]) == 1
    assert "did you mean longformer.yaml" in capsys.readouterr().err
    assert main(["check", str(EXAMPLES / "longformer")]) == 1
    assert "longformer.yaml?" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert main(["check", str(binary)]) == 1
    assert "E601" in capsys.readouterr().err
