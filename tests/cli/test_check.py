"""`patterndsl check`: what is right, what is wrong, and as data."""

import json
import os
import threading
from pathlib import Path

import pytest

from patterndsl.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_all_examples_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(map(str, EXAMPLES.glob("*.yaml")))
    assert main(["check", "--no-lint", *paths]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: ok" for path in paths]


# what is known of them: only strides, columns of grids, small squares and blocks, and draws waste tiles of 128
WASTEFUL = {
    "axial": ["W401"],
    "bigbird": ["W402"],
    "four-kinds-of-heads": ["W401", "W401", "W401"],
    "image-transformer-2d": ["W402"],
    "longformer-dilated": ["W401"],
    "longnet": ["W401"],
    "neighborhood-2d": ["W401"],
    "neighborhood-plus-axial": ["W401"],
    "sparse-transformer-fixed": ["W401"],
    "sparse-transformer-fixed-by-head": ["W301", "W401"],  # the paper's columns alone leave the first rows empty
    "sparse-transformer-fixed-by-layer": ["W402"],
    "sparse-transformer-strided": ["W401"],
    "sparse-transformer-strided-by-head": ["W401"],
    "sparse-transformer-strided-by-layer": ["W402"],
    "swin": ["W401"],
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_warnings_about_examples(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["files"]
    assert [item["code"] for item in found["warnings"]] == WASTEFUL.get(path.stem, [])


def test_warnings_are_said_and_change_no_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal & k < q", "causal"]) == 0
    out, err = capsys.readouterr()
    assert out == "causal & k < q: ok, 1 warning\ncausal: ok\n"
    assert err.startswith("warning[W301]: query 0 attends no key; its output is 0 (for every N)\n --> <expression>:1:1")


def test_strict_warnings_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal & k < q", "causal", "--strict"]) == 1
    out, err = capsys.readouterr()
    assert out == "causal: ok\n"
    assert err.startswith("error[W301]: query 0")
    assert main(["check", "causal", "--strict"]) == 0


def test_warnings_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "causal & k < q", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["files"]
    (warning,) = found["warnings"]
    assert (found["ok"], found["errors"], warning["severity"], warning["column"]) == (True, [], "warning", 1)
    assert main(["check", "causal & k < q", "--json", "--strict"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["files"]
    (mistake,) = found["errors"]
    assert (found["ok"], found["warnings"], mistake["severity"], mistake["code"]) == (False, [], "error", "W301")


def test_warnings_are_yellow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["check", "causal & k < q"])
    assert "\x1b[1;33mwarning[W301]\x1b[0m" in capsys.readouterr().err


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
    assert found["files"][0] == {"spec": "causal", "ok": True, "errors": [], "warnings": []}
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("params: {w: {default: 3, min: 5}}\nattend: recent(w)\n", "parameter `w` is 3, and must be at least 5"),
        ("params: {w: 0, b: 0}\nattend: causal & (recent(w) | block(b))\n", "division by 0"),
        ("params: {w: [1, 2], b: 0}\nattend: causal & recent(w[layer]) & block(b)\n", "division by 0"),
    ],
)
def test_constants_are_checked_without_a_length(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["check", str(tmp_path / "wrong.yaml")]) == 1
    err = capsys.readouterr().err
    assert said in err and "^" in err
    assert main(["report", str(tmp_path / "wrong.yaml")]) == 1


def test_a_list_that_is_too_short_for_the_heads(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "recent(w[head])", "--set", "w=[1,2]"]
    for given in ([], ["-n", "64"]):
        assert main([*words, *given]) == 0  # as many heads as the list has items for
    for given in (["--heads", "3", "-n", "64"], ["--heads", "3"]):
        assert main([*words, *given]) == 1
        assert "--heads" in capsys.readouterr().err
    assert main([*words, "-n", "64", "--heads", "2"]) == 0


@pytest.mark.parametrize("command", ["show", "run", "compile", "reach", "explain"])
def test_every_command_says_that_fewer_heads_may_be_meant(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "causal & recent(w[head])", "--set", "w=[1,2]", "-n", "64"]
    words += ["-o", str(tmp_path / "plan.safetensors")] if command == "compile" else []
    assert main([*words, "--heads", "8"]) == 1
    assert "fewer heads than 8: --heads" in capsys.readouterr().err
    assert main(words) == 0  # as many as the list has items for


def test_a_parameter_that_an_expression_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["check", "causal"], ["report", "causal"], ["prove", "causal", "causal"], ["show", "causal"]):
        assert main([*command, "--set", "zz=3"]) == 1
        assert "error[E401]: `causal` has no parameter `zz`" in capsys.readouterr().err
    assert main(["prove", "causal", "within", "all & k < N + w", "--set", "w=3"]) == 0
    assert main(["check", "window(w)", "--set", "w=b + 1", "--set", "b=3"]) in (0, 1)  # one may name the other
    assert "E401" not in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/nowhere/spec", "./spec", "../spec"])
def test_what_begins_like_a_path_is_one(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", path]) == 1
    assert "error[E601]: cannot read" in capsys.readouterr().err


def test_a_spec_from_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "spec"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("attend: causal & windw(3)",), daemon=True).start()
    assert main(["check", str(pipe)]) == 1
    assert f"{pipe}:1:18" in capsys.readouterr().err
